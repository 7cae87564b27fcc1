"""Traces of Hessian and Fisher matrix against explicit matrices in float64."""

import numpy as np
import pytest
import torch
from torch import nn

from modicum.core import registry
from modicum.core.errors import UserError
from modicum.evaluate.curvature import SymbolNet, curvature
from modicum.evaluate.probes import Item


class Linear(nn.Module):
    """Softmax-linear: fixed features of the symbol, 6 x 50 weights."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.register_buffer("features", torch.randn(6, 50, generator=generator, dtype=torch.float64))
        self.weight = nn.Parameter(0.2 * torch.randn(50, 6, generator=generator, dtype=torch.float64))

    def forward(self, tokens_BT):
        return self.features[tokens_BT] @ self.weight


def explicit(model, tokens_1T):
    """Trace of the exact Hessian of the mean loss, and of the exact Fisher matrix per token."""
    weights = list(model.parameters())

    def loss(*values):
        named = dict(zip((n for n, _ in model.named_parameters()), values, strict=True))
        logits = torch.func.functional_call(model, named, (tokens_1T[:, :-1],))[0]
        return nn.functional.cross_entropy(logits, tokens_1T[0, 1:])

    blocks = torch.autograd.functional.hessian(loss, tuple(weights))
    trace = sum(float(blocks[i][i].reshape(w.numel(), w.numel()).diagonal().sum()) for i, w in enumerate(weights))
    fisher = 0.0
    log_p_TV = model(tokens_1T[:, :-1])[0].log_softmax(-1)
    for row_V in log_p_TV:
        for value in row_V:
            slopes = torch.autograd.grad(value, weights, retain_graph=True)
            fisher += float(value.detach().exp()) * sum(float(g.square().sum()) for g in slopes)
    return trace, fisher / len(log_p_TV)


def estimate(model, tokens_1T, draws, probes=1):
    rows = [curvature(model, tokens_1T, torch.Generator().manual_seed(i), probes=probes) for i in range(draws)]
    return np.array([[r.hessian, r.fisher] for r in rows])


def test_traces_against_explicit_matrices():
    tokens = torch.randint(0, 6, (1, 13), generator=torch.Generator().manual_seed(1))
    model = Linear()
    trace, fisher = explicit(model, tokens)
    assert trace == pytest.approx(fisher, rel=1e-9)  # softmax-linear: the Hessian is the Gauss-Newton matrix
    drawn = estimate(model, tokens, 600)
    error = drawn.std(0) / 600**0.5
    assert (np.abs(drawn.mean(0) - trace) < 4 * error).all() and (error < 0.05 * trace).all()
    net = SymbolNet(6, 8, torch.Generator().manual_seed(2)).double()
    trace, fisher = explicit(net, tokens)
    assert abs(trace / fisher - 1) > 0.05  # random text: not the net's minimum
    drawn = estimate(net, tokens, 600)
    assert (np.abs(drawn.mean(0) - [trace, fisher]) < 4 * drawn.std(0) / 600**0.5).all()


def test_more_probes_narrow_the_estimate_and_scaling_is_seen():
    tokens = torch.randint(0, 6, (1, 25), generator=torch.Generator().manual_seed(1))
    net = SymbolNet(6, 8, torch.Generator().manual_seed(2)).double()
    one, many = estimate(net, tokens, 40)[:, 0], estimate(net, tokens, 40, probes=16)[:, 0]
    assert many.std() < 0.5 * one.std()
    model = Linear()
    before = curvature(model, tokens, torch.Generator().manual_seed(0))
    with torch.no_grad():  # features half as large, weights twice: the same function
        model.features /= 2
        model.weight *= 2
    after = curvature(model, tokens, torch.Generator().manual_seed(0))
    assert after.loss == pytest.approx(before.loss) and after.fisher == pytest.approx(before.fisher / 4)
    assert after.scaled == pytest.approx(before.scaled) and after.parameters == 300


def test_decoder_and_mistakes():
    """The real decoder's attention is differentiated twice; a grader of likelihoods is refused."""
    from modicum.model.config import llama_like
    from modicum.model.decoder import Decoder

    model = Decoder(llama_like(64, 32, 1), torch.Generator().manual_seed(0))
    tokens = torch.randint(0, 64, (1, 17), generator=torch.Generator().manual_seed(1))
    at = curvature(model, tokens, torch.Generator().manual_seed(0), probes=2)
    assert at.fisher > 0 and np.isfinite(at.hessian) and at.parameters == sum(p.numel() for p in model.parameters())
    probe = registry.build("probe", "flatness")
    items = [Item(str(i), "a", ("b", "c"), 0) for i in range(10)]
    with pytest.raises(UserError, match="grader with gradients"):
        plain = registry.build("probe", "plain").simulate(np.random.default_rng(0), True)[1]
        probe.run(items, plain, 10)
