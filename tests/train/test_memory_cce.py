"""Cut cross-entropy against the naive loss in float64: gradients, filtering, sorting, kernels, heads."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from train_toys import VOCAB, config, decoder, stream

from modicum.core.errors import UserError
from modicum.model import attach
from modicum.train import loss as losses
from modicum.train.loop import train
from modicum.train.memory import cce
from modicum.train.memory.cce import Classifier, Config, linear_cross_entropy

SMALL = {"rows": 7, "block": 11}  # neither divides the case's sizes


def _case(vocabulary: int = 50, dtype: torch.dtype = torch.float64, sharp: float = 1.0):
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(3, 10, 16, generator=generator, dtype=torch.float64)
    weight = sharp * torch.randn(vocabulary, 16, generator=generator, dtype=torch.float64)
    bias = torch.randn(vocabulary, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, vocabulary, (3, 10), generator=generator)
    targets[0, 3:7] = -100
    targets[2, -1] = -100
    return h.to(dtype), weight.to(dtype), bias.to(dtype), targets


def _naive(h: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, cap: float | None):
    """Loss and gradients from whole logits, in float64."""
    leaves = [x.double().clone().requires_grad_() for x in (h, weight, *([] if bias is None else [bias]))]
    logits = F.linear(*leaves)
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    total = F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="sum", ignore_index=-100)
    return total.detach(), torch.autograd.grad(3.0 * total, leaves)


def _cut(h: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, cap: float | None, knobs: Config):
    leaves = [x.clone().requires_grad_() for x in (h, weight, *([] if bias is None else [bias]))]
    head = Classifier(leaves[1], None if bias is None else leaves[2], cap)
    total, count = linear_cross_entropy(leaves[0], head, targets, knobs)
    assert count == (targets != -100).sum()
    return total.detach(), torch.autograd.grad(3.0 * total, leaves)


@pytest.mark.parametrize("cap", [None, 3.0])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(
    "knobs",
    [
        Config(eps=0, **SMALL),
        Config(eps=0),
        Config(eps=1e-30, **SMALL),
        Config(eps=1e-30, sort=False, **SMALL),
    ],
)
def test_gradients_are_the_naive_ones(cap, with_bias, knobs) -> None:
    h, weight, bias, targets = _case()
    given = (h, weight, bias if with_bias else None, targets, cap)
    (loss, grads), (wanted, exact) = _cut(*given, knobs), _naive(*given)
    assert abs(loss - wanted) < 1e-10 * wanted
    for ours, theirs in zip(grads, exact, strict=True):
        assert (ours - theirs).abs().max() < 1e-6


def _by_hand(h: Tensor, weight: Tensor, targets: Tensor, knobs: Config) -> tuple[Tensor, Tensor, float]:
    """The rule itself on whole matrices: sort, cut into tiles, drop those below eps; and the share dropped.

    A tile is judged by the largest logit of each column beside the smallest normaliser of the rows.
    """
    learnt = targets != -100
    h, targets = h[learnt], targets[learnt]
    logits = h @ weight.T
    lse = logits.logsumexp(1)
    order = logits.mean(0).argsort() if knobs.sort else torch.arange(len(weight))
    g = (logits - lse[:, None]).exp()
    g[torch.arange(len(h)), targets] -= 1
    dropped = 0
    for n in range(0, len(h), knobs.rows):
        for v in range(0, len(weight), knobs.block):
            rows, columns = slice(n, n + knobs.rows), order[v : v + knobs.block]
            if bool(torch.isin(targets[rows], columns).any()):
                continue
            if (logits[rows][:, columns].max() - lse[rows].min()).exp() < knobs.eps:
                assert g[rows][:, columns].abs().max() < knobs.eps  # never more than the paper's test drops
                g[n : n + knobs.rows, columns] = 0
                dropped += 1
    tiles = math.ceil(len(h) / knobs.rows) * math.ceil(len(weight) / knobs.block)
    return g @ weight, g.T @ h, dropped / tiles


@pytest.mark.parametrize("sort", [False, True])
def test_tiles_below_eps_are_left_out_and_no_others(sort) -> None:
    h, weight, _, targets = _case(300, sharp=0.6)
    h = 1 + h / 5  # hidden states share a direction, and few entries hold most targets, as in a trained model
    targets[targets > 20] = 7
    knobs = Config(eps=2**-8, sort=sort, rows=9, block=16)
    dh, dw, dropped = _by_hand(h, weight, targets, knobs)
    _, (ours_h, ours_w) = _cut(h, weight, None, targets, None, knobs)
    assert 0 < dropped < 0.95
    assert torch.allclose(ours_h[targets != -100], 3 * dh, atol=1e-9) and torch.allclose(ours_w, 3 * dw, atol=1e-9)
    _, exact = _naive(h, weight, None, targets, None)
    assert not torch.allclose(ours_w, exact[1], atol=1e-6)  # something was lost, and not much:
    assert (ours_w - exact[1]).norm() < 0.02 * exact[1].norm()


def test_sorting_drops_more() -> None:
    generator = torch.Generator().manual_seed(3)
    h = 1 + 0.1 * torch.randn(1, 64, 16, generator=generator, dtype=torch.float64)
    weight = 0.6 * torch.randn(512, 16, generator=generator, dtype=torch.float64)
    targets = torch.zeros(1, 64, dtype=torch.int64)
    shares = [_by_hand(h, weight, targets, Config(eps=2**-12, rows=64, block=16, sort=s))[2] for s in (False, True)]
    assert shares[1] > shares[0] + 0.1


def test_eps_follows_the_dtype() -> None:
    assert torch.finfo(torch.bfloat16).eps / 32 == 2**-12
    h, weight, bias, targets = _case(dtype=torch.bfloat16)
    loss, grads = _cut(h, weight, bias, targets, None, Config(**SMALL))
    wanted, exact = _naive(h, weight, bias, targets, None)
    assert loss.dtype == torch.float32 and abs(loss - wanted) < 0.01 * wanted
    for ours, theirs in zip(grads, exact, strict=True):
        assert ours.dtype == torch.bfloat16 and (ours.double() - theirs).norm() < 0.02 * theirs.norm()


def test_ignored_rows_may_hold_nan_and_others_show_it() -> None:
    h, weight, bias, targets = _case()
    h[targets == -100] = math.nan
    loss, grads = _cut(h, weight, bias, targets, None, Config(**SMALL))
    assert torch.isfinite(loss) and torch.isfinite(grads[1]).all() and torch.isfinite(grads[0][targets != -100]).all()
    h[1, 1] = math.nan
    loss, grads = _cut(h, weight, bias, targets, None, Config(eps=0.5, **SMALL))
    assert torch.isnan(loss) and torch.isnan(grads[1]).any()


def test_no_target_at_all_gives_zeros() -> None:
    h, weight, bias, targets = _case()
    loss, grads = _cut(h, weight, bias, torch.full_like(targets, -100), None, Config(**SMALL))
    assert loss == 0 and not any(g.any() for g in grads)


@pytest.mark.parametrize("knobs", [{"tied": True}, {"tied": False}])
def test_the_decoder_gets_the_gradient_of_the_plain_loss(knobs) -> None:
    batch, plain, cut = stream().next_batch(4), decoder(**knobs), decoder(**knobs)
    losses.token_loss(plain, batch)[0].backward()
    saver = cce.Cce(Config(**SMALL))
    calls = []
    inner = cce.linear_cross_entropy
    with losses.using(lambda *a: calls.append(1) or saver.loss(cut, *a)):
        losses.token_loss(cut, batch)[0].backward()
    assert calls and inner is cce.linear_cross_entropy
    for (name, a), b in zip(cut.named_parameters(), plain.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, atol=1e-4), name


def test_another_head_takes_the_usual_way() -> None:
    model, saver = decoder(tied=False), cce.Cce(Config())
    h, targets = torch.randn(2, 5, 32), torch.randint(0, 9, (2, 5))
    own = nn.Linear(32, 9)
    total, _ = saver.loss(model, h.requires_grad_(), targets, own)
    whole = F.cross_entropy(own(h).flatten(0, 1), targets.flatten(), reduction="sum")
    assert torch.allclose(total, whole)


def test_a_form_on_the_head_trains_through_it() -> None:
    def made() -> nn.Module:
        model = decoder(tied=False)
        attach.attach(model, {"lm_head": "lora:rank=4"}, generator=torch.Generator().manual_seed(5))
        model.lm_head.B.data.normal_(generator=torch.Generator().manual_seed(6))
        return model

    batch, plain, cut = stream().next_batch(4), made(), made()
    losses.token_loss(plain, batch)[0].backward()
    with losses.using(lambda *a: cce.Cce(Config(**SMALL)).loss(cut, *a)):
        losses.token_loss(cut, batch)[0].backward()
    for name in ("A", "B"):
        ours, theirs = getattr(cut.lm_head, name).grad, getattr(plain.lm_head, name).grad
        assert theirs.norm() > 0 and torch.allclose(ours, theirs, atol=1e-3 * float(theirs.norm()))


def test_what_it_cannot_take_apart_is_refused_by_name() -> None:
    with pytest.raises(UserError, match="'cce' cannot be combined with Sequential"):
        train(
            nn.Sequential(nn.Embedding(VOCAB, 8), nn.Linear(8, VOCAB)),
            stream(),
            config(memory=["cce"]),
            None,
            label="",
        )

    class Bent(type(attach.wrap(nn.Linear(4, 4)))):
        provides = frozenset()

    model = decoder(tied=False)
    model.lm_head = Bent(None, attach.LinearShape.of(model.lm_head.weight, None))
    with pytest.raises(UserError, match="'cce' cannot be combined with the form 'Bent' on lm_head"):
        cce.classifier(model)


@pytest.mark.parametrize(
    "knobs, word",
    [({"eps": -1}, "eps"), ({"eps": 1.0}, "eps"), ({"rows": 0}, "rows"), ({"block": 0}, "block")],
)
def test_impossible_knobs_are_refused(knobs, word) -> None:
    with pytest.raises(ValueError, match=word):
        Config(**knobs)


def kernels_agree() -> None:
    """The GPU's way, run by Triton's interpreter on the CPU, against float64; filtering on and off."""
    from modicum.train.memory import _cce_triton as kernels

    kernels.ROWS = kernels.COLUMNS = kernels.STEP = 16
    kernels.SPLITS = 3
    for cap, biased in ((None, False), (3.0, True)):
        h, weight, bias, targets = _case(70, torch.float32)
        learnt = targets != -100
        given = (h, weight, bias if biased else None, targets, cap)
        wanted, exact = _naive(*given)
        h, targets, bias = h[learnt], targets[learnt], given[2]
        lse, mean = kernels.lse(h, weight, bias, cap, True)
        logits = F.linear(h, weight, bias)
        logits = logits if cap is None else cap * torch.tanh(logits / cap)
        assert torch.allclose(lse, logits.logsumexp(1), atol=1e-4)
        assert torch.allclose(mean, logits.mean(0), atol=1e-4)
        assert abs((lse - logits[torch.arange(len(h)), targets]).sum() - wanted) < 1e-4 * wanted
        for order in (None, mean.argsort()):
            grads = kernels.backward(h, weight, bias, targets, lse, order, cap, 0.0, (True, True, biased))
            for ours, theirs in zip(grads[: len(exact)], exact, strict=True):
                theirs = theirs[learnt] if theirs.ndim == 3 else theirs
                assert torch.allclose(3 * ours.double(), theirs, atol=1e-3)
    nothing = kernels.backward(h, weight, bias, targets, lse + 50, None, cap, 1.5, (True, True, True))
    assert not any(g.any() for g in nothing)  # all |G| <= 1 < eps
    print("agree")


def test_kernels_agree_in_the_interpreter() -> None:
    """In a process of its own: Triton decides at its first import whether it interprets."""
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-c", "import test_train_memory_cce as t; t.kernels_agree()"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        timeout=200,
        check=False,
    )
    assert done.stdout == "agree\n", done.stderr[-3000:]
