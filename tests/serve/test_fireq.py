"""Reference test of cacheform/fireq: factors that commute with the rotation, codes one by one, what smoothing gains."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from serve_tools import assert_clean, tiny

from modicum.core.choice import Choice
from modicum.core.errors import UserError
from modicum.model.config import Rope
from modicum.model.decoder import Decoder
from modicum.model.rope import RopeTable, rotate
from modicum.serve.cacheforms import fireq as method
from modicum.serve.cacheforms._fitted import fit_form, write_fit
from modicum.serve.config import EngineConfig
from modicum.serve.engine import Engine
from modicum.serve.request import SamplingParams

E = 8
TOKENS = torch.randint(1, 400, (4, 32), generator=torch.Generator().manual_seed(5))


def outlying(channels: tuple[int, ...] = (1, 5)) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys some of whose channels are large, and the moment of queries in which those are small."""
    random = torch.Generator().manual_seed(0)
    k, q = torch.randn(200, E, generator=random), torch.randn(200, E, generator=random)
    for c in channels:
        k[:, c] *= 20
        q[:, c] /= 20
    return k, q.T @ q / len(q)


def fitted(model: Decoder, path: Path, **knobs: Any) -> str:
    write_fit(path, fit_form(Choice("cacheform", "fireq", knobs), model, TOKENS), model.config)
    return f"fireq:fit={path}"


def test_a_factor_for_a_pair_commutes_with_the_rotation() -> None:
    """(q f) . (k / f), both rotated after, is q . k; with factors that differ within a pair it is not."""
    random = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 1, 6, E, dtype=torch.float64, generator=random) for _ in "qk")
    table = RopeTable(Rope(), E, 128)
    here, there = (table(torch.tensor([p]), q.dtype) for p in ([3, 9, 27, 60, 5, 1], [0, 2, 4, 90, 7, 8]))
    half = torch.rand(E // 2, dtype=torch.float64, generator=random) + 0.5

    def scores(f: torch.Tensor) -> torch.Tensor:
        return rotate(q * f, *here) @ rotate(k / f, *there).mT

    plain = scores(torch.ones(E, dtype=torch.float64))
    torch.testing.assert_close(scores(half.repeat(2)), plain, atol=1e-6, rtol=1e-6)
    assert not torch.allclose(scores(torch.cat([half, half.flip(0)])), plain, atol=1e-2)


def test_the_factors_of_a_pair_are_one() -> None:
    k, moment = outlying()
    f = method.factors(k, moment, method.Config(worst=0))
    assert torch.equal(f[: E // 2], f[E // 2 :]) and float(f[1]) > 3 * float(f[0])
    assert torch.equal(method.factors(k, moment, method.Config(worst=0, pairs=False)), torch.ones(E))


@pytest.mark.parametrize("channels", [(1, 5), (2,)])
def test_smoothing_loses_fewer_scores(channels: tuple[int, ...]) -> None:
    """Pairs for outliers that rotate together; factors of their own for those that do not."""
    k, moment = outlying(channels)
    lost = {}
    for name, config in (
        ("none", method.Config(pairs=False, worst=0)),
        ("pairs", method.Config(worst=0)),
        ("own", method.Config(pairs=False, worst=1)),
        ("both", method.Config(worst=1)),
    ):
        lost[name] = method.scores_lost(k, method.factors(k, moment, config), moment)
    assert lost["pairs"] < 0.3 * lost["none"] and lost["own"] < 0.5 * lost["none"]
    assert lost["both"] <= lost["pairs"]


def test_codes_are_those_of_numbers_one_by_one(tmp_path: Path) -> None:
    model = tiny()
    fitted(model, tmp_path / "fit")
    form = method.FireQ(method.Config(fit=str(tmp_path / "fit")), E, torch.float32)
    form.begin(model.config)
    x = torch.randn(2, 3, 4, E, generator=torch.Generator().manual_seed(1))
    at = torch.zeros(3, 4, dtype=torch.int64)
    for which in "kv":
        codes = form.encode_layer(which, 1, x, at)
        assert codes[0].dtype == torch.uint8 and codes[0].shape == (3, 4, 2 * E // 2) and codes[1].shape == (3, 4, 2)
        got = form.decode_layer(which, 1, codes, at)
        for g in range(2):
            f = form.factor_LGE[1, g].double() if which == "k" else torch.ones(E, dtype=torch.float64)
            for row, back in zip(x[g].flatten(0, 1).double() / f, got[g].flatten(0, 1), strict=True):
                scale = float((row.abs().max().float() / 7).bfloat16())
                steps = [max(-7, min(7, round(float(v) / scale))) for v in row]
                want = scale * torch.tensor(steps, dtype=torch.float64) * f
                torch.testing.assert_close(back.double(), want, atol=1e-5, rtol=1e-4)


def test_an_entry_takes_four_bits_a_number_and_a_scale(tmp_path: Path) -> None:
    model = tiny().to(torch.bfloat16)
    form = fitted(model, tmp_path / "fit")
    engine = Engine(model, None, EngineConfig(block_size=8, cache="400tok", cache_form=form))
    plain = Engine(model, None, EngineConfig(block_size=8, cache="400tok"))
    assert engine.storage.block_bytes == plain.storage.block_bytes * (E / 2 + 2) / (2 * E)
    outputs = engine.generate([TOKENS[0].tolist()], SamplingParams(temperature=0, max_tokens=12, ignore_eos=True))
    assert len(outputs[0].tokens) == 12
    assert_clean(engine)


def test_keys_that_are_rotated_in_part_are_refused() -> None:
    part = dataclasses.replace(tiny().config, rope=Rope(fraction=0.5))
    with pytest.raises(UserError, match="in part"):
        fit_form(Choice("cacheform", "fireq"), Decoder(part), TOKENS)
