"""Question/answer examples of a corpus, some of them asked with retrieved passages as answers will be asked for later.

Training on prompts that hold the right passage among others that a search returned teaches a model to answer from
passages and to cite them (RAFT, Zhang et al. 2024, arXiv:2403.10131; here every prompt holds the right passage).
The prompt is the one of `retrieve.ground.compose`; the target is a short answer and the passage's number. Half of
these examples ask for one documented fact (`data.questions`), half for what a pair of the corpus asks.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from modicum.adapt.examples import Example
from modicum.data.document import read_documents
from modicum.data.pairs import Pair, pairs, shorten
from modicum.data.questions import Question, questions
from modicum.retrieve.ground import compose
from modicum.retrieve.search import Hit, Searcher

ANSWER = 240  # characters of an answer from passages: its first paragraph, or the beginning of that
MATCHED = 60  # characters of a pair's answer that its passage must contain
T = TypeVar("T")


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
    `budget` tokens as `count` measures them; fewer where too few answers stand in an indexed passage that fits.
    """
    ranked = _ranked(pairs(read_documents(curated, side)), seed)
    wanted = round(min(limit, len(ranked)) * grounded) if searcher is not None else 0
    shown: list[Example] = []
    used: set[str] = set()
    if wanted and searcher is not None:
        facts = _ranked(questions(read_documents(curated, side)), seed)
        ask = _Asker(searcher, {d.id for d in read_documents(curated, side)}, passages, budget, count)
        made = _alternate(filter(None, map(ask.fact, facts)), filter(None, map(ask.pair, ranked)))
        for example in made:
            shown.append(example)
            used.add(example.id)
            if len(shown) == wanted:
                break
    bare = (Example.of(p.question, p.answer, p.id) for p in ranked if p.id not in used)
    return shown + [example for example, _ in zip(bare, range(limit - wanted), strict=False)]


def _ranked(items: Iterable[T], seed: int) -> list[T]:
    """In an order that their text and the seed alone decide."""

    def rank(one: T) -> bytes:
        return hashlib.blake2b(f"{seed}/{one}".encode("utf-8", "surrogatepass")).digest()

    return sorted(items, key=rank)


def _alternate(first: Iterator[T], second: Iterator[T]) -> Iterator[T]:
    """One of each in turn; what is left of the longer one at the end."""
    sides = [first, second]
    while sides:
        for side in list(sides):
            try:
                yield next(side)
            except StopIteration:
                sides.remove(side)


@dataclass
class _Asker:
    """Asks with passages of the documents named, by lexical search: an example, or None where the answer is in none."""

    searcher: Searcher
    documents: set[str]
    passages: int
    budget: int
    count: Callable[[str], int]
    rows: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))  # by document
    titled: dict[Any, int] = field(default_factory=dict)  # by source and title
    subset: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        for row, passage in enumerate(self.searcher.passages):
            head, separator, _ = passage.id.partition("::")
            document = head if separator else passage.id.rpartition("@")[0]
            if document in self.documents:
                self.rows[document].append(row)
                self.subset.append(row)
                self.titled.setdefault((passage.source, passage.title), row)

    def fact(self, question: Question) -> Example | None:
        row = self.titled.get((question.document, question.evidence))
        return None if row is None else self._example(question.id, question.question, question.answers[0], row)

    def pair(self, pair: Pair) -> Example | None:
        answer = " ".join(shorten(pair.answer.split("\n\n")[0], ANSWER).split())
        for row in self.rows.get(pair.id.rpartition("?")[0], []):
            if _contains(self.searcher.passages[row].text, pair.answer):
                return self._example(pair.id, pair.question, answer, row)
        return None

    def _example(self, id: str, question: str, answer: str, row: int) -> Example | None:
        hits: Sequence[Hit] = self.searcher.search(question, self.passages, "bm25", self.subset)
        right = self.searcher.passages[row]
        if right.id not in {h.passage.id for h in hits}:
            hits = [*hits[: self.passages - 1], Hit(right, 0.0, {})]
        messages, sources, _ = compose(question, hits, self.budget, self.count)
        source = next((s for s in sources if s.id == right.id), None)
        if source is None or not _contains(source.excerpt, answer):
            return None
        return Example(id, (*messages, {"role": "assistant", "content": f"{answer} [{source.number}]"}))


def _contains(text: str, answer: str) -> bool:
    head = " ".join(answer.strip("`").split())[:MATCHED]
    return bool(head) and head in " ".join(text.split())
