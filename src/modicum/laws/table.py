"""Run records as a table of columns: read from a file or taken from memory, checked once.

A row is one measurement: the columns a law reads (`parameters`, `tokens`, ...) and its target, which is a `loss`, a
`score` (a fraction, of `items` graded items if that is given) or a `change` of loss. Optional for all: `run` (rows of
one run share it), `final` (false for a checkpoint whose learning rate was not yet cooled down) or, finer, `decay_left`
(the share of the learning rate's decay still to come), `schedule`, `family`.
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
TARGETS = ("loss", "score", "change")
ZERO_ALLOWED = ("ratio", "examples")  # and everything that begins with ratio_
# What stands in for a column where a row lacks it: a dense run has one size, a single pass sees every token once.
STAND_IN = {"average_parameters": "parameters", "unique_tokens": "tokens"}
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


def as_table(runs: Runs, columns: Sequence[str], *, target: str | None = "loss") -> Table:
    """The columns a law reads and its target, as float64 and checked; `target=None` for points to predict.

    Columns must be finite and positive (shares and counts of examples may be zero), a loss positive, a score between 0
    and 1, a change finite. `flops` is filled in as 6 x parameters x tokens where it is missing, as are STAND_IN's
    columns. `run` becomes an index per row (each row its own run if absent), `final` a boolean (all true if absent),
    `decay_left` its complement, `items` infinite if absent.
    """
    given = to_columns(runs)
    given = {name: values if np.ndim(values) else [values] for name, values in given.items()}
    sizes = {name: len(values) for name, values in given.items()}
    if not given or len(set(sizes.values())) != 1 or 0 in sizes.values():
        raise UserError(f"run records need columns of one length, at least one row; got {sizes or 'nothing'}")
    n_rows = next(iter(sizes.values()))
    wanted = [*columns, target] if target else list(columns)
    table: Table = {}
    for name in wanted:
        other = STAND_IN.get(name)
        if other in given:
            own = given.get(name, [None] * n_rows)
            filled = [o if v is None or v != v else v for v, o in zip(own, given[other], strict=True)]
            table[name] = _numbers(name, filled)
        elif name in given:
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
    table["items"] = _numbers("items", given["items"]) if "items" in given else np.full(n_rows, np.inf)
    if target:
        names = given.get("run")
        labels = [str(v) for v in names] if names is not None else [str(i) for i in range(n_rows)]
        order = {label: i for i, label in enumerate(dict.fromkeys(labels))}
        table["run"] = np.array([order[label] for label in labels])
        table["final"] = np.array([_truth(v) for v in given["final"]]) if "final" in given else np.ones(n_rows, bool)
        early_N = (~table["final"]).astype(float)
        if "decay_left" in given:
            early_N = np.clip(np.array([float(v) for v in given["decay_left"]]), 0, 1)
            table["final"] = early_N <= 0
        table["decay_left"] = early_N
    return table


def observed(table: Table, target: str) -> np.ndarray:
    """What a law's curve is compared with: the log of a loss, or the score or change itself."""
    values_N: np.ndarray = table[target]
    return np.log(values_N) if target == "loss" else values_N


def _truth(value: Any) -> bool:
    return value.strip().lower() in ("true", "1", "yes") if isinstance(value, str) else bool(value)


def _numbers(name: str, values: Any) -> np.ndarray:
    try:
        numbers = np.array([float(v) for v in values])
    except (TypeError, ValueError):
        bad = next(v for v in values if not _is_number(v))
        raise UserError(f"column {name!r} holds {bad!r}, which is not a number; every row needs one") from None
    right, need = np.isfinite(numbers), "finite"
    if name == "items":
        right, need = numbers >= 1, "at least 1"
    elif name == "score":
        right, need = right & (numbers >= 0) & (numbers <= 1), "fractions from 0 to 1 (divide per cent by 100)"
    elif name in ZERO_ALLOWED or name.startswith("ratio_"):
        right, need = right & (numbers >= 0), "finite and not below zero"
    elif name != "change":
        right, need = right & (numbers > 0), "finite and above zero (leave diverged runs out)"
    if not right.all():
        row = int(np.argmin(right))
        raise UserError(f"column {name!r}, row {row}: {numbers[row]} is not allowed; values must be {need}")
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
