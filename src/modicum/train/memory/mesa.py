"""mesa: keeps activations for the backward pass in 8 bits; the forward pass stays exact.

Whatever autograd would keep of a layer's activations (inputs of linear layers and norms, of the activation
and its products, queries, keys and values of the attention) is kept as bytes and taken back as numbers when its
gradient is due. Each layer has a range and an offset for each group of channels, and for each head in the
attention, because heads differ widely; both are running estimates, so that an odd batch moves them little.

    a <- d a + (1 - d) (max X - min X),   b <- d b + (1 - d) min X           per group, d = decay
    Q = clip(floor((X - b) 255 / a + u), 0, 255),  u uniform in [0, 1)       X' = Q a / 255 + b

Pan et al. 2021, arXiv:2111.11124, section 3. Departs from the paper: attention here never keeps its softmax, so
no 8-bit one is kept either: it is made again from 8-bit queries and keys. A tensor that several layers read
(a norm's output by q, k and v) is kept once, by the first of them. The upper clip, which the authors' kernel
lacks, is there, as in the paper. Over several processes the estimates are averaged after each step. The head,
which belongs to the loss, is left alone.
Shapes: B sequences, T tokens, H heads, E head_dim, C channels, G groups.
"""

from __future__ import annotations

import contextlib
import math
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from modicum.core.errors import UserError
from modicum.model.layers import MLP, RMSNorm
from modicum.model.linear import LinearForm
from modicum.model.mixers import Mixer
from modicum.train import parallel
from modicum.train.memory import MemorySaver

CLAIM = {
    "figure": "half of the training memory (8,459 to 3,840 MB) at the same accuracy (79.8 and 80.0%)",
    "where": "Table 1",
    "scale": "DeiT-S on ImageNet, batch 128, against mixed precision",
}
LEVELS = 255
PIECE = 1 << 18  # elements that are turned into bytes at a time, to keep what that needs small
ACTIVATIONS = (nn.ReLU, nn.GELU, nn.SiLU)
NORMS = (nn.LayerNorm, RMSNorm, nn.RMSNorm)
LINEARS = (nn.Linear, LinearForm)


@dataclass(frozen=True, kw_only=True)
class Config:
    decay: float = 0.9  # of the running estimates; 0 follows each batch
    groups: int = 0  # groups of channels outside the attention; 0: as many as there are heads
    stochastic: bool = True  # round up with the probability that keeps the mean; false: to the nearest

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay={self.decay} must be at least 0 (the batch alone) and below 1")
        if self.groups < 0:
            raise ValueError(f"groups={self.groups} must be positive, or 0 for as many as there are heads")


class Mesa(MemorySaver):
    provides = frozenset({"activation_memory"})
    conflicts = frozenset({"activation_memory", "compile"})
    gradient_error = 0.1
    config: Config

    def __init__(self, config: Config):
        super().__init__(config)
        self.estimates: dict[str, Tensor] = {}  # (2, G): range and offset, float32, by place
        self._kept: dict[int, tuple[weakref.ref[Any], tuple[Any, ...], weakref.ref[Packed]]] = {}
        self._generator: torch.Generator | None = None
        self._step = -1

    def prepare(self, model: nn.Module, state: dict[str, Any] | None) -> nn.Module:
        if not watched(model):
            raise UserError(
                f"memory 'mesa' cannot be combined with {type(model).__name__}: it has no repeated layers with linear "
                "layers, norms or activations; leave mesa out"
            )
        return model

    @contextlib.contextmanager
    def around(self, trainer: Any) -> Iterator[None]:
        if self._step != trainer.steps_done or self._generator is None:  # a step draws the same when repeated
            seed = np.random.SeedSequence((trainer.config.seed, trainer.steps_done, trainer.ranks.rank, 8))
            self._generator = torch.Generator(trainer.device)
            self._generator.manual_seed(int(seed.generate_state(1, np.uint64)[0] >> np.uint64(1)))
            self._step = trainer.steps_done
        with self.keeping(trainer.model):
            yield

    @contextlib.contextmanager
    def keeping(self, model: nn.Module) -> Iterator[None]:
        """Within the context, forward passes of `model`'s layers keep bytes."""
        heads = getattr(getattr(model, "config", None), "heads", 0)
        groups = self.config.groups or heads or 1
        changed: list[nn.Module] = []
        try:
            for name, module in watched(model).items():
                if "forward" not in vars(module):
                    # Not a hook: only a frame of our own is left in order when the forward pass raises.
                    vars(module)["forward"] = (
                        self._attention(name, module)
                        if isinstance(module, Mixer)
                        else self._layer(name, module, groups)
                    )
                    changed.append(module)
            yield
        finally:
            for module in changed:
                del vars(module)["forward"]
            self._kept.clear()

    def _layer(self, name: str, module: nn.Module, groups: int) -> Callable[..., Any]:
        forward = module.forward
        narrow = isinstance(module, LINEARS)

        def keep_bytes(x: Tensor, *rest: Any, **more: Any) -> Any:
            mine = {p.untyped_storage()._cdata for p in module.parameters()}
            # Autograd holds the hooks as long as what they packed, so that they may not hold the input itself.
            own, leading = x.untyped_storage()._cdata, x.shape[:-1]

            def chosen(t: Tensor) -> bool:
                """Activations alone. What a form keeps besides its input may be a weight, and stays exact."""
                storage = t.untyped_storage()._cdata
                return storage not in mine and (storage == own or (not narrow and t.shape[:-1] == leading))

            with self._hooks(name, chosen, lambda t: by_head(t) if t.ndim == 4 else by_channel(t, groups)):
                return forward(x, *rest, **more)

        return keep_bytes

    def _attention(self, name: str, module: nn.Module) -> Callable[..., Any]:
        forward = module.forward

        def with_bytes(x_BTD: Tensor, rotation: Any, attend: Any) -> Tensor:
            def attend_keeping(layer: int, *qkv: Tensor, **more: Any) -> Tensor:
                qkv = tuple(t.contiguous() for t in qkv)  # so that what is kept is these, and kept once
                own = {t.untyped_storage()._cdata for t in qkv}
                shape = qkv[0].shape
                square = shape[-2] == shape[-1]  # a mask may then look like queries

                def chosen(t: Tensor) -> bool:
                    return t.untyped_storage()._cdata in own or (t.shape == shape and not square)

                with self._hooks(name, chosen, by_head):
                    return attend(layer, *qkv, **more)

            return forward(x_BTD, rotation, attend_keeping)

        return with_bytes

    def _hooks(self, name: str, chosen: Callable[[Tensor], bool], grouped: Callable[[Tensor], Grouped]) -> Any:
        count = 0

        def pack(t: Tensor) -> Any:
            nonlocal count
            if not t.is_floating_point() or t.ndim < 2 or t.shape[-1] < 2 or not t.numel() or not chosen(t):
                return t
            known = self._known(t)
            if known is None:
                known = self._pack(f"{name}.{count}", t, grouped(t))
                storage = t.untyped_storage()
                self._kept[storage._cdata] = (weakref.ref(storage), _view(t), weakref.ref(known))
            count += 1
            return known

        return saved_tensors_hooks(pack, lambda kept: kept.numbers() if isinstance(kept, Packed) else kept)

    def _known(self, t: Tensor) -> Packed | None:
        """What is kept of the same values already."""
        storage, view, packed = self._kept.get(t.untyped_storage()._cdata, (lambda: None, (), lambda: None))
        if storage() is None or view[1:] != _view(t)[1:] or math.prod(view[0]) != t.numel():
            return None
        known = packed()
        return known if known is None or known.shape == t.shape else known.reshaped(t.shape)

    @torch.no_grad()
    def _pack(self, name: str, t: Tensor, grouped: Grouped) -> Packed:
        view, rows, rest, shape = grouped
        low, high = (
            view.amin(rows, keepdim=True).amin(rest).float(),
            view.amax(rows, keepdim=True).amax(rest).float(),
        )
        seen = torch.stack([high - low, low])
        before = self.estimates.get(name)
        if before is not None and before.shape == seen.shape:
            before = before.to(seen.device)
            seen = torch.lerp(seen, before, self.config.decay)
            self.estimates[name] = torch.where(seen.isfinite(), seen, before)  # a step that overflowed is forgotten
        else:
            self.estimates[name] = seen.nan_to_num(0.0, 0.0, 0.0)
        return Packed(view, t, seen.view(2, *shape), self._generator if self.config.stochastic else None)

    def after_step(self, trainer: Any) -> None:
        """Every process goes on with the same estimates, so that a checkpoint is that of all of them."""
        if trainer.ranks.world > 1 and self.estimates:
            flat = torch.cat([e.flatten() for e in self.estimates.values()])
            flat = trainer.ranks.sum(flat) / trainer.ranks.world
            parts = flat.split([e.numel() for e in self.estimates.values()])
            shaped = zip(self.estimates.items(), parts, strict=True)
            self.estimates = {name: part.view_as(e).clone() for (name, e), part in shaped}

    def state_dict(self) -> dict[str, Any]:
        return dict(self.estimates)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.estimates = {name: value.to(torch.float32, copy=True) for name, value in state.items()}


# A view; its dim of rows and the other dims of a group (reducing rows first is ten times faster); the estimates' shape.
Grouped = tuple[Tensor, int, tuple[int, ...], tuple[int, ...]]


def by_channel(t: Tensor, groups: int) -> Grouped:
    """Groups of neighbouring channels: the largest number that divides them and is no more than `groups`."""
    groups = max(g for g in range(1, min(groups, t.shape[-1]) + 1) if t.shape[-1] % g == 0)
    view = t.reshape(-1, groups, t.shape[-1] // groups)
    return view, 0, (0, 2), (1, groups, 1)


def by_head(t_BHTE: Tensor) -> Grouped:
    return t_BHTE, 2, (0, 2, 3), (1, t_BHTE.shape[1], 1, 1)


class Packed:
    """A tensor as bytes. `scale`: (2, ...) range and offset, which broadcast to `view`."""

    def __init__(self, view: Tensor, like: Tensor, scale: Tensor, generator: torch.Generator | None):
        self.shape, self.dtype, self.scale = like.shape, like.dtype, scale
        self.bytes = torch.empty(view.shape, dtype=torch.uint8, device=view.device)
        spread, offset = scale.unbind()
        factor = LEVELS / spread.clamp_min(1e-30)  # a constant group is its offset
        rows = max(1, PIECE * len(view) // view.numel())
        for part in range(0, len(view), rows):
            values = (view[part : part + rows] - offset).mul_(factor)  # float32, as the offset is
            values += 0.5 if generator is None else _uniform(values, generator)
            self.bytes[part : part + rows] = values.clamp_(0, LEVELS).to(torch.uint8)

    def numbers(self) -> Tensor:
        spread, offset = self.scale.unbind()
        out = torch.empty(self.bytes.shape, dtype=self.dtype, device=self.bytes.device)
        rows = max(1, PIECE * len(out) // out.numel())
        for part in range(0, len(out), rows):
            out[part : part + rows] = self.bytes[part : part + rows].float().mul_(spread / LEVELS).add_(offset)
        return out.view(self.shape)

    def reshaped(self, shape: torch.Size) -> Packed:
        """The same bytes under another shape of as many elements."""
        other = object.__new__(Packed)
        other.shape, other.dtype, other.scale, other.bytes = shape, self.dtype, self.scale, self.bytes
        return other


def _uniform(like: Tensor, generator: torch.Generator) -> Tensor:
    """Numbers in (0, 1) in 256 steps: four from each word drawn, because drawing is the slow part."""
    words = torch.empty(-(-like.numel() // 4), dtype=torch.int32, device=like.device)
    words.random_(-(2**31), 2**31, generator=generator)
    return words.view(torch.uint8)[: like.numel()].view(like.shape).to(like.dtype).add_(0.5).mul_(1 / 256)


def _view(t: Tensor) -> tuple[Any, ...]:
    """What of a tensor besides its storage says which values it shows, and whether they have changed."""
    return tuple(t.shape), t.storage_offset(), t.is_contiguous() or t.stride(), t._version


def watched(model: nn.Module) -> dict[str, nn.Module]:
    """By name, what keeps activations: in the repeated layers all kinds, elsewhere norms."""
    inside = {id(m) for block in parallel.blocks(model) for m in block.modules()}
    kinds = (*LINEARS, *ACTIVATIONS, *NORMS, MLP, Mixer)
    modules: dict[str, nn.Module] = {}
    forms: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if isinstance(module, kinds) and (id(module) in inside or isinstance(module, NORMS)):
            if not name.startswith(forms):  # a form is one layer, whatever it is made of
                modules[name] = module
            if isinstance(module, LinearForm):
                forms = (*forms, f"{name}.")
    return modules
