"""Column by column with the rest making up for it: what gptq and sparsegpt share (optimal brain surgeon).

Shapes: O outputs, I inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from modicum.core.errors import UserError


def factor(gram_II: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """(U_II, dead_I) in float64: the upper Cholesky factor of (H + damping mean(diag H) I)^-1, H = 2 X X^T.

    dead_I: inputs that were always zero; H is given a one on the diagonal there, and their weights are of no account.
    """
    H = 2 * gram_II.double()
    diagonal = H.diagonal()
    dead_I = diagonal == 0
    H = H + torch.diag(dead_I.double() + damping * diagonal.mean())
    try:
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(H))
        return torch.linalg.cholesky(inverse, upper=True), dead_I
    except torch.linalg.LinAlgError:
        raise UserError(
            f"the inputs of a layer with {H.shape[0]} inputs are nearly dependent, so that their second moment has no "
            f"Cholesky factor; give more calibration text, or a damping above {damping:g}"
        ) from None


def push(weight_OI: Tensor, U_II: Tensor, column: int, stop: int, kept_O: Tensor) -> Tensor:
    """Set `column` to `kept_O` and let the columns up to `stop` make up for it, in place; the scaled error (O,)."""
    error_O = (weight_OI[:, column] - kept_O) / U_II[column, column]
    weight_OI[:, column] = kept_O
    if column + 1 < stop:
        weight_OI[:, column + 1 : stop] -= error_O[:, None] * U_II[column, column + 1 : stop]
    return error_O
