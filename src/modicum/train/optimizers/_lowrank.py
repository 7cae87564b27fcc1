"""Projecting a gradient on the directions of its largest singular values: what low-rank optimizers share.

    left_AK, right_KB = first k singular vectors of g_AB          on one side, by shape, or on both
    compact = left^T g right^T                                    back(x) = left x right

Shapes: A, B any matrix, K the rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from modicum.core.errors import ModicumError, UserError
from modicum.train.optimizers import Optimizer, adamw, adamw_8bit, is_embedding, is_head


def check_rank(rank: int | float, knob: str = "rank") -> None:
    """A whole number from 1, or a share in (0, 1] written with a point. Raises `ValueError`."""
    if isinstance(rank, int) and rank >= 1:
        return
    if isinstance(rank, int) or not 0 < rank <= 1:
        raise ValueError(
            f"{knob}={rank} must be a whole number of at least 1, or a share of the smaller side in (0, 1]"
        )


def rank_of(method: str, rank: int | float, name: str, shape: tuple[int, ...], knob: str = "rank") -> int:
    """The rank for a matrix of this shape. Raises `UserError` where it is larger than the matrix."""
    side = min(shape)
    if isinstance(rank, float):
        return max(1, round(rank * side))
    if rank > side:
        raise UserError(
            f"{method}: {knob}={rank} is larger than {name} ({shape[0]} x {shape[1]}); "
            f"give {knob}<={side}, or a share of the smaller side such as {knob}=0.25"
        )
    return rank


def is_projected(name: str, ndim: int) -> bool:
    """Matrices of the layers; the papers project neither embedding table nor head."""
    return ndim == 2 and not is_embedding(name) and not is_head(name)


def bases(method: str, name: str, g_AB: Tensor, k: int, sides: str = "one") -> dict[str, Tensor]:
    """The first `k` singular vectors of `g_AB`, float32: `left` (A, k), `right` (k, B), or both.

    sides: "both", or "one", which is `right` for A >= B and else `left`. Raises `ModicumError` for a gradient
    that is not finite.
    """
    try:
        u, _, vh = torch.linalg.svd(g_AB.float(), full_matrices=False)
    except torch.linalg.LinAlgError:
        raise ModicumError(
            f"{method}: the gradient of {name} has no singular vectors, it holds NaN or infinite values; "
            "lower lr or lengthen the warm-up"
        ) from None
    vectors = {"left": u[:, :k].contiguous(), "right": vh[:k].contiguous()}
    return vectors if sides == "both" else {side: vectors[side] for side in one_side(tuple(g_AB.shape))}


def one_side(shape: tuple[int, ...]) -> tuple[str]:
    return ("right",) if shape[0] >= shape[1] else ("left",)


def project(g_AB: Tensor, projections: Mapping[str, Tensor]) -> Tensor:
    """The compact gradient: (k, k), (A, k) or (k, B)."""
    x = projections["left"].T @ g_AB if "left" in projections else g_AB
    return x @ projections["right"].T if "right" in projections else x


def back(x: Tensor, projections: Mapping[str, Tensor]) -> Tensor:
    """What a compact update is in the whole matrix."""
    x = projections["left"] @ x if "left" in projections else x
    return x @ projections["right"] if "right" in projections else x


def compact_shape(shape: tuple[int, ...], k: int, sides: str = "one") -> tuple[int, int]:
    if sides == "both":
        return k, k
    return (shape[0], k) if one_side(shape) == ("right",) else (k, shape[1])


def bases_numbers(shape: tuple[int, ...], k: int, sides: str = "one") -> int:
    """How many numbers the bases hold."""
    return k * (sum(shape) if sides == "both" else min(shape))


def other(config: Any) -> tuple[type[Optimizer], Any]:
    """What trains the parameters that are not projected, by the method's own knobs: method and its knobs."""
    knobs = {name: getattr(config, name) for name in ("beta1", "beta2", "eps", "weight_decay")}
    if config.bits == 8:
        return adamw_8bit.AdamW8bit, adamw_8bit.Config(**knobs, block=config.block)
    return adamw.AdamW, adamw.Config(**knobs)
