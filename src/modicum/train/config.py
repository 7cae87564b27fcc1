"""What a training run is told, checked before anything is built."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from modicum.budget import units
from modicum.core import compose, registry
from modicum.core.choice import Choice
from modicum.core.errors import UserError, unknown

DTYPES = {"bfloat16": "bfloat16", "bf16": "bfloat16", "float32": "float32", "fp32": "float32"}
PORTS = ("optimizer", "schedule", "objective", "surgery")
# What may differ when a run goes on: it changes how far, where or how often, not what is learnt per token.
LOOSE = frozenset(
    {
        "tokens",
        "steps",
        "micro_batch",
        "checkpoint_every",
        "keep",
        "eval_every",
        "eval_sequences",
        "nonfinite",
        "device",
        "compile",
    }
)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Knobs of `train.loop.train`. Quantities may be strings with units ("2Mtok").

    tokens or steps: the whole run, one of the two; the tokens are rounded down to whole steps.
    batch_tokens or batch_sequences: one step, over all processes and micro-batches (default 32 sequences).
    micro_batch: sequences of one forward pass of one process (default: all of its share).
    memory: memory savers, any number of them. surgery: what changes the model while it trains.
    form: a linear form that the layers named by `targets` (globs over module names) get before training.
    clip: limit of the gradient's global norm, 0 for none.
    dtype: bfloat16 computes in bf16; `masters` then keeps float32 weights for the optimizer to work on.
    eval_every: steps between held-out losses, 0 for only at the end; eval_sequences: how many to read.
    checkpoint_every: steps, 0 for only at the end; keep: how many checkpoints.
    nonfinite: what an infinite or NaN loss or gradient does: stop with an error, or skip the step.
    """

    tokens: float | str | None = None
    steps: int | None = None
    sequence_length: int = 512
    batch_tokens: float | str | None = None
    batch_sequences: int | None = None
    micro_batch: int | None = None
    lr: float = 1e-3
    optimizer: Any = "adamw"
    schedule: Any = "cosine"
    objective: Any = "next-token"
    memory: Sequence[Any] = ()
    surgery: Any = "none"
    form: Any = None
    targets: Sequence[str] = ("layers.*",)
    clip: float = 1.0
    dtype: str = "bfloat16"
    masters: bool = True
    seed: int = 0
    checkpoint_every: int = 100
    keep: int = 2
    eval_every: int = 0
    eval_sequences: int = 256
    nonfinite: str = "stop"
    device: str = "auto"
    compile: bool = False

    def __post_init__(self) -> None:
        for name in ("tokens", "batch_tokens"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, units.parse(getattr(self, name), "tokens"))
        if self.dtype not in DTYPES:
            raise unknown("dtype", self.dtype, DTYPES)
        object.__setattr__(self, "dtype", DTYPES[self.dtype])
        if (self.tokens is None) == (self.steps is None):
            raise UserError("give the length of the run once: tokens=2Mtok, or steps=500")
        if self.batch_tokens is not None and self.batch_sequences is not None:
            raise UserError("give the batch once: batch_tokens=16ktok, or batch_sequences=32")
        for name, least in (
            ("sequence_length", 1),
            ("steps", 1),
            ("batch_sequences", 1),
            ("micro_batch", 1),
            ("checkpoint_every", 0),
            ("keep", 1),
            ("eval_every", 0),
            ("eval_sequences", 1),
        ):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
                raise UserError(f"{name}={value!r} must be a whole number of at least {least}")
        for name, zero in (("lr", False), ("clip", True)):
            value = getattr(self, name)
            number = isinstance(value, int | float) and math.isfinite(value)
            if not number or value < 0 or (value == 0 and not zero):
                raise UserError(f"{name}={value!r} must be a {'number of at least 0' if zero else 'positive number'}")
        if self.nonfinite not in ("stop", "skip"):
            raise unknown("nonfinite", self.nonfinite, ("stop", "skip"))
        if self.sequences < 1:
            raise UserError(
                f"batch_tokens={self.batch_tokens:g} is less than one sequence of "
                f"{self.sequence_length}; ask for more, or for a shorter sequence_length"
            )
        for port in PORTS:
            Choice.parse(port, getattr(self, port))
        for name in ("memory", "targets"):
            value = getattr(self, name)
            object.__setattr__(self, name, (value,) if isinstance(value, str | dict) else tuple(value))
        for choice in self.memory:
            Choice.parse("memory", choice)
        if self.form is not None:
            Choice.parse("linear", self.form)
        if self.total_steps < 1:
            raise UserError(
                f"tokens={self.tokens:g} is less than one step of {self.step_tokens} ({self.sequences} "
                f"sequences of {self.sequence_length}); ask for more tokens or a smaller batch"
            )

    @property
    def sequences(self) -> int:
        """Sequences of one step."""
        if self.batch_sequences is not None:
            return self.batch_sequences
        return 32 if self.batch_tokens is None else int(float(self.batch_tokens) // self.sequence_length)

    @property
    def step_tokens(self) -> int:
        return self.sequences * self.sequence_length

    @property
    def total_steps(self) -> int:
        return self.steps if self.steps is not None else int(float(self.tokens or 0) // self.step_tokens)

    @property
    def total_tokens(self) -> int:
        return self.total_steps * self.step_tokens

    def build(self, port: str, *runtime: Any, **more: Any) -> Any:
        """The chosen method of `port` (optimizer, schedule, objective or surgery)."""
        return registry.build(port, getattr(self, port), *runtime, **more)

    def resolved(self) -> dict[str, Any]:
        """Every knob, methods with their own defaults: what a checkpoint records."""
        plain = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        for port in PORTS:
            plain[port] = Choice.parse(port, plain[port]).resolved()
        plain["memory"] = [Choice.parse("memory", choice).resolved() for choice in self.memory]
        plain["form"] = None if self.form is None else Choice.parse("linear", self.form).resolved()
        plain["targets"] = list(self.targets)
        plain["batch_sequences"], plain["batch_tokens"] = self.sequences, self.step_tokens
        return plain


def stream_knobs(schedule: Any, objective: Any) -> dict[str, Any]:
    """What the chosen schedule and objective ask of the run's stream, for whoever builds it."""
    parts = (registry.build("schedule", schedule), registry.build("objective", objective))
    return {knob: value for part in parts for knob, value in part.stream_knobs().items()}


def changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Knobs that differ, with their two values; a method's knobs are named `optimizer.beta1`."""
    found: dict[str, tuple[Any, Any]] = {}
    for key in dict.fromkeys([*before, *after]):
        old, new = before.get(key), after.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found |= {f"{key}.{k}": v for k, v in changes(old, new).items()}
        elif _listed(old) != _listed(new):
            found[key] = (old, new)
    return found


def _listed(value: Any) -> Any:
    """A tuple as the list that a checkpoint's JSON gives back."""
    return [_listed(v) for v in value] if isinstance(value, list | tuple) else value


def refuse_changes(before: Mapping[str, Any], after: Mapping[str, Any], folder: Any) -> dict[str, tuple[Any, Any]]:
    """The allowed changes between a checkpoint's knobs and today's. Raises `UserError` naming the others."""
    found = changes(before, after)
    strict = {k: v for k, v in found.items() if k.split(".")[0] not in LOOSE}
    if strict:
        told = "; ".join(f"{k} was {old!r} and is now {new!r}" for k, (old, new) in strict.items())
        raise UserError(
            f"the run in {folder} cannot go on with other knobs: {told}. Give the old ones, or "
            f"another folder. These may change: {', '.join(sorted(LOOSE))}"
        )
    return found


def members(config: TrainConfig, world: int = 1, callbacks: Mapping[str, Any] | None = None) -> list[compose.Member]:
    """The run's methods and settings, for `core.compose.resolve`; `callbacks` act in the loop beside them."""
    found = [compose.member(port, getattr(config, port)) for port in PORTS]
    found += [compose.member("memory", choice) for choice in config.memory]
    if config.form is not None:
        found.append(compose.member("linear", config.form))
        found.append(compose.setting(f"form={config.form}", requires={"trainable"}))
    for name, one in (callbacks or {}).items():
        label = getattr(one, "label", name)
        found.append(compose.Member(label, one.provides, one.requires, one.conflicts))
    rows = config.sequences // world
    whole = {"requires": {"step_gradients"}}
    if (config.micro_batch or rows) < rows:
        label = f"micro_batch={config.micro_batch} (gradient accumulation)"
        found.append(compose.setting(label, **whole, remedy=f"set micro_batch={rows}"))
    if config.clip > 0:
        found.append(compose.setting(f"clip={config.clip}", **whole, remedy="set clip=0"))
    if config.dtype != "float32" and config.masters and world == 1:
        remedy = "set masters=false or dtype=float32"
        found.append(compose.setting("masters=true (float32 master weights)", **whole, remedy=remedy))
    if config.compile:
        found.append(compose.setting("compile=true", provides={"compile"}, remedy="set compile=false"))
    if world > 1:
        label = f"{world} processes (FSDP2)"
        found.append(compose.setting(label, provides={"fsdp"}, remedy="run it in one process"))
    return found


def check_combination(config: TrainConfig, world: int = 1, callbacks: Mapping[str, Any] | None = None) -> None:
    """Refuse before anything is built what does not go together; the error names the pair."""
    chosen = members(config, world, callbacks)
    chosen.append(compose.setting("the data", provides={"document_mask", "reserved_tokens"}))  # checked with the batch
    chosen.append(compose.setting("the model", provides={"factors"}))  # its own; the optimizer looks for them
    compose.resolve(chosen, options={"linear": "form"})
    if config.sequences % world:
        raise UserError(
            f"a batch of {config.sequences} sequences cannot be shared by {world} processes; "
            f"ask for a multiple of {world}"
        )
