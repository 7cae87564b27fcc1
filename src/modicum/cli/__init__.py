"""Room cli: one file per command; importing this room imports no torch.

A command ("verb") is `cli/VERB.py`: its docstring's first line is its help, its function of the same name a
Typer function. `modicum --help` reads the first lines only; a verb is imported when it is used.
"""

from __future__ import annotations

import ast
import importlib
import os
import sys
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from modicum.core.errors import ModicumError, unknown

HERE = Path(__file__).parent
ORDER = (
    "run",
    "plan",
    "curate",
    "why",
    "predict",
    "pretrain",
    "adapt",
    "compress",
    "export",
    "fit",
    "flash",
    "index",
    "update",
    "search",
    "retrieval",
    "ask",
    "serve",
    "simulate",
    "chat",
    "eval",
    "qa",
    "bench",
    "ls",
    "get",
    "show",
    "new",
    "check",
    "doctor",
)


def verbs() -> list[str]:
    names = [p.stem for p in HERE.glob("*.py") if not p.stem.startswith("_")]
    return sorted(names, key=lambda v: (ORDER.index(v) if v in ORDER else len(ORDER), v))


class Verbs(TyperGroup):
    """Imports a verb's module only when that verb is used."""

    def list_commands(self, ctx: Any) -> list[str]:
        return verbs()

    def get_command(self, ctx: Any, name: str) -> Any:
        if name not in verbs():
            raise unknown("verb", name, verbs(), "Type: modicum --help")
        if not ctx.resilient_parsing and (len(sys.argv) < 2 or name not in sys.argv):
            return TyperCommand(name, help=_help(name))
        module = importlib.import_module(f"modicum.cli.{name}")
        app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
        app.command(name=name)(getattr(module, name))
        command = typer.main.get_command(app)
        command.name = name
        command.help = command.help or _help(name)
        return command


def _respect_quota() -> None:
    """One thread per processor that a control group grants; libraries start one per processor of the machine."""
    if "OMP_NUM_THREADS" not in os.environ and hasattr(os, "sched_getaffinity"):
        from modicum.budget.machine import cores

        if (granted := cores()) < len(os.sched_getaffinity(0)):
            os.environ["OMP_NUM_THREADS"] = str(granted)


def _help(name: str) -> str:
    return (ast.get_docstring(ast.parse((HERE / f"{name}.py").read_text(encoding="utf-8"))) or "").split("\n")[0]


app = typer.Typer(
    cls=Verbs,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def root() -> None:
    """Language models on a modest budget: curate, pretrain, adapt, compress, ground, serve, evaluate."""


def main() -> None:
    _respect_quota()
    try:
        app()
    except ModicumError as error:
        print(f"modicum: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("\nmodicum: stopped; finished work is kept, the same command resumes it", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(0)
