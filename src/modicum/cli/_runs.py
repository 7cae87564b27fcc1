"""Run records on the command line: from a table, or from run directories; and the law that suits them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from modicum.core.errors import UserError


def read(path: Path, log: Callable[[str], None] = lambda line: print(line, file=sys.stderr)) -> dict[str, list[Any]]:
    """Columns of a .jsonl, .csv or .parquet file, or of the training runs in a run directory (or a folder of them)."""
    from modicum.laws.table import read_runs, to_columns

    if not path.is_dir():
        return read_runs(path)
    from modicum.pipeline.records import comparable, run_records

    rows, others = comparable(run_records(path))
    if others:
        log(
            f"{len(rows)} runs of one recipe are fitted; left out, since corpus, tokenizer or settings differ: "
            f"{', '.join(others[:6])}{' ...' if len(others) > 6 else ''}"
        )
    columns: dict[str, list[Any]] = to_columns(rows)
    return columns


def clean(
    table: Mapping[str, Any], target: str, log: Callable[[str], None] = lambda line: print(line, file=sys.stderr)
) -> dict[str, Any]:
    """The table without the rows whose `target` is missing or not finite (diverged, unfinished); says which."""
    if target not in table:
        return dict(table)
    good = [_is_finite(value) for value in table[target]]
    if not any(good):
        raise UserError(f"column {target!r} holds no finite number in {len(good)} rows; name the right one: --columns")
    if all(good):
        return dict(table)
    bad = [i for i, ok in enumerate(good) if not ok]
    log(
        f"{len(bad)} of {len(good)} rows left out, their {target} is missing or not finite: row "
        f"{', '.join(map(str, bad[:8]))}{' ...' if len(bad) > 8 else ''} (counted from 0)"
    )
    return {name: [v for v, ok in zip(column, good, strict=True) if ok] for name, column in table.items()}


def suited(law: str | None, table: Mapping[str, Any]) -> Any:
    """The choice of a law: `onset` for short runs whose vocabulary is known, else `chinchilla`; a law that reads the
    vocabulary gets that of the runs unless the choice says another."""
    from modicum.core.choice import Choice

    sizes = {int(v) for v in table.get("vocabulary", []) if v}
    known = len(sizes) == 1
    choice = Choice.parse("law", law or ("onset" if known else "chinchilla"))
    if known and "vocabulary" not in choice.knobs and hasattr(choice.config(), "vocabulary"):
        choice = Choice("law", choice.method, choice.knobs | {"vocabulary": sizes.pop()})
    return choice


def _is_finite(value: Any) -> bool:
    import math

    try:
        return math.isfinite(float(value))
    except (TypeError, ValueError):
        return False


def pairs(text: str, example: str) -> dict[str, str]:
    pairs = {}
    for item in text.split(","):
        if item.strip():
            name, equals, value = item.partition("=")
            if not equals or not value.strip():
                raise UserError(f"{item.strip()!r} is not NAME=VALUE; write for example {example}")
            pairs[name.strip()] = value.strip()
    return pairs
