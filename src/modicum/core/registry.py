"""The registry: ports and methods, found by where their files are.

A *port* is a package `modicum.ROOM.PORTS` whose docstring starts with `port NAME: summary`, whose
`__init__` defines exactly one direct subclass of `Method` (the port's base class), and which names its
`BASELINE`. A *method* is any other file in that package not beginning with an underscore; its
docstring starts with `KEY: summary`. Listing reads those first lines as text and imports nothing;
a method is imported when it is loaded. Files beginning with an underscore (`_conformance.py`) belong
to the port. Another distribution adds methods through the entry-point group `modicum.methods`, with
entry names `PORT/KEY` and the module as value, and ports through `modicum.ports`, with names `ROOM/PORT` and the
package as value.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.metadata
import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, Generic, TypeVar, overload

from modicum.core.errors import UserError, unknown

ROOT = Path(__file__).resolve().parents[1]
_FIRST_LINE = re.compile(r'^\s*[rR]?"""(?:(port) )?([A-Za-z0-9][\w.+-]*): (.*?)\.?(?:""")?\s*$')
_PROVIDES = re.compile(r"^    provides\b[^=\n]*= frozenset\((.*?)\)$", re.MULTILINE | re.DOTALL)
_BASELINE = re.compile(r'^BASELINE\s*=\s*"([^"]+)"', re.MULTILINE)
_SEVERAL = re.compile(r"^SEVERAL\s*=\s*True\b", re.MULTILINE)


@dataclass(frozen=True)
class Capabilities:
    """What a method provides to, requires of and conflicts with the rest of a choice; see `core.compose`."""

    provides: frozenset[str] = frozenset()
    requires: frozenset[str] = frozenset()
    conflicts: frozenset[str] = frozenset()


class Method:
    """Base of every port's base class: what all methods of all ports have in common.

    `Config` is the module-level dataclass of the method's file, found by the registry. The three sets of
    capabilities are literals; `core.compose` decides by them what can be combined. Where a knob decides, a method
    overrides `capabilities`.
    """

    provides: ClassVar[frozenset[str]] = frozenset()
    requires: ClassVar[frozenset[str]] = frozenset()
    conflicts: ClassVar[frozenset[str]] = frozenset()

    @classmethod
    def capabilities(cls, config: Any) -> Capabilities:
        """The class's capabilities with these knobs."""
        return Capabilities(cls.provides, cls.requires, cls.conflicts)


@dataclass(frozen=True)
class MethodInfo:
    port: str
    key: str
    summary: str
    module: str
    path: Path | None  # None for a plug-in that is not imported yet

    @property
    def card(self) -> str:
        """The full module docstring, read without importing."""
        if self.path is None:
            return load(self.port, self.key).module.__doc__ or ""
        import ast

        return ast.get_docstring(ast.parse(self.path.read_text(encoding="utf-8"))) or ""


@dataclass(frozen=True)
class PortInfo:
    name: str
    summary: str
    package: str
    path: Path
    baseline: str
    several: bool = False  # whether a choice may name any number of its methods (`SEVERAL = True`), not exactly one
    of_room: str = ""  # of a plug-in's port

    @property
    def package_name(self) -> str:
        return self.of_room or self.package.split(".")[1]


M = TypeVar("M", bound=Method)


@dataclass(frozen=True)
class Loaded(Generic[M]):
    """An imported method: its class, its `Config` and its module."""

    info: MethodInfo
    cls: type[M]
    config: type
    module: ModuleType


def _first_line(path: Path) -> tuple[bool, str, str] | None:
    with open(path, encoding="utf-8") as file:
        for line in file:
            if line.strip() and not line.startswith("#"):
                match = _FIRST_LINE.match(line)
                return (bool(match[1]), match[2], match[3]) if match else None
    return None


@functools.cache
def ports() -> dict[str, PortInfo]:
    """Every port by name, sorted; nothing is imported."""
    packages = [
        (p, f"modicum.{p.parent.parent.name}.{p.parent.name}", "") for p in sorted(ROOT.glob("*/*/__init__.py"))
    ]
    for entry in importlib.metadata.entry_points(group="modicum.ports"):
        spec = importlib.util.find_spec(entry.value)
        if spec is None or spec.origin is None:
            raise UserError(f"port {entry.name!r} of a plug-in is not there: {entry.value}; install it again")
        packages.append((Path(spec.origin), entry.value, entry.name.partition("/")[0]))
    by_name: dict[str, PortInfo] = {}
    for path, package, name in packages:
        head = _first_line(path)
        if head and head[0]:
            if head[1] in by_name:
                raise UserError(f"port {head[1]!r} of {package} is there already: {by_name[head[1]].package}")
            text = path.read_text(encoding="utf-8")
            baseline = _BASELINE.search(text)
            if not baseline:
                raise UserError(f'port {head[1]!r} in {path} names no baseline; add BASELINE = "KEY"')
            several = bool(_SEVERAL.search(text))
            by_name[head[1]] = PortInfo(head[1], head[2], package, path.parent, baseline[1], several, name)
    return dict(sorted(by_name.items()))


def port(name: str) -> PortInfo:
    if name not in ports():
        raise unknown("port", name, ports(), "Type: modicum ls")
    return ports()[name]


@functools.cache
def methods(port_name: str) -> dict[str, MethodInfo]:
    """Every method of a port by key: the baseline first, then by name; nothing is imported."""
    info_of_port = port(port_name)
    by_key = {}
    for path in info_of_port.path.glob("*.py"):
        if path.name.startswith("_"):
            continue
        head = _first_line(path)
        if head is None or head[0]:
            raise UserError(f'{path}: the first line must read """KEY: what it does; got something else')
        by_key[head[1]] = MethodInfo(port_name, head[1], head[2], f"{info_of_port.package}.{path.stem}", path)
    for entry in importlib.metadata.entry_points(group="modicum.methods"):
        entry_port, _, key = entry.name.partition("/")
        if entry_port != port_name or not key:
            continue
        if key in by_key:
            raise UserError(
                f"method {entry.name!r} of {entry.value} is already taken by {by_key[key].module}; rename one of them"
            )
        by_key[key] = MethodInfo(port_name, key, f"plug-in {entry.value}", entry.value, None)
    return dict(sorted(by_key.items(), key=lambda item: (item[0] != info_of_port.baseline, item[0])))


def base_class(port_name: str) -> type:
    """The one direct subclass of `Method` that the port's package defines."""
    module = importlib.import_module(port(port_name).package)
    bases = [
        v
        for v in vars(module).values()
        if isinstance(v, type) and Method in v.__bases__ and v.__module__ == module.__name__
    ]
    if len(bases) != 1:
        raise UserError(
            f"port {port_name!r} must define one direct subclass of Method in {module.__name__}, "
            f"found {[b.__name__ for b in bases]}"
        )
    return bases[0]


@overload
def load(port_name: str, key: str) -> Loaded[Any]: ...
@overload
def load(port_name: str, key: str, base: type[M]) -> Loaded[M]: ...
@functools.cache  # type: ignore[misc]
def load(port_name: str, key: str, base: type[Any] = Method) -> Loaded[Any]:
    """Import one method. Raises `UserError` with the nearest valid key for an unknown one.

    base: the port's class, so that a type checker knows what is loaded: `load("linear", key, LinearForm).cls`.
    """
    known = methods(port_name)
    if key not in known:
        raise unknown(f"{port_name} method", key, known, f"Type: modicum ls {port_name}")
    info = known[key]
    module = importlib.import_module(info.module)
    base = base_class(port_name)
    classes = [
        v
        for v in vars(module).values()
        if isinstance(v, type)
        and issubclass(v, base)
        and v.__module__ == module.__name__
        and not v.__name__.startswith("_")
    ]
    config = getattr(module, "Config", None)
    if len(classes) != 1 or not dataclasses.is_dataclass(config) or not isinstance(config, type):
        raise UserError(
            f"{info.module}: a method file holds one dataclass Config and one public subclass of "
            f"{base.__name__}; found {[c.__name__ for c in classes]} and Config={config!r}"
        )
    return Loaded(info, classes[0], config, module)


def providers(word: str) -> dict[str, list[str]]:
    """Keys by port of the methods whose class provides the capability, read as text: nothing is imported."""
    keys_by_port: dict[str, list[str]] = {}
    for name, port_info in ports().items():
        inherited = _provides(port_info.path / "__init__.py") or frozenset()
        for key, info in methods(name).items():
            words = _provides(info.path) if info.path else load(name, key).cls.provides
            if word in (inherited if words is None else words):
                keys_by_port.setdefault(name, []).append(key)
    return keys_by_port


def _provides(path: Path) -> frozenset[str] | None:
    match = _PROVIDES.search(path.read_text(encoding="utf-8"))
    return frozenset(re.findall(r'"([^"]+)"', match[1])) if match else None


def build(port_name: str, choice: Any, *runtime: Any, **more: Any) -> Any:
    """Make a method from `choice` (key, `key:knob=value,...`, mapping or `Choice`).

    `runtime`: the constructor arguments of the port's methods, after their config.
    """
    from modicum.core.choice import Choice

    picked = Choice.parse(port_name, choice)
    return load(port_name, picked.method).cls(picked.config(), *runtime, **more)
