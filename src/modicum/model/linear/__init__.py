"""port linear: how one linear layer holds, computes and trains its weight.

A form stands where an `nn.Linear` stood: y_BTO = x_BTI @ W_OI.T + b_O, with W held in the method's own way
(as it is, quantised, as a frozen base plus a low-rank update, ...). `model.attach` puts forms into a module
by pattern, takes them out again and describes them for a model folder; a method knows nothing of that.

Shapes: B batch, T time, I in_features, O out_features, N any number of rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from modicum.budget.cost import Cost
from modicum.core import registry
from modicum.core.choice import Choice
from modicum.core.errors import UserError
from modicum.core.registry import Method

BASELINE = "dense"
Gradient = Callable[[nn.Parameter], Tensor | None]  # the summed gradient of one of a form's parameters


@dataclass(frozen=True, kw_only=True)
class LinearShape:
    """What a form is made from: the layer it replaces, without its values."""

    in_features: int
    out_features: int
    bias: bool = False
    dtype: torch.dtype = torch.float32
    device: torch.device | str = "cpu"

    @classmethod
    def of(cls, weight_OI: Tensor, bias_O: Tensor | None, device: str | None = None) -> LinearShape:
        return cls(
            in_features=weight_OI.shape[1],
            out_features=weight_OI.shape[0],
            bias=bias_O is not None,
            dtype=weight_OI.dtype,
            device=device or weight_OI.device,
        )


class LinearForm(Method, nn.Module):
    """Base class of every linear form. Made empty from (config, shape, base), then `fit` or loaded.

    All state lives in parameters and buffers, allocated by `__init__` from `config`, `shape` and `layout`
    alone, so that a stored form can be made again and filled by `load_state_dict`.

    Capabilities (`core.compose`) that a form may provide:
    `fit`           takes over given weights;
    `trainable`     has parameters that training changes;
    `merge`         linear in x, so `dense()` is the whole truth and may replace the form;
    `adapter`       sits on a frozen `base` form, which keeps the fitted weight;
    `adapter_base`  an adapter may sit on it (its forward passes gradients on to x);
    `embedding`     `rows` is cheap, so it may hold a token embedding;
    `elastic`       holds blocks that may be loaded in part (`model.stack.Stack` says what that asks for);
    `factors`       pairs of trained parameters NAME.A and NAME.B with W = B A (+ more).
    Unless a form says otherwise it conflicts with `fsdp`.
    """

    conflicts: ClassVar[frozenset[str]] = frozenset({"fsdp"})

    #: Names of buffers whose dtype is part of the format: `model.to(dtype)` moves them, never rounds them.
    stored: ClassVar[frozenset[str]] = frozenset()
    #: Where the paper puts it, as globs over module names: taken where a user names no layers.
    places: ClassVar[tuple[str, ...]] = ("*",)
    #: Largest ||dense() - W|| / ||W|| (Frobenius) after `fit` on a Gaussian W; 0 is exact, None unbounded.
    fit_error: ClassVar[float | None] = 0.0

    choice: Choice | None = None  # set by `model.attach`: what `describe` records
    transposed: bool = False  # set by `model.attach`: stands where a transformers Conv1D stood
    shape: LinearShape
    base: LinearForm | None
    bias: nn.Parameter | None
    _like: Tensor

    def __init__(self, config: Any, shape: LinearShape, base: LinearForm | None = None):
        super().__init__()
        self.config, self.shape = config, shape
        self.base = base
        own_bias = shape.bias and base is None
        self.bias = nn.Parameter(self._empty(shape.out_features), requires_grad=False) if own_bias else None
        # Follows the module's dtype and device through `.to()`, also where no floating weight is left.
        self.register_buffer("_like", self._empty(0), persistent=False)

    def _empty(self, *sizes: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(*sizes, dtype=dtype or self.shape.dtype, device=self.shape.device)

    # --- what a method must say -------------------------------------------------------------------

    def fit(
        self,
        weight_OI: Tensor,
        bias_O: Tensor | None = None,
        *,
        calibration_NI: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Self:
        """Take over `weight_OI` and `bias_O`; an adapter, whose base holds them already, starts as a no-op.

        calibration_NI: sample inputs, for methods that weigh errors by activations.
        generator: source of any randomness.
        """
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """x_BTI (any leading dimensions) to y_BTO in the dtype of x."""
        raise NotImplementedError

    def dense(self) -> Tensor:
        """The weight_OI that `forward` multiplies with, in the module's dtype; without `merge`, an error."""
        raise NotImplementedError

    def trainable(self) -> list[nn.Parameter]:
        """Parameters that training changes; the rest stays frozen. One that several forms share is in the list of
        one of them."""
        return []

    # --- what a method may say --------------------------------------------------------------------

    def rows(self, index: Tensor) -> Tensor:
        """Rows of `dense()`: index (...) to (..., I)."""
        return self.dense()[index]

    def low_rank(self) -> tuple[Tensor, Tensor, float] | None:
        """(A_RI, B_OR, s) if `dense()` is that of the base plus s B A, so that it can pass for LoRA."""
        return None

    def layout(self) -> dict[str, Any]:
        """JSON facts beyond config, shape and tensors that the form goes on from (a rank that has grown, ...)."""
        return {}

    def set_layout(self, layout: dict[str, Any]) -> None:
        """Take over a stored `layout`, allocating what it asks for, before `load_state_dict`."""
        if layout:
            raise ValueError(f"{type(self).__name__} has no variable layout, got {layout}")

    def settled(self) -> LinearForm:
        """What to keep once training is over: this form, or one on the same base that computes the same with less
        (without ranks that were reserved, ...)."""
        return self

    @classmethod
    def after_attach(cls, model: nn.Module, forms: dict[str, LinearForm]) -> None:
        """Called once with all forms of this class in `model`, by module name, before state is loaded:
        share parameters between them, unfreeze norms, divide a budget."""

    @classmethod
    def before_step(cls, forms: dict[str, LinearForm], gradient: Gradient, step: int, total: int) -> None:
        """Called before every optimizer step (1..total): `gradient(parameter)` gives the step's summed gradient,
        to be read (a sensitivity) or changed in place (a regulariser). Here and in `after_step` the parameters
        hold the values that the optimizer works on: under bf16 training, the float32 masters."""

    @classmethod
    def after_step(cls, forms: dict[str, LinearForm], step: int, total: int) -> None:
        """Called after every optimizer step (1..total): change values or masks, not the set of parameters
        (reserve those in `__init__`), so that optimizers and checkpoints need not know."""

    # --- what holds for all -----------------------------------------------------------------------

    def nbytes(self) -> int:
        """Bytes of the state as stored, base included; a tensor shared within the form counts once."""
        return sum(tensor.nbytes for tensor in unique_tensors(self).values())

    @classmethod
    def cost(cls, config: Any, shape: LinearShape | tuple[int, int], tokens: float = 0) -> Cost:
        """Forecast for one layer, made on the meta device: trained parameters, stored bytes, forward FLOPs.

        shape: a tuple is (out_features, in_features) in bfloat16. Of an adapter, its own bytes and FLOPs.
        """
        if isinstance(shape, tuple):
            shape = LinearShape(out_features=shape[0], in_features=shape[1], dtype=torch.bfloat16)
        shape = dataclasses.replace(shape, device="meta")
        base = registry.build("linear", "dense", shape) if "adapter" in cls.provides else None
        form = cls(config, shape, base)
        trained = sum(p.numel() for p in form.trainable())
        below = 0 if base is None else base.nbytes()
        weights = trained if base is not None else shape.in_features * shape.out_features
        return Cost(tokens=tokens, parameters=trained, disk_bytes=form.nbytes() - below, flops=2.0 * tokens * weights)

    @property
    def dtype(self) -> torch.dtype:
        return self._like.dtype

    @property
    def in_features(self) -> int:
        return self.shape.in_features

    @property
    def out_features(self) -> int:
        return self.shape.out_features

    def bias_value(self) -> Tensor | None:
        """The bias, wherever in the stack of bases it lies."""
        return self.base.bias_value() if self.base is not None else self.bias

    def _set_bias(self, bias_O: Tensor | None) -> None:
        if self.bias is not None:
            with torch.no_grad():
                self.bias.copy_(bias_O if bias_O is not None else torch.zeros_like(self.bias))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        kept = {name: self._buffers[name] for name in self.stored}
        super()._apply(fn, recurse)
        for name, before in kept.items():
            after = self._buffers[name]
            if before is not None and after is not None and after.dtype != before.dtype:
                self._buffers[name] = before.to(after.device)
        return self

    def extra_repr(self) -> str:
        return f"{self.choice or type(self).__name__}, in={self.in_features}, out={self.out_features}"


def check_rank(method: str, rank: int, shape: LinearShape) -> None:
    """Raises `UserError` where a low-rank factor would be larger than the matrix."""
    small = min(shape.in_features, shape.out_features)
    if rank > small:
        raise UserError(
            f"{method}: rank={rank} is larger than the matrix {shape.out_features} x "
            f"{shape.in_features}; give rank <= {small}"
        )


def unique_tensors(module: nn.Module, prefix: str = "") -> dict[str, Tensor]:
    """The module's persistent state by name, each tensor once under the first of its names."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in module.state_dict(prefix=prefix, keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            found[name] = tensor.detach()
    return found
