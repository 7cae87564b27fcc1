"""Core: choices, registry, atomic files, events."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from modicum.core import registry
from modicum.core.choice import Choice
from modicum.core.errors import UserError, unknown
from modicum.core.events import Events, Progress, read_events
from modicum.core.files import atomic_directory, atomic_file, fingerprint, read_json, write_json


def test_listing_methods_imports_no_torch():
    code = (
        "import sys; from modicum.core import registry\n"
        "n = {p: len(registry.methods(p)) for p in registry.ports()}\n"
        "assert len(n) >= 10 and all(n.values()), n\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("arguments", [["--help"], ["ls"]])
def test_help_and_ls_import_no_torch(arguments):
    code = (
        "import sys; from modicum import cli\nsys.argv = ['modicum', *sys.argv[1:]]\n"
        "try:\n    cli.main()\nexcept SystemExit as e:\n    assert not e.code\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, *arguments], check=True, stdout=subprocess.DEVNULL)


def test_every_method_can_be_loaded_and_names_its_file():
    for port in registry.ports():
        baseline = registry.port(port).baseline
        assert next(iter(registry.methods(port))) == baseline
        for key, info in registry.methods(port).items():
            loaded = registry.load(port, key)
            assert issubclass(loaded.cls, registry.base_class(port))
            assert info.card.startswith(f"{key}: ")


def test_choice_is_read_from_text_and_mapping():
    from_text = Choice.parse("optimizer", "adamw:beta2=0.99,weight_decay=0.05")
    from_mapping = Choice.parse("optimizer", {"method": "adamw", "beta2": 0.99, "weight_decay": 0.05})
    assert from_text == from_mapping and from_text.config() == from_mapping.config()
    assert str(from_text) == "adamw:beta2=0.99,weight_decay=0.05"
    assert Choice.parse("mixture", "fixed:weights={a: 1, b: 2}").knobs == {"weights": {"a": 1, "b": 2}}


@pytest.mark.parametrize(
    "port, given, says",
    [
        ("optimizer", "adamv", "Did you mean 'adamw'"),
        ("optimizer", "adamw:beta3=1", "Did you mean 'beta"),
        ("optimizer", "adamw:beta2=often", "not valid"),
        ("optimizer", "adamw:beta2", "KNOB=VALUE"),
        ("optimizer", 3, "Allowed"),
        ("optimiser", "adamw", "Did you mean 'optimizer'"),
    ],
)
def test_wrong_choices_are_explained(port, given, says):
    with pytest.raises(UserError, match=says) as caught:
        Choice.parse(port, given).config()
    assert caught.value.exit_code == 2 and "\n" not in str(caught.value)


def test_near_miss_names_the_nearest():
    assert "Did you mean 'cosine'" in str(unknown("schedule", "cosin", ["cosine", "wsd"]))


def test_a_failing_block_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"x": 1})
    with pytest.raises(RuntimeError), atomic_file(path) as file:
        file.write(b"half")
        raise RuntimeError
    with pytest.raises(RuntimeError), atomic_directory(tmp_path / "d") as folder:
        (folder / "part").write_text("half")
        raise RuntimeError
    assert read_json(path) == {"x": 1} and [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_killed_writer_leaves_whole_files_only(tmp_path):
    code = (
        "import sys; from modicum.core.files import write_json\ni = 0\n"
        "while True:\n    i += 1; write_json(sys.argv[1], list(range(i % 3000)))"
    )
    path = tmp_path / "numbers.json"
    process = subprocess.Popen([sys.executable, "-c", code, str(path)])
    end = time.time() + 10
    while not path.exists() and time.time() < end:
        time.sleep(0.01)
    time.sleep(0.2)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    numbers = read_json(path)
    assert numbers == list(range(len(numbers)))


def test_events_survive_a_torn_line(tmp_path):
    path = tmp_path / "events.jsonl"
    first = Events(path, "a")
    first.emit("train", loss=1.5)
    with open(path, "a") as file:
        file.write('{"time": 1, "sta')
    assert [e["loss"] for e in read_events(path)] == [1.5]
    Events(path, "b").emit("train", loss=2.5)
    assert [e["loss"] for e in read_events(path, "train")] == [1.5, 2.5]
    assert read_events(path, stage="b")[0]["loss"] == 2.5
    for line in path.read_text().splitlines():
        json.loads(line)


def test_progress_shows_share_rate_metrics_and_time_left(capsys):
    progress = Progress("pretrain", 1000, "tok", stream=sys.stdout)
    progress.resume_at(500)
    time.sleep(0.05)
    progress.update(250, loss=3.14159)
    line = progress.line()
    assert "750/1k tok" in line and "loss 3.142" in line and line.endswith("left") and "tok/s" in line


def test_fingerprint_ignores_order_and_sees_values():
    one = fingerprint({"a": 1, "b": [1, 2]})
    assert one == fingerprint({"b": [1, 2], "a": 1}) != fingerprint({"a": 1, "b": [2, 1]})
