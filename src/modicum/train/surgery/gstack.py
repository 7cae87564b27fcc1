"""gstack: trains a shallow model first and stacks copies of it into the deep one.

The run begins with a model of layers / growth layers, a copy of the given model's first ones. When it has
seen d tokens, its layers are stacked `growth` times in order to fill the given model; embeddings, norm and head
are taken over. The optimizer's moments are stacked alike, and the schedule begins anew for the tokens left. A run
that is stopped before leaves the given model as it was; its checkpoint holds the shallow one.

    deep layer i = shallow layer i mod (layers / growth)
    log10(d) = 0.88 log10(N) + 163.27 / log10(C) - 5.74     N deep parameters, C = 6 N D FLOPs of D tokens

Du et al. 2024, arXiv:2405.15319: operator G_stack, growth 4, and the timing of their section on guidelines as
tongxuluo/prts states it. Departs from the paper: their grown model starts with fresh moments (`moments=false`);
the formula, fitted on large runs, asks small ones for more tokens than they have: d is at most a fifth of the
run; the shallow model has the initial scale of the deep one, and the deep one's schedule and peak rate.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from modicum.core.errors import UserError
from modicum.model.decoder import Decoder
from modicum.train.engine import TrainEngine
from modicum.train.parallel import gather, is_sharded
from modicum.train.surgery import Surgery

CLAIM = {
    "figure": "the loss of 300B tokens from scratch after 194B, 54.6% faster",
    "where": "abstract",
    "scale": "7B parameters",
}
LATEST = 0.2  # of the run's tokens, where the formula decides

_LAYER = re.compile(r"layers\.(\d+)\.")


@dataclass(frozen=True, kw_only=True)
class Config:
    growth: int = 4  # times deeper; divides the number of layers
    grow: float | None = None  # tokens before: share of the run below 1, tokens from 1 on; None: the formula
    moments: bool = True  # stack the optimizer's state as well, else begin with none
    restart: bool = True  # begin the schedule anew for the tokens left, with its warm-up

    def __post_init__(self) -> None:
        if self.growth < 2:
            raise ValueError(f"growth={self.growth} must be at least 2")
        if self.grow is not None and self.grow <= 0:
            raise ValueError(f"grow={self.grow} must be positive: a share of the run below 1, or tokens")


class Stacking(Surgery):
    config: Config
    conflicts = frozenset({"linear"})

    def __init__(self, config: Config):
        super().__init__(config)
        self.deep: Decoder | None = None  # the given model, until it is grown into
        self.at, self.step_tokens = 0, 0  # the step after which it grows; set at the start
        self.deep_parameters = 0

    def prepare(self, model: nn.Module, state: dict[str, Any] | None) -> nn.Module:
        if not isinstance(model, Decoder):
            raise UserError(f"gstack stacks the layers of modicum's Decoder, not of a {type(model).__name__}")
        self.deep_parameters = sum(p.numel() for p in model.parameters())
        small = shallow_config(model, self.config.growth)
        if state and state["grown_at"]:
            self.at = state["grown_at"]
            return model
        self.deep = model
        return first_layers(model, small)

    @property
    def grown(self) -> bool:
        return self.deep is None

    def start(self, trainer: TrainEngine) -> None:
        config = trainer.config
        self.step_tokens = config.step_tokens
        if self.grown:
            return
        tokens = self.tokens(config.total_tokens)
        self.at = round(tokens / config.step_tokens)
        if not 0 < self.at < config.total_steps:
            raise UserError(
                f"gstack would grow after {tokens:g} tokens (step {self.at}) in a run of {config.total_tokens} "
                f"({config.total_steps} steps); give grow= as a share of the run, for example grow=0.1"
            )

    def tokens(self, total: float) -> float:
        """Tokens of the shallow phase in a run of `total`."""
        if self.config.grow is None:
            return min(timing(self.deep_parameters, total), LATEST * total)
        return self.config.grow * total if self.config.grow < 1 else self.config.grow

    def marks(self, trainer: TrainEngine) -> list[int]:
        return [self.at]

    def position(self, done: float, total: float) -> tuple[float, float]:
        begun = self.at * self.step_tokens if self.grown and self.config.restart else 0
        return max(done - begun, 0.0), total - begun

    def after_step(self, trainer: TrainEngine) -> None:
        if self.deep is None or trainer.steps_done < self.at:
            return
        deep, layers = self.deep, len(trainer.model.layers)  # type: ignore[arg-type]
        small_model = dict(trainer.model.named_parameters())
        for name, p in deep.named_parameters():
            if not p.requires_grad:
                p.data = whole(small_model[below(name, layers)]).clone()
        names = [name for name, p in deep.named_parameters() if p.requires_grad]
        weights = {name: whole(trainer.named[below(name, layers)]) for name in names}
        state = None
        if self.config.moments:
            small = {key: whole(v) if isinstance(v, Tensor) else v for key, v in trainer.optimizer.state_dict().items()}
            state = stacked(small, layers, len(deep.layers))
        self.at, self.deep = trainer.steps_done, None
        trainer.replace(deep, weights=weights)
        if state is None:
            return
        try:
            trainer.optimizer.load_state_dict(state)
        except (KeyError, RuntimeError, ValueError) as error:
            name = trainer.config.choice("optimizer").method
            raise UserError(
                f"gstack cannot stack the state of optimizer {name!r} ({type(error).__name__}: {error}); let it begin "
                "without: gstack:moments=false, or take another optimizer"
            ) from None

    def state_dict(self) -> dict[str, Any]:
        return {"grown_at": self.at if self.grown else 0}


def timing(parameters: float, tokens: float) -> float:
    """Tokens d of the shallow phase for a deep model of `parameters` trained for `tokens`."""
    flops = 6.0 * parameters * tokens
    return 10 ** (0.88 * math.log10(parameters) + 163.27 / math.log10(flops) - 5.74)


def shallow_config(model: Decoder, growth: int) -> Any:
    """The config of the first layers / growth layers. Raises `UserError` where stacking cannot work."""
    config = model.config
    if config.layers % growth:
        fitting = [g for g in range(2, config.layers + 1) if config.layers % g == 0]
        raise UserError(
            f"gstack: growth={growth} does not divide the model's {config.layers} layers; give a depth that is a "
            f"multiple of {growth}" + (f", or growth={fitting[0]}" if fitting else "")
        )
    layers = config.layers // growth

    for i in range(layers, config.layers):
        if config.per_layer[i] != config.per_layer[i % layers]:
            raise UserError(
                f"gstack: layer {i} is made otherwise than layer {i % layers}, whose weights it would get; choose a "
                "growth at which shapes, windows and rotations repeat"
            )
    return dataclasses.replace(config, layers=layers, overrides=config.overrides[:layers])


def first_layers(deep: Decoder, config: Any) -> Decoder:
    """A decoder of its own with copies of `deep`'s first layers and of everything around them."""
    with torch.device("meta"):
        model = type(deep)(config)
    memo: dict[int, Any] = {}  # one for all, so that a tied head stays tied
    for name, module in deep.named_children():
        kept = module[: config.layers] if isinstance(module, nn.ModuleList) else module
        for p in kept.parameters():
            if id(p) not in memo:
                memo[id(p)] = nn.Parameter(p.detach().clone(), p.requires_grad)
        setattr(model, name, copy.deepcopy(kept, memo))
    for name, value in vars(deep).items():
        if not name.startswith("_") and name != "config":
            setattr(model, name, value)  # what memory savers have set
    return model


def below(name: str, layers: int) -> str:
    """The shallow model's name of a parameter of the deep one."""
    return _LAYER.sub(lambda m: f"layers.{int(m[1]) % layers}.", name, count=1)


def stacked(state: dict[str, Any], layers: int, deep: int) -> dict[str, Any]:
    """An optimizer's state for the deep model: what belongs to a layer, for each of its copies.

    State is keyed by parameter name; copies have tensors of their own, in case the optimizer keeps them.
    """
    grown: dict[str, Any] = {}
    for key, value in state.items():
        layer_match = _LAYER.match(key)
        for i in range(int(layer_match[1]), deep, layers) if layer_match else [-1]:
            copied = i >= layers
            grown[_LAYER.sub(f"layers.{i}.", key, count=1) if layer_match else key] = (
                (value.clone() if isinstance(value, Tensor) else copy.deepcopy(value)) if copied else value
            )
    return grown


def whole(tensor: Tensor) -> Tensor:
    """The tensor, gathered if it is sharded (every process must call)."""
    return gather(tensor) if is_sharded(tensor) else tensor.detach()
