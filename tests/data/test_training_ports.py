"""Reference tests of orders, transforms and packings; what batches carry beside tokens."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from modicum.core import registry
from modicum.core.errors import UserError
from modicum.data.batch import NO_LOSS, Batch, Span, Tokens, assemble
from modicum.data.orders import Epoch, chunk_ends
from modicum.data.packings import Packing
from modicum.data.shards import MemoryDocuments
from modicum.data.stream import Stream
from modicum.data.transforms import Position, Source, Transform


def epoch(lengths: list[int], chunk: int = 8, number: int = 0, remaining: float | None = None) -> Epoch:
    sizes = np.array(lengths)
    return Epoch("a", number, 3, sizes, chunk_ends(sizes, chunk), chunk, remaining)


def scored(scores: list[float]) -> MemoryDocuments:
    return MemoryDocuments({"a": [(range(9), 1)] * len(scores)}, quality={"a": scores})


def ascending(scores: list[float], knobs: str = "", **more: float) -> list[int]:
    order = registry.build("order", f"quality-ascending{knobs}", scored(scores))
    return order.arrange(epoch([8] * len(scores), **more)).tolist()  # type: ignore[arg-type]


def test_grades_ascend_and_what_has_no_score_is_the_worst() -> None:
    scores = [0.5, math.nan, 0.9, 0.1, -3.0]
    assert ascending(scores) == [1, 4, 3, 0, 2], "as many grades as chunks: exactly by score"


def test_ties_are_shuffled_by_seed_and_epoch_and_not_by_how_they_are_stored() -> None:
    """Near miss: a stable sort of the stored order, in which equal scores come as they are stored."""
    scores = [float(i // 32) for i in range(64)]
    first = ascending(scores)
    assert sorted(first[:32]) == list(range(32)) and sorted(first[32:]) == list(range(32, 64))
    assert first[:32] != list(range(32)) and first[:32] != ascending(scores, number=1)[:32]


def test_a_run_that_ends_within_the_epoch_still_reads_the_best() -> None:
    """Near miss: ascending over all of it, of which a short run reads the worst only."""
    scores = [float(i) for i in range(256)]
    read = ascending(scores, remaining=32 * 8)[:32]
    assert max(read) > 220 and min(read) < 36, "a sample of everything"
    grades = [[read[i] for i in range(32) if i * 16 // 32 == g] for g in range(16)]
    assert all(max(one) < min(two) for one, two in itertools.pairwise(grades)), "ascending by grades"
    assert set(ascending(scores, remaining=32 * 8)[32:]) | set(read) == set(range(256))


def test_orders_of_chunks_are_those_of_their_documents() -> None:
    documents = MemoryDocuments({"a": [(range(21), 1), (range(6), 1)]}, quality={"a": [1.0, 0.0]})
    one = epoch([20, 5])
    assert one.chunks == 4 and one.documents(np.arange(4)).tolist() == [0, 0, 0, 1]
    assert one.sizes(np.arange(4)).tolist() == [8, 8, 4, 5]
    assert registry.build("order", "quality-ascending", documents).arrange(one).tolist()[0] == 3
    assert registry.build("order", "stored", documents).arrange(one).tolist() == [0, 1, 2, 3]


def rows(packing: str, lengths: list[int], length: int) -> list[list[tuple[int, int, int]]]:
    source = iter([Span("d", i, 0, n) for i, n in enumerate(lengths)])
    made: Packing = registry.build("packing", packing)
    pending: list[Span] = []
    found = []
    while row := made.row(lambda: next(source, None), pending, length):
        found.append([(s.document, s.start, s.length) for s in row])
    return found


def test_whole_documents_stay_whole_where_they_fit() -> None:
    assert rows("whole", [3, 4, 4, 8, 1], 8) == [[(0, 0, 3), (1, 0, 4)], [(2, 0, 4)], [(3, 0, 8)], [(4, 0, 1)]]
    assert rows("whole", [2, 11, 3], 8) == [[(0, 0, 2)], [(1, 0, 8)], [(1, 8, 3), (2, 0, 3)]]
    assert registry.build("packing", "whole").masks_documents


class Weigh(Transform):
    """Weight = the token's own value; two tokens of metadata are put before each span."""

    def added(self, span: Span, at: Position) -> int:
        return 2

    def apply(self, tokens: Tokens, span: Span, at: Position) -> Tokens:
        return Tokens(
            np.concatenate([[7, 7], tokens.tokens_N]),
            np.concatenate([[NO_LOSS, NO_LOSS], tokens.targets_N]),
            {"weights": np.concatenate([[0.0, 0.0], tokens.tokens_N])},
        )


def weighed(packing: str) -> Stream:
    documents = MemoryDocuments({"a": [(range(10 * i, 10 * i + 6), 1) for i in range(1, 9)]})
    stream = Stream(documents, packing=packing, sequence_length=12, order="stored", epochs=1)
    stream.transforms = [Weigh(None, Source(documents, 12, None, 0))]
    return stream


def test_extras_stand_beside_their_tokens_through_rows_and_micro_batches() -> None:
    batch = weighed("concat:mask=true").next_batch(4)
    real = batch.tokens_BT >= 10
    assert torch.equal(batch.extras["weights"][real], batch.tokens_BT[real].float())
    assert (batch.extras["weights"][~real] == 0).all()
    mine = batch.rows(1, 2).slice(0, 1)
    assert torch.equal(mine.extras["weights"], batch.extras["weights"][1:2])
    assert torch.equal(mine.tokens_BT, batch.tokens_BT[1:2]) and len(mine) == 1


def test_what_transforms_add_pushes_whole_documents_into_the_next_row() -> None:
    """5 + 2 and 5 + 2 tokens do not fit into 12: packed whole, the second waits; packed to be cut, 3 of it come."""
    whole = weighed("whole").next_batch(2)
    assert whole.documents_BT is not None and int(whole.documents_BT.max()) == 0
    cut = weighed("concat:mask=true").next_batch(2)
    assert cut.tokens_BT[0].tolist() == [7, 7, 10, 11, 12, 13, 14, 7, 7, 20, 21, 22]
    assert cut.tokens_BT[1].tolist()[:4] == [7, 7, 23, 24], "the rest comes next, and gets its prefix again"


class Growing(Packing):
    """Rows of 4 tokens for half of the run, then of 8."""

    masks_documents = True

    def row(self, draw, pending, length):  # type: ignore[no-untyped-def]
        return registry.build("packing", "concat").row(draw, pending, length)

    def row_length(self, longest: int, progress: float, pending: Sequence[Span] = (), tokens: int = 0) -> int:
        return longest // 2 if progress < 0.5 else longest


def test_batches_of_other_row_lengths_hold_as_many_tokens_and_resume_exactly() -> None:
    documents = MemoryDocuments({"a": [(range(100 * i, 100 * i + 50), 1) for i in range(1, 9)]})

    def make() -> Stream:
        stream = Stream(documents, sequence_length=8, total=160, order="stored", epochs=1)
        stream.packing = Growing(None)
        return stream

    whole = make()
    batches = [whole.next_batch(2) for _ in range(10)]
    assert [tuple(b.tokens_BT.shape) for b in batches] == [(4, 4)] * 5 + [(2, 8)] * 5
    seen = torch.cat([b.targets_BT.flatten() for b in batches])
    assert seen.tolist() == [100 * (1 + k // 49) + 1 + k % 49 for k in range(160)], "every prediction once, in order"
    first = make()
    for _ in range(3):
        first.next_batch(2)
    later = make()
    later.load_state(json.loads(json.dumps(first.state())))
    assert all(torch.equal(later.next_batch(2).tokens_BT, b.tokens_BT) for b in batches[3:])


def test_rows_of_another_length_are_micro_batches_of_as_many_tokens() -> None:
    from train_toys import config, decoder

    from modicum.train.engine import TrainEngine
    from modicum.train.objectives import Step

    seen: list[tuple[int, ...]] = []

    class Watch(TrainEngine):
        pass

    engine = Watch(decoder(), config(dtype="float32", batch_sequences=4, micro_batch=2))
    engine.build()
    forward = engine.whole.forward
    engine.whole.forward = lambda o, b, s: seen.append(tuple(b.tokens_BT.shape)) or forward(o, b, s)  # type: ignore
    tokens = torch.randint(2, 60, (16, 8))
    batch = Batch(tokens, tokens.clone(), None, torch.arange(8).expand(16, 8))
    engine.gradients(batch, 128, Step())
    assert seen == [(8, 8), (8, 8)], "two sequences of 32 tokens, as eight rows of 8"


def test_assembled_rows_are_padded_and_positions_run_within_documents() -> None:
    row = [Tokens(np.array([5, 6]), np.array([6, 7])), Tokens(np.array([8]), np.array([9]), {"score": np.array([2.0])})]
    masked = assemble([row], 5, masked=True, padding=3)
    assert masked.tokens_BT.tolist() == [[5, 6, 8, 3, 3]] and masked.positions_BT.tolist() == [[0, 1, 0, 0, 0]]
    assert masked.documents_BT is not None and masked.documents_BT.tolist() == [[0, 0, 1, -1, -1]]
    assert masked.targets_BT.tolist() == [[6, 7, 9, NO_LOSS, NO_LOSS]]
    assert masked.extras["score"].tolist() == [[0, 0, 2, 0, 0]]
    plain = assemble([row], 5, masked=False)
    assert plain.documents_BT is None and plain.positions_BT.tolist() == [[0, 1, 2, 3, 4]]


def test_knobs_of_the_transform_are_its_own() -> None:
    with pytest.raises(UserError, match="unknown transform method 'mecco'"):
        Stream(scored([1.0]), sequence_length=4, transforms=["mecco"])


SIZES = {"web": 60_000, "maths": 4_000, "code": 16_000}


def corpus_of(sizes: dict[str, int]) -> MemoryDocuments:
    rng = np.random.default_rng(0)
    examples: dict[str, list[tuple[range, int]]] = {}
    for domain, size in sizes.items():
        while size > 0:
            n = int(rng.integers(2, 60))
            examples.setdefault(domain, []).append((range(n + 1), 1))
            size -= n
    return MemoryDocuments(examples)


UPSAMPLED = "domain-upsampling:fraction=0.25,base={web: 3, maths: 1},up={web: 1, maths: 1, code: 2}"


def test_upsampling_serves_what_its_closed_form_says() -> None:
    """(1 - fraction) base + fraction up, in tokens; near misses: a share of documents, the switch at `fraction`."""
    total = 40_000
    stream = Stream(corpus_of(SIZES), UPSAMPLED, sequence_length=64, total=total, seed=1)
    seen: dict[str, list[int]] = {}
    for _ in range(total // 64):
        stream.next_batch(1)
        for name, domain in stream.sampler.domains.items():
            seen.setdefault(name, []).append(domain.consumed)
    want = {"web": 0.75 * 0.75 + 0.25 * 0.25, "maths": 0.75 * 0.25 + 0.25 * 0.25, "code": 0.25 * 0.5}
    for name, fraction in want.items():
        assert seen[name][-1] == pytest.approx(fraction * total, abs=2 * 64), name
    assert seen["code"][int(0.75 * total / 64) - 2] == 0 < seen["code"][int(0.75 * total / 64) + 3]


def test_upsampling_resumes_at_its_boundary() -> None:
    def make() -> Stream:
        return Stream(corpus_of(SIZES), UPSAMPLED, sequence_length=64, total=8192, seed=1)

    whole = make()
    batches = [whole.next_batch(4).tokens_BT.tolist() for _ in range(32)]
    for cut in (23, 24, 25):
        first, later = make(), make()
        for _ in range(cut):
            first.next_batch(4)
        later.load_state(json.loads(json.dumps(first.state())))
        assert [later.next_batch(4).tokens_BT.tolist() for _ in range(cut, 32)] == batches[cut:]


def test_boost_multiplies_the_natural_weights() -> None:
    mixture = registry.build("mixture", "domain-upsampling:boost={maths: 10}", SIZES)
    assert mixture.weights(0, 100) == pytest.approx({"web": 0.75, "maths": 0.05, "code": 0.2})
    assert mixture.weights(79, 100) == mixture.weights(0, 100)
    assert mixture.weights(80, 100) == pytest.approx({"web": 60 / 116, "maths": 40 / 116, "code": 16 / 116})
    for wrong, message in (
        ("", "mixture of the end"),
        (":up={web: 1},boost={web: 2}", "either up"),
        (":boost={math: 2}", "maths"),
        (":up={web: 0}", "all weights"),
    ):
        with pytest.raises(UserError, match=message):
            registry.build("mixture", f"domain-upsampling{wrong}", SIZES)
    with pytest.raises(UserError, match="--tokens"):
        mixture.weights(0, None)


def test_what_remains_for_an_order_counts_the_change_of_the_mixture() -> None:
    """`quality-ascending` reads a random part of an epoch that will not end: as long as what will be read of it."""
    stream = Stream(corpus_of(SIZES), UPSAMPLED, sequence_length=64, total=40_000, seed=1)
    remaining = stream.sampler._epoch(stream.sampler.domains["code"]).remaining
    assert remaining == pytest.approx(0.125 * 40_000)
