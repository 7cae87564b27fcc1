"""What a training run will hold and compute, traced without data (see `budget.trace`).

Everything that takes part is the real thing: model, forms, optimizer, objective, masters, micro-batches.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import torch
from torch import nn

from modicum.budget.trace import Traced, trace
from modicum.data.stream import Batch
from modicum.model.config import DecoderConfig
from modicum.model.decoder import Decoder
from modicum.train.config import TrainConfig
from modicum.train.engine import TrainEngine
from modicum.train.objectives import Step
from modicum.train.part import Part


def blank(config: DecoderConfig) -> Decoder:
    """A decoder without values (drawing them would look at them), for `step_cost`'s `make_model`."""
    with torch.device("meta"):
        model = Decoder(config)
    made: dict[nn.Parameter, nn.Parameter] = {}  # a tied head stays tied
    for module in model.modules():
        for name, p in module.named_parameters(recurse=False):
            if p not in made:
                made[p] = nn.Parameter(torch.empty(p.shape, dtype=p.dtype))
            setattr(module, name, made[p])
    return model


def step_cost(
    make_model: Callable[[], nn.Module],
    config: TrainConfig,
    vocab_size: int,
    *,
    masked: bool = False,
    make_parts: Callable[[], Mapping[str, Part]] | None = None,
) -> Traced:
    """Peak bytes and FLOPs of steps with `config` on the model that `make_model()` (see `blank`) builds.

    Two steps are run, because an optimizer makes its state in the first. `masked`: the batch separates
    documents, as some packings do. FLOPs are of one step. Raises `UserError` for knobs that do not fit.
    """
    rows, length = config.sequences, config.sequence_length
    config = dataclasses.replace(config, compile=False)

    def work() -> None:
        tokens_BT = torch.randint(vocab_size, (rows, length))
        documents_BT = torch.zeros_like(tokens_BT) if masked else None
        batch = Batch(tokens_BT, tokens_BT.clone(), documents_BT, torch.arange(length).expand(rows, length))
        engine = TrainEngine(make_model(), config, make_parts() if make_parts else None)
        engine.build()
        for index in range(2):
            scales = engine.schedule.scale(config.step_tokens / 2, config.total_tokens)
            engine.optimizer.begin(scales)
            engine.gradients(batch, rows * length, Step(index, 0, config.total_tokens, config.seed))
            engine.before_step()
            engine.norm()
            engine.update(scales, 0.5)

    traced = trace(work)
    return dataclasses.replace(traced, flops=traced.flops // 2)
