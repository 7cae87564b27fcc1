"""gradnormlorp: low-rank training of weights that are kept as direction and magnitude.

Every output's weight vector is a direction of length one times a magnitude. The magnitude trains whole; the
direction moves by a low-rank product I J; and the gradients of I and J are projected on their own singular
directions, found anew every `gap` steps, where Adam keeps its moments. The model's weight is always the whole
product, so the model stays as it was and a trained one costs nothing more to run.

    W = M V / |V|,   V = W0 + I J         |.| and M per output;  I = 0 at the start
    dM = rows of sum(dW * V / |V|)        dV = M / |V| * (dW - dM * V / |V|)
    dI = dV J^T,   dJ = I^T dV            D = dI or dJ
    I, J = ... - lr * scale * P adam(P^T D Q) Q^T        M = M - lr * adam(dM)

W0 need not be kept: V = W |V| / M, with one |V| and one M per output. Embedding tables, vectors and the head
are trained by AdamW. `bits=8` stores the moments of I, J and of what AdamW trains in 8 bits.

Huang et al. 2025, arXiv:2412.19616, section 3. Departs from the paper: nothing in the equations. The paper
defines the projection on both sides (`sides=both`); the authors' code projects one side (`sides=one`), leaves
I and J out where it normalises weights itself, and projects at half the factors' rank where peft holds them,
which is the default here.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from modicum.budget.cost import Cost
from modicum.train.optimizers import Optimizer
from modicum.train.optimizers import _lowrank as lowrank
from modicum.train.optimizers._moments import Adam, check_adam, check_bits, flat, parted

CLAIM = {
    "figure": "optimizer memory reduced by up to 89.5% in 8 bits; GLUE 80.65 at rank 8, LoRA 79.23",
    "where": "abstract",
    "scale": "LLaMA to 7B on C4; RoBERTa-base",
}
SWEEP = {"rank": (0.25,)}
TINY = 1e-12  # least magnitude and length: a direction must exist


@dataclass(frozen=True, kw_only=True)
class Config:
    rank: int | float = 0.25  # of I J; a share of the smaller side where not a whole number
    projection: int | float = 0.5  # of the factors' gradients; a share of `rank` where not a whole number
    sides: str = "both"  # of the projection: both, as the paper defines it, or one, by shape, as its code
    gap: int = 250  # steps between two projections (T)
    scale: float = 0.25  # of the factors' updates
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-6
    weight_decay: float = 0.0  # of the magnitudes
    bits: int = 32  # of the moments: 32 or 8
    block: int = 2048  # with bits=8, values that share a scale, within a row
    seed: int = 0  # of J's first values

    def __post_init__(self) -> None:
        check_adam(self.beta1, self.beta2, self.eps, self.weight_decay)
        check_bits(self.bits, self.block)
        lowrank.check_rank(self.rank)
        lowrank.check_rank(self.projection, "projection")
        if self.sides not in ("both", "one"):
            raise ValueError(f"sides={self.sides!r} must be both or one")
        if self.gap < 1:
            raise ValueError(f"gap={self.gap} must be at least 1 step")
        if self.scale <= 0:
            raise ValueError(f"scale={self.scale} must be positive")


TOY = Config(rank=1.0, projection=1.0, gap=3, scale=1.0)


class GradNormLoRP(Optimizer):
    """State of a matrix, as `NAME:field`: `length`, `magnitude` (O x 1), the factors I (O x R) and J (R x I), of
    each its bases and moments (`I.left`, `I.exp_avg` ...), the magnitude's moments, and `step`."""

    config: Config
    conflicts = frozenset({"fsdp"})

    def __init__(self, config: Config, named: Iterable[tuple[str, Tensor]], *, lr: float = 1e-3):
        super().__init__(config, named, lr=lr)
        self.adam, self.exact = _adam(config, config.bits), _adam(config, 32)
        self.ranks = {
            name: _ranks(config, name, tuple(p.shape))
            for name, p in self.named.items()
            if lowrank.is_projected(name, p.ndim)
        }
        self.buffers: dict[str, dict[str, Tensor]] = {}
        self.steps: dict[str, int] = {}
        rest = [(name, p) for name, p in self.named.items() if name not in self.ranks]
        other, knobs = lowrank.other(config)
        self.rest = other(knobs, rest, lr=lr) if rest else None

    @torch.no_grad()
    def step(self, scales: Mapping[str, float]) -> None:
        if self.rest:
            self.rest.step(scales)
        for group in self.split:
            rate = self.lr * group.rate * scales["lr"]
            for name, p in group.named.items():
                if name in self.ranks and p.grad is not None:
                    self._update(name, p, p.grad.float(), rate, group.weight_decay)

    def _update(self, name: str, p: Tensor, g_OI: Tensor, rate: float, decay: float) -> None:
        if name not in self.buffers:
            self.buffers[name], self.steps[name] = self._fresh(name, p), 0
        buffers, t = self.buffers[name], self.steps[name]
        length_O1, magnitude_O1 = buffers["length"], buffers["magnitude"]
        unit_OI = p.float() / magnitude_O1
        dm_O1 = (g_OI * unit_OI).sum(1, keepdim=True)
        dv_OI = (g_OI - unit_OI * dm_O1).mul_(magnitude_O1 / length_O1)
        v_OI = unit_OI.mul_(length_O1)
        del unit_OI
        i_OR, j_RI = buffers["I"], buffers["J"]
        gradients = {"I": dv_OI @ j_RI.T, "J": i_OR.T @ dv_OI}
        del dv_OI
        moves = {}
        for factor, d in gradients.items():
            # The first gradient of J is zero, because I is: its directions are looked for again.
            if t % self.config.gap == 0 or (factor, t) == ("J", 1):
                new_bases = lowrank.bases("gradnormlorp", name, d, self.ranks[name][1], self.config.sides)
                buffers |= {f"{factor}.{side}": basis for side, basis in new_bases.items()}
            own = _own(buffers, factor)
            compact = lowrank.project(d, own)
            if "exp_avg" not in own:
                own |= self.adam.fresh((compact.shape[0], compact.shape[1]), compact.device)
            moves[factor] = lowrank.back(self.adam.ratio(compact, own, t + 1), own)
            buffers |= {f"{factor}.{field}": value for field, value in own.items()}
        move_m = self.exact.ratio(dm_O1, _own(buffers, "magnitude"), t + 1)
        self.steps[name] = t + 1
        if rate == 0:
            return  # the weight would be put together again, not quite as it was
        # I J moves by dI J + (I + dI) dJ.
        size = -rate * self.config.scale
        v_OI.addmm_(moves["I"], j_RI, alpha=size)
        i_OR.add_(moves["I"], alpha=size)
        v_OI.addmm_(i_OR, moves["J"], alpha=size)
        j_RI.add_(moves["J"], alpha=size)
        magnitude_O1.mul_(1 - rate * decay).add_(move_m, alpha=-rate)
        magnitude_O1.copy_(torch.where(magnitude_O1.abs() < TINY, TINY, magnitude_O1))
        length_O1.copy_(_length(v_OI))
        p.copy_(v_OI.mul_(magnitude_O1 / length_O1))

    def _fresh(self, name: str, p: Tensor) -> dict[str, Tensor]:
        """The weight as it is: its vectors' lengths as magnitudes, I zero, J uniform as in a linear layer."""
        (rows, columns), r = p.shape, self.ranks[name][0]
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) + self.config.seed)
        bound = 1 / math.sqrt(columns)
        j_RI = torch.empty(r, columns).uniform_(-bound, bound, generator=generator)
        length_O1 = _length(p.float())
        moments = self.exact.fresh((rows, 1), p.device)
        return {
            "length": length_O1,
            "magnitude": length_O1.clone(),
            "I": torch.zeros(rows, r, device=p.device),
            "J": j_RI.to(p.device),
            **{f"magnitude.{field}": value for field, value in moments.items()},
        }

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = self.rest.state_dict() if self.rest else {}
        return state | flat(self.buffers, self.steps)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        buffers, self.steps, rest = parted(state, self.ranks)
        self.buffers = {
            name: {field: value.to(self.named[name].device, copy=True) for field, value in fields.items()}
            for name, fields in buffers.items()
        }
        if self.rest:
            self.rest.load_state_dict(rest)

    @classmethod
    def cost(cls, config: Config, shapes: Mapping[str, tuple[int, ...]]) -> Cost:
        adam, state_bytes, flops, count = _adam(config, config.bits), 0, 0, 0
        for name, shape in shapes.items():
            if lowrank.is_projected(name, len(shape)):
                r, k = _ranks(config, name, shape)
                state_bytes += 4 * (4 * shape[0] + r * sum(shape))
                for factor in ((shape[0], r), (r, shape[1])):
                    state_bytes += 4 * lowrank.bases_numbers(factor, k, config.sides)
                    state_bytes += adam.nbytes(lowrank.compact_shape(factor, k, config.sides))
                count += math.prod(shape)
                flops += (8 * r + 12) * math.prod(shape) + 8 * k * r * sum(shape)
        other, knobs = lowrank.other(config)
        rest = other.cost(knobs, {n: s for n, s in shapes.items() if not lowrank.is_projected(n, len(s))})
        return Cost(
            peak_bytes=state_bytes + rest.peak_bytes, flops=flops + rest.flops, parameters=count + rest.parameters
        )


def _own(buffers: Mapping[str, Tensor], what: str) -> dict[str, Tensor]:
    """The bases and moments of `what`, without its prefix."""
    return {field.partition(".")[2]: value for field, value in buffers.items() if field.startswith(f"{what}.")}


def _length(v_OI: Tensor) -> Tensor:
    return v_OI.norm(dim=1, keepdim=True).clamp_min(TINY)


def _ranks(config: Config, name: str, shape: tuple[int, ...]) -> tuple[int, int]:
    """(rank of the factors, rank of their gradients' projection)."""
    r = lowrank.rank_of("gradnormlorp", config.rank, name, shape)
    factors = f"the factors of {name}"
    return r, lowrank.rank_of("gradnormlorp", config.projection, factors, (r, r), "projection")


def _adam(config: Config, bits: int) -> Adam:
    return Adam(beta1=config.beta1, beta2=config.beta2, eps=config.eps, bits=bits, block=config.block)
