"""Run under torchrun by test_parallel.py: `train_two_processes.py FOLDER CURATED`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from train_toys import MIXTURES, PRETRAIN, config, decoder, stream

from modicum import cli
from modicum.core.errors import UserError
from modicum.core.events import Events
from modicum.train import parallel
from modicum.train.loop import train


def run(folder: Path, mixture: str = "natural", heldout: Any = None, **knobs: Any) -> None:
    events = Events(folder / "events.jsonl")
    train(decoder(), stream(mixture), config(**knobs), folder, heldout=heldout, label="", events=events)


def main(folder: Path, curated: str) -> None:
    torch.set_num_threads(1)
    run(folder / "two", heldout=stream(epochs=1, order="stored"), dtype="float32", micro_batch=2, clip=0.5)
    run(folder / "one_two_one", MIXTURES[1], dtype="float32", steps=8, schedule="constant")
    run(folder / "bf16", dtype="bfloat16", steps=6, schedule="constant")
    try:
        run(folder / "odd", batch_sequences=3)
    except UserError as error:
        if parallel.current().first:
            (folder / "odd.txt").write_text(str(error))
    sys.argv = ["modicum", "pretrain", curated, "--out", str(folder / "pretrain"), *PRETRAIN]
    cli.main()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
