"""What must hold for any residency: the same logits from a folder, in an engine too, and bytes that are counted."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path

import torch

from modicum.core import registry
from modicum.core.choice import Choice
from modicum.core.files import write_json
from modicum.model.config import llama_like
from modicum.model.decoder import Decoder
from modicum.model.elastic import nbytes
from modicum.serve.config import EngineConfig
from modicum.serve.engine import Engine
from modicum.serve.request import SamplingParams
from modicum.serve.residency import NOTE, Residency, load_prepared, note

PROMPTS = [[5, 9, 2, 7] * 6, list(range(1, 40)), [3]]
GREEDY = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)
TOKENS = torch.randint(1, 64, (4, 16), generator=torch.Generator().manual_seed(2))


def _model() -> Decoder:
    """Of ReLU neurons, with biases: what every method must be able to serve."""
    shape = llama_like(64, 32, 2, 4, mlp_width=96, context_length=128, activation="relu", gated=False, mlp_bias=True)
    model = Decoder(shape, torch.Generator().manual_seed(3))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() == 2 and "embed" not in name:
                p.mul_(4.0)
            elif name.endswith("bias"):
                p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name))))
    return model.eval()


def _prepared(key: str, root: Path) -> tuple[Residency, Decoder]:
    loaded = registry.load("residency", key, Residency)
    choice = Choice("residency", key, dataclasses.asdict(getattr(loaded.module, "TOY", loaded.config())))
    method: Residency = registry.build("residency", choice)
    method.prepare(_model(), root, TOKENS)
    write_json(root / NOTE, note(choice))
    return load_prepared(root)


def check_it_computes_what_the_model_does(key: str) -> None:
    """Whole sequences and single tokens, with the toy's knobs, under which nothing is left out."""
    with tempfile.TemporaryDirectory() as name, torch.no_grad():
        _, model = _prepared(key, Path(name))
        plain = _model()
        torch.testing.assert_close(model(TOKENS), plain(TOKENS), atol=1e-4, rtol=1e-4)
        for row in TOKENS:
            torch.testing.assert_close(model(row[None, :1]), plain(row[None, :1]), atol=1e-4, rtol=1e-4)


def check_an_engine_serves_it(key: str) -> None:
    """Greedy tokens are those of the model in memory."""
    with tempfile.TemporaryDirectory() as name:
        _, model = _prepared(key, Path(name))
        outputs = []
        for one in (model, _model()):
            engine = Engine(one, None, EngineConfig(block_size=4, cache="400tok"))
            outputs.append([list(o.tokens) for o in engine.generate(PROMPTS, GREEDY)])
            assert engine.counters["failures"] == 0
        assert outputs[0] == outputs[1]


def check_bytes_are_counted(key: str) -> None:
    """Weights in memory are at most those of the model, and what is not there is read."""
    with tempfile.TemporaryDirectory() as name, torch.no_grad():
        method, model = _prepared(key, Path(name))
        model(TOKENS[:1])
        stats, whole = method.stats(model), nbytes(_model())
        assert set(stats) == {"resident_bytes", "read_bytes", "reads"}
        assert stats["resident_bytes"] <= 1.1 * whole, "predictors and tables take more than what they replace"
        assert stats["read_bytes"] > 0 or stats["resident_bytes"] >= whole
