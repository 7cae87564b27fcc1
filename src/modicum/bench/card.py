"""What a method's file says about itself, read as text: card, knobs, claim, paper. Imports nothing heavy.

A method may state the figure its paper claims in a module constant, shown beside what is measured here:

    CLAIM = {"figure": "same perplexity at 0.5x state bytes", "where": "Table 2", "scale": "1B, 13Btok"}

or as one string. Where the figure is a number, `change` (of the quality, as a share of the baseline's: -0.03) and
`cost_ratio` (of the baseline's cost: 0.5) make it one that a measurement can meet or miss.

`NOT_MEASURABLE = "reason"` says that no bench here can judge the method, and why; a bench's file may say so of methods
too: `NOT_MEASURABLE = {"key": "reason"}`.

`SWEEP` names the knob settings that a bench measures instead of the defaults: ("rank=4", "rank=16"), or values by knob,
of which every combination is measured: {"rank": (4, 16), "alpha": (8, 32)}.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import itertools
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modicum.core import registry
from modicum.core.errors import UserError
from modicum.core.registry import MethodInfo, PortInfo

PLACE = Path(__file__).parent / "ports"  # of the benches
CLAIM_FIELDS = ("figure", "where", "scale", "change", "cost_ratio")
_ARXIV = re.compile(r"arXiv:\s*(\d{4}\.\d{4,5})", re.IGNORECASE)
_AUTHORS = re.compile(r"([A-Z][\w'’-]+(?:,? (?:et al\.?|(?:and|&) [A-Z][\w'’-]+))?),? \(?((?:19|20)\d\d)\)?")


@dataclass(frozen=True)
class Knob:
    name: str
    type: str
    default: str  # as written; "" when the knob must be given
    note: str  # comment after the field


@dataclass(frozen=True)
class Card:
    """The text of one method's file."""

    info: MethodInfo
    path: Path
    text: str  # the whole module docstring
    summary: str
    knobs: tuple[Knob, ...]
    capabilities: dict[str, tuple[str, ...]]  # provides, requires, conflicts
    claim: dict[str, Any]
    sweep: tuple[str, ...]  # knob settings to bench instead of the defaults
    paper: tuple[str, str] | None  # (short name, link)


def read_card(info: MethodInfo) -> Card:
    """Parse the file of a method. Raises `UserError` naming what is wrong with it."""
    path = source(info)
    try:
        tree, text = _parsed(path, path.stat().st_mtime_ns)
    except SyntaxError as error:
        raise UserError(
            f"{path}:{error.lineno}: {error.msg}; the file of {info.port}/{info.key} is not Python"
        ) from None
    doc = ast.get_docstring(tree) or ""
    head = doc.split("\n\n")[0].partition(": ")[2].replace("\n", " ").strip()
    config = next((n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "Config"), None)
    return Card(
        info,
        path,
        doc,
        head.rstrip(".") or info.summary,
        _knobs(config, tree, text),
        {name: _literal(name, tree, text) for name in ("provides", "requires", "conflicts")},
        _claim(tree, path),
        _sweep(tree, path),
        paper(doc),
    )


@functools.lru_cache(maxsize=512)
def _parsed(path: Path, changed: int) -> tuple[ast.Module, str]:
    """Tree and text of a file; `changed`, its time of change, makes a new version another entry."""
    text = path.read_text(encoding="utf-8")
    return ast.parse(text), text


def source(info: MethodInfo) -> Path:
    """The file of a method; a plug-in's is located without importing it."""
    if info.path is not None:
        return info.path
    try:
        spec = importlib.util.find_spec(info.module)
    except ModuleNotFoundError:
        spec = None
    if spec is None or spec.origin is None:
        raise UserError(f"the plug-in {info.module} of {info.port}/{info.key} is not there; install its package again")
    return Path(spec.origin)


def fields(path: Path, name: str) -> tuple[Knob, ...]:
    """The fields of the class `name` in a file, read as text."""
    tree, text = _parsed(path, path.stat().st_mtime_ns)
    return _knobs(next((n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == name), None), tree, text)


def _knobs(config: ast.ClassDef | None, tree: ast.Module, text: str) -> tuple[Knob, ...]:
    """Fields of a dataclass as written, those of its bases first, the last base before the others as dataclasses do."""
    knobs: dict[str, Knob] = {}
    for base in reversed(config.bases) if config else []:
        knobs |= {knob.name: knob for knob in _inherited(ast.unparse(base), tree, text)}
    lines = text.splitlines()
    for node in config.body if config else []:
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
            continue
        if ast.unparse(node.annotation).startswith("ClassVar"):
            continue
        default = ast.unparse(node.value) if node.value else ""
        tail = lines[(node.end_lineno or node.lineno) - 1][node.end_col_offset or 0 :]
        tail = re.sub(r"#\s*type: ignore\[.*?\]", "", tail)
        note = [tail.partition("#")[2].strip()] if "#" in tail else []
        line = node.end_lineno or node.lineno  # comments may go on below the field, indented further
        while note and line < len(lines) and re.match(r"\s{12,}#", lines[line]):
            note.append(lines[line].partition("#")[2].strip())
            line += 1
        factory = re.search(r"default_factory=(\w+)|default=(.+?)[,)]", default)
        if default.startswith("field(") and factory:
            default = factory[2] or {"list": "[]", "dict": "{}", "tuple": "()"}.get(factory[1], factory[1] + "()")
        if default.startswith("Field(") and isinstance(node.value, ast.Call) and node.value.args:  # pydantic's
            default = ast.unparse(node.value.args[0])
        knobs[node.target.id] = Knob(node.target.id, _type(node.annotation), default, " ".join(note))
    return tuple(knobs.values())


def _inherited(name: str, tree: ast.Module, text: str) -> tuple[Knob, ...]:
    parent = _class(name, tree, text)
    return _knobs(*parent) if parent else ()


def _class(name: str, tree: ast.Module, text: str) -> tuple[ast.ClassDef, ast.Module, str] | None:
    """The class `name`, defined in this file or imported into it by name, with the file it stands in."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return node, tree, text
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                module, cls = node.module, alias.name
                if name == f"{alias.asname or alias.name}.{name.rpartition('.')[2]}":  # a class of an imported module
                    module, cls = f"{node.module}.{alias.name}", name.rpartition(".")[2]
                elif (alias.asname or alias.name) != name:
                    continue
                path = _module_file(module)
                if path is not None:
                    return _class(cls, *_parsed(path, path.stat().st_mtime_ns))
    return None


def _module_file(module: str) -> Path | None:
    """The file of a module of this package, without importing it; None for others."""
    top, *rest = module.split(".")
    base = registry.ROOT.joinpath(*rest)
    files = [p for p in (base.with_suffix(".py"), base / "__init__.py") if p.exists()]
    return files[0] if top == registry.ROOT.name and files else None


def _type(node: ast.expr) -> str:
    """`Annotated[int, Field(ge=1)]` as `int, ge=1`; other annotations as written."""
    if isinstance(node, ast.Subscript) and ast.unparse(node.value).endswith("Annotated"):
        parts = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        bounds = [ast.unparse(k) for p in parts[1:] if isinstance(p, ast.Call) for k in p.keywords]
        return ", ".join([ast.unparse(parts[0]), *bounds])
    return ast.unparse(node)


def _literal(name: str, tree: ast.Module, text: str) -> tuple[str, ...]:
    """The words that the file's public class, its own or inherited, gives `name`."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name != "Config" and not node.name.startswith("_"):
            value_words = _words(name, node, tree, text)
            if value_words is not None:
                return value_words
    return ()


def _words(name: str, cls: ast.ClassDef, tree: ast.Module, text: str) -> tuple[str, ...] | None:
    for node in cls.body:
        targets = node.targets if isinstance(node, ast.Assign) else []
        targets = [node.target] if isinstance(node, ast.AnnAssign) else targets
        if any(isinstance(t, ast.Name) and t.id == name for t in targets):
            value = node.value  # type: ignore[attr-defined]
            return tuple(sorted(str(n.value) for n in ast.walk(value) if isinstance(n, ast.Constant)))
    for base in cls.bases:
        parent = _class(ast.unparse(base), tree, text)
        words = _words(name, *parent) if parent else None
        if words is not None:
            return words
    return None


def _constant(tree: ast.Module, name: str, path: Path, allowed: str) -> Any:
    """The value written for a module constant, None if there is none."""
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else []
        targets = [node.target] if isinstance(node, ast.AnnAssign) else targets
        if (
            isinstance(node, ast.Assign | ast.AnnAssign)
            and node.value is not None
            and any(isinstance(t, ast.Name) and t.id == name for t in targets)
        ):
            try:
                return ast.literal_eval(node.value)
            except ValueError:
                raise UserError(f"{path}: {name} must be written out, as {allowed}") from None
    return None


def _claim(tree: ast.Module, path: Path) -> dict[str, Any]:
    allowed = (
        "a string, or a mapping with 'figure' and optionally 'where', 'scale' and the numbers 'change', 'cost_ratio'"
    )
    value = _constant(tree, "CLAIM", path, allowed)
    if value is None:
        return {}
    if isinstance(value, str):
        return {"figure": value}
    if isinstance(value, dict) and set(value) <= set(CLAIM_FIELDS) and "figure" in value:
        numbers = {k: value[k] for k in CLAIM_FIELDS[3:] if k in value}
        if all(isinstance(v, int | float) for v in numbers.values()):
            return {k: str(value[k]) for k in CLAIM_FIELDS[:3] if k in value} | numbers
    raise UserError(f"{path}: CLAIM={value!r}; write {allowed}")


def bench_path(port: str) -> Path:
    """Where a port's bench stands, or would stand: that of another distribution's port is its package's `_bench.py`."""
    info = registry.port(port)
    if not info.path.is_relative_to(registry.ROOT):
        return info.path / "_bench.py"
    return PLACE / f"{port.replace('-', '_')}.py"


def own_bench_path(port: str, method: str) -> Path:
    """Where a method's own measurement stands, or would stand: `_PORT_KEY.py` beside the port's bench."""
    path = bench_path(port)
    return path.with_name(f"_{path.stem.strip('_')}_{method.replace('-', '_')}.py")


def not_measurable(info: MethodInfo) -> str:
    """Why nothing can be measured of a method here, from its file or its port's bench; "" where it can."""
    path = source(info)
    own = _constant(_parsed(path, path.stat().st_mtime_ns)[0], "NOT_MEASURABLE", path, "a string")
    bench = bench_path(info.port)
    if own is None and bench.exists():
        tree = _parsed(bench, bench.stat().st_mtime_ns)[0]
        own = (_constant(tree, "NOT_MEASURABLE", bench, '{"key": "reason"}') or {}).get(info.key)
    return own or ""


def _sweep(tree: ast.Module, path: Path) -> tuple[str, ...]:
    allowed = 'a tuple of knob settings such as ("rank=4", "rank=16"), or values by knob such as {"rank": (4, 16)}'
    value = _constant(tree, "SWEEP", path, allowed)
    if value is None:
        return ()
    if isinstance(value, tuple | list) and value and all(isinstance(v, str) for v in value):
        return tuple(value)
    lists = list(value.values()) if isinstance(value, dict) else []
    if lists and all(
        isinstance(v, tuple | list) and v and all(isinstance(x, str | int | float) for x in v) for v in lists
    ):
        settings = itertools.product(*lists)
        return tuple(",".join(f"{k}={v}" for k, v in zip(value, setting, strict=True)) for setting in settings)
    raise UserError(f"{path}: SWEEP={value!r}; write {allowed}")


def claim_text(claim: dict[str, Any]) -> str:
    more = [claim[k] for k in ("where", "scale") if claim.get(k)]
    return claim.get("figure", "") + (f" ({'; '.join(more)})" if more else "")


def paper(doc: str) -> tuple[str, str] | None:
    """(name, link) of the first arXiv paper a card cites, or (name, "") of the first author-and-year."""
    doc = " ".join(doc.split())
    arxiv = _ARXIV.search(doc)
    before = doc[: arxiv.start()] if arxiv else doc
    names = list(_AUTHORS.finditer(before))
    if arxiv:
        # the citation of a link stands right before it
        near = [m for m in names if arxiv.start() - m.end() < 200]
        name = f"{near[-1][1].replace(',', '')} {near[-1][2]}" if near else f"arXiv:{arxiv[1]}"
        return name, f"https://arxiv.org/abs/{arxiv[1]}"
    return (f"{names[0][1].replace(',', '')} {names[0][2]}", "") if names else None


def port_text(info: PortInfo) -> str:
    """A port's module docstring and the docstring of its base class, with the signatures it asks for."""
    tree = ast.parse((info.path / "__init__.py").read_text(encoding="utf-8"))
    parts = [ast.get_docstring(tree) or ""]
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and any("Method" in ast.unparse(b) for b in node.bases):
            parts.append(signature(node))
    return "\n\n".join(parts)


def signature(node: ast.ClassDef) -> str:
    """A class as its interface: docstring, annotated attributes, and methods without their bodies."""
    lines = [f"class {node.name}({', '.join(ast.unparse(b) for b in node.bases)}):"]
    lines += _docstring(node, 1)
    for item in node.body:
        if isinstance(item, ast.AnnAssign):
            lines.append("    " + ast.unparse(item))
        elif isinstance(item, ast.FunctionDef) and (not item.name.startswith("_") or item.name == "__init__"):
            lines += [""] + ["    @" + ast.unparse(d) for d in item.decorator_list]
            returns = f" -> {ast.unparse(item.returns)}" if item.returns else ""
            lines.append(
                f"    def {item.name}({ast.unparse(item.args)}){returns}:" + ("" if ast.get_docstring(item) else " ...")
            )
            lines += _docstring(item, 2)
    return "\n".join(lines)


def _docstring(node: ast.ClassDef | ast.FunctionDef, depth: int) -> list[str]:
    doc = ast.get_docstring(node)
    if not doc:
        return []
    indent = "    " * depth
    lines = [indent + line if line else "" for line in doc.splitlines()]
    lines[0] = indent + '"""' + lines[0].strip()
    lines[-1] += '"""' if len(doc.splitlines()) == 1 else "\n" + indent + '"""'
    return lines
