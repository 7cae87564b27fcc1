"""What must hold for any KV policy: exact when nothing need go, within its word, all memory given back."""

from __future__ import annotations

import torch

from modicum.core import registry
from modicum.core.choice import Choice
from modicum.model.config import llama_like
from modicum.model.decoder import Decoder
from modicum.serve.config import EngineConfig
from modicum.serve.engine import Engine
from modicum.serve.kv import CacheShape, Entries, KVPolicy
from modicum.serve.request import SamplingParams

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
PROMPTS = [[5, 9, 2, 7] * 6, list(range(1, 40)), [3], [5, 9, 2, 7] * 6 + [1, 2]]


def _model() -> Decoder:
    shape = llama_like(64, 32, 2, heads=4, kv_heads=2, context_length=128)
    model = Decoder(shape, torch.Generator().manual_seed(3))
    with torch.no_grad():  # livelier than a fresh initialisation, whose outputs hardly differ
        for name, p in model.named_parameters():
            if p.dim() == 2 and "embed" not in name:
                p.mul_(4.0)
    return model


def _engine(key: str, **more: object) -> Engine:
    loaded = registry.load("kv", key)
    toy = getattr(loaded.module, "TOY", None)
    choice = Choice("kv", key, vars(toy) if toy is not None else {})
    more = {"prefix_cache": "prefix_cache" not in loaded.cls.conflicts} | more
    return Engine(_model(), None, EngineConfig(block_size=4, cache="400tok", kv=choice, **more))  # type: ignore[arg-type]


def _policy(key: str) -> KVPolicy:
    loaded = registry.load("kv", key)
    config = getattr(loaded.module, "TOY", None) or loaded.config()
    policy: KVPolicy = loaded.cls(
        config, CacheShape(layers=2, heads=4, kv_heads=2, head_dim=8, block_size=4, windows=(None, None))
    )
    policy.prepare(_model())
    return policy


def check_keep_is_within_allow(key: str) -> None:
    """`keep` names existing entries, each once, in order, and no more than `allow`."""
    policy = _policy(key).begin(40)
    generator = torch.Generator().manual_seed(0)
    for layer in range(2):
        q, k, v = (torch.randn(h, 40, 8, generator=generator) for h in (4, 2, 2))
        if policy.observes and (positions := policy.observed(0, 40)):
            rows = slice(positions.start, positions.stop)
            policy.observe(layer, positions.start, q[:, rows], k[:, rows], v[:, rows])
        if policy.marks:
            policy.mark(layer, torch.rand(2, 40, generator=generator))
        position = torch.arange(40).expand(2, 40)
        keep = policy.keep(layer, Entries(k, v, position, [40, 40]))
        kept, merged = keep.heads, keep.merged or [None, None]
        assert len(kept) == len(merged) == 2, f"{len(kept)} heads were answered for, there are 2"
        for index, new, allowed in zip(kept, merged, policy.allowed(layer, 40), strict=True):
            n_entries = len(index) + (0 if new is None else len(new.k_ME))
            assert n_entries <= allowed, f"{n_entries} entries are kept, {allowed} were allowed"
            assert len(index) > 0 and bool((index.diff() > 0).all()), "kept entries must ascend"
            assert int(index[0]) >= 0 and int(index[-1]) < 40, "a kept entry does not exist"
        for index, instead in zip(kept, keep.replaced or (), strict=bool(keep.replaced)):
            assert instead is None or all(x.shape == (len(index), 8) for x in instead), "replaced are not those kept"


def check_short_sequences_are_exact(key: str) -> None:
    """A prompt and answer that fit into what is allowed come out as with the full cache."""
    policy = _policy(key).begin(3)
    short = [[5, 9, 2]]
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    if all(min(policy.allowed(layer, n)) >= n for layer in range(2) for n in range(1, 8)):
        want = _engine("full").generate(short, params)[0].tokens
        got = _engine(key).generate(short, params)[0].tokens
        assert got == want, f"{got} instead of {want}, although nothing had to go"


def check_memory_comes_back(key: str) -> None:
    """After requests have ended, by themselves or aborted, every block is free; held bytes follow `allow`."""
    engine = _engine(key)
    outputs = engine.generate(PROMPTS, GREEDY)
    assert [len(o.tokens) for o in outputs] == [12] * len(PROMPTS), "an output is not whole"
    engine.blocks.check()
    assert engine.blocks.free == engine.blocks.n_blocks, "blocks are held after the end"
    assert engine.pages.free == 0, "pages are held after the end"
    for update in engine.stream(PROMPTS[1], GREEDY):
        sample = next(iter(engine.samples.values()), None)
        if sample is not None and update.tokens:
            _check_held(engine, key)
        if sample is not None and len(sample.tokens) > 45:
            break
    assert engine.blocks.free == engine.blocks.n_blocks, "blocks are held after an abort"
    engine.blocks.check()


def _check_held(engine: Engine, key: str) -> None:
    size = engine.config.block_size
    for sample in engine.samples.values():
        policy = sample.policy or _policy(key)
        if sample.pages is None:
            pages = [len(sample.blocks)] * (2 * engine.storage.layers)
        else:
            pages = sample.pages.pages_LG.flatten().tolist()
        for i, n_entries in enumerate(pages):
            allowed = policy.allowed(i // 2, sample.job.computed)[i % 2]
            assert n_entries <= -(-allowed // size) + 2, (
                f"a head of layer {i // 2} holds {n_entries} pages of {size}, {allowed} entries were allowed"
            )


def check_engine_modes(key: str) -> None:
    """Prefix cache, chunked prefill and a cache too small for all change no output (where it can be combined)."""
    conflicts = registry.load("kv", key).cls.conflicts
    prefix = "prefix_cache" not in conflicts
    want = [o.tokens for o in _engine(key, prefix_cache=False).generate(PROMPTS, GREEDY)]
    modes: list[dict[str, object]] = [{"prefix_cache": False, "max_sequences": 1}]
    if prefix:
        modes.append({"prefix_cache": True})
    if "chunked_prefill" not in conflicts:
        modes.append({"prefix_cache": prefix, "chunked_prefill": True, "max_batch_tokens": 8})
    for mode in modes:
        engine = _engine(key, **mode)
        for turn in ("first", "second"):
            got = [o.tokens for o in engine.generate(PROMPTS, GREEDY)]
            assert got == want, f"{mode}, {turn} turn: outputs differ"
