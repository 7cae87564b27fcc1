"""sortednet and poa: sub-models against separately built ones, gradients in expectation, averages, draws."""

from __future__ import annotations

import copy
import dataclasses
from random import Random
from typing import Any

import pytest
import torch

from modicum.core import registry
from modicum.core.errors import UserError
from modicum.data.stream import Batch
from modicum.model import submodel
from modicum.model.config import llama_like
from modicum.model.decoder import Decoder
from modicum.model.folder import load_model, save_model
from modicum.model.submodel import Submodel
from modicum.serve.config import EngineConfig
from modicum.serve.engine import Engine
from modicum.serve.request import SamplingParams
from modicum.train.distillers import poa
from modicum.train.objectives import Step

V = 61
TOKENS = torch.randint(1, V, (3, 17), generator=torch.Generator().manual_seed(1))


def decoder(**more: Any) -> Decoder:
    shape = llama_like(V, 32, 4, 4, kv_heads=2, mlp_width=48, context_length=64, **more)
    model = Decoder(shape, torch.Generator().manual_seed(0)).double()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 1:
                p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    return model


def batch() -> Batch:
    targets = TOKENS[:, 1:].clone()
    targets[0, :4] = -100
    zeros = torch.zeros(3, 16, dtype=torch.int64)
    return Batch(TOKENS[:, :-1].contiguous(), targets, zeros, torch.arange(16).expand(3, 16).contiguous())


def by_hand(model: Any, layers: list[int], groups: int, channels: int) -> Decoder:
    """A decoder built separately, its weights copied row by row."""
    shape = dataclasses.replace(
        model.config, layers=len(layers), heads=2 * groups, kv_heads=groups, mlp_width=channels, overrides=()
    )
    made: Any = Decoder(shape).double()
    with torch.no_grad():
        made.embed.weight.copy_(model.embed.weight)
        made.norm.weight.copy_(model.norm.weight)
        for new, i in zip(made.layers, layers, strict=True):
            old = model.layers[i]
            for norm in ("attention_norm", "mlp_norm"):
                getattr(new, norm).weight.copy_(getattr(old, norm).weight)
            for h in range(2 * groups):
                new.attention.q.weight[h * 8 : h * 8 + 8] = old.attention.q.weight[h * 8 : h * 8 + 8]
                new.attention.o.weight[:, h * 8 : h * 8 + 8] = old.attention.o.weight[:, h * 8 : h * 8 + 8]
            for part in "kv":
                getattr(new.attention, part).weight.copy_(getattr(old.attention, part).weight[: groups * 8])
            for c in range(channels):
                new.mlp.gate.weight[c], new.mlp.up.weight[c] = old.mlp.gate.weight[c], old.mlp.up.weight[c]
                new.mlp.down.weight[:, c] = old.mlp.down.weight[:, c]
    return made


@pytest.mark.parametrize(("layers", "groups", "mlp"), [([0, 1], 1.0, 1.0), ([0, 2, 3], 0.5, 0.5), ([0], 1.0, 0.25)])
def test_a_sub_model_is_a_separately_built_one(layers: list[int], groups: float, mlp: float) -> None:
    model = decoder()
    sub = Submodel.of(model.config, layers, groups, mlp)
    want = by_hand(model, layers, round(2 * groups), round(48 * mlp))
    with torch.no_grad():
        torch.testing.assert_close(model.head(submodel.hidden(model, sub, TOKENS)), want(TOKENS))
        torch.testing.assert_close(submodel.cut(model, sub)(TOKENS), want(TOKENS))
    loss = model.head(submodel.hidden(model, sub, TOKENS)).square().mean()
    loss.backward()
    want(TOKENS).square().mean().backward()
    gradient = model.layers[layers[-1]].mlp.down.weight.grad
    channels = round(48 * mlp)
    torch.testing.assert_close(gradient[:, :channels], want.layers[-1].mlp.down.weight.grad)
    assert channels == 48 or not gradient[:, channels:].any()


def test_a_cut_model_is_stored_and_served(tmp_path) -> None:
    model = decoder().float()
    small = submodel.cut(model, Submodel.of(model.config, [0, 1, 2], 0.5, 0.5))
    save_model(small, tmp_path / "small")
    assert small.config.family == "llama"
    engine = Engine(load_model(tmp_path / "small"), None, EngineConfig(cache="200tok"))
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    (output,) = engine.generate([TOKENS[0].tolist()], params)
    greedy = TOKENS[0].tolist()
    with torch.no_grad():
        for _ in range(6):
            greedy.append(int(small(torch.tensor([greedy]))[0, -1].argmax()))
    assert list(output.tokens) == greedy[17:]


def test_sorting_changes_no_output_and_puts_what_matters_first() -> None:
    model = decoder(qkv_bias=True)
    with torch.no_grad():
        for layer in model.layers:
            layer.attention.k.bias.normal_(generator=torch.Generator().manual_seed(3))
            layer.mlp.down.weight[:, 5] *= 50
            layer.attention.o.weight[:, 16:] *= 50  # the query heads of the second group
        before = model(TOKENS)
        second = model.layers[1].attention.v.weight[8:].clone()
        submodel.sort_by_importance(model)
        torch.testing.assert_close(model(TOKENS), before)
        norms = model.layers[0].mlp.down.weight.norm(dim=0)
        assert int(norms.argmax()) == 0
        assert torch.equal(model.layers[1].attention.v.weight[:8], second)


def test_the_expected_gradient_is_the_mean_over_the_list() -> None:
    """Of all micro-batches' draws together, each sub-model weighs alike."""
    objective: Any = registry.build("objective", "sortednet:depths=[0.5,1.0],mlp=[0.5,1.0],sort=false,draws=400")
    model = decoder()
    loss = objective.loss(model, batch(), Step(seed=3))
    loss.total.backward()
    got = model.layers[0].mlp.up.weight.grad.clone()
    model.zero_grad()
    from modicum.train.loss import cross_entropy

    b = batch()
    subs = [Submodel.of(model.config, range(n), 1.0, m) for n in (2, 4) for m in (0.5, 1.0)]
    for sub in subs:
        small = submodel.cut(model, sub)
        total, _ = cross_entropy(small.hidden(b.tokens_BT, positions_BT=b.positions_BT), b.targets_BT, small.head)
        total.backward()
        width = len(small.layers[0].mlp.up.weight)
        grad = model.layers[0].mlp.up.weight.grad
        if grad is None:
            grad = model.layers[0].mlp.up.weight.grad = torch.zeros_like(model.layers[0].mlp.up.weight)
        grad[:width] += small.layers[0].mlp.up.weight.grad / len(subs)
    want = model.layers[0].mlp.up.weight.grad
    assert float((got - want).norm() / want.norm()) < 0.15


def test_always_the_whole_model_is_plain_training() -> None:
    model, plain = decoder().float(), decoder().float()
    sorted_net: Any = registry.build("objective", "sortednet:depths=[1.0],mlp=[1.0]")
    next_token: Any = registry.build("objective", "next-token")
    for m, objective in ((model, sorted_net), (plain, next_token)):
        objective.loss(m, batch(), Step()).total.backward()
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


def test_the_step_decides_the_draw() -> None:
    objective: Any = registry.build("objective", "sortednet:sort=false")
    model = decoder()
    losses = [float(objective.loss(model, batch(), Step(index=i)).total.detach()) for i in range(12)]
    again = [float(objective.loss(model, batch(), Step(index=i)).total.detach()) for i in range(12)]
    assert losses == again and len(set(losses)) > 3
    with pytest.raises(UserError):
        registry.build("objective", "sortednet:depths=[0.0]")


# poa ------------------------------------------------------------------------------------------------------


def test_elastic_layers_are_evenly_spaced_prefixes() -> None:
    shape = decoder().config
    subs = [poa.draw(shape, poa.Config(), Random(i)) for i in range(60)]
    assert {s.layers for s in subs} == {(0, 2), (0, 1, 2), (0, 1, 2, 3)}
    assert {min(s.channels) for s in subs} <= set(range(24, 49)) and len({s.channels for s in subs}) > 10


def test_the_loss_is_the_sum_of_three_divergences() -> None:
    model, step = decoder(), Step(index=2)
    method: Any = registry.build("distiller", "poa:weight=0.5,whole=0.8")
    model = method.prepare(model, None)
    method.ready(model)
    with torch.no_grad():
        for p in method.teacher.parameters():
            p.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    loss = method.loss(registry.build("objective", "next-token"), model, batch(), step)
    b, small = batch(), submodel.cut(model, method._elastic)
    with torch.no_grad():
        e, s, i = (m(b.tokens_BT).log_softmax(-1) for m in (method.teacher, model, small))
        mask = b.targets_BT != -100

        def kl(p: torch.Tensor, q: torch.Tensor) -> float:
            return float((p.exp() * (p - q)).sum(-1)[mask].sum())

        own = float(-s.gather(-1, b.targets_BT.clamp(min=0)[..., None])[..., 0][mask].sum())
    want = own + 0.5 * (0.8 * kl(e, s) + 0.2 * (kl(e, i) + kl(s, i)))
    assert float(loss.total.detach()) == pytest.approx(want, rel=1e-4)


def test_the_teacher_is_an_exponential_average() -> None:
    model = decoder()
    method: Any = registry.build("distiller", "poa:momentum=0.9")
    method.ready(model)
    before = copy.deepcopy(method.teacher)

    class Trainer:
        pass

    trainer: Any = Trainer()
    trainer.model = model
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)
    method.after_step(trainer)
    for old, new, p in zip(before.parameters(), method.teacher.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(new, 0.9 * old + 0.1 * p)
    assert all(not p.requires_grad for p in method.teacher.parameters())
