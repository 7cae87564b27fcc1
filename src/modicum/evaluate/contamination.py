"""Which graded items stand in a training corpus: exact n-grams of words, with document and span.

    hits = find({"item 3": "the question and its answer"}, [("document 7", "... text ...")], n=13)
    hits[0].item, hits[0].document, hits[0].start, hits[0].end      # characters of the document

Words are compared without case and punctuation. Thirteen in a row are the usual setting (Brown et al. 2020,
arXiv:2005.14165, appendix C), eight the strict one; an item shorter than n words is looked for as a whole if it has at
least eight, else it cannot be told and is counted as such. The items' n-grams are indexed, exactly rather than by a
filter, and the corpus is read once, so memory grows with the items alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from modicum.core.errors import UserError
from modicum.evaluate.compare import clustered_error

SHORTEST = 8  # words: below, a match means nothing
_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")


@dataclass(frozen=True)
class Hit:
    """`words` words in a row of the item that stand in `document` from character `start` to `end`."""

    item: str
    document: str
    start: int
    end: int
    words: int
    text: str

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def words_of(text: str) -> list[tuple[str, int, int]]:
    """(folded word, start, end) in the text."""
    return [(m.group().casefold().replace("’", "'"), m.start(), m.end()) for m in _WORD.finditer(text)]


def find(items: Mapping[str, str], documents: Iterable[tuple[str, str]], n: int = 13) -> list[Hit]:
    """Every longest run of at least n common words, by document and place. Raises UserError for n below 8."""
    if n < SHORTEST:
        raise UserError(f"n={n}: fewer than {SHORTEST} words in a row stand in any large corpus; give 8 (strict) or 13")
    index: dict[int, dict[tuple[str, ...], list[str]]] = {}
    for id_, text in items.items():
        words = [w for w, _, _ in words_of(text)]
        size = min(n, len(words))
        if size >= SHORTEST:
            grams = index.setdefault(size, {})
            for i in range(len(words) - size + 1):
                owners = grams.setdefault(tuple(words[i : i + size]), [])
                if not owners or owners[-1] != id_:
                    owners.append(id_)
    hits: list[Hit] = []
    for name, text in documents:
        item_words = words_of(text)
        folded = [w for w, _, _ in item_words]
        for size, grams in index.items():
            open_: dict[str, list[int]] = {}  # item -> [first, last] word of the run that goes on
            for i in range(len(folded) - size + 1):
                for id_ in grams.get(tuple(folded[i : i + size]), ()):
                    run = open_.get(id_)
                    if run is not None and i <= run[1] + 1:
                        run[1] = i + size - 1
                    else:
                        if run is not None:
                            hits.append(_hit(id_, name, text, item_words, run))
                        open_[id_] = [i, i + size - 1]
            hits += [_hit(id_, name, text, item_words, run) for id_, run in open_.items()]
    return hits


def _hit(id_: str, name: str, text: str, item_words: Sequence[tuple[str, int, int]], run: Sequence[int]) -> Hit:
    start, end = item_words[run[0]][1], item_words[run[1]][2]
    return Hit(id_, name, start, end, run[1] - run[0] + 1, text[start:end])


def too_short(items: Mapping[str, str]) -> list[str]:
    """Items of fewer words than can be looked for."""
    return [id_ for id_, text in items.items() if len(words_of(text)) < SHORTEST]


def report(scores: Mapping[str, float], items: Mapping[str, str], hits: Sequence[Hit]) -> dict[str, Any]:
    """The score on all items, on clean and on touched ones, with standard errors, and what the touched ones add.

    `gap` is all less clean, over the same model: by how much the figure may owe to the corpus. Items too short to be
    looked for count as clean and are named.
    """
    touched = {hit.item for hit in hits}
    parts = {
        "all": list(scores.values()),
        "clean": [v for id_, v in scores.items() if id_ not in touched],
        "touched": [v for id_, v in scores.items() if id_ in touched],
    }
    summary: dict[str, Any] = {
        name: {
            "value": float(np.mean(values)) if values else None,
            "items": len(values),
            "stderr": clustered_error(values),
        }
        for name, values in parts.items()
    }
    clean = summary["clean"]["value"]
    summary["gap"] = None if clean is None else summary["all"]["value"] - clean
    return summary | {"too_short": too_short(items), "hits": [hit.as_dict() for hit in hits]}


def text_of(row: Mapping[str, Any]) -> str:
    """What of an item-table row would give its answer away: the question and its right choice."""
    right = row.get("right")
    answer = f" {row['choices'][right]}" if right is not None and row.get("choices") else ""
    return f"{row['prompt']}{answer}"
