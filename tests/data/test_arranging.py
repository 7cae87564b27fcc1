"""Related documents in a row, and rows of other lengths: against their papers' definitions."""

from __future__ import annotations

import itertools
import json
from collections import Counter

import numpy as np
import pytest

from modicum.core import registry
from modicum.core.errors import UserError
from modicum.data.batch import NO_LOSS, Span
from modicum.data.orders import Epoch, chunk_ends, in_context_pretraining
from modicum.data.packings import dataset_decomposition
from modicum.data.shards import MemoryDocuments
from modicum.data.stream import Stream

# in-context-pretraining


def naive_path(near: list[list[int]], cos: list[list[float]]) -> list[int]:
    n = len(near)
    similarity = {}
    for i in range(n):
        for j, c in zip(near[i], cos[i], strict=True):
            similarity[i, j] = similarity[j, i] = c
    degree = [sum((i, j) in similarity for j in range(n)) for i in range(n)]
    path: list[int] = []
    while len(path) < n:
        rest = [i for i in range(n) if i not in path]
        neighbours = [j for j in rest if path and (path[-1], j) in similarity]
        if neighbours:
            path.append(min(neighbours, key=lambda j: (-similarity[path[-1], j], j)))
        else:
            path.append(min(rest, key=lambda i: (degree[i], i)))
    return path


def test_the_path_is_the_papers() -> None:
    rng = np.random.default_rng(0)
    x = np.rint(rng.normal(size=(200, 16)) * 8).astype(np.float32)  # whole numbers, with ties among them
    near, cos = in_context_pretraining.nearest(x, 5)
    full = x @ x.T
    for i in range(200):
        order = sorted((j for j in range(200) if j != i), key=lambda j: (-full[i, j], j))
        assert sorted(cos[i], reverse=True) == [full[i, j] for j in order[:5]] and i not in near[i]
    path = in_context_pretraining.greedy_path(near, cos)
    assert path.tolist() == naive_path(near.tolist(), cos.tolist())
    assert sorted(path.tolist()) == list(range(200))
    along = sum(full[a, b] for a, b in itertools.pairwise(path))
    assert along > 3 * abs(sum(full[i, i + 1] for i in range(199))), "more alike than at random"


def topics(count: int, length: int, domains: tuple[str, ...] = ("a", "b")) -> MemoryDocuments:
    """Documents of four topics in turn, each of words of its own and common ones."""
    rng = np.random.default_rng(1)
    examples = {
        domain: [
            (np.where(rng.random(length) < 0.6, 100 + 50 * (i % 4), 0) + rng.integers(0, 50, length), 1)
            for i in range(count)
        ]
        for domain in domains
    }
    return MemoryDocuments({d: [(list(map(int, row)), start) for row, start in rows] for d, rows in examples.items()})


def test_neighbours_share_a_topic() -> None:
    documents = topics(60, 40, ("a",))
    order = registry.build("order", "in-context-pretraining:neighbours=5", documents)
    path = order.path("a")
    same = np.mean([a % 4 == b % 4 for a, b in itertools.pairwise(path)])
    assert same > 0.85, "against a quarter at random"
    lengths = documents.lengths("a") - 1
    epoch = Epoch("a", 0, 1, lengths, chunk_ends(lengths, 16), 16, None)
    chunks = order.arrange(epoch)
    assert sorted(chunks.tolist()) == list(range(epoch.chunks)), "every chunk once"
    owners = epoch.documents(chunks)
    assert [int(d) for d, before in zip(owners, [-1, *owners], strict=False) if d != before] == path.tolist()
    blocks = registry.build("order", "in-context-pretraining:neighbours=5,block=20", documents).path("a")
    assert sorted(blocks.tolist()) == list(range(60))


def test_rows_are_of_one_domain_and_follow_the_path() -> None:
    documents = topics(30, 21)

    def make() -> Stream:
        return Stream(documents, sequence_length=64, seed=2, epochs=2, order="in-context-pretraining")

    stream = make()
    path = {d: stream.sampler.order.path(d).tolist() for d in ("a", "b")}  # type: ignore[attr-defined]
    seen: Counter[tuple[str, int, int]] = Counter()
    rows = []
    while row := stream.next_row(64):
        rows.append(row)
        stream._consume(row, 64)
        assert len({s.domain for s in row}) == 1 and sum(s.length for s in row) <= 64
        for span in row:
            for t in range(span.start, span.start + span.length):
                seen[span.domain, span.document, t] += 1
        numbers = [path[span.domain].index(span.document) for span in row]
        assert numbers == list(range(numbers[0], numbers[0] + len(numbers))), "neighbours on the path"
    assert len(seen) == 2 * 30 * 20 and set(seen.values()) == {2}, "every prediction once in each epoch"
    short = [row for row in rows if sum(s.length for s in row) < 64]
    assert len(short) == 4, "the last row of each domain and epoch"
    first = [row[0].document for row in rows if row[0].domain == "a"]
    assert [path["a"].index(d) for d in first] != sorted(path["a"].index(d) for d in first), "rows are shuffled"


def test_a_stream_of_related_rows_resumes_within_a_row_and_an_epoch() -> None:
    documents = topics(30, 21)

    def make() -> Stream:
        return Stream(documents, sequence_length=64, seed=2, order="in-context-pretraining")

    whole = make()
    batches = [whole.next_batch(1).tokens_BT.tolist() for _ in range(40)]
    for cut in (1, 7, 19, 20, 33):
        first, later = make(), make()
        for _ in range(cut):
            first.next_batch(1)
        later.load_state(json.loads(json.dumps(first.state())))
        assert [later.next_batch(1).tokens_BT.tolist() for _ in range(cut, 40)] == batches[cut:]
    with pytest.raises(UserError, match="cannot be combined with packing 'concat'"):
        Stream(documents, "natural", "concat:mask=true", sequence_length=64, order="in-context-pretraining")


# dataset-decomposition


@pytest.mark.parametrize("shortest", [1, 8, 32])
def test_parts_are_binary_digits(shortest: int) -> None:
    def naive(n: int) -> list[int]:
        if n < shortest:
            return []
        size = 1
        while size * 2 <= min(n, 1024):
            size *= 2
        return [size, *naive(n - size)]

    for n in range(1, 5000, 7):
        parts = dataset_decomposition.decomposed(Span("d", 0, 3, n), shortest, 1024)
        assert [p.length for p in parts] == naive(n)
        at = 3
        for part in parts:
            assert part.start == at, "one after another"
            at += part.length
        assert 3 + n - at < shortest, "what is left is dropped"
        if n < 2048 and shortest == 1:
            assert sum(p.length for p in parts) == n and len(parts) == bin(n % 1024).count("1") + n // 1024


def lengths_of(seed: int) -> MemoryDocuments:
    rng = np.random.default_rng(seed)
    sizes = np.exp(rng.normal(4.2, 1.2, 400)).astype(int) + 2
    return MemoryDocuments({"a": [(list(range(int(n))), 1) for n in sizes]})


CHOICE = "dataset-decomposition:shortest=16,cycle=6000"


def test_batches_have_as_many_tokens_in_rows_of_one_document() -> None:
    stream = Stream(lengths_of(0), "natural", CHOICE, sequence_length=256, epochs=1, seed=1)
    shapes = []
    seen = 0
    for batch in stream.batches(4):
        B, T = batch.tokens_BT.shape
        shapes.append((B, T))
        assert batch.documents_BT is None and batch.positions_BT[0].tolist() == list(range(T))
        assert (batch.targets_BT != NO_LOSS).all(), "no padding"
        steps = (batch.tokens_BT[:, 1:] - batch.tokens_BT[:, :-1]) == 1
        assert steps.all(), "each row is consecutive text of one document"
        seen += int((batch.targets_BT != NO_LOSS).sum())
    assert all(B * T == 1024 for B, T in shapes[:-5]), "fewer rows only where the data ends"
    assert {T for _, T in shapes} >= {16, 32, 64, 128, 256}
    sizes = lengths_of(0).lengths("a") - 1
    kept = sum((int(n) // 16) * 16 for n in sizes)
    assert seen == kept == stream.done, "all but what is left below the shortest"
    assert stream.sampler.drawn_tokens == int(sizes.sum())
    other = Stream(lengths_of(0), "natural", CHOICE, sequence_length=256, seed=1)
    other.next_batch(4)
    assert other.sampler.drawn_tokens >= 6000 > other.done == 1024


def test_short_rows_come_first_in_a_cycle_and_long_ones_last() -> None:
    def mean_position(odds: str) -> float:
        choice = f"dataset-decomposition:shortest=16,cycle=1000000,odds={odds}"
        stream = Stream(lengths_of(3), "natural", choice, sequence_length=256, epochs=1, seed=1)
        lengths = [batch.tokens_BT.shape[1] for batch in stream.batches(4)]
        half = len(lengths) // 2
        return float(np.mean(lengths[half:]) - np.mean(lengths[:half]))

    assert mean_position("grow-p100") > mean_position("grow-p2") > 10
    assert abs(mean_position("natural")) < mean_position("grow-p2")


def test_decomposition_resumes_within_a_cycle() -> None:
    def make() -> Stream:
        return Stream(lengths_of(1), "natural", CHOICE, sequence_length=256, seed=1, total=60_000)

    whole = make()
    batches = [whole.next_batch(4).tokens_BT.tolist() for _ in range(50)]
    for cut in (1, 9, 26):
        first, later = make(), make()
        for _ in range(cut):
            first.next_batch(4)
        later.load_state(json.loads(json.dumps(first.state())))
        assert [later.next_batch(4).tokens_BT.tolist() for _ in range(cut, 50)] == batches[cut:]
    with pytest.raises(UserError, match="power of two"):
        Stream(lengths_of(1), "natural", CHOICE, sequence_length=100).next_batch(2)
    with pytest.raises(UserError, match="power of two"):
        registry.build("packing", "dataset-decomposition:shortest=10")
