"""curate: how fast MinHash and the Gopher filters are beside datatrove, on the same documents in the same run.

    modicum bench curate [--data FOLDER] [--limit 60s] [--quick] [--json]

Both read the same documents from memory in one process, in turns, and are timed by CPU seconds, so that no disk and no
other program is measured. datatrove's word splitter would come from spaCy; here both read the words of `data.rules`,
which is faster, so that the rest is compared. Decisions stand beside the rates: the documents that one side drops and
the other keeps. For MinHash datatrove's pairs are those that have a bucket in common (14 of 8 hashes, its default); a
document goes where a kept one before it has one.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from modicum.bench import fixtures
from modicum.bench.ports._dirty import plant
from modicum.core import registry
from modicum.core.choice import Choice
from modicum.core.errors import MissingExtra
from modicum.data import rules
from modicum.data.document import Document, Drop
from modicum.data.steps import Context

Keeps = Callable[[], set[str]]  # runs once over the documents; the ids that it keeps


@dataclass(frozen=True)
class Row:
    """One task. rates in MB of UTF-8 text a CPU second, the best of the rounds; differ: documents that only one
    keeps."""

    task: str
    documents: int
    megabytes: float
    rate: float
    their_rate: float
    ratio: float
    dropped: int
    differ: int


def measure(data: str | None = None, *, megabytes: float = 4.0, seconds: float = 20.0) -> list[Row]:
    """Each task in turns until `seconds` of CPU time are spent on it. Raises `MissingExtra` without datatrove."""
    documents = pool(data, megabytes)
    size = sum(d.nbytes for d in documents) / 1e6
    rows = []
    for task, (ours, theirs) in tasks(documents).items():
        best, spent, kept = [np.inf, np.inf], 0.0, [set[str](), set[str]()]
        while spent == 0 or spent < seconds:
            for k, run in enumerate((ours, theirs)):
                start = time.process_time()
                kept[k] = run()
                took = time.process_time() - start
                best[k], spent = min(best[k], took), spent + took
        rows.append(
            Row(
                task,
                len(documents),
                size,
                size / best[0],
                size / best[1],
                best[1] / best[0],
                len(documents) - len(kept[0]),
                len(kept[0] ^ kept[1]),
            )
        )
    return rows


def pool(data: str | None, megabytes: float) -> list[Document]:
    """Prose with copies, near copies and boilerplate among it."""
    corpus = fixtures.corpus(data, int(megabytes * 1e6), 10_000)
    prose = [d for d in corpus.train if d.domain != "code"] or list(corpus.train)
    return plant(prose, 0.05, 0)


def tasks(documents: Sequence[Document]) -> dict[str, tuple[Keeps, Keeps]]:
    """Ours and theirs, by task."""
    try:
        from datatrove.data import Document as Theirs
        from datatrove.pipeline.dedup import minhash as their_minhash
        from datatrove.pipeline.filters import gopher_quality_filter, gopher_repetition_filter
    except ImportError:
        raise MissingExtra("datatrove", "dev", "bench curate") from None

    for module in (gopher_quality_filter, gopher_repetition_filter):
        module.split_into_words = lambda text, language: rules.words(text)
    filters = [gopher_quality_filter.GopherQualityFilter(), gopher_repetition_filter.GopherRepetitionFilter()]
    others = [Theirs(text=d.text, id=d.id) for d in documents]

    def step(choice: str) -> Keeps:
        def run() -> set[str]:
            one: Any = registry.build("step", Choice.parse("step", choice))
            one.open(Context())
            return {item.id for item in one.run(documents) if not isinstance(item, Drop)}

        return run

    def gopher() -> set[str]:
        return {d.id for d in others if all(f.filter(d) is True for f in filters)}

    class Words:
        def word_tokenize(self, text: str) -> list[str]:
            return rules.words(text)

    their_minhash.load_word_tokenizer = lambda language: Words()
    # It names a folder that it would write to; signatures are only asked for here.
    signer = their_minhash.MinhashDedupSignature(tempfile.gettempdir(), their_minhash.MinhashConfig())
    hashed = signer._hash_func
    signer._hash_func = lambda text: hashed(text.encode())  # xxhash 4 takes no text

    def minhash() -> set[str]:
        seen: set[tuple[int, ...]] = set()
        kept = set()
        for d in others:
            shingles = signer.get_shingles(d.text)
            if not len(shingles):
                kept.add(d.id)
                continue
            buckets = {(k, *signature) for k, signature in enumerate(signer.get_signature(shingles))}
            if not buckets & seen:
                kept.add(d.id)
                seen |= buckets
        return kept

    return {"gopher": (step("gopher"), gopher), "minhash": (step("minhash"), minhash)}


def table(rows: Sequence[Row]) -> str:
    lines = [f"{'task':<10}{'MB':>7}{'MB/s':>9}{'datatrove':>11}{'ratio':>8}{'dropped':>9}{'differ':>8}"]
    lines += [
        f"{r.task:<10}{r.megabytes:>7.1f}{r.rate:>9.2f}{r.their_rate:>11.2f}{r.ratio:>8.1f}{r.dropped:>9}{r.differ:>8}"
        for r in rows
    ]
    return "\n".join(lines)


def as_dicts(rows: Sequence[Row]) -> list[dict[str, Any]]:
    return [asdict(row) for row in rows]
