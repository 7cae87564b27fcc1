"""Run under torchrun by test_goals_parallel.py: `goals_two_processes.py FOLDER`."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from train_toys import config, corpus, decoder

from modicum.core.events import Events
from modicum.data.shards import MemoryDocuments
from modicum.train.loop import TrainResult, train

RUNS = {
    "average": {"schedule": "curriculum-averaging", "averaging": "lawa:weights=ema,checkpoints=3,window=0.5"},
    "meco": {"objective": "meco"},
    "ul2": {"objective": "ul2:sentinels=12", "steps": 2, "clip": 0},
}


def documents() -> MemoryDocuments:
    plain = corpus()
    examples = {d: [(plain.tokens(d, i) % 40, 1) for i in range(plain.documents(d))] for d in plain.domains}
    metadata = {d: [[50, 51 + i % 3, 59] for i in range(120)] for d in plain.domains}
    quality = {d: [(7 * i) % 120 for i in range(120)] for d in plain.domains}
    return MemoryDocuments(examples, metadata=metadata, quality=quality, reserved=20)


def run(folder: Path, name: str) -> TrainResult:
    told = config(dtype="float32", packing="concat:mask=true", checkpoint_every=4, **{"steps": 8} | RUNS[name])
    stream = told.stream(documents(), seed=3)
    return train(decoder(), stream, told, folder / name, label="", events=Events(folder / name / "events.jsonl"))


if __name__ == "__main__":
    torch.set_num_threads(1)
    for one in RUNS:
        run(Path(sys.argv[1]), one)
