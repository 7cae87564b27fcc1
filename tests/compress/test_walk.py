"""Compressing block by block: the two streams, a killed process, what the command writes and refuses."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from modicum.compress.blocks import Walk
from modicum.compress.compressors import BlockJob, Compressor
from modicum.compress.method import compress_with
from modicum.core.errors import UserError
from modicum.core.events import Events
from modicum.core.files import sha256
from modicum.data.document import Document, write_documents
from modicum.data.tokenizer import Tokenizer
from modicum.model import attach
from modicum.model.config import llama_like
from modicum.model.decoder import Decoder
from modicum.model.folder import load_model, save_model
from modicum.serve.config import EngineConfig
from modicum.serve.engine import Engine
from modicum.serve.request import SamplingParams

TEXT = "some text to be read, word by word, and to be forgotten again afterwards "
TOKENS = torch.arange(3, 51).view(3, 16)


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`model` and `text`."""
    root = tmp_path_factory.mktemp("walk")
    tokenizer = Tokenizer.train([TEXT], 300)
    tokenizer.save(root / "tokenizer")
    config = llama_like(tokenizer.vocab_size, 64, 3, 4, kv_heads=2, mlp_width=128, context_length=64)
    model = Decoder(config, torch.Generator().manual_seed(0)).to(torch.bfloat16)
    save_model(model, root / "model", root / "tokenizer")
    documents = (Document(str(i), TEXT * (3 + i % 5)) for i in range(12))
    write_documents(root / "text" / "documents" / "train-00000.parquet", documents)
    return root


class Halving(Compressor):
    """Halves every matrix, and keeps what it was given."""

    needs = frozenset({"gram"})
    leaves = "weights"

    def __init__(self, streams: tuple[str, ...]):
        super().__init__(None)
        self.streams = streams  # type: ignore[misc]
        self.seen: list[dict[str, torch.Tensor]] = []
        self.grams: list[torch.Tensor] = []
        self.observed: list[torch.Tensor] = []

    def block(self, job: BlockJob) -> None:
        self.seen.append({s: torch.cat([x for x, _ in job.inputs(s)]) for s in self.streams})
        self.grams.append(job.statistics["mlp.down"].gram)
        for name, layer in job.linears.items():
            job.keep(name, layer.weight.detach() / 2)

    def observe(self, index: int, x_BTD: torch.Tensor, y_BTD: torch.Tensor) -> None:
        self.observed.append(x_BTD)


def block_inputs(model: Decoder, name: str) -> Callable[[], list[torch.Tensor]]:
    found: list[torch.Tensor] = []
    model.get_submodule(name).register_forward_pre_hook(lambda module, args: found.append(args[0]))
    return lambda: found


@pytest.mark.parametrize(
    "streams", [("compressed",), ("original",), ("compressed", "original"), ("original", "compressed")]
)
def test_streams_are_the_inputs_in_each_model(tmp_path: Path, streams: tuple[str, ...]) -> None:
    """Block i of the original stream sees i original blocks, of the compressed stream i halved ones."""
    config = llama_like(64, 32, 3, 4, kv_heads=2, mlp_width=48, context_length=64)
    model = Decoder(config, torch.Generator().manual_seed(0)).eval()
    models = {"original": Decoder(config, torch.Generator().manual_seed(0)).eval()}
    models["compressed"] = Decoder(config, torch.Generator().manual_seed(0)).eval()
    inputs = {(s, i): block_inputs(m, f"layers.{i}") for s, m in models.items() for i in range(3)}
    method = Halving(streams)
    names = [name for name in attach.linears(model) if name.startswith("layers.")]
    Walk(model, method, names, TOKENS, tmp_path).run(Events())
    with torch.no_grad():
        for index in range(3):  # halved only after block `index` was seen
            down = block_inputs(models["original"], f"layers.{index}.mlp.down")
            if streams[0] == "compressed":
                copy = Decoder(config, torch.Generator().manual_seed(0)).eval()
                for i in range(index):
                    for name in (n for n in names if n.startswith(f"layers.{i}.")):
                        copy.get_submodule(name).weight.mul_(0.5)
                down = block_inputs(copy, f"layers.{index}.mlp.down")
                copy(TOKENS)
            else:
                models["original"](TOKENS)
            rows = down()[-1].flatten(0, 1).double()
            torch.testing.assert_close(method.grams[index], rows.T @ rows, rtol=1e-4, atol=1e-6)
        for name in names:
            models["compressed"].get_submodule(name).weight.mul_(0.5)
        for m in models.values():
            m(TOKENS)
    for index in range(3):
        for stream in streams:
            torch.testing.assert_close(method.seen[index][stream], inputs[stream, index]()[-1])
    assert torch.equal(model(TOKENS), models["compressed"](TOKENS))
    if streams[0] == "original":
        assert len(method.observed) == 3


def test_a_process_killed_between_blocks_goes_on_to_the_same_bytes(stored: Path, tmp_path: Path) -> None:
    given: dict[str, Any] = {"calibration": stored / "text", "sequences": 8, "length": 32}
    compress_with(stored / "model", "gptq:bits=3,group=16", tmp_path / "whole", **given)
    script = f"""
import os, signal, torch
from modicum.compress.method import compress_with
from modicum.core.events import Events
torch.set_num_threads(1)
class Deadly(Events):
    def emit(self, kind, **fields):
        if kind == "block" and fields["index"] == 1:
            os.kill(os.getpid(), signal.SIGKILL)
compress_with({str(stored / "model")!r}, "gptq:bits=3,group=16", {str(tmp_path / "out")!r},
              calibration={str(stored / "text")!r}, sequences=8, length=32, events=Deadly())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=os.environ)
    assert done.returncode == -signal.SIGKILL and not (tmp_path / "out").exists()
    work = tmp_path / ".out.compressing"
    assert sorted(p.name for p in work.glob("block-*.json")) == ["block-000.json", "block-001.json"]
    finished = (work / "block-000.safetensors").stat().st_mtime_ns
    seen: list[int] = []

    class Noting(Events):
        def emit(self, kind: str, **fields: Any) -> None:
            if kind == "block":
                seen.append(fields["index"])
                assert (work / "block-000.safetensors").stat().st_mtime_ns == finished

    result = compress_with(stored / "model", "gptq:bits=3,group=16", tmp_path / "out", events=Noting(), **given)
    assert seen == [2] and not work.exists() and result.modules == 21
    for name in ("model.safetensors", "modicum.safetensors", "modicum.json", "config.json"):
        assert sha256(tmp_path / "out" / name) == sha256(tmp_path / "whole" / name), name


def test_other_settings_begin_anew(stored: Path, tmp_path: Path) -> None:
    class Stopping(Events):
        def emit(self, kind: str, **fields: Any) -> None:
            if kind == "block":
                seen.append(fields["index"])
                raise KeyboardInterrupt

    for bits in (2, 3):
        seen: list[int] = []
        with pytest.raises(KeyboardInterrupt):
            compress_with(stored / "model", f"rtn:bits={bits}", tmp_path / "out", events=Stopping())
        assert seen == [0]
    compress_with(stored / "model", "rtn:bits=3", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "modicum.json").read_text())["forms"]["layers.0.mlp.up"]["form"]["bits"] == 3


def test_what_is_written_is_served_as_it_is_computed(stored: Path, tmp_path: Path) -> None:
    result = compress_with(stored / "model", "rtn:bits=3,group=32", tmp_path / "out", embeddings="int8")
    model = load_model(tmp_path / "out")
    assert {f.choice.method for f in attach.forms(model).values() if f.choice} == {"affine", "int8"}
    assert result.bits_per_weight == 4.0 and result.bytes < result.original_bytes / 2
    prompt = list(range(5, 25))
    with torch.no_grad():
        greedy: list[int] = []
        for _ in range(6):
            greedy.append(int(model(torch.tensor([prompt + greedy]))[0, -1].argmax()))
    engine = Engine(load_model(tmp_path / "out"), None, EngineConfig(cache="256tok", block_size=4, max_length=64))
    served = engine.generate([prompt], SamplingParams(temperature=0, max_tokens=6, ignore_eos=True))
    assert list(served[0].tokens) == greedy


@pytest.mark.parametrize(
    "choice, given, word",
    [
        ("gptq", {}, "requires calibration_text"),
        ("rtn:clip=true", {}, "requires calibration_text"),
        ("rtn", {"targets": ["lm_head"]}, "in none"),
        ("rtn", {"targets": ["layer.*"]}, "matches no"),
        ("rtn:bits=5", {}, "bits"),
        ("rtm", {}, "rtn"),
        ("rtn", {"embeddings": "lora"}, "cannot be combined with compressing"),
    ],
)
def test_refused_before_anything_is_written(
    stored: Path, tmp_path: Path, choice: str, given: dict[str, Any], word: str
) -> None:
    with pytest.raises(UserError, match=word) as caught:
        compress_with(stored / "model", choice, tmp_path / "out", **given)
    assert "\n" not in str(caught.value) and list(tmp_path.iterdir()) == []


def test_verb(stored: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    from modicum.cli.compress import compress as verb

    text = str(stored / "text")
    verb(
        str(stored / "model"), tmp_path / "out", method="gptq:bits=3,group=16", calibration=text, length=32, sequences=4
    )
    said = capsys.readouterr().out
    assert "21 matrices in gptq:bits=3,group=16: 5.00 bits per weight" in said and "bits per byte on a sample" in said
    with pytest.raises(UserError, match="leave out --form"):
        verb(str(stored / "model"), tmp_path / "two", form="int8", method="rtn")
    with pytest.raises(UserError, match="forms already"):
        verb(str(tmp_path / "out"), tmp_path / "two", method="rtn")


PEAK = """
import sys
import torch
from modicum.budget.meter import Meter, resident_now
from modicum.compress.method import compress_with
torch.set_num_threads(1)
source, text, out = sys.argv[1:]
given = dict(calibration=text, sequences=4, length=16)
compress_with(source + "-small", METHOD, out + "-small", **given)  # imports, and what the first calls keep
before = resident_now()
with Meter() as meter:
    compress_with(source, METHOD, out, **given)
print(int(meter.peak_bytes) - before)
"""


@pytest.mark.parametrize("method", ["wanda", "rtn:bits=3"])
def test_the_peak_is_the_model_and_one_block(stored: Path, tmp_path: Path, method: str) -> None:
    """Not the model in float32, nor both models: bytes of the process beyond those of a small run."""
    layers, blocks = 24, 9
    for name, n in (("model-small", 1), ("model", layers)):
        config = llama_like(300, 512, n, 8, mlp_width=1408, context_length=64)
        model = Decoder(config, init=False).to(torch.bfloat16)
        with torch.no_grad():
            for p in model.parameters():
                p.fill_(0.01)
        save_model(model, tmp_path / name, stored / "tokenizer")
        block = sum(p.numel() for p in model.layers[0].parameters())
        whole = sum(p.nbytes for p in model.parameters())
        del model
    script = PEAK.replace("METHOD", repr(method))
    given = [str(tmp_path / "model"), str(stored / "text"), str(tmp_path / "out")]
    done = subprocess.run([sys.executable, "-c", script, *given], capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0, done.stderr[-2000:]
    peak = int(done.stdout.split()[-1])
    assert peak < whole + blocks * 4 * block, f"{peak >> 20} MiB for a model of {whole >> 20}, blocks of {block >> 18}"
    assert whole + blocks * 4 * block < 0.7 * (whole + 4 * layers * block)  # what all blocks in float32 would take
