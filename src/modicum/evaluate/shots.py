"""Few-shot figures over several draws of the examples: the mean, and its error from items and from draws, apart.

    stderr^2 = stderr_items^2 + stderr_seeds^2

One draw of examples is one prompt, and scores move with the prompt; an error over items alone is silent about that.
Each item's figure is its mean over the draws, whose error over items (clustered, where items share something) is the
first part; the spread of the draws' means over the square root of their number is the second.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from modicum.core.errors import UserError
from modicum.evaluate.compare import clustered_error

if TYPE_CHECKING:
    from modicum.evaluate.run import TaskResult


def over_seeds(results: Sequence[TaskResult]) -> TaskResult:
    """One result of a task that was asked with several draws of examples; the items are those of the first draw."""
    first = results[0]
    if len(results) < 2:
        return first
    ids = [row["id"] for row in first.rows]
    for other in results[1:]:
        if [row["id"] for row in other.rows] != ids:
            raise UserError(
                f"{first.task} asked other items under another draw of examples; their errors cannot be added"
            )
    clusters = [row.get("cluster") for row in first.rows]
    labels = None if any(c is None for c in clusters) else clusters
    figures, rows = {}, [dict(row) for row in first.rows]
    for name, figure in first.figures.items():
        if not all(name in row for row in first.rows):
            continue
        values_SN = np.array([[row[name] for row in result.rows] for result in results], dtype=float)
        items = clustered_error(values_SN.mean(0).tolist(), labels)
        seeds = float(values_SN.mean(1).std(ddof=1) / math.sqrt(len(results)))
        figures[name] = figure | {
            "value": float(values_SN.mean()),
            "stderr": math.hypot(items, seeds),
            "stderr_items": items,
            "stderr_seeds": seeds,
            "seeds": len(results),
        }
        for row, value in zip(rows, values_SN.mean(0), strict=True):
            row[name] = float(value)
    return dataclasses.replace(
        first,
        figures=figures,
        rows=rows,
        resumed=sum(r.resumed for r in results),
        seconds=sum(r.seconds for r in results),
    )
