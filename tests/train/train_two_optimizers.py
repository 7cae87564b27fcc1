"""Run under torchrun by test_optimizers_run.py: `train_two_optimizers.py FOLDER`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from train_toys import config, decoder, stream

from modicum.core.errors import UserError
from modicum.core.events import Events
from modicum.model.decoder import Decoder
from modicum.train import parallel
from modicum.train.loop import train

CHOICES = {
    "adamw-8bit": "adamw-8bit",
    "galore": "galore:rank=0.5,gap=3,scale=1.0",
    "galore-8bit": "galore:rank=0.5,gap=3,scale=1.0,bits=8",
    "gradnormlorp": "gradnormlorp:rank=0.5,projection=1.0,sides=one,gap=3,scale=1.0",
    "refactor-reset": "refactor-reset:every=3,recovery=1",
}


class Factored(nn.Module):
    """A linear layer that trains W = B A: a module of somebody's own, not a form."""

    def __init__(self, layer: nn.Linear, generator: torch.Generator):
        super().__init__()
        self.A = nn.Parameter(0.2 * torch.randn(4, layer.in_features, generator=generator))
        self.B = nn.Parameter(0.2 * torch.randn(layer.out_features, 4, generator=generator))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(F.linear(x, self.A), self.B)


def model(key: str) -> Decoder:
    """Wide matrices and tall ones, or factors."""
    made = decoder(layers=1)
    if key == "refactor-reset":
        generator = torch.Generator().manual_seed(0)
        for block in (m for layer in made.layers for m in layer.modules()):
            for name, child in list(block.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(block, name, Factored(child, generator))
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
