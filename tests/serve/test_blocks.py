"""Blocks, pages and schedulers under random use."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from modicum.core.errors import ModicumError
from modicum.serve.blocks import BlockPool, OutOfBlocks, PagePool, chain
from modicum.serve.schedulers import Job, _conformance
from modicum.serve.schedulers.fcfs import Config, FirstComeFirstServed


def test_names_are_equal_for_equal_beginnings_only() -> None:
    a, b = list(range(20)), [*range(10), 99, *range(11, 20)]
    first, second = chain(a, 4, []), chain(b, 4, [])
    assert (
        len(first) == 5 and first[:2] == second[:2] and all(x != y for x, y in zip(first[2:], second[2:], strict=True))
    )
    assert chain([*a, 1, 2, 3, 4], 4, list(first))[:5] == first


def test_oldest_prefix_is_forgotten_first_and_its_end_before_its_start() -> None:
    pool = BlockPool(4)
    old, new = pool.take(2), pool.take(2)
    for blocks, names in ((old, [b"a", b"b"]), (new, [b"c", b"d"])):
        for block, name in zip(blocks, names, strict=True):
            pool.publish(block, name)
        pool.release(blocks)
    assert pool.free == 4 and pool.remembered == 4
    pool.take(1)
    assert pool.find([b"a", b"b"]) == old[:1] and pool.find([b"c", b"d"]) == new
    pool.hold(new)
    pool.take(1)
    with pytest.raises(OutOfBlocks):
        pool.take(1)
    assert pool.find([b"a"]) == [] and pool.find([b"c", b"d"]) == new


def test_misuse_is_an_error() -> None:
    pool = BlockPool(2)
    block = pool.take()
    pool.release(block)
    with pytest.raises(ModicumError, match="released more often"):
        pool.release(block)
    with pytest.raises(ModicumError, match="blank"):
        pool.hold(block)
    with pytest.raises(ModicumError):
        BlockPool(0)


class Pools(RuleBasedStateMachine):
    """Random users of blocks and pages, against a plain count of who holds what."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(9)
        self.pages = PagePool(self.pool, 6)
        self.held: list[list[int]] = []
        self.paged: list[list[int]] = []
        self.names = 0

    @rule(n=st.integers(1, 5))
    def take(self, n: int) -> None:
        free = self.pool.free
        if n > free:
            with pytest.raises(OutOfBlocks):
                self.pool.take(n)
            assert self.pool.free == free
        else:
            self.held.append(self.pool.take(n))

    @rule(n=st.integers(1, 20))
    def take_pages(self, n: int) -> None:
        if n > self.pages.available():
            with pytest.raises(OutOfBlocks):
                self.pages.take(n)
        else:
            self.paged.append(self.pages.take(n))

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def publish_and_share(self, data: st.DataObject) -> None:
        blocks = data.draw(st.sampled_from(self.held))
        for block in blocks:
            self.pool.publish(block, b"%d" % self.names)
            self.names += 1
        self.pool.hold(blocks)
        self.held.append(list(blocks))

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        self.pool.release(self.held.pop(data.draw(st.integers(0, len(self.held) - 1))))

    @precondition(lambda self: self.paged)
    @rule(data=st.data())
    def release_pages(self, data: st.DataObject) -> None:
        self.pages.release(self.paged.pop(data.draw(st.integers(0, len(self.paged) - 1))))

    @rule(name=st.integers(0, 30))
    def find(self, name: int) -> None:
        found = self.pool.find([b"%d" % name])
        if found:
            self.pool.hold(found)
            self.held.append(found)

    @invariant()
    def nothing_is_lost_or_given_twice(self) -> None:
        self.pool.check()
        broken = {p % 9 for pages in self.paged for p in pages}
        whole = [b for blocks in self.held for b in blocks]
        assert not broken & set(whole)
        everything = [p for pages in self.paged for p in pages]
        assert len(everything) == len(set(everything)) and all(0 <= p < 54 for p in everything)
        for block in range(9):
            assert self.pool.references[block] == (1 if block in broken else whole.count(block))
        assert self.pages.free == 6 * len(broken) - len(everything)


Pools.TestCase.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
TestPools = Pools.TestCase


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 60), st.integers(1, 47), st.integers(1, 47)), min_size=1, max_size=20),
    st.booleans(),
    st.sampled_from([3, 8, 16, 100]),
    st.sampled_from([1, 3, 8]),
    st.sampled_from([0.0, 0.2]),
)
def test_fcfs_serves_everybody(
    trace: list[tuple[int, int, int]], chunked: bool, tokens: int, sequences: int, reserve: float
) -> None:
    fits = [(t, prompt, min(output, 48 - prompt)) for t, prompt, output in trace]
    world = _conformance.World(
        FirstComeFirstServed(Config(chunked=chunked, reserve=reserve), 4, 12, tokens, sequences), 12
    )
    _conformance.run_trace(world, fits)
    assert len(world.finished) == len(fits)


def test_fcfs_starts_in_order_of_arrival() -> None:
    for chunked in (False, True):
        world = _conformance.World(FirstComeFirstServed(Config(chunked=chunked), 4, 100, 32, 4), 100)
        rng = random.Random(0)
        for id in range(20):
            prompt = rng.randint(1, 30)
            world.arrive(Job(id, float(id), prompt, prompt), 3)
        started: list[int] = []
        while world.scheduler.pending():
            started += [id for id, _ in world.step().run if id not in started]
        assert started == sorted(started)


def test_fcfs_prefill_first_and_chunked_batches() -> None:
    plain = _conformance.World(FirstComeFirstServed(Config(), 4, 100, 16, 8), 100)
    mixed = _conformance.World(FirstComeFirstServed(Config(chunked=True), 4, 100, 16, 8), 100)
    for world in (plain, mixed):
        world.arrive(Job(0, 0.0, 4, 4), 20)
        world.step()
        world.arrive(Job(1, 1.0, 40, 40), 5)
    assert plain.step().run == ((1, 40),)  # longer than the limit: alone, and the decode waits
    assert mixed.step().run == ((0, 1), (1, 15))  # the decode goes on, the prompt comes in pieces
    assert mixed.step().run == ((0, 1), (1, 15))
    assert mixed.step().run == ((0, 1), (1, 10))
