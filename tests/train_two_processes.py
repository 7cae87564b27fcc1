"""Run under torchrun by test_train_parallel.py: `train_two_processes.py FOLDER`."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from modicum.core.errors import UserError
from modicum.core.events import Events
from modicum.train import parallel
from modicum.train.loop import train
from train_toys import config, decoder, stream


def main(folder: Path) -> None:
    torch.set_num_threads(1)

    def run(name: str, **knobs: object) -> object:
        data = stream(str(knobs.pop("mixture", "natural")))
        more = {"heldout": stream(epochs=1, shuffle=False)} if name == "two" else {}
        return train(
            decoder(tied=name != "untied"),
            data,
            config(**knobs),
            folder / name,
            label="",
            events=Events(folder / name / "events.jsonl"),
            **more,
        )  # type: ignore[arg-type]

    run("two", dtype="float32", micro_batch=2, clip=0.5)
    run(
        "one_two_one",
        dtype="float32",
        steps=8,
        mixture="fixed:weights={prose: 1, code: 3}",
        schedule="constant",
    )
    run("bf16", dtype="bfloat16", steps=6, schedule="constant")
    try:
        run("odd", batch_sequences=3)
    except UserError as error:
        if parallel.current().first:
            (folder / "odd.txt").write_text(str(error))
    parallel.leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
