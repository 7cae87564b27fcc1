"""Starting a method: its file and its reference test from the port's templates.

The templates lie beside the port's methods: `_template.py.txt` becomes the method's file and
`_template_test.py.txt` its test. In both, `$key`, `$port`, `$module`, `$package`,
`$class_name` and `$name` (the key as a Python name) are filled in. The method they make is
complete: it passes the port's conformance suite as it stands, and is then changed into the one meant.
"""

from __future__ import annotations

import keyword
import re
from dataclasses import dataclass
from pathlib import Path
from string import Template

from modicum.bench import record
from modicum.core import registry
from modicum.core.errors import UserError
from modicum.core.files import write_text
from modicum.core.registry import PortInfo

METHOD, TEST = "_template.py.txt", "_template_test.py.txt"
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
    texts = []
    for name in (METHOD, TEST):
        path = info.path / name
        if not path.exists():
            raise UserError(
                f"port {info.name} has no template {path}; copy the file of its baseline "
                f"{info.baseline!r} by hand, or write the template"
            )
        texts.append(
            Template(path.read_text(encoding="utf-8")).safe_substitute(
                key=key,
                port=info.name,
                package=info.package,
                module=module,
                class_name=class_name(key),
                name=python_name(key),
            )
        )
    return texts[0], texts[1]


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
        home / "tests" / info.room / f"test_{python_name(key)}.py",
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
    source = folder / "src" / package
    others = {
        folder / "pyproject.toml": _PYPROJECT.substitute(
            name=package.replace("_", "-"), port=port, key=key, package=package, module=module
        ),
        source / "__init__.py": f'"""The {port} method {key} for modicum."""\n',
        folder / "README.md": f"# {key}\n\nA {port} method for modicum.\n\n    pip install -e .\n"
        f"    modicum check {port} {key}\n    modicum bench {port} {key}\n",
    }
    made = Made(
        source / f"{python_name(key)}.py",
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
