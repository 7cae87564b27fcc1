"""Options made from specs: one for each field and port, with the spec's defaults."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest
import typer
from click.testing import CliRunner

from modicum.core.spec import options
from modicum.train.config import PretrainSpec, run_ports


def command(verb: str) -> typer.core.TyperCommand:
    app = typer.Typer()
    app.command(name=verb)(getattr(importlib.import_module(f"modicum.cli.{verb}"), verb))
    return typer.main.get_command(app)  # type: ignore[return-value]


def test_every_field_and_port_is_an_option_with_its_help() -> None:
    found = {p.name: p for p in command("pretrain").params}
    for name, one in options(PretrainSpec).items():
        if name != "methods":
            assert f"--{name.replace('_', '-')}" in found[name].opts, name
            assert found[name].help == one.metadata["help"], name  # type: ignore[attr-defined]
    for name in run_ports():
        assert f"--{name}" in found[name].opts
    assert "--batch" in found["batch_tokens"].opts


def test_what_is_not_given_is_left_to_the_spec(monkeypatch: pytest.MonkeyPatch) -> None:
    import modicum.train.pretrain as module

    seen: list[PretrainSpec] = []

    def stop(curated: object, out: object, spec: PretrainSpec, **more: object) -> None:
        seen.append(spec)
        raise SystemExit

    monkeypatch.setattr(module, "pretrain", stop)
    words = ["c", "--out", "o", "--steps", "7", "--parameters", "1.3B", "--batch", "8ktok", "--memory", "cce"]
    words += ["--memory", "mesa", "--targets", "layers.*.q,layers.*.k", "--compile", "--no-masters", "--clip", "0"]
    CliRunner().invoke(command("pretrain"), words)
    given = {"steps": 7, "parameters": 1.3e9, "batch_tokens": 8e3, "memory": ["cce", "mesa"], "compile": True}
    given |= {"targets": ("layers.*.q", "layers.*.k"), "masters": False, "clip": 0.0}
    assert seen == [PretrainSpec(**given)]  # type: ignore[arg-type]


def test_help_needs_no_torch() -> None:
    program = "import sys; from modicum.cli import pretrain, adapt; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
