"""Traces of requests: when each arrived, how long its prompt and its answer were.

Any Parquet, CSV or JSON Lines file with such columns is read; common names (Azure's, Mooncake's, Vidur's) are
known, others are named by the caller. Times may be seconds, milliseconds or dates. A trace can be cut, made
shorter in its lengths for a smaller machine, and played at another rate.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from modicum.core.errors import UserError, unknown

NAMES = {
    "arrival": ("arrival", "arrival_s", "timestamp_s", "arrived_at", "arrival_time", "time", "timestamp", "arrival_ms"),
    "prompt": ("prompt_tokens", "contexttokens", "num_prefill_tokens", "input_length", "prompt", "input_tokens"),
    "output": ("output_tokens", "generatedtokens", "num_decode_tokens", "output_length", "output", "answer_tokens"),
}
UNITS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}


@dataclass(frozen=True)
class Trace:
    """Requests by arrival: seconds from the first one's (None: the file has none), tokens of prompt and answer."""

    name: str
    prompt_N: np.ndarray
    output_N: np.ndarray
    arrival_N: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.prompt_N)

    @property
    def rate(self) -> float | None:
        """Requests per second on average."""
        if self.arrival_N is None or len(self) < 2 or self.arrival_N[-1] <= 0:
            return None
        return (len(self) - 1) / float(self.arrival_N[-1])

    def window(self, first: int, n: int) -> Trace:
        """`n` requests from number `first` on; the first of them arrives at 0."""
        if n < 1 or first < 0 or first + n > len(self):
            raise UserError(
                f"requests {first} to {first + n - 1} were asked for, {self.name} has {len(self)}; ask for fewer"
            )
        part = slice(first, first + n)
        arrival_N = None if self.arrival_N is None else self.arrival_N[part] - self.arrival_N[first]
        return Trace(self.name, self.prompt_N[part], self.output_N[part], arrival_N)

    def shorter(self, factor: float) -> Trace:
        """Prompts and answers divided by `factor`, at least one token each."""
        if factor <= 0:
            raise UserError(f"lengths cannot be divided by {factor:g}; give a number above 0")
        prompt_N, output_N = (
            np.maximum(1, np.rint(x / factor)).astype(np.int64) for x in (self.prompt_N, self.output_N)
        )
        return replace(self, prompt_N=prompt_N, output_N=output_N)

    def within(self, most: int) -> Trace:
        """Prompt and answer together at most `most` tokens: prompts are cut, answers if they alone are longer."""
        output_N = np.minimum(self.output_N, max(1, most - 1))
        return replace(self, prompt_N=np.minimum(self.prompt_N, np.maximum(1, most - output_N)), output_N=output_N)

    def at_rate(self, rate: float, poisson: int | None = None) -> Trace:
        """The same requests at `rate` per second: arrivals stretched, or drawn anew (`poisson` is the seed)."""
        if rate <= 0:
            raise UserError(f"a rate of {rate:g} requests per second is not possible; give one above 0")
        if poisson is not None:
            gaps = np.random.default_rng(poisson).exponential(size=len(self) - 1)
            arrival_N = np.concatenate([[0.0], np.cumsum(gaps)])
        elif self.arrival_N is None:
            raise UserError(f"{self.name} has no arrival times; add --poisson to draw them")
        else:
            arrival_N = self.arrival_N
        last = float(arrival_N[-1])
        stretch = (len(self) - 1) / rate / last if last > 0 else 0.0
        return replace(self, arrival_N=arrival_N * stretch)


def read(path: str | Path, columns: Mapping[str, str] | None = None, unit: str | None = None) -> Trace:
    """Read a trace. `columns` names columns by `arrival`, `prompt` and `output`; `unit` is that of numeric times.

    Without `unit`, a column called `..._ms` is in milliseconds and any other in seconds. Raises `UserError`
    with the columns there are if those needed are not among them.
    """
    path = Path(path)
    table = _table(path)
    there = table.column_names
    for role, name in (columns or {}).items():
        if role not in NAMES:
            raise unknown("column", role, NAMES, "Write for example prompt=InputTokens,output=OutputTokens")
        if name not in there:
            raise unknown(f"column for {role} in {path.name}", name, there, "Columns are case-sensitive")
    chosen = dict(columns or {})
    lower = {name.lower(): name for name in reversed(there)}
    for role, names in NAMES.items():
        name_found = next((lower[n] for n in names if n in lower), None)
        if role not in chosen and name_found is not None:
            chosen[role] = name_found
    for role in ("prompt", "output"):
        if role not in chosen:
            raise UserError(
                f"{path}: no column with the tokens of each {role} among {', '.join(there)}; "
                f"name it with --columns {role}=NAME"
            )
    lengths = [_numbers(table, chosen[role], path) for role in ("prompt", "output")]
    if not len(lengths[0]):
        raise UserError(f"{path} holds no request")
    if min(x.min() for x in lengths) < 0 or not all(np.isfinite(x).all() for x in lengths):
        raise UserError(f"{path}: {chosen['prompt']} and {chosen['output']} must be token counts, none negative")
    prompt_N, output_N = (np.maximum(1, x).astype(np.int64) for x in lengths)
    if "arrival" not in chosen:
        return Trace(path.stem, prompt_N, output_N)
    seconds_N = _seconds(table, chosen["arrival"], unit, path)
    order = np.argsort(seconds_N, kind="stable")
    return Trace(path.stem, prompt_N[order], output_N[order], seconds_N[order] - seconds_N[order[0]])


def _table(path: Path) -> Any:
    import pyarrow as pa
    import pyarrow.csv
    import pyarrow.json
    import pyarrow.parquet

    readers = {
        ".parquet": pa.parquet.read_table,
        ".csv": pa.csv.read_csv,
        ".jsonl": pa.json.read_json,
        ".json": pa.json.read_json,
    }
    if not path.is_file():
        raise UserError(f"{path} is not a file; give a trace as Parquet, CSV or JSON Lines")
    if path.suffix.lower() not in readers:
        raise unknown("kind of trace", path.suffix, readers, "Give Parquet, CSV or JSON Lines")
    try:
        return readers[path.suffix.lower()](path)
    except pa.ArrowException as error:
        raise UserError(f"{path} cannot be read: {str(error).splitlines()[0]}") from None


def _numbers(table: Any, name: str, path: Path) -> np.ndarray:
    try:
        return np.asarray(table[name].to_numpy(zero_copy_only=False), dtype=np.float64)
    except (ValueError, TypeError):
        raise UserError(f"{path}: column {name} does not hold numbers; name another one with --columns") from None


def _seconds(table: Any, name: str, unit: str | None, path: Path) -> np.ndarray:
    import pyarrow as pa

    if unit is not None and unit not in UNITS:
        raise unknown("unit of time", unit, UNITS, "Leave it out for seconds")
    column = table[name]
    if pa.types.is_string(column.type):
        try:
            column = column.cast(pa.timestamp("ns"))
        except pa.ArrowException:
            raise UserError(f"{path}: column {name} holds neither numbers nor dates; name another one") from None
    if pa.types.is_timestamp(column.type):
        return column.cast(pa.timestamp("ns")).cast(pa.int64()).to_numpy() * 1e-9
    seconds_N = _numbers(table, name, path) * UNITS[unit or ("ms" if name.lower().endswith("_ms") else "s")]
    if not np.isfinite(seconds_N).all():
        raise UserError(f"{path}: column {name} has times that are missing")
    return seconds_N
