"""Signals: what is known of a document beside its text, as columns of numbers aligned with the documents.

    embedding   float32 [N, D], rows of unit length
    losses      float64 [N, M]: nats of the whole text under each of M models, from the weakest to the strongest
    generate    no column: a text generator, for steps that rewrite (`data.replies`)

The models that compute them belong to rooms that come after this one, so a signal's maker is named like a task of an
engine, `MODULE:NAME` with JSON-able arguments, and made where it is used: in any process, once. A column that is kept
in a folder carries a fingerprint of its texts and its maker, so that it is used again for these and for no others.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from modicum.core.errors import UserError
from modicum.core.files import atomic_file, fingerprint
from modicum.data.replies import Generate

Signal = Callable[[Sequence[str]], np.ndarray]
BLOCK = 256  # texts that are computed and stored at once
OPTIONS = {
    "embedding": "--encoder minilm",
    "losses": "--models WEAKEST,...,STRONGEST",
    "generate": "--generator smollm2",
}


@dataclass(frozen=True)
class Maker:
    """`function` ("MODULE:NAME") called with `arguments` gives a `Signal`. version: changes with its models'
    weights."""

    function: str
    arguments: dict[str, Any] = field(default_factory=dict)
    version: str = ""

    def make(self) -> Any:
        return _made(self.function, json.dumps(self.arguments, sort_keys=True))


@functools.lru_cache(maxsize=4)
def _made(function: str, arguments: str) -> Any:
    module, _, name = function.partition(":")
    return getattr(importlib.import_module(module), name)(**json.loads(arguments))


class Signals:
    """Signals by name. makers: `Maker`, or a callable, whose columns are never stored. folder: where columns are."""

    def __init__(self, makers: Mapping[str, Maker | Signal | Generate] | None = None, folder: Path | None = None):
        self.makers, self.folder = dict(makers or {}), folder

    def __contains__(self, name: str) -> bool:
        return name in self.makers

    def column(self, name: str, texts: Sequence[str]) -> np.ndarray:
        """One row for each text. Raises `UserError` for a signal that nobody makes, or a maker's wrong number of
        rows."""
        maker: Any = self._maker(name)
        blocks = [texts[at : at + BLOCK] for at in range(0, len(texts), BLOCK)]
        if not isinstance(maker, Maker) or self.folder is None:
            make = maker.make() if isinstance(maker, Maker) else maker
            return np.concatenate([_rows(name, make, block) for block in blocks])
        store = self.folder / f"{name}-{fingerprint([asdict(maker), digest(texts)])}"
        rows = []
        for number, block in enumerate(blocks):
            path = store / f"{number:05d}.npy"
            if not path.is_file():  # a run that was killed goes on here
                with atomic_file(path) as file:
                    np.save(file, _rows(name, maker.make(), block), allow_pickle=False)
            rows.append(np.load(path, allow_pickle=False))
        return np.concatenate(rows)

    def generator(self) -> tuple[Generate, str]:
        """The run's text generator, and what changes with it. Raises `UserError` where there is none."""
        maker: Any = self._maker("generate")
        return (maker.make(), maker.version) if isinstance(maker, Maker) else (maker, "")

    def _maker(self, name: str) -> Maker | Signal | Generate:
        if name not in self.makers:
            raise UserError(f"this step needs the signal {name!r}; type it with modicum curate {OPTIONS.get(name, '')}")
        return self.makers[name]

    def as_task(self) -> dict[str, Any]:
        """The makers as JSON, for another process."""
        return {name: asdict(maker) for name, maker in self.makers.items() if isinstance(maker, Maker)}

    @classmethod
    def of_task(cls, makers: Mapping[str, Any], folder: Path | None = None) -> Signals:
        return cls({name: Maker(**maker) for name, maker in makers.items()}, folder)


def _rows(name: str, signal: Signal, texts: Sequence[str]) -> np.ndarray:
    rows = np.asarray(signal(texts))
    if rows.ndim != 2 or len(rows) != len(texts):
        raise UserError(f"the maker of signal {name!r} gave shape {rows.shape} for {len(texts)} texts")
    return rows


def digest(texts: Sequence[str]) -> str:
    """Changes with any text or their order."""
    total = hashlib.sha256()
    for text in texts:
        total.update(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest())
    return total.hexdigest()[:16]
