"""Decoders whose layers differ: described layer by layer, counted, stored, trained and served."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from modicum.core.errors import UserError
from modicum.model.cache import ContiguousCache
from modicum.model.config import DecoderConfig, Rope, by_layer, llama_like
from modicum.model.decoder import Decoder
from modicum.model.families import read_config, write_config
from modicum.model.folder import load_config, load_model, save_model
from modicum.model.generate import greedy
from modicum.serve.config import EngineConfig
from modicum.serve.engine import Engine
from modicum.serve.native.support import unserved
from modicum.serve.request import SamplingParams

UNEVEN = by_layer(
    heads=(4, 6, 2),
    kv_heads=(2, 3, 1),
    head_dim=(16, 8, 16),
    mlp_width=(96, 40, 128),
    window=(None, 9, None),
    rope=(Rope(theta=100.0), Rope(fraction=0.5), None),
    activation=("silu", "gelu", "relu"),
)


def shape(**more) -> DecoderConfig:
    base = llama_like(97, 48, 3, heads=4, kv_heads=2, head_dim=16, mlp_width=64, context_length=128)
    return dataclasses.replace(base, **({"family": "modicum", "overrides": UNEVEN} | more))


def decoder(**more) -> Decoder:
    return Decoder(shape(**more), torch.Generator().manual_seed(0)).eval()


TOKENS = torch.arange(23)[None] * 7 % 97


def test_flat_fields_are_what_all_layers_share():
    config = shape(overrides=by_layer(window=(7, 7, 7), mlp_width=(64, 80, 64)))
    assert config.window == 7 and config.overrides == ({}, {"mlp_width": 80}, {})
    assert config == shape(window=7, overrides=({}, {"mlp_width": 80}, {}))
    assert [layer.mlp_width for layer in config.per_layer] == [64, 80, 64] and config.varying == {"mlp_width"}
    assert dataclasses.replace(config, mlp_width=80) != config
    assert dataclasses.replace(config, heads=2, kv_heads=1).per_layer[1].heads == 2
    assert shape(position="learned", overrides=()).per_layer[0].rope is None


@pytest.mark.parametrize(
    "overrides, message",
    [
        (({"head": 3}, {}, {}), "Did you mean 'heads'"),
        (({"heads": 3}, {}, {}), "kv_heads=2 must divide heads=3"),
        (({}, {"mlp_width": 0}, {}), "mlp_width=0 must be at least 1"),
        (({},), "1 entries for 3 layers"),
    ],
)
def test_impossible_layers_are_refused(overrides, message):
    with pytest.raises(UserError, match=message):
        shape(overrides=overrides)


def test_counts_are_those_of_the_model_that_is_built():
    model = decoder()
    assert model.config.parameters() == sum(p.numel() for p in model.parameters())
    bare = decoder(overrides=tuple(o | {"window": None} for o in UNEVEN))
    with FlopCounterMode(display=False) as counter:  # where gradients are wanted, attention is products that it sees
        bare.to(torch.bfloat16)(TOKENS)
    T = TOKENS.shape[1]
    full = sum(2 * 2 * c.heads * c.head_dim * T * T for c in bare.config.per_layer)
    counted = counter.get_total_flops() - full + full * (T + 1) / (2 * T)
    assert bare.config.flops_per_token(T) * T == pytest.approx(counted)
    cache = ContiguousCache(model.config, 3, 7)
    assert model.config.kv_bytes_per_token("float32") * 3 * 7 == sum(x.nbytes for x in cache.k + cache.v)


def test_folder_round_trip(tmp_path):
    model = decoder()
    save_model(model, tmp_path / "m")
    again = load_model(tmp_path / "m")
    assert again.config == model.config == load_config(tmp_path / "m")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert torch.equal(model(TOKENS), again(TOKENS))
    written = json.loads((tmp_path / "m" / "config.json").read_text())
    assert written["model_type"] == "modicum" and written["overrides"][2]["rope"] is None
    for key, value in (("overrides", [{"heads": 3}, {}, {}]), ("width", None)):
        with pytest.raises(UserError):
            read_config(written | {key: value})


def test_other_families_refuse_what_they_cannot_say():
    with pytest.raises(UserError, match=r"a llama config.json cannot say overrides=.*modicum can say any"):
        write_config(shape(family="llama"), "float32")


def test_cached_generation_and_engine_equal_one_pass():
    model = decoder()
    expected = TOKENS
    for _ in range(8):  # no cache at all
        expected = torch.cat([expected, model(expected)[:, -1:].argmax(-1)], 1)
    assert torch.equal(greedy(model, TOKENS, 8, eos_ids=()), expected)
    engine = Engine(model, None, EngineConfig(block_size=4, cache="64tok", max_batch_tokens=16))
    prompts = [TOKENS[0, :n].tolist() for n in (23, 5, 12)]
    answers = engine.generate(prompts, SamplingParams(max_tokens=6, temperature=0))
    for prompt, answer in zip(prompts, answers, strict=True):
        alone = greedy(model, torch.tensor([prompt]), 6, eos_ids=())
        assert answer.completions[0].tokens == alone[0, -6:].tolist()


def test_padding_would_not_hide_a_wrong_head():
    """The engine's logits, not only its choices."""
    from modicum.model.attend import DenseAttend
    from modicum.serve.uneven import PaddedAttend

    model = decoder()
    with torch.no_grad():
        padded = model(TOKENS, attend=PaddedAttend(DenseAttend(), model.config))
        torch.testing.assert_close(padded, model(TOKENS), atol=1e-5, rtol=1e-5)


def test_every_layer_trains():
    model = decoder().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(30):
        logits = model(TOKENS[:, :-1])
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), TOKENS[0, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    assert losses[-1] < losses[0] / 4


def test_what_needs_equal_layers_says_so(tmp_path):
    from modicum.model.gguf.write import Types, write

    model = decoder()
    assert unserved(model, torch.float32) == ("layers that differ in activation, head_dim, heads, kv_heads, mlp_width")
    with pytest.raises(UserError, match=r"layers of different shapes.*kv=full"):
        Engine(model, None, EngineConfig(kv="snapkv"))
    named = decoder(family="qwen3", qk_norm="head")
    with pytest.raises(UserError, match=r"cannot compute layers that differ in activation, head_dim"):
        write(named, tmp_path / "m.gguf", Types(matrices="f32"))
