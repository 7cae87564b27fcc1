"""mllm-npu and form w8a8: the two products in float64, the rank of shadows, plain W8A8 without them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from modicum.compress.method import compress_model
from modicum.core import registry
from modicum.model import attach
from modicum.model.config import llama_like
from modicum.model.decoder import Decoder
from modicum.model.linear import LinearShape
from modicum.model.linear.w8a8 import W8A8, Config, split, step_of

TOKENS = torch.randint(1, 61, (8, 16), generator=torch.Generator().manual_seed(1))


def data() -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs with three columns of outliers, and a weight."""
    random = torch.Generator().manual_seed(0)
    x = torch.randn(40, 64, generator=random)
    x[:, [3, 17, 40]] *= 30
    return x, torch.randn(24, 64, generator=random)


def form(x: torch.Tensor, w: torch.Tensor, percentile: float = 0.9, shadow: bool = True) -> W8A8:
    made = W8A8(Config(percentile=percentile), LinearShape.of(w, None))
    made.fit(w, calibration_NI=x)
    made.shadow.fill_(int(shadow))
    return made


def test_the_two_products_are_those_of_float64() -> None:
    x, w = data()
    made = form(x, w)
    s, scale = float(made.step), made.scale.double()
    assert s == pytest.approx(float(x.abs().flatten().sort().values[round(0.9 * x.numel()) - 1]) / 127, rel=1e-6)
    q = (x.double() / s).round().clamp(-127, 127)
    W = made.codes.double() * scale
    residual = torch.where((x.double() / s).round().abs() > 127, x.double() - s * q, 0.0)
    want = s * q @ W.T + residual @ W.T
    torch.testing.assert_close(made(x).double(), want, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(form(x, w, shadow=False)(x).double(), s * q @ W.T, atol=1e-4, rtol=1e-4)
    assert (W - w.double()).abs().max() <= scale.max() / 2 + 1e-6


def test_outliers_are_put_back_and_nothing_is_counted_twice() -> None:
    """With a step that cuts much off, the shadow gives x W up to the rounding of what is within the levels."""
    x, w = data()
    exact = x.double() @ w.double().T
    errors = {s: float((form(x, w, 0.8, s)(x).double() - exact).norm() / exact.norm()) for s in (True, False)}
    largest = form(x, w, 1.0)
    coarse = float((largest(x).double() - exact).norm() / exact.norm())
    assert errors[True] < 0.02 < 0.3 < errors[False] and errors[True] < coarse
    q, residual = split(x, step_of(x, 1.0))
    assert not residual.any() and float(q.abs().max()) == 127


def test_without_calibration_the_call_gives_the_step() -> None:
    x, w = data()
    made = W8A8(Config(), LinearShape.of(w, None)).fit(w)
    torch.testing.assert_close(made(x), form(x, w, 1.0)(x), atol=1e-3, rtol=1e-3)


def decoder() -> Any:
    model: Any = Decoder(llama_like(61, 64, 2, 4, mlp_width=96, context_length=64), torch.Generator().manual_seed(0))
    with torch.no_grad():  # few channels of some norms are large: outliers in what their matrices are given
        for layer, size in zip(model.layers, (20.0, 3.0), strict=True):
            layer.mlp_norm.weight[5] = size
    return model.eval()


def test_the_shadows_that_matter_most_stay(tmp_path: Path) -> None:
    """The rank is that of naive ratios; a fraction of the matrices keeps its second product."""
    method: Any = registry.build("compressor", "mllm-npu:percentile=0.99,shadows=0.2")
    made: Any = compress_model(decoder(), "mllm-npu:percentile=0.99,shadows=0.2", TOKENS, tmp_path / "a")
    forms = attach.forms(made)
    kept = {n for n, f in forms.items() if bool(f.shadow)}  # type: ignore[arg-type]
    assert len(kept) == round(0.2 * 14)
    plain, ratios, inputs = decoder(), {}, {}
    handles = [m.register_forward_pre_hook(lambda m, a, n=n: inputs.update({n: a[0].flatten(0, -2)}))
               for n, m in plain.named_modules() if isinstance(m, torch.nn.Linear)]  # fmt: skip
    with torch.no_grad():
        plain(TOKENS)
    for handle in handles:
        handle.remove()
    for name in forms:
        x, w = inputs[name].double(), plain.get_submodule(name).weight.double()
        _, residual = split(x, step_of(x, 0.99))
        ratios[name] = float((residual @ w.T).square().sum() / (x @ w.T).square().sum())
    best = set(sorted(ratios, key=lambda n: -ratios[n])[:3])
    assert len(kept & best) >= 2 and {"layers.0.mlp.gate", "layers.0.mlp.up"} & kept
    assert method.config.shadows == 0.2


def test_shadows_bring_the_logits_closer(tmp_path: Path) -> None:
    want, errors = decoder()(TOKENS).detach(), {}
    for shadows in (0.0, 0.2, 1.0):
        made = compress_model(decoder(), f"mllm-npu:percentile=0.98,shadows={shadows}", TOKENS, tmp_path / str(shadows))
        with torch.no_grad():
            errors[shadows] = float((made(TOKENS) - want).norm() / want.norm())
    assert errors[1.0] < errors[0.2] < errors[0.0] and errors[1.0] < 0.5 * errors[0.0]
