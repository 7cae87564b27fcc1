"""Back-testing a law: fit on the small runs of a table, predict the larger ones that were held out."""

from __future__ import annotations

from typing import Any

import numpy as np

from modicum.core import registry
from modicum.core.errors import UserError
from modicum.laws.table import Runs, as_table, rename, to_columns


def backtest(
    table: Runs,
    columns: dict[str, str] | None = None,
    cut: float = 0.5,
    *,
    law: Any = "chinchilla",
    by: str = "flops",
    level: float = 0.95,
    seed: int = 0,
) -> dict[str, Any]:
    """Fit on the share `cut` of the runs that are smallest in `by`, predict the rest.

    columns: names in the table for `parameters`, `tokens`, `loss`, `run`, `final` where they differ.
    by: flops, parameters or tokens. cut: a share in (0, 1), or above 1 an absolute value of `by`.
    Returns counts, `bias` (mean relative error), `error` (mean absolute relative error), `coverage` of the
    interval, `width` (its mean relative width), and one row per held-out final loss.
    """
    method = registry.build("law", law)
    given = to_columns(table)
    given = rename(given, columns or {})
    wanted = list(dict.fromkeys([*method.reads, by]))
    rows = as_table(given, wanted)
    largest_R = np.array([rows[by][rows["run"] == r].max() for r in range(int(rows["run"].max()) + 1)])
    limit = float(np.quantile(largest_R, cut)) if cut <= 1 else cut
    small_N = (largest_R <= limit)[rows["run"]]
    held_N = ~small_N & rows["final"]
    if not small_N.any() or not held_N.any():
        raise UserError(
            f"cut={cut} leaves {int(small_N.sum())} rows to fit and {int(held_N.sum())} to predict; "
            f"{by} runs from {largest_R.min():.3g} to {largest_R.max():.3g}"
        )
    fit = method.fit({name: column[small_N] for name, column in rows.items()}, seed)
    held = {name: column[held_N] for name, column in rows.items()}
    prediction = method.predict(fit, held, level)
    error_N = prediction.mean / held["loss"] - 1
    inside_N = (held["loss"] >= prediction.low) & (held["loss"] <= prediction.high)
    return {
        "law": str(law),
        "fitted_rows": int(small_N.sum()),
        "fitted_runs": fit.runs,
        "held_out": int(held_N.sum()),
        "method": fit.method,
        "parameters": fit.parameters,
        "cut": limit,
        "level": level,
        "bias": float(error_N.mean()),
        "error": float(np.abs(error_N).mean()),
        "coverage": float(inside_N.mean()),
        "width": float(((prediction.high - prediction.low) / prediction.mean).mean()),
        "rows": [
            {**{n: float(held[n][i]) for n in wanted}, "loss": float(held["loss"][i]), **row}
            for i, row in enumerate(prediction.rows())
        ],
    }
