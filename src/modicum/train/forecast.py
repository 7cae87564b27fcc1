"""What a training run will hold and compute, traced without data (see `budget.trace`).

Everything that takes part is the real thing: model, forms, optimizer, objective, masters, micro-batches.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise

import torch
from torch import nn

from modicum.budget.trace import Traced, flop_counter, trace
from modicum.core import registry
from modicum.data.stream import Batch
from modicum.model.config import DecoderConfig
from modicum.model.decoder import Decoder
from modicum.train.callback import Callback
from modicum.train.config import TrainConfig
from modicum.train.engine import TrainEngine
from modicum.train.forms import with_form
from modicum.train.objectives import Step


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
    make_parts: Callable[[], Mapping[str, Callback]] | None = None,
) -> Traced:
    """Peak bytes and FLOPs of steps with `config` on the model that `make_model()` (see `blank`) builds.

    In every phase of the run (see `phases`) two steps are run, because an optimizer makes its state in the
    first. `masked`: the batch separates documents, as some packings do. The peak is that of all phases; FLOPs
    are of one step, averaged over the run and counted as its surgery counts. Raises `UserError` for knobs
    that do not fit.
    """
    rows, length = config.sequences, config.sequence_length
    config = dataclasses.replace(config, compile=False)

    def work() -> float:
        tokens_BT = torch.randint(vocab_size, (rows, length))
        documents_BT = torch.zeros_like(tokens_BT) if masked else None
        batch = Batch(tokens_BT, tokens_BT.clone(), documents_BT, torch.arange(length).expand(rows, length))
        engine = TrainEngine(make_model(), config, make_parts() if make_parts else None)
        engine.build()
        for part in engine.parts.values():
            part.start(engine)
        flops = 0.0
        for begin, end in phases(engine):
            with flop_counter() as counter:
                for index in range(2):
                    step(engine, batch, index)
            counted = planned_flops(engine, begin, end) / (engine.row_flops * rows * config.total_steps)
            flops += counter.get_total_flops() / 2 * counted
        return flops

    traced = trace(work)
    return dataclasses.replace(traced, flops=int(traced.result), result=None)


def step(engine: TrainEngine, batch: Batch, index: int = 0) -> None:
    """A training step on `batch`, without data position, events or a look at the loss."""
    config = engine.config
    scales = engine.schedule.scale(config.step_tokens / 2, config.total_tokens)
    engine.optimizer.begin(scales)
    engine.gradients(batch, config.step_tokens, Step(index, 0, config.total_tokens, config.seed))
    engine.before_step()
    engine.norm()
    engine.update(scales, 0.5)
    engine.surgery.after_step(engine)


def phases(engine: TrainEngine) -> Iterator[tuple[int, int]]:
    """Take a started engine through the phases of its surgery (grown, masked): the steps [begin, end) of each,
    with the engine as it stands in them."""
    total = engine.config.total_steps
    for begin, end in pairwise([0, *engine.surgery.marks(engine), total]):
        if begin:
            engine.steps_done = begin
            engine.surgery.after_step(engine)
        yield begin, end


def planned_flops(engine: TrainEngine, begin: int, end: int, samples: int = 256) -> float:
    """FLOPs of the steps [begin, end) of one phase, as `train` will count them; long phases are sampled."""
    parts = min(end - begin, samples)
    steps = [begin + (2 * i + 1) * (end - begin) // (2 * parts) for i in range(parts)]
    mean = sum(engine.surgery.flops(engine, at) for at in steps) / parts
    return mean * (end - begin) * engine.config.sequences


def checkpoint_bytes(model: nn.Module, config: TrainConfig) -> float:
    """Bytes of one checkpoint: the trained weights, in float32 where masters stand behind bf16 ones, the optimizer's
    state by its own forecast, and the averages, in float32. Reads no value: `model` may be one without data."""
    model = with_form(model, config)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad}
    choice = config.choice("optimizer")
    state = registry.load("optimizer", choice.method).cls.cost(choice.config(), shapes).peak_bytes
    numbers = sum(math.prod(shape) for shape in shapes.values())
    each = 4 if config.masters or config.dtype == "float32" else 2
    if config.choice("averaging").method != registry.port("averaging").baseline:
        each += 4
    return float(each * numbers + state)


def run_flops(model: nn.Module, config: TrainConfig) -> float:
    """FLOPs that `train(model, ...)` will count, without training; `model` is used up (see `phases`)."""
    engine = TrainEngine(model, config)
    engine.build()
    engine.surgery.start(engine)
    return sum(planned_flops(engine, begin, end) for begin, end in phases(engine))
