"""Small real pieces for the tests of the train room: a corpus that can be learnt, a stream, a decoder."""

from __future__ import annotations

import shutil
import sysconfig
from pathlib import Path

import numpy as np
import torch

from modicum.data.shards import MemoryDocuments
from modicum.data.stream import Stream
from modicum.model.config import llama_like
from modicum.model.decoder import Decoder
from modicum.train.config import TrainConfig

VOCAB, LENGTH = 64, 32
MIXTURES = ("fixed:weights={prose: 3, code: 1}", "fixed:weights={prose: 1, code: 3}")
SMALL = ["--sequence-length", "64", "--batch", "512tok", "--parameters", "120k", "--lr", "4e-3", "--device", "cpu"]
PRETRAIN = ["--steps", "6", "--dtype", "float32", "--micro-batch", "4", "--json", *SMALL]


def corpus(documents: int = 120) -> MemoryDocuments:
    """Two domains of counting sequences with steps of 1 or 2."""
    rng = np.random.default_rng(0)
    return MemoryDocuments(
        {
            domain: [
                (np.concatenate([[1], np.cumsum(rng.integers(1, 3, rng.integers(5, 60))) % 60 + 2, [1]]), 1)
                for _ in range(documents)
            ]
            for domain in ("prose", "code")
        }
    )


def stream(mixture: str = "natural", **more: object) -> Stream:
    return Stream(corpus(), mixture, sequence_length=LENGTH, **{"seed": 3} | more)  # type: ignore[arg-type]


def decoder(seed: int = 0, width: int = 32, layers: int = 2, **more: object) -> Decoder:
    return Decoder(llama_like(VOCAB, width, layers, **more), torch.Generator().manual_seed(seed))  # type: ignore[arg-type]


def config(**knobs: object) -> TrainConfig:
    defaults = {
        "steps": 12,
        "sequence_length": LENGTH,
        "batch_sequences": 8,
        "lr": 5e-3,
        "checkpoint_every": 5,
        "device": "cpu",
        "eval_sequences": 32,
    }
    if "tokens" in knobs:
        defaults.pop("steps")
    return TrainConfig(**defaults | knobs)  # type: ignore[arg-type]


def losses(path: Path) -> dict[int, float]:
    from modicum.train.curve import curve

    return {event["step"]: event["loss"] for event in curve(path)}


def curated(folder: Path) -> Path:
    """A few modules of the standard library, curated."""
    from modicum.data.curate import CurateConfig, curate

    (folder / "text").mkdir()
    for name in ("textwrap.py", "string.py", "heapq.py", "bisect.py", "shlex.py", "csv.py"):
        shutil.copy(Path(sysconfig.get_paths()["stdlib"]) / name, folder / "text")
    curate(str(folder / "text"), folder / "curated", CurateConfig(vocab_size=400, heldout=0.1), processes=1)
    return folder / "curated"
