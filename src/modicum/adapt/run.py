"""Adapt a model to question/answer pairs: attach a form, train it on the answers, save the adapter.

OUT/adapter/        adapter_config.json, adapter_model.safetensors: what peft loads on the same model
OUT/model/          a whole model folder, where asked for or where PEFT's format cannot hold the form
OUT/checkpoints/    of the training loop; the same call goes on from them
OUT/adapt.json      the result
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from modicum.adapt.examples import Prepared, prepare, sample
from modicum.adapt.peft_format import load_peft, save_peft
from modicum.adapt.sources import load_sides
from modicum.adapt.spec import AdaptSpec, members
from modicum.budget import Deadline
from modicum.core import compose
from modicum.core.choice import Choice
from modicum.core.errors import UserError
from modicum.core.events import Events
from modicum.core.files import tree_bytes, write_json
from modicum.data.stream import Stream
from modicum.data.tokenizer import Tokenizer
from modicum.model import attach
from modicum.model.decoder import Decoder
from modicum.model.folder import find_folder, load_config, load_model, save_model
from modicum.model.linear import LinearForm
from modicum.model.linear._adapter import Adapter
from modicum.model.sources import origin
from modicum.train.evaluate import mean_loss
from modicum.train.loop import Trainer

HELDOUT_PAIRS = 1000  # at most so many are read for the held-out loss


@dataclass(frozen=True)
class AdaptResult:
    """What an adaptation did. Losses are nats per answer token; None: no step, or no held-out pairs.

    stopped: None when finished, else "deadline"; what was learnt until then is saved all the same.
    """

    loss: float | None
    heldout_before: float | None
    heldout_after: float | None
    pairs: int
    heldout_pairs: int
    cut: int
    dropped: int
    answer_tokens: int
    trainable: int
    tokens: int
    steps: int
    seconds: float
    flops: float
    peak_bytes: int
    adapter: str | None
    adapter_bytes: int
    model: str | None
    resumed_from: int | None = None
    stopped: str | None = None

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def adapt(
    model_folder: str | Path,
    pairs: Any,
    spec: AdaptSpec,
    folder: str | Path,
    *,
    events: Events | None = None,
    deadline: Deadline | None = None,
    tokenizer: Tokenizer | None = None,
) -> AdaptResult:
    """Train `spec.form` on the answers of `pairs`, going on from `folder`/checkpoints if there are any.

    pairs: a JSONL file, a curated folder, or any iterable of objects with id, question and answer.
    tokenizer: the model folder's own by default. Raises `UserError` for what cannot be used as given,
    before anything is trained; KeyboardInterrupt after Ctrl-C, with the checkpoint written.
    """
    source, folder = find_folder(model_folder), Path(folder)
    compose.resolve(members(spec), options={"linear": "form"})
    tokenizer = tokenizer or Tokenizer.load(source)
    length = min(spec.sequence_length, load_config(source).context_length)
    train_examples, heldout_examples = load_sides(pairs, spec.heldout, spec.seed)
    train_set = prepare(sample(train_examples, spec.limit), tokenizer, length)
    heldout_set = prepare(sample(heldout_examples, HELDOUT_PAIRS), tokenizer, length)
    if not train_set.examples:
        raise UserError(
            f"none of the {len(train_examples)} pairs has a question of less than {length} tokens; "
            "give shorter ones, or a longer sequence_length"
        )
    run = run_spec(spec, train_set, length, max(len(heldout_set.examples), 1))
    stream = run.stream(train_set.documents(tokenizer.reserved))
    heldout = run.heldout_stream(heldout_set.documents(), order="stored") if heldout_set.examples else None
    outcome, learnt = _train(source, stream, heldout, spec, run, folder, events, deadline)
    if spec.merge or spec.base is not None or outcome["adapter"] is None:
        outcome["model"] = str(folder / "model")
        save_model(_afresh(source, spec, learnt), folder / "model", source)
    result = AdaptResult(
        pairs=len(train_set.examples),
        heldout_pairs=len(heldout_set.examples),
        answer_tokens=train_set.targets,
        cut=train_set.cut + heldout_set.cut,
        dropped=train_set.dropped + heldout_set.dropped,
        **outcome,
    )
    write_json(folder / "adapt.json", result.as_dict())
    return result


@dataclass(frozen=True)
class _Learnt:
    """What a form learnt, apart from the model: its layout, trained parameters and buffers."""

    layout: dict[str, Any]
    trained: list[Tensor]
    buffers: dict[str, Tensor]


def run_spec(spec: AdaptSpec, pairs: Prepared, length: int, heldout_rows: int) -> AdaptSpec:
    """The training run of an adaptation: epochs in steps, rows that fit the model; the form is attached before it."""
    batch = {"batch_tokens": None, "batch_sequences": spec.sequences, "sequence_length": length}
    run = dataclasses.replace(spec, form=None, eval_sequences=heldout_rows, **batch)  # type: ignore[arg-type]
    if spec.epochs is None:
        return run
    once = run.stream(pairs.documents(), epochs=1, total=None)
    steps = max(1, math.ceil(once.count_rows() * spec.epochs / spec.sequences))
    return dataclasses.replace(run, epochs=None, steps=steps)


def _train(
    source: Path,
    stream: Stream,
    heldout: Stream | None,
    spec: AdaptSpec,
    resolved: AdaptSpec,
    folder: Path,
    events: Events | None,
    deadline: Deadline | None,
) -> tuple[dict[str, Any], dict[str, _Learnt]]:
    """Train and save the adapter; figures of the run, and what each form learnt. The model is freed."""
    model = load_model(source)
    _attach(model, spec)
    if not attach.freeze(model):
        raise UserError(f"the form {spec.form} trains nothing; choose one that does, such as lora:rank=8")
    trainer = Trainer(model, stream, resolved, folder, events=events, deadline=deadline, heldout=heldout, label="adapt")
    model.to(trainer.device, getattr(torch, resolved.dtype))
    rows = resolved.micro_batch or resolved.sequences
    before = None if heldout is None else mean_loss(model, heldout, rows=rows)
    if events and before is not None and not (trainer.checkpoints and trainer.checkpoints.all()):
        events.emit("heldout", step=0, tokens=0, loss=before)
    run = trainer.run()
    after = run.heldout_loss if heldout is None or not run.stopped else mean_loss(model, heldout, rows=rows)
    _take_masters(model, trainer)  # float32, where the model was trained in bfloat16
    present = attach.forms(model)
    kept = [form.settled() if isinstance(form, Adapter) else form for form in present.values()]
    trainable = sum(p.numel() for form in kept for p in form.trainable())
    low_rank = all(isinstance(form, Adapter) and form.low_rank() for form in kept if form.trainable())
    adapter = save_peft(model, folder / "adapter", base_model=origin(source)) if low_rank else None
    learnt = {
        name: _Learnt(
            form.layout(),
            [p.detach() for p in form.trainable()],
            {k: b for k, b in form.named_buffers(recurse=False) if k in form.state_dict()},
        )
        for name, form in present.items()
        if form.trainable()
    }
    return {
        "loss": run.loss if run.steps else None,
        "heldout_before": before,
        "heldout_after": after,
        "trainable": trainable,
        "tokens": run.tokens,
        "steps": run.steps,
        "seconds": run.seconds,
        "flops": run.flops,
        "peak_bytes": run.peak_bytes,
        "adapter": str(adapter) if adapter else None,
        "adapter_bytes": tree_bytes(adapter) if adapter else 0,
        "model": None,
        "resumed_from": run.resumed_from,
        "stopped": run.stopped,
    }, learnt


@torch.no_grad()
def _take_masters(model: nn.Module, trainer: Trainer) -> None:
    """Give the trained parameters the float32 values that the optimizer worked on."""
    own = dict(model.named_parameters())
    for name, master in trainer.named.items():
        own[name].data = master.detach().clone()


@torch.no_grad()
def _afresh(source: Path, spec: AdaptSpec, learnt: Mapping[str, _Learnt]) -> Decoder:
    """The model as it is stored, with what was learnt: training may have rounded the frozen weights."""
    model = load_model(source)
    for name, form in _attach(model, spec).items():
        mine = learnt[name]
        if mine.layout:
            form.set_layout(mine.layout)
        own = set(form.parameters()) if isinstance(form, Adapter) else set()
        for ours, theirs in zip(form.trainable(), mine.trained, strict=True):
            ours.data = theirs.to("cpu", torch.float32 if ours in own else ours.dtype)
        for key, buffer in mine.buffers.items():
            form.get_buffer(key).copy_(buffer)
    attach.settle(model)
    if spec.merge:
        attach.merge(model)
    elif Choice.parse("linear", spec.form).method == "dense":
        attach.detach(model)
    return model


def _attach(model: Decoder, spec: AdaptSpec) -> dict[str, LinearForm]:
    """Attach base and form as configured, the same way every time; the forms that train."""
    if spec.base is not None:
        attach.attach(model, {"layers.*": spec.base})
    if spec.adapter is not None:
        return load_peft(model, spec.adapter)
    generator = torch.Generator().manual_seed(spec.seed)
    targets = spec.targets or attach.target_modules(model, spec.form)
    return attach.attach(model, dict.fromkeys(targets, spec.form), generator=generator)
