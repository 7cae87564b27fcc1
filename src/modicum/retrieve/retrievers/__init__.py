"""port retriever: texts in, ranked rows out: everything between a passage and its place in a ranking.

Shape letters: N passages, Q queries, K results.

Rows are numbers from 0 in the order in which passages are added, and keep their meaning: a removed row is never
returned and never given again. A saved retriever is a folder: `retriever.json` (method, knobs, checksums) and the
method's own files, none of them pickled; models are named there, not copied.
"""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from modicum.core import choice, files, registry
from modicum.core.errors import CorruptError, UserError
from modicum.retrieve import manifest
from modicum.retrieve.indexes import Hits

BASELINE = "bm25"
FORMAT = 1


class Retriever(registry.Method):
    """Base class. A method defines `_add`, `_rank`, `_write`, `_read` and `nbytes`; input is checked here."""

    def __init__(self, config: Any, device: str = "cpu"):
        self.config, self.device = config, device
        self.alive_N = np.empty(0, bool)  # rows ever added: False once removed

    def __len__(self) -> int:
        return int(self.alive_N.sum())

    def build(self, texts: Sequence[str]) -> None:
        """Fill an empty retriever."""
        if len(self.alive_N):
            raise UserError(f"this retriever already holds {len(self)} passages; build an empty one, or call add")
        self.add(texts)

    def add(self, texts: Sequence[str]) -> np.ndarray:
        """Add passages; returns their rows."""
        first = len(self.alive_N)
        if len(texts):
            self._add(list(texts))
            self.alive_N = np.concatenate([self.alive_N, np.ones(len(texts), bool)])
        return np.arange(first, len(self.alive_N))

    def remove(self, rows: Iterable[int]) -> int:
        """Remove these rows; those not there are skipped. Returns how many were removed."""
        rows_R = np.unique(np.fromiter(rows, np.int64))
        rows_R = rows_R[(rows_R >= 0) & (rows_R < len(self.alive_N))]
        rows_R = rows_R[self.alive_N[rows_R]]
        self.alive_N[rows_R] = False
        return len(rows_R)

    def rank(self, queries: Sequence[str], k: int, subset: Iterable[int] | None = None) -> Hits:
        """The k best rows of each query, among `subset` if given; id -1 and score -inf where there are fewer."""
        if k < 1:
            raise UserError(f"k={k} is not a number of results; ask for 1 or more")
        empty = [q for q, text in enumerate(queries) if not text.strip()]
        if empty:
            raise UserError(f"query {empty[0]} is empty; write what to look for")
        allowed_N = self.alive_N
        if subset is not None:
            chosen = np.fromiter(subset, np.int64)
            mask_N = np.zeros(len(self.alive_N), bool)
            mask_N[chosen[(chosen >= 0) & (chosen < len(mask_N))]] = True
            allowed_N = allowed_N & mask_N
        if not len(queries) or not allowed_N.any():
            return Hits.empty(len(queries), k)
        hits = self._rank(list(queries), k, None if allowed_N.all() else np.flatnonzero(allowed_N))
        missing = k - hits.ids_QK.shape[1]
        if missing > 0:
            pads = ((0, 0), (0, missing))
            ids_QK = np.pad(hits.ids_QK, pads, constant_values=-1)
            hits = Hits(ids_QK, np.pad(hits.scores_QK, pads, constant_values=-np.inf))
        return hits

    @property
    def key(self) -> str:
        return next(m.key for m in registry.methods("retriever").values() if m.module == type(self).__module__)

    def save(self, path: str | Path) -> None:
        """Write the folder `path` atomically."""
        with files.atomic_directory(path) as folder:
            np.save(folder / "alive.npy", self.alive_N)
            self._write(folder)
            header = {"format": FORMAT, "method": self.key, "knobs": dataclasses.asdict(self.config)}
            files.write_json(folder / "retriever.json", header | {"files": manifest.describe(folder)})

    @abstractmethod
    def _add(self, texts: list[str]) -> None:
        """Take the passages of the next rows."""

    @abstractmethod
    def _rank(self, queries: list[str], k: int, rows_S: np.ndarray | None) -> Hits:
        """Rows and scores, at most k; only rows of `rows_S` (sorted, none removed) unless it is None."""

    @abstractmethod
    def nbytes(self) -> int:
        """Bytes that a search may read."""

    @abstractmethod
    def _write(self, folder: Path) -> None: ...

    @abstractmethod
    def _read(self, folder: Path) -> None: ...


def open_retriever(path: str | Path, *, device: str = "cpu") -> Retriever:
    """The retriever saved in folder `path`, whatever its method."""
    folder = Path(path)
    header = manifest.read_header(folder, "retriever.json", "retriever", "Retriever.save")
    if header.get("format") != FORMAT:
        raise CorruptError(f"{folder} has format {header.get('format')!r}, this version reads {FORMAT}; build it again")
    manifest.verify(folder, header["files"])
    made: Retriever = registry.build("retriever", choice.Choice("retriever", header["method"], header["knobs"]), device)
    made.alive_N = np.load(folder / "alive.npy", allow_pickle=False)
    made._read(folder)
    return made


def write_texts(path: Path, texts: Sequence[str]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"text": pa.array(texts, pa.string())}), path, compression="zstd")


def read_texts(path: Path) -> list[str]:
    import pyarrow.parquet as pq

    return pq.read_table(path).column("text").to_pylist()
