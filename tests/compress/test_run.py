"""Compressing a stored model: what is written, how large it is, how near it stays; general-purpose compressors."""

import json
import lzma
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from modicum.compress.general_purpose import compressor_bits
from modicum.compress.run import compress, weight_bytes
from modicum.core.errors import UserError
from modicum.data.document import Document, write_documents
from modicum.data.tokenizer import Tokenizer
from modicum.model import attach
from modicum.model.config import llama_like
from modicum.model.decoder import Decoder
from modicum.model.folder import load_model, save_model

TOKENS = torch.arange(3, 35).view(2, 16)


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def stored(request, tmp_path_factory) -> tuple[Path, bool]:
    root = tmp_path_factory.mktemp("compress")
    tokenizer = Tokenizer.train(["some text to be had"], 300)
    tokenizer.save(root / "tokenizer")
    config = llama_like(tokenizer.vocab_size, 128, 2, 4, kv_heads=2, tied=request.param, context_length=64)
    model = Decoder(config, torch.Generator().manual_seed(0)).to(torch.bfloat16)
    save_model(model, root / "model", root / "tokenizer")
    return root / "model", request.param


def logits(folder: Path, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    with torch.no_grad():
        return load_model(folder, dtype=dtype)(TOKENS)


@pytest.mark.parametrize(
    "form,bits,error",
    [("int8", 8.13, 0.01), ("int8:group=64", 8.25, 0.01), ("int4:group=64", 4.5, 0.11), ("int4:group=32", 5.0, 0.1)],
)
def test_folder_is_as_small_as_claimed(stored, tmp_path: Path, form: str, bits: float, error: float) -> None:
    folder, _ = stored
    result = compress(folder, form, tmp_path / "out")
    assert result.bits_per_weight == pytest.approx(bits, rel=0.01) and 0 < result.error < error
    assert result.error <= result.worst_error and result.modules == 14
    original = load_model(folder)
    weights = sum(m.weight.numel() for n, m in attach.linears(original).items() if n.startswith("layers."))
    assert result.weights == weights

    # The files hold the codes and the rest of the model, and nothing else.
    parts = [load_file(p) for p in (tmp_path / "out").glob("*.safetensors")]
    held = sum(t.nbytes for part in parts for t in part.values())
    saved = weights * 2 - result.bits_per_weight * weights / 8
    assert held == sum(t.nbytes for t in load_file(folder / "model.safetensors").values()) - saved
    assert result.bytes == weight_bytes(tmp_path / "out") < result.original_bytes
    assert held < result.bytes < held + 20_000  # names and description

    model = load_model(tmp_path / "out", dtype=torch.float32)
    reference = load_model(folder, dtype=torch.float32)
    for name, form_ in attach.forms(model).items():
        reference.get_submodule(name).weight.data = form_.dense()
    with torch.no_grad():
        torch.testing.assert_close(model(TOKENS), reference(TOKENS), atol=1e-4, rtol=1e-4)
        low = load_model(tmp_path / "out")(TOKENS[:1, :8])  # bfloat16, few rows: the fused kernels
    assert low.dtype == torch.bfloat16
    assert (low.float() - reference(TOKENS[:1, :8])).norm() / low.float().norm() < 0.05
    assert Tokenizer.load(tmp_path / "out").vocab_size == Tokenizer.load(folder).vocab_size


def test_embeddings_and_head(stored, tmp_path: Path) -> None:
    folder, tied = stored
    result = compress(folder, "int4:group=32", tmp_path / "out", embeddings="int8", head="int8")
    assert result.modules == (15 if tied else 16)
    model = load_model(tmp_path / "out")
    assert (model.lm_head is model.embed.form) == tied
    vocab = model.config.vocab_size
    files = [load_file(p) for p in (tmp_path / "out").glob("*.safetensors")]
    codes = [t for file in files for t in file.values() if t.shape[0] == vocab]
    assert sum(t.dtype == torch.int8 for t in codes) == (1 if tied else 2)
    assert not any(t.dtype == torch.bfloat16 and t.shape[1] == 128 for t in codes)  # no dense table left
    near, far = logits(tmp_path / "out"), logits(folder)
    assert (near - far).norm() / far.norm() < 0.3


def test_head_alone(stored, tmp_path: Path) -> None:
    folder, tied = stored
    if tied:
        with pytest.raises(UserError, match="tied"):
            compress(folder, "int8", tmp_path / "out", head="int8")
        assert not (tmp_path / "out").exists()
        compress(folder, "int8", tmp_path / "two", embeddings="int8", head="int4:group=32")
        model = load_model(tmp_path / "two")
        assert model.lm_head is not model.embed.form and model.lm_head.choice.method == "int4"
    else:
        compress(folder, "int8", tmp_path / "out", head="int8", targets=["layers.*.mlp.*"])
        model = load_model(tmp_path / "out")
        assert sorted(attach.forms(model))[-1] == "lm_head" and len(attach.forms(model)) == 7
        assert isinstance(model.embed, torch.nn.Embedding)


def test_compressing_twice_and_other_mistakes(stored, tmp_path: Path) -> None:
    folder, _ = stored
    compress(folder, "int8", tmp_path / "once")
    for source, form, knobs, word in (
        (tmp_path / "once", "int4", {}, "already"),
        (folder, "lora", {}, "linear 'lora' cannot be combined with compressing"),
        (folder, "int4", {"targets": ["layer.*"]}, "matches no"),
        (folder, "int5", {}, "int4"),
        (folder, "int4:group=5", {}, "group"),
        (folder, "int4", {"embeddings": "lora"}, "cannot be combined with compressing"),
        (tmp_path / "none", "int4", {}, "no model"),
    ):
        with pytest.raises(UserError, match=word) as caught:
            compress(source, form, tmp_path / "out", **knobs)
        assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="another folder"):
        compress(folder, "int8", folder)


def test_general_purpose_compressors_are_those_programs() -> None:
    def lines(first: int, last: int) -> str:
        return " ".join(f"line {i} says {i * i % 97} and {i % 13}" for i in range(first, last))

    text, train = lines(0, 2000), [lines(n, n + 200) for n in range(0, 4000, 200)]
    found = compressor_bits(text.encode(), train)
    assert list(found) == ["xz -9", "zstd -19", "zstd -19, dictionary"]
    assert found["xz -9"] == 8 * len(lzma.compress(text.encode(), preset=9)) / len(text)
    assert found["zstd -19, dictionary"] < found["zstd -19"] < 8
    if shutil.which("xz"):
        done = subprocess.run(["xz", "-9", "-c"], input=text.encode(), capture_output=True, check=True)
        assert found["xz -9"] == pytest.approx(8 * len(done.stdout) / len(text), rel=0.01)
    assert compressor_bits([text]) == {k: found[k] for k in ("xz -9", "zstd -19")}
    assert "zstd -19, dictionary" not in compressor_bits([text], ["too little"])
    with pytest.raises(UserError, match="no text"):
        compressor_bits([])


def test_incompressible_text_costs_its_entropy() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = bytes(torch.randint(0, 256, (50_000,), generator=generator, dtype=torch.uint8).tolist())
    assert all(8.0 <= bits < 8.05 for bits in compressor_bits(noise).values())


def test_verb(stored, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    from modicum.cli.compress import compress as verb

    folder, _ = stored
    for side, n in (("train", 40), ("heldout", 10)):
        write_documents(
            tmp_path / "curated" / "documents" / f"{side}-00000.parquet",
            (Document(str(i), f"text number {i} " * 60) for i in range(n)),
        )
    verb(str(folder), tmp_path / "out", baselines=tmp_path / "curated", as_json=True)
    printed = json.loads(capsys.readouterr().out)
    assert printed["ratio"] > 1 and printed["baselines"]["xz -9"] < 8
    verb(str(folder), tmp_path / "out2", form="int8")
    assert "bits per weight" in capsys.readouterr().out


def test_a_mistake_on_the_command_line_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "from modicum.cli import main; main()", "compress"]
    command += [str(tmp_path / "none"), "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "no model at" in done.stderr and done.stderr.count("\n") == 1
