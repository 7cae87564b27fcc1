"""The verbs about methods: ls, show, bench, new, check, doctor, catalogue, as typed."""

from __future__ import annotations

import importlib
import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from modicum.bench import harness
from modicum.cli import bench as bench_verb
from modicum.cli import main
from modicum.core import registry
from modicum.core.errors import UserError


class Typed:
    """The command line within this process, so that torch is imported once."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
        self.monkeypatch, self.capsys = monkeypatch, capsys

    def __call__(self, *words: str) -> tuple[int, str, str]:
        """(exit code, stdout, stderr)."""
        self.monkeypatch.setattr(sys, "argv", ["modicum", *words])
        self.capsys.readouterr()
        try:
            main()
            code = 0
        except SystemExit as exit_:
            code = int(exit_.code or 0)
        told = self.capsys.readouterr()
        return code, told.out, told.err


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Typed:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")
    return Typed(monkeypatch, capsys)


@pytest.mark.parametrize(
    "words", [["ls"], ["show", "linear", "lora"], ["show", "optimizer"], ["--help"], ["show", "law/power"]]
)
def test_answers_without_torch(words: list[str]) -> None:
    code = (
        "import sys; from modicum.cli import main\ntry:\n    main()\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'transformers', 'faiss', 'scipy', 'plotly', 'pandas'} & set(sys.modules)\n"
        "print('HEAVY', sorted(heavy))"
    )
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "HEAVY []", done.stdout[-300:] + done.stderr[-300:]


def test_listing_is_quick() -> None:
    best = 9.0
    for _ in range(4):
        start = time.perf_counter()
        subprocess.run(
            [sys.executable, "-c", "from modicum.cli import main; main()", "ls"],
            check=True,
            capture_output=True,
        )
        best = min(best, time.perf_counter() - start)
    assert best < 2.0, f"modicum ls took {best:.2f} s"  # about 0.3 s alone; other work may share the machine


def test_show_method_as_json(typed: Typed) -> None:
    found = json.loads(typed("show", "linear", "lora", "--json")[1])
    assert {k["name"] for k in found["knobs"]} >= {"rank", "alpha"} and found["path"].endswith("lora.py")
    assert "adapter" in found["provides"] and found["card"].startswith("lora: ")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["show", "linear", "laro"], "unknown linear method 'laro'. Did you mean 'lora'?"),
        (["show", "liner"], "unknown port 'liner'. Did you mean 'linear'?"),
        (["bench", "optimizer", "adamv"], "unknown optimizer method 'adamv'. Did you mean 'adamw'?"),
        (
            ["bench", "optimizer", "adamw:beta=1"],
            "unknown knob of optimizer/adamw 'beta'. Did you mean 'beta",
        ),
        (["bench", "optimizer", "--seeds", "a"], "is not a seed; write 0,1,2 or 0-4"),
        (["bench", "optimizer", "--budget", "soon"], "is not a budget"),
        (["bench", "law", "--budget", "60s"], "cannot hold methods to a limit of seconds"),
        (["bench", "optimizer", "--scale", "tokns=5"], "unknown knob of bench optimizer 'tokns'"),
        (["bench", "index", "--data", "/nowhere", "--quick"], "/nowhere does not exist"),
        (["check", "linear", "laro"], "unknown linear method 'laro'"),
        (["new", "linear", "lora"], "is there already"),
    ],
)
def test_mistakes_are_one_line(words: list[str], message: str, typed: Typed, tmp_path: Path) -> None:
    code, _, err = typed(*words)
    lines = [line for line in err.splitlines() if line.startswith("modicum: ")]
    assert code == 2 and len(lines) == 1 and message in lines[0], err
    assert "Traceback" not in err and not list(tmp_path.iterdir())


def test_bench_writes_records_plot_and_table(typed: Typed, tmp_path: Path) -> None:
    words = ["bench", "schedule", "constant", "--quick", "--seeds", "0-1", "--evidence", "evidence"]
    code, out, err = typed(*words)
    assert code == 0, err
    files = {path.name: path.read_text() for path in (tmp_path / "evidence" / "schedule").iterdir()}
    assert {name: text.count("\n") for name, text in files.items()} == {"cosine.jsonl": 2, "constant.jsonl": 2}
    assert "cosine" in out and "baseline" in out and "half_way_bits_per_byte" in out
    assert (tmp_path / "runs" / "bench" / "schedule.html").stat().st_size > 1e6
    assert "4/4 runs" in err
    again = json.loads(typed(*words, "--resume", "--json", "--plot", "p.html")[1])
    assert (again["measured"], again["skipped"]) == (0, 4) and (tmp_path / "p.html").exists()
    assert [row["choice"] for row in again["rows"]] == ["cosine", "constant"]
    assert files == {path.name: path.read_text() for path in (tmp_path / "evidence" / "schedule").iterdir()}
    measured = typed("show", "schedule", "constant", "--evidence", "evidence")[1]
    assert "measured  constant: bits per byte" in measured and "tier smoke, seeds 0, 1" in measured


def test_what_is_missing_or_stale_is_listed_and_then_measured(typed: Typed, tmp_path: Path) -> None:
    settings = ["--quick", "--seeds", "0", "--evidence", "evidence"]
    out = typed("bench", "schedule", "constant", "--missing", "--list", *settings)[1]
    assert "schedule/constant missing at tier smoke" in out and "schedule/cosine missing" in out
    assert not list(tmp_path.iterdir())
    code, out, err = typed("bench", "schedule", "constant", "--missing", *settings)
    assert code == 0 and "2 measured, 0 from earlier; tier smoke" in out, err
    out = typed("bench", "schedule", "constant", "wsd", "--missing", "--stale", "--dry-run", *settings)[1]
    assert out.count("missing at tier") == 1 and "schedule/wsd" in out and " stale " not in out
    assert "1 measured, 1 from earlier" in typed("bench", "schedule", "constant", "wsd", "--missing", *settings)[1]
    path = tmp_path / "evidence" / "schedule" / "constant.jsonl"
    path.write_text(re.sub('"code": "[0-9a-f]+"', '"code": ""', path.read_text()))
    found = json.loads(typed("bench", "schedule", "--stale", "--list", "--json", *settings)[1])
    assert [s["choice"] for s in found["stale"]] == ["constant"] and found["missing"] == []
    assert "1 measured, 1 from earlier" in typed("bench", "schedule", "--stale", *settings)[1]
    assert "schedule: nothing to measure" in typed("bench", "schedule", "--stale", *settings)[1]
    code, _, err = typed("bench", "schedule", "--list", *settings)
    assert code == 2 and "--list goes with --missing or --stale" in err


def test_interrupted_bench_ends_with_130_and_its_table(typed: Typed, monkeypatch: pytest.MonkeyPatch) -> None:
    real = harness._measure

    def stop_at_second_seed(bench: Any, choice: Any, seed: int, settings: Any) -> Any:
        if seed == 1:
            raise KeyboardInterrupt
        return real(bench, choice, seed, settings)

    monkeypatch.setattr(harness, "_measure", stop_at_second_seed)
    code, out, err = typed("bench", "schedule", "constant", "--quick", "--evidence", "evidence")
    assert code == 130 and "2 measured" in out and "what was measured is kept" in err


def test_every_port_in_turn(typed: Typed, monkeypatch: pytest.MonkeyPatch) -> None:
    few = {name: harness.benches()[name] for name in ("index", "schedule")}
    monkeypatch.setattr(harness, "benches", lambda: few)
    code, out, err = typed("bench", "all", "--quick", "--seeds", "0", "--evidence", "evidence")
    assert code == 0 and "hnsw" in out and "cosine" in out, err
    code, _, err = typed("bench", "all", "--quick", "--scale", "tokens=600", "--seeds", "0", "--evidence", "evidence")
    assert code == 1 and "not everything could be measured: index" in err  # an index has no such knob
    assert typed("bench", "all", "--json")[0] == 2


def test_check_reads_well(typed: Typed) -> None:
    code, out, _ = typed("check", "schedule", "cosine")
    assert code == 0 and "schedule/cosine" in out and re.search(r"(\d+) of \1 checks hold", out)


def test_a_broken_plugin_does_not_conform(typed: Typed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From `new --to` to `check`, with one line changed for the worse."""
    code, out, err = typed("new", "schedule", "broken-line", "--to", "plug")
    assert code == 0 and "pip install -e plug" in out, err
    info = tmp_path / "modicum_broken_line-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: modicum-broken-line\nVersion: 0.1.0\n")
    (info / "entry_points.txt").write_text(
        "[modicum.methods]\nschedule/broken-line = modicum_broken_line.broken_line\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.syspath_prepend(tmp_path / "plug" / "src")
    registry.methods.cache_clear()
    try:
        assert "say in one line what it does" in typed("show", "schedule/broken-line")[1]
        assert typed("check", "schedule", "broken-line")[0] == 0
        file = tmp_path / "plug" / "src" / "modicum_broken_line" / "broken_line.py"
        file.write_text(file.read_text().replace("math.cos(", "float('nan') * math.cos("))
        registry.load.cache_clear()
        for name in [m for m in sys.modules if m.startswith("modicum_broken_line")]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setattr(sys, "dont_write_bytecode", True)
        importlib.invalidate_caches()
        shutil.rmtree(file.parent / "__pycache__", ignore_errors=True)
        code, out, err = typed("check", "schedule", "broken-line")
        assert code == 1 and "FAIL" in out and "does not conform" in err, out
        results = json.loads(typed("check", "schedule", "broken-line", "--json")[1])
        assert any(not r["passed"] and r["message"] for r in results)
    finally:
        monkeypatch.undo()
        registry.methods.cache_clear()
        registry.load.cache_clear()


def test_doctor_measures_this_machine(typed: Typed) -> None:
    found = json.loads(typed("doctor", "--json")[1])
    rates = found["ceilings"]["cpu"]
    assert 1e8 < rates["copy_bytes_per_s"] < 1e13 and 1e8 < rates["matmul_float32_flop_per_s"] < 1e15
    assert found["machine"]["cores"] >= 1 and "torch" in found["versions"]
    assert set(found["extras"]) >= {"ray", "peft"}
    text = typed("doctor")[1]
    assert "memory" in text and "cpu reaches" in text and "GFLOP/s" in text and "cuda graphs" in text


@pytest.mark.parametrize(("text", "seeds"), [("0", [0]), ("0,2,1", [0, 2, 1]), ("3-5,4", [3, 4, 5])])
def test_seeds(text: str, seeds: list[int]) -> None:
    assert bench_verb.parse_seeds(text) == seeds


def test_no_seeds() -> None:
    with pytest.raises(UserError):
        bench_verb.parse_seeds("5-3")
