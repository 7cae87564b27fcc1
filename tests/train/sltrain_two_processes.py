"""Run under torchrun by test_sltrain.py: `sltrain_two_processes.py FOLDER`."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from train_toys import config, decoder, stream

from modicum.core.errors import UserError
from modicum.core.events import Events
from modicum.model.linear.sltrain import SLTrain
from modicum.train import parallel
from modicum.train.loop import train


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    for name, form, dtype, steps in (
        ("two", "sltrain:rank=4,density=0.1,alpha=8", "float32", 5),
        ("one_two_one", "sltrain:rank=4,density=0.1,alpha=8", "float32", 4),
        ("bf16", "sltrain:rank=4,density=0.1,alpha=8", "bfloat16", 3),
    ):
        told = config(steps=steps, form=form, schedule="constant", dtype=dtype, micro_batch=2)
        train(decoder(), stream(), told, folder / name, events=Events(folder / name / "events.jsonl"), label="")
    SLTrain.conflicts = SLTrain.conflicts | {"fsdp"}
    try:
        train(decoder(), stream(), config(form="sltrain:rank=4"), None, label="")
    except UserError as error:
        if parallel.current().first:
            (folder / "refused.txt").write_text(str(error))
    parallel.leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
