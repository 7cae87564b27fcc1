"""magnitude, wanda, sparsegpt, shortgpt against their equations, computed naively in float64."""

from typing import Any

import numpy as np
import pytest
import torch

from modicum.compress.compressors import BlockJob, Statistics, magnitude, shortgpt, sparsegpt, wanda
from modicum.compress.method import compress_model
from modicum.core import registry
from modicum.core.choice import Choice
from modicum.core.errors import UserError
from modicum.model.config import llama_like
from modicum.model.decoder import Decoder

NOTHING = Statistics(frozenset())
TOKENS = torch.arange(3, 51).view(3, 16)


def weights(rows: int = 12, inputs: int = 16) -> torch.Tensor:
    return torch.randn(rows, inputs, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def inputs(width: int = 16, rows: int = 128) -> torch.Tensor:
    """That depend on one another and are of unequal size."""
    generator = torch.Generator().manual_seed(1)
    few = torch.randn(rows, 6, dtype=torch.float64, generator=generator)
    x = few @ torch.randn(6, width, dtype=torch.float64, generator=generator)
    x += 0.3 * torch.randn(rows, width, dtype=torch.float64, generator=generator)
    return x * torch.linspace(0.2, 3, width, dtype=torch.float64)


def loss(weight: torch.Tensor, pruned: torch.Tensor, x: torch.Tensor) -> float:
    return float(((pruned - weight) @ x.T).square().sum())


# magnitude ----------------------------------------------------------------------------------------


def test_magnitude_cuts_exactly_so_many_also_among_equals() -> None:
    weight = weights()
    found = magnitude.Magnitude(magnitude.Config(sparsity=0.6)).fit(weight, NOTHING)
    cut = found == 0
    assert cut.sum() == round(0.6 * 192) and weight.abs()[cut].max() < weight.abs()[~cut].min()
    assert torch.equal(found[~cut], weight[~cut])
    assert cut.sum(1).unique().numel() > 1  # of the matrix, not of each row
    equal = magnitude.Magnitude(magnitude.Config(sparsity=0.25)).fit(torch.ones(4, 8), NOTHING)
    assert (equal == 0).sum() == 8


@pytest.mark.parametrize("key, module", [("magnitude", magnitude), ("wanda", wanda), ("sparsegpt", sparsegpt)])
def test_pattern_is_n_of_every_m_inputs(key: str, module: Any) -> None:
    weight = weights(inputs=18)
    method = registry.build("compressor", f"{key}:pattern=2of4")
    found = method.fit(weight, Statistics.of(inputs(18)))
    zeros = (found == 0)[:, :16].unflatten(1, (4, 4)).sum(-1)
    assert bool((zeros == 2).all()) and not bool((found[:, 16:] == 0).any())
    if key == "magnitude":
        size = weight[:, :16].abs().unflatten(1, (4, 4))
        assert torch.equal((found[:, :16] == 0).unflatten(1, (4, 4)), size < size.sort(-1).values[..., 2:3])


@pytest.mark.parametrize("pattern", ["2", "4of2", "2of2", "0of4", "2:4"])
def test_other_patterns_are_refused(pattern: str) -> None:
    with pytest.raises(UserError, match="NofM"):
        Choice("compressor", "wanda", {"pattern": pattern}).config()


def test_magnitude_over_all_matrices_is_one_threshold() -> None:
    model = Decoder(llama_like(64, 32, 2, 4, mlp_width=48, context_length=64), torch.Generator().manual_seed(0))
    with torch.no_grad():
        model.layers[0].mlp.up.weight.mul_(4)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if n.startswith("layers.") and p.dim() == 2}
    method = magnitude.Magnitude(magnitude.Config(sparsity=0.5, scope="global"))
    method.begin(lambda: iter((n.removesuffix(".weight"), w) for n, w in before.items()))
    cut, kept = [], []
    for index, layer in enumerate(model.layers):
        names = [n.split(".", 2)[2].removesuffix(".weight") for n in before if n.startswith(f"layers.{index}.")]
        linears: Any = {n: layer.get_submodule(n) for n in names}
        method.block(BlockJob(index, layer, linears, dict.fromkeys(names, NOTHING), lambda: iter(())))
        for name in names:
            size, zero = before[f"layers.{index}.{name}.weight"].abs(), linears[name].weight == 0
            cut.append(size[zero])
            kept.append(size[~zero])
    assert torch.cat(cut).max() <= torch.cat(kept).min()
    assert len(torch.cat(cut)) == round(0.5 * sum(w.numel() for w in before.values()))


# wanda --------------------------------------------------------------------------------------------


def test_wanda_cuts_the_least_of_each_row_by_weight_times_norm() -> None:
    weight, x = weights(), inputs()
    found = wanda.Wanda(wanda.Config(sparsity=0.5)).fit(weight, Statistics.of(x, {"squares"}))
    score = np.abs(weight.numpy()) * np.linalg.norm(x.numpy(), axis=0)
    for row, kept, values in zip(score, found.numpy(), weight.numpy(), strict=True):
        least = set(np.argsort(row)[:8])
        assert {i for i in range(16) if kept[i] == 0} == least
        assert all(kept[i] == values[i] for i in range(16) if i not in least)
    of_matrix = magnitude.Magnitude(magnitude.Config(sparsity=0.5)).fit(torch.from_numpy(score), NOTHING)
    assert not torch.equal(of_matrix == 0, found == 0)  # the least of the matrix would be others


def test_wanda_with_equal_norms_is_magnitude_by_row() -> None:
    weight, x = weights(), torch.ones(5, 16, dtype=torch.float64)
    found = wanda.Wanda(wanda.Config(sparsity=0.25)).fit(weight, Statistics.of(x, {"squares"}))
    for row, before in zip(found, weight, strict=True):
        assert set(torch.nonzero(row == 0).flatten().tolist()) == set(before.abs().argsort()[:4].tolist())


# sparsegpt ----------------------------------------------------------------------------------------


def naive(weight: np.ndarray, gram: np.ndarray, part: float, columns: int) -> np.ndarray:
    """Algorithm 1 with the inverse over the columns that are left made anew each time."""
    W, width = weight.copy(), weight.shape[1]
    H = 2 * gram
    H = H + 0.01 * np.diag(H).mean() * np.eye(width)
    mask = np.zeros(W.shape, dtype=bool)
    for j in range(width):
        if j % columns == 0:
            end = min(j + columns, width)
            # U_jj^2 is the first entry of the inverse over the columns from j on
            pivots = np.array([np.linalg.inv(H[i:, i:])[0, 0] for i in range(j, end)])
            score = W[:, j:end] ** 2 / pivots
            least = np.argsort(score.flatten(), kind="stable")[: round(part * score.size)]
            chosen = np.zeros(score.size, dtype=bool)
            chosen[least] = True
            mask[:, j:end] = chosen.reshape(score.shape)
        inverse = np.linalg.inv(H[j:, j:])
        kept = np.where(mask[:, j], 0, W[:, j])
        W[:, j:] -= np.outer((W[:, j] - kept) / inverse[0, 0], inverse[0])
        W[:, j] = kept
    return W


@pytest.mark.parametrize("columns", [4, 16])
def test_sparsegpt_is_algorithm_1_with_explicit_inverses(columns: int) -> None:
    weight, x = weights(), inputs()
    config = sparsegpt.Config(sparsity=0.5, columns=columns)
    found = sparsegpt.SparseGpt(config).fit(weight, Statistics.of(x, {"gram"}))
    wanted = naive(weight.numpy(), (x.T @ x).numpy(), 0.5, columns)
    np.testing.assert_allclose(found.numpy(), wanted, atol=1e-9)


def test_sparsegpt_of_one_weight_is_optimal_brain_surgeon() -> None:
    """The least weight of a row in its first column: the closed form over all columns."""
    weight, x = weights(rows=1), inputs()
    weight[0, 0] = 1e-3
    found = sparsegpt.SparseGpt(sparsegpt.Config(sparsity=1 / 16)).fit(weight, Statistics.of(x, {"gram"}))
    H = 2 * (x.T @ x)
    inverse = torch.linalg.inv(H + 0.01 * H.diagonal().mean() * torch.eye(16, dtype=torch.float64))
    assert found[0, 0] == 0 and (found == 0).sum() == 1
    torch.testing.assert_close(found[0], weight[0] - weight[0, 0] / inverse[0, 0] * inverse[0])


def test_sparsegpt_lies_between_no_update_and_least_squares() -> None:
    weight, x = weights(), inputs()
    found = sparsegpt.SparseGpt(sparsegpt.Config(sparsity=0.5)).fit(weight, Statistics.of(x, {"gram"}))
    mask = found != 0
    refit = torch.zeros_like(weight)
    for row, keep in enumerate(mask):
        refit[row, keep] = torch.linalg.lstsq(x[:, keep], x @ weight[row]).solution
    best, plain = loss(weight, refit, x), loss(weight, weight * mask, x)
    assert best <= loss(weight, found, x) < 0.5 * plain
    small = wanda.Wanda(wanda.Config(sparsity=0.5)).fit(weight, Statistics.of(x, {"squares"}))
    assert loss(weight, found, x) < loss(weight, small, x)


@pytest.mark.parametrize("key", ["magnitude", "wanda", "sparsegpt"])
def test_no_sparsity_is_no_change(key: str) -> None:
    weight = weights()
    found = registry.build("compressor", f"{key}:sparsity=0").fit(weight, Statistics.of(inputs()))
    assert torch.equal(found, weight)


# shortgpt -----------------------------------------------------------------------------------------


def test_influence_is_one_minus_the_mean_cosine(tmp_path: Any) -> None:
    model = Decoder(llama_like(64, 32, 3, 4, context_length=64), torch.Generator().manual_seed(0)).eval()
    states: list[torch.Tensor] = []
    for layer in model.layers:
        layer.register_forward_pre_hook(lambda module, args: states.append(args[0]))
    model.norm.register_forward_pre_hook(lambda module, args: states.append(args[0]))
    method = shortgpt.ShortGpt(shortgpt.Config(drop=0))
    with torch.no_grad():
        model(TOKENS)
        for index in range(3):
            for rows in (slice(0, 1), slice(1, 3)):  # batches of unequal size
                method.observe(index, states[index][rows], states[index + 1][rows])
    for index, found in enumerate(method.influence()):
        x, y = (s.double().numpy().reshape(-1, 32) for s in states[index : index + 2])
        cosine = (x * y).sum(1) / np.linalg.norm(x, axis=1) / np.linalg.norm(y, axis=1)
        assert found == pytest.approx(1 - cosine.mean(), abs=1e-9)


def test_a_layer_that_does_nothing_goes_first(tmp_path: Any) -> None:
    config = llama_like(64, 32, 4, 4, kv_heads=2, context_length=64)
    model = Decoder(config, torch.Generator().manual_seed(0)).eval()
    with torch.no_grad():
        model.layers[1].attention.o.weight.zero_()
        model.layers[1].mlp.down.weight.zero_()
        wanted = model(TOKENS)
        made = compress_model(model, "shortgpt:drop=1", TOKENS, tmp_path)
        assert made.config.layers == 3 and [layer.attention.layer for layer in made.layers] == [0, 1, 2]
        torch.testing.assert_close(made(TOKENS), wanted)
        gone = shortgpt.without(Decoder(config, torch.Generator().manual_seed(0)).eval(), {0})
        assert not torch.allclose(gone(TOKENS), wanted, atol=1e-3)


def test_more_layers_than_there_are_is_refused() -> None:
    method = shortgpt.ShortGpt(shortgpt.Config(drop=4))
    with pytest.raises(UserError, match="leaves none of 4 layers"):
        method.check(llama_like(64, 32, 4, 4))
