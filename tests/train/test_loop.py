"""The loop: accumulation, exact resume, clean stops, what is refused, hooks."""

from __future__ import annotations

import contextlib
import math
import os
import signal

import pytest
import torch
from torch import nn
from train_toys import LENGTH, config, corpus, decoder, losses, stream

from modicum.budget import Deadline
from modicum.core.errors import ModicumError, UserError
from modicum.core.events import Events, read_events
from modicum.data.stream import Stream
from modicum.train.callback import Callback
from modicum.train.config import TrainConfig, check_combination
from modicum.train.evaluate import mean_loss
from modicum.train.loop import Trainer, train
from modicum.train.objectives import Step
from modicum.train.optimizers.adamw import AdamW


def _run(folder, *, model=None, data=None, events="events.jsonl", **knobs):
    more = {k: knobs.pop(k) for k in ("deadline", "heldout", "parts") if k in knobs}
    model = model or decoder()
    result = train(model, data or stream(), config(**knobs), folder, events=Events(folder / events), label="", **more)
    return model, result


class StopAfter(Callback):
    """Raises after a number of steps: as abrupt as Python can be."""

    def __init__(self, steps):
        self.steps = steps

    def after_step(self, trainer):
        if trainer.steps_done == self.steps:
            raise ZeroDivisionError


@pytest.mark.parametrize(("dtype", "masters"), [("float32", True), ("bfloat16", True), ("bfloat16", False)])
def test_it_learns_and_a_finished_run_returns_at_once(tmp_path, dtype, masters):
    model, result = _run(tmp_path, steps=60, dtype=dtype, masters=masters, heldout=stream(epochs=1, order="stored"))
    curve = losses(tmp_path / "events.jsonl")
    assert result.finished and result.steps == 60 == len(curve) and result.tokens == 60 * 8 * LENGTH
    assert curve[1] > 4.0 and result.loss < 3.0 and result.heldout_loss < 2.6
    assert {p.dtype for p in model.parameters()} == {getattr(torch, dtype)}
    assert result.flops == 60 * 8 * LENGTH * 3 * model.config.flops_per_token(LENGTH)
    assert result.peak_bytes > 0 and result.seconds > 0

    again, second = _run(tmp_path, steps=60, dtype=dtype, masters=masters)
    assert second.resumed_from == 60 and (second.loss, second.heldout_loss) == (
        result.loss,
        result.heldout_loss,
    )
    assert len(read_events(tmp_path / "events.jsonl", "train")) == 60
    for a, b in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_that_was_trained_is_trained_again(tmp_path, dtype):
    """Hooks of the first run that stayed on the model would take the second run's gradients."""
    model, first = _run(tmp_path / "a", steps=4, dtype=dtype)
    start = [p.detach().clone() for p in model.parameters()]
    _, second = _run(tmp_path / "b", model=model, steps=4, dtype=dtype, lr=5e-3)
    copy = decoder().to(getattr(torch, dtype))
    for p, q in zip(copy.parameters(), start, strict=True):
        p.data.copy_(q)
    _, fresh = _run(tmp_path / "c", model=copy, steps=4, dtype=dtype, lr=5e-3)
    assert second.loss == fresh.loss < first.loss


@pytest.mark.parametrize("micro", [1, 3, 8])
def test_accumulation_is_exact(micro):
    whole, parts = (Trainer(decoder(), None, config(dtype="float32", micro_batch=m)) for m in (8, micro))
    batch = stream(packing="concat:mask=true" if micro == 3 else "concat").next_batch(8)
    batch.targets_BT[0, :20] = -100  # micro-batches of unequal weight
    sums = []
    for trainer in (whole, parts):
        trainer.bind(trainer.model)
        sums.append(trainer.gradients(batch, batch.n_targets, Step())[0])
    assert sums[0][1] == sums[1][1] == batch.n_targets and torch.allclose(sums[0], sums[1])
    for (name, a), b in zip(whole.named.items(), parts.named.values(), strict=True):
        assert torch.allclose(a.grad, b.grad, atol=1e-6), name


def test_the_update_is_clipped_adamw_on_the_mean_loss(tmp_path):
    """Two steps against the same arithmetic written out with torch alone."""
    model, reference, data = decoder(), decoder(), stream()
    rates = [5e-3 * (i + 0.5) / 2 for i in range(2)]  # constant with a warm-up over the whole run
    inner = torch.optim.AdamW(
        [
            {
                "params": [p for n, p in reference.named_parameters() if p.ndim > 1 and "embed" not in n],
                "weight_decay": 0.1,
            },
            {
                "params": [p for n, p in reference.named_parameters() if p.ndim < 2 or "embed" in n],
                "weight_decay": 0.0,
            },
        ],
        betas=(0.9, 0.95),
    )
    for rate in rates:
        batch = data.next_batch(8)
        logits = reference(batch.tokens_BT, positions_BT=batch.positions_BT, documents_BT=batch.documents_BT)
        nn.functional.cross_entropy(logits.flatten(0, 1), batch.targets_BT.flatten()).backward()
        nn.utils.clip_grad_norm_(reference.parameters(), 0.5)
        for group in inner.param_groups:
            group["lr"] = rate
        inner.step()
        inner.zero_grad()
    _run(
        tmp_path,
        model=model,
        steps=2,
        dtype="float32",
        clip=0.5,
        micro_batch=4,
        schedule="constant:warmup=0.99999999",
    )
    for (name, a), b in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert torch.allclose(a, b, atol=2e-5), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("cut", [1, 5, 7, 11])
def test_resume_is_bit_identical(tmp_path, cut, dtype):
    knobs = {"steps": 12, "dtype": dtype, "eval_every": 4, "micro_batch": 4}
    straight, _ = _run(tmp_path / "a", heldout=stream(epochs=1), **knobs)
    with pytest.raises(ZeroDivisionError):
        _run(tmp_path / "b", parts={"bomb": StopAfter(cut)}, heldout=stream(epochs=1), **knobs)
    resumed, result = _run(tmp_path / "b", heldout=stream(epochs=1), **knobs)
    assert result.resumed_from == (cut - 1) // 5 * 5 or (result.resumed_from is None and cut <= 5)
    assert losses(tmp_path / "a" / "events.jsonl") == losses(tmp_path / "b" / "events.jsonl")
    for a, b in zip(straight.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_new_mixture_repeats_and_loses_nothing(tmp_path):
    """Half the run on one mixture, half on another: the domains' documents go on where they were."""
    _run(tmp_path, steps=5, data=stream("fixed:weights={prose: 3, code: 1}"), schedule="constant")
    second = stream("fixed:weights={prose: 1, code: 3}")
    _, result = _run(tmp_path, steps=10, data=second, schedule="constant")
    assert result.resumed_from == 5
    seen = second.state()["domains"]
    alone = {name: stream(f"fixed:weights={{{name}: 1}}") for name in seen}
    for name, one in alone.items():  # what each domain gave is the beginning of its own order
        while one.state()["domains"][name]["drawn"] < seen[name]["drawn"]:
            one.next_batch(1)
        assert abs(one.state()["domains"][name]["tokens"] - seen[name]["tokens"]) <= 60 + LENGTH
    assert seen["prose"]["tokens"] + seen["code"]["tokens"] == 10 * 8 * LENGTH


def test_a_budget_may_grow(tmp_path):
    _run(tmp_path, steps=6, schedule="constant:warmup=64")
    _, longer = _run(tmp_path, steps=12, schedule="constant:warmup=64", checkpoint_every=3)
    _run(tmp_path / "whole", steps=12, schedule="constant:warmup=64")
    assert longer.resumed_from == 6 and longer.steps == 12
    assert losses(tmp_path / "events.jsonl") == losses(tmp_path / "whole" / "events.jsonl")


@pytest.mark.parametrize(
    ("knobs", "named"),
    [
        ({"lr": 1e-2}, "lr was 0.005 and is now 0.01"),
        ({"optimizer": "adamw:beta1=0.8"}, "optimizer.beta1 was 0.9"),
        ({"schedule": "wsd"}, "schedule.method was 'cosine'"),
        ({"batch_sequences": 4}, "batch_sequences was 8"),
    ],
)
def test_other_knobs_are_refused_by_name(tmp_path, knobs, named):
    _run(tmp_path, steps=5)
    with pytest.raises(UserError, match=named):
        _run(tmp_path, **{"steps": 10} | knobs)


def test_another_model_is_refused(tmp_path):
    _run(tmp_path, steps=5)
    with pytest.raises(UserError, match=r"another model: .* is \(64, 32\) there and \(64, 64\) here"):
        _run(tmp_path, steps=10, model=decoder(width=64))
    with pytest.raises(UserError, match=r"another model: layers.1\S+ is \(\d+, \d+\) there and absent here"):
        _run(tmp_path, steps=10, model=decoder(layers=1))


class Poison(Callback):
    """Makes a weight infinite before the gradients of one step."""

    conflicts = frozenset()

    def __init__(self, step):
        self.step = step

    @contextlib.contextmanager
    def around(self, trainer):
        weight = trainer.model.norm.weight
        kept = weight.detach().clone()
        if trainer.steps_done == self.step:
            weight.data.fill_(math.inf)
        yield
        weight.data.copy_(kept)


def test_a_loss_that_is_not_finite_stops_and_names_the_step(tmp_path):
    with pytest.raises(ModicumError, match=r"loss nan, .* at step 8 .*step-00000005; lower lr"):
        _run(tmp_path, parts={"poison": Poison(7)})
    assert read_events(tmp_path / "events.jsonl", "nonfinite")[0]["step"] == 8
    _, result = _run(tmp_path, parts={"poison": Poison(99)})  # and the run can go on from before it
    assert result.resumed_from == 5 and result.finished


def test_a_loss_that_is_not_finite_may_be_skipped(tmp_path):
    model, result = _run(tmp_path, parts={"poison": Poison(7)}, nonfinite="skip")
    assert result.finished and result.skipped == 1 and math.isfinite(result.loss)
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_the_deadline_keeps_the_work(tmp_path):
    class Late(Callback):
        def after_step(self, trainer):
            if trainer.steps_done == 7:
                trainer.deadline = Deadline(0)

    _, result = _run(tmp_path, parts={"late": Late()})
    assert (result.stopped, result.steps, result.finished) == ("deadline", 7, False)
    assert result.checkpoint.endswith("step-00000007")
    _, rest = _run(tmp_path)
    assert rest.resumed_from == 7 and rest.finished
    _run(tmp_path / "whole")
    assert losses(tmp_path / "events.jsonl") == losses(tmp_path / "whole" / "events.jsonl")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_stop_at_the_next_step(tmp_path, capsys, number):
    class Ring(Callback):
        def after_step(self, trainer):
            if trainer.steps_done == 3:
                os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt):
        _run(tmp_path, parts={"ring": Ring()})
    assert signal.getsignal(number) is before
    assert f"stopped by {number.name} after step 3 of 12" in capsys.readouterr().err
    assert read_events(tmp_path / "events.jsonl", "stopped")[0]["step"] == 3
    _, rest = _run(tmp_path)
    assert rest.resumed_from == 3 and rest.finished


def test_the_end_of_the_data_keeps_the_work(tmp_path):
    with pytest.raises(UserError, match="data ended"):
        _run(tmp_path, steps=1000, data=stream(epochs=1))
    done = read_events(tmp_path / "events.jsonl", "checkpoint")[-1]["step"]
    assert done == Stream(corpus(), sequence_length=LENGTH, epochs=1).epoch_tokens // (8 * LENGTH)
    _, result = _run(tmp_path, steps=done + 2, data=stream(epochs=2))
    assert result.resumed_from == done and result.finished


class Grow(Callback):
    """Doubles the layers at a step, copying optimizer state: what a surgery needs of the loop."""

    def __init__(self, at):
        self.at, self.grown = at, False

    def state_dict(self):
        return {"grown": self.grown}

    def prepare(self, model, state):
        self.grown = bool(state and state["grown"])
        return decoder(layers=4) if self.grown else model

    def after_step(self, trainer):
        if trainer.steps_done != self.at or self.grown:
            return
        self.grown = True
        state, small = trainer.optimizer.state_dict(), dict(trainer.named)
        trainer.replace(
            decoder(layers=4),
            {
                key.replace("layers.", f"layers.{up}", 1) if up else key: value.clone()
                for key, value in state.items()
                for up in ([""] if "layers." not in key else ["", "1"])
                if up == ""
            },
        )
        with torch.no_grad():
            for name, value in small.items():
                trainer.named[name].copy_(value)
        trainer.write_back()


def test_a_part_may_replace_the_model_and_resume_with_it(tmp_path):
    _, straight = _run(tmp_path / "a", parts={"grow": Grow(3)})
    with pytest.raises(ZeroDivisionError):
        _run(tmp_path / "b", parts={"grow": Grow(3), "bomb": StopAfter(7)})
    _, resumed = _run(tmp_path / "b", parts={"grow": Grow(3)})
    assert resumed.resumed_from == 5 and resumed.flops == straight.flops
    assert losses(tmp_path / "a" / "events.jsonl") == losses(tmp_path / "b" / "events.jsonl")


class Layerwise(AdamW):
    """Stands for a method that updates during the backward pass."""

    provides = frozenset()
    conflicts = frozenset({"fsdp"})


def test_combinations_that_cannot_work_are_refused(monkeypatch):
    from modicum.core import registry

    loaded = registry.load("optimizer", "adamw")
    monkeypatch.setattr(
        registry,
        "load",
        lambda port, key: (
            loaded.__class__(loaded.info, Layerwise, loaded.config, loaded.module)
            if port == "optimizer"
            else original(port, key)
        ),
    )
    for knobs, named in (
        ({}, "clip=1.0"),
        ({"clip": 0.0}, "masters"),
        ({"clip": 0.0, "masters": False, "micro_batch": 2}, "accumulation"),
    ):
        with pytest.raises(UserError, match=f"optimizer 'adamw' cannot be combined with .*{named}"):
            check_combination(config(**knobs))
    with pytest.raises(UserError, match=r"optimizer 'adamw' cannot be combined with 2 processes"):
        check_combination(config(clip=0.0, masters=False), world=2)
    check_combination(config(clip=0.0, masters=False))


from modicum.core.registry import load as original  # noqa: E402


@pytest.mark.parametrize(
    ("knobs", "told"),
    [
        ({"steps": 3, "tokens": 100}, "length of the run once"),
        ({}, "length of the run once"),
        ({"steps": 3, "batch_tokens": 100, "batch_sequences": 3}, "batch once"),
        ({"steps": 3, "batch_tokens": 100}, "less than one sequence of 512"),
        ({"tokens": 1000}, "less than one step of 15872"),
        ({"steps": 3, "lr": 0.0}, "lr=0.0 must be a number above 0"),
        ({"steps": 3, "clip": -1.0}, "clip=-1.0"),
        ({"steps": 3, "dtype": "bfloat"}, "Did you mean 'bfloat16'"),
        ({"steps": 3, "optimizer": "adam"}, "Did you mean 'adamw'"),
        ({"steps": 3, "nonfinite": "ignore"}, "unknown nonfinite"),
        ({"steps": 2.5}, "steps=2.5 must be a whole number"),
        ({"tokens": "2GiB"}, "not a number of tokens"),
        ({"steps": 3, "micro_batch": 0}, "micro_batch=0"),
    ],
)
def test_wrong_knobs_are_refused(knobs, told):
    with pytest.raises(UserError, match=told):
        TrainConfig(**knobs)


def test_quantities():
    made = TrainConfig(tokens="2Mtok", batch_tokens="16ktok", sequence_length=512)
    assert (made.sequences, made.step_tokens, made.total_steps, made.total_tokens) == (
        31,
        15872,
        126,
        126 * 15872,
    )


def test_a_device_that_is_not_there():
    with pytest.raises(UserError, match=r"device 'cuda:0'|not known"):
        train(decoder(), stream(), config(device="cuda:0" if not torch.cuda.is_available() else "gpu"), None)


def test_mean_loss_is_the_mean_over_targets_and_leaves_the_stream_alone():
    model, data = decoder(), stream(epochs=1)
    data.next_batch(3)
    place = data.state()
    told = mean_loss(model, data, rows=5, sequences=12)
    assert data.state() == place and not any(p.grad is not None for p in model.parameters()) and model.training
    batch = data.next_batch(12)
    logits = model(batch.tokens_BT, positions_BT=batch.positions_BT, documents_BT=batch.documents_BT).double()
    assert told == pytest.approx(
        nn.functional.cross_entropy(logits.flatten(0, 1), batch.targets_BT.flatten()).item(), abs=1e-6
    )


def test_frozen_weights_are_neither_trained_nor_stored(tmp_path):
    from modicum.model.attach import attach

    model = decoder()
    attach(model, {"layers.*.attention.q": "lora:rank=2"})
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert frozen and trainable
    _, result = _run(tmp_path, model=model, dtype="float32")
    for name, p in model.named_parameters():
        if name in frozen:
            assert torch.equal(p, frozen[name])
    from safetensors import safe_open

    with safe_open(f"{result.checkpoint}/model.safetensors", "pt") as file:
        assert trainable <= set(file.keys()) and not set(file.keys()) & frozen.keys()


def test_forecast_of_a_training_step_is_near_the_real_peak():
    from modicum.train.forecast import blank, step_cost

    knobs, model = config(dtype="bfloat16", micro_batch=4), decoder(width=64)
    told = step_cost(lambda: blank(model.config), knobs, 64)
    per_step = 3 * model.config.flops_per_token(LENGTH) * knobs.step_tokens
    assert 0.8 < told.flops / per_step < 1.2
    state = 16 * model.config.parameters()  # masters, their gradients, two moments
    assert state < told.peak_bytes < state + 40e6
