"""Training an encoder with a method of port `trainer`: steps, checkpoints, exact resume.

A step's batch depends on (seed, step) alone and everything else is in the checkpoint (`train.checkpoint`), so that a
run that was killed goes on to identical weights.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modicum.core.events import Events
from modicum.core.files import atomic_directory
from modicum.core.registry import build
from modicum.retrieve.student import Student
from modicum.retrieve.trainers import RetrieverTrainer
from modicum.train.checkpoint import Checkpoints

WARMUP = 0.1  # fraction of the steps


@dataclass(frozen=True, kw_only=True)
class Training:
    """steps: optimizer updates; batch: queries of each, with a positive and a negative passage apiece."""

    steps: int = 150
    batch: int = 24
    lr: float = 3e-4
    optimizer: Any = "adamw:weight_decay=0.01"
    clip: float = 1.0  # largest norm of the gradient
    seed: int = 0
    checkpoint_every: int = 0  # steps; 0: none


@dataclass(frozen=True)
class Trained:
    """loss: mean over the last tenth of the steps. seconds: of this process."""

    loss: float
    seconds: float
    steps: int
    resumed_from: int = 0


def named(student: Student, trainer: RetrieverTrainer) -> Iterator[tuple[str, Tensor]]:
    """Every parameter that is trained, the trainer's heads included."""
    yield from student.named_parameters()
    if trainer.heads is not None:
        yield from ((f"heads.{name}", p) for name, p in trainer.heads.named_parameters())


def train(
    student: Student,
    trainer: RetrieverTrainer,
    config: Training,
    *,
    out: str | Path | None = None,
    events: Events | None = None,
    stop_after: int | None = None,
) -> Trained:
    """Train `student` in its memory; with `out` its folder is written at the end, and checkpoints beside it.

    stop_after: end after so many steps, as an interruption would.
    """
    events, began = events or Events(), time.perf_counter()
    trainer.prepare(student)
    parameters = dict(named(student, trainer))
    optimizer = build("optimizer", config.optimizer, parameters.items(), lr=config.lr)
    store = Checkpoints(Path(out).with_name(f".{Path(out).name}.checkpoints")) if out is not None else None
    first, losses = 0, list[float]()
    saved = store.latest() if store is not None else None
    if saved is not None:
        with torch.no_grad():
            for name, value in saved.tensors("model"):
                parameters[name].copy_(value)
        optimizer.load_state_dict(saved.part("optimizer"))
        first, losses = saved.step, list(saved.state["losses"])
    student.train()
    with events.progress("train encoder", config.steps, "steps") as progress:
        progress.resume_at(first)
        for step in range(first, min(config.steps, stop_after or config.steps)):
            loss = trainer.loss(student, trainer.batch(step, config.batch, config.seed))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters.values(), config.clip)
            done = (step + 0.5) / config.steps
            optimizer.step({"lr": min(done / WARMUP, (1 - done) / (1 - WARMUP))})
            for p in parameters.values():
                p.grad = None
            losses.append(float(loss.detach()))
            progress.update(1, loss=losses[-1])
            if store is not None and config.checkpoint_every and (step + 1) % config.checkpoint_every == 0:
                weights = {name: p.detach() for name, p in parameters.items()}
                store.save(step + 1, weights, {"optimizer": optimizer.state_dict()}, {"losses": losses})
    student.eval()
    if out is not None and len(losses) >= config.steps:
        with atomic_directory(out) as folder:
            trainer.settle(student, folder)
    recent = losses[-max(1, config.steps // 10) :]
    return Trained(sum(recent) / len(recent), time.perf_counter() - began, len(losses), first)
