"""Surgery in training: sparse pretraining, stacking, gradual pruning, against plain arithmetic."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import nn
from train_toys import LENGTH, VOCAB, config, decoder, losses, stream

from modicum.core.choice import Choice
from modicum.core.errors import UserError
from modicum.core.events import Events
from modicum.model.attach import attach
from modicum.model.config import DecoderConfig, by_layer, llama_like
from modicum.model.decoder import Decoder
from modicum.train.callback import Callback
from modicum.train.config import check_combination
from modicum.train.engine import TrainEngine
from modicum.train.forecast import blank, run_flops, step_cost
from modicum.train.loop import Trainer, train
from modicum.train.parallel import Ranks
from modicum.train.surgery import gstack
from modicum.train.surgery._masks import prunable, smallest
from modicum.train.surgery.average_params import Config as Pruning
from modicum.train.surgery.average_params import window
from modicum.train.surgery.spdf import Config as Sparse


class Watch(Callback):
    """Calls `look(trainer)` after every step."""

    def __init__(self, look):
        self.look = look

    def after_step(self, trainer):
        self.look(trainer)


def _train(surgery, model=None, folder=None, look=None, **knobs):
    model = model or decoder(layers=4)
    parts = {"watch": Watch(look)} if look else None
    events = Events(folder / "events.jsonl") if folder else None
    result = train(model, stream(), config(surgery=surgery, **knobs), folder, parts=parts, label="", events=events)
    return model, result


def _engine(surgery, model=None, **knobs):
    engine = TrainEngine(model or decoder(layers=4), config(surgery=surgery, **knobs))
    engine.build()
    engine.surgery.start(engine)
    return engine


# sparse pretraining ------------------------------------------------------------------------------------------


def test_spdf_is_masked_adamw_written_out():
    """Four steps: the same masks multiplied into weights and gradients, torch's AdamW, nothing else."""
    model, reference, data = decoder(layers=2), decoder(layers=2), stream()
    trainer = Trainer(
        model,
        stream(),
        config(steps=4, dtype="float32", clip=0.5, schedule="constant:warmup=0", surgery="spdf:sparsity=0.6"),
        None,
    )
    trainer.open()
    keep = {name: (~cut).double() for name, cut in trainer.surgery.cut.items()}
    reference.double()
    named = dict(reference.named_parameters())
    assert keep.keys() == {n for n, p in named.items() if p.ndim == 2 and "layers" in n}
    for name, mask in keep.items():
        assert mask.numel() - mask.sum() == round(0.6 * mask.numel())  # the same share of every layer
        named[name].data *= mask
    decay = [p for n, p in named.items() if p.ndim > 1 and "embed" not in n]
    rest = [p for n, p in named.items() if p.ndim < 2 or "embed" in n]
    inner = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}], lr=5e-3, betas=(0.9, 0.95)
    )
    for _ in range(4):
        trainer.step()
        batch = data.next_batch(8)
        logits = reference(batch.tokens_BT, positions_BT=batch.positions_BT, documents_BT=batch.documents_BT)
        nn.functional.cross_entropy(logits.flatten(0, 1), batch.targets_BT.flatten()).backward()
        for name, mask in keep.items():
            named[name].grad *= mask
        nn.utils.clip_grad_norm_(reference.parameters(), 0.5)
        inner.step()
        inner.zero_grad()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach().double(), named[name].detach(), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(("dtype", "optimizer"), [("float32", "adamw"), ("bfloat16", "adamw:weight_decay=0.5")])
def test_removed_weights_stay_exactly_zero_and_gather_no_moments(dtype, optimizer):
    def look(trainer):
        for name, cut in trainer.surgery.cut.items():
            assert not trainer.named[name][cut].any() and not dict(trainer.model.named_parameters())[name][cut].any()
            state = trainer.optimizer.state[name]
            assert not state["exp_avg"][cut].any() and not state["exp_avg_sq"][cut].any()
            assert state["exp_avg"][~cut].any()

    _train("spdf:sparsity=0.5", look=look, dtype=dtype, optimizer=optimizer, steps=6)


def test_masks_hold_against_an_optimizer_that_moves_everything():
    """Zero gradients are no zero updates everywhere: sign steps with noise, say."""
    engine = _engine("spdf:sparsity=0.5", dtype="bfloat16")
    for p in engine.named.values():
        p.data += 1.0
    engine.surgery.after_step(engine)
    for name, cut in engine.surgery.cut.items():
        weight = dict(engine.model.named_parameters())[name]
        assert (weight == 0).equal(cut) and (engine.named[name] == 0).equal(cut)


def test_in_the_dense_phase_the_zeros_learn():
    zeros = []

    def look(trainer):
        weights = [p for n, p in trainer.model.named_parameters() if n in trainer.surgery.sizes]
        zeros.append(sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights))

    _, result = _train("spdf:sparsity=0.75,dense=0.5", look=look, steps=8, dtype="float32")
    assert all(z == pytest.approx(0.75, abs=1e-3) for z in zeros[:4]) and all(z < 0.01 for z in zeros[4:])
    whole, cut = decoder(layers=4).config.parameters(), round(0.75 * 65536)
    assert result.average_parameters == pytest.approx(whole - cut / 2, rel=1e-3)


def test_flops_of_gpt3_xl_at_three_quarters_fall_two_and_a_half_times():
    """The abstract's figure. They count attention scores in full, where `flops_per_token` halves them as causal."""
    shape = DecoderConfig(
        family="gpt2",
        vocab_size=50257,
        width=2048,
        layers=24,
        heads=16,
        kv_heads=16,
        head_dim=128,
        mlp_width=8192,
        context_length=2048,
        gated=False,
        position="learned",
        tied=True,
    )
    inside = sum(layer.matmul_weights(shape.width) for layer in shape.per_layer)
    scores = 2 * shape.layers * shape.heads * shape.head_dim * 2049  # what counting in full adds
    dense = shape.flops_per_token(2048)
    assert (dense + scores) / (dense + scores - 2 * 0.75 * inside) == pytest.approx(2.5, rel=0.03)


def test_flops_count_what_is_multiplied():
    engine = _engine("spdf:sparsity=0.5", steps=4)
    by_hand = 3 * LENGTH * (engine.model.config.flops_per_token(LENGTH) - 2 * 0.5 * 65536)
    assert engine.surgery.flops(engine, 0) == pytest.approx(by_hand)
    _, result = _train("spdf:sparsity=0.5", steps=4)
    assert result.flops == pytest.approx(4 * 8 * by_hand)


# gradual pruning ---------------------------------------------------------------------------------------------


def test_the_threshold_is_the_sorted_one():
    generator = torch.Generator().manual_seed(1)
    weights = {n: torch.randn(7, 11, generator=generator) * s for n, s in (("a", 1.0), ("b", 1e-3), ("c", 30.0))}
    flat = torch.cat([w.flatten() for w in weights.values()]).abs()
    for count in (1, 40, 115, 231):
        cut = smallest(weights, count, Ranks())
        limit = flat.sort().values[count - 1]
        assert sum(int(c.sum()) for c in cut.values()) == count
        assert all(torch.equal(cut[n], w.abs() <= limit) for n, w in weights.items())


def test_pruning_follows_the_schedule_by_magnitude():
    """Densities step by step, and every round removes the smallest of what the step left, for good."""
    seen = []

    def look(trainer):
        cut = {n: c.clone() for n, c in trainer.surgery.cut.items()}
        weights = {n: trainer.named[n].detach().clone() for n in trainer.surgery.sizes}
        seen.append((cut, weights))

    _, result = _train("average-params:sparsity=0.75,every=2", look=look, steps=30, dtype="float32")
    share = 6 * LENGTH * 65536 / (result_row := 3 * LENGTH * decoder(layers=4).config.flops_per_token(LENGTH))
    first, last = window(Pruning(sparsity=0.75), 30, share)
    rounds = (last - first) // 2 + 1
    densities = []
    for step, (cut, weights) in enumerate(seen, 1):
        done = 0 if step < first else min((step - first) // 2 + 1, rounds)
        wanted = 0.25 ** (done / rounds)
        densities.append(wanted)
        removed = sum(int(c.sum()) for c in cut.values())
        assert removed == 65536 - round(65536 * wanted), step
        if cut:
            kept = torch.cat([w[~cut[n]].abs().flatten() for n, w in weights.items()])
            assert kept.min() > 0 and not any(w[cut[n]].any() for n, w in weights.items())
    for (before, _), (after, _) in pairwise(seen):
        assert all((before[n] & ~after[n]).sum() == 0 for n in before)
    assert rounds > 4 and densities[0] == 1 and densities[-1] == pytest.approx(0.25)
    averaged = [1.0, *densities[:-1]]  # the density that each step was made at
    whole = decoder(layers=4).config.parameters()
    assert result.average_parameters == pytest.approx(whole - 65536 * (1 - sum(averaged) / 30), rel=1e-4)
    assert result.flops == pytest.approx(8 * sum(result_row - 6 * LENGTH * 65536 * (1 - d) for d in averaged), rel=1e-3)


@pytest.mark.parametrize("sparsity", [0.25, 0.5, 0.8])
def test_pruning_begins_at_a_quarter_and_ends_at_three_quarters_of_the_compute(sparsity):
    steps, share = 4000, 0.8
    first, last = window(Pruning(sparsity=sparsity), steps, share)
    kept = 1 - sparsity
    shares = [min(max((t - first) / (last - first), 0.0), 1.0) for t in range(steps)]
    density = [kept**done for done in shares]
    spent = [0.0]
    for d in density:
        spent.append(spent[-1] + 1 - share * (1 - d))
    assert spent[first] / spent[-1] == pytest.approx(0.25, abs=2e-3)
    assert spent[last] / spent[-1] == pytest.approx(0.75, abs=2e-3)
    assert first < steps / 4 < steps * 3 / 4 > last  # sparse steps are cheaper, so there are more of them


# stacking ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parameters", "tokens", "wanted"),
    [(8e9, 15e12, 6.58e9), (7e9, 2e12, 11.11e9), (13e9, 2e12, 15.84e9), (70e9, 2e12, 42.48e9)],
)
def test_growth_timing_is_the_published_table(parameters, tokens, wanted):
    assert gstack.timing(parameters, tokens) == pytest.approx(wanted, rel=2e-3)


@pytest.mark.parametrize(("dtype", "moments"), [("float32", True), ("bfloat16", True), ("float32", False)])
def test_at_growth_weights_and_moments_are_stacked(dtype, moments):
    """What the deep model begins with, against the shallow model's tensors of that moment."""
    trainer = Trainer(
        decoder(layers=6),
        stream(),
        config(steps=8, dtype=dtype, surgery=(f"gstack:growth=3,grow=0.5,moments={str(moments).lower()}")),
        None,
    )
    given = trainer.model
    trainer.open()
    assert len(trainer.model.layers) == 2 and trainer.model is not given
    for a, b in zip(trainer.model.layers, given.layers[:2], strict=True):
        assert torch.equal(a.mlp.up.weight, b.mlp.up.weight.to(a.mlp.up.weight.dtype))  # the given model's first layers
    assert trainer.model.lm_head.weight is trainer.model.embed.weight
    for _ in range(3):
        trainer.step()
    batch = trainer.stream.next_batch(8)
    grown = trainer.surgery.after_step
    trainer.surgery.after_step = lambda trainer: None  # stop between the update and the growth
    trainer.step()
    weights = {n: p.detach().clone() for n, p in trainer.named.items()}
    state = {k: v.clone() for k, v in trainer.optimizer.state_dict().items()}
    small = trainer.model
    grown(trainer)
    assert trainer.model is given and len(given.layers) == 6 and given.training
    for name, p in trainer.named.items():
        source = name
        if name.startswith("layers."):
            _, i, rest = name.split(".", 2)
            source = f"layers.{int(i) % 2}.{rest}"
        assert torch.equal(p, weights[source]), name
        assert torch.equal(dict(given.named_parameters())[name], p.to(getattr(torch, dtype)))
        for field in ("exp_avg", "exp_avg_sq", "step") if moments else ():
            assert torch.equal(trainer.optimizer.state[name][field], state[f"{source}:{field}"]), name
    held = [t.untyped_storage().data_ptr() for t in trainer.optimizer.state_dict().values()]
    assert len(set(held)) == len(held) and (moments or not held)
    with torch.no_grad():  # and the grown model is the shallow one run three times over between its two ends
        x, positions = small.embed(batch.tokens_BT), torch.arange(LENGTH)[None]
        from modicum.model.attend import DenseAttend

        rotation = small.ropes()[0][0](positions, x.dtype)
        for _ in range(3):
            for layer in small.layers:
                x = layer(x, rotation, DenseAttend(None, None))
        torch.testing.assert_close(given.hidden(batch.tokens_BT), small.norm(x))


def test_the_schedule_begins_anew():
    rates = {}

    def look(trainer):
        middle = trainer.tokens - trainer.config.step_tokens / 2
        rates[trainer.steps_done] = trainer.surgery.position(middle, trainer.config.total_tokens)

    _train("gstack:grow=0.25", look=look, steps=8)
    tokens = 8 * LENGTH
    assert rates[1] == (0.5 * tokens, 8 * tokens) and rates[8] == (5.5 * tokens, 6 * tokens)


def test_flops_of_both_phases_are_counted():
    shapes = [decoder(layers=n).config for n in (1, 4)]
    _, result = _train("gstack:grow=0.5", steps=8)
    assert result.flops == 8 * 4 * 3 * LENGTH * sum(s.flops_per_token(LENGTH) for s in shapes)
    assert result.flops == run_flops(decoder(layers=4), config(steps=8, surgery="gstack:grow=0.5"))
    assert result.average_parameters == sum(s.parameters() for s in shapes) / 2


def test_the_planned_step_is_the_mean_of_two_phases():
    shape = decoder(layers=4).config
    told = step_cost(lambda: blank(shape), config(steps=8, surgery="gstack:grow=0.5"), VOCAB)
    deep = step_cost(lambda: blank(shape), config(steps=8), VOCAB)
    flops = [3 * LENGTH * 8 * decoder(layers=n).config.flops_per_token(LENGTH) for n in (1, 4)]
    assert told.flops / deep.flops == pytest.approx(sum(flops) / 2 / flops[1], rel=0.02)
    assert deep.peak_bytes <= told.peak_bytes < 1.15 * deep.peak_bytes


def test_a_planner_walks_through_the_phases():
    """Seconds and FLOPs of a whole run, from steps of the shallow and of the deep model."""
    from types import SimpleNamespace

    from modicum.pipeline.costs import training_cost
    from modicum.train.pretrain import step_seconds

    asked = SimpleNamespace(
        once=lambda key, measure: measure(),
        once_here=lambda key, measure: measure(),
    )
    told = config(steps=40, surgery="gstack:grow=0.5", dtype="float32")
    cost = training_cost(asked, decoder(layers=4).config, told, evaluations=0)
    assert cost.flops == pytest.approx(run_flops(decoder(layers=4), told), rel=0.1)
    seen = []

    class Seen(Decoder):
        def hidden(self, *args, **more):
            seen.append(len(self.layers))
            return super().hidden(*args, **more)

    model = Seen(decoder(layers=4).config)
    assert step_seconds(model, stream(), told, 0.0) > 0 and seen == sorted(seen) and set(seen) == {1, 4}


# what is refused ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "choice",
    [
        "spdf:sparsity=0",
        "spdf:sparsity=1",
        "average-params:sparsity=0",
        "average-params:sparsity=1",
        "spdf:dense=1",
        "gstack:growth=1",
        "gstack:grow=0",
        "average-params:start=0.8",
        "average-params:every=0",
    ],
)
def test_impossible_knobs_are_refused(choice):
    with pytest.raises(UserError, match=r"must|between"):
        Choice.parse("surgery", choice).config()


def test_what_cannot_be_stacked_is_refused():
    with pytest.raises(UserError, match=r"growth=4 does not divide the model's 6 layers; .* or growth=2"):
        _train("gstack", decoder(layers=6))
    with pytest.raises(UserError, match=r"layer 1 is made otherwise than layer 0"):
        _train("gstack", Decoder(llama_like(VOCAB, 32, 4, overrides=by_layer(window=(8, None, 8, None)))))
    _train("gstack:growth=2", Decoder(llama_like(VOCAB, 32, 4, overrides=by_layer(window=(8, None, 8, None)))), steps=5)
    with pytest.raises(UserError, match=r"would grow after .* give grow= as a share"):
        _train("gstack:grow=1000000")
    with pytest.raises(UserError, match="not of a Linear"):
        _train("gstack", nn.Linear(3, 3))


@pytest.mark.parametrize("key", ["spdf", "gstack", "average-params"])
def test_forms_are_refused(key):
    with pytest.raises(UserError, match=f"surgery '{key}' cannot be combined with linear 'lora'"):
        _train(key, form="lora:rank=2")
    model = decoder(layers=4)
    attach(model, {"layers.*.attention.q": "lora:rank=2"})
    with pytest.raises(UserError, match=f"surgery '{key}' cannot be combined with the model's linear forms"):
        _train(key, model)


@pytest.mark.parametrize("key", ["spdf", "average-params"])
def test_masks_need_the_gradients_of_a_whole_step(key, monkeypatch):
    from modicum.train.optimizers.adamw import AdamW

    monkeypatch.setattr(AdamW, "provides", frozenset())  # as one that updates during the backward pass
    told = config(surgery=key, clip=0, masters=False)
    with pytest.raises(
        UserError, match=f"'adamw' cannot be combined with surgery '{key}', which requires step_gradients"
    ):
        check_combination(told)
    check_combination(config(surgery="gstack", clip=0, masters=False))


def test_a_model_without_layers_cannot_be_pruned():
    with pytest.raises(UserError, match="has no trainable linear layer inside repeated blocks"):
        prunable(nn.Sequential(nn.Linear(3, 3)))


def test_an_optimizer_whose_state_does_not_fit_is_named(monkeypatch):
    from modicum.train.optimizers.adamw import AdamW

    monkeypatch.setattr(AdamW, "load_state_dict", lambda self, state: state["counter"])
    with pytest.raises(UserError, match=r"cannot stack the state of optimizer 'adamw' .* gstack:moments=false"):
        _train("gstack")


def test_config_refuses_by_value_error():
    with pytest.raises(ValueError, match="both excluded"):
        Sparse(sparsity=1.0)
    assert Sparse().sparsity == 0.75 and math.isclose(Pruning().start, 0.25)


# with the rest -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("surgery", ["spdf:dense=0.4", "gstack:grow=0.4", "average-params:every=1"])
def test_a_run_may_be_made_longer_within_its_phase(surgery, tmp_path):
    """Length is free to change: a longer run goes on with what the checkpoint holds."""
    _train(surgery, folder=tmp_path, steps=6, checkpoint_every=3, schedule="constant:warmup=0")
    model, longer = _train(surgery, folder=tmp_path, steps=9, checkpoint_every=3, schedule="constant:warmup=0")
    assert longer.resumed_from == 6 and longer.finished and len(losses(tmp_path / "events.jsonl")) == 9
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_memory_savers_follow_into_the_grown_model():
    seen = []
    plain, _ = _train("gstack:grow=0.5", steps=6, dtype="float32")
    model, _ = _train(
        "gstack:grow=0.5",
        steps=6,
        dtype="float32",
        memory=["recompute"],
        look=lambda t: seen.append((len(t.model.layers), t.model.checkpoint_layers)),
    )
    assert seen == [(1, True)] * 2 + [(4, True)] * 4
    for a, b in zip(plain.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
