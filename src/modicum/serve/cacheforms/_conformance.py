"""What must hold for any cache form: codes of entries, an engine that works from them, and bytes that are fewer."""

from __future__ import annotations

import torch

from modicum.core import registry
from modicum.core.choice import Choice
from modicum.model.config import llama_like
from modicum.model.decoder import Decoder
from modicum.serve.cacheforms import CacheForm
from modicum.serve.config import EngineConfig
from modicum.serve.engine import Engine
from modicum.serve.request import SamplingParams

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
PROMPTS = [[5, 9, 2, 7] * 6, list(range(1, 40)), [3], [5, 9, 2, 7] * 6 + [1, 2]]


def _choice(key: str) -> Choice:
    toy = getattr(registry.load("cacheform", key).module, "TOY", None)
    return Choice("cacheform", key, vars(toy) if toy is not None else {})


def _form(key: str, dtype: torch.dtype = torch.float32) -> CacheForm:
    form: CacheForm = registry.build("cacheform", _choice(key), 8, dtype)
    return form


def _engine(key: str, **more: object) -> Engine:
    shape = llama_like(64, 32, 2, heads=4, kv_heads=2, context_length=128)
    model = Decoder(shape, torch.Generator().manual_seed(3))
    with torch.no_grad():  # livelier than a fresh initialisation, whose outputs hardly differ
        for name, p in model.named_parameters():
            if p.dim() == 2 and "embed" not in name:
                p.mul_(4.0)
    given = {"block_size": 4, "cache": "400tok", "cache_form": _choice(key)} | more
    return Engine(model, None, EngineConfig(**given))  # type: ignore[arg-type]


def check_codes_come_back(key: str) -> None:
    """Leading dimensions stay, zeros stay zeros, nothing is further off than the numbers are apart, twice is once."""
    for dtype in (torch.float32, torch.bfloat16):
        form = _form(key, dtype)
        x = torch.randn(3, 2, 4, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
        for which in "kv":
            codes = form.encode(which, x)
            assert all(part.shape[:2] == x.shape[:2] for part in codes), "a leading dimension is lost"
            back = form.decode(which, codes)
            assert back.shape == x.shape and back.dtype == dtype, f"{tuple(back.shape)} {back.dtype} come back"
            error, spread = (back.float() - x.float()).abs().max(), x.float().max() - x.float().min()
            assert error <= spread / 4, f"{which}: an error of {error:.3f}, the numbers are {spread:.3f} apart"
            one = form.decode(which, form.encode(which, x[1]))
            assert torch.equal(one, back[1]), "codes depend on what is coded beside"
            nothing = [torch.zeros_like(part) for part in codes]
            assert not form.decode(which, tuple(nothing)).any(), "blank memory is not zeros"
            if form.rowwise:
                some = form.encode(which, x[0, :, :3])
                assert all(part.shape[1] == 3 for part in some), "a part has no row for each entry"


def check_bytes_are_counted(key: str) -> None:
    """What the engine says it takes is what its tensors take, and not more than the plain cache."""
    engine, plain = _engine(key), _engine("plain")
    parts = [part for x in (engine.storage.k, engine.storage.v) for part in x.codes]
    assert sum(part.nbytes for part in parts) == engine.stats()["cache_bytes"], "the tensors are of another size"
    assert engine.storage.block_bytes <= plain.storage.block_bytes, "a block takes more than a plain one"


def check_an_engine_works_from_it(key: str) -> None:
    """Outputs are whole and the same in any batch and with the prefix cache off; everything is given back."""
    alone = [_engine(key, max_sequences=1, prefix_cache=False).generate([p], GREEDY)[0].tokens for p in PROMPTS]
    modes: list[dict[str, object]] = [{"prefix_cache": False}, {"prefix_cache": False, "max_sequences": 2}]
    for mode in modes:
        engine = _engine(key, **mode)
        for turn in ("first", "second"):
            got = [o.tokens for o in engine.generate(PROMPTS, GREEDY)]
            assert got == alone, f"{mode}, {turn} turn: outputs differ from those of each prompt alone"
    rough: list[dict[str, object]] = [
        {"cache": "72tok"},
        {"chunked_prefill": True, "max_batch_tokens": 8},
        {"prefix_cache": True},
    ]
    for mode in rough:  # a chunk, a found prefix and a second start read codes where a whole prompt reads none
        engine = _engine(key, **mode)
        for _ in range(2):
            assert [len(o.tokens) for o in engine.generate(PROMPTS, GREEDY)] == [12] * 4, f"{mode}: not whole"
        assert engine.counters["failures"] == 0 and engine.blocks.free == engine.blocks.n_blocks
        engine.blocks.check()
