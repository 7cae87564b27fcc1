"""Pretraining in sltrain layers on two processes (FSDP2), against one; 1 to 2 to 1; the exported model."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from train_toys import config, curated, decoder, losses, stream

from modicum.core.errors import UserError
from modicum.core.events import Events
from modicum.model import attach
from modicum.model.folder import load_model
from modicum.train.config import PretrainSpec
from modicum.train.loop import train
from modicum.train.pretrain import pretrain

FORM = "sltrain:rank=4,density=0.1,alpha=8"


def alone(folder: Path, steps: int, dtype: str = "float32") -> None:
    told = config(steps=steps, form=FORM, schedule="constant", dtype=dtype)
    train(decoder(), stream(), told, folder, events=Events(folder / "events.jsonl"), label="")


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    alone(folder / "one_two_one", 2)
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node=2",
            str(Path(__file__).parent / "sltrain_two_processes.py"),
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


def test_two_processes_train_as_one(two: Path, tmp_path: Path) -> None:
    alone(tmp_path, 5)
    ours, theirs = losses(tmp_path / "events.jsonl"), losses(two / "two" / "events.jsonl")
    assert len(ours) == 5 and max(abs(ours[k] - theirs[k]) for k in ours) < 1e-4
    mine, both = (load_file(p / "checkpoints" / "step-00000005" / "model.safetensors") for p in (tmp_path, two / "two"))
    assert mine.keys() == both.keys()
    for name, tensor in mine.items():
        assert torch.allclose(tensor.float(), both[name].float(), atol=1e-4), name
        assert not name.endswith(".index") or torch.equal(tensor, both[name])


def test_one_to_two_to_one(two: Path, tmp_path: Path) -> None:
    alone(two / "one_two_one", 6)
    alone(tmp_path, 6)
    ours, mixed = losses(tmp_path / "events.jsonl"), losses(two / "one_two_one" / "events.jsonl")
    assert len(mixed) == 6 and max(abs(ours[k] - mixed[k]) for k in ours) < 1e-4


def test_bf16_on_two_processes_stays_near(two: Path, tmp_path: Path) -> None:
    alone(tmp_path, 3, "bfloat16")
    ours, both = losses(tmp_path / "events.jsonl"), losses(two / "bf16" / "events.jsonl")
    assert len(both) == 3 and max(abs(ours[k] - both[k]) for k in ours) < 0.02


def test_a_form_that_does_not_claim_it_is_refused(two: Path) -> None:
    assert "cannot be combined with 2 processes (FSDP2)" in (two / "refused.txt").read_text()


def test_pretraining_exports_a_plain_model_and_does_not_forget_one(tmp_path: Path) -> None:
    folder = curated(tmp_path)
    told = {"form": "sltrain:rank=4,density=0.1,alpha=8", "device": "cpu", "dtype": "float32", "batch_sequences": 4}
    result = pretrain(folder, tmp_path / "run", PretrainSpec(parameters=6e4, steps=3, sequence_length=32, **told))
    model = load_model(result.folder)
    assert not attach.forms(model) and all(p.isfinite().all() for p in model.parameters())
    again = PretrainSpec(model=result.folder, steps=3, sequence_length=32, **told)
    with pytest.raises(UserError, match="requires fit"):
        pretrain(folder, tmp_path / "again", again)
