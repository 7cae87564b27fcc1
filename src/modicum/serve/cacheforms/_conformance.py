"""What must hold for any cache form: codes of entries, an engine that works from them, and bytes that are fewer."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from modicum.core import registry
from modicum.core.choice import Choice
from modicum.model.config import llama_like
from modicum.model.decoder import Decoder
from modicum.serve.cacheforms import CacheForm
from modicum.serve.cacheforms._fitted import FittedForm, fit_form, write_fit
from modicum.serve.config import EngineConfig
from modicum.serve.engine import Engine
from modicum.serve.request import SamplingParams

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
PROMPTS = [[5, 9, 2, 7] * 6, list(range(1, 40)), [3], [5, 9, 2, 7] * 6 + [1, 2]]


def _toy(key: str) -> Choice:
    toy = getattr(registry.load("cacheform", key).module, "TOY", None)
    return Choice("cacheform", key, vars(toy) if toy is not None else {})


def _model() -> Decoder:
    shape = llama_like(64, 32, 2, heads=4, kv_heads=2, context_length=128)
    model = Decoder(shape, torch.Generator().manual_seed(3))
    with torch.no_grad():  # livelier than a fresh initialisation, whose outputs hardly differ
        for name, p in model.named_parameters():
            if p.dim() == 2 and "embed" not in name:
                p.mul_(4.0)
    return model


@functools.cache
def _choice(key: str) -> Choice:
    """The toy's knobs, and for a form that is fitted a file of its fit on the toy model."""
    toy = _toy(key)
    if not issubclass(registry.load("cacheform", key).cls, FittedForm):
        return toy
    path, model = Path(tempfile.mkdtemp()) / "fit.safetensors", _model()
    tokens_NT = torch.randint(1, 64, (6, 40), generator=torch.Generator().manual_seed(2))
    write_fit(path, fit_form(toy, model, tokens_NT), model.config)
    return Choice("cacheform", key, toy.knobs | {"fit": str(path)})


def _form(key: str, dtype: torch.dtype = torch.float32) -> CacheForm:
    form: CacheForm = registry.build("cacheform", _choice(key), 8, dtype)
    form.begin(_model().config)
    return form


def _engine(key: str, **more: object) -> Engine:
    given = {"block_size": 4, "cache": "400tok", "cache_form": _choice(key)} | more
    return Engine(_model(), None, EngineConfig(**given))  # type: ignore[arg-type]


def _coder(form: CacheForm, which: str) -> tuple[Callable[[Tensor], tuple[Tensor, ...]], Callable[..., Tensor]]:
    """encode and decode of (blocks, heads, entries, E), in the last layer where a form knows the layer."""
    if not isinstance(form, FittedForm):
        return lambda x: form.encode(which, x), lambda codes: form.decode(which, codes)

    def at(n: int, p: int) -> Tensor:
        return torch.arange(n)[:, None] * 4 + torch.arange(p)

    return (
        lambda x: form.encode_layer(which, 1, x.transpose(0, 1), at(len(x), x.shape[2])),
        lambda codes: form.decode_layer(which, 1, codes, at(len(codes[0]), 4)).transpose(0, 1),
    )


def check_codes_come_back(key: str) -> None:
    """Leading dimensions stay, blank memory is harmless, no error is as large as the spread, twice is once."""
    for dtype in (torch.float32, torch.bfloat16):
        form = _form(key, dtype)
        x = torch.randn(3, 2, 4, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
        for which in "kv":
            encode, decode = _coder(form, which)
            codes = encode(x)
            kept = 1 if isinstance(form, FittedForm) else 2  # a form that knows the layer codes its heads together
            assert all(part.shape[:kept] == x.shape[:kept] for part in codes), "a leading dimension is lost"
            back = decode(codes)
            assert back.shape == x.shape and back.dtype == dtype, f"{tuple(back.shape)} {back.dtype} come back"
            away, spread = (back.float() - x.float()).abs(), x.float().max() - x.float().min()
            if isinstance(form, FittedForm):  # random numbers are not the text that it was fitted on
                assert away.square().mean() < 0.5 * x.float().square().mean(), f"{which}: most is lost"
            else:
                assert away.max() <= spread / 4, f"{which}: an error of {away.max():.3f} at a spread of {spread:.3f}"
            one = decode(encode(x[:1]))
            assert torch.equal(one, back[:1]), "codes depend on what is coded beside"
            nothing = decode(tuple(torch.zeros_like(part) for part in codes))
            assert bool(nothing.isfinite().all()), "blank memory is no number"
            assert isinstance(form, FittedForm) or not nothing.any(), "blank memory is not zeros"
            if form.rowwise:
                assert all(part.shape[-2] == 3 for part in encode(x[:, :, :3])), "a part has no row for each entry"


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
