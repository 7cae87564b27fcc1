"""Adapt a model to question/answer pairs: attach a form, train it on the answers, save the adapter.

OUT/adapter/        adapter_config.json, adapter_model.safetensors: what peft loads on the same model
OUT/model/          a whole model folder, where asked for or where PEFT's format cannot hold the form
OUT/checkpoints/    of the training loop; the same call goes on from them
OUT/adapt.json      the result
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from modicum.adapt.examples import prepare, sample
from modicum.adapt.peft_format import save_peft
from modicum.adapt.sources import load_sides
from modicum.adapt.stream import PairStream
from modicum.budget import Deadline
from modicum.core import compose
from modicum.core.choice import Choice
from modicum.core.errors import UserError
from modicum.core.events import Events
from modicum.core.files import tree_bytes, write_json
from modicum.data.tokenizer import Tokenizer
from modicum.model import attach
from modicum.model.decoder import Decoder
from modicum.model.folder import find_folder, load_config, load_model, parse_dtype, save_model
from modicum.model.linear import LinearForm
from modicum.model.linear._adapter import Adapter
from modicum.model.sources import origin
from modicum.train.config import TrainConfig
from modicum.train.evaluate import mean_loss
from modicum.train.loop import Trainer

HELDOUT_PAIRS = 1000  # at most so many are read for the held-out loss


@dataclass(frozen=True, kw_only=True)
class AdaptConfig:
    """Knobs of `adapt`.

    form: what is attached to the linear layers that `targets` (globs over module names) name, or where its
    paper puts it (most: into all but the head); `dense` trains them whole. base: a form that all linear layers
    get first, for example int4, to train over 4-bit weights.
    Length of the run: epochs over the pairs, or tokens, or steps. heldout: share of the questions kept
    for the loss before and after; limit: pairs trained on at most. merge: also save the model with the
    update merged in.
    The rest is as in `TrainConfig`.
    """

    form: Any = "lora:rank=8"
    targets: Sequence[str] | None = None
    base: Any = None
    epochs: float | None = None  # 3 if neither tokens nor steps are given
    tokens: float | str | None = None
    steps: int | None = None
    sequence_length: int = 512
    batch_sequences: int = 8
    micro_batch: int | None = None
    lr: float = 5e-4
    optimizer: Any = "adamw:weight_decay=0"
    schedule: Any = "cosine"
    clip: float = 1.0
    dtype: str = "bfloat16"
    heldout: float = 0.1
    limit: int | None = None
    eval_every: int = 0
    checkpoint_every: int = 100
    merge: bool = False
    seed: int = 0
    device: str = "auto"

    def __post_init__(self) -> None:
        if isinstance(self.targets, str):
            object.__setattr__(self, "targets", tuple(t for t in self.targets.split(",") if t))
        if self.targets is not None and not self.targets:
            raise UserError("targets is empty; name the layers to adapt, for instance 'layers.*.attention.*'")
        if sum(x is not None for x in (self.epochs, self.tokens, self.steps)) > 1:
            raise UserError("give the length of the run once: epochs=3, tokens=2Mtok or steps=500")
        if self.epochs is not None and not (math.isfinite(self.epochs) and self.epochs > 0):
            raise UserError(f"epochs={self.epochs} must be more than 0")
        if not 0 <= self.heldout < 1:
            raise UserError(f"heldout={self.heldout} must be a share, at least 0 and below 1")
        for field in ("form", "base"):
            if getattr(self, field) is not None:
                Choice.parse("linear", getattr(self, field)).config()


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


def members(config: AdaptConfig) -> list[compose.Member]:
    """The adaptation's methods and settings, for `core.compose.resolve`."""
    found = [compose.member(port, getattr(config, port)) for port in ("optimizer", "schedule")]
    form = compose.member("linear", config.form)
    found += [form, compose.setting(f"adapting with form={config.form}", requires={"trainable", "fit"})]
    if config.merge:
        found.append(compose.setting("merge=true", requires={"merge"}, remedy="leave merge out"))
    if config.base is not None and "adapter" in form.provides:
        base = compose.member("linear", config.base)
        compose.resolve([base, compose.setting(f"base={config.base}", requires={"adapter_base"})])
    return found


def adapt(
    model_folder: str | Path,
    pairs: Any,
    config: AdaptConfig,
    folder: str | Path,
    *,
    events: Events | None = None,
    deadline: Deadline | None = None,
    tokenizer: Tokenizer | None = None,
) -> AdaptResult:
    """Train `config.form` on the answers of `pairs`, going on from `folder`/checkpoints if there are any.

    pairs: a JSONL file, a curated folder, or any iterable of objects with id, question and answer.
    tokenizer: the model folder's own by default. Raises `UserError` for what cannot be used as given,
    before anything is trained; KeyboardInterrupt after Ctrl-C, with the checkpoint written.
    """
    source, folder = find_folder(model_folder), Path(folder)
    compose.resolve(members(config), options={"linear": "form"})
    tokenizer = tokenizer or Tokenizer.load(source)
    length = min(config.sequence_length, load_config(source).context_length)
    learn, held = load_sides(pairs, config.heldout, config.seed)
    learn_set = prepare(sample(learn, config.limit), tokenizer, length)
    held_set = prepare(sample(held, HELDOUT_PAIRS), tokenizer, length)
    if not learn_set.examples:
        raise UserError(
            f"none of the {len(learn)} pairs has a question of less than {length} tokens; "
            "give shorter ones, or a longer sequence_length"
        )
    stream = PairStream(learn_set.examples, sequence_length=length, seed=config.seed)
    heldout = (
        None
        if not held_set.examples
        else PairStream(held_set.examples, sequence_length=length, shuffle=False, epochs=1)
    )
    outcome, learnt = _train(source, stream, heldout, config, folder, events, deadline)
    if config.merge or config.base is not None or outcome["adapter"] is None:
        outcome["model"] = str(folder / "model")
        save_model(_afresh(source, config, learnt), folder / "model", source)
    result = AdaptResult(
        pairs=len(learn_set.examples),
        heldout_pairs=len(held_set.examples),
        answer_tokens=learn_set.targets,
        cut=learn_set.cut + held_set.cut,
        dropped=learn_set.dropped + held_set.dropped,
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


def _train(
    source: Path,
    stream: PairStream,
    heldout: PairStream | None,
    config: AdaptConfig,
    folder: Path,
    events: Events | None,
    deadline: Deadline | None,
) -> tuple[dict[str, Any], dict[str, _Learnt]]:
    """Train and save the adapter; figures of the run, and what each form learnt. The model is freed."""
    model = load_model(source)
    _attach(model, config)
    if not attach.freeze(model):
        raise UserError(f"the form {config.form} trains nothing; choose one that does, such as lora:rank=8")
    told = _train_config(config, stream, heldout)
    trainer = Trainer(model, stream, told, folder, events=events, deadline=deadline, heldout=heldout, label="adapt")
    model.to(trainer.device, getattr(torch, told.dtype))
    rows = config.micro_batch or config.batch_sequences
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


def _train_config(config: AdaptConfig, stream: PairStream, heldout: PairStream | None) -> TrainConfig:
    steps = config.steps
    if steps is None and config.tokens is None:
        rows = len(stream.rows_of(0)) * (config.epochs or 3.0)
        steps = max(1, math.ceil(rows / config.batch_sequences))
    return TrainConfig(
        tokens=config.tokens,
        steps=steps,
        sequence_length=stream.sequence_length,
        batch_sequences=config.batch_sequences,
        micro_batch=config.micro_batch,
        lr=config.lr,
        optimizer=config.optimizer,
        schedule=config.schedule,
        clip=config.clip,
        dtype=str(parse_dtype(config.dtype)).removeprefix("torch."),
        seed=config.seed,
        checkpoint_every=config.checkpoint_every,
        eval_every=config.eval_every,
        device=config.device,
        eval_sequences=1 if heldout is None else len(heldout.rows_of(0)),
    )


@torch.no_grad()
def _take_masters(model: nn.Module, trainer: Trainer) -> None:
    """Give the trained parameters the float32 values that the optimizer worked on."""
    own = dict(model.named_parameters())
    for name, master in trainer.named.items():
        own[name].data = master.detach().clone()


@torch.no_grad()
def _afresh(source: Path, config: AdaptConfig, learnt: Mapping[str, _Learnt]) -> Decoder:
    """The model as it is stored, with what was learnt: training may have rounded the frozen weights."""
    model = load_model(source)
    for name, form in _attach(model, config).items():
        mine = learnt[name]
        if mine.layout:
            form.set_layout(mine.layout)
        own = set(form.parameters()) if isinstance(form, Adapter) else set()
        for ours, theirs in zip(form.trainable(), mine.trained, strict=True):
            ours.data = theirs.to("cpu", torch.float32 if ours in own else ours.dtype)
        for key, buffer in mine.buffers.items():
            form.get_buffer(key).copy_(buffer)
    attach.settle(model)
    if config.merge:
        attach.merge(model)
    elif Choice.parse("linear", config.form).method == "dense":
        attach.detach(model)
    return model


def _attach(model: Decoder, config: AdaptConfig) -> dict[str, LinearForm]:
    """Attach base and form as configured, the same way every time; the forms that train."""
    if config.base is not None:
        attach.attach(model, {"layers.*": config.base})
    generator = torch.Generator().manual_seed(config.seed)
    targets = config.targets or attach.places(model, config.form)
    return attach.attach(model, dict.fromkeys(targets, config.form), generator=generator)
