"""Run under torchrun by test_surgery_parallel.py: `surgery_two_processes.py FOLDER`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from train_toys import config, decoder, stream

from modicum.core.events import Events
from modicum.train import parallel
from modicum.train.loop import train

RUNS = {
    "spdf": "spdf:sparsity=0.5,dense=0.4",
    "gstack": "gstack:growth=2,grow=0.5",
    "average-params": "average-params:sparsity=0.6,every=1",
}
KNOBS = {"dtype": "float32", "checkpoint_every": 3, "keep": 9, "schedule": "constant"}


def run(folder: Path, key: str, **knobs: Any) -> None:
    events = Events(folder / key / "events.jsonl")
    told = config(**KNOBS | {"surgery": RUNS[key]} | knobs)
    train(decoder(layers=4), stream(), told, folder / key, label="", events=events)


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    for key in RUNS:
        run(folder / "two", key)
        run(folder / "more", key)  # one process made its first three steps
    run(folder / "bf16", "gstack", dtype="bfloat16")
    parallel.leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
