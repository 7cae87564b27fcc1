"""Allocation of KV-cache blocks: reference counts, the prefix cache, pages of split blocks.

Only block numbers are managed here, no keys or values. A block stores `block_size` tokens of every layer
and KV head. It is in one of three states: free; cached (reference count 0, its contents are a known prefix,
evicted in LRU order); or in use by one or more sequences.

A block's name in the prefix cache is a chain: digest(name of the block before, its tokens), so equal
names mean equal tokens from the start of the sequence on.

A sequence with evicted entries uses *pages* instead: one page stores `block_size` entries of one layer and
one KV head. `PagePool` splits blocks into pages, and frees a block once all of its pages are free.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence

from modicum.core.errors import ModicumError


class OutOfBlocks(ModicumError):
    """More blocks are requested than are free; the engine preempts and tries again."""


def chain(tokens: Sequence[int], block_size: int, names: list[bytes], salt: bytes = b"") -> list[bytes]:
    """Extend `names` (of the first full blocks of `tokens`) to all full blocks; returns `names`.

    salt: sets the names of equal tokens apart, where something else than tokens decides their keys and values.
    """
    for start in range(len(names) * block_size, len(tokens) - block_size + 1, block_size):
        digest = hashlib.blake2b(names[-1] if names else salt, digest_size=16)
        digest.update(array("q", tokens[start : start + block_size]).tobytes())
        names.append(digest.digest())
    return names


class BlockPool:
    """Numbers 0 .. n_blocks-1 with reference counts. Not thread-safe: the engine's thread owns it."""

    def __init__(self, n_blocks: int):
        if n_blocks < 1:
            raise ModicumError(f"a cache of {n_blocks} blocks holds nothing; give it at least one block")
        self.n_blocks = n_blocks
        self.references = [0] * n_blocks
        self._free_list: list[int] = list(range(n_blocks - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()  # reference count 0, least recently used first
        self._name: dict[int, bytes] = {}
        self._block: dict[bytes, int] = {}
        self.evictions = 0

    @property
    def free(self) -> int:
        """Blocks that can be taken now, cached ones included."""
        return len(self._free_list) + len(self._cached)

    @property
    def remembered(self) -> int:
        """Free blocks whose contents are still in the prefix cache."""
        return len(self._cached)

    def take(self, n: int = 1) -> list[int]:
        """`n` blocks with one reference each; all or none. Raises `OutOfBlocks`."""
        if n > self.free:
            raise OutOfBlocks(f"{n} cache blocks asked for, {self.free} of {self.n_blocks} are free")
        taken = []
        for _ in range(n):
            if self._free_list:
                block = self._free_list.pop()
            else:
                block, _none = self._cached.popitem(last=False)
                self.forget(block)
                self.evictions += 1
            self.references[block] = 1
            taken.append(block)
        return taken

    def find(self, names: Iterable[bytes]) -> list[int]:
        """Blocks of the longest cached prefix of `names`, without a reference to them: see `hold`."""
        hits = []
        for name in names:
            block = self._block.get(name)
            if block is None:
                break
            hits.append(block)
        return hits

    def hold(self, blocks: Sequence[int]) -> None:
        """Add a reference to each block (of `find`, or another sequence's)."""
        for block in blocks:
            if self.references[block] == 0:
                if block not in self._cached:
                    raise ModicumError(f"block {block} is blank; only found or held blocks can be shared")
                del self._cached[block]
            self.references[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """Remove a reference from each; the last block of a sequence is evicted before its first."""
        for block in reversed(blocks):
            if self.references[block] <= 0:
                raise ModicumError(f"block {block} was released more often than it was held")
            self.references[block] -= 1
            if self.references[block] == 0:
                if block in self._name:
                    self._cached[block] = None
                else:
                    self._free_list.append(block)

    def publish(self, block: int, name: bytes) -> None:
        """Add a full, computed block to the prefix cache. The first block of a name stays."""
        if name not in self._block and block not in self._name:
            self._block[name] = block
            self._name[block] = name

    def forget(self, block: int) -> None:
        """Remove a block from the prefix cache (its contents will change, or are invalid)."""
        name = self._name.pop(block, None)
        if name is not None:
            del self._block[name]
            if block in self._cached:
                del self._cached[block]
                self._free_list.append(block)

    def clear(self) -> None:
        """Clear the prefix cache."""
        for block in list(self._name):
            self.forget(block)

    def check(self) -> None:
        """Raise `ModicumError` unless every block is in exactly one state (tests and debugging)."""
        free_list, cached = set(self._free_list), set(self._cached)
        in_use = {b for b, n in enumerate(self.references) if n > 0}
        if len(free_list) != len(self._free_list) or free_list & cached or (free_list | cached) & in_use:
            raise ModicumError("a block is in two states at once")
        if len(free_list) + len(cached) + len(in_use) != self.n_blocks:
            raise ModicumError(f"{self.n_blocks - len(free_list) - len(cached) - len(in_use)} blocks are lost")
        if not cached <= set(self._name) or free_list & set(self._name):
            raise ModicumError("a block's name does not fit its state")
        if {n: b for b, n in self._name.items()} != self._block:
            raise ModicumError("block names and named blocks differ")


class PagePool:
    """Pages of split blocks. Page number = part * n_blocks + block, part = layer * G + head."""

    def __init__(self, blocks: BlockPool, pages_per_block: int):
        self.blocks, self.pages_per_block = blocks, pages_per_block
        self._free: dict[int, list[int]] = {}  # split block -> its free pages
        self.free = 0

    def available(self) -> int:
        """Pages that can be taken now: free ones of split blocks and those of every free block."""
        return self.free + self.blocks.free * self.pages_per_block

    def take(self, n: int) -> list[int]:
        """`n` pages, from the fullest split blocks first, so that nearly empty ones become free."""
        if n > self.available():
            raise OutOfBlocks(f"{n} cache pages asked for, {self.available()} are free")
        taken: list[int] = []
        for block in sorted((b for b in self._free if self._free[b]), key=lambda b: len(self._free[b])):
            if len(taken) == n:
                break
            free_pages = self._free[block]
            for _ in range(min(n - len(taken), len(free_pages))):
                taken.append(free_pages.pop())
        self.free -= len(taken)
        while len(taken) < n:
            block = self.blocks.take()[0]
            pages = [part * self.blocks.n_blocks + block for part in range(self.pages_per_block - 1, -1, -1)]
            part = min(n - len(taken), len(pages))
            taken += reversed(pages[len(pages) - part :])
            self._free[block] = pages[: len(pages) - part]
            self.free += len(pages) - part
        return taken

    def release(self, pages: Iterable[int]) -> None:
        """Free pages; blocks without pages in use return to the block pool."""
        for page in pages:
            block = page % self.blocks.n_blocks
            free_pages = self._free[block]
            free_pages.append(page)
            self.free += 1
            if len(free_pages) == self.pages_per_block:
                del self._free[block]
                self.free -= self.pages_per_block
                self.blocks.release([block])
