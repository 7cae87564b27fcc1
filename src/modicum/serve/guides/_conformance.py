"""What must hold for any guide, on toy models: batch-invariant outputs, numbers for logits, bytes that are counted."""

from __future__ import annotations

import dataclasses
import functools
import tempfile
from pathlib import Path
from typing import Any

import torch

from modicum.core import registry
from modicum.core.choice import Choice
from modicum.model.config import llama_like
from modicum.model.decoder import Decoder
from modicum.model.folder import save_model
from modicum.serve.config import EngineConfig
from modicum.serve.engine import Engine
from modicum.serve.guides import Guide
from modicum.serve.request import SamplingParams

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
PROMPTS = [[5, 9, 2, 7] * 6, list(range(1, 40)), [3], [5, 9, 2, 7] * 6 + [1, 2]]


def _decoder(seed: int, width: int = 32, layers: int = 2) -> Decoder:
    shape = llama_like(64, width, layers, heads=4, kv_heads=2, context_length=128)
    model = Decoder(shape, torch.Generator().manual_seed(seed))
    with torch.no_grad():  # livelier than a fresh initialisation, whose outputs hardly differ
        for name, p in model.named_parameters():
            if p.dim() == 2 and "embed" not in name:
                p.mul_(4.0)
    return model


@functools.cache
def _choice(key: str) -> Choice:
    """The toy's knobs, with a small model for each folder."""
    loaded = registry.load("guide", key, Guide)
    knobs: dict[str, Any] = dataclasses.asdict(getattr(loaded.module, "TOY", loaded.config()))
    for i, knob in enumerate(loaded.cls.folders):
        knobs[knob] = str(Path(tempfile.mkdtemp()) / "model")
        save_model(_decoder(10 + i, width=16, layers=1), knobs[knob])
    return Choice("guide", key, knobs)


def _engine(key: str, **more: object) -> Engine:
    given = {"block_size": 4, "cache": "400tok", "guide": _choice(key)} | more
    return Engine(_decoder(3), None, EngineConfig(**given))  # type: ignore[arg-type]


def check_logits_are_numbers(key: str) -> None:
    """Of the main model's shape, finite, whatever the models give; rows do not depend on each other."""
    guide: Guide = registry.build("guide", _choice(key))
    generator = torch.Generator().manual_seed(0)
    main_RV, *beside = (torch.randn(5, 64, generator=generator) * 20 for _ in range(1 + len(guide.models())))
    made = guide.combine(main_RV, beside)
    assert made.shape == main_RV.shape and bool(made.isfinite().all())
    one = guide.combine(main_RV[2:3], [x[2:3] for x in beside])
    torch.testing.assert_close(made[2:3], one)


def check_an_engine_works_with_it(key: str) -> None:
    """The same outputs in any batch, in chunks, from the prefix cache and with drafts; everything is given back."""
    alone = [_engine(key, max_sequences=1, prefix_cache=False).generate([p], GREEDY)[0].tokens for p in PROMPTS]
    modes: list[dict[str, object]] = [
        {},
        {"cache": "72tok"},
        {"chunked_prefill": True, "max_batch_tokens": 8},
        {"drafter": "prompt-lookup", "draft_when": "always"},
    ]
    for mode in modes:
        engine = _engine(key, **mode)
        for turn in ("first", "second"):
            got = [o.tokens for o in engine.generate(PROMPTS, GREEDY)]
            assert got == alone, f"{mode}, {turn} turn: outputs differ from those of each prompt alone"
        assert engine.counters["failures"] == 0 and engine.blocks.free == engine.blocks.n_blocks
        engine.blocks.check()


def check_bytes_are_counted(key: str) -> None:
    """A cache of given bytes holds the keys of all models."""
    engine = _engine(key, cache="64KiB")
    storages = [engine.storage, *engine.cache.beside]
    parts = [part for s in storages for x in (s.k, s.v) for part in x.codes]
    taken = sum(part.nbytes for part in parts)
    assert len(storages) == 1 + len(engine.guide.models())
    assert taken == engine.stats()["cache_bytes"] and 48 << 10 < taken <= 64 << 10
