"""port order: in which order a domain's documents are read in an epoch.

A method is constructed as `cls(config, documents)`, and says there what it lacks. `arrange` is pure: a run that
goes on, on any number of processes, asks again and gets the same. Documents longer than a row are ordered by
chunks, so that one of them need not fill batch after batch; between domains the mixture decides (`data.sampler`)."""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from modicum.core.registry import Method
from modicum.data.shards import Documents

BASELINE = "shuffled"


@dataclass(frozen=True)
class Epoch:
    """One epoch of one domain, in chunks numbered from 0 as they are stored.

    lengths: predictions of each document; ends: chunks of each document and of those before it; chunk: predictions of a
    chunk, but for a document's last; remaining: predictions that the run will still read of the domain from here on,
    None if its length is not known.
    """

    domain: str
    number: int
    seed: int
    lengths: np.ndarray
    ends: np.ndarray
    chunk: int
    remaining: float | None

    @property
    def chunks(self) -> int:
        return int(self.ends[-1])

    def shuffled(self) -> np.ndarray:
        """A permutation of all chunks by (seed, epoch, domain), the same on every machine. uint64 [chunks]."""
        return self.permutation(self.chunks)

    def permutation(self, count: int) -> np.ndarray:
        """A permutation of `count` numbers by (seed, epoch, domain), the same on every machine. uint64 [count]."""
        numbers = np.arange(count, dtype=np.uint64)
        name = f"{self.seed}/{self.number}/{self.domain}".encode()
        key = np.frombuffer(hashlib.blake2b(name, digest_size=8).digest(), "<u8")
        return np.argsort(_mix(numbers ^ key), kind="stable").astype(np.uint64)

    def documents(self, numbers: np.ndarray) -> np.ndarray:
        """The document of each chunk."""
        return np.searchsorted(self.ends, numbers, side="right")

    def sizes(self, numbers: np.ndarray) -> np.ndarray:
        """Predictions of each chunk."""
        document = self.documents(numbers)
        first = self.ends[document] - -(-np.maximum(self.lengths[document], 0) // self.chunk)
        return np.minimum(self.lengths[document] - (numbers.astype(np.int64) - first) * self.chunk, self.chunk)


class Order(Method):
    """Base class: fill `arrange`.

    whole_rows: what `arrange` gives is one line of text that is cut into rows, each of one domain, and the rows are
    shuffled; a document's chunks then stand together.
    """

    whole_rows: ClassVar[bool] = False

    def __init__(self, config: Any, documents: Documents):
        self.config, self.documents = config, documents

    @abstractmethod
    def arrange(self, epoch: Epoch) -> np.ndarray:
        """Chunk numbers in the order they are read: a permutation of all, or of those that are read. At least one."""


def chunk_ends(lengths: np.ndarray, chunk: int) -> np.ndarray:
    """Chunks of each document and of those before it; `lengths` are predictions."""
    return np.cumsum(-(-np.maximum(lengths, 0) // chunk))


def _mix(x: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser (Steele et al. 2014): a fixed, fast shuffle key for each number."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
