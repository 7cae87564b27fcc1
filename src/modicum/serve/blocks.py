"""Who owns which block of the cache: reference counts, the prefix cache, pages of broken-up blocks.

Nothing here holds a key or a value, only numbers. A block stores `block_size` tokens of every layer
and KV head. It is in one of three states: free and blank; free but remembered, because its contents
are a known prefix (oldest forgotten first); or held by one or more sequences.

A block's name in the prefix cache is a chain: digest(name of the block before, its tokens), so equal
names mean equal tokens from the start of the sequence on.

A sequence whose cache a KV policy has thinned holds *pages* instead: one page stores `block_size`
entries of one layer and one KV head. `PagePool` breaks blocks up into pages, and gives a block back
as soon as all of its pages have come home.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence

from modicum.core.errors import ModicumError


class OutOfBlocks(ModicumError):
    """More blocks were asked for than are free; the engine preempts and tries again."""


def chain(tokens: Sequence[int], block_size: int, names: list[bytes]) -> list[bytes]:
    """Extend `names` (of the first full blocks of `tokens`) to all full blocks; returns `names`."""
    for start in range(len(names) * block_size, len(tokens) - block_size + 1, block_size):
        digest = hashlib.blake2b(names[-1] if names else b"", digest_size=16)
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
        self._blank: list[int] = list(range(n_blocks - 1, -1, -1))
        self._remembered: OrderedDict[int, None] = OrderedDict()  # free, oldest first
        self._name: dict[int, bytes] = {}
        self._block: dict[bytes, int] = {}
        self.evictions = 0

    @property
    def free(self) -> int:
        """Blocks that can be taken now, remembered ones included."""
        return len(self._blank) + len(self._remembered)

    @property
    def remembered(self) -> int:
        """Free blocks whose contents a later prompt may still find."""
        return len(self._remembered)

    def take(self, n: int = 1) -> list[int]:
        """`n` blocks with one reference each; all or none. Raises `OutOfBlocks`."""
        if n > self.free:
            raise OutOfBlocks(f"{n} cache blocks asked for, {self.free} of {self.n_blocks} are free")
        taken = []
        for _ in range(n):
            if self._blank:
                block = self._blank.pop()
            else:
                block, _none = self._remembered.popitem(last=False)
                self.forget(block)
                self.evictions += 1
            self.references[block] = 1
            taken.append(block)
        return taken

    def find(self, names: Iterable[bytes]) -> list[int]:
        """Blocks of the longest known prefix of `names`. They are not held yet: see `hold`."""
        hits = []
        for name in names:
            block = self._block.get(name)
            if block is None:
                break
            hits.append(block)
        return hits

    def hold(self, blocks: Sequence[int]) -> None:
        """One more reference to each block (found ones, or another sequence's)."""
        for block in blocks:
            if self.references[block] == 0:
                if block not in self._remembered:
                    raise ModicumError(f"block {block} is blank; only found or held blocks can be shared")
                del self._remembered[block]
            self.references[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """One reference less to each; the last block of a sequence is forgotten before its first."""
        for block in reversed(blocks):
            if self.references[block] <= 0:
                raise ModicumError(f"block {block} was released more often than it was held")
            self.references[block] -= 1
            if self.references[block] == 0:
                if block in self._name:
                    self._remembered[block] = None
                else:
                    self._blank.append(block)

    def publish(self, block: int, name: bytes) -> None:
        """Let later sequences find a full, computed block. The first block of a name keeps it."""
        if name not in self._block and block not in self._name:
            self._block[name] = block
            self._name[block] = name

    def forget(self, block: int) -> None:
        """Take a block's name away (its contents are about to change, or cannot be trusted)."""
        name = self._name.pop(block, None)
        if name is not None:
            del self._block[name]
            if block in self._remembered:
                del self._remembered[block]
                self._blank.append(block)

    def clear(self) -> None:
        """Forget every prefix."""
        for block in list(self._name):
            self.forget(block)

    def check(self) -> None:
        """Raise `ModicumError` unless every block is in exactly one state (tests and debugging)."""
        blank, remembered = set(self._blank), set(self._remembered)
        in_use = {b for b, n in enumerate(self.references) if n > 0}
        if len(blank) != len(self._blank) or blank & remembered or (blank | remembered) & in_use:
            raise ModicumError("a block is in two states at once")
        if len(blank) + len(remembered) + len(in_use) != self.n_blocks:
            raise ModicumError(f"{self.n_blocks - len(blank) - len(remembered) - len(in_use)} blocks are lost")
        if not remembered <= set(self._name) or blank & set(self._name):
            raise ModicumError("a block's name does not fit its state")
        if {n: b for b, n in self._name.items()} != self._block:
            raise ModicumError("block names and named blocks differ")


class PagePool:
    """Pages of blocks that were broken up. Page number = part * n_blocks + block, part = layer * G + head."""

    def __init__(self, blocks: BlockPool, pages_per_block: int):
        self.blocks, self.pages_per_block = blocks, pages_per_block
        self._free: dict[int, list[int]] = {}  # broken block -> its free pages
        self.free = 0

    def available(self) -> int:
        """Pages that can be taken now: loose ones and those of every free block."""
        return self.free + self.blocks.free * self.pages_per_block

    def take(self, n: int) -> list[int]:
        """`n` pages, from the fullest broken blocks first so that nearly empty ones can come home."""
        if n > self.available():
            raise OutOfBlocks(f"{n} cache pages asked for, {self.available()} are free")
        taken: list[int] = []
        for block in sorted((b for b in self._free if self._free[b]), key=lambda b: len(self._free[b])):
            if len(taken) == n:
                break
            loose = self._free[block]
            for _ in range(min(n - len(taken), len(loose))):
                taken.append(loose.pop())
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
        """Pages back; whole blocks go back to the block pool."""
        for page in pages:
            block = page % self.blocks.n_blocks
            loose = self._free[block]
            loose.append(page)
            self.free += 1
            if len(loose) == self.pages_per_block:
                del self._free[block]
                self.free -= self.pages_per_block
                self.blocks.release([block])
