"""Schedules for training that goes on, and for data in ascending quality: equations, averages, resume."""

from __future__ import annotations

import math

import pytest
from train_toys import LENGTH, config, corpus, decoder, stream

from modicum.core import registry
from modicum.core.errors import UserError
from modicum.data.shards import MemoryDocuments
from modicum.data.stream import Stream
from modicum.train.loop import Trainer


def _rate(choice, done, total):
    return registry.build("schedule", choice).scale(done, total)["lr"]


def _equation_1(n, warm, cool, decay, end, const, low):
    """Equation 1 of arXiv:2503.02844 with the peak at 1; phases end at `warm`, `cool`, `decay`, `end`."""
    if n < warm:
        return n / warm
    if n < cool:
        return const + (1 - const) / 2 * (1 + math.cos(math.pi * (n - warm) / (cool - warm)))
    if n < decay:
        return const
    return const * (low / const) ** ((n - decay) / (end - decay))


def test_infinite_lr_follows_equation_1():
    choice = "infinite-lr:warmup=0.1,cooldown=0.3,constant=0.4,anneal=0.2,floor=0.05"
    for n in (0.5, 50, 99.5, 100, 101, 250, 399, 400, 500, 799, 801, 900, 999.5):
        assert _rate(choice, n, 1000) == pytest.approx(_equation_1(n, 100, 400, 800, 1000, 0.4, 0.05), rel=1e-12)
    assert _rate(choice, 1000, 1000) == pytest.approx(0.05)


def test_a_run_and_the_one_that_goes_on_are_one_long_run():
    """The first in its constant phase at the end, the second there from its beginning: no jump, no second warm-up."""
    knobs = "warmup=50,cooldown=250,constant=0.4,floor=0.05"
    cls = registry.load("schedule", "infinite-lr").cls
    assert cls.FIRST == {"anneal": 0.0} and cls.LATER == {"resumed": True}
    first = [_rate(f"infinite-lr:{knobs},anneal=0", n + 0.5, 1000) for n in range(1000)]
    later = [_rate(f"infinite-lr:{knobs},anneal=300,resumed=true", n + 0.5, 800) for n in range(800)]
    whole = [_equation_1(n + 0.5, 50, 300, 1500, 1800, 0.4, 0.05) for n in range(1800)]
    assert first + later == pytest.approx(whole, rel=1e-12)
    # and the first does not depend on how long it was meant to be
    assert first[:400] == [_rate(f"infinite-lr:{knobs},anneal=0", n + 0.5, 400) for n in range(400)]


def test_rewarm_is_linear_up_and_cosine_down():
    for warmup in (0, 0.005, 0.01, 0.02):  # the lengths that the paper compares
        choice, up = f"rewarm:warmup={warmup},peak=2,floor=0.1,start=0.1", warmup * 10_000
        for n in (0, 0.25 * up, 0.5 * up, up, 3000, 9000, 10_000):
            x = (n - up) / (10_000 - up)
            expected = 2 * (0.1 + 0.9 * (1 + math.cos(math.pi * x)) / 2) if n >= up else 0.1 + 1.9 * n / up
            assert _rate(choice, n, 10_000) == pytest.approx(expected), (warmup, n)
    assert _rate("rewarm:warmup=0,peak=0.1", 0, 100) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("choice", "told"),
    [
        ("infinite-lr:constant=0", "0 < floor <= constant <= 1"),
        ("infinite-lr:floor=0.6", "0 < floor <= constant <= 1"),
        ("infinite-lr:anneal=-1", "anneal=-1.0 must be a fraction"),
        ("infinite-lr:warmup=0.5,cooldown=0.5,anneal=0.5", "1.5 of the run together"),
        ("rewarm:peak=0", "peak=0.0 must be a positive factor"),
        ("rewarm:start=2", "start=2.0 must lie between 0 and peak=1.0"),
        ("rewarm:warmup=-0.1", "warmup=-0.1 is negative"),
        ("curriculum-averaging:decay=2", "decay=2.0 must lie in"),
    ],
)
def test_knobs_out_of_range_are_refused(choice, told):
    with pytest.raises(UserError, match=f"schedule/.*{told}"):
        registry.build("schedule", choice)


# Curriculum and averaging.


def graded() -> MemoryDocuments:
    plain = corpus()
    examples = {d: [(plain.tokens(d, i), 1) for i in range(plain.documents(d))] for d in plain.domains}
    return MemoryDocuments(examples, quality={d: [(7 * i) % 120 for i in range(120)] for d in plain.domains})


def ascending(total: int) -> Stream:
    return Stream(graded(), sequence_length=LENGTH, seed=3, total=total, order="quality-ascending")


def test_the_rate_decays_moderately():
    choice = "curriculum-averaging:warmup=0,decay=0.25,floor=0.3"
    for n, expected in ((10, 1.0), (750, 1.0), (812.5, 0.3 + 0.7 * 0.5), (1000, 0.3)):
        assert _rate(choice, n, 1000) == pytest.approx(expected)


def test_a_stream_in_another_order_is_refused():
    told = config(schedule="curriculum-averaging")
    with pytest.raises(UserError, match=r"order=quality-ascending, which schedule 'curriculum-averaging' brings"):
        Trainer(decoder(), stream(), told, None)


def test_the_data_comes_as_the_schedule_asks(tmp_path):
    """Pretraining builds the stream by what the methods ask, not by their names."""
    import json

    from modicum.data.curate import CurateConfig, curate
    from modicum.train.config import PretrainSpec
    from modicum.train.pretrain import pretrain

    words = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta"]
    rows = [{"text": " ".join(words[(i * j) % 8] for j in range(60)), "quality": i} for i in range(60)]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, rows)))
    curate(str(tmp_path / "in.jsonl"), tmp_path / "c", CurateConfig(steps=["keep"], vocab_size=300), processes=1)
    knobs = {"schedule": "curriculum-averaging", "batch_sequences": 4, "device": "cpu", "dtype": "float32"}
    made = pretrain(
        tmp_path / "c", tmp_path / "run", PretrainSpec(parameters=8e4, steps=4, sequence_length=32, **knobs)
    )
    assert made.run.finished
    with pytest.raises(UserError, match="choose packing concat:mask=true"):
        pretrain(
            tmp_path / "c",
            tmp_path / "run2",
            PretrainSpec(
                parameters=8e4, steps=4, sequence_length=32, **knobs | {"schedule": "cosine", "objective": "meco"}
            ),
        )
