"""The order seta: against a plain re-implementation, and in a run whose losses it follows."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from modicum.core import registry
from modicum.core.errors import UserError
from modicum.data.orders import Epoch, chunk_ends
from modicum.data.orders.seta import grouped
from modicum.data.shards import MemoryDocuments
from modicum.model.config import llama_like
from modicum.model.decoder import Decoder
from modicum.train.config import TrainConfig
from modicum.train.loop import train

COUNT = 60


def documents(count: int = COUNT) -> MemoryDocuments:
    rng = np.random.default_rng(0)
    rows = [([1, *rng.integers(3, 40, int(rng.integers(4, 30))).tolist(), 2], 1) for _ in range(count)]
    return MemoryDocuments({"a": rows, "b": rows[:20]})


def epoch(number: int, chunk: int = 1000) -> Epoch:
    lengths = documents().lengths("a") - 1
    return Epoch("a", number, 7, lengths, chunk_ends(lengths, chunk), chunk, None)


def plain(
    number: int, scores: np.ndarray, prune: float, groups: int, window: float, delta: float, epochs: int
) -> set[int]:
    """Which documents an epoch reads, step by step as the card says."""
    subset = epoch(number).permutation(COUNT)[: round((1 - prune) * COUNT)].astype(int).tolist()
    if number == 0 or number >= delta * epochs:
        return set(subset)
    parts = [[subset[int(i)] for i in g] for g in grouped(scores[subset], groups)]
    width = round(groups * window)
    start = number % (groups - width + 1)
    return {d for part in parts[start : start + width] for d in part}


def test_twenty_epochs_are_those_of_a_plain_reading_of_the_card() -> None:
    order = registry.build("order", "seta:prune=0.2,groups=6,window=0.5,annealing=0.8,epochs=20", documents())
    rng = np.random.default_rng(1)
    scores, read = np.zeros(COUNT), set[int]()
    for number in range(20):
        numbers = order.arrange(epoch(number)).astype(int)
        right = plain(number, scores, 0.2, 6, 0.5, 0.8, 20)
        assert set(numbers.tolist()) == right  # one chunk a document
        seen = np.array(sorted(right))
        losses = rng.random(len(seen))
        scores[seen] = losses
        order.observe(seen, losses)  # what was left out keeps its old score
        read |= right
    assert read == set(range(COUNT))


def test_the_window_slides_from_easy_to_hard_and_starts_over() -> None:
    order = registry.build("order", "seta:prune=0,groups=6,window=0.5,annealing=1,epochs=100", documents())
    order.observe(np.arange(COUNT), np.arange(COUNT) / COUNT)
    order.fixed.clear()
    means = [order.arrange(epoch(n)).astype(int).mean() for n in range(1, 9)]
    assert means[0] < means[1] < means[2] and means[3] < means[0]  # 4 windows: 1, 2, 3, 0
    assert means[4:7] == pytest.approx(means[0:3])


def test_what_is_read_within_an_epoch_does_not_change_it() -> None:
    order = registry.build("order", "seta:groups=4", documents())
    before = order.arrange(epoch(3)).tolist()
    order.observe(np.arange(COUNT), np.random.default_rng(0).random(COUNT))
    assert order.arrange(epoch(3)).tolist() == before
    other = registry.build("order", "seta:groups=4", documents())
    other.load_state(order.state())
    assert other.arrange(epoch(3)).tolist() == before
    assert other.arrange(epoch(4)).tolist() == order.arrange(epoch(4)).tolist()


def cost(values: np.ndarray, parts: list[np.ndarray]) -> float:
    return float(sum(((values[p] - values[p].mean()) ** 2).sum() for p in parts if len(p)))


def test_groups_are_nearly_those_of_dynamic_programming() -> None:
    values = np.concatenate([np.random.default_rng(k).normal(3 * k, 0.5, 10) for k in range(5)])
    best = np.full((6, 51), np.inf)
    best[0, 0] = 0
    ordered = np.sort(values)
    for k, end in itertools.product(range(1, 6), range(1, 51)):
        best[k, end] = min(
            best[k - 1, b] + float(((ordered[b:end] - ordered[b:end].mean()) ** 2).sum()) for b in range(end)
        )
    parts = grouped(values, 5)
    assert cost(values, parts) <= 1.02 * best[5, 50]
    means = [values[p].mean() for p in parts]
    assert means == sorted(means) and sum(map(len, parts)) == 50


def test_equal_scores_give_equal_chunks() -> None:
    assert [len(p) for p in grouped(np.zeros(50), 5)] == [10] * 5


def run(
    folder: Path | None, steps: int, killed_at: int | None = None
) -> tuple[list[float], dict[str, np.ndarray], object]:
    config = TrainConfig(
        steps=steps,
        sequence_length=32,
        batch_sequences=2,
        dtype="float32",
        order="seta:groups=4,epochs=8,prune=0",
        lr=1e-3,
        checkpoint_every=5,
        device="cpu",
    )
    stream = config.stream(documents(), total=40 * 64)
    losses: list[float] = []

    class Seen:
        def emit(self, kind: str, **fields: float) -> None:
            if kind == "train":
                losses.append(fields["loss"])
                if len(losses) == killed_at:
                    raise RuntimeError("killed")

        def progress(self, *args: object) -> object:
            raise AssertionError

    model = Decoder(llama_like(64, 32, 1), torch.Generator().manual_seed(0))
    train(model, stream, config, folder, events=Seen(), label="")  # type: ignore[arg-type]
    return losses, stream.sampler.order.state(), stream


def test_scores_are_the_documents_mean_losses() -> None:
    """One step: the scores of what was read against a forward pass of the untrained model."""
    _, state, _ = run(None, 1)
    fresh = TrainConfig(steps=1, sequence_length=32, batch_sequences=2, order="seta:groups=4,epochs=8,prune=0")
    batch = fresh.stream(documents(), total=40 * 64).next_batch(2)
    model = Decoder(llama_like(64, 32, 1), torch.Generator().manual_seed(0))
    with torch.no_grad():
        log_p = torch.log_softmax(model(batch.tokens_BT).double(), -1)
    nats = -log_p.gather(-1, batch.targets_BT.clamp_min(0)[..., None])[..., 0]
    numbers = batch.extras["document"].long()
    scores = state["scores"]
    for number in numbers.unique().tolist():
        at = (numbers == number) & (batch.targets_BT >= 0)
        assert scores[number - 1] == pytest.approx(float(nats[at].mean()), rel=1e-4)
    assert (scores > 0).sum() == len(numbers.unique())


def test_a_run_that_was_cut_goes_on_with_its_scores(tmp_path: Path) -> None:
    whole, scores, _ = run(None, 30)
    with pytest.raises(RuntimeError, match="killed"):
        run(tmp_path / "cut", 30, killed_at=17)  # the last checkpoint is that of step 15
    rest, resumed, _ = run(tmp_path / "cut", 30)
    assert rest == whole[15:] and len(rest) == 15
    assert all(np.array_equal(scores[name], resumed[name]) for name in scores)


def test_the_objective_alone_is_refused() -> None:
    config = TrainConfig(steps=1, sequence_length=32, batch_sequences=2, objective="document-losses", device="cpu")
    model = Decoder(llama_like(64, 32, 1), torch.Generator().manual_seed(0))
    with pytest.raises(UserError, match="order seta"):
        train(model, config.stream(documents()), config, None, label="")


def test_numbers_go_through_all_domains() -> None:
    config = TrainConfig(steps=1, sequence_length=32, batch_sequences=8, order="seta")
    batch = config.stream(documents(), total=1000).next_batch(20)
    assert batch.extras["document"].max() > COUNT and json.dumps(batch.extras["document"].shape)


def test_tokens_without_a_document_count_for_none() -> None:
    from modicum.train.objectives.document_losses import Config, DocumentLosses

    objective = DocumentLosses(Config())
    objective._add(
        torch.tensor([0, 2, 2, 5]), torch.tensor([9.0, 1.0, 3.0, 4.0]), torch.tensor([True, True, True, False])
    )
    assert objective.sums == {1: [4.0, 2.0]}


def test_a_run_in_this_order_can_be_planned() -> None:
    from modicum.train.forecast import blank, step_cost

    config = TrainConfig(steps=8, sequence_length=32, batch_sequences=2, order="seta", dtype="float32")
    shape = llama_like(64, 32, 1)
    plain = TrainConfig(steps=8, sequence_length=32, batch_sequences=2, dtype="float32")
    cost, without = (step_cost(lambda: blank(shape), c, 64) for c in (config, plain))
    assert cost.flops >= without.flops > 0
