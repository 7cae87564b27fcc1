"""Layouts of codes: GPTQ's and AWQ's decoded in numpy as their readers do, compressed-tensors' by its own package."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from modicum.cli.export import export
from modicum.compress.export_codes import codes_of
from modicum.compress.method import compress_with
from modicum.compress.run import compress
from modicum.core.errors import UserError
from modicum.data.document import Document, write_documents
from modicum.data.tokenizer import Tokenizer
from modicum.model.config import llama_like
from modicum.model.decoder import Decoder
from modicum.model.folder import load_model, save_model

TEXT = "some text to be read, word by word, and to be forgotten again afterwards "
NAMES = {"attention.q": "self_attn.q_proj", "mlp.down": "mlp.down_proj", "attention.k": "self_attn.k_proj"}


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("codes")
    tokenizer = Tokenizer.train([TEXT], 300)
    tokenizer.save(root / "tokenizer")
    config = llama_like(tokenizer.vocab_size, 64, 2, 4, kv_heads=2, mlp_width=128, context_length=64)
    model = Decoder(config, torch.Generator().manual_seed(0)).to(torch.bfloat16)
    save_model(model, root / "model", root / "tokenizer")
    write_documents(root / "text" / "documents" / "train-00000.parquet", (Document(str(i), TEXT * 5) for i in range(8)))
    given = {"calibration": root / "text", "sequences": 8, "length": 32}
    compress_with(root / "model", "efficientqat:bits=4,group=32,epochs=1,batch=4", root / "whole", **given)  # type: ignore[arg-type]
    compress_with(root / "model", "rtn:bits=4,group=32", root / "rtn")
    return root


def gptq(t: dict[str, np.ndarray], name: str, shift: int) -> np.ndarray:
    """W_OI, word by word: bits 4 (i mod 8) of row i / 8; zero points of output o in bits 4 (o mod 8), plus one."""
    words, zeros = t[f"{name}.qweight"].view(np.uint32), t[f"{name}.qzeros"].view(np.uint32)
    scales, index = t[f"{name}.scales"].astype(np.float64), t[f"{name}.g_idx"]
    W = np.zeros((words.shape[1], words.shape[0] * 8))
    for i in range(W.shape[1]):
        for o in range(W.shape[0]):
            q = words[i // 8, o] >> np.uint32(4 * (i % 8)) & np.uint32(15)
            z = (zeros[index[i], o // 8] >> np.uint32(4 * (o % 8)) & np.uint32(15)) + shift
            W[o, i] = scales[index[i], o] * (float(q) - float(z))
    return W


def awq(t: dict[str, np.ndarray], name: str, group: int) -> np.ndarray:
    words, zeros = t[f"{name}.qweight"].view(np.uint32), t[f"{name}.qzeros"].view(np.uint32)
    scales = t[f"{name}.scales"].astype(np.float64)
    W = np.zeros((words.shape[1] * 8, words.shape[0]))
    nibble = {output: n for n, output in enumerate((0, 2, 4, 6, 1, 3, 5, 7))}
    for i in range(W.shape[1]):
        for o in range(W.shape[0]):
            at = np.uint32(4 * nibble[o % 8])
            q, z = (x[row, o // 8] >> at & np.uint32(15) for x, row in ((words, i), (zeros, i // group)))
            W[o, i] = scales[i // group, o] * (float(q) - float(z))
    return W


@pytest.mark.parametrize("layout", ["gptq", "awq"])
def test_codes_are_read_as_their_engines_do(stored: Path, tmp_path: Path, layout: str) -> None:
    export(str(stored / "whole"), tmp_path / "out", format=layout)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    settings = config["quantization_config"]
    assert settings["quant_method"] == layout and settings["bits"] == 4 and settings["group_size"] == 32
    assert config["model_type"] == "llama" and (tmp_path / "out" / "tokenizer.json").exists()
    tensors, model = load_file(tmp_path / "out" / "model.safetensors"), load_model(stored / "whole")
    assert not [n for n in tensors if n.endswith("proj.weight")]
    assert tensors["model.norm.weight"].dtype == np.float16
    for index in (0, 1):
        for ours, theirs in NAMES.items():
            name = f"model.layers.{index}.{theirs}"
            if layout == "gptq":
                got = gptq(tensors, name, 1 if settings["checkpoint_format"] == "gptq" else 0)
            else:
                got = awq(tensors, name, 32)
            form: Any = model.get_submodule(f"layers.{index}.{ours}")
            want = form.decode(torch.float32).numpy()  # its zero points are rounded to bfloat16, these are whole
            scale = form.scale.float().repeat_interleave(32, 1).numpy()
            assert (np.abs(got - want) <= 0.05 * scale + 1e-6).all()


def dense_bits(words: np.ndarray, bits: int, count: int) -> np.ndarray:
    """Numbers of a row: the n-th in bits n bits .. of its words."""
    row = int.from_bytes(words.astype("<i4").tobytes(), "little")
    return np.array([row >> (n * bits) & ((1 << bits) - 1) for n in range(count)])


@pytest.mark.parametrize(("choice", "bits"), [("efficientqat:bits=3,group=32,epochs=1,batch=4", 3), ("int8", 8)])
def test_compressed_tensors_of_any_bits_hold_the_same_weights(
    stored: Path, tmp_path: Path, choice: str, bits: int
) -> None:
    given = {"calibration": stored / "text", "sequences": 8, "length": 32}
    if bits == 8:
        compress(stored / "model", choice, tmp_path / "small")
    else:
        compress_with(stored / "model", choice, tmp_path / "small", **given)  # type: ignore[arg-type]
    export(str(tmp_path / "small"), tmp_path / "out", format="compressed-tensors")
    settings = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    weights = settings["config_groups"]["group_0"]["weights"]
    assert (weights["num_bits"], weights["symmetric"]) == (bits, bits == 8)
    t, model = load_file(tmp_path / "out" / "model.safetensors"), load_model(tmp_path / "small")
    for ours, theirs in NAMES.items():
        form: Any = model.get_submodule(f"layers.1.{ours}")
        name = f"model.layers.1.{theirs}"
        outputs, inputs = t[f"{name}.weight_shape"]
        q = np.stack([dense_bits(row, bits, inputs) for row in t[f"{name}.weight_packed"]])
        scales = t[f"{name}.weight_scale"].astype(np.float64)
        if bits == 8:
            assert f"{name}.weight_zero_point" not in t
            z = np.full(scales.shape, 128)
        else:
            z = np.stack([dense_bits(column, bits, outputs) for column in t[f"{name}.weight_zero_point"].T], 1)
        repeats = inputs // scales.shape[1]
        got = scales.repeat(repeats, 1) * (q - z.repeat(repeats, 1))
        want = form.decode(torch.float32).numpy()
        assert (np.abs(got - want) <= 0.05 * scales.repeat(repeats, 1) + 1e-6).all()


def test_transformers_and_the_package_itself_read_compressed_tensors(stored: Path, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors", reason="pip install compressed-tensors")
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationScheme
    from transformers import AutoModelForCausalLM

    compress(stored / "model", "int8:group=32", tmp_path / "eight")
    export(str(tmp_path / "eight"), tmp_path / "out8", format="compressed-tensors")
    read, own = AutoModelForCausalLM.from_pretrained(tmp_path / "out8"), load_model(tmp_path / "eight", "float32")
    ids = torch.arange(20)[None] % 50
    with torch.no_grad():
        a, b = read(ids).logits.float(), own(ids)
    assert float((a - b).norm() / b.norm()) < 0.02  # theirs computes in half precision

    # With zero points: its decoder alone, since loading a whole model expects them unpacked (0.20).
    export(str(stored / "whole"), tmp_path / "out", format="compressed-tensors")
    settings = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    scheme = QuantizationScheme(**settings["config_groups"]["group_0"])
    t, model = load_file(tmp_path / "out" / "model.safetensors"), load_model(stored / "whole")
    for ours, theirs in NAMES.items():
        name = f"model.layers.0.{theirs}."
        state = {k.removeprefix(name): torch.from_numpy(v) for k, v in t.items() if k.startswith(name)}
        form: Any = model.get_submodule(f"layers.0.{ours}")
        off = PackedQuantizationCompressor.decompress(state, scheme)["weight"].float() - form.decode(torch.float32)
        assert (off.abs() <= 0.05 * form.scale.float().repeat_interleave(32, 1) + 1e-6).all()


def test_zero_points_between_steps_are_refused(stored: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="efficientqat"):
        export(str(stored / "rtn"), tmp_path / "out", format="gptq")
    with pytest.raises(UserError, match="no compressed layer"):
        export(str(stored / "model"), tmp_path / "out", format="awq")
    assert not (tmp_path / "out").exists()


def test_a_zero_point_of_zero_takes_gptqs_second_format(stored: Path, tmp_path: Path) -> None:
    from modicum.compress.export_codes import write

    model = load_model(stored / "whole")
    form: Any = model.get_submodule("layers.0.mlp.up")
    with torch.no_grad():
        form.zero[3, 1] = 8 * form.scale[3, 1].float()  # z = 0
    settings = write(model, tmp_path / "out", stored / "whole", "gptq")
    assert settings["checkpoint_format"] == "gptq_v2"
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    got = gptq(tensors, "model.layers.0.mlp.up_proj", 0)
    codes = codes_of("up", load_model(stored / "whole").get_submodule("layers.0.mlp.up"))
    assert int(codes.zero_OG.min()) >= 0
    np.testing.assert_allclose(
        got[3, 32:], codes.codes_OI[3, 32:].numpy() * float(form.scale[3, 1].to(torch.float16)), rtol=1e-3
    )
