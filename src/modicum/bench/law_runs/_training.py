"""What the tables of trained decoders share: their size, the held-out loss along a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from modicum.bench import training
from modicum.evaluate.lm import document_nats
from modicum.model.config import llama_like
from modicum.model.decoder import Decoder
from modicum.train.callback import Callback


@dataclass(frozen=True, kw_only=True)
class Scale(training.Scale):
    """As of every bench that trains; sizes: width x layers of the decoders."""

    tokens: int = 256 * 1024
    sizes: tuple[tuple[int, int], ...] = ((64, 2), (96, 3), (128, 4))
    checkpoints: int = 8


QUICK: dict[str, Any] = {**training.QUICK, "sizes": ((32, 1),), "checkpoints": 8}


class Curve(Callback):
    """Held-out loss, nats per token, at evenly spaced steps."""

    def __init__(self, bench: training.Bench, texts: Sequence[str], checkpoints: int):
        self.bench, self.texts, self.checkpoints = bench, list(texts), checkpoints
        self.points: list[tuple[int, float]] = []

    def after_step(self, trainer: Any) -> None:
        total, done = trainer.config.total_steps, trainer.steps_done
        if done * self.checkpoints // total > (done - 1) * self.checkpoints // total:
            trainer.write_back()
            self.points.append((trainer.tokens, nats(self.bench, trainer.model, self.texts)))
            trainer.model.train()


def nats(bench: training.Bench, model: Any, texts: Sequence[str]) -> float:
    """Mean loss of the texts, nats per token."""
    rows = list(document_nats(model, bench.tokenizer, texts, sequence_length=bench.scale.sequence_length))
    return sum(r[0] for r in rows) / sum(r[2] for r in rows)


def decoder(bench: training.Bench, size: tuple[int, int], seed: int) -> Decoder:
    import torch

    shape = llama_like(bench.tokenizer.vocab_size, *size, context_length=bench.scale.sequence_length)
    return Decoder(shape, torch.Generator().manual_seed(seed))
