"""Averaging, metadata and denoising over two gloo processes with FSDP2, against one process."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from goals_two_processes import RUNS, documents, run
from safetensors.torch import load_file
from train_toys import LENGTH, decoder, losses

from modicum.core import registry
from modicum.core.events import read_events
from modicum.data.stream import Stream
from modicum.train.objectives import Step

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node=2",
            str(HERE / "goals_two_processes.py"),
            str(folder),
        ],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


def _tensors(folder, step, name):
    return load_file(folder / "checkpoints" / f"step-{step:08d}" / f"{name}.safetensors")


@pytest.mark.parametrize("name", ["average", "meco"])
def test_the_same_as_one_process(two, tmp_path, name):
    run(tmp_path, name)
    alone, both = losses(tmp_path / name / "events.jsonl"), losses(two / name / "events.jsonl")
    assert len(alone) == 8 and max(abs(alone[k] - both[k]) for k in alone) < 1e-4
    for part in ("model", "averaging") if name == "average" else ("model",):
        one, other = _tensors(tmp_path / name, 8, part), _tensors(two / name, 8, part)
        # As a whole: Adam turns a rounding of a gradient near zero into a step of a single weight, on some processors.
        assert one.keys() == other.keys() and all((one[k] - other[k]).norm() < 5e-4 * one[k].norm() for k in one), part


def test_one_process_goes_on_with_the_average_of_two(two, tmp_path):
    """Cut in the middle of the averaging: the sharded average is whole in the checkpoint."""
    shutil.copytree(two / "average", tmp_path / "average")
    shutil.rmtree(tmp_path / "average" / "checkpoints" / "step-00000008")
    assert run(tmp_path, "average").resumed_from == 4
    one, other = _tensors(two / "average", 8, "model"), _tensors(tmp_path / "average", 8, "model")
    assert all(torch.allclose(one[k], other[k], atol=1e-4) for k in one)


def test_ul2_is_the_sum_over_what_each_process_draws(two):
    """Each process draws for its own rows; the first step's loss and gradient are those of both together."""
    objective, model = registry.build("objective", RUNS["ul2"]["objective"]), decoder()
    stream = Stream(documents(), packing="concat:mask=true", sequence_length=LENGTH, seed=3)
    batch = stream.next_batch(8)
    total = count = 0.0
    for rank in range(2):
        loss = objective.loss(model, batch.rows(rank, 2), Step(index=0, seed=0, rank=rank))
        loss.total.backward()
        total, count = total + float(loss.total.detach()), count + float(loss.count)
    norm = torch.stack([(p.grad / count).norm() for p in model.parameters()]).norm()
    first, _ = read_events(two / "ul2" / "events.jsonl", "train")
    assert first["loss"] == pytest.approx(total / count, abs=1e-4)
    assert first["grad_norm"] == pytest.approx(float(norm), rel=1e-3)
