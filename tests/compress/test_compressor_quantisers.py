"""rtn, hqq, gptq, awq against their equations, computed naively in float64."""

from typing import Any

import numpy as np
import pytest
import torch

from modicum.compress.compressors import BlockJob, Statistics, awq, gptq, hqq, rtn
from modicum.compress.compressors import _affine as affine
from modicum.model.attend import DenseAttend
from modicum.model.config import llama_like
from modicum.model.decoder import Decoder
from modicum.model.linear import LinearShape
from modicum.model.linear.int4 import Config as Int4Config
from modicum.model.linear.int4 import Int4

NOTHING = Statistics(frozenset())


def weights(rows: int = 24, inputs: int = 16, seed: int = 0) -> torch.Tensor:
    """A few large entries among small ones, in float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, inputs, dtype=torch.float64, generator=generator) ** 3


def inputs(width: int = 16, rows: int = 64, seed: int = 1) -> torch.Tensor:
    """Correlated, of unequal size, in float64."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, dtype=torch.float64, generator=generator) + 2 * torch.eye(width)
    return torch.randn(rows, width, dtype=torch.float64, generator=generator) @ mix * torch.linspace(0.2, 3, width)


def loss(weight: torch.Tensor, codes: affine.Codes, gram: torch.Tensor) -> float:
    left = codes.weight(torch.float64) - weight
    return float((left @ gram * left).sum())


def nearest(column: np.ndarray, low: np.ndarray, high: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    step = ((high - low) / (2**bits - 1)).astype(np.float32).astype(np.float64)
    zero = (low + 2 ** (bits - 1) * step).astype(np.float32).astype(np.float64)
    codes = np.clip(np.rint((column - zero) / step) + 2 ** (bits - 1), 0, 2**bits - 1)
    return codes, step * (codes - 2 ** (bits - 1)) + zero


# rtn ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_rtn_is_within_half_a_step(bits: int) -> None:
    weight = weights(8, 40)
    made = rtn.Rtn(rtn.Config(bits=bits, group=16, scale_dtype="float32")).fit(weight, NOTHING)
    step = made.scale_OG.double().repeat_interleave(16, 1)[:, :40]
    assert bool(((made.weight(torch.float64) - weight).abs() <= step / 2 * (1 + 1e-5)).all())
    ends = made.codes_OI.view(8, 40)[:, :32].unflatten(1, (2, 16))
    assert bool((ends.amin(-1) == 0).all() and (ends.amax(-1) == 2**bits - 1).all())  # the whole range is used


def test_rtn_at_four_bits_is_int4_bit_for_bit() -> None:
    weight = weights(16, 128).float()
    made = rtn.Rtn(rtn.Config(bits=4, group=32)).fit(weight, NOTHING)
    layer = torch.nn.Linear(128, 16, bias=False)
    layer.weight.data.copy_(weight)
    form = made.form(layer, torch.float32)
    reference = Int4(Int4Config(group=32), LinearShape.of(weight, None)).fit(weight)
    assert torch.equal(form.packed, reference.packed) and torch.equal(form.dense(), reference.dense())


def test_rtn_clip_is_the_best_of_the_steps_at_the_inputs() -> None:
    weight, x = weights(4, 16), inputs()
    config = rtn.Config(bits=2, group=16, scale_dtype="float32", clip=True)
    made = rtn.Rtn(config).fit(weight, Statistics.of(x, {"squares"}))
    weigh = x.square().mean(0).numpy()
    for row, found in zip(weight.numpy(), made.weight(torch.float64).numpy(), strict=True):
        tried = []
        for step in range(20):
            r = 1 - 0.5 * step / 20
            tried.append(((row - nearest(row, r * row.min(), r * row.max(), 2)[1]) ** 2 * weigh).sum())
        assert ((row - found) ** 2 * weigh).sum() == pytest.approx(min(tried), rel=1e-4)
        assert min(tried) < tried[0]
    other = rtn.Rtn(config).fit(weight, Statistics.of(x.flip(1), {"squares"}))
    assert not torch.equal(made.codes_OI, other.codes_OI)  # the inputs decide


# hqq ----------------------------------------------------------------------------------------------


def test_hqq_shrinks_as_the_minimiser_does() -> None:
    """|e|^p + beta / 2 (x - e)^2: to first order in 1 / beta, up to the factor p that the authors leave out of beta."""
    p, beta = 0.7, 1000.0
    for x in (0.3, 1.0, -2.0):
        e = np.linspace(x - 0.05, x + 0.05, 200_001)
        best = e[np.argmin(np.abs(e) ** p + beta / 2 * (x - e) ** 2)]
        found = float(hqq.shrink(torch.tensor(x, dtype=torch.float64), p, beta / p))
        assert found == pytest.approx(best, abs=3e-6) and abs(found) < abs(x)
    assert float(hqq.shrink(torch.tensor(1e-4), p, beta)) == 0.0


def test_hqq_first_step_is_the_equation() -> None:
    weight = weights(3, 16)
    made = hqq.Hqq(hqq.Config(bits=2, group=16, scale_dtype="float32", iterations=1)).fit(weight, NOTHING)
    for row, scale, zero in zip(weight.numpy(), made.scale_OG, made.zero_OG, strict=True):
        step = float(scale)
        codes, value = nearest(row, row.min(), row.max(), 2)
        error = row - value
        size = np.abs(error)
        error = np.sign(error) * np.maximum(size - np.maximum(size, 1e-12) ** (0.7 - 1) / 10, 0)
        v = (codes - (row - error) / step).mean()
        moved = step * (2 - v)
        after = step * (np.clip(np.rint((row - moved) / step) + 2, 0, 3) - 2) + moved
        if np.abs(row - after).mean() < np.abs(row - value).mean():
            assert float(zero) == pytest.approx(moved, rel=1e-5)
        else:
            assert float(zero) == pytest.approx(row.min() + 2 * step, rel=1e-5)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_hqq_is_nowhere_worse_than_rtn_in_mean_absolute_error(bits: int) -> None:
    weight = weights(32, 64).float()
    errors = []
    for method in (rtn.Rtn(rtn.Config(bits=bits, group=32)), hqq.Hqq(hqq.Config(bits=bits, group=32))):
        left = method.fit(weight, NOTHING).weight() - weight
        errors.append(left.abs().unflatten(1, (2, 32)).mean(-1))
    assert bool((errors[1] <= errors[0] + 1e-7).all()) and errors[1].mean() < 0.97 * errors[0].mean()


# gptq ---------------------------------------------------------------------------------------------


def obq(weight: np.ndarray, gram: np.ndarray, damping: float, bits: int, group: int) -> np.ndarray:
    """Optimal brain quantisation in fixed order, with the inverse over what is left made anew for every column."""
    W, width = weight.copy(), weight.shape[1]
    H = 2 * gram
    H = H + damping * np.diag(H).mean() * np.eye(width)
    codes = np.zeros_like(W)
    for j in range(width):
        if j % group == 0:
            low, high = W[:, j : j + group].min(1), W[:, j : j + group].max(1)
        inverse = np.linalg.inv(H[j:, j:])
        codes[:, j], value = nearest(W[:, j], low, high, bits)
        W[:, j:] -= np.outer((W[:, j] - value) / inverse[0, 0], inverse[0])
    return codes


@pytest.mark.parametrize("group", [8, 16])
@pytest.mark.parametrize("bits", [2, 3])
def test_gptq_gives_the_codes_of_naive_obq(bits: int, group: int) -> None:
    weight, x = weights(), inputs()
    config = gptq.Config(bits=bits, group=group, scale_dtype="float32")
    made = gptq.Gptq(config).fit(weight, Statistics.of(x, {"gram"}))
    wanted = obq(weight.numpy(), (x.T @ x).numpy(), 0.01, bits, group)
    assert (made.codes_OI.numpy() == wanted).mean() == 1.0


@pytest.mark.parametrize("order", [False, True])
def test_gptq_beats_rounding_at_the_inputs_and_not_at_the_weights(order: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(24, 32, dtype=torch.float64, generator=generator)
    x = torch.randn(256, 8, dtype=torch.float64, generator=generator) @ torch.randn(
        8, 32, dtype=torch.float64, generator=generator
    )
    x += 0.3 * torch.randn(256, 32, dtype=torch.float64, generator=generator)  # inputs that depend on one another
    plain = rtn.Rtn(rtn.Config(bits=3, group=16)).fit(weight, NOTHING)
    made = gptq.Gptq(gptq.Config(bits=3, group=16, order=order)).fit(weight, Statistics.of(x, {"gram"}))
    assert loss(weight, made, x.T @ x) < 0.6 * loss(weight, plain, x.T @ x)
    eye = torch.eye(32, dtype=torch.float64)
    assert loss(weight, made, eye) > loss(weight, plain, eye)


def test_gptq_in_order_is_gptq_of_permuted_columns_on_fixed_grids() -> None:
    weight, x = weights(), inputs()
    config = gptq.Config(bits=3, group=16, order=True, scale_dtype="float32")
    made = gptq.Gptq(config).fit(weight, Statistics.of(x, {"gram"}))
    order = (x * x).sum(0).argsort(descending=True)
    assert not torch.equal(order, torch.arange(16))
    wanted = obq(weight[:, order].numpy(), (x[:, order].T @ x[:, order]).numpy(), 0.01, 3, 16)
    assert (made.codes_OI[:, order].numpy() == wanted).all()  # one group, so its grid is the same in any order


def test_gptq_leaves_inputs_that_are_always_zero_alone() -> None:
    weight, x = weights(), inputs()
    x[:, 3] = 0
    made = gptq.Gptq(gptq.Config(bits=3, group=16)).fit(weight, Statistics.of(x, {"gram"}))
    alive = [i for i in range(16) if i != 3]
    left = made.weight(torch.float64)
    assert bool(left.isfinite().all()) and bool((left[:, 3].abs() <= made.scale_OG[:, 0].double() / 2 + 1e-6).all())
    assert (left - weight)[:, alive].abs().mean() < weight[:, alive].abs().mean()


# awq ----------------------------------------------------------------------------------------------


def job(layers: dict[str, Any], model: Decoder, rows: int = 2) -> BlockJob:
    """The first block of a decoder with its inputs."""
    block = model.layers[0]
    x = torch.randn(rows, 12, model.config.width, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    x *= torch.linspace(0.05, 4, model.config.width, dtype=torch.float64).flip(0)
    rotation = model._ropes[0](torch.arange(12)[None], torch.float64)
    statistics = {name: Statistics(frozenset({"gram", "magnitudes"})) for name in layers}
    hooks = [m.register_forward_pre_hook(lambda _, a, n=n: statistics[n].add(a[0])) for n, m in layers.items()]
    block(x, rotation, DenseAttend())
    for hook in hooks:
        hook.remove()
    return BlockJob(0, block, layers, statistics, lambda: iter([(x, rotation)]))


def block_of(kv_heads: int = 2) -> tuple[Decoder, dict[str, Any]]:
    config = llama_like(64, 32, 1, 4, kv_heads=kv_heads, mlp_width=48, context_length=32)
    model = Decoder(config, torch.Generator().manual_seed(0)).double().eval()
    with torch.no_grad():
        model.layers[0].attention_norm.weight.uniform_(0.5, 2, generator=torch.Generator().manual_seed(1))
    return model, {n: m for n, m in model.layers[0].named_modules() if isinstance(m, torch.nn.Linear)}


@pytest.mark.parametrize("kv_heads", [2, 4])
@torch.no_grad()
def test_awq_scaling_changes_no_output_before_rounding(kv_heads: int) -> None:
    model, layers = block_of(kv_heads)
    made = job(layers, model)
    x, rotation = next(made.inputs())
    wanted = made.block(x, rotation, DenseAttend())
    before = {n: m.weight.clone() for n, m in layers.items()}
    norm = made.block.attention_norm.weight.clone()
    found = awq.Awq(awq.Config(bits=2, group=16, clip=False, scale_dtype="float32"))
    found.block(made)
    torch.testing.assert_close(made.block(x, rotation, DenseAttend()), wanted, atol=1e-9, rtol=1e-9)
    assert not torch.allclose(made.block.attention_norm.weight, norm)
    scaled = {n for n, m in layers.items() if not torch.allclose(m.weight, before[n])}
    kept = {"attention.o"} if kv_heads == 2 else set()  # v has another width
    assert scaled == set(layers) - kept
    for name, codes in made.codes.items():  # and the scaled weights are what is rounded
        left = (codes.weight(torch.float64) - layers[name].weight).abs()
        assert bool((left <= codes.scale_OG.double().repeat_interleave(16, 1) / 2 * (1 + 1e-5)).all())


@torch.no_grad()
def test_awq_takes_the_alpha_of_least_error_of_the_inspected_module() -> None:
    """Naively: every alpha of the first group, attention recomputed with what q, k and v decode to."""
    model, layers = block_of()
    made = job(layers, model)
    x, rotation = next(made.inputs())
    attention, normed = made.block.attention, made.block.attention_norm(x)
    truth, t = attention(normed, rotation, DenseAttend()), normed.abs().flatten(0, 1).mean(0)
    names, norm = ("attention.q", "attention.k", "attention.v"), made.block.attention_norm.weight.clone()
    original, config = {n: layers[n].weight.clone() for n in names}, awq.Config(bits=2, group=16, clip=False)
    errors = []
    for alpha in range(20):
        s = (t ** (alpha / 20)).clamp_min(1e-4)
        s = s / (s.max() * s.min()).sqrt()
        for name in names:
            layers[name].weight.data = affine.rounded(original[name] * s, config).weight(torch.float64) / s
        errors.append((float((attention(normed, rotation, DenseAttend()) - truth).square().mean()), alpha, s))
    for name in names:
        layers[name].weight.data = original[name]
    best = min(errors, key=lambda e: e[0])
    assert 0 < best[1] < 19 and best[0] < 0.9 * errors[0][0]
    awq.Awq(config).block(made)
    torch.testing.assert_close(norm / made.block.attention_norm.weight, best[2], rtol=1e-6, atol=1e-9)


@torch.no_grad()
def test_awq_without_scales_and_ranges_is_rtn() -> None:
    model, layers = block_of()
    original = {n: m.weight.clone() for n, m in layers.items()}
    made = job(layers, model)
    awq.Awq(awq.Config(bits=3, group=16, steps=1, clip=False)).block(made)
    for name, weight in original.items():
        plain = rtn.Rtn(rtn.Config(bits=3, group=16)).fit(weight, NOTHING)
        assert torch.equal(made.codes[name].codes_OI, plain.codes_OI), name


@torch.no_grad()
def test_awq_ranges_are_the_best_of_the_steps_and_not_of_q_and_k() -> None:
    weight, x = weights(6, 32), inputs(32)
    config = awq.Config(bits=2, group=16, scale_dtype="float32")
    shrink = awq.clipping(weight, x.T @ x, config)
    for group in range(2):
        part, rows = weight[:, group * 16 : group * 16 + 16].numpy(), x[:, group * 16 : group * 16 + 16].numpy()
        for row in range(6):
            errors = []
            for step in range(10):
                r = 1 - step / 20
                left = part[row] - nearest(part[row], r * part[row].min(), r * part[row].max(), 2)[1]
                errors.append(((rows @ left) ** 2).sum())
            assert float(shrink[row, group]) == pytest.approx(1 - int(np.argmin(errors)) / 20)
    model, layers = block_of()
    made, plain = job(layers, model), job(block_of()[1], block_of()[0])
    awq.Awq(awq.Config(bits=2, group=16, steps=1)).block(made)
    for name in ("attention.q", "attention.k", "mlp.down"):
        same = rtn.Rtn(rtn.Config(bits=2, group=16)).fit(plain.linears[name].weight, NOTHING)
        assert torch.equal(made.codes[name].scale_OG, same.scale_OG) == (name != "mlp.down")
