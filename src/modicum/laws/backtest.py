"""Back-testing a law: fit on a part of a table, predict what was held out, larger runs or whole families."""

from __future__ import annotations

from typing import Any

import numpy as np

from modicum.core import registry
from modicum.core.errors import UserError, unknown
from modicum.laws.table import Runs, as_table, rename, to_columns

HELDOUT = ("final", "curve")
CURVE_SHARE = 0.3  # of the largest run's tokens: the part of its curve that is predicted


def backtest(
    table: Runs,
    columns: dict[str, str] | None = None,
    cut: float = 0.5,
    *,
    law: Any = "chinchilla",
    by: str = "flops",
    level: float = 0.95,
    seed: int = 0,
    heldout: str = "final",
) -> dict[str, Any]:
    """Fit on the share `cut` of the runs that are smallest in `by`, predict the rest.

    columns: names in the table for `parameters`, `tokens`, `loss`, `run`, `final` where they differ. by: a column the
    law reads, or flops, parameters or tokens. cut: a share in (0, 1), or above 1 an absolute value of `by`. heldout:
    "final" predicts each larger run's finished loss; "curve" the last 30% of their tokens, every row, from rows of the
    smaller runs (Choshen et al. 2024, arXiv:2410.11840: one end point is a noisy measure of a law). Returns counts,
    `bias` and `error` (mean and mean absolute error: relative for a loss, in points of the score or in nats else),
    `coverage` of the interval, `width` (its mean width), and one row per held-out measurement.
    """
    if heldout not in HELDOUT:
        raise unknown("heldout", heldout, HELDOUT)
    method = registry.build("law", law)
    given = rename(to_columns(table), columns or {})
    rows = as_table(given, list(dict.fromkeys([*method.reads, by])), target=method.target)
    largest_R = np.array([rows[by][rows["run"] == r].max() for r in range(int(rows["run"].max()) + 1)])
    limit = float(np.quantile(largest_R, cut)) if cut <= 1 else cut
    small_N = (largest_R <= limit)[rows["run"]]
    heldout_N = ~small_N & rows["final"]
    if heldout == "curve":
        heldout_N = ~small_N & (rows["tokens"] >= (1 - CURVE_SHARE) * _end(rows))
    if not small_N.any() or not heldout_N.any():
        raise UserError(
            f"cut={cut} leaves {int(small_N.sum())} rows to fit and {int(heldout_N.sum())} to predict; "
            f"{by} runs from {largest_R.min():.3g} to {largest_R.max():.3g}"
        )
    return {"law": str(law), "cut": limit} | predicted(method, given, small_N, heldout_N, level, seed)


def _end(rows: dict[str, np.ndarray]) -> np.ndarray:
    """The tokens (N) at the end of each row's run."""
    end_R = np.zeros(int(rows["run"].max()) + 1)
    np.maximum.at(end_R, rows["run"], rows["tokens"])
    end_N: np.ndarray = end_R[rows["run"]]
    return end_N


def leave_out(
    table: Runs, by: str = "family", *, law: Any = "chinchilla", level: float = 0.95, seed: int = 0
) -> dict[str, Any]:
    """Each value of `by` (a model family, a task, a source) predicted from all the others.

    Returns the mean over all held-out final measurements, per value the same figures, and why the law refused some.
    """
    method = registry.build("law", law)
    given = to_columns(table)
    if by not in given:
        raise unknown("column", by, given, "It says which rows belong together")
    labels_N = np.array([str(v) for v in given[by]])
    final_N = as_table(given, method.reads, target=method.target)["final"]
    parts, refused = {}, {}
    for label in dict.fromkeys(labels_N):
        heldout_N = (labels_N == label) & final_N
        if heldout_N.any() and (labels_N != label).any():
            try:
                parts[label] = predicted(method, given, labels_N != label, heldout_N, level, seed)
            except UserError as error:
                refused[label] = str(error)
    if len(parts) < 2 and refused:
        raise UserError(f"the law refuses to predict {', '.join(refused)}: {next(iter(refused.values()))}")
    if len(parts) < 2:
        raise UserError(
            f"column {by!r} has fewer than two values with final measurements; there is nothing to leave out"
        )
    rows = [row for part in parts.values() for row in part["rows"]]
    return (
        {"law": str(law), "by": by, "level": level}
        | figures(rows, method.target)
        | {"parts": parts, "refused": refused}
    )


def predicted(
    method: Any, given: dict[str, Any], fit_N: np.ndarray, heldout_N: np.ndarray, level: float, seed: int
) -> dict[str, Any]:
    """Fit on the rows `fit_N` of a table, predict the rows `heldout_N`."""
    fit = method.fit({name: _rows(column, fit_N) for name, column in given.items()}, seed)
    heldout = {name: _rows(column, heldout_N) for name, column in given.items()}
    truth = as_table(heldout, method.reads, target=method.target)
    prediction = method.predict(fit, heldout, level)
    rows = [
        {**{n: float(truth[n][i]) for n in method.reads if n in truth}, method.target: float(truth[method.target][i])}
        | row
        for i, row in enumerate(prediction.rows())
    ]
    return {
        "fitted_rows": int(fit_N.sum()),
        "fitted_runs": fit.runs,
        "held_out": int(heldout_N.sum()),
        "method": fit.method,
        "parameters": fit.parameters,
        "level": level,
        **figures(rows, method.target),
        "rows": rows,
    }


def _rows(column: Any, picked_N: np.ndarray) -> list[Any]:
    return [value for value, take in zip(column, picked_N, strict=True) if take]


def figures(rows: list[dict[str, Any]], target: str) -> dict[str, float]:
    """bias, error, coverage and width of predictions beside what was measured."""
    truth_N, mean_N, low_N, high_N = (np.array([row[n] for row in rows]) for n in (target, "mean", "low", "high"))
    by_N = truth_N if target == "loss" else np.ones(len(rows))
    error_N = (mean_N - truth_N) / by_N
    return {
        "bias": float(error_N.mean()),
        "error": float(np.abs(error_N).mean()),
        "worst": float(np.abs(error_N).max()),
        "coverage": float(((truth_N >= low_N) & (truth_N <= high_N)).mean()),
        "width": float(((high_N - low_N) / (mean_N if target == "loss" else by_N)).mean()),
    }
