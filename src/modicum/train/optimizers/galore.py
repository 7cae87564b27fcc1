"""galore: Adam in the subspace of the gradient's largest singular directions.

Every `gap` steps the first `rank` singular vectors of a matrix's gradient become its basis P, on the right of
a matrix with at least as many rows as columns and on the left of a wide one, so that P is small. Adam's
moments are kept of the projected gradient alone; its ratio is projected back. The weights stay whole, and as
the basis changes, the sum of all updates can have any rank.

    R = P^T G   (or G P)                  P = first r singular vectors of G, at t = 1, 1 + gap, ...
    W = W - lr * scale * P adam(R)   (or adam(R) P^T)      - lr * decay * W

Vectors, embedding tables and the head are trained by AdamW (with `bits=8`, by adamw-8bit). `bits=8` stores
the moments in 8 bits. `per_layer` updates each weight as soon as its gradient is known and frees the
gradient, so that those of all weights never exist at once; the gradient's norm can then not be limited, nor
summed over micro-batches. With FSDP2 each process projects its own rows: a basis on the right is the same
everywhere and the moments are sharded; on the left it is the other way round, and the compact gradients are
summed.

Zhao et al. 2024, arXiv:2403.03507, sections 3 and 4, algorithm 2. Departs from the paper: nothing; betas and
eps, which it leaves open, are those of the authors' released code. `rank` may be a share of the smaller side.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from modicum.budget.cost import Cost
from modicum.core.registry import Capabilities
from modicum.train.optimizers import Group, Optimizer
from modicum.train.optimizers import _lowrank as lowrank
from modicum.train.optimizers._moments import Adam, check_adam, check_bits, flat, parted
from modicum.train.parallel import agreed, full, is_sharded, local, rows_like, shard_like

CLAIM = {
    "figure": "perplexity 15.64 where full-rank Adam has 15.56, with 65.5% less state (8 bits: 82.5%)",
    "where": "abstract and Table 2",
    "scale": "LLaMA 1B, 13.1B tokens of C4",
}
SWEEP = {"rank": (0.25,)}


@dataclass(frozen=True, kw_only=True)
class Config:
    rank: int | float = 0.25  # of the projection; a share of the smaller side where not a whole number
    gap: int = 200  # steps between two bases (T)
    scale: float = 0.25  # of the projected update (alpha)
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-6
    weight_decay: float = 0.0
    bits: int = 32  # of the moments: 32 or 8
    block: int = 2048  # with bits=8, values that share a scale, within a row
    per_layer: bool = False  # update during the backward pass

    def __post_init__(self) -> None:
        check_adam(self.beta1, self.beta2, self.eps, self.weight_decay)
        check_bits(self.bits, self.block)
        lowrank.check_rank(self.rank)
        if self.gap < 1:
            raise ValueError(f"gap={self.gap} must be at least 1 step")
        if self.scale <= 0:
            raise ValueError(f"scale={self.scale} must be positive")


TOY = Config(rank=0.5, gap=3, scale=1.0)


class GaLore(Optimizer):
    """State of a projected matrix: `NAME:left` or `NAME:right` (the basis), the moments, and `NAME:step`."""

    config: Config
    conflicts = frozenset()

    @classmethod
    def capabilities(cls, config: Any) -> Capabilities:
        return Capabilities() if config.per_layer else super().capabilities(config)

    def __init__(self, config: Config, named: Iterable[tuple[str, Tensor]], *, lr: float = 1e-3):
        super().__init__(config, named, lr=lr)
        self.adam = _adam(config)
        self.ranks = {
            name: lowrank.rank_of("galore", config.rank, name, tuple(p.shape))
            for name, p in self.named.items()
            if lowrank.is_projected(name, p.ndim)
        }
        self.buffers: dict[str, dict[str, Tensor]] = {}  # by parameter: basis and moments, this process's part
        self.steps: dict[str, int] = {}
        rest = [(name, p) for name, p in self.named.items() if name not in self.ranks]
        other, knobs = lowrank.other(config)
        self.rest = other(knobs, rest, lr=lr) if rest else None
        self.hooks: list[Any] = []
        self.squares: Tensor | float = 0.0

    def begin(self, scales: Mapping[str, float]) -> None:
        if not self.config.per_layer:
            return
        self._unhook()
        self.squares = 0.0
        groups = {name: group for group in self.split for name in group.named}
        for name, p in self.named.items():
            self.hooks.append(p.register_post_accumulate_grad_hook(self._at_once(name, groups[name], scales)))

    def _at_once(self, name: str, group: Group, scales: Mapping[str, float]) -> Any:
        """A hook that uses a gradient up as soon as it is there."""

        @torch.no_grad()
        def use_up(p: Tensor) -> None:
            assert p.grad is not None
            self.squares = self.squares + p.grad.float().square().sum()
            if name in self.ranks:
                self._update(name, p, group, scales)
            elif self.rest:
                self.rest.step(scales)  # whatever has a gradient, which is p alone
            p.grad = None

        return use_up

    def _unhook(self) -> None:
        while self.hooks:
            self.hooks.pop().remove()

    def spent(self) -> Tensor | float:
        return self.squares

    @torch.no_grad()
    def step(self, scales: Mapping[str, float]) -> None:
        self._unhook()
        if self.config.per_layer:
            return
        if self.rest:
            self.rest.step(scales)
        for group in self.split:
            for name, p in group.named.items():
                if name in self.ranks and p.grad is not None:
                    self._update(name, p, group, scales)

    def _update(self, name: str, p: Tensor, group: Group, scales: Mapping[str, float]) -> None:
        assert p.grad is not None
        t, g = self.steps.get(name, 0), local(p.grad).float()
        if t % self.config.gap == 0:
            buffers = self.buffers.setdefault(name, {})
            buffers |= self._bases(name, p)
        buffers = self.buffers[name]
        compact = lowrank.project(g, buffers)
        if "left" in buffers:
            compact = _summed(compact, p)
        if "exp_avg" not in buffers:
            buffers |= self.adam.fresh((compact.shape[0], compact.shape[1]), compact.device)
        ratio = self.adam.ratio(compact, buffers, t + 1)
        self.steps[name] = t + 1
        rate = self.lr * group.rate * scales["lr"]
        w = local(p)
        w.mul_(1 - rate * group.weight_decay)
        w.add_(lowrank.back(ratio, buffers), alpha=-rate * self.config.scale)

    def _bases(self, name: str, p: Tensor) -> dict[str, Tensor]:
        """The basis that the gradient gives now; on the left, this process's rows of it."""
        assert p.grad is not None
        new_bases = lowrank.bases("galore", name, full(p.grad), self.ranks[name])
        return {side: _part(side, agreed(basis, p), p) for side, basis in new_bases.items()}

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = self.rest.state_dict() if self.rest else {}
        whole = {
            name: {
                field: rows_like(value, self.named[name]) if _by_rows(field, buffers) else value
                for field, value in buffers.items()
            }
            for name, buffers in self.buffers.items()
        }
        return state | flat(whole, self.steps)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.buffers, self.steps, rest = parted(state, self.ranks)
        for name, buffers in self.buffers.items():
            p = self.named[name]
            self.buffers[name] = {
                field: local(shard_like(value, p)) if _by_rows(field, buffers) else value.to(p.device, copy=True)
                for field, value in buffers.items()
            }
        if self.rest:
            self.rest.load_state_dict(rest)

    @classmethod
    def cost(cls, config: Config, shapes: Mapping[str, tuple[int, ...]]) -> Cost:
        state_bytes = flops = count = 0
        for name, shape in shapes.items():
            if lowrank.is_projected(name, len(shape)):
                k = lowrank.rank_of("galore", config.rank, name, shape)
                compact = lowrank.compact_shape(shape, k)
                state_bytes += 4 * lowrank.bases_numbers(shape, k) + _adam(config).nbytes(compact)
                count += math.prod(shape)
                # Two products with the basis, Adam on what is compact, and the share of a decomposition.
                svd = 10 * math.prod(shape) * min(shape) / config.gap
                flops += int(4 * k * math.prod(shape) + 14 * math.prod(compact) + svd)
        other, knobs = lowrank.other(config)
        rest = other.cost(knobs, {n: s for n, s in shapes.items() if not lowrank.is_projected(n, len(s))})
        return Cost(
            peak_bytes=state_bytes + rest.peak_bytes, flops=flops + rest.flops, parameters=count + rest.parameters
        )


def _adam(config: Config) -> Adam:
    return Adam(beta1=config.beta1, beta2=config.beta2, eps=config.eps, bits=config.bits, block=config.block)


def _by_rows(field: str, buffers: Mapping[str, Tensor]) -> bool:
    """Whether a state tensor is sharded like its parameter: a left basis, the moments beside a right one."""
    return field == "left" if "left" in buffers else field != "right"


def _part(side: str, basis: Tensor, p: Tensor) -> Tensor:
    return local(shard_like(basis, p)) if side == "left" else basis


def _summed(compact: Tensor, p: Tensor) -> Tensor:
    """The compact gradient over all processes' rows."""
    if is_sharded(p):
        torch.distributed.all_reduce(compact)
    return compact
