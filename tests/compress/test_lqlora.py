"""lq-lora: the alternation in numpy, weights that are a product, bytes, and the bits that a budget gives."""

import numpy as np
import pytest
import torch

from modicum.compress.compressors.lqlora import Config, LqLoraCompressor, code_error
from modicum.model.linear import LinearShape
from modicum.model.linear.dense import Config as DenseConfig
from modicum.model.linear.dense import Dense
from modicum.model.linear.lqlora import Config as FormConfig
from modicum.model.linear.lqlora import LqLora, decompose, low_rank
from modicum.model.linear.palette import normal_float


def matrix(rows: int, inputs: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    low = torch.randn(rows, 6, dtype=torch.float64, generator=generator)
    low = low @ torch.randn(6, inputs, dtype=torch.float64, generator=generator)
    return 0.3 * low + torch.randn(rows, inputs, dtype=torch.float64, generator=generator)


def test_the_alternation_is_the_published_one_and_keeps_the_best() -> None:
    weight, rank = matrix(96, 80), 8
    made = decompose(weight, 3, 16, rank, 50, dtype=torch.float32)
    W, Q, values = weight.numpy(), np.zeros((96, 80)), np.array(normal_float(3))
    best = None
    for _ in range(50):
        U, S, V = np.linalg.svd(W - Q, full_matrices=False)
        low = (U[:, :rank] * S[:rank]) @ V[:rank]
        left = (W - low).reshape(96, 5, 16)
        scale = np.abs(left).max(-1, keepdims=True)
        Q = (values[np.abs((left / scale)[..., None] - values).argmin(-1)] * scale).reshape(96, 80)
        error = np.linalg.norm(W - low - Q)
        if best is not None and error >= best[0]:
            break
        best = (error, low, Q)
    assert best is not None
    np.testing.assert_allclose((made.up_OR @ made.down_RI).numpy(), best[1], atol=1e-5)
    assert made.error == pytest.approx(best[0] / np.linalg.norm(W), rel=1e-6)


def test_a_weighted_decomposition_is_best_for_importances_that_are_a_product() -> None:
    weight = matrix(24, 30)
    d1 = torch.linspace(0.5, 2, 24, dtype=torch.float64)
    d2 = torch.linspace(3, 0.2, 30, dtype=torch.float64)

    def loss(low: torch.Tensor) -> float:
        return float((torch.outer(d1, d2) * (weight - low)).square().sum())

    up, down = low_rank(d1[:, None] * weight * d2, 3)
    ours = (up / d1[:, None]) @ (down / d2)
    plain_up, plain_down = low_rank(weight, 3)
    trained = torch.cat([(plain_up).flatten(), plain_down.flatten()]).requires_grad_()
    optimizer = torch.optim.LBFGS([trained], max_iter=300, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        low = trained[: 24 * 3].view(24, 3) @ trained[24 * 3 :].view(3, 30)
        value = (torch.outer(d1, d2) * (weight - low)).square().sum()
        value.backward()
        return value

    optimizer.step(closure)
    reached = float(closure())
    assert loss(ours) <= reached * 1.001 < loss(plain_up @ plain_down)
    wide = matrix(200, 300)
    exact = torch.linalg.svdvals(wide)[4:].square().sum()
    up, down = low_rank(wide, 4)
    assert float((wide - up @ down).square().sum()) < 1.02 * float(exact)


def test_the_form_starts_nearer_than_its_codes_and_says_its_bytes() -> None:
    weight = matrix(64, 96).float()
    shape = LinearShape.of(weight, torch.zeros(64))
    base = Dense(DenseConfig(), shape).fit(weight, torch.ones(64))
    form = LqLora(FormConfig(bits=3, group=32, rank=6, alpha=12), shape, base)
    form.fit(weight)
    codes = float((form.base.dense() - weight).norm())
    both = float((form.dense() - weight).norm())
    assert both < 0.8 * code_error(weight, 3, 32) ** 0.5 and both < codes
    x = torch.randn(5, 96)
    torch.testing.assert_close(form(x), x @ form.dense().T + 1, atol=1e-4, rtol=1e-4)
    assert form.nbytes() == 64 * 96 * 3 // 8 + 64 * 3 * 2 + 4 * 6 * (64 + 96) + 64 * 4
    assert form.low_rank() is None  # no change of the original weight
    seen = LqLora(FormConfig(bits=2, group=32, rank=6), shape, base)
    inputs = torch.randn(200, 96) * torch.linspace(0.1, 3, 96)
    seen.fit(weight, calibration_NI=inputs)
    blind = LqLora(FormConfig(bits=2, group=32, rank=6), shape, base).fit(weight)
    losses = [float(((f.dense() - weight) @ inputs.T).norm()) for f in (seen, blind)]
    assert losses[0] < losses[1]


def test_bits_go_to_the_matrices_that_lose_most() -> None:
    method = LqLoraCompressor(Config(bits=3, rank=2, group=16))
    named = {"a": matrix(32, 32).float(), "b": 10 * matrix(32, 32, 1).float(), "c": 0.1 * matrix(32, 32, 2).float()}
    method.begin(lambda: iter(named.items()))
    assert method.bits == {"a": 3, "b": 4, "c": 2}
    method = LqLoraCompressor(Config(bits=2, rank=2, group=16, allocate=False))
    method.begin(lambda: iter(named.items()))
    assert set(method.bits.values()) == {2}
    with pytest.raises(ValueError, match="must be 2, 3 or 4"):
        Config(bits=2.5, allocate=False)
