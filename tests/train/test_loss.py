"""The sliced cross-entropy against the whole one in float64, values and gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from train_toys import VOCAB, decoder, stream

from modicum.train.loss import cross_entropy, token_loss


def _case(dtype: torch.dtype = torch.float64):
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(3, 10, 16, generator=generator, dtype=torch.float64).to(dtype)
    weight = (torch.randn(50, 16, generator=generator, dtype=torch.float64) / 2).to(dtype)
    targets = torch.randint(0, 50, (3, 10), generator=generator)
    targets[0, 3:7] = -100
    targets[2, -1] = -100
    return h, weight, targets


@pytest.mark.parametrize("rows", [1, 4, 7, 30, 1000])
@pytest.mark.parametrize("cap", [None, 3.0])
def test_slices_agree_with_the_whole(rows, cap):
    h, weight, targets = _case()
    head = nn.Linear(16, 50, bias=False, dtype=torch.float32)
    head.weight.data = weight.float()

    def apply(x):
        y = head(x)
        return y if cap is None else cap * torch.tanh(y / cap)

    x = h.float().requires_grad_()
    total, count = cross_entropy(x, targets, apply, logits_bytes=rows * 50 * 4)
    (3.0 * total).backward()

    x64, w64 = h.clone().requires_grad_(), head.weight.detach().double().requires_grad_()
    logits = x64 @ w64.T
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    naive = F.cross_entropy(logits.view(-1, 50), targets.view(-1), reduction="sum")
    (3.0 * naive).backward()
    assert count == (targets != -100).sum()
    assert abs(total.item() - naive.item()) < 1e-4
    assert torch.allclose(x.grad.double(), x64.grad, atol=1e-5)
    assert torch.allclose(head.weight.grad.double(), w64.grad, atol=1e-5)


def test_without_gradients_it_gives_the_same_number():
    h, weight, targets = _case(torch.float32)
    head = nn.Linear(16, 50, bias=False)
    head.weight.data = weight
    with torch.no_grad():
        quiet, _ = cross_entropy(h, targets, head, logits_bytes=1000)
    loud, _ = cross_entropy(h.requires_grad_(), targets, head)
    assert not quiet.requires_grad and abs(quiet - loud.detach()) < 1e-3


def test_rows_without_loss_may_hold_nan():
    h, weight, targets = _case(torch.float32)
    h[targets == -100] = float("nan")
    head = nn.Linear(16, 50, bias=False)
    head.weight.data = weight
    x = h.requires_grad_()
    total, _ = cross_entropy(x, targets, head)
    total.backward()
    assert torch.isfinite(total) and torch.isfinite(x.grad[targets != -100]).all()


def test_bf16_logits_lose_no_more_than_their_rounding():
    h, weight, targets = _case(torch.bfloat16)
    head = nn.Linear(16, 50, bias=False, dtype=torch.bfloat16)
    head.weight.data = weight
    total, count = cross_entropy(h.requires_grad_(), targets, head)
    with torch.no_grad():  # the same rounded logits, the rest in float64
        exact = F.cross_entropy(head(h).double().view(-1, 50), targets.view(-1), reduction="sum", ignore_index=-100)
    assert total.dtype == torch.float32 and abs(total.item() - exact.item()) < 1e-3 * count


@pytest.mark.parametrize("tied", [True, False])
def test_the_decoder_gets_the_gradient_of_the_plain_loss(tied):
    batch = stream(packing="concat").next_batch(4)
    sliced, plain = decoder(tied=tied), decoder(tied=tied)
    total, _ = token_loss(sliced, batch, logits_bytes=5 * VOCAB * 4)
    total.backward()
    logits = plain(batch.tokens_BT, positions_BT=batch.positions_BT, documents_BT=batch.documents_BT)
    F.cross_entropy(logits.flatten(0, 1), batch.targets_BT.flatten(), reduction="sum").backward()
    for (name, a), b in zip(sliced.named_parameters(), plain.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, atol=2e-4), name


def test_a_frozen_head_still_passes_the_gradient_on():
    batch, model = stream().next_batch(2), decoder(tied=False)
    model.lm_head.weight.requires_grad_(False)
    token_loss(model, batch)[0].backward()
    assert model.lm_head.weight.grad is None and model.embed.weight.grad.abs().sum() > 0


def test_any_module_that_gives_logits_will_do():
    batch = stream().next_batch(2)
    model = nn.Sequential(nn.Embedding(VOCAB, 8), nn.Linear(8, VOCAB))
    total, count = token_loss(model, batch, logits_bytes=3 * VOCAB * 4)
    total.backward()
    grad = model[1].weight.grad.clone()
    model.zero_grad()
    F.cross_entropy(model(batch.tokens_BT).flatten(0, 1), batch.targets_BT.flatten(), reduction="sum").backward()
    assert count == 64 and torch.allclose(grad, model[1].weight.grad, atol=1e-4)
