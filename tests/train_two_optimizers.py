"""Run under torchrun by test_train_optimizers_run.py: `train_two_optimizers.py FOLDER`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from modicum.core.errors import UserError
from modicum.core.events import Events
from modicum.model.attach import attach
from modicum.model.decoder import Decoder
from modicum.train import parallel
from modicum.train.loop import train
from train_toys import config, decoder, stream

CHOICES = {
    "adamw-8bit": "adamw-8bit",
    "galore": "galore:rank=0.5,gap=3,scale=1.0",
    "galore-8bit": "galore:rank=0.5,gap=3,scale=1.0,bits=8",
    "gradnormlorp": "gradnormlorp:rank=0.5,projection=1.0,sides=one,gap=3,scale=1.0",
    "refactor-reset": "refactor-reset:every=3,recovery=1",
}


def model(key: str) -> Decoder:
    """Wide matrices and tall ones; for factors, those of an adapter."""
    made = decoder(layers=1)
    if key == "refactor-reset":
        generator = torch.Generator().manual_seed(0)
        for form in attach(made, {"layers.*": "lora:rank=4"}, generator=generator).values():
            torch.nn.init.normal_(form.B, std=0.1, generator=generator)  # type: ignore[arg-type]
    return made


def run(key: str, folder: Path | None, steps: int, **knobs: Any) -> Any:
    events = Events(folder / "events.jsonl" if folder else None)
    settings = {"steps": steps, "schedule": "constant", "dtype": "float32", "optimizer": CHOICES[key]} | knobs
    return train(model(key), stream(), config(**settings), folder, label="", events=events)


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    for key in CHOICES:
        try:
            run(key, folder / key, 8)
        except UserError as error:
            if parallel.current().first:
                (folder / f"{key}.txt").write_text(str(error))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
