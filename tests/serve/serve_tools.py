"""Small real models and tokenizers for the tests of the serve room."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from modicum.data.tokenizer import Tokenizer
from modicum.model.config import llama_like
from modicum.model.decoder import Decoder
from modicum.model.folder import save_model
from modicum.serve.config import EngineConfig
from modicum.serve.engine import Engine
from modicum.serve.kv import KVPolicy
from modicum.serve.request import Request, SamplingParams

torch.set_num_threads(1)  # models this small are slower on two

TEXT = (
    "The cache holds keys and values; the scheduler says who runs. Größe, naïve, 日本語のテキスト, "
    "emoji 👩‍👩‍👧 🚀, and def f(x):\n    return x + 1\n"
)


def tokenizer() -> Tokenizer:
    return Tokenizer.train([TEXT] * 4, 400)


def lively(model: Decoder, factor: float = 4.0) -> Decoder:
    """A fresh initialisation repeats itself; larger matrices make the greedy output vary."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and "embed" not in name and "lm_head" not in name:
                parameter.mul_(factor)
    return model


def tiny(vocab_size: int = 400, context_length: int = 256, seed: int = 0) -> Decoder:
    shape = llama_like(vocab_size, 32, 2, heads=4, kv_heads=2, context_length=context_length)
    return lively(Decoder(shape, torch.Generator().manual_seed(seed)))


def engine(**config: object) -> Engine:
    defaults: dict[str, object] = {"block_size": 8, "cache": "2ktok"}
    return Engine(tiny(), tokenizer(), EngineConfig(**(defaults | config)))  # type: ignore[arg-type]


def folder(path: Path) -> Path:
    """A model folder as a user would have it."""
    save_model(tiny(), path)
    tokenizer().save(path)
    return path


def assert_crowd_says(
    crowd: Engine,
    asks: Sequence[tuple[list[int], SamplingParams]],
    want: list[list[int]],
    rng: random.Random,
    leave: int,
) -> None:
    """Requests that come at random times, of which `leave` go early, are answered with `want`; then all is clean."""
    requests = [Request(p, s) for p, s in asks]
    heard: dict[int, list[int]] = {r.id: [] for r in requests}
    gone = {r.id for r in rng.sample(requests, leave)}
    todo = list(requests)
    while todo or crowd.busy:
        for _ in range(rng.randint(0, 2)):
            if todo:
                crowd.add(todo.pop())
        for update in crowd.step():
            assert update.error is None
            heard[update.request] += update.tokens
            if update.request in gone and len(heard[update.request]) > 2:
                crowd.abort(update.request)
        crowd.blocks.check()
    for request, tokens in zip(requests, want, strict=True):
        said = heard[request.id]
        assert said == (tokens[: len(said)] if request.id in gone else tokens)
    assert crowd.counters["preemptions"] > 0
    assert_clean(crowd)


def show(policy: KVPolicy, layer: int, start: int, q_HTE: Tensor, k_GTE: Tensor, v_GTE: Tensor) -> None:
    """Of a step's tokens from place `start` on, those that the policy observes."""
    if positions := policy.observed(start, q_HTE.shape[1]):
        rows = slice(positions.start - start, positions.stop - start)
        policy.observe(layer, positions.start, q_HTE[:, rows], k_GTE[:, rows], v_GTE[:, rows])


def assert_clean(engine: Engine) -> None:
    """Nothing is held, nothing waits, every row is free."""
    engine.blocks.check()
    stats = engine.stats()
    assert stats["used_blocks"] == 0 and engine.pages.free == 0
    assert stats["running"] == stats["waiting"] == 0
    assert not engine.requests and not engine.samples and len(engine.cache.slots) == engine.config.max_sequences
