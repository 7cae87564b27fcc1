"""GPTQ's and AWQ's layouts, decoded in numpy as their readers do, bit by bit."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from modicum.cli.export import export
from modicum.compress.export_codes import codes_of
from modicum.compress.method import compress_with
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
            form = model.get_submodule(f"layers.{index}.{ours}")
            want = form.decode(torch.float32).numpy()  # its zero points are rounded to bfloat16, these are whole
            scale = form.scale.float().repeat_interleave(32, 1).numpy()
            assert (np.abs(got - want) <= 0.05 * scale + 1e-6).all()


def test_zero_points_between_steps_are_refused(stored: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="efficientqat"):
        export(str(stored / "rtn"), tmp_path / "out", format="gptq")
    with pytest.raises(UserError, match="no compressed layer"):
        export(str(stored / "model"), tmp_path / "out", format="awq")
    assert not (tmp_path / "out").exists()


def test_a_zero_point_of_zero_takes_gptqs_second_format(stored: Path, tmp_path: Path) -> None:
    from modicum.compress.export_codes import write

    model = load_model(stored / "whole")
    form = model.get_submodule("layers.0.mlp.up")
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
