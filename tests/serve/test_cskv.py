"""Reference test of cacheform/cskv: PCA and ASVD in float64, positions, the window's saw-tooth, what training gains."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from serve_tools import assert_clean, tiny

from modicum.core.choice import Choice
from modicum.core.errors import UserError
from modicum.model.decoder import Decoder
from modicum.serve.cacheforms._fitted import fit_form, read_fit, write_fit
from modicum.serve.cacheforms.cskv import Config, Cskv
from modicum.serve.config import EngineConfig
from modicum.serve.engine import Engine
from modicum.serve.request import Request, SamplingParams

TOKENS = torch.randint(1, 400, (4, 32), generator=torch.Generator().manual_seed(5))
C, E = 16, 8
GREEDY = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)


def caught(model: Decoder, name: str) -> torch.Tensor:
    """Outputs of a linear layer on TOKENS, (rows, outputs): keys before their rotation."""
    rows: list[torch.Tensor] = []
    handle = model.get_submodule(name).register_forward_hook(lambda m, a, out: rows.append(out.flatten(0, 1)))
    with torch.no_grad():
        model(TOKENS)
    handle.remove()
    return torch.cat(rows).double()


def fitted(model: Decoder, path: Path, **knobs: object) -> str:
    choice = Choice("cacheform", "cskv", knobs)
    write_fit(path, fit_form(choice, model, TOKENS), model.config)
    return f"cskv:fit={path}," + ",".join(f"{k}={v}" for k, v in knobs.items() if k != "start")


@pytest.mark.parametrize("which", ["k", "v"])
def test_pca_is_numpys_and_the_least_that_training_reaches(which: str) -> None:
    """Gradient descent on A and B from the paper's start ends at the principal components, not below them."""
    model, r = tiny(), 6
    bases = {
        s: fit_form(Choice("cacheform", "cskv", {"start": s}), model, TOKENS)[f"{which}_LCC"] for s in ("pca", "asvd")
    }
    rows = caught(model, f"layers.1.attention.{which}")
    right = np.linalg.svd(rows.numpy(), full_matrices=False)[2][:r].T
    mine = bases["pca"][1, :, :r].double()
    np.testing.assert_allclose((mine @ mine.T).numpy(), right @ right.T, atol=1e-4)

    def error(down: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return (rows @ down @ up - rows).square().mean()

    least, start = error(mine, mine.T), bases["asvd"][1, :, :r].double()
    down, up = start.clone().requires_grad_(), start.T.clone().requires_grad_()
    optimizer = torch.optim.Adam([down, up], lr=3e-2)
    for _ in range(400):
        optimizer.zero_grad()
        error(down, up).backward()
        optimizer.step()
    assert float(error(start, start.T)) > 1.02 * float(least)
    assert float(least) * (1 - 1e-6) <= float(error(down.detach(), up.detach())) < 1.01 * float(least)


def test_asvd_is_the_svd_of_the_scaled_weight() -> None:
    """A = S^-1 U sqrt(Sigma), B = sqrt(Sigma) V^T: x A B is the projection of k onto V."""
    model, r = tiny(), 5
    attention = model.layers[1].attention
    inputs: list[torch.Tensor] = []
    handle = attention.k.register_forward_pre_hook(lambda m, a: inputs.append(a[0].flatten(0, 1).double()))
    with torch.no_grad():
        model(TOKENS)
    handle.remove()
    x, w = inputs[0], attention.k.weight.detach().double()
    s = (x.abs().mean(0) + 1e-6) ** 0.5
    u, sigma, vt = torch.linalg.svd(s[:, None] * w.T, full_matrices=False)
    down, up = (u[:, :r] * sigma[:r].sqrt()) / s[:, None], sigma[:r].sqrt()[:, None] * vt[:r]
    basis = fit_form(Choice("cacheform", "cskv", {"start": "asvd"}), model, TOKENS)["k_LCC"][1, :, :r].double()
    torch.testing.assert_close(x @ down @ up, x @ w.T @ basis @ basis.T, atol=1e-4, rtol=1e-4)


def test_keys_are_rotated_to_their_own_positions(tmp_path: Path) -> None:
    """Decoded keys are the projections of the plain ones, rotated where they stood."""
    model = tiny()
    fitted(model, tmp_path / "fit")
    form = Cskv(Config(fit=str(tmp_path / "fit"), keys=0.5, values=0.5), E, torch.float32)
    form.begin(model.config)
    seen: list[torch.Tensor] = []

    def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **how: object) -> torch.Tensor:
        seen.append(k)
        return torch.zeros_like(q)

    with torch.no_grad():
        model.hidden(TOKENS[:1], attend=attend)  # type: ignore[arg-type]
        plain = model.layers[0].attention.k(model.layers[0].attention_norm(model.embed(TOKENS[:1])))[0]
        basis = read_fit(str(tmp_path / "fit"))["k_LCC"][0, :, : C // 2]
        projected = (plain @ basis @ basis.T).view(1, 32, 2, E).transpose(1, 2)
        angles = model.ropes()[0][0].angles
        turned = torch.arange(32)[:, None].float() * angles
        cos, sin = turned.cos(), turned.sin()
        a, b = projected.chunk(2, -1)
        want = torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
    x_GNPE = seen[0][0].unflatten(1, (4, 8))
    at_NP = torch.arange(32).view(4, 8)
    got = form.decode_layer("k", 0, form.encode_layer("k", 0, x_GNPE, at_NP), at_NP).flatten(1, 2)
    torch.testing.assert_close(got, want[0], atol=1e-4, rtol=1e-4)


def test_full_rank_gives_the_tokens_of_the_plain_cache(tmp_path: Path) -> None:
    model = tiny()
    prompts = [TOKENS[0].tolist(), TOKENS[1, :9].tolist()]
    form = fitted(model, tmp_path / "fit", keys=1.0, values=1.0, residual=0)
    outputs = []
    for cache_form in ("plain", form):
        engine = Engine(model, None, EngineConfig(block_size=4, cache="400tok", cache_form=cache_form))
        for _ in range(2):  # the second time from the prefix cache
            outputs.append([list(o.tokens) for o in engine.generate(prompts, GREEDY)])
        assert_clean(engine)
    assert outputs[0] == outputs[1] == outputs[2] == outputs[3]


def test_bytes_follow_the_papers_window(tmp_path: Path) -> None:
    """residual=0: full keys of the window that is not complete, low-rank ones of those before: a saw-tooth."""
    model, P = tiny(), 4
    form = fitted(model, tmp_path / "fit", keys=0.25, values=0.5, residual=0)
    engine = Engine(model, None, EngineConfig(block_size=P, cache="400tok", cache_form=form, max_sequences=1))
    assert engine.storage.block_bytes == 2 * P * (4 + 8) * 4  # layers, entries, channels of keys and values, float32
    request = Request(TOKENS[0, :10].tolist(), GREEDY)
    engine.add(request)
    whole = []
    while engine.busy:
        sample = request.sequences[0]
        engine.step()
        if engine.busy:
            whole.append(sample.job.computed - sample.coded)
    assert whole == [n % P for n in range(10, 10 + len(whole))]


def test_four_bits_take_a_quarter(tmp_path: Path) -> None:
    model = tiny().to(torch.bfloat16)
    fitted(model, tmp_path / "fit")
    sizes = {}
    for bits in (4, 16):
        form = Cskv(Config(fit=str(tmp_path / "fit"), bits=bits), E, torch.bfloat16)
        form.begin(model.config)
        sizes[bits] = form.bytes_of_layers(2, 2, 64)
    assert 0.25 < sizes[4] / sizes[16] < 0.5


def test_what_does_not_go_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="modicum fit MODEL cskv"):
        Engine(tiny(), None, EngineConfig(cache="1ktok", cache_form="cskv"))
    form = fitted(tiny(), tmp_path / "fit")
    with pytest.raises(UserError, match="kv=h2o"):
        Engine(tiny(), None, EngineConfig(cache="1ktok", cache_form=form, kv="h2o", prefix_cache=False))
    other = Decoder(dataclasses.replace(tiny().config, layers=3))
    with pytest.raises(UserError, match="another model"):
        Engine(other, None, EngineConfig(cache="1ktok", cache_form=form))
