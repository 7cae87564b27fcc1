"""matryoshkakv: each head's keys and values in an orthogonal basis, of which the first coordinates are cached.

    code = ((x - mu) P)[:r],   x' = mu + code P[:, :r]^T       P (E, E) orthogonal, of each layer and KV head, for keys
                                                               *after* their rotary embedding and for values

Fitted on text: mu the mean, P the principal axes. With `steps`, P is trained, the model frozen, so that any prefix of
coordinates is a good one. At every step each layer and head draws its r from E/8, 2E/8 ... E, for keys and for values,
and

    P = P0 (I - A/2)^-1 (I + A/2),   A = X - X^T        (Cayley: orthogonal for every X)
    loss = 0.25 KL(model || model with x') + 0.75 next-token loss of the model with x'

`kept` is the fraction of all coordinates that are cached. Where ranks are searched, each head of each layer gets its
own: starting from all, the step of E/8 coordinates goes whose loss to second order, sum over tokens of
(dL/dx . (x - x'))^2 / 2, is least. An entry is coded when it is written, so drafts and the prefix cache go on as ever.

Lin et al. 2024, arXiv:2410.14731, sections 3.2 to 3.4. Departs: one basis for each KV head, where the authors' code
repeats KV heads for the query heads of a group; the start P0 multiplies the Cayley transform, so that it is exact for
any basis; the search goes by the second-order loss, theirs by the drift of the outputs; keys are decoded before scores
are taken, so bytes are saved and no products.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from modicum.model.attend import DenseAttend
from modicum.model.config import DecoderConfig
from modicum.model.decoder import Decoder
from modicum.serve.cacheforms._fitted import FittedForm, Seen, batches, check_shape, principal

LEVELS = 8  # ranks that a head may have: multiples of E / 8
DISTIL = 0.25


@dataclass(frozen=True, kw_only=True)
class Config:
    fit: str = ""  # file that `modicum fit` wrote
    kept: Annotated[float, Field(gt=0, le=1)] = 0.5  # coordinates that are cached, as a fraction
    ranks: Literal["searched", "uniform"] = "searched"
    steps: Annotated[int, Field(ge=0)] = 0  # when fitted: updates of one batch each; 0: principal axes
    lr: Annotated[float, Field(gt=0)] = 1e-3


TOY = Config(kept=0.94)
CLAIM = {
    "figure": "over 90% of performance with 60% of the cache gone, on average",
    "where": "abstract",
    "scale": "LLaMA2-7B, Mistral-7B",
}
SWEEP = ("kept=0.75", "kept=0.5")


class MatryoshkaKv(FittedForm):
    config: Config

    @classmethod
    def fit(cls, config: Config, model: Decoder, tokens_NT: Tensor) -> dict[str, Tensor]:
        check_shape("matryoshkakv", model.config)
        frozen = [(p, p.requires_grad) for p in model.parameters()]
        try:
            for p, _ in frozen:
                p.requires_grad_(False)
            fit = _axes(model, tokens_NT)
            if config.steps:
                fit |= train(model, tokens_NT, fit, config.steps, config.lr)
            return fit | {"lost_2LGR": lost(model, tokens_NT, fit)}
        finally:
            for p, needed in frozen:
                p.requires_grad_(needed)

    def load(self, fit: dict[str, Tensor], shape: DecoderConfig) -> None:
        lost_2LGR = fit["lost_2LGR"]
        if self.config.ranks == "uniform":
            E = shape.head_dim
            ranks_2LG = torch.full(lost_2LGR.shape[:3], max(1, round(self.config.kept * E)))
        else:
            ranks_2LG = search(lost_2LGR, self.config.kept) * shape.head_dim // LEVELS
        self.ranks = {which: ranks_2LG[i].tolist() for i, which in enumerate("kv")}
        self.means = {which: fit[f"{which}_mean_LGE"].float() for which in "kv"}
        self.bases = {which: fit[f"{which}_LGEE"].float() for which in "kv"}

    def encode_layer(self, which: str, layer: int, x_GNPE: Tensor, at_NP: Tensor) -> tuple[Tensor, ...]:
        mean_GE, basis_GEE = (x[which][layer].to(x_GNPE.device) for x in (self.means, self.bases))
        code_GNPE = torch.einsum("gnpe,gef->gnpf", x_GNPE.float() - mean_GE[:, None, None], basis_GEE)
        parts = [code_NPE[..., :r] for code_NPE, r in zip(code_GNPE, self.ranks[which][layer], strict=True)]
        return (torch.cat(parts, -1).to(self.dtype),)

    def decode_layer(self, which: str, layer: int, codes: tuple[Tensor, ...], at_NP: Tensor) -> Tensor:
        mean_GE, basis_GEE = (x[which][layer].to(codes[0].device) for x in (self.means, self.bases))
        ranks = self.ranks[which][layer]
        parts = codes[0].float().split(ranks, -1)
        heads = [c @ p[:, :r].T + m for c, p, r, m in zip(parts, basis_GEE, ranks, mean_GE, strict=True)]
        return torch.stack(heads).to(self.dtype)


def search(lost_2LGR: Tensor, kept: float) -> Tensor:
    """Levels (2, L, G), 1 .. R, of which the sum is at most `kept` of all; greedy, from all of them down.

    lost_2LGR: loss at the levels 1 .. R of each head, keys then values.
    """
    R = lost_2LGR.shape[-1]
    flat = lost_2LGR.flatten(0, 2).tolist()
    level = [R] * len(flat)
    heap = [(row[R - 2] - row[R - 1], i) for i, row in enumerate(flat)] if R > 1 else []
    heapq.heapify(heap)
    spare = R * len(flat) - max(len(flat), int(kept * R * len(flat)))
    while spare > 0 and heap:
        _, i = heapq.heappop(heap)
        level[i] -= 1
        spare -= 1
        if level[i] > 1:
            heapq.heappush(heap, (flat[i][level[i] - 2] - flat[i][level[i] - 1], i))
    return torch.tensor(level).view(lost_2LGR.shape[:3])


def cayley(X_EE: Tensor) -> Tensor:
    """(I - A/2)^-1 (I + A/2) with A = X - X^T: orthogonal, and I at X = 0."""
    half_EE = (X_EE - X_EE.mT) / 2
    eye_EE = torch.eye(X_EE.shape[-1], dtype=X_EE.dtype, device=X_EE.device).expand_as(X_EE)
    return torch.linalg.solve(eye_EE - half_EE, eye_EE + half_EE)


class Truncated:
    """An `attend` whose keys and values are those of truncated codes. kept_GE: ones for the coordinates that stay."""

    def __init__(self, means: Any, bases: Any, kept: Any):
        self.means, self.bases, self.kept, self.attend = means, bases, kept, DenseAttend()

    def __call__(self, layer: int, q_BHTE: Tensor, k_BGTE: Tensor, v_BGTE: Tensor, **how: Any) -> Tensor:
        k, v = (self._cut(which, layer, x) for which, x in (("k", k_BGTE), ("v", v_BGTE)))
        return self.attend(layer, q_BHTE, k, v, **how)

    def _cut(self, which: str, layer: int, x_BGTE: Tensor) -> Tensor:
        mean_G1E, basis_GEE = self.means[which][layer][:, None], self.bases[which][layer]
        code_BGTE = (x_BGTE.float() - mean_G1E) @ basis_GEE * self.kept[which][layer][:, None]
        return (code_BGTE @ basis_GEE.mT + mean_G1E).to(x_BGTE.dtype)


@torch.no_grad()
def _axes(model: Decoder, tokens_NT: Tensor) -> dict[str, Tensor]:
    """Mean and principal axes of each head's rotated keys and values."""
    shape = model.config
    L, G, E = shape.layers, shape.kv_heads, shape.head_dim
    sums = {which: torch.zeros(L, G, E, dtype=torch.float64) for which in "kv"}
    moments = {which: torch.zeros(L, G, E, E, dtype=torch.float64) for which in "kv"}

    def add(layer: int, q_BHTE: Tensor, k_BGTE: Tensor, v_BGTE: Tensor) -> None:
        for which, x_BGTE in (("k", k_BGTE), ("v", v_BGTE)):
            x_GRE = x_BGTE.transpose(0, 1).flatten(1, 2).double()
            sums[which][layer] += x_GRE.sum(1).cpu()
            moments[which][layer] += (x_GRE.mT @ x_GRE).cpu()

    for tokens_BT in batches(tokens_NT):
        model.hidden(tokens_BT.to(model.device), attend=Seen(add))
    fit: dict[str, Tensor] = {}
    for which in "kv":
        mean_LGE = sums[which] / tokens_NT.numel()
        covariance = moments[which] / tokens_NT.numel() - mean_LGE[..., :, None] * mean_LGE[..., None, :]
        fit |= {f"{which}_mean_LGE": mean_LGE.float(), f"{which}_LGEE": principal(covariance).float()}
    return fit


def draw(ranks: torch.Generator, L: int, G: int, E: int) -> dict[str, Tensor]:
    """kept_LGE for keys and values: a rank for each layer and head, from the multiples of E / 8."""
    levels_2LG = torch.randint(1, LEVELS + 1, (2, L, G), generator=ranks)
    kept_2LGE = (torch.arange(E) < levels_2LG[..., None] * E // LEVELS).float()
    return {"k": kept_2LGE[0], "v": kept_2LGE[1]}


def train(model: Decoder, tokens_NT: Tensor, fit: dict[str, Tensor], steps: int, lr: float) -> dict[str, Tensor]:
    """Bases (L, G, E, E) after `steps` updates, from those of `fit`."""
    means = {which: fit[f"{which}_mean_LGE"] for which in "kv"}
    start = {which: fit[f"{which}_LGEE"] for which in "kv"}
    free = {which: torch.zeros_like(start[which], requires_grad=True) for which in "kv"}
    L, G, E, _ = start["k"].shape
    optimizer = torch.optim.Adam(free.values(), lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    random, every = torch.Generator().manual_seed(0), list(batches(tokens_NT))
    for step in range(steps):
        tokens_BT = every[step % len(every)]
        with torch.no_grad():
            teacher_BTV = model(tokens_BT).float().log_softmax(-1)
        with torch.enable_grad():
            bases = {which: start[which] @ cayley(free[which]) for which in "kv"}
            loss = _loss(model, tokens_BT, teacher_BTV, Truncated(means, bases, draw(random, L, G, E)))
            optimizer.zero_grad()
            loss.backward()
        torch.nn.utils.clip_grad_norm_(list(free.values()), 1.0)
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        return {f"{which}_LGEE": start[which] @ cayley(free[which]) for which in "kv"}


def _loss(model: Decoder, tokens_BT: Tensor, teacher_BTV: Tensor, attend: Any) -> Tensor:
    student_BTV = model(tokens_BT, attend=attend).float().log_softmax(-1)
    divergence = (teacher_BTV.exp() * (teacher_BTV - student_BTV)).sum(-1).mean()
    next_token = F.nll_loss(student_BTV[:, :-1].flatten(0, 1), tokens_BT[:, 1:].flatten())
    return DISTIL * divergence + (1 - DISTIL) * next_token


def lost(model: Decoder, tokens_NT: Tensor, fit: dict[str, Tensor]) -> Tensor:
    """lost_2LGR: what each head loses at the levels 1 .. R, summed over tokens, to second order."""
    shape, total = model.config, None
    for tokens_BT in batches(tokens_NT):
        seen: dict[tuple[str, int], Tensor] = {}
        attend = DenseAttend()

        def watched(
            layer: int, q: Tensor, k: Tensor, v: Tensor, seen: Any = seen, attend: Any = attend, **how: Any
        ) -> Any:
            if layer == 0:  # no weight has a gradient: it begins here
                k, v = k.detach().requires_grad_(), v.detach().requires_grad_()
            k.retain_grad()
            v.retain_grad()
            seen["k", layer], seen["v", layer] = k, v
            return attend(layer, q, k, v, **how)

        with torch.enable_grad():
            logits_BTV = model(tokens_BT, attend=watched).float()
            F.cross_entropy(logits_BTV[:, :-1].flatten(0, 1), tokens_BT[:, 1:].flatten(), reduction="sum").backward()
        rows = []
        for which in "kv":
            for layer in range(shape.layers):
                x = seen[which, layer]
                assert x.grad is not None
                basis_GEE = fit[f"{which}_LGEE"][layer]
                code_BGTE = (x.detach().float() - fit[f"{which}_mean_LGE"][layer][:, None]) @ basis_GEE
                slope_BGTE = x.grad.float() @ basis_GEE
                # dL/dx . (x - x') at rank r: the sum over the coordinates from r on.
                tail_BGTR = (code_BGTE * slope_BGTE).unflatten(-1, (LEVELS, -1)).sum(-1).flip(-1).cumsum(-1).flip(-1)
                beyond_BGTR = F.pad(tail_BGTR[..., 1:], (0, 1))
                rows.append(beyond_BGTR.square().sum((0, 2)).double() / 2)
        one = torch.stack(rows).unflatten(0, (2, shape.layers))
        total = one if total is None else total + one
    assert total is not None
    return total.float()
