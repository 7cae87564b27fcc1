"""Two gloo processes under torchrun with FSDP2, against one process; and 1 to 2 to 1."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from train_toys import MIXTURES, PRETRAIN, config, decoder, losses, stream
from train_toys import curated as make_curated

from modicum import cli
from modicum.core.events import Events, read_events
from modicum.model.folder import load_model
from modicum.train.checkpoint import Checkpoints
from modicum.train.loop import train

HERE = Path(__file__).parent
ONE_TWO_ONE = {"dtype": "float32", "schedule": "constant"}


def _one(folder, mixture="natural", heldout=None, **knobs):
    return train(
        decoder(),
        stream(mixture),
        config(**knobs),
        folder,
        heldout=heldout,
        label="",
        events=Events(folder / "events.jsonl"),
    )


@pytest.fixture(scope="module")
def curated(tmp_path_factory):
    return make_curated(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def two(tmp_path_factory, curated):
    """One torchrun of everything that needs two processes, after one process began `one_two_one`."""
    folder = tmp_path_factory.mktemp("two")
    _one(folder / "one_two_one", MIXTURES[0], steps=4, **ONE_TWO_ONE)
    _one(folder / "bf16", steps=3, dtype="bfloat16", schedule="constant")
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node=2",
            str(HERE / "train_two_processes.py"),
            str(folder),
            str(curated),
        ],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    (folder / "pretrain.json").write_text(done.stdout)
    return folder


def test_same_losses_as_one_process(two, tmp_path):
    result = _one(tmp_path, dtype="float32", micro_batch=8, clip=0.5, heldout=stream(epochs=1, order="stored"))
    alone, both = losses(tmp_path / "events.jsonl"), losses(two / "two" / "events.jsonl")
    assert alone.keys() == both.keys() and len(alone) == 12
    assert max(abs(alone[k] - both[k]) for k in alone) < 1e-4
    norms = [[e["grad_norm"] for e in read_events(p / "events.jsonl", "train")] for p in (tmp_path, two / "two")]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)
    (heldout,) = read_events(two / "two" / "events.jsonl", "heldout")
    assert heldout["loss"] == pytest.approx(result.heldout_loss, abs=1e-4)


def test_their_checkpoint_is_whole(two, tmp_path):
    _one(tmp_path, dtype="float32", micro_batch=8, clip=0.5)
    for name in ("model", "optimizer"):
        alone, both = (
            load_file(p / "checkpoints" / "step-00000012" / f"{name}.safetensors") for p in (tmp_path, two / "two")
        )
        assert alone.keys() == both.keys()
        for key in alone:
            assert torch.allclose(alone[key], both[key], atol=1e-4), key


def test_one_to_two_to_one_goes_on_in_exact_order(two, tmp_path):
    """4 steps on one process, 4 on two (with another mixture), 4 on one: as on one process throughout."""
    _one(two / "one_two_one", MIXTURES[0], steps=12, **ONE_TWO_ONE)
    assert [e["step"] for e in read_events(two / "one_two_one" / "events.jsonl", "resume")] == [4, 8]
    for steps, mixture in ((4, MIXTURES[0]), (8, MIXTURES[1]), (12, MIXTURES[0])):
        _one(tmp_path, mixture, steps=steps, **ONE_TWO_ONE)
    alone, mixed = losses(tmp_path / "events.jsonl"), losses(two / "one_two_one" / "events.jsonl")
    assert len(alone) == 12 and max(abs(alone[k] - mixed[k]) for k in alone) < 1e-4
    ends = [Checkpoints(p / "checkpoints").latest().state["stream"] for p in (tmp_path, two / "one_two_one")]
    assert ends[0] == ends[1]  # the same documents, tokens and unfinished pieces: nothing lost or repeated


def test_bf16_goes_on_from_one_process_near_the_same_curve(two, tmp_path):
    _one(tmp_path, steps=6, dtype="bfloat16", schedule="constant")
    alone, mixed = losses(tmp_path / "events.jsonl"), losses(two / "bf16" / "events.jsonl")
    assert len(alone) == 6 and max(abs(alone[k] - mixed[k]) for k in alone) < 0.02


def test_a_batch_that_cannot_be_shared_is_refused(two):
    assert "a batch of 3 sequences cannot be shared by 2 processes" in (two / "odd.txt").read_text()


def test_the_verb_writes_the_same_model_under_torchrun(two, curated, tmp_path, monkeypatch, capsys):
    told = json.loads((two / "pretrain.json").read_text())  # rank 0 alone speaks
    monkeypatch.setattr(sys, "argv", ["modicum", "pretrain", str(curated), "--out", str(tmp_path), *PRETRAIN])
    with pytest.raises(SystemExit) as done:
        cli.main()
    assert not done.value.code
    alone = json.loads(capsys.readouterr().out)
    assert told["finished"] and told["steps"] == alone["steps"] == 6
    assert abs(told["loss"] - alone["loss"]) < 1e-4
    assert abs(told["heldout_loss"] - alone["heldout_loss"]) < 1e-4
    ours, theirs = load_model(told["folder"]), load_model(alone["folder"])
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-4)
