"""Run records as a table of columns: read from a file or taken from memory, checked once.

A row is one measured loss: `parameters`, `tokens`, `loss`, and optionally `flops`, `run` (rows of one
run share it) and `final` (false for a checkpoint whose learning rate was not yet cooled down).
"""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from modicum.core.errors import CorruptError, UserError, unknown

Table = dict[str, np.ndarray]
Runs = Mapping[str, Any] | Sequence[Mapping[str, Any]]
FLOPS_PER_PARAMETER_TOKEN = 6.0  # forward and backward of a dense decoder (Kaplan et al. 2020, section 2.1)


def read_runs(path: str | Path) -> dict[str, list[Any]]:
    """Columns of a .jsonl, .csv or .parquet file."""
    path = Path(path)
    if not path.is_file():
        raise UserError(
            f"no file {path}; give run records as .jsonl, .csv or .parquet with the columns parameters, tokens and loss"
        )
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet as pq

        try:
            return dict(pq.read_table(path).to_pydict())
        except pyarrow.ArrowInvalid as error:
            raise CorruptError(f"{path} is not a readable Parquet file: {error}") from None
    if suffix == ".csv":
        with open(path, newline="", encoding="utf-8") as file:
            return _by_name(list(csv.DictReader(file)))
    if suffix in (".jsonl", ".ndjson"):
        rows = []
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if line.strip():
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as error:
                    raise CorruptError(f"{path}, line {number}, is not JSON: {error}") from None
                if not isinstance(row, dict):
                    raise UserError(
                        f"{path}, line {number}: expected an object such as "
                        '{"parameters": 1e6, "tokens": 2e7, "loss": 4.1}'
                    )
                rows.append(row)
        return _by_name(rows)
    raise UserError(f"{path}: {suffix or 'no suffix'} is not a table; allowed: .jsonl, .csv, .parquet")


def _by_name(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    names = list(dict.fromkeys(name for row in rows for name in row))
    return {name: [row.get(name) for row in rows] for name in names}


def to_columns(runs: Runs) -> dict[str, Any]:
    """Columns by name, from columns or from rows."""
    return dict(runs) if isinstance(runs, Mapping) else _by_name(runs)


def as_table(runs: Runs, columns: Sequence[str], *, loss: bool = True) -> Table:
    """The columns a law reads, as float64, every value finite and positive.

    `flops` is filled in as 6 x parameters x tokens where it is missing. `run` becomes an index per
    row (each row its own run if absent), `final` a boolean (all true if absent).
    """
    given = to_columns(runs)
    given = {name: values if np.ndim(values) else [values] for name, values in given.items()}
    sizes = {name: len(values) for name, values in given.items()}
    if not given or len(set(sizes.values())) != 1 or 0 in sizes.values():
        raise UserError(f"run records need columns of one length, at least one row; got {sizes or 'nothing'}")
    n_rows = next(iter(sizes.values()))
    wanted = [*columns, "loss"] if loss else list(columns)
    table: Table = {}
    for name in wanted:
        if name in given:
            table[name] = _numbers(name, given[name])
        elif name == "flops" and {"parameters", "tokens"} <= given.keys():
            table[name] = (
                FLOPS_PER_PARAMETER_TOKEN
                * _numbers("parameters", given["parameters"])
                * _numbers("tokens", given["tokens"])
            )
        else:
            raise unknown(
                "column",
                name,
                given,
                f"The table must have {', '.join(wanted)}; rename with --columns {name}=THE_TABLE'S_NAME",
            )
    if loss:
        names = given.get("run")
        labels = [str(v) for v in names] if names is not None else [str(i) for i in range(n_rows)]
        order = {label: i for i, label in enumerate(dict.fromkeys(labels))}
        table["run"] = np.array([order[label] for label in labels])
        table["final"] = np.array([_truth(v) for v in given["final"]]) if "final" in given else np.ones(n_rows, bool)
    return table


def _truth(value: Any) -> bool:
    return value.strip().lower() in ("true", "1", "yes") if isinstance(value, str) else bool(value)


def _numbers(name: str, values: Any) -> np.ndarray:
    try:
        numbers = np.array([float(v) for v in values])
    except (TypeError, ValueError):
        bad = next(v for v in values if not _is_number(v))
        raise UserError(f"column {name!r} holds {bad!r}, which is not a number; every row needs one") from None
    wrong = ~(np.isfinite(numbers) & (numbers > 0))
    if wrong.any():
        raise UserError(
            f"column {name!r}, row {int(np.argmax(wrong))}: {numbers[np.argmax(wrong)]} is not allowed; "
            "values must be finite and above zero (leave diverged runs out)"
        )
    return numbers


def _is_number(value: Any) -> bool:
    try:
        float(value)
        return True
    except (TypeError, ValueError):
        return False


def rename(runs: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """The table with columns taken under other names: `{"parameters": "params"}`."""
    for wanted, given in names.items():
        if given not in runs:
            raise unknown(f"column for {wanted!r}", given, runs)
    return {k: v for k, v in runs.items() if k not in names} | {w: runs[g] for w, g in names.items()}
