"""Starting a method: its file and its test, made from the port's baseline and protocol.

The new file is the baseline's under the new name, without its card, claims and sweeps, with what else the protocol lets
a method do as comments. It passes what the baseline passes, and is then changed into the method meant. No templates are
kept: a port that has a protocol and a baseline has all that is needed.
"""

from __future__ import annotations

import ast
import keyword
import re
import textwrap
from dataclasses import dataclass
from pathlib import Path
from string import Template

from modicum.bench import record
from modicum.bench.card import source
from modicum.core import registry
from modicum.core.errors import UserError
from modicum.core.files import write_text
from modicum.core.registry import PortInfo

DROPPED = ("CLAIM", "SWEEP", "NOT_MEASURABLE")  # the baseline's own
_KEY = re.compile(r"^[a-z0-9]+([.-][a-z0-9]+)*$")


@dataclass(frozen=True)
class Made:
    """Files of a new method, and the module the registry loads."""

    method: Path
    test: Path
    module: str
    others: tuple[Path, ...] = ()


def python_name(key: str) -> str:
    """`next-token` -> `next_token`; a leading digit or keyword gets a prefix."""
    name = re.sub(r"\W", "_", key)
    return f"m_{name}" if name[0].isdigit() or keyword.iskeyword(name) else name


def class_name(key: str) -> str:
    name = "".join(part[:1].upper() + part[1:] for part in re.split(r"[.-]", key))
    return f"M{name}" if name[0].isdigit() else name


def render(info: PortInfo, key: str, module: str) -> tuple[str, str]:
    """The text of the method's file and of its test."""
    path = source(registry.methods(info.name)[info.baseline])
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    name = next(n.name for n in tree.body if isinstance(n, ast.ClassDef) and _public(n))
    gone = {line for node in tree.body if _dropped(node) for line in _lines(node)}
    lines = [line for number, line in enumerate(text.splitlines(), 1) if number not in gone]
    body = re.sub(rf"\b{name}\b", class_name(key), "\n".join(lines)).strip("\n")
    body = re.sub(r"\n{4,}", "\n\n\n", body)
    fields = {"key": key, "port": info.name, "module": module, "class_name": class_name(key), "baseline": info.baseline}
    card, rest = _CARD.substitute(fields), _protocol(info, tree)
    return f"{card}\n{body}\n{rest}", _TEST.substitute(fields)


def _public(node: ast.ClassDef) -> bool:
    return not node.name.startswith("_") and not node.name.endswith("Config")


def _dropped(node: ast.stmt) -> bool:
    """The card and the constants that belong to the baseline."""
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return True
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return any(isinstance(t, ast.Name) and t.id in DROPPED for t in targets)


def _lines(node: ast.stmt) -> range:
    return range(node.lineno, (node.end_lineno or node.lineno) + 1)


def _protocol(info: PortInfo, baseline: ast.Module) -> str:
    """As comments: what of the protocol the baseline leaves as it is."""
    own = {n.name for n in ast.walk(baseline) if isinstance(n, ast.FunctionDef)}
    tree = ast.parse((info.path / "__init__.py").read_text(encoding="utf-8"))
    lines = []
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and any("Method" in ast.unparse(b) for b in node.bases):
            for item in node.body:
                if isinstance(item, ast.FunctionDef) and not item.name.startswith("_") and item.name not in own:
                    returns = f" -> {ast.unparse(item.returns)}" if item.returns else ""
                    summary = (ast.get_docstring(item) or "").split("\n")[0]
                    lines += textwrap.wrap(
                        f"def {item.name}({ast.unparse(item.args)}){returns}: {summary}", 100, subsequent_indent="    "
                    )
    if not lines:
        return ""
    head = f"The protocol also has, see {info.package.replace('.', '/')}/__init__.py:"
    return "\n" + "\n".join(f"# {line}".rstrip() for line in [head, *lines]) + "\n"


def _check(info: PortInfo, key: str) -> None:
    if not _KEY.match(key):
        raise UserError(
            f"{key!r} is not a method's key; write lower-case letters, digits and dashes, such as my-method"
        )
    if key in registry.methods(info.name):
        raise UserError(
            f"{info.name}/{key} is there already: {registry.methods(info.name)[key].module}; take another, "
            f"or read it: modicum show {info.name} {key}"
        )


def in_checkout(port: str, key: str) -> Made:
    """Write method and test into the checkout this package runs from."""
    info = registry.port(port)
    _check(info, key)
    home = record.checkout()
    if home is None:
        raise UserError(
            f"modicum is installed, not a checkout; type: modicum new {port} {key} --to FOLDER "
            "to start a plug-in package"
        )
    made = Made(
        info.path / f"{python_name(key)}.py",
        home / "tests" / info.package_name / f"test_{python_name(key)}.py",
        f"{info.package}.{python_name(key)}",
    )
    _write(made, render(info, key, made.module), {})
    registry.methods.cache_clear()
    return made


def plugin(port: str, key: str, folder: Path) -> Made:
    """Write a package of one's own whose entry point gives the method to modicum once installed."""
    info = registry.port(port)
    _check(info, key)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists and is not an empty folder; --to takes a new one")
    package = f"modicum_{python_name(key)}"
    module = f"{package}.{python_name(key)}"
    target = folder / "src" / package
    others = {
        folder / "pyproject.toml": _PYPROJECT.substitute(
            name=package.replace("_", "-"), port=port, key=key, package=package, module=module
        ),
        target / "__init__.py": f'"""The {port} method {key} for modicum."""\n',
        folder / "README.md": f"# {key}\n\nA {port} method for modicum.\n\n    pip install -e .\n"
        f"    modicum check {port} {key}\n    modicum bench {port} {key}\n",
    }
    made = Made(
        target / f"{python_name(key)}.py",
        folder / "tests" / f"test_{python_name(key)}.py",
        module,
        tuple(others),
    )
    _write(made, render(info, key, module), others)
    return made


def _write(made: Made, texts: tuple[str, str], others: dict[Path, str]) -> None:
    files = {made.method: texts[0], made.test: texts[1]} | others
    for path in files:
        if path.exists():
            raise UserError(f"{path} exists already; choose another key or move that file")
    for path, text in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text)


_CARD = Template('''\
"""$key: say in one line what it does.

Say in two or three sentences what the mechanism is and what it is good for.

    write the equation that defines it

Name the paper here (authors, year, arXiv number, section), and where this file departs from it. It starts as a copy
of the baseline, $baseline.
"""
''')
_TEST = Template('''\
"""Test of $port/$key: what holds for every method, and that it is this one."""

from __future__ import annotations

import pytest
from $module import $class_name

from modicum.bench import conformance
from modicum.core import registry


def test_it_is_found_and_conforms() -> None:
    assert registry.load("$port", "$key").cls is $class_name
    results = conformance.run("$port", ["$key"])
    failed = [f"{r.check}: {r.message}" for r in results if not r.passed]
    assert not failed, failed


def test_it_is_the_equation() -> None:
    pytest.skip("compute the paper's equation naively, in float64, and compare")
''')
_PYPROJECT = Template("""\
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "$name"
version = "0.1.0"
description = "The $port method $key for modicum."
requires-python = ">=3.11"
dependencies = ["modicum"]

[project.entry-points."modicum.methods"]
"$port/$key" = "$module"

[tool.hatch.build.targets.wheel]
packages = ["src/$package"]
""")
