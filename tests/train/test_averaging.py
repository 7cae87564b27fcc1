"""Reference tests of ema and lawa: the mean written out, on real runs and on weights that are numbers."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from train_toys import config, decoder, stream

from modicum.core import registry
from modicum.core.errors import UserError
from modicum.train.callback import Callback
from modicum.train.loop import train


class Watch(Callback):
    """Keeps the masters after every step."""

    def __init__(self):
        self.seen: list[dict[str, torch.Tensor]] = []

    def after_step(self, trainer):
        self.seen.append({n: p.detach().double().clone() for n, p in trainer.named.items()})


def _run(folder, averaging, dtype="float32", parts=None, **knobs):
    told = config(averaging=averaging, dtype=dtype, keep=50, **knobs)
    model = decoder()
    return model, train(model, stream(), told, folder, label="", parts=parts)


def _weights(kind):
    return {
        "ema": [0.7**3, 0.3 * 0.7**2, 0.3 * 0.7, 0.3],
        "mean": [0.25] * 4,
        "linear": [0.1, 0.2, 0.3, 0.4],
    }[kind]


@pytest.mark.parametrize("kind", ["ema", "mean", "linear"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_lawa_ends_as_the_weighted_mean_of_the_last_checkpoints(tmp_path, kind, dtype):
    watch = Watch()
    choice = f"lawa:weights={kind},checkpoints=4,window=0.5,alpha=0.3"
    _, result = _run(tmp_path, choice, dtype, parts={"watch": watch}, steps=16)
    points = [10, 12, 14, 16]  # the last 4, spread over half of 16 steps
    assert registry.build("averaging", choice).points(16) == points
    assert sum(_weights(kind)) == pytest.approx(1)
    saved = load_file(Path(result.checkpoint) / "model.safetensors")
    for name in watch.seen[0]:
        mean = sum(w * watch.seen[at - 1][name] for w, at in zip(_weights(kind), points, strict=True))
        assert torch.allclose(saved[name].double(), mean, atol=1e-6), name
        assert not torch.allclose(saved[name].double(), watch.seen[-1][name], atol=1e-6) or "norm" in name


def test_lawa_reaches_over_its_window_and_no_further():
    method = registry.build("averaging", "lawa")
    assert method.points(1000) == [958, 967, 975, 983, 992, 1000]
    assert method.points(10) == [10], "a run too short for its window ends as it is"
    assert [method.coefficient(step, 1000, 0) for step in (957, 959, 999)] == [None] * 3


def _averaged(choice, path):
    """What an average of the numbers in `path`, one a step, ends as."""
    method = registry.build("averaging", choice)
    engine = SimpleNamespace(named={"w": torch.zeros(1)}, config=SimpleNamespace(total_steps=len(path)), steps_done=0)
    method.start(engine)
    for step, value in enumerate(path, 1):
        engine.named["w"].fill_(value)
        engine.steps_done = step
        method.after_step(engine)
    method.finish(engine)
    return float(engine.named["w"])


def test_ema_is_the_sum_over_all_steps_with_the_weights_of_its_equation():
    path = [math.sin(t) + 3 for t in range(1, 41)]
    for decay, gamma in ((0.9, 0.0), (0.95, 8.0), (0.5, 2.0)):
        c = [max(1 - decay, (1 + gamma) / (t + gamma)) for t in range(1, 41)]
        weights = [c[t] * math.prod(1 - k for k in c[t + 1 :]) for t in range(40)]
        assert sum(weights) == pytest.approx(1), "no weight is left on where the run began"
        wanted = sum(w * x for w, x in zip(weights, path, strict=True))
        assert _averaged(f"ema:decay={decay},gamma={gamma}", path) == pytest.approx(wanted, rel=1e-5)
    assert _averaged("ema:gamma=0", path) == pytest.approx(sum(path) / 40, rel=1e-5), "the plain mean at first"


def test_ema_of_weights_that_do_not_move_are_those_weights():
    """Near miss: an average that begins at 0, or at the initial weights, and is not corrected for it."""
    assert _averaged("ema:decay=0.999", [7.0] * 5) == pytest.approx(7.0, rel=1e-6)


def test_ema_leaves_steps_out():
    path = [1.0, 2.0, 9.0, 4.0, 9.0, 6.0]
    assert _averaged("ema:every=2,gamma=0,decay=0.99", path) == pytest.approx((2 + 4 + 6) / 3)


@pytest.mark.parametrize("choice", ["lawa:checkpoints=5,window=0.8,weights=ema", "ema:decay=0.7"])
def test_resume_is_bit_for_bit(tmp_path, choice):
    """Cut in the middle of the averaging: the same weights, average and data position as a run that was not."""
    _run(tmp_path / "whole", choice, steps=12, checkpoint_every=4)
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "step-00000012")
    _, again = _run(tmp_path / "cut", choice, steps=12, checkpoint_every=4)
    assert again.resumed_from == 8
    for name in ("model", "averaging", "optimizer"):
        files = (tmp_path / p / "checkpoints" / "step-00000012" / f"{name}.safetensors" for p in ("whole", "cut"))
        one, two = (f.read_bytes() for f in files)
        assert one == two, name


def test_a_longer_run_begins_its_average_anew(tmp_path):
    watch, choice = Watch(), "lawa:checkpoints=2,window=0.5"
    _run(tmp_path, choice, parts={"watch": watch}, steps=8, checkpoint_every=4, schedule="constant")
    _, result = _run(tmp_path, choice, parts={"watch": watch}, steps=16, checkpoint_every=4, schedule="constant")
    assert result.resumed_from == 8
    saved = load_file(Path(result.checkpoint) / "model.safetensors")
    mean = {n: (watch.seen[11][n] + watch.seen[15][n]) / 2 for n in saved}
    assert all(torch.allclose(saved[n].double(), mean[n], atol=1e-6) for n in saved)


def test_averaging_goes_with_a_model_that_grows(tmp_path):
    watch = Watch()
    told = config(surgery="gstack:growth=2,grow=0.5", averaging="ema:decay=0.5,gamma=0", steps=8)
    model = decoder(layers=4)
    train(model, stream(), told, None, label="", parts={"watch": watch})
    deep = [seen for seen in watch.seen if any("layers.3" in n for n in seen)]
    assert 0 < len(deep) < 8
    c = [max(0.5, 1 / t) for t in range(1, len(deep) + 1)]
    weights = [c[t] * math.prod(1 - k for k in c[t + 1 :]) for t in range(len(deep))]
    name = "layers.3.mlp.up.weight"
    mean = sum(w * seen[name] for w, seen in zip(weights, deep, strict=True))
    end = dict(model.named_parameters())[name].double()
    assert torch.allclose(end, mean, atol=2e-2) and not torch.allclose(end, deep[-1][name], atol=1e-6)


@pytest.mark.parametrize(
    ("choice", "told"),
    [
        ("lawa:checkpoints=0", "checkpoints=0 must be at least 1"),
        ("lawa:window=0", "window=0.0 must be a fraction"),
        ("lawa:alpha=0", "alpha=0.0 must lie in"),
        ("lawa:weights=median", "weights"),
        ("ema:decay=1", "decay=1.0 must lie in"),
        ("ema:gamma=-1", "gamma=-1.0 must be at least 0"),
        ("ema:every=0", "every=0 must be at least 1"),
    ],
)
def test_knobs_out_of_range_are_refused(choice, told):
    with pytest.raises(UserError, match=f"averaging/.*{told}"):
        registry.build("averaging", choice)


def test_curriculum_averaging_brings_its_average_unless_another_is_chosen():
    told = config(schedule="curriculum-averaging")
    assert str(told.choice("averaging")) == "lawa:weights=ema"
    assert registry.build("averaging", told.choice("averaging")).config.window == 0.05
    assert str(config(schedule="curriculum-averaging", averaging="none").choice("averaging")) == "none"
    assert str(config().choice("averaging")) == "none"
