"""What each sequence holds of the cache: found prefixes, room to grow, thinning, giving back."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from modicum.core.errors import ModicumError
from modicum.model.config import DecoderConfig
from modicum.serve.blocks import BlockPool, OutOfBlocks, PagePool, chain
from modicum.serve.cacheforms import CacheForm
from modicum.serve.config import EngineConfig
from modicum.serve.kv import KVPolicy
from modicum.serve.pages import Storage
from modicum.serve.recent import Recent, coded_after
from modicum.serve.request import Sample
from modicum.serve.table import BlockTable
from modicum.serve.uneven import largest

T = TypeVar("T")


class Cache:
    """Block numbers, memory and the policy in one place; the engine's thread owns it.

    A sequence is *loaded* while it has a slot (a row of the block table). It holds whole blocks, shared with
    others as far as the prefix cache found them, until the policy thins it; then pages of its own.
    """

    def __init__(
        self,
        shape: DecoderConfig,
        config: EngineConfig,
        n_blocks: int,
        form: CacheForm,
        device: torch.device,
        policy: KVPolicy,
    ):
        self.block_size, self.finds, self.policy = config.block_size, config.prefix_cache, policy
        self.storage = Storage(shape, n_blocks, config.block_size, form, device)
        self.blocks = BlockPool(n_blocks)
        self.pages = PagePool(self.blocks, self.storage.pages_per_block)
        self.table = BlockTable(config.max_sequences, config.block_size)
        head_dim = largest(shape)[1]
        self.recent = None if form.rowwise else Recent(self.storage, config.max_sequences, head_dim)
        self.beside: list[Storage] = []  # of models that run beside (`serve.guided`): the same blocks
        self.slots = list(range(config.max_sequences - 1, -1, -1))
        self.idle: OrderedDict[int, Sample] = (
            OrderedDict()
        )  # by session: its last turn, over, with entries; latest last
        self.session_of: dict[int, int] = {}  # by request, of those that are turns of a session
        self.thinnings = 0

    @property
    def capacity(self) -> int:
        """Tokens that all blocks hold."""
        return self.blocks.n_blocks * self.block_size

    @property
    def block_bytes(self) -> int:
        """Bytes of a block, in the caches of all models."""
        return sum(s.block_bytes for s in (self.storage, *self.beside))

    @property
    def held_bytes(self) -> int:
        """Bytes that are taken: whole blocks, less the free pages of broken ones, and tokens that are not coded yet."""
        page = self.storage.block_bytes / self.storage.pages_per_block
        blocks = (self.blocks.n_blocks - self.blocks.free) * self.block_bytes - self.pages.free * page
        running = len(self.table.numbers) - len(self.slots)
        return int(blocks) + (0 if self.recent is None else running * self.recent.bytes_per_sequence)

    @property
    def free_blocks(self) -> int:
        """Blocks that can be taken now; idle sessions give theirs when there are no others."""
        return self.blocks.free + sum(map(self._own, self.idle.values()))

    def _own(self, sample: Sample) -> int:
        """Blocks that come free with a sequence's entries."""
        if sample.pages is not None:
            return int(sample.pages.pages_LG.sum()) // self.storage.pages_per_block
        return sum(self.blocks.references[b] == 1 for b in sample.blocks)

    def look_up(self, sample: Sample) -> None:
        """Note in a waiting job what of it is in the cache now: its session's entries, or a prefix."""
        P, job, prompt = self.block_size, sample.job, len(sample.request.prompt)
        if (before := self.turn_before(sample)) is not None:
            job.hit = before.job.computed
            job.revived = max(0, self._own(before) - (job.hit % P > 0))  # its last block has room
            return
        if not self.finds:
            return
        chain(sample.tokens, P, sample.names, sample.salt)
        most = job.length - 1
        if self.policy.tail > 1:  # the prompt's tail is observed, also when generated tokens follow it by now
            most = min(most, sample.request.context - self.policy.tail)
        if sample.scored:  # the tokens from the prompt's last one on are computed: their logits are what is asked for
            most = min(most, prompt - 1)
        hits = self.blocks.find(sample.names[: max(0, most) // P])
        job.hit = len(hits) * P
        job.revived = sum(self.blocks.references[b] == 0 for b in hits)

    def load(self, sample: Sample) -> None:
        """Give an admitted sequence a slot and the blocks that `look_up` promised."""
        P = self.block_size
        before = self.turn_before(sample)
        if before is not None and before.job.computed == sample.job.hit:
            del self.idle[self.session_of[sample.request.id]]
            sample.blocks, sample.pages, before.blocks, before.pages = before.blocks, before.pages, [], None
            sample.policy, sample.names = before.policy, before.names
            sample.slot, sample.published, sample.coded = self.slots.pop(), before.published, before.coded
            self.table.hold(sample.slot, 0, sample.blocks)
            sample.job.own = len(sample.blocks)
            return
        sample.blocks = self.blocks.find(sample.names[: sample.job.hit // P])
        if len(sample.blocks) * P != sample.job.hit:
            raise ModicumError(f"{sample.job.hit} cached tokens were promised, {len(sample.blocks) * P} are there")
        self.blocks.hold(sample.blocks)
        sample.slot = self.slots.pop()
        sample.published, sample.coded = len(sample.blocks), sample.job.hit
        self.table.hold(sample.slot, 0, sample.blocks)

    def has_room(self, sample: Sample, n: int) -> bool:
        """Blocks or pages for `n` more tokens; False if there are too few, and then none is taken."""
        try:
            self._taking(lambda: self._grow(sample, n))
        except OutOfBlocks:
            return False
        self._measure(sample)
        return True

    def _grow(self, sample: Sample, n: int) -> None:
        if sample.pages is not None:
            self.storage.grow(sample.pages, n, self.pages)
            return
        owned = len(sample.blocks)
        more = -(-(sample.job.computed + n) // self.block_size) - owned
        if more > 0:
            new = self.blocks.take(more)
            self.table.hold(sample.slot, owned, new)
            sample.blocks += new
            sample.job.own += more

    def _taking(self, take: Callable[[], T]) -> T:
        """What `take` returns; idle sessions give up their entries until it succeeds, the longest idle first."""
        while True:
            try:
                return take()
            except OutOfBlocks:
                if not self.idle:
                    raise
                self.drop(next(iter(self.idle)))

    def trim(self, sample: Sample) -> None:
        """Give back the blocks past what is computed: drafts had them. Not for thinned sequences."""
        kept = -(-sample.job.computed // self.block_size)
        spare = sample.blocks[kept:]
        if spare:
            del sample.blocks[kept:]
            self.blocks.release(spare)
            self.table.hold(sample.slot, kept, sample.blocks[:1] * len(spare))
            sample.job.own -= len(spare)
            self._measure(sample)

    def _measure(self, sample: Sample) -> None:
        """Tell the scheduler's job what the sequence has room for and would give back."""
        job = sample.job
        if sample.pages is None:
            job.capacity = len(sample.blocks) * self.block_size
        else:
            job.capacity = job.computed + sample.pages.slack(self.block_size)
            job.own = int(sample.pages.pages_LG.sum()) // self.storage.pages_per_block

    def publish(self, sample: Sample) -> None:
        """Let others find the blocks that have become full."""
        if self.recent is not None:  # what the step that just ran has coded
            form = self.storage.form
            sample.coded = coded_after(sample.coded, sample.job.computed, form.residual, self.block_size)
        full = (sample.job.computed if self.recent is None else sample.coded) // self.block_size
        if not self.finds or sample.pages is not None or full <= sample.published:
            return
        chain(sample.tokens, self.block_size, sample.names, sample.salt)
        for i in range(sample.published, full):
            self.blocks.publish(sample.blocks[i], sample.names[i])
        sample.published = full

    def thin(self, sample: Sample, n: int) -> bool:
        """After `n` more tokens: ask the policy what stays, move it to pages, give the rest back.

        Asked at the end of the prompt (or of the context, see `Request`), and at each block's end once a block more
        than is allowed is held.
        False if blocks shared with others did not come free and there is no room: the sequence holds
        nothing then and must start over.
        """
        job, P = sample.job, self.block_size
        ended = job.computed - n < sample.request.context <= job.computed
        if not ended and job.computed // P == (job.computed - n) // P:
            return True
        layers = range(self.storage.layers)
        allowed_LG = torch.tensor([sample.policy.allowed(layer, job.computed) for layer in layers])
        count_LG = job.computed if sample.pages is None else sample.pages.count_LG
        if bool((count_LG <= allowed_LG + (0 if ended else P)).all()):
            return True
        lifted = []
        for layer in layers:
            if sample.pages is None:
                entries = self.storage.entries_of_blocks(layer, sample.blocks, job.computed)
            else:
                entries = self.storage.entries_of_pages(layer, sample.pages)
            lifted.append(self.storage.lift(entries, sample.policy.keep(layer, entries)))
        self.give_back(sample)
        try:
            sample.pages = self._taking(lambda: self.storage.lay(lifted, self.pages))
        except OutOfBlocks:
            return False
        self.thinnings += 1
        self._measure(sample)
        return True

    def zero(self, sample: Sample, offsets: Sequence[int]) -> None:
        """Zero entries of a sequence that holds blocks."""
        rows = self._rows([sample.slot] * len(offsets), offsets)
        for storage in (self.storage, *self.beside):
            for x in (storage.k, storage.v):
                x.zero(rows)

    def move(self, slots: Sequence[int], sources: Sequence[int], targets: Sequence[int]) -> None:
        """Put entries of sequences where others are, all at once."""
        rows = self._rows(slots, sources), self._rows(slots, targets)
        for storage in (self.storage, *self.beside):
            for x in (storage.k, storage.v):
                x.move(*rows)

    def _rows(self, slots: Sequence[int], offsets: Sequence[int]) -> Tensor:
        return torch.from_numpy(self.table.rows(slots, offsets)).to(self.storage.device)

    def give_back(self, sample: Sample) -> None:
        if sample.pages is not None:
            self.pages.release(sample.pages.numbers())
            sample.pages = None
        self.blocks.release(sample.blocks)
        sample.blocks = []
        sample.job.own = 0

    def turn_before(self, sample: Sample) -> Sample | None:
        """The last turn of a sequence's session, which it goes on from, if its entries are in the cache."""
        before = self.idle.get(self.session_of.get(sample.request.id, -1))
        return before if before is not None and before.salt == sample.salt else None  # not of a former adapter

    def rest(self, session: int, sample: Sample) -> None:
        """A session's turn is over: its slot comes free, its entries wait for the next turn."""
        self.drop(session)
        self.slots.append(sample.slot)
        sample.slot, sample.job.own = -1, 0
        self.idle[session] = sample

    def drop(self, session: int) -> None:
        """Give back what an idle session holds; the next turn computes it anew. Unknown ones are ignored."""
        if (sample := self.idle.pop(session, None)) is not None:
            self.give_back(sample)

    def unload(self, sample: Sample) -> None:
        """Give everything back, the slot too; the sequence's tokens stay known, its policy starts over."""
        self.give_back(sample)
        if sample.slot >= 0:
            self.slots.append(sample.slot)
            sample.slot = -1
        if sample.policy is not None:
            sample.policy = self.policy.begin(sample.request.context)

    def distrust(self, sample: Sample) -> None:
        """Zero what a sequence alone holds, and let nobody find it: its computation went wrong."""
        alone = [b for b in sample.blocks if self.blocks.references[b] == 1]
        for block in alone:
            self.blocks.forget(block)
        for storage in (self.storage, *self.beside):
            storage.wipe(alone)
        if sample.pages is not None:
            self.storage.wipe_pages(sample.pages.numbers())
