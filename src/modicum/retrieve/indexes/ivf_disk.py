"""ivf-disk: inverted lists on disk, one list for each vector.

k-means over the vectors gives centres; every vector lies in the list of its nearest one, on disk. A query reads the
lists of its `probes` nearest centres and compares exactly:

    read  { list(c) : c among the probes centres with the largest q . c }

Sivic and Zisserman 2003 (ICCV); lists, their memory-mapped file and its scan are `faiss` (Douze et al. 2024,
arXiv:2401.08281, `OnDiskInvertedLists`). The plain way to keep vectors out of memory, for comparison with `spann`.
"""

from __future__ import annotations

import importlib
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from modicum.budget.cost import Cost
from modicum.retrieve.indexes._ivf import InvertedFile


@dataclass(frozen=True, kw_only=True)
class Config:
    lists: Annotated[int, Field(ge=1)] | None = None  # None: about 4 sqrt(N)
    probes: Annotated[int, Field(ge=1)] = 16  # lists that a query reads
    seed: int = 0


TOY = Config(probes=10**6)
EFFORT = "probes"  # the knob that trades time for recall
SWEEP = ("probes=8", "probes=32")


class IVFDisk(InvertedFile):
    config: Config

    def cost(self, n_vectors: int, dim: int) -> Cost:
        lists = self._lists(n_vectors)
        resident = 4 * lists * dim + 48 * lists + 16 * n_vectors
        sample = 4 * dim * min(n_vectors, max(64 * lists, 10_000))
        return Cost(peak_bytes=resident + sample, disk_bytes=resident + 2 * 4 * dim * n_vectors)

    def resident_bytes(self) -> int:
        """Centres, the table of lists, ids; the lists lie in a memory-mapped file."""
        centres = 0 if self.file is None else self.file.nlist * (4 * self.file.d + 48)
        return int(centres + self.table_bytes())

    def _empty(self, quantizer: Any, dim: int, lists: int) -> Any:
        faiss: Any = importlib.import_module("faiss")
        made = faiss.IndexIVFFlat(quantizer, dim, lists, faiss.METRIC_INNER_PRODUCT)
        self._folder = tempfile.TemporaryDirectory()
        on_disk = faiss.OnDiskInvertedLists(lists, made.code_size, str(Path(self._folder.name) / "lists.ivf"))
        made.replace_invlists(on_disk, False)
        self._on_disk = on_disk  # faiss does not own it
        return made

    def _probe(self, queries_QD: np.ndarray, k: int, alive_N: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        return self._candidates(queries_QD, k, alive_N)

    def _write_structure(self, folder: Path) -> None:
        faiss: Any = importlib.import_module("faiss")
        lists = faiss.downcast_InvertedLists(self.file.invlists)
        shutil.copyfile(lists.filename, folder / Path(lists.filename).name)
        faiss.write_index(self.file, str(folder / "lists.faiss"))

    def _read_structure(self, folder: Path) -> None:
        faiss: Any = importlib.import_module("faiss")
        # The lists' file is opened beside the index, under the name it was written with.
        flags = faiss.IO_FLAG_ONDISK_SAME_DIR | faiss.IO_FLAG_READ_ONLY
        self.file = faiss.read_index(os.fspath(folder / "lists.faiss"), flags)
