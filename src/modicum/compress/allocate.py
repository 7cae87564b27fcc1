"""Bits for each matrix under a budget of bytes: the least sum of errors, by integer linear programming.

Each unit (a matrix, or matrices that share their setting) takes exactly one of its settings:

    min sum_u,s error_us x_us   where   sum_s x_us = 1,   sum_u,s bytes_us x_us <= budget,   x in {0, 1}

as LQ-LoRA chooses quantisation settings (Guo et al. 2023, arXiv:2311.12023, section 3.2), with `scipy.optimize.milp`
(HiGHS) for Gurobi. What an error is, the caller decides; `compress.sensitivity` estimates the divergence of
the model's predictions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from modicum.budget.units import bytes_text
from modicum.core.errors import UserError

GAP = 1e-4  # relative, between the allocation and the bound of the linear programme


@dataclass(frozen=True)
class Unit:
    """What is stored in one of several settings: names of its matrices, and bytes and error of each setting."""

    names: tuple[str, ...]
    settings: tuple[Any, ...]
    nbytes: tuple[int, ...]
    errors: tuple[float, ...]


def allocate(units: Sequence[Unit], budget: float) -> list[int]:
    """The index of each unit's setting. Raises `UserError` with the least bytes where the budget is below those."""
    from scipy import sparse
    from scipy.optimize import Bounds, LinearConstraint, milp

    least = least_bytes(units)
    if least > budget:
        raise UserError(f"the matrices take {bytes_text(least)} at the fewest bits, and {bytes_text(budget)} is left")
    errors = np.concatenate([np.asarray(u.errors, dtype=float) for u in units])
    nbytes = np.concatenate([np.asarray(u.nbytes, dtype=float) for u in units])
    owner = np.repeat(np.arange(len(units)), [len(u.settings) for u in units])
    one_each = sparse.csr_matrix((np.ones(len(owner)), (owner, np.arange(len(owner)))))
    scale = float(np.abs(errors).max()) or 1.0
    solved = milp(
        errors / scale,
        integrality=np.ones(len(owner)),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(one_each, 1, 1),
            LinearConstraint(sparse.csr_matrix(nbytes / budget), -np.inf, 1),
        ],
        options={"mip_rel_gap": GAP},
    )
    if solved.x is None:
        raise RuntimeError(f"scipy.optimize.milp gave no allocation: {solved.message}")
    chosen = [int(np.argmax(solved.x[owner == u])) for u in range(len(units))]
    return _filled(units, chosen, budget)


def _filled(units: Sequence[Unit], chosen: list[int], budget: float) -> list[int]:
    """Spend what rounding and the gap have left: the setting of more bytes that gains most, while one fits."""
    left = budget - total(units, chosen)[0]
    while True:
        gains = [
            (u.errors[c] - u.errors[s], i, s)
            for i, (u, c) in enumerate(zip(units, chosen, strict=True))
            for s in range(len(u.settings))
            if u.errors[s] < u.errors[c] and u.nbytes[s] - u.nbytes[c] <= left
        ]
        if not gains:
            return chosen
        _, unit, setting = max(gains)
        left -= units[unit].nbytes[setting] - units[unit].nbytes[chosen[unit]]
        chosen[unit] = setting


def least_bytes(units: Sequence[Unit]) -> int:
    """Bytes with every unit in its smallest setting."""
    return sum(min(u.nbytes) for u in units)


def total(units: Sequence[Unit], chosen: Sequence[int]) -> tuple[int, float]:
    """Bytes and error of an allocation."""
    return (
        sum(u.nbytes[c] for u, c in zip(units, chosen, strict=True)),
        sum(u.errors[c] for u, c in zip(units, chosen, strict=True)),
    )
