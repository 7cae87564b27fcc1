"""What a training run is told, checked before anything is built.

`TrainSpec` has a field for each setting and an entry of `methods` for each training port that is chosen otherwise than
its baseline. Training ports are found from the registry: a port in room `train`, whose methods are callbacks, takes
part in every run, on the command line and in recipes without a line here.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Self

from modicum.budget.units import Parameters, Seconds, Tokens
from modicum.core import compose, registry
from modicum.core.choice import Choice
from modicum.core.errors import UserError
from modicum.core.spec import MethodOf, Spec, option, options

DATA_PORTS = ("mixture", "order", "transform", "packing")  # of the data that a run reads
DTYPES = {"bfloat16": "bfloat16", "bf16": "bfloat16", "float32": "float32", "fp32": "float32"}


def training_ports() -> dict[str, registry.PortInfo]:
    """The ports whose methods act in the training loop, by name."""
    return {name: info for name, info in registry.ports().items() if info.package_name == "train"}


def run_ports() -> dict[str, registry.PortInfo]:
    """The ports that a run chooses methods of: those of its data, then those of the loop."""
    return {name: registry.port(name) for name in DATA_PORTS} | training_ports()


@dataclass(frozen=True, kw_only=True, init=False)
class TrainConfig(Spec):
    """Settings of `train.loop.train`. Quantities may be strings with units ("2Mtok").

    Methods are given by their port: `TrainConfig(steps=100, optimizer="galore:rank=4", memory=["cce"])`. What a chosen
    method brings along (`BRINGS`) is chosen too, unless its port is named here.
    """

    NAME = "setting of a training run"

    tokens: Tokens | None = option(None, "Length of the run, e.g. 2Mtok; rounded down to whole steps.", resumable=True)
    steps: int | None = option(None, "Length of the run instead, in steps.", least=1, resumable=True)
    sequence_length: int = option(512, "Tokens per sequence.", least=1)
    batch_tokens: Tokens | None = option(
        None, "Tokens per step, over all processes and micro-batches (16ktok by default)."
    )
    batch_sequences: int | None = option(None, "Sequences per step instead.", least=1)
    micro_batch: int | None = option(
        None, "Sequences per forward pass of a process, to save memory (default: all).", least=1, resumable=True
    )
    lr: float | None = option(None, "Peak learning rate (by the model's width and the batch).", above=0)
    form: Annotated[Any, MethodOf("linear")] = option(None, "A linear form to train in, e.g. sltrain:rank=32.")
    targets: tuple[str, ...] | None = option(("layers.*",), "The layers that get it: globs, with commas.")
    clip: float = option(1.0, "Limit of the gradient's global norm, 0 for none.", least=0)
    dtype: str = option("bfloat16", "bfloat16 or float32.", allowed=tuple(DTYPES))
    masters: bool = option(True, "Keep float32 weights behind bfloat16 ones for the optimizer to work on.")
    seed: int = option(0, "Seed of weights and order.")
    checkpoint_every: int = option(100, "Steps between checkpoints, 0 for only at the end.", least=0, resumable=True)
    keep: int = option(2, "Checkpoints to keep.", least=1, resumable=True)
    eval_every: int = option(100, "Steps between held-out losses, 0 for only at the end.", least=0, resumable=True)
    eval_sequences: int = option(256, "Held-out sequences to read for each.", least=1, resumable=True)
    nonfinite: str = option(
        "stop", "What an infinite or NaN loss does: stop, or skip the step.", allowed=("stop", "skip"), resumable=True
    )
    device: str = option("auto", "auto, cpu or cuda.", resumable=True)
    compile: bool = option(False, "Compile the layers.", resumable=True)
    methods: Mapping[str, Any] = field(default_factory=dict, hash=False)

    LENGTHS: ClassVar[dict[str, str]] = {"tokens": "2Mtok", "steps": "500"}  # how the run's length may be said
    METHODS: ClassVar[dict[str, str]] = {}  # defaults that are not the port's baseline
    BATCH_TOKENS: ClassVar[int] = 16_000  # of a step, where nothing else is said

    @classmethod
    def ports(cls) -> dict[str, registry.PortInfo]:
        return run_ports()

    def __init__(self, **given: Any) -> None:
        named = {port: given.pop(port) for port in run_ports() if port in given}
        methods = dict(given.pop("methods", {})) | named
        super().__init__(**given, methods=methods)

    def check(self) -> None:
        object.__setattr__(self, "dtype", DTYPES[self.dtype])
        if sum(getattr(self, name) is not None for name in self.LENGTHS) != 1:
            ways = " or ".join(f"{name}={example}" for name, example in self.LENGTHS.items())
            raise UserError(f"give the length of the run once: {ways}")
        if self.batch_tokens is not None and self.batch_sequences is not None:
            raise UserError("give the batch once: batch_tokens=16ktok, or batch_sequences=32")
        if self.sequences < 1:
            raise UserError(
                f"batch_tokens={self.batch_tokens:g} is less than one sequence of "
                f"{self.sequence_length}; ask for more, or for a shorter sequence_length"
            )
        _ = self.chosen
        if self.tokens is not None and self.total_steps < 1:
            raise UserError(
                f"tokens={self.tokens:g} is less than one step of {self.step_tokens} ({self.sequences} "
                f"sequences of {self.sequence_length}); ask for more tokens or a smaller batch"
            )

    @functools.cached_property
    def chosen(self) -> tuple[Choice, ...]:
        """The methods of the run: those given, what they bring, then the baselines of the other ports."""
        ports = run_ports()
        given = [
            Choice.parse(port, one)
            for port, value in self.methods.items()
            for one in (several(value) if ports[port].several else [value])
        ]
        completed = compose.complete(given)
        taken = {choice.port for choice in completed}
        return (*completed, *(self._default(n) for n, i in ports.items() if n not in taken and not i.several))

    @classmethod
    def _default(cls, port: str) -> Choice:
        return Choice.parse(port, cls.METHODS.get(port, registry.port(port).baseline))

    def choice(self, port: str) -> Choice:
        """The method of a port that takes one."""
        (chosen,) = self.choices(port)
        return chosen

    def choices(self, port: str) -> list[Choice]:
        return [choice for choice in self.chosen if choice.port == port]

    @property
    def sequences(self) -> int:
        """Sequences of one step."""
        if self.batch_sequences is not None:
            return self.batch_sequences
        if self.batch_tokens is None:
            return max(self.BATCH_TOKENS // self.sequence_length, 1)
        return int(self.batch_tokens // self.sequence_length)

    @property
    def step_tokens(self) -> int:
        return self.sequences * self.sequence_length

    @property
    def total_steps(self) -> int:
        return self.steps if self.steps is not None else int((self.tokens or 0) // self.step_tokens)

    @property
    def total_tokens(self) -> int:
        return self.total_steps * self.step_tokens

    def for_width(self, width: int, continued: bool = False) -> Self:
        """This run with a learning rate for a model of `width`, unless it has one."""
        if self.lr is not None:
            return self
        batch = self.batch_tokens or (self.step_tokens if self.batch_sequences else self.BATCH_TOKENS)
        return dataclasses.replace(self, lr=peak_rate(width, batch, continued))

    def build(self, port: str, *runtime: Any, **more: Any) -> Any:
        """The chosen method of `port`; a list of them where a port takes several."""
        if training_ports()[port].several:
            return [registry.build(port, choice, *runtime, **more) for choice in self.choices(port)]
        return registry.build(port, self.choice(port), *runtime, **more)

    def stream(self, documents: Any, **more: Any) -> Any:
        """The run's batches of `documents`, a `data.stream.Stream` with its mixture, order, transforms and packing."""
        from modicum.data.stream import Stream

        return Stream(
            documents,
            self.choice("mixture"),
            self.choice("packing"),
            order=self.choice("order"),
            transforms=self.choices("transform"),
            **{"sequence_length": self.sequence_length, "seed": self.seed, "total": self.total_tokens} | more,
        )

    def heldout_stream(self, documents: Any, **more: Any) -> Any:
        """One pass over `documents` as they are, packed as the run packs."""
        from modicum.data.stream import Stream

        return Stream(
            documents,
            packing=self.choice("packing"),
            **{"sequence_length": self.sequence_length, "seed": 0, "epochs": 1} | more,
        )

    def resolved(self) -> dict[str, Any]:
        """Every setting, methods with their own defaults: what a checkpoint records."""
        plain = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "methods"}
        for port, info in run_ports().items():
            resolved = [choice.resolved() for choice in self.choices(port)]
            plain[port] = resolved if info.several else resolved[0]
        plain["form"] = None if self.form is None else Choice.parse("linear", self.form).resolved()
        plain["targets"] = None if self.targets is None else list(self.targets)
        plain["batch_sequences"], plain["batch_tokens"] = self.sequences, self.step_tokens
        return plain


@dataclass(frozen=True, kw_only=True, init=False)
class PretrainSpec(TrainConfig):
    """A run of `train.pretrain.pretrain`: a new model, or one to go on from."""

    parameters: Parameters | None = option(None, "Size of a new model, e.g. 5M or 125M (5M by default).")
    model: str | None = option(None, "Go on from this model folder, name or hub id instead.")
    attention: str | None = option(
        None, "What its layers attend to, e.g. sliding:window=256; layers take turns of sliding:window=256+causal."
    )
    time: Seconds | None = option(None, "Length of the run instead, e.g. 5m: as many tokens as fit.")

    LENGTHS = TrainConfig.LENGTHS | {"time": "5m"}

    def check(self) -> None:
        super().check()
        if self.parameters is not None and self.model is not None:
            raise UserError("a given model has its own size: give parameters or model, not both")
        if self.parameters is not None and self.parameters <= 0:
            raise UserError(f"parameters={self.parameters:g} must be positive; write for example 5M or 1.3B")


def peak_rate(width: int, batch_tokens: float, continued: bool = False) -> float:
    """Default peak rate of AdamW: 1 / width, kept in [3e-4, 4e-3], for steps of 16 ktok; smaller steps have it
    times the square root of their share (Malladi et al. 2022, arXiv:2205.10011). 1e-4 for a model trained before."""
    if continued:
        return 1e-4
    rate = min(4e-3, max(3e-4, 1.0 / width))
    return rate * math.sqrt(min(batch_tokens / TrainConfig.BATCH_TOKENS, 1.0))


def several(value: Any) -> Sequence[Any]:
    """The choices of a port that takes any number of methods: one, or a list."""
    return (value,) if isinstance(value, str | dict | Choice) else tuple(value or ())


def changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Knobs that differ, with their two values; a method's knobs are named `optimizer.beta1`."""
    changed: dict[str, tuple[Any, Any]] = {}
    for key in dict.fromkeys([*before, *after]):
        old, new = before.get(key), after.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            changed |= {f"{key}.{k}": v for k, v in changes(old, new).items()}
        elif _listed(old) != _listed(new):
            changed[key] = (old, new)
    return changed


def _listed(value: Any) -> Any:
    """A tuple as the list that a checkpoint's JSON gives back."""
    return [_listed(v) for v in value] if isinstance(value, list | tuple) else value


def refuse_changes(before: Mapping[str, Any], after: Mapping[str, Any], folder: Any) -> dict[str, tuple[Any, Any]]:
    """The allowed changes between a checkpoint's knobs and today's. Raises `UserError` naming the others."""
    changed = changes(before, {name: value for name, value in after.items() if name in before})
    free = {name for name, one in options(TrainConfig).items() if one.metadata.get("resumable")} | {
        "mixture",
        "packing",
    }
    strict = {k: v for k, v in changed.items() if k.split(".")[0] not in free}
    if strict:
        described = "; ".join(f"{k} was {old!r} and is now {new!r}" for k, (old, new) in strict.items())
        raise UserError(
            f"the run in {folder} cannot go on with other knobs: {described}. Give the old ones, or "
            f"another folder. These may change: {', '.join(sorted(free))}"
        )
    return changed


def members(
    config: TrainConfig, world: int = 1, callbacks: Mapping[str, Any] | None = None, *, form: bool = True
) -> list[compose.Member]:
    """The run's methods and settings, for `core.compose.resolve`; `callbacks` act in the loop beside them.

    form=False: without its linear form, which then is attached by somebody else.
    """
    members = [compose.member(choice.port, choice) for choice in config.chosen]
    if form and config.form is not None:
        members.append(compose.member("linear", config.form))
        members.append(compose.setting(f"form={config.form}", requires={"trainable"}))
    for name, one in (callbacks or {}).items():
        label = getattr(one, "label", name)
        members.append(compose.Member(label, one.provides, one.requires, one.conflicts))
    rows = config.sequences // world
    whole = {"requires": {"step_gradients"}}
    if (config.micro_batch or rows) < rows:
        label = f"micro_batch={config.micro_batch} (gradient accumulation)"
        members.append(compose.setting(label, **whole, remedy=f"set micro_batch={rows}"))
    if config.clip > 0:
        members.append(compose.setting(f"clip={config.clip}", **whole, remedy="set clip=0"))
    if config.dtype != "float32" and config.masters and world == 1:
        remedy = "set masters=false or dtype=float32"
        members.append(compose.setting("masters=true (float32 master weights)", **whole, remedy=remedy))
    if config.compile:
        members.append(compose.setting("compile=true", provides={"compile"}, remedy="set compile=false"))
    if world > 1:
        label = f"{world} processes (FSDP2)"
        members.append(compose.setting(label, provides={"fsdp"}, remedy="run it in one process"))
    return members


def check_stream(config: TrainConfig, stream: Any) -> None:
    """Raise `UserError` if `stream` lacks the order or the transforms that the run's methods brought along or that were
    chosen otherwise than by default."""
    for port in ("order", "transform"):
        wanted = [c for c in config.choices(port) if c.method != registry.port(port).baseline]
        present = [c for c in getattr(stream, "choices", ()) if c.port == port]
        if wanted and [c.resolved() for c in present] != [c.resolved() for c in wanted]:
            names, have = (", ".join(map(str, choices)) or "none" for choices in (wanted, present))
            by = [c for c in config.chosen if any(half in wanted for half in compose.brings(c.port, c.method))]
            why = f", which {by[0].port} {by[0].method!r} brings along," if by else ""
            raise UserError(
                f"the run has {port}={names}{why} and its stream was built with {port}={have}: build it with "
                f"`config.stream(documents)`, as pretraining does, or choose another method"
            )


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
