"""Sources of pairs: a JSONL file, a curated folder, or objects in memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modicum.adapt.examples import Example, read_examples, split
from modicum.core.errors import UserError


@dataclass(frozen=True)
class Sides:
    """Examples that are split already."""

    train: Sequence[Example]
    heldout: Sequence[Example]


def load_sides(pairs: Any, heldout_fraction: float, seed: int) -> tuple[list[Example], list[Example]]:
    """(train, held-out) examples.

    pairs: path of a JSONL file or of a curated folder (whose own held-out documents then give the held-out
    pairs), an iterable of `Example`s or of objects with question and answer, or `Sides` where the caller has split
    them.
    """
    if isinstance(pairs, Sides):
        return list(pairs.train), list(pairs.heldout)
    if isinstance(pairs, str | Path):
        path = Path(pairs)
        if not path.is_dir():
            return split(read_examples(path), heldout_fraction, seed)
        splits = tuple(_curated(path, split_name) for split_name in ("train", "heldout"))
        if not splits[0]:
            raise UserError(
                f"{path} gives no pairs: its documents have no docstrings, headings or "
                "paragraphs to ask about; give a JSONL file of question and answer"
            )
        return splits[0], splits[1] if heldout_fraction > 0 else []
    return split([_example(pair) for pair in pairs], heldout_fraction, seed)


def _example(pair: Any) -> Example:
    return pair if isinstance(pair, Example) else Example.of(pair.question, pair.answer, str(pair.id))


def _curated(folder: Path, split_name: str) -> list[Example]:
    from modicum.data.document import read_documents
    from modicum.data.pairs import pairs

    return [_example(pair) for pair in pairs(read_documents(folder, split_name))]
