"""Checkpoints: damaged ones are passed over, a full disk leaves no halves, SIGKILL loses nothing."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import resource
import signal
import time

import pytest
import torch
from train_toys import config, decoder, losses, stream

from modicum.core.errors import CorruptError, UserError
from modicum.core.events import Events, read_events
from modicum.train.checkpoint import Checkpoints, damage
from modicum.train.loop import train

KNOBS = {"steps": 12, "checkpoint_every": 3, "keep": 3}


def _train(folder, **knobs):
    return train(decoder(), stream(), config(**KNOBS | knobs), folder, events=Events(folder / "events.jsonl"), label="")


def _truncate(path):
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size // 2)


def _flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


HARM = {
    "truncated weights": ("model.safetensors", _truncate, "bytes instead of"),
    "flipped weights": ("model.safetensors", _flip, "checksum"),
    "flipped optimizer": ("optimizer.safetensors", _flip, "checksum"),
    "lost optimizer": ("optimizer.safetensors", lambda p: p.unlink(), "missing"),
    "flipped state": ("state.json", _flip, "checksum"),
    "truncated manifest": ("manifest.json", _truncate, "cannot be read"),
    "lost manifest": ("manifest.json", lambda p: p.unlink(), "missing"),
}


@pytest.mark.parametrize("harm", HARM)
def test_a_damaged_checkpoint_is_reported_and_the_one_before_it_used(tmp_path, capsys, harm):
    name, do, reason = HARM[harm]
    _train(tmp_path, steps=6)
    straight = losses(tmp_path / "events.jsonl")
    folder = tmp_path / "checkpoints"
    assert [p.name for p in sorted(folder.iterdir())] == ["step-00000003", "step-00000006"]
    do(folder / "step-00000006" / name)
    result = _train(tmp_path, steps=6)
    assert result.resumed_from == 3 and result.finished and losses(tmp_path / "events.jsonl") == straight
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "step-00000006 is damaged" in said and reason in said
    (told,) = read_events(tmp_path / "events.jsonl", "checkpoint_damaged")
    assert told["path"].endswith("step-00000006") and reason in told["reason"]
    assert damage(folder / "step-00000006") is None  # written anew


def test_when_all_are_damaged_nothing_is_started_over(tmp_path):
    _train(tmp_path, steps=6)
    for path in (tmp_path / "checkpoints").iterdir():
        _truncate(path / "model.safetensors")
    with pytest.raises(CorruptError, match=r"every checkpoint in .* is damaged; remove it to start again"):
        _train(tmp_path, steps=6)


def test_the_last_few_are_kept_and_leftovers_of_a_kill_removed(tmp_path):
    folder = tmp_path / "checkpoints"
    (folder / ".step-00000003.abc.part").mkdir(parents=True)
    (folder / ".step-00000003.abc.part" / "model.safetensors").write_bytes(b"half")
    _train(tmp_path)
    assert sorted(p.name for p in folder.iterdir()) == [f"step-{n:08d}" for n in (6, 9, 12)]


def test_what_is_written(tmp_path):
    result = _train(tmp_path, dtype="bfloat16")
    path = tmp_path / "checkpoints" / "step-00000012"
    assert sorted(p.name for p in path.iterdir()) == [
        "manifest.json",
        "model.safetensors",
        "optimizer.safetensors",
        "state.json",
    ]
    from safetensors.torch import load_file

    weights = load_file(path / "model.safetensors")
    assert {t.dtype for t in weights.values()} == {torch.float32}  # the masters
    assert set(weights) == {n for n, _ in decoder().named_parameters()}
    state = json.loads((path / "state.json").read_text())
    assert state["step"] == 12 and state["finished"] and state["config"]["optimizer"]["method"] == "adamw"
    assert state["stream"]["domains"].keys() == {"prose", "code"} and state["result"]["tokens"] == result.tokens


def _in_child(target, *args):
    """Run in a forked process and give its exit code."""
    process = multiprocessing.get_context("forkserver").Process(target=target, args=args)
    process.start()
    process.join()
    return process.exitcode


def _train_with_little_room(folder, limit):
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))  # writing past it fails as on a full disk
    try:
        _train(folder, steps=6)
    except UserError as error:
        (folder / "told").write_text(str(error))
        os._exit(error.exit_code)
    os._exit(0)


@pytest.fixture(scope="module", autouse=True)
def _preloaded():
    """Children are forked from a process that has imported everything once."""
    multiprocessing.get_context("forkserver").set_forkserver_preload(
        ["torch", "pytest", "modicum.train.loop", "modicum.model.decoder", "modicum.train.optimizers.adamw"]
    )


def test_no_room_for_a_checkpoint_is_one_clear_line(tmp_path):
    _train(tmp_path, steps=3)
    assert _in_child(_train_with_little_room, tmp_path, 100_000) == 2
    told = (tmp_path / "told").read_text()
    assert "cannot write the checkpoint of step 6" in told and "Free space" in told and "\n" not in told
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000003"]
    assert _train(tmp_path, steps=6).resumed_from == 3


def test_saved_and_loaded_tensors_are_equal(tmp_path):
    tensors = {"a": torch.randn(3, 4), "b": torch.arange(5), "c": torch.zeros(0), "d": torch.randn(4, 4).T}
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(
        7,
        tensors,
        {"optimizer": {"m": torch.ones(2), "count": 3, "names": ["x"]}, "plain": {"k": 1.5}},
        {"tokens": 1},
    )
    saved = checkpoints.latest()
    assert saved.step == 7 and saved.state["tokens"] == 1
    read = dict(saved.tensors("model"))
    assert all(torch.equal(read[k], v) for k, v in tensors.items())
    optimizer = saved.part("optimizer")
    assert torch.equal(optimizer.pop("m"), torch.ones(2)) and optimizer == {"count": 3, "names": ["x"]}
    assert saved.part("plain") == {"k": 1.5} and saved.part("absent") == {}


def _train_until_killed(folder):
    torch.set_num_threads(1)
    _train(folder, steps=60, checkpoint_every=4, micro_batch=4, dtype="bfloat16")


def _lines(folder):
    path = folder / "events.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def test_sigkill_at_random_moments_leaves_the_same_curve(tmp_path):
    """Killed again and again at any moment, checkpoints half-written included, the run ends bit-identical."""
    context = multiprocessing.get_context("forkserver")
    assert _in_child(_train_until_killed, tmp_path / "straight") == 0
    straight = losses(tmp_path / "straight" / "events.jsonl")
    assert len(straight) == 60

    chance = random.Random(os.getpid())
    path, kills = tmp_path / "killed", 0
    for _ in range(4):
        process = context.Process(target=_train_until_killed, args=(path,))
        process.start()
        aim = _lines(path) + chance.randint(3, 14)
        while process.is_alive() and _lines(path) < aim:
            time.sleep(0.002)
        time.sleep(chance.random() * 0.01)
        process.kill()
        process.join()
        kills += process.exitcode == -signal.SIGKILL
    assert kills >= 3
    assert _in_child(_train_until_killed, path) == 0
    assert losses(path / "events.jsonl") == straight
    resumed = [e["step"] for e in read_events(path / "events.jsonl", "resume")]
    assert resumed == sorted(resumed) and resumed[-1] > 0
    ends = [
        next((p / "checkpoints").glob("step-00000060")) / "model.safetensors" for p in (tmp_path / "straight", path)
    ]
    assert ends[0].read_bytes() == ends[1].read_bytes()
