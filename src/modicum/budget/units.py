"""Quantities as people write them: `2GiB`, `90m`, `50Mtok`, `1e15flop`, `25%`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated

from modicum.core.errors import UserError

_BYTES = {
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
}
_SECONDS = {"ms": 1e-3, "s": 1, "sec": 1, "m": 60, "min": 60, "h": 3600, "d": 86400}
_SCALE = {"": 1, "k": 1e3, "m": 1e6, "g": 1e9, "b": 1e9, "t": 1e12, "p": 1e15, "e": 1e18}
_QUANTITY = re.compile(r"^\s*([0-9]*\.?[0-9]+(?:[eE][+-]?[0-9]+)?)\s*([A-Za-z]*)\s*$")

KINDS = {
    "bytes": "a size such as 512MiB, 2GiB or 1.5GB",
    "seconds": "a time such as 45s, 10m or 1.5h",
    "tokens": "a count such as 50Mtok or 1e6tok",
    "flops": "a count such as 1e15flop or 3Pflop",
    "parameters": "a count such as 5M or 1.3B",
}


@dataclass(frozen=True)
class Unit:
    """In a field's type: a number of `kind`, also written with its unit."""

    kind: str

    def parse(self, value: str | float) -> float:
        return parse(value, self.kind)


Bytes = Annotated[float, Unit("bytes")]
Seconds = Annotated[float, Unit("seconds")]
Tokens = Annotated[float, Unit("tokens")]
Parameters = Annotated[float, Unit("parameters")]


def parse(text: str | int | float, kind: str) -> float:
    """A quantity of `kind` (a key of `KINDS`); plain numbers are taken as they are."""
    if isinstance(text, int | float) and not isinstance(text, bool):
        if text < 0:
            raise UserError(f"{text!r} is negative; write {KINDS[kind]}")
        return float(text)
    quantity = _count(str(text)) if kind == "parameters" else kind_of(str(text))
    if quantity is None or quantity[0] not in (kind, "number"):
        raise UserError(f"{text!r} is not a number of {kind}; write {KINDS[kind]}")
    return quantity[1]


def _count(text: str) -> tuple[str, float] | None:
    """A bare count: `M` is a million here and never minutes."""
    match = _QUANTITY.match(text)
    scale = _SCALE.get(match[2].lower()) if match else None
    return None if match is None or scale is None else ("number", float(match[1]) * scale)


def kind_of(text: str) -> tuple[str, float] | None:
    """(kind, value) of a quantity with its unit, or None if it is not one."""
    match = _QUANTITY.match(text)
    if not match:
        return None
    number, unit = float(match[1]), match[2].lower()
    if unit == "":
        return "number", number
    if unit in _BYTES:
        return "bytes", number * _BYTES[unit]
    if unit in _SECONDS:
        return "seconds", number * _SECONDS[unit]
    for name, kind in (
        ("tokens", "tokens"),
        ("token", "tokens"),
        ("tok", "tokens"),
        ("flops", "flops"),
        ("flop", "flops"),
    ):
        if unit.endswith(name) and unit[: -len(name)] in _SCALE:
            return kind, number * _SCALE[unit[: -len(name)]]
    return None


def bytes_text(n: float) -> str:
    for limit, suffix in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if abs(n) >= limit:
            return f"{n / limit:.2f} {suffix}" if n / limit < 100 else f"{n / limit:.0f} {suffix}"
    return f"{n:.0f} B"
