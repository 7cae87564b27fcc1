"""Policies by scores keep the entries that the package kvpress keeps, on the same weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from serve_tools import lively

from modicum.model.config import llama_like
from modicum.model.decoder import Decoder
from modicum.model.folder import save_model
from modicum.serve.config import EngineConfig
from modicum.serve.engine import Engine
from modicum.serve.request import Request, SamplingParams

kvpress = pytest.importorskip("kvpress")
PROMPT = 120


def _model() -> Decoder:
    shape = llama_like(300, 64, 3, heads=4, kv_heads=2, context_length=256)
    return lively(Decoder(shape, torch.Generator().manual_seed(7)))


def _scores(model: Decoder, press: Any, prompt: torch.Tensor, path: Path) -> list[torch.Tensor]:
    """What the press scores each entry with, by layer (G, S)."""
    transformers = pytest.importorskip("transformers")
    save_model(model, path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager").eval()
    found: list[torch.Tensor] = []
    given = press.score

    def score(*args: Any, **kwargs: Any) -> torch.Tensor:
        found.append(given(*args, **kwargs))
        return found[-1]

    press.score = score
    with torch.no_grad(), press(theirs):
        theirs.model(prompt[None], past_key_values=transformers.DynamicCache(), cache_position=torch.arange(PROMPT))
    return [scores[0] for scores in found]


@pytest.mark.parametrize(
    "kv, press",
    [
        ("snapkv:budget=60,window=8,kernel=5", lambda: kvpress.SnapKVPress(0.5, window_size=8, kernel_size=5)),
        ("snapkv:budget=36,window=16,kernel=3", lambda: kvpress.SnapKVPress(0.7, window_size=16, kernel_size=3)),
        ("snapkv:budget=90,window=32,kernel=7", lambda: kvpress.SnapKVPress(0.25, window_size=32, kernel_size=7)),
        (
            "pyramidkv:budget=60,window=8,kernel=5,pooling=mean,beta=4",
            lambda: kvpress.PyramidKVPress(0.5, window_size=8, kernel_size=5, beta=4),
        ),
        ("knorm:budget=40", lambda: kvpress.KnormPress(0.5)),
        ("expected-attention:budget=40,window=120", lambda: kvpress.ExpectedAttentionPress(0.5)),
        (
            "expected-attention:budget=70,window=120,future=100,sinks=1",
            lambda: kvpress.ExpectedAttentionPress(0.5, n_future_positions=100, n_sink=1),
        ),
    ],
)
def test_the_entries_with_their_best_scores_are_kept(tmp_path: Path, kv: str, press: Any) -> None:
    model = _model()
    prompt = torch.randint(1, 300, (PROMPT,), generator=torch.Generator().manual_seed(8))
    scores_LGS = _scores(model, press(), prompt, tmp_path)
    engine = Engine(model, None, EngineConfig(block_size=4, cache="600tok", kv=kv))
    request = Request(prompt.tolist(), SamplingParams(temperature=0, max_tokens=2, ignore_eos=True))
    engine.add(request)
    engine.step()
    pages = engine.samples[request.sequences[0].id].pages
    assert pages is not None and len(scores_LGS) == 3
    counts = []
    for layer, scores_GS in enumerate(scores_LGS):
        entries = engine.storage.entries_of_pages(layer, pages)
        counts.append(entries.counts[0])
        for g in range(2):
            kept = entries.position_GS[g, : entries.counts[g]]
            assert kept.tolist() == sorted(scores_GS[g].topk(entries.counts[g]).indices.tolist())
    assert (len(set(counts)) > 1) == kv.startswith("pyramidkv")
    engine.abort(request.id)


def test_attention_received_is_that_of_their_observed_attention(tmp_path: Path) -> None:
    """Which divides each sum by how many tokens could see the entry; h2o does not."""
    model = _model()
    prompt = torch.randint(1, 300, (PROMPT,), generator=torch.Generator().manual_seed(9))
    scores_LGS = _scores(model, kvpress.ObservedAttentionPress(0.5), prompt, tmp_path)
    engine = Engine(model, None, EngineConfig(block_size=4, cache="600tok", kv="h2o:budget=1", prefix_cache=False))
    request = Request(prompt.tolist(), SamplingParams(temperature=0, max_tokens=2, ignore_eos=True))
    engine.add(request)
    engine.step()
    policy = request.sequences[0].policy
    for layer, scores_GS in enumerate(scores_LGS):
        want_GS = scores_GS * torch.arange(PROMPT, 0, -1)
        assert torch.allclose(policy.mass[layer], want_GS, rtol=2e-3, atol=1e-4)
    engine.abort(request.id)
