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

from modicum.budget import Cost, Deadline
from modicum.core import registry
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
from modicum.model.patterns import set_attention, with_attention
from modicum.train import parallel
from modicum.train.checkpoint import Checkpoints
from modicum.train.config import PretrainSpec, TrainConfig
from modicum.train.forecast import blank, checkpoint_bytes, phases, step_cost
from modicum.train.forms import merged, with_form
from modicum.train.loop import Trainer, TrainResult, train

PARAMETERS = 5e6  # of a new model, when nothing is said
SHARE_FOR_STEPS = 0.92  # of a time budget; the rest is for held-out losses, checkpoints and the export
PROBE_SHARE = 0.03  # of a time budget spent on measuring the speed


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


def pretrain(
    curated: str | Path,
    out: str | Path,
    spec: PretrainSpec,
    *,
    events: Events | None = None,
    deadline: Deadline | None = None,
) -> PretrainResult:
    """Train on a curated folder and export the model; the same call goes on where one stopped.

    With `time`, the speed is measured on a few real steps and turned into a number of tokens, which
    OUT/plan.json keeps: a resumed run has the same end, and its schedule the same course.
    """
    began, out, curation = time.monotonic(), Path(out), Curation.load(curated)
    shape = shape_for(spec, curation)
    spec = spec.for_width(shape.width, continued=spec.model is not None)
    ranks = parallel.current(parallel.pick_device(spec.device))
    model = make_model(spec, shape)
    heldout = spec.heldout_stream(curation.shards("heldout"))
    if spec.time is not None:
        tokens = ranks.agree(_tokens_in(spec.time, spec, model, curation, out / "plan.json", began))
        spec = dataclasses.replace(spec, time=None, tokens=tokens)
    stream = spec.stream(curation.shards("train"))
    run = train(model, stream, spec, out, events=events, deadline=deadline, heldout=heldout, label="pretrain")
    folder = None
    if run.finished:
        folder = str(out / "model")
        if ranks.first:
            whole = model if ranks.world == 1 else _whole(spec, shape, out)
            save_model(merged(whole) if spec.form else whole, folder, curation.folder)
        ranks.wait()
    return PretrainResult(folder, shape.parameters(), float(spec.lr or 0), run)


def plan(curated: str | Path, spec: PretrainSpec) -> Cost:
    """What `pretrain` will take beside the interpreter, traced without data: parameters, tokens, FLOPs, peak and disk
    bytes. With a time budget the tokens are decided when it runs: they and the FLOPs are 0."""
    curation = Curation.load(curated)
    shape = shape_for(spec, curation)
    spec = spec.for_width(shape.width, continued=spec.model is not None)
    timed = spec.time is not None
    run = dataclasses.replace(spec, time=None, steps=1 << 20) if timed else spec
    masked = bool(registry.build("packing", spec.choice("packing")).masks_documents)
    traced = step_cost(lambda: blank(shape), run, shape.vocab_size, masked=masked)
    return Cost(
        parameters=shape.parameters(),
        tokens=0 if timed else run.total_tokens,
        flops=0 if timed else traced.flops * run.total_steps,
        peak_bytes=traced.peak_bytes,
        disk_bytes=run.keep * checkpoint_bytes(blank(shape), run) + 2 * shape.parameters(),
    )


def shape_for(spec: PretrainSpec, curation: Curation) -> DecoderConfig:
    """The given model's shape, or a Llama-style one of about the wanted size. Raises `UserError`."""
    tokenizer = curation.tokenizer()
    if spec.model is None:
        shape = sized(
            spec.parameters or PARAMETERS,
            tokenizer.vocab_size,
            context_length=max(2048, spec.sequence_length),
            bos_id=tokenizer.bos_id,
            eos_ids=(tokenizer.eos_id,),
            pad_id=tokenizer.pad_id,
        )
        return shape if spec.attention is None else with_attention(shape, spec.attention)
    shape = load_config(spec.model)
    if Tokenizer.load(find_folder(spec.model)).fingerprint != tokenizer.fingerprint:
        raise UserError(
            f"{curation.folder} was curated with another tokenizer than {spec.model} has; type: "
            f"modicum curate SOURCE --out FOLDER --tokenizer {spec.model}"
        )
    if spec.sequence_length > shape.context_length:
        raise UserError(
            f"sequence_length={spec.sequence_length} is longer than the context of {spec.model} "
            f"({shape.context_length}); ask for a shorter one"
        )
    return shape if spec.attention is None else with_attention(shape, spec.attention)


def make_model(spec: PretrainSpec, shape: DecoderConfig) -> Decoder:
    """Fresh weights from the seed, or the given model's."""
    if spec.model is not None:
        if spec.form is not None:
            attach.require_fit(spec.form)
        model = load_model(spec.model)
        if spec.attention is not None:
            set_attention(model, spec.attention)
        return model
    return Decoder(shape, torch.Generator().manual_seed(spec.seed))


def _tokens_in(seconds: float, spec: PretrainSpec, model: Decoder, curation: Curation, plan: Path, began: float) -> int:
    """Tokens of the time budget: those decided before, or as many as the speed measured now allows."""
    if plan.is_file():
        try:
            made = read_json(plan)
            if made["seconds"] == seconds:
                return int(made["tokens"])
        except (ValueError, KeyError, TypeError) as error:
            raise CorruptError(f"{plan} is damaged ({type(error).__name__}); remove it to plan anew") from None
    probe = dataclasses.replace(spec, time=None, steps=1 << 40)
    taken = step_seconds(model, probe.stream(curation.shards("train")), probe, PROBE_SHARE * seconds)
    left = SHARE_FOR_STEPS * (seconds - (time.monotonic() - began))
    steps = int(left / taken)
    if steps < 1:
        raise UserError(
            f"one step of {spec.step_tokens} tokens takes {taken:.1f} s, more than {seconds:g} s "
            "leave; give more time, a smaller model or a smaller batch"
        )
    tokens = steps * spec.step_tokens
    if parallel.current().first:
        write_json(
            plan,
            {
                "seconds": seconds,
                "tokens": tokens,
                "steps": steps,
                "step_seconds": taken,
                "tokens_per_second": spec.step_tokens / taken,
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


def _whole(spec: PretrainSpec, shape: DecoderConfig, out: Path) -> Decoder:
    """The trained model, unsharded, from its last checkpoint (on one process)."""
    saved = Checkpoints(out / "checkpoints").latest()
    assert saved
    model = with_form(make_model(spec, shape), spec)
    parameters = dict(model.named_parameters()) | dict(model.named_buffers())
    with torch.no_grad():
        for name, value in saved.tensors("model"):
            dtype = getattr(torch, spec.dtype) if value.is_floating_point() else value.dtype
            parameters[name].data = value.to(dtype)
    if shape.tied:
        model.lm_head.weight = model.embed.weight
    return model
