"""kv-head-compression: exact where heads span one, scores at any position, folded as projected, PCA as numpy's."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from modicum.compress.blocks import Walk
from modicum.compress.compressors import kv_head_compression as method
from modicum.compress.method import compress_model
from modicum.core import registry
from modicum.core.errors import UserError
from modicum.core.events import Events
from modicum.model.config import Rope, llama_like
from modicum.model.decoder import Decoder
from modicum.model.rope import RopeTable, rotate

E, TOKENS = 8, torch.arange(3, 51).view(3, 16)


def decoder(kv_heads: int = 3) -> Decoder:
    shape = llama_like(64, 48, 2, 6, kv_heads=kv_heads, mlp_width=80, context_length=64)
    return Decoder(shape, torch.Generator().manual_seed(0)).double()


def complex_normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.complex128, generator=torch.Generator().manual_seed(seed))


def test_heads_that_span_one_are_replaced_exactly(tmp_path) -> None:
    model = decoder()
    with torch.no_grad():
        for seed, layer in enumerate(model.layers):
            attention = layer.attention
            one = method.as_complex(attention.k.weight[:E], E)
            attention.k.weight.copy_(method.as_real(complex_normal(3, E // 2, 1, seed=seed) * one))
            mix = torch.randn(3 * E, E, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
            attention.v.weight.copy_(mix @ attention.v.weight[:E])
        wanted = model(TOKENS)
        made = compress_model(model, "kv-head-compression:keep=1", TOKENS, tmp_path)
        assert made.config.kv_heads == 1 and made.layers[0].attention.k.weight.shape == (E, 48)
        torch.testing.assert_close(made.double()(TOKENS), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("knobs", ["keep=1", "keep=1,pool=mean", "keep=1,by=weights", "keep=2"])
def test_folded_weights_compute_what_projected_ones_do(tmp_path, knobs) -> None:
    model = decoder(kv_heads=6 if knobs == "keep=2" else 3)
    compressor = registry.build("compressor", f"kv-head-compression:{knobs}")
    compressor.finish = lambda made: made  # the projected model, of the old shape
    names = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n.startswith("layers.")]
    Walk(model, compressor, names, TOKENS, tmp_path).run(Events(None))
    with torch.no_grad():
        wanted = model(TOKENS)
        made = method.folded(model, compressor.config.keep)
        torch.testing.assert_close(made(TOKENS), wanted, atol=1e-5, rtol=1e-5)


def test_scores_are_the_same_at_any_positions() -> None:
    """q . (u_j y) as q' . y, both rotated, at positions far apart."""
    table = RopeTable(Rope(), E, 4096)
    u = complex_normal(3, E // 2)
    x = torch.randn(5, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    y = complex_normal(E // 2, 20, seed=2)
    queries = torch.randn(3 * E, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    here, there = (table(torch.tensor([p]), torch.float64) for p in ([3, 7, 100, 801, 4000], [0, 9, 77, 800, 4001]))
    one = method.as_real(y[None])
    for j in range(3):
        whole = method.as_real((u[j][:, None] * y)[None])
        turned = method.turned_queries(queries[j * E : (j + 1) * E], u[j], E)

        def score(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
            a, b = rotate((x @ q.T)[None, None], *here), rotate((x @ k.T)[None, None], *there)
            return a[0, 0] @ b[0, 0].T

        torch.testing.assert_close(score(turned, one), score(queries[j * E : (j + 1) * E], whole), atol=1e-6, rtol=1e-6)


def test_directions_are_numpys() -> None:
    weight = torch.randn(3 * E, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = torch.randn(200, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) ** 3
    gram = x.T @ x
    u = method.value_directions(weight, gram, E)
    right = np.linalg.svd((x @ weight.T).numpy(), full_matrices=False)[2][:E].T
    np.testing.assert_allclose((u @ u.T).numpy(), right @ right.T, atol=1e-8)
    k = (x @ weight.T).numpy().reshape(200, 3, 2, E // 2)
    z = k[:, :, 0] + 1j * k[:, :, 1]
    keys = method.key_directions(weight, gram, E)
    for a in range(E // 2):
        top = np.linalg.svd(z[:, :, a], full_matrices=False)[2][0]  # rows are u^T, so u is its conjugate's conjugate
        assert abs(np.vdot(keys[:, a].numpy(), top)) == pytest.approx(1, abs=1e-8)


def test_activations_lose_less_than_the_mean(tmp_path) -> None:
    wanted, lost = decoder()(TOKENS).detach(), {}
    for pool in ("pca", "mean"):
        made = compress_model(decoder(), f"kv-head-compression:pool={pool}", TOKENS, tmp_path / pool).double()
        lost[pool] = (made(TOKENS) - wanted).square().mean().item()
    assert lost["pca"] < 0.9 * lost["mean"]


def test_what_does_not_fit_is_refused() -> None:
    compressor = registry.build("compressor", "kv-head-compression:keep=2")
    with pytest.raises(UserError, match="smaller divisor: 1"):
        compressor.check(decoder().config)
    with pytest.raises(UserError, match="norms or biases"):
        registry.build("compressor", "kv-head-compression").check(
            llama_like(64, 48, 1, 6, kv_heads=3, context_length=64, qk_norm="head")
        )
