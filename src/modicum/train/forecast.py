"""What a training run will hold and compute, traced without data (see `budget.trace`).

Everything that takes part is the real thing: model, forms, optimizer, objective, masters, micro-batches.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import nn

from modicum.budget.trace import Traced, trace
from modicum.data.stream import Batch
from modicum.train.config import TrainConfig


def step_cost(make_model: Callable[[], nn.Module], config: TrainConfig, vocab_size: int, *,
              masked: bool = False) -> Traced:
    """Peak bytes and FLOPs of training steps with `config` on the model that `make_model()` builds.

    Two steps are run, because an optimizer makes its state in the first. `masked`: the batch separates
    documents, as some packings do. FLOPs are of one step. Raises `UserError` for knobs that do not fit.
    """
    from modicum.train.loop import Trainer
    rows, length = config.sequences, config.sequence_length
    config = dataclasses.replace(config, compile=False)

    def work() -> None:
        tokens_BT = torch.randint(vocab_size, (rows, length))
        documents_BT = torch.zeros_like(tokens_BT) if masked else None
        batch = Batch(tokens_BT, tokens_BT.clone(), documents_BT, torch.arange(length).expand(rows, length))
        trainer = Trainer(make_model(), None, config)
        trainer.bind(trainer.model)
        for _ in range(2):
            scales = trainer.schedule.scale(config.step_tokens / 2, config.total_tokens)
            trainer.optimizer.begin(scales)
            trainer.gradients(batch, rows * length)
            trainer.norm()
            trainer.update(scales, 0.5)
            for p in trainer.named.values():
                p.grad = None

    traced = trace(work)
    return dataclasses.replace(traced, flops=traced.flops // 2)
