"""Which files decide what a method's measurement gives, as a hash: what says that a record is stale.

Those are the method's file, the `__init__` of its port's package, the port's bench with its private helpers, the
measurement of its own that the method may have there, and the files that these import within modicum, read as text.
Docstrings, comments and blank lines are left out of the hash: rewording one changes no figure. C sources beside
a package that is imported count as well.

What lies deeper (the training loop, the engine, the data stream) does not count: with it every record would be stale
after every commit. Tests hold its results; who changes them on purpose measures anew. Not seen either: modules that are
looked up by a name made at run time, and other distributions, whose versions stand in the record.
"""

from __future__ import annotations

import ast
import functools
import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from modicum.bench.card import bench_path, own_bench_path, source
from modicum.core import compose, registry
from modicum.core.files import fingerprint

NATIVE = (".c", ".h", ".cu", ".cpp")


def bench_hash(port: str) -> str:
    """16 hex digits over a bench's file and the private helpers beside it that it reaches."""
    return _hash(_bench_files(port))


def code_hash(port: str, method: str) -> str:
    """16 hex digits over the files that decide what measuring this method gives."""
    return _hash(method_files(port, method))


def _bench_files(port: str) -> set[Path]:
    path = bench_path(port)
    return {p for p in reach([path]) if p.parent == path.parent and p.name != "__init__.py"}


def method_files(port: str, method: str) -> set[Path]:
    """The files of a method, of the halves it brings, of its port and its bench, and those that they import."""
    halves = [(port, method), *((half.port, half.method) for half in compose.brings(port, method))]
    own = [source(registry.methods(p)[key]) for p, key in halves] + [own_bench_path(port, method)]
    roots = {p for p in (*own, registry.port(port).path / "__init__.py", *_bench_files(port)) if p.exists()}
    return roots.union(*(_imported(path) for path in roots))


def reach(files: Iterable[Path]) -> set[Path]:
    """`files` that exist, and all files of modicum that they import, directly or not."""
    reached: set[Path] = set()
    todo = [f for f in files if f.exists()]
    while todo:
        path = todo.pop()
        if path not in reached:
            reached.add(path)
            todo += _imported(path)
    return reached


def _imported(path: Path) -> tuple[Path, ...]:
    return _read(path, path.stat().st_mtime_ns)[1] if path.suffix == ".py" else ()


def _hash(files: Iterable[Path]) -> str:
    return fingerprint(sorted((_name(p), _read(p, p.stat().st_mtime_ns)[0]) for p in files))


def _name(path: Path) -> str:
    """The same wherever modicum is installed; a plug-in's file goes by its own name."""
    return path.relative_to(registry.ROOT).as_posix() if path.is_relative_to(registry.ROOT) else path.name


@functools.lru_cache(maxsize=4096)
def _read(path: Path, changed: int) -> tuple[str, tuple[Path, ...]]:
    """A file's hash and the files it imports; `changed`, its time of change, makes a new version another entry."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".py":
        return hashlib.sha256(text.encode()).hexdigest(), ()
    tree = ast.parse(text)
    imported = [p for module in _imports(tree) for p in _modules(path, *module)]
    if path.name == "__init__.py":
        imported += sorted(p for p in path.parent.iterdir() if p.suffix in NATIVE)
    return hashlib.sha256("\n".join(_statements(tree, text)).encode()).hexdigest(), tuple(dict.fromkeys(imported))


def _statements(tree: ast.Module, text: str) -> Iterator[str]:
    """The lines of a file without its docstrings, its lines of comment and its blank lines."""
    dropped: set[int] = set()
    literal: set[int] = set()  # lines that begin within a string
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            if ast.get_docstring(node, clean=False) is not None:
                dropped.update(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
        elif isinstance(node, ast.Constant | ast.JoinedStr) and (node.end_lineno or 0) > node.lineno:
            literal.update(range(node.lineno + 1, (node.end_lineno or 0) + 1))
    for number, line in enumerate(text.splitlines(), 1):
        if number in dropped or (number not in literal and line.lstrip()[:1] in ("", "#")):
            continue
        yield line


def _imports(tree: ast.AST) -> Iterator[tuple[int, str, tuple[str, ...]]]:
    """(level, module, names) of every import that can run: those for the type checker alone are left out."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            for other in node.orelse:
                yield from _imports(other)
        elif isinstance(node, ast.Import):
            yield from ((0, alias.name, ()) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.level, node.module or "", tuple(alias.name for alias in node.names)
        else:
            yield from _imports(node)


def _modules(path: Path, level: int, module: str, names: tuple[str, ...]) -> Iterator[Path]:
    """The files that one import statement of `path` runs, those of other distributions left out."""
    parts = module.split(".") if module else []
    if level:
        start = path.parents[level - 1]
    elif parts[0] == registry.ROOT.name:
        start, parts = registry.ROOT, parts[1:]
    else:
        return
    folders = [start.joinpath(*parts[:depth]) for depth in range(len(parts) + 1)]
    for candidate in [*folders, *(folders[-1] / name for name in names)]:
        yield from (p for p in (candidate / "__init__.py", candidate.with_suffix(".py")) if p.is_file())
