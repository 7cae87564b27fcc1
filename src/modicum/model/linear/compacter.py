"""compacter: a bottleneck after the layer whose two matrices are sums of Kronecker products.

The layer's output passes through a small network with a skip connection. Its matrices have the structure
W = sum_i A_i (x) (s_i t_i^T): n slow matrices A_i, n x n, are one set for all adapters of the model, down and up, and
each adapter has only the fast rank-one factors of its own. The model's layer norms train along.

    y = h + U(gelu(D(h))),   h = base(x),   D: R^O -> R^d,  U: R^d -> R^O
    D(h) = h sum_{i<n} A_i (x) (s_i t_i^T) + b,   A_i in R^{n x n}, s_i in R^{O/n}, t_i in R^{d/n}

An adapter has 2 (O + d) weights and O + d biases, beside n^3 for all of them. It goes where the paper puts it when
no layers are named: after the last matrix of attention and of the feed-forward block (compacter++: of the latter only).
It is no linear map of x, so it cannot be merged, and detaching it leaves the norms as they were trained.

Karimi Mahabadi et al. 2021, arXiv:2106.04647, section 3; slow and fast weights in section 3.2. The Kronecker products
are never formed: a product with W costs O(n (O + d)) per row instead of O(O d).
Departs from the paper: the matrices start as in the authors' code (A from N(0, 0.0001^2), s and t from the Glorot
uniform distribution with gain sqrt(2), biases at zero), so that the adapter starts as a no-op up to about 1e-8.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from modicum.core.errors import UserError
from modicum.model.linear import LinearForm, LinearShape
from modicum.model.linear._adapter import Adapter

CLAIM = {
    "figure": "on par with full fine-tuning training 0.073% of the parameters",
    "where": "Table 1, GLUE",
    "scale": "T5-base 222M",
}
SWEEP = {"bottleneck": (48,)}
# The last matrices of the two sublayers, as this project and Hugging Face's models call them.
ATTENTION: tuple[str, ...] = (
    "*attention.o",
    "*o_proj",
    "*attn*.c_proj",
    "*attention.output.dense",
    "*attn*.out_proj",
    "*attention.dense",
    "*Attention.o",
)
FEED_FORWARD: tuple[str, ...] = (
    "*mlp.down",
    "*down_proj",
    "*mlp.c_proj",
    "*[0-9].output.dense",
    "*fc2",
    "*dense_4h_to_h",
    "*DenseReluDense.wo",
)


@dataclass(frozen=True, kw_only=True)
class Config:
    n: Annotated[int, Field(ge=1)] = 4  # Kronecker products in a sum; divides bottleneck and features
    bottleneck: Annotated[int, Field(ge=1)] = 24  # d
    rank: Annotated[int, Field(ge=1)] = 1  # of the fast factors
    slow_std: Annotated[float, Field(gt=0)] = 1e-4  # the slow matrices start from N(0, slow_std^2)
    norms: bool = True  # the model's layer norms train, too

    def __post_init__(self) -> None:
        if self.bottleneck % self.n:
            raise ValueError(f"n={self.n} must divide bottleneck={self.bottleneck}")


class Compacter(Adapter):
    provides = frozenset({"adapter", "fit", "trainable"})
    target_modules = ATTENTION + FEED_FORWARD
    config: Config

    def __init__(self, config: Config, shape: LinearShape, base: LinearForm):
        n, width, d, rank = config.n, shape.out_features, config.bottleneck, config.rank
        if width % n:
            near = [str(k) for k in range(1, d + 1) if width % k == 0 and d % k == 0]
            raise UserError(
                f"compacter: n={n} does not divide the {width} outputs of the layer; give one of n="
                f"{', '.join(near)}, or attach it elsewhere"
            )
        if rank > min(width, d) // n:
            raise UserError(
                f"compacter: rank={rank} is larger than the fast matrices {width // n} x {d // n}; give "
                f"rank <= {min(width, d) // n}"
            )
        super().__init__(config, shape, base)
        self.slow = nn.Parameter(self._empty(n, n, n))
        self.down_s = nn.Parameter(self._empty(n, width // n, rank))
        self.down_t = nn.Parameter(self._empty(n, rank, d // n))
        self.down_b = nn.Parameter(self._empty(d))
        self.up_s = nn.Parameter(self._empty(n, d // n, rank))
        self.up_t = nn.Parameter(self._empty(n, rank, width // n))
        self.up_b = nn.Parameter(self._empty(width))
        # Modules outside the form, so in a list, where they are not taken for its own.
        self._norms: list[nn.Module] = []
        self._lends, self._joined = True, False  # lists the slow matrices as trainable; shares them already

    def take(self, weight_OI: Tensor, calibration_NI: Tensor | None, generator: torch.Generator | None) -> None:
        nn.init.normal_(self.slow, std=self.config.slow_std, generator=generator)
        for factors in (self.down_s, self.down_t, self.up_s, self.up_t):
            for one in factors:
                nn.init.xavier_uniform_(one, gain=math.sqrt(2), generator=generator)
        nn.init.zeros_(self.down_b)
        nn.init.zeros_(self.up_b)

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        h = kronecker(y.to(self.slow.dtype), self.slow, self.down_s, self.down_t) + self.down_b
        h = F.gelu(h, approximate="tanh")
        return y + (kronecker(h, self.slow, self.up_s, self.up_t) + self.up_b).to(y.dtype)

    def trainable(self) -> list[nn.Parameter]:
        own = [self.down_s, self.down_t, self.down_b, self.up_s, self.up_t, self.up_b]
        norms = [p for norm in self._norms for p in norm.parameters(recurse=False)]
        return ([self.slow] if self._lends else []) + own + norms

    @classmethod
    def after_attach(cls, model: nn.Module, forms: dict[str, LinearForm]) -> None:
        """One set of slow matrices for all forms of one n; the first form of all lists the norms."""
        adapters = [form for form in forms.values() if isinstance(form, Compacter)]
        shared: dict[int, Compacter] = {}
        for form in sorted(adapters, key=lambda form: not form._joined):  # what has been learnt already stays
            lender = shared.setdefault(form.config.n, form)
            form.slow, form._lends, form._joined, form._norms = lender.slow, form is lender, True, []
        keeper = next((form for form in adapters if form.config.norms), None)
        if keeper is not None:
            keeper._norms = layer_norms(model)


def kronecker(x: Tensor, slow: Tensor, s: Tensor, t: Tensor) -> Tensor:
    """x (..., k) times sum_i slow_i (x) (s_i t_i), (..., d); slow (n, n, n), s (n, k/n, r), t (n, r, d/n)."""
    n, rank = len(slow), s.shape[-1]
    z = x.unflatten(-1, (n, -1)) @ s.transpose(0, 1).flatten(1)  # (..., n, n r)
    z = torch.einsum("...air,iac->...cir", z.unflatten(-1, (n, rank)), slow)
    return (z.flatten(-2) @ t.flatten(0, 1)).flatten(-2)


def layer_norms(model: nn.Module) -> list[nn.Module]:
    """Every layer norm and RMS norm of `model` that has weights, whoever wrote its class."""
    return [
        module
        for module in model.modules()
        if type(module).__name__.lower().endswith(("layernorm", "rmsnorm"))
        and any(True for _ in module.parameters(recurse=False))
    ]
