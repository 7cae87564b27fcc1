"""kv/snapkv keeps the entries that the package kvpress keeps, on the same weights."""

from __future__ import annotations

from pathlib import Path

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


@pytest.mark.parametrize("window, kernel, ratio", [(8, 5, 0.5), (16, 3, 0.7), (32, 7, 0.25)])
def test_snapkv_keeps_what_kvpress_keeps(tmp_path: Path, window: int, kernel: int, ratio: float) -> None:
    transformers = pytest.importorskip("transformers")
    shape = llama_like(300, 64, 2, heads=4, kv_heads=2, context_length=256)
    model = lively(Decoder(shape, torch.Generator().manual_seed(7)))
    save_model(model, tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    prompt = torch.randint(1, 300, (120,), generator=torch.Generator().manual_seed(8))
    press = kvpress.SnapKVPress(compression_ratio=ratio, window_size=window, kernel_size=kernel)
    whole, pressed = transformers.DynamicCache(), transformers.DynamicCache()
    with torch.no_grad():
        theirs.model(prompt[None], past_key_values=whole)
        with press(theirs):
            theirs.model(prompt[None], past_key_values=pressed, cache_position=torch.arange(120))

    budget = int(120 * (1 - ratio))
    kv = f"snapkv:budget={budget},window={window},kernel={kernel}"
    engine = Engine(model, None, EngineConfig(block_size=4, cache="600tok", kv=kv))
    request = Request(prompt.tolist(), SamplingParams(temperature=0, max_tokens=2, ignore_eos=True))
    engine.add(request)
    engine.step()
    pages = engine.samples[request.sequences[0].id].pages
    assert pages is not None
    for layer in range(2):
        entries = engine.storage.entries_of_pages(layer, pages)
        for g in range(2):
            full_SE, kept_CE = whole.layers[layer].keys[0, g], pressed.layers[layer].keys[0, g]
            distance_CS = torch.cdist(kept_CE, full_SE, compute_mode="donot_use_mm_for_euclid_dist")
            assert float(distance_CS.min(dim=1).values.max()) < 1e-4
            want = sorted(distance_CS.argmin(dim=1).tolist())
            assert entries.position_GS[g, : entries.counts[g]].tolist() == want
    engine.abort(request.id)
