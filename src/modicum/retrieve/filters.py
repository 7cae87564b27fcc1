"""Which passages a search may return: conditions on their id, source, title and metadata, all of which must hold.

    {"source": "docs/*", "language": ["en", "de"], "year": {"gte": 2020, "lt": 2026}}

A text is a pattern with `*`, `?` and `[...]` (`fnmatch`); a list allows each of its values; an object compares with
`ne`, `gt`, `gte`, `lt`, `lte`. A passage that lacks a name does not match. On the command line the same is written
`--where 'source=docs/*' --where language=en,de --where 'year>=2020' --where 'year<2026'`.
"""

from __future__ import annotations

import fnmatch
import json
import operator
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from modicum.core.errors import UserError, unknown
from modicum.retrieve.passages import Passages

FIELDS = ("id", "source", "title")
COMPARISONS = {"ne": operator.ne, "gt": operator.gt, "gte": operator.ge, "lt": operator.lt, "lte": operator.le}
SIGNS = {">=": "gte", "<=": "lte", "!=": "ne", ">": "gt", "<": "lt"}
_CONDITION = re.compile(r"\s*([\w.-]+)\s*(>=|<=|!=|=|>|<)\s*(.*?)\s*")


def matching(parts: Sequence[Passages], where: Mapping[str, Any]) -> np.ndarray:
    """match_N: which rows, of all parts one after another, meet every condition. Raises `UserError` for a name that no
    passage has."""
    count = sum(map(len, parts))
    match_N = np.ones(count, bool)
    metas = [meta for part in parts for meta in part.column("meta")] if set(where) - set(FIELDS) else []
    for name, condition in where.items():
        test = _test(name, condition)
        if name in FIELDS:
            values = [value for part in parts for value in part.column(name)]
        else:
            values = [meta.get(name) for meta in metas]
            if metas and all(value is None for value in values):
                raise unknown("name of a filter", name, [*FIELDS, *sorted({key for meta in metas for key in meta})])
        match_N &= np.fromiter((value is not None and test(value) for value in values), bool, count)
    return match_N


def _test(name: str, condition: Any) -> Any:
    if isinstance(condition, Mapping):
        wrong = [word for word in condition if word not in COMPARISONS]
        if wrong or not condition:
            raise UserError(f"filter {name}: {wrong or condition} is no comparison; write {', '.join(COMPARISONS)}")
        return lambda value: all(_compared(word, value, limit) for word, limit in condition.items())
    if isinstance(condition, Sequence) and not isinstance(condition, str):
        tests = [_test(name, one) for one in condition]
        return lambda value: any(test(value) for test in tests)
    if isinstance(condition, str):
        pattern = re.compile(fnmatch.translate(condition))
        return lambda value: pattern.match(str(value)) is not None
    if isinstance(condition, bool | int | float):
        return lambda value: value == condition and isinstance(value, bool) == isinstance(condition, bool)
    raise UserError(f"filter {name}: {condition!r} is no text, number, list or comparison")


def _compared(word: str, value: Any, limit: Any) -> bool:
    try:
        return bool(COMPARISONS[word](value, limit))
    except TypeError:  # a number and a text
        return word == "ne"


def parse_where(conditions: Sequence[str]) -> dict[str, Any]:
    """The filter that `--where` options write. Raises `UserError` for one that is no NAME=VALUE."""
    where: dict[str, Any] = {}
    for text in conditions:
        match = _CONDITION.fullmatch(text)
        if match is None or not match[3]:
            raise UserError(f"--where {text!r} is no condition; write NAME=VALUE, NAME=A,B or NAME>=NUMBER")
        name, sign, value = match.groups()
        if sign == "=":
            values = [_value(part) for part in value.split(",")]
            if name in where:
                raise UserError(f"--where names {name} twice; allow several values by {name}=A,B")
            where[name] = values[0] if len(values) == 1 else values
        else:
            earlier = where.setdefault(name, {})
            if not isinstance(earlier, dict):
                raise UserError(f"--where names {name} twice; compare it, or give its values, not both")
            earlier[SIGNS[sign]] = _value(value)
    return where


def _value(text: str) -> Any:
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return value if isinstance(value, bool | int | float) else text
