"""Question/answer examples of a corpus, some of them asked with retrieved passages as answers will be asked for later.

Training on prompts that hold the right passage among others that a search returned teaches a model to answer from
passages and to cite them (RAFT, Zhang et al. 2024, arXiv:2403.10131; here every prompt holds the right passage).
The prompt is the one of `retrieve.ground.compose`; the target is the answer's beginning and the passage's number.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from modicum.adapt.examples import Example
from modicum.data.document import read_documents
from modicum.data.pairs import Pair, pairs, shorten
from modicum.retrieve.ground import compose
from modicum.retrieve.search import Hit, Searcher

ANSWER = 240  # characters of an answer from passages: its first paragraph, or the beginning of that
MATCHED = 60  # characters of an answer that its passage must contain


def examples(
    curated: str | Path,
    side: str,
    limit: int,
    *,
    grounded: float = 0.0,
    searcher: Searcher | None = None,
    passages: int = 3,
    budget: int = 400,
    count: Callable[[str], int] = len,
    seed: int = 0,
) -> list[Example]:
    """At most `limit` examples of the `side` (train, heldout) of a curated folder, the same ones on every machine.

    grounded: fraction asked with `passages` found by `searcher` among those of the same side, in a prompt of at most
    `budget` tokens as `count` measures them; a pair whose passage is not indexed, or does not fit, is asked without.
    """
    ranked = _ranked(pairs(read_documents(curated, side)), seed)
    if not grounded or searcher is None:
        return [Example.of(p.question, p.answer, p.id) for p in ranked[:limit]]
    rows = _rows_by_document(searcher, {d.id for d in read_documents(curated, side)})
    subset = [row for found in rows.values() for row in found]
    with_passages: list[Example] = []
    without: list[Example] = []
    most = min(limit, len(ranked))
    wanted = round(most * grounded)
    for pair in ranked:
        asked = None
        if len(with_passages) < wanted:
            asked = _grounded(pair, searcher, rows, subset, passages, budget, count)
        if asked:
            with_passages.append(asked)
        elif len(without) < most - wanted:
            without.append(Example.of(pair.question, pair.answer, pair.id))
        if len(with_passages) + len(without) >= most:
            break
    return with_passages + without


def _ranked(found: Iterable[Pair], seed: int) -> list[Pair]:
    """The pairs in an order that their text and the seed alone decide."""

    def rank(pair: Pair) -> bytes:
        return hashlib.blake2b(f"{seed}/{pair.question}/{pair.answer}".encode("utf-8", "surrogatepass")).digest()

    return sorted(found, key=rank)


def _rows_by_document(searcher: Searcher, documents: set[str]) -> dict[str, list[int]]:
    rows: dict[str, list[int]] = defaultdict(list)
    for row, id in enumerate(searcher.passages.ids()):
        document = id.partition("::")[0].rpartition("@")[0] if "::" not in id else id.partition("::")[0]
        if document in documents:
            rows[document].append(row)
    return rows


def _grounded(
    pair: Pair,
    searcher: Searcher,
    rows: dict[str, list[int]],
    subset: Sequence[int],
    k: int,
    budget: int,
    count: Callable[[str], int],
) -> Example | None:
    wanted = _passage_of(pair, searcher, rows.get(pair.id.rpartition("?")[0], []))
    if wanted is None:
        return None
    hits = searcher.search(pair.question, k, "bm25", subset)
    if wanted.passage.id not in {h.passage.id for h in hits}:
        hits = [*hits[: k - 1], wanted]
    messages, sources, _ = compose(pair.question, hits, budget, count)
    number = next((s.number for s in sources if s.id == wanted.passage.id), None)
    answer = shorten(pair.answer.split("\n\n")[0], ANSWER)
    if number is None or not _contains(next(s.excerpt for s in sources if s.number == number), answer):
        return None
    return Example(pair.id, (*messages, {"role": "assistant", "content": f"{' '.join(answer.split())} [{number}]"}))


def _passage_of(pair: Pair, searcher: Searcher, rows: Iterable[int]) -> Hit | None:
    """The passage of the pair's document that holds its answer."""
    found = (searcher.passages[row] for row in rows)
    return next((Hit(p, 0.0, {}) for p in found if _contains(p.text, pair.answer)), None)


def _contains(text: str, answer: str) -> bool:
    head = " ".join(answer.strip("`").split())[:MATCHED]
    return bool(head) and head in " ".join(text.split())
