"""Mixers are found by their place; one of another distribution trains, is stored and is served."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from modicum.core.errors import UserError
from modicum.model import mixers
from modicum.model.config import by_layer, llama_like
from modicum.model.decoder import Decoder
from modicum.model.folder import load_model, save_model
from modicum.model.generate import greedy
from modicum.serve.config import EngineConfig
from modicum.serve.engine import Engine
from modicum.serve.request import SamplingParams

PLUGIN = """
    import torch
    from torch import nn
    from modicum.model.mixers.softmax import Softmax

    class Gated(Softmax):
        def __init__(self, config, layer):
            super().__init__(config, layer)
            self.gate = nn.Linear(config.width, self.o.in_features, bias=False)

        def forward(self, x_BTD, rotation, attend):
            return self.o(torch.sigmoid(self.gate(x_BTD)) * self.heads(x_BTD, rotation, attend))

        @classmethod
        def matmul_weights(cls, layer, width):
            return super().matmul_weights(layer, width) + width * layer.heads * layer.head_dim
"""
TOKENS = torch.arange(24)[None] * 31 % 97


@pytest.fixture
def gated(install_plugin) -> Iterator[None]:
    install_plugin("modicum.mixers:gated", "gated_plugin", PLUGIN)
    mixers.mixers.cache_clear()
    yield
    mixers.mixers.cache_clear()
    mixers.load.cache_clear()


def decoder() -> Decoder:
    columns = by_layer(mixer=("gated", "softmax", "gated"), attention=(None, None, "lambda:window=5,sinks=2"))
    shape = llama_like(97, 32, 3, heads=4, kv_heads=2, context_length=64, overrides=columns)
    return Decoder(dataclasses.replace(shape, family="modicum"), torch.Generator().manual_seed(0)).eval()


def test_a_mixer_of_another_distribution(gated: None, tmp_path: Path) -> None:
    from modicum.model.linear._module import unique_tensors

    model = decoder()
    assert model.config.parameters() == sum(p.numel() for p in model.parameters())
    plain = llama_like(97, 32, 3, heads=4, kv_heads=2)
    assert model.config.parameters() - plain.parameters() == 2 * 32 * 32
    assert model.config.flops_per_token(3) - plain.flops_per_token(3) == 2 * 2 * 32 * 32
    losses = []
    for _ in range(5):  # it trains
        loss = torch.nn.functional.cross_entropy(model(TOKENS[:, :-1]).flatten(0, 1), TOKENS[0, 1:])
        loss.backward()
        losses.append(loss.item())
        with torch.no_grad():
            for p in model.parameters():
                p -= 0.5 * p.grad
                p.grad = None
    assert losses[-1] < losses[0] and model.layers[0].attention.gate.weight.abs().sum() > 0
    save_model(model, tmp_path / "m")
    again = load_model(tmp_path / "m")
    assert unique_tensors(again).keys() == unique_tensors(model).keys()
    assert torch.equal(again(TOKENS), model(TOKENS))
    answer = Engine(again, None, EngineConfig(block_size=4, cache="64tok")).generate(
        [TOKENS[0].tolist()], SamplingParams(max_tokens=6, temperature=0)
    )[0]
    tokens = TOKENS
    for _ in range(6):
        tokens = torch.cat([tokens, model(tokens)[:, -1:].argmax(-1)], 1)
    assert answer.tokens == tokens[0, -6:].tolist() == greedy(model, TOKENS, 6, eos_ids=())[0, -6:].tolist()


def test_what_is_not_there_is_refused(gated: None) -> None:
    assert {"gated", "softmax", "mla", "swiftkv"} <= set(mixers.mixers())
    with pytest.raises(UserError, match="Did you mean 'gated'"):
        Decoder(llama_like(97, 32, 1, mixer="gatd"))
    mixers.mixers.cache_clear()
    mixers.load.cache_clear()
