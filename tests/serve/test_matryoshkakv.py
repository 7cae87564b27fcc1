"""Reference test of cacheform/matryoshkakv: bases, ranks and losses computed naively."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from serve_tools import assert_clean, tiny

from modicum.core.choice import Choice
from modicum.model.decoder import Decoder
from modicum.serve.cacheforms import matryoshkakv as method
from modicum.serve.cacheforms._fitted import fit_form, write_fit
from modicum.serve.cacheforms.matryoshkakv import Config, MatryoshkaKv
from modicum.serve.config import EngineConfig
from modicum.serve.engine import Engine
from modicum.serve.request import SamplingParams

TOKENS = torch.randint(1, 400, (4, 32), generator=torch.Generator().manual_seed(5))
L, G, E = 2, 2, 8
GREEDY = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)


def fit(model: Decoder, path: Path, **knobs: object) -> dict[str, torch.Tensor]:
    made = fit_form(Choice("cacheform", "matryoshkakv", knobs), model, TOKENS)
    write_fit(path, made, model.config)
    return made


def keys_and_values(model: Decoder) -> dict[tuple[str, int], torch.Tensor]:
    """x_GRE in float64: rotated keys, and values, of each layer on TOKENS."""
    seen: dict[tuple[str, int], torch.Tensor] = {}
    from modicum.model.attend import DenseAttend

    dense = DenseAttend()

    def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **how: object) -> torch.Tensor:
        seen["k", layer], seen["v", layer] = (x.transpose(0, 1).flatten(1, 2).double() for x in (k, v))
        return dense(layer, q, k, v, **how)  # type: ignore[arg-type]

    with torch.no_grad():
        model.hidden(TOKENS, attend=attend)  # type: ignore[arg-type]
    return seen


def test_the_untrained_start_is_pca(tmp_path: Path) -> None:
    model = tiny()
    made, seen = fit(model, tmp_path / "fit"), keys_and_values(model)
    for which, layer, g in itertools.product("kv", range(L), range(G)):
        x = seen[which, layer][g].numpy()
        right = np.linalg.svd(x - x.mean(0), full_matrices=False)[2]
        basis = made[f"{which}_LGEE"][layer, g].double().numpy()
        np.testing.assert_allclose(made[f"{which}_mean_LGE"][layer, g].numpy(), x.mean(0), atol=1e-4)
        for r in (2, 5):
            np.testing.assert_allclose(basis[:, :r] @ basis[:, :r].T, right[:r].T @ right[:r], atol=1e-3)
        assert np.linalg.det(basis) == pytest.approx(1, abs=1e-4)


def test_cayley_is_orthogonal_and_begins_at_the_identity() -> None:
    x = torch.randn(3, E, E, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    p = method.cayley(x)
    torch.testing.assert_close(p @ p.mT, torch.eye(E, dtype=torch.float64).expand(3, E, E), atol=1e-12, rtol=0)
    a = x - x.mT
    want = torch.linalg.inv(torch.eye(E, dtype=torch.float64) - a / 2) @ (torch.eye(E, dtype=torch.float64) + a / 2)
    torch.testing.assert_close(p, want)
    assert torch.equal(method.cayley(torch.zeros(1, E, E))[0], torch.eye(E))


def test_codes_are_the_first_coordinates_about_the_mean(tmp_path: Path) -> None:
    model = tiny()
    made = fit(model, tmp_path / "fit")
    form = MatryoshkaKv(Config(fit=str(tmp_path / "fit"), kept=0.5, ranks="uniform"), E, torch.float32)
    form.begin(model.config)
    x = torch.randn(G, 3, 4, E, generator=torch.Generator().manual_seed(0))
    at = torch.zeros(3, 4, dtype=torch.int64)
    for which in "kv":
        got = form.decode_layer(which, 1, form.encode_layer(which, 1, x, at), at)
        for g in range(G):
            p = made[f"{which}_LGEE"][1, g, :, :4].double()
            mean = made[f"{which}_mean_LGE"][1, g].double()
            torch.testing.assert_close(got[g].double(), (x[g].double() - mean) @ p @ p.T + mean, atol=1e-5, rtol=1e-5)


def test_all_coordinates_give_the_tokens_of_the_plain_cache(tmp_path: Path) -> None:
    model = tiny()
    fit(model, tmp_path / "fit", steps=3, lr=0.05)
    prompts = [TOKENS[0].tolist(), TOKENS[1, :9].tolist()]
    outputs = []
    for form in ("plain", f"matryoshkakv:fit={tmp_path / 'fit'},kept=1.0"):
        engine = Engine(
            model, None, EngineConfig(block_size=4, cache="400tok", cache_form=form, drafter="prompt-lookup")
        )
        outputs += [[list(o.tokens) for o in engine.generate(prompts, GREEDY)] for _ in range(2)]
        assert_clean(engine)
    assert outputs[0] == outputs[1] == outputs[2] == outputs[3]


def test_training_lowers_the_loss_of_truncated_codes_and_moves_nothing_else(tmp_path: Path) -> None:
    model = tiny()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    start = fit(model, tmp_path / "start")
    trained = fit(model, tmp_path / "trained", steps=60, lr=0.02)
    assert all(torch.equal(before[n], p) and p.requires_grad for n, p in model.named_parameters())
    torch.testing.assert_close(
        trained["k_LGEE"] @ trained["k_LGEE"].mT, torch.eye(E).expand(L, G, E, E), atol=1e-5, rtol=0
    )
    losses = []
    with torch.no_grad():
        teacher = model(TOKENS).log_softmax(-1)
        for made in (start, trained):
            bases, means = ({w: made[f"{w}_{n}"] for w in "kv"} for n in ("LGEE", "mean_LGE"))
            total = 0.0
            for r in (2, 4, 6):
                kept = {w: (torch.arange(E) < r).float().expand(L, G, E) for w in "kv"}
                total += float(method._loss(model, TOKENS, teacher, method.Truncated(means, bases, kept)))
            losses.append(total)
    assert losses[1] < losses[0] - 0.01


def test_ranks_are_drawn_for_each_layer_and_head() -> None:
    kept = method.draw(torch.Generator().manual_seed(0), 30, 3, 64)
    ranks = {which: kept[which].sum(-1) for which in "kv"}
    assert all(set((r / 8).flatten().tolist()) == set(range(1, 9)) for r in ranks.values())
    assert not torch.equal(ranks["k"], ranks["v"])
    assert bool((kept["k"].diff(dim=-1) <= 0).all())  # a prefix of coordinates


def test_losses_are_those_of_naive_differences(tmp_path: Path) -> None:
    """sum over tokens of (dL/dx . (x - x'))^2 / 2, the gradient taken one layer at a time."""
    model = tiny()
    made = fit(model, tmp_path / "fit")
    from modicum.model.attend import DenseAttend

    for which, layer in (("k", 0), ("v", 1)):
        dense, extra = DenseAttend(), torch.zeros(4, G, 32, E, requires_grad=True)
        kept: list[torch.Tensor] = []

        def attend(i, q, k, v, dense=dense, extra=extra, kept=kept, which=which, layer=layer, **how):  # type: ignore[no-untyped-def]
            if i == layer:
                kept.append((k if which == "k" else v).detach())
                k, v = (k + extra, v) if which == "k" else (k, v + extra)
            return dense(i, q, k, v, **how)

        logits = model(TOKENS, attend=attend)
        torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten(), reduction="sum"
        ).backward()
        assert extra.grad is not None
        for g in range(G):
            p, mean = made[f"{which}_LGEE"][layer, g], made[f"{which}_mean_LGE"][layer, g]
            for r in (1, 5, 8):
                x = kept[0][:, g]
                away = x - ((x - mean) @ p[:, :r] @ p[:, :r].T + mean)
                want = float((extra.grad[:, g] * away).sum(-1).square().sum() / 2)
                got = float(made["lost_2LGR"]["kv".index(which), layer, g, r - 1])
                assert got == pytest.approx(want, rel=1e-2, abs=1e-6)


def test_the_search_is_the_best_of_all_where_losses_are_convex() -> None:
    losses = torch.tensor([[[[9.0, 4, 1, 0], [90, 40, 10, 0]]], [[[5, 3, 1.5, 0], [2, 1, 0.4, 0]]]])  # 2, L=1, G=2, R=4
    levels = method.search(losses, 0.625)
    assert int(levels.sum()) == 10
    flat = losses.flatten(0, 2)
    best = min(
        (c for c in itertools.product(range(1, 5), repeat=4) if sum(c) == 10),
        key=lambda c: sum(float(flat[i, r - 1]) for i, r in enumerate(c)),
    )
    assert tuple(levels.flatten().tolist()) == best
    assert int(method.search(losses, 0.01).sum()) == 4


def test_heads_take_their_own_ranks_and_bytes_follow(tmp_path: Path) -> None:
    model = tiny()
    made = fit(model, tmp_path / "fit")
    made["lost_2LGR"] = torch.arange(8.0).flip(-1).expand(2, L, G, 8) * torch.tensor([1.0, 100.0])[:, None]
    write_fit(tmp_path / "fit", made, model.config)
    form = f"matryoshkakv:fit={tmp_path / 'fit'},kept=0.5625"
    engine = Engine(model, None, EngineConfig(block_size=4, cache="400tok", cache_form=form))
    ranks = engine.storage.form.ranks  # type: ignore[attr-defined]
    assert ranks == {"k": [[1, 8], [1, 8]], "v": [[1, 8], [1, 8]]}
    assert engine.storage.block_bytes == 4 * 4 * (4 * (1 + 8))  # entries, bytes, layers and which, ranks
    assert [len(o.tokens) for o in engine.generate([TOKENS[0].tolist()], GREEDY)] == [20]
