"""The compiled kernels against the same layers computed in float64, and the engine that chooses them."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from kernel_tools import PROMPTS, SHAPES, coded, decoder, distance, exact, logits_of
from serve_tools import engine, tiny

from modicum.core import compiled
from modicum.core.errors import ModicumError, UserError
from modicum.model.attach import attach
from modicum.serve import native
from modicum.serve.backends import Runner
from modicum.serve.backends import native as runner_module
from modicum.serve.backends.native import Native
from modicum.serve.backends.torch import Torch
from modicum.serve.config import EngineConfig
from modicum.serve.engine import Engine
from modicum.serve.native.support import unserved
from modicum.serve.request import Request, SamplingParams
from modicum.serve.work import Work

needs_kernels = pytest.mark.skipif(native.library() is None, reason=f"no kernels: {native.reason()}")
ISAS = [name for name, features in native.NEEDED.items() if native.abilities().issuperset(features)]
on_each_isa = pytest.mark.usefixtures("isa")
EIGHTS = ["amx", "avx512"] if set(native.USEFUL) <= native.abilities() else []
in_eight_bits = pytest.mark.usefixtures("eights")


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each instruction set of the kernels that this processor has."""
    monkeypatch.setenv("MODICUM_ISA", request.param)


@pytest.fixture(params=[*(name for name in EIGHTS if name in ISAS), native.EMULATED])
def eights(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each with products of int8 activations, and tiles written out."""
    monkeypatch.setenv("MODICUM_ISA", request.param)
    if native.library() is None:
        pytest.skip(native.reason())


@needs_kernels
@on_each_isa
@pytest.mark.parametrize("name", SHAPES)
def test_float32_shapes(name: str) -> None:
    model = decoder(name)
    got, tokens = logits_of(model, PROMPTS)
    assert distance(got, exact(model, PROMPTS, tokens)) < 2e-6


@needs_kernels
@on_each_isa
@pytest.mark.parametrize(
    "form",
    [
        *("int8", "int8:group=64", "int4:group=32", "int4:group=64", "int4:group=128"),
        *("ggml:type=q4_0", "ggml:type=q4_1", "ggml:type=q8_0"),
        *("affine:bits=2,group=64", "affine:bits=2,group=128", "affine:bits=3,group=64", "affine:bits=3,group=128"),
        *("affine:bits=4,group=64", "affine:bits=8,group=64"),
    ],
)
@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_codes_are_multiplied_as_they_decode(form: str, count: int) -> None:
    """float32: as exact as float32; few rows of bfloat16: far closer than bfloat16 activations could be."""
    model = decoder()
    attach(model, {"layers.*": form, "lm_head": form})
    got, tokens = logits_of(model, PROMPTS[:count])
    assert distance(got, exact(model, PROMPTS[:count], tokens)) < 2e-6
    half = decoder().to(torch.bfloat16)
    attach(half, {"layers.*": form, "lm_head": form})
    got, tokens = logits_of(half, PROMPTS[:count], dtype="float32")
    error = distance(got, exact(half, PROMPTS[:count], tokens))
    assert error < (3e-4 if form.startswith("int8") and count == 1 else 2e-2)


@needs_kernels
@on_each_isa
@pytest.mark.parametrize("bits", [2, 3])
def test_rows_longer_than_a_step_of_coarse_codes(bits: int) -> None:
    """Rows of 320 and 1,088 inputs: several steps of 256, and a rest, with wide and narrow groups."""
    for group in (64, 128, 256):
        model = decoder(width=320, mlp_width=1088).to(torch.bfloat16)
        fits = "layers.*.down" if group == 256 else "layers.*"
        attach(model, {fits: f"affine:bits={bits},group={group}"})
        got, tokens = logits_of(model, PROMPTS[:1], dtype="float32")
        assert distance(got, exact(model, PROMPTS[:1], tokens)) < 1e-2


@in_eight_bits
@pytest.mark.parametrize("form", ["int8", "int8:group=64", "int4:group=64", "int4:group=128", "affine:bits=8,group=64"])
@pytest.mark.parametrize("width", [128, 320])
def test_eight_bits_round_what_goes_in_and_nothing_else(form: str, width: int) -> None:
    """But for a rare value that lies so near the middle of two codes that float32 and float64 part ways."""
    model = coded(form, width)
    prompts = [list(range(7 * i, 8 * i + 6)) for i in range(4)]  # rows enough to be multiplied in eight bits
    got, tokens = logits_of(model, prompts, steps=1, dtype="float32", activation_bits=8)
    want, unrounded = exact(model, prompts, tokens, eight=True), exact(model, prompts, tokens)
    assert sorted(distance(g, w) for g, w in zip(got, want, strict=True))[1] < 1e-4
    assert 0.01 < distance(unrounded, want) < 0.05


@in_eight_bits
@pytest.mark.parametrize("form", ["int8", "int4"])
def test_eight_bits_depend_on_neither_company_nor_threads(form: str) -> None:
    model = coded(form)
    together, _ = logits_of(model, PROMPTS[1:4], steps=1, activation_bits=8)
    for prompt, want in zip(PROMPTS[1:4], together, strict=True):
        assert torch.equal(logits_of(model, [prompt], steps=1, activation_bits=8)[0][0], want)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(logits_of(model, PROMPTS[1:4], steps=1, activation_bits=8)[0], together)
    finally:
        torch.set_num_threads(threads)


@in_eight_bits
def test_a_nan_survives_eight_bits() -> None:
    model = coded("int8")
    with torch.no_grad():
        model.embed.weight[11, 70] = float("nan")
    logits_of(model, [[12] * 6], steps=1, activation_bits=8)
    with pytest.raises(ModicumError, match="not a number"):
        logits_of(model, [[11] * 6], steps=1, activation_bits=8)


def test_eight_bits_need_codes_and_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="neither 16 nor 8"):
        EngineConfig(activation_bits=4)
    with pytest.raises(UserError, match="int8 or int4"):
        Engine(decoder().to(torch.bfloat16), None, EngineConfig(cache="1ktok", activation_bits=8))
    monkeypatch.setenv("MODICUM_NATIVE", "0")
    with pytest.raises(UserError, match="MODICUM_NATIVE=0"):
        Engine(coded("int8"), None, EngineConfig(cache="1ktok", activation_bits=8))


@needs_kernels
@on_each_isa
def test_bfloat16_is_no_further_from_exact_than_the_decoder(monkeypatch: pytest.MonkeyPatch) -> None:
    model = decoder().to(torch.bfloat16)
    got, tokens = logits_of(model, PROMPTS)
    want = exact(model, PROMPTS, tokens)
    with torch.no_grad():
        eager = torch.stack(
            [model(torch.tensor([p + t[:-1]]))[0, len(p) - 1 :] for p, t in zip(PROMPTS, tokens, strict=True)]
        )
    assert distance(got, want) < distance(eager.double(), want)


@needs_kernels
@on_each_isa
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["plain", "long rows"])
def test_company_does_not_change_a_bit(name: str, dtype: torch.dtype) -> None:
    model = decoder(name).to(dtype)
    together, tokens = logits_of(model, PROMPTS[1:3])
    for i, prompt in enumerate(PROMPTS[1:3]):
        alone, said = logits_of(model, [prompt])
        assert said == [tokens[i]] and torch.equal(alone[0], together[i])


@needs_kernels
@on_each_isa
def test_threads_do_not_change_a_bit() -> None:
    model, before = decoder(), torch.get_num_threads()
    one, _ = logits_of(model, PROMPTS)
    try:
        torch.set_num_threads(3)
        many, _ = logits_of(model, PROMPTS)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(one, many)


@needs_kernels
@on_each_isa
def test_long_sequences_grow_the_scores() -> None:
    model = decoder()
    prompts = [[7] * 10, [i % 199 for i in range(240)]]
    for prompt in prompts:
        got, tokens = logits_of(model, [prompt])
        assert distance(got, exact(model, [prompt], tokens)) < 2e-6


def test_what_is_not_served_falls_back() -> None:
    why = unserved(tiny(), torch.float16)
    assert why is not None and "float16" in why
    lora = tiny()
    attach(lora, {"layers.*.attention.*": "lora:rank=2"})
    assert "lora" in (unserved(lora, torch.float32) or "").lower()
    assert isinstance(Engine(lora, None, EngineConfig(cache="1ktok")).runner.backends[0], Torch)
    assert unserved(tiny(), torch.float32) is None


def test_off_by_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODICUM_NATIVE", "0")
    assert native.library() is None and "MODICUM_NATIVE" in native.reason()
    assert isinstance(engine().runner.backends[0], Torch)


@needs_kernels
def test_no_compiler_means_the_decoder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CC", str(tmp_path / "nothing"))
    native._load.cache_clear()
    try:
        assert native.library() is None and "could not build" in native.reason()
        assert isinstance(engine().runner.backends[0], Torch)
    finally:
        monkeypatch.undo()
        native._load.cache_clear()


@needs_kernels
def test_compiled_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    name = native.instruction_set()
    assert name is not None
    path = native.build("cc", name)
    stamp = path.stat().st_mtime_ns
    assert native.build("cc", name) == path and path.stat().st_mtime_ns == stamp
    assert [p.name for p in path.parent.iterdir()] == [path.name]


@needs_kernels
def test_structures_have_one_layout() -> None:
    library = native.library()
    assert library is not None
    sizes = [library.modicum_layout(i) for i in range(7)]
    first = (native.Matrix, native.Rope, native.Layer, native.Model, native.Step)
    assert sizes == [ctypes.sizeof(k) for k in (*first, native.EvictedPages, native.Marks)]
    assert np.dtype(np.int64).itemsize == ctypes.sizeof(native.I64)


@needs_kernels
@pytest.mark.parametrize("name", ["two widths of rotation", "the wider rotation in windows"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("position", [300, 5003, 100_003])
def test_keys_are_turned_by_the_angle_of_their_position(name: str, dtype: torch.dtype, position: int) -> None:
    """A token's keys in the first layer are those it has at place 0, turned; a cache in float32 shows how exactly."""
    model = decoder(name, context_length=200_000).to(dtype)
    e = Engine(model, None, EngineConfig(block_size=8, cache="400tok", dtype="float32", max_sequences=2))
    assert isinstance(e.runner.backends[0], Native)
    works, storage = [], e.storage
    for slot, start in enumerate((0, position)):
        e.add(Request([7], SamplingParams(max_tokens=1)))
        sample = list(e.samples.values())[-1]
        sample.tokens, sample.slot = [7] * (start + 1), slot
        e.cache.table.hold(slot, 0, [slot] * (start // 8 + 1))  # what the places before hold changes nothing here
        works.append(Work(sample, start, 1, slot))
    e.runner(e.plan(works), [0, 1])
    plain_GE, far_GE = (storage.k_LGNPE[0, :, w.sample.slot, w.start % 8].double() for w in works)
    rope = model.rope_tables()[0]
    assert rope is not None
    half = len(rope.angles)
    angle = (torch.tensor(float(position)) * rope.angles).double()  # as exact as an angle in float32 is
    a, b, rest = plain_GE.split([half, half, plain_GE.shape[1] - 2 * half], dim=1)
    want_GE = torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin(), rest], dim=1)
    assert distance(far_GE, want_GE) < 1e-6
    assert distance(plain_GE, want_GE) > 0.1


@needs_kernels
@pytest.mark.parametrize("size", ["width", "mlp_width", "head_dim", "rotated", "threads"])
def test_memory_that_is_not_to_be_had_is_said(size: str) -> None:
    runner = Engine(decoder(), None, EngineConfig(cache="1ktok")).runner.backends[0]
    assert isinstance(runner, Native)
    shape = native.Model.from_buffer_copy(runner._shape)
    shape.threads = 1
    setattr(shape, size, 1 << 49)
    assert runner.library.modicum_open(ctypes.byref(shape)) is None


@needs_kernels
def test_threads_are_those_that_are_granted(monkeypatch: pytest.MonkeyPatch) -> None:
    threads = torch.get_num_threads()
    try:
        for granted, asked, want in ((1, 2, 1), (3, 2, 2), (3, 1, 1)):
            monkeypatch.setattr(runner_module, "cores", lambda granted=granted: granted)
            torch.set_num_threads(asked)
            e = Engine(decoder(), None, EngineConfig(cache="1ktok"))
            e.generate([[1, 2, 3]], SamplingParams(max_tokens=2))
            kernels = e.runner.backends[0]
            assert isinstance(kernels, Native) and kernels.threads == kernels._shape.threads == want
    finally:
        torch.set_num_threads(threads)


@needs_kernels
def test_a_machine_with_other_abilities_compiles_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those that the kernels do not name: the compiler may use them."""
    folder, features = native.SOURCE.parent, native.abilities()
    here = compiled.stamp("gcc 12", folder, features, native.FLAGS["avx512"])
    assert compiled.stamp("gcc 13", folder, features, native.FLAGS["avx512"]) != here
    assert compiled.stamp("gcc 12", folder, features | {"avx512_of_tomorrow"}, native.FLAGS["avx512"]) != here
    assert compiled.stamp("gcc 12", folder, features, native.FLAGS["avx2"]) != here


def test_the_instruction_set_can_be_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    wide = frozenset((*native.NEEDED["avx512"], *native.NEEDED["avx2"], *native.USEFUL))
    widest = wide | {*native.NEEDED["amx"]}
    monkeypatch.setattr(native, "_tiles_granted", lambda: True)
    for features, limit, name in (
        (widest, "", "amx"),
        (widest, "avx512", "avx512"),
        (wide, "amx", "avx512"),
        (wide, native.EMULATED, native.EMULATED),
        (wide, "", "avx512"),
        (wide, "avx2", "avx2"),
        (wide, "none", None),
        (frozenset(native.NEEDED["avx2"]), "", "avx2"),
        (frozenset(native.NEEDED["avx2"]), "avx512", "avx2"),
        (frozenset(("avx2", "fma")), "", None),
    ):
        monkeypatch.setattr(native, "abilities", lambda features=features: features)
        monkeypatch.setenv("MODICUM_ISA", limit)
        assert native.instruction_set() == name
        assert native.multiplies_in_eight_bits() == (name in ("amx", "avx512", native.EMULATED))
    monkeypatch.setattr(native, "abilities", lambda: widest)
    monkeypatch.setattr(native, "_tiles_granted", lambda: False)
    monkeypatch.setenv("MODICUM_ISA", "")
    assert native.instruction_set() == "avx512"
    monkeypatch.setenv("MODICUM_ISA", "sse")
    with pytest.raises(UserError, match="amx, avx512, avx2, none or auto"):
        native.instruction_set()


def test_eight_bits_need_both_kinds_of_products(monkeypatch: pytest.MonkeyPatch) -> None:
    both = {"avx512_vnni", "avx512_bf16"}
    monkeypatch.delenv("MODICUM_ISA", raising=False)
    for having in (both, both - {"avx512_bf16"}, both - {"avx512_vnni"}):
        monkeypatch.setattr(native, "abilities", lambda having=having: frozenset(having | {*native.NEEDED["avx512"]}))
        assert native.multiplies_in_eight_bits() == (having == both)


@needs_kernels
def test_the_program_may_end_in_the_middle_of_a_step() -> None:
    """An engine's thread that outlives its server must not find its memory freed."""
    code = """
import threading, time
from modicum.model.config import llama_like
from modicum.model.decoder import Decoder
from modicum.serve.config import EngineConfig
from modicum.serve.engine import Engine
from modicum.serve.request import SamplingParams
engine = Engine(Decoder(llama_like(400, 512, 8, context_length=4096)), None, EngineConfig(cache="8ktok"))
def work():
    while True:
        engine.generate([list(range(390)) * 4] * 2, SamplingParams(max_tokens=1, ignore_eos=True))
threading.Thread(target=work, daemon=True).start()
while not engine.runner.backends[0]._state:
    time.sleep(0.01)
time.sleep(0.5)  # a step takes seconds: it has begun
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@needs_kernels
def test_two_engines_read_the_same_codes() -> None:
    """The second one must not move what the first one's kernels point to."""
    model = decoder(width=1280)
    attach(model, {"layers.*": "int8:group=64", "lm_head": "int8"})
    assert sum(b.nbytes for b in model.buffers()) > native.LARGE_PAGE
    one = Engine(model, None, EngineConfig(cache="1ktok"))
    where = [b.data_ptr() for b in model.buffers()]
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    want = one.generate(PROMPTS, params)
    two = Engine(model, None, EngineConfig(cache="1ktok"))
    assert [b.data_ptr() for b in model.buffers()] == where
    assert [o.tokens for o in two.generate(PROMPTS, params)] == [o.tokens for o in want]
    assert [o.tokens for o in one.generate(PROMPTS, params)] == [o.tokens for o in want]


@needs_kernels
@on_each_isa
@pytest.mark.parametrize(
    "kv", ["snapkv:budget=24,window=4,kernel=3", "h2o:budget=24", "razorattention:budget=0.4,sinks=2,probe=12"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_thinned_sequences_stay_with_the_kernels(kv: str, dtype: torch.dtype) -> None:
    """Heads of different lengths, a token that stands for many, companions of all kinds: as the decoder has it."""
    model = decoder().to(dtype)
    params = SamplingParams(temperature=0, max_tokens=30, logprobs=1, ignore_eos=True)
    prompts = [list(range(i, i + n)) for i, n in ((3, 70), (40, 90), (7, 5), (20, 61))]
    found, eager_steps = [], 0
    for by_kernels in (True, False):
        e = Engine(model, None, EngineConfig(block_size=8, cache="2ktok", prefix_cache=False, kv=kv))
        kernels, as_written = e.runner.backends
        assert isinstance(kernels, Native)

        def counted(*given: Any, by: Any = as_written) -> Any:
            nonlocal eager_steps
            eager_steps += 1
            return by(*given)

        if by_kernels:
            counted.cannot = as_written.cannot  # type: ignore[attr-defined]
            e.runner = Runner(kernels, counted)  # type: ignore[arg-type]
        else:
            e.runner = Runner(as_written)
        outputs = e.generate(prompts, params)
        assert e.stats()["thinnings"] > 0
        found.append(outputs)
    assert eager_steps == 0, "prompts too, whose queries a policy looks at"
    close = 1e-4 if dtype == torch.float32 else 0.2
    for mine, theirs in zip(*found, strict=True):
        if dtype == torch.float32:
            assert mine.tokens == theirs.tokens
        for a, b in zip(mine.completions[0].logprobs, theirs.completions[0].logprobs, strict=True):
            if a.token != b.token:
                break
            assert abs(a.logprob - b.logprob) < close
