"""Pretraining as one call: a curated folder in, a Hugging Face model folder out.

OUT/plan.json       what was decided when the run began (tokens of a time budget, speed, shape)
OUT/checkpoints/    see train.checkpoint
OUT/events.jsonl    the loss curve (train.curve reads it)
OUT/model/          the trained model with its tokenizer, once the run is finished
"""

from __future__ import annotations

import copy
import dataclasses
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from modicum.budget import Deadline
from modicum.core.errors import CorruptError, UserError
from modicum.core.events import Events
from modicum.core.files import read_json, write_json
from modicum.data.curate import Curation
from modicum.data.stream import Stream
from modicum.data.tokenizer import Tokenizer
from modicum.model import attach
from modicum.model.config import DecoderConfig, sized
from modicum.model.decoder import Decoder
from modicum.model.folder import find_folder, load_config, load_model, save_model
from modicum.train import parallel
from modicum.train.checkpoint import Checkpoints
from modicum.train.config import TrainConfig
from modicum.train.forecast import phases
from modicum.train.forms import merged, with_form
from modicum.train.loop import Trainer, TrainResult, train

PARAMETERS = 5e6  # of a new model, when nothing is said
SHARE_FOR_STEPS = 0.92  # of a time budget; the rest is for held-out losses, checkpoints and the export
PROBE_SHARE = 0.03  # of a time budget spent on measuring the speed


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """parameters: size of a new model; model: folder or hub id of one to go on from. tokens, steps or
    seconds: the whole run. lr None: by the model's width, see `peak_rate`. train: further knobs of
    TrainConfig."""

    parameters: float | None = None
    model: str | None = None
    tokens: float | str | None = None
    steps: int | None = None
    seconds: float | None = None
    sequence_length: int = 512
    lr: float | None = None
    seed: int = 0
    mixture: Any = "natural"
    packing: Any = "concat"
    train: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if sum(x is not None for x in (self.tokens, self.steps, self.seconds)) != 1:
            raise UserError("give the length of the run once: tokens (2Mtok), time (5m) or steps (500)")
        if self.parameters is not None and self.model is not None:
            raise UserError("a given model has its own size: give parameters or model, not both")


@dataclass(frozen=True)
class PretrainResult:
    """folder: the model's, None if the run was stopped before its end."""

    folder: str | None
    parameters: int
    lr: float
    run: TrainResult

    def as_dict(self) -> dict[str, Any]:
        return {
            "folder": self.folder,
            "parameters": self.parameters,
            "lr": self.lr,
            "finished": self.run.finished,
        } | self.run.as_dict()


def peak_rate(width: int, continued: bool = False) -> float:
    """Default peak rate of AdamW: 1 / width, kept in [3e-4, 4e-3]; 1e-4 for one trained before."""
    return 1e-4 if continued else min(4e-3, max(3e-4, 1.0 / width))


def pretrain(
    curated: str | Path,
    out: str | Path,
    config: PretrainConfig,
    *,
    events: Events | None = None,
    deadline: Deadline | None = None,
) -> PretrainResult:
    """Train on a curated folder and export the model; the same call goes on where one stopped.

    With `seconds`, the speed is measured on a few real steps and turned into a number of tokens, which
    OUT/plan.json keeps: a resumed run has the same end, and its schedule the same course.
    """
    began, out, curation = time.monotonic(), Path(out), Curation.load(curated)
    shape = shape_for(config, curation)
    lr = config.lr if config.lr is not None else peak_rate(shape.width, config.model is not None)
    told = TrainConfig(
        tokens=config.tokens,
        steps=config.steps if config.seconds is None else 1 << 40,
        lr=lr,
        sequence_length=config.sequence_length,
        seed=config.seed,
        mixture=config.mixture,
        packing=config.packing,
        **config.train,
    )
    ranks = parallel.current(parallel.pick_device(told.device))
    model = make_model(config, shape)
    heldout = told.heldout_stream(curation.shards("heldout"))
    if config.seconds is not None:
        told = dataclasses.replace(
            told,
            steps=None,
            tokens=ranks.agree(_tokens_in(config, told, model, curation, out / "plan.json", began)),
        )
    stream = told.stream(curation.shards("train"))
    run = train(model, stream, told, out, events=events, deadline=deadline, heldout=heldout, label="pretrain")
    folder = None
    if run.finished:
        folder = str(out / "model")
        if ranks.first:
            whole = model if ranks.world == 1 else _whole(config, shape, told, out)
            save_model(merged(whole) if told.form else whole, folder, curation.folder)
        ranks.wait()
    return PretrainResult(folder, shape.parameters(), lr, run)


def shape_for(config: PretrainConfig, curation: Curation) -> DecoderConfig:
    """The given model's shape, or a Llama-style one of about the wanted size. Raises `UserError`."""
    tokenizer = curation.tokenizer()
    if config.model is None:
        return sized(
            config.parameters or PARAMETERS,
            tokenizer.vocab_size,
            context_length=max(2048, config.sequence_length),
            bos_id=tokenizer.bos_id,
            eos_ids=(tokenizer.eos_id,),
            pad_id=tokenizer.pad_id,
        )
    shape = load_config(config.model)
    if Tokenizer.load(find_folder(config.model)).fingerprint != tokenizer.fingerprint:
        raise UserError(
            f"{curation.folder} was curated with another tokenizer than {config.model} has; type: "
            f"modicum curate SOURCE --out FOLDER --tokenizer {config.model}"
        )
    if config.sequence_length > shape.context_length:
        raise UserError(
            f"sequence_length={config.sequence_length} is longer than the context of {config.model} "
            f"({shape.context_length}); ask for a shorter one"
        )
    return shape


def make_model(config: PretrainConfig, shape: DecoderConfig) -> Decoder:
    """Fresh weights from the seed, or the given model's."""
    if config.model is not None:
        if config.train.get("form") is not None:
            attach.require_fit(config.train["form"])
        return load_model(config.model)
    return Decoder(shape, torch.Generator().manual_seed(config.seed))


def _tokens_in(
    config: PretrainConfig, told: TrainConfig, model: Decoder, curation: Curation, plan: Path, began: float
) -> int:
    """Tokens of the time budget: those decided before, or as many as the speed measured now allows."""
    if plan.is_file():
        try:
            made = read_json(plan)
            if made["seconds"] == config.seconds:
                return int(made["tokens"])
        except (ValueError, KeyError, TypeError) as error:
            raise CorruptError(f"{plan} is damaged ({type(error).__name__}); remove it to plan anew") from None
    assert config.seconds is not None
    stream = told.stream(curation.shards("train"))
    taken = step_seconds(model, stream, told, PROBE_SHARE * config.seconds)
    left = SHARE_FOR_STEPS * (config.seconds - (time.monotonic() - began))
    steps = int(left / taken)
    if steps < 1:
        raise UserError(
            f"one step of {told.step_tokens} tokens takes {taken:.1f} s, more than {config.seconds:g} s "
            "leave; give more time, a smaller model or a smaller batch"
        )
    tokens = steps * told.step_tokens
    if parallel.current().first:
        write_json(
            plan,
            {
                "seconds": config.seconds,
                "tokens": tokens,
                "steps": steps,
                "step_seconds": taken,
                "tokens_per_second": told.step_tokens / taken,
            },
        )
    return tokens


def step_seconds(model: Decoder, stream: Stream, config: TrainConfig, seconds: float) -> float:
    """Median seconds of real steps on a copy of the model: three or more, for about `seconds`; where surgery
    changes the model, the mean over the run."""
    trainer = Trainer(copy.deepcopy(model), stream, config, None, label="")
    trainer.open()
    mean = 0.0
    for begin, end in phases(trainer):
        trainer.step()
        taken: list[float] = []
        while trainer.ranks.agree(len(taken) < 3 or (sum(taken) < seconds and len(taken) < 50)):
            began = time.perf_counter()
            trainer.step()
            taken.append(time.perf_counter() - began)
        mean += statistics.median(taken) * ((end - begin) / config.total_steps)
    return mean


def _whole(config: PretrainConfig, shape: DecoderConfig, told: TrainConfig, out: Path) -> Decoder:
    """The trained model, unsharded, from its last checkpoint (on one process)."""
    saved = Checkpoints(out / "checkpoints").latest()
    assert saved
    model = with_form(make_model(config, shape), told)
    parameters = dict(model.named_parameters()) | dict(model.named_buffers())
    with torch.no_grad():
        for name, value in saved.tensors("model"):
            dtype = getattr(torch, told.dtype) if value.is_floating_point() else value.dtype
            parameters[name].data = value.to(dtype)
    if shape.tied:
        model.lm_head.weight = model.embed.weight
    return model
