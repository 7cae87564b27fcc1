"""The hash of the files behind a method, and what it says of records: exactly those of changed methods are stale."""

from __future__ import annotations

import dataclasses
import functools
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_harness import SETTINGS, Counting, Scale, choices
from test_record import lab, make

from modicum.bench import card, code, harness, record, todo
from modicum.bench.measurement import Settings
from modicum.core import registry
from modicum.core.choice import Choice


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of modicum's source that registry and hashes read, so that a test may change it."""
    home = tmp_path / "src" / "modicum"
    shutil.copytree(registry.ROOT, home, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    monkeypatch.setattr(registry, "ROOT", home)
    monkeypatch.setattr(card, "PLACE", home / "bench" / "ports")
    caches = [f for f in vars(registry).values() if hasattr(f, "cache_clear")]
    for found in caches:
        found.cache_clear()
    yield home
    monkeypatch.undo()
    for found in caches:
        found.cache_clear()


def change(path: Path, line: str = "CHANGED = 1") -> None:
    text = path.read_text()
    path.write_text(f"{text}\n{line}\n")


def stale_of(records: list) -> set[str]:
    return {found.choice for found in todo.stale(records)}


def test_one_changed_file_makes_one_method_stale(source: Path) -> None:
    keys = list(registry.methods("schedule"))
    here = lab(port="schedule")
    records = [make(k, lab=here, baseline="cosine", code=code.code_hash("schedule", k)) for k in keys]
    assert stale_of(records) == set()
    change(source / "train" / "schedules" / "wsd.py")
    assert stale_of(records) == {"wsd"}
    change(source / "train" / "optimizers" / "galore.py")
    assert stale_of(records) == {"wsd"}, "nothing of schedules reaches it"
    change(source / "bench" / "training.py", "# only a comment")
    assert stale_of(records) == {"wsd"}
    change(source / "bench" / "training.py")
    assert stale_of(records) == set(keys), "every bench that trains is behind them"
    assert stale_of([make(k, lab=here, code="") for k in keys]) == set(keys), "records of unknown code"


def test_helpers_and_inherited_methods_count(source: Path) -> None:
    def hashes(port: str, *keys: str) -> list[str]:
        return [code.code_hash(port, key) for key in keys]

    before = hashes("optimizer", "galore", "adamw"), hashes("law", "onset", "chinchilla", "power")
    change(source / "train" / "optimizers" / "_moments.py")
    change(source / "laws" / "forms" / "chinchilla.py")
    after = hashes("optimizer", "galore", "adamw"), hashes("law", "onset", "chinchilla", "power")
    assert [a == b for a, b in zip(before[0], after[0], strict=True)] == [False, True]
    assert [a == b for a, b in zip(before[1], after[1], strict=True)] == [False, False, True]


def test_a_changed_bench_is_another_lab_and_its_helper_too(source: Path) -> None:
    before = code.bench_hash("linear"), code.bench_hash("kv")
    change(source / "bench" / "ports" / "_linear_stored.py")
    assert code.bench_hash("linear") != before[0] and code.bench_hash("kv") == before[1]
    change(source / "bench" / "training.py")
    change(source / "bench" / "ports" / "kv.py", '"""a docstring of nothing"""\nX = 1')
    assert code.bench_hash("kv") != before[1]


def test_only_the_newest_lab_of_a_tier_can_be_stale() -> None:
    now = code.code_hash("schedule", "wsd")
    old = make("wsd", lab=lab("1", port="schedule"), code="old", time="2026-01-01")
    new = make("wsd", lab=lab("2", port="schedule"), code=now, time="2026-01-02")
    gpu = make("wsd", lab=lab("3", port="schedule", tier="gpu", device="cuda"), code="old", time="2026-01-01")
    gone = make("no-such", lab=lab("2", port="schedule"), code="old")
    assert todo.stale([old, new, gone]) == []
    assert [(s.choice, s.lab.id, s.seeds) for s in todo.stale([old, new, gpu])] == [("wsd", "3", [0])]


def test_imports_are_read_as_text(tmp_path: Path) -> None:
    (tmp_path / "other.py").write_text("import json\n")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "__init__.py").write_text("")
    (tmp_path / "sub" / "deep.py").write_text("from ..other import x\n")
    top = tmp_path / "plugin.py"
    top.write_text(
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    from modicum.serve.engine import Engine\n"
        "def late():\n    from modicum.core.files import sha256\n    from .sub import deep\n"
    )
    names = {path.relative_to(tmp_path).as_posix() for path in code.reach([top]) if path.is_relative_to(tmp_path)}
    assert names == {"plugin.py", "sub/__init__.py", "sub/deep.py", "other.py"}
    own = {path.relative_to(registry.ROOT).as_posix() for path in code.reach([top]) - set(tmp_path.rglob("*.py"))}
    assert own == {"__init__.py", "core/__init__.py", "core/files.py"}


def test_words_do_not_count_and_strings_do(tmp_path: Path) -> None:
    path = tmp_path / "a.py"

    def made(text: str) -> str:
        path.write_text(text)
        code._read.cache_clear()
        return code._hash([path])

    first = made('"""One."""\n\nx = 1\nt = """\n# a\n"""\n')
    assert made('"""Two\nlines."""\n# why\nx = 1\n\nt = """\n# a\n"""\n') == first
    assert made('"""One."""\n\nx = 1\nt = """\n# b\n"""\n') != first
    assert made('"""One."""\n\nx = 2\nt = """\n# a\n"""\n') != first


def test_what_decides_is_the_method_its_bench_and_what_they_import() -> None:
    names = {path.relative_to(registry.ROOT).as_posix() for path in code.method_files("kv", "snapkv")}
    assert {"serve/kv/snapkv.py", "serve/kv/__init__.py", "bench/ports/kv.py", "bench/training.py"} <= names
    assert "train/loop.py" not in names, "behind bench/training.py: with the loop every record would always be stale"
    stored = {path.name for path in code.method_files("linear", "int8")}
    assert "_linear_stored.py" in stored, "the bench's private helper"


def test_baselines_are_measured_once_per_lab(tmp_path: Path) -> None:
    harness.run(Counting().bench(), choices("constant"), [0, 1], SETTINGS, tmp_path)
    later = Counting()
    outcome = harness.run(later.bench(), choices("wsd"), [0, 1], SETTINGS, tmp_path)
    assert later.calls == [("wsd", 0), ("wsd", 1)] and outcome.skipped == 2
    named = Counting()
    harness.run(named.bench(), choices(), [0], SETTINGS, tmp_path, again=True)
    assert ("cosine", 0) in named.calls


def test_other_code_is_measured_again_and_takes_the_place_of_the_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    harness.run(Counting().bench(), choices("constant", "wsd"), [0], SETTINGS, tmp_path)
    real = code.code_hash
    monkeypatch.setattr(code, "code_hash", lambda port, key: "new" if key == "constant" else real(port, key))
    found = record.read(tmp_path, "schedule")
    assert [s.choice for s in todo.stale(found)] == ["constant"]
    again = Counting()
    harness.run(again.bench(), choices("constant", "wsd"), [0], SETTINGS, tmp_path, resume=True)
    assert again.calls == [("constant", 0)]
    found = record.read(tmp_path, "schedule")
    assert len(found) == 3 and todo.stale(found) == []


def test_missing_is_what_no_lab_of_these_settings_holds(tmp_path: Path) -> None:
    bench = Counting().bench()
    harness.run(bench, choices("constant"), [0], SETTINGS, tmp_path)
    found = record.read(tmp_path, "schedule")

    def missing(*keys: str, seeds: tuple[int, ...] = (0,), settings: Settings = SETTINGS) -> list[str]:
        fits = functools.partial(harness.fits, bench=bench, settings=settings)
        return [str(c) for c in todo.missing(found, choices(*keys), list(seeds), fits)]

    assert missing("constant", "rewarm") == ["rewarm"]
    assert missing("constant", seeds=(0, 1)) == ["cosine", "constant"], "a seed that is not there"
    assert missing("constant", settings=Settings(scale=Scale(size=3))) == ["cosine", "constant"], "another scale"
    other = [
        dataclasses.replace(r, lab=dataclasses.replace(r.lab, id="elsewhere", bench="older", inputs={"data": {}}))
        for r in found
    ]
    found = other  # another machine's Python, another version of the bench: measured all the same
    assert missing("constant") == []
    assert missing("constant", settings=Settings(scale=Scale(), data=str(tmp_path))) == ["cosine", "constant"]


def test_a_measurement_of_its_own_decides_for_its_method_alone():
    own = {key: {p.name for p in code.method_files("task", key)} for key in ("listops", "needle")}
    assert "_task_listops.py" in own["listops"] and "_task_listops.py" not in own["needle"]
    bench = harness.load("task")
    measures = [harness.measure_of(bench, Choice.parse("task", key)) for key in own]
    assert measures[0].__module__.endswith("._task_listops") and measures[1] is bench.measure
