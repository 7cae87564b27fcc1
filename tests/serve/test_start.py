"""What starting costs: memory of the cache only as it is used, weights that are not copied, modules not imported."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from serve_tools import folder, tiny

from modicum.core.errors import BudgetError
from modicum.model.config import llama_like
from modicum.model.decoder import Decoder
from modicum.model.folder import load_model, save_model
from modicum.model.safetensor import is_mapped, mapped_bytes
from modicum.serve import config as engine_config
from modicum.serve import native
from modicum.serve.backends import native as runner
from modicum.serve.cacheforms.plain import Config as PlainConfig
from modicum.serve.cacheforms.plain import Plain
from modicum.serve.config import EngineConfig, cache_blocks
from modicum.serve.engine import Engine
from modicum.serve.pages import Storage
from modicum.serve.request import SamplingParams

CPU = torch.device("cpu")
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")


def resident() -> float:
    """MiB of this process's own memory."""
    return int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024  # type: ignore[index]


@linux
def test_memory_of_the_cache_is_taken_block_by_block() -> None:
    shape = llama_like(64, 192, 30, heads=3, kv_heads=3)
    before = resident()
    storage = Storage(shape, 12000, 16, Plain(PlainConfig(), shape.head_dim, torch.bfloat16), CPU)
    made = resident()
    assert storage.block_bytes * storage.n_blocks > 4 << 30 and made - before < 8
    blocks = [4000, 4001]
    storage.k_LGNPE[:, :, blocks] = 1.0
    storage.v_LGNPE[:, :, blocks] = 1.0
    assert storage.k_LGNPE[7, 1, 4000:4003, 15, 63].tolist() == [1, 1, 0]
    assert resident() - made < 16, "a block must not bring large pages of every layer and head with it"


def test_a_cache_that_is_not_to_be_had_is_refused() -> None:
    from modicum.core.errors import UserError

    shape = llama_like(64, 64, 4, heads=4, kv_heads=4)
    with pytest.raises(UserError, match="ask for less with cache=SIZE"):
        Storage(shape, 1 << 44, 16, Plain(PlainConfig(), 16, torch.float32), CPU)


def test_auto_is_a_part_of_what_the_control_group_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = dataclasses.replace(tiny().config, context_length=1 << 20)
    block = 16 * shape.kv_bytes_per_token(torch.float32)
    monkeypatch.setattr(engine_config, "memory_available", lambda: 1000 * block)
    monkeypatch.setattr(engine_config, "mapped_bytes", lambda: 0)
    assert cache_blocks(EngineConfig(), shape, torch.float32, CPU) == 300
    monkeypatch.setattr(engine_config, "mapped_bytes", lambda: 500 * block)
    assert cache_blocks(EngineConfig(), shape, torch.float32, CPU) == 150, "mapped weights will be read"
    with pytest.raises(BudgetError, match="ask for less"):
        cache_blocks(EngineConfig(cache=600 * block), shape, torch.float32, CPU)


def test_chat_and_serve_import_nothing_they_do_not_need(tmp_path: Path) -> None:
    code = f"""
import sys
from modicum.serve.config import EngineConfig
from modicum.serve.load import load_engine
from modicum.serve.request import SamplingParams
import modicum.serve.server, modicum.serve.chat

engine = load_engine({str(folder(tmp_path / "model"))!r}, EngineConfig(max_sequences=1))
engine.generate(["The cache"], SamplingParams(max_tokens=2))
heavy = ("torch._dynamo", "torch._inductor", "sympy", "transformers", "scipy", "pandas", "pyarrow", "faiss", "rich",
         "matplotlib", "openai", "huggingface_hub", "datasets", "safetensors")
print(*[name for name in heavy if name in sys.modules])
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.split() == []


@pytest.fixture
def mapped(tmp_path: Path) -> Path:
    """A model whose matrices are large enough to be mapped."""
    shape = llama_like(512, 256, 2, heads=4, kv_heads=2, context_length=128)
    model = Decoder(shape, torch.Generator().manual_seed(0)).to(torch.bfloat16)
    save_model(model, tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.skipif(native.library() is None, reason=native.reason())
@pytest.mark.parametrize("bytes_per_step", [1, 1 << 30], ids=["one matrix at a time", "all at once"])
def test_weights_leave_the_files_pages_after_the_first_token(
    mapped: Path, monkeypatch: pytest.MonkeyPatch, bytes_per_step: int
) -> None:
    monkeypatch.setattr(runner, "SETTLED", bytes_per_step)
    before = mapped_bytes()
    want = Engine(load_model(mapped), None, EngineConfig(cache="1ktok"))
    monkeypatch.setattr(runner, "memory_available", lambda: 0)  # as on a machine that is full: they stay
    answer = want.generate([[1, 2, 3]], GREEDY)[0].tokens
    assert is_mapped(want.model.embed.weight)
    monkeypatch.undo()
    monkeypatch.setattr(runner, "SETTLED", bytes_per_step)
    engine = Engine(load_model(mapped), None, EngineConfig(cache="1ktok"))
    other = Engine(engine.model, None, EngineConfig(cache="1ktok"))  # reads the same memory
    stream = engine.stream([1, 2, 3], GREEDY)
    tokens = next(stream).tokens
    assert all(is_mapped(p) for p in engine.model.parameters() if p.dim() == 2), "the first token waits for nothing"
    tokens += [token for update in stream for token in update.tokens]
    assert tokens == answer and other.generate([[1, 2, 3]], GREEDY)[0].tokens == answer
    assert engine.generate([[1, 2, 3]], GREEDY)[0].tokens == answer
    if bytes_per_step > 1:
        assert not any(is_mapped(p) for p in engine.model.parameters())
    engine.model(torch.tensor([[1, 2, 3]])).sum().backward()  # as trainable as before
    assert engine.model.embed.weight.grad is not None and engine.model.lm_head.weight is engine.model.embed.weight
    del want, engine, other, stream
    assert mapped_bytes() >= before


def test_ask_answers_one_question_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its engine has a cache for one sequence, not for the many of a server."""
    from modicum.cli._local import local_generator
    from modicum.serve import engine as engine_module

    made: list[Engine] = []

    class Seen(Engine):
        def __init__(self, *arguments: object):
            super().__init__(*arguments)  # type: ignore[arg-type]
            made.append(self)

    monkeypatch.setattr(engine_module, "Engine", Seen)
    generate, _, context = local_generator(str(folder(tmp_path / "model")), max_tokens=3)
    assert generate([{"role": "user", "content": "The cache?"}], lambda text: None).text is not None
    assert made[0].cache.capacity == context == 256
