"""Surgery on two gloo processes under torchrun with FSDP2, against one process; and from one to two."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from surgery_two_processes import RUNS, run
from train_toys import losses

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("surgery")
    for key in RUNS:
        run(folder / "one", key)
        for path in sorted((folder / "one" / key / "checkpoints").iterdir())[:1]:
            shutil.copytree(path, folder / "more" / key / "checkpoints" / path.name)
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node=2",
            str(HERE / "surgery_two_processes.py"),
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


@pytest.mark.parametrize("key", RUNS)
def test_two_processes_train_as_one(folders, key):
    alone, both, more = (losses(folders / name / key / "events.jsonl") for name in ("one", "two", "more"))
    assert len(alone) == len(both) == 12 and set(more) == set(range(4, 13))  # and so do two that take over from one
    assert max(abs(alone[k] - both[k]) for k in alone) < 2e-4
    assert max(abs(alone[k] - more[k]) for k in more) < 2e-4


@pytest.mark.parametrize("key", RUNS)
def test_their_checkpoints_hold_the_same_masks_and_weights(folders, key):
    for step in (6, 9, 12):
        paths = [folders / name / key / "checkpoints" / f"step-{step:08d}" for name in ("one", "two")]
        for part in ("model", "surgery"):
            if not (paths[0] / f"{part}.safetensors").exists():
                assert not (paths[1] / f"{part}.safetensors").exists()
                continue
            alone, both = (load_file(path / f"{part}.safetensors") for path in paths)
            assert alone.keys() == both.keys()
            for name, tensor in alone.items():
                if tensor.dtype == torch.bool:  # float sums in another order may swap neighbours at the threshold
                    assert (tensor != both[name]).float().mean() < 2e-3, name
                else:
                    assert (tensor - both[name]).abs().mean() < 2e-4, name


def test_bf16_grows_too(folders):
    told = losses(folders / "bf16" / "gstack" / "events.jsonl")
    alone = losses(folders / "one" / "gstack" / "events.jsonl")
    assert len(told) == 12 and max(abs(told[k] - alone[k]) for k in told) < 0.05
