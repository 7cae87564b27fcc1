"""Specs: dataclasses whose fields carry units, limits and help, from which command lines and recipes are generated.

    @dataclass(frozen=True, kw_only=True, init=False)
    class RunSpec(Spec):
        tokens: Tokens | None = option(None, "Length of the run, e.g. 2Mtok.")
        keep: int = option(2, "Checkpoints to keep.", least=1, resumable=True)

A value may be given as text in the unit of its field ("2Mtok"), on a command line, in a recipe and in Python alike. An
unknown name or a value out of range is a `UserError` that names what is allowed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from modicum.core.choice import Choice
from modicum.core.errors import UserError, unknown
from modicum.core.registry import PortInfo


@dataclass(frozen=True)
class MethodOf:
    """In a field's type: a choice of a method of `port`."""

    port: str


def option(
    default: Any,
    help: str,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    allowed: Sequence[str] | None = None,
    resumable: bool = False,
) -> Any:
    """A field of a `Spec`. least, most: inclusive limits; above: an exclusive one. allowed: the values of a text field.
    resumable: a resumed run may have another value."""
    limits = {"least": least, "above": above, "most": most, "allowed": allowed}
    return dataclasses.field(default=default, metadata={"help": help, "resumable": resumable} | limits)


@dataclass(frozen=True)
class Option:
    """A field of a spec, read: `kind` is int, float, bool, str, tuple or object; `unit` parses text, if it has one."""

    name: str
    kind: type
    default: Any
    optional: bool
    metadata: Mapping[str, Any]
    unit: Any = None
    method: str | None = None  # the port whose methods it names

    def read(self, value: Any) -> Any:
        """`value` in the field's type. Raises `UserError`."""
        if value is None and self.optional:
            return None
        if self.unit is None and self.kind in (int, float) and isinstance(value, str):  # YAML leaves 3e-4 a word
            with contextlib.suppress(ValueError):
                value = self.kind(value)
        if self.unit is not None:
            value = self.unit.parse(value)
        elif self.method is not None:
            return _checked(self.method, value)
        elif self.kind is tuple:
            if isinstance(value, str):
                value = tuple(part for part in value.split(",") if part)
            return tuple(value)
        elif self.kind is int and (not isinstance(value, int) or isinstance(value, bool)):
            raise UserError(f"{self.name}={value!r} must be a whole number{self._limits()}")
        elif self.kind is float:
            if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
                raise UserError(f"{self.name}={value!r} must be a number{self._limits()}")
        elif self.kind in (bool, str) and not isinstance(value, self.kind):
            raise UserError(f"{self.name}={value!r} must be {'true or false' if self.kind is bool else 'a word'}")
        least, above, most, allowed = (self.metadata.get(k) for k in ("least", "above", "most", "allowed"))
        low = (least is not None and value < least) or (above is not None and value <= above)
        if low or (most is not None and value > most):
            what = "a whole number" if self.kind is int else "a number"
            raise UserError(f"{self.name}={value!r} must be {what}{self._limits()}")
        if allowed and value not in allowed:
            raise unknown(self.name, value, allowed)
        return value

    def _limits(self) -> str:
        phrases = {"least": "of at least", "above": "above", "most": "at most"}
        bounds = [f"{phrases[k]} {self.metadata[k]:g}" for k in phrases if self.metadata.get(k) is not None]
        return f" {' and '.join(bounds)}" if bounds else ""


@functools.cache
def options(spec: Any) -> dict[str, Option]:
    """The fields of a spec (a class) by name, in order."""
    hints = typing.get_type_hints(spec, include_extras=True)
    return {f.name: _option(f, hints[f.name]) for f in dataclasses.fields(spec)}


def _option(field: dataclasses.Field[Any], hint: Any) -> Option:
    parts = typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)
    (hint,) = [p for p in parts if p is not type(None)]
    metadata_hints: tuple[Any, ...] = ()
    if typing.get_origin(hint) is Annotated:
        hint, *rest = typing.get_args(hint)
        metadata_hints = tuple(rest)
    optional = type(None) in parts or hint is Any
    kind = typing.get_origin(hint) or hint
    unit = next((m for m in metadata_hints if hasattr(m, "parse")), None)
    method = next((m.port for m in metadata_hints if isinstance(m, MethodOf)), None)
    default = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
    return Option(
        field.name, kind if isinstance(kind, type) else object, default, optional, field.metadata, unit, method
    )


def _checked(port: str, value: Any) -> Any:
    Choice.parse(port, value)
    return value


@dataclass(frozen=True, kw_only=True, init=False)
class Spec:
    """Base of specs: subclasses are dataclasses with `init=False`; their `check` validates fields together.

    `dataclasses.replace` makes a changed and checked copy.
    """

    NAME: ClassVar[str] = "option"
    METHODS: ClassVar[dict[str, str]] = {}  # by port: what is chosen where nothing is said, if not the baseline

    def __init__(self, **given: Any) -> None:
        kind: Any = type(self)
        known = options(kind)
        for name in given:
            if name not in known:
                raise unknown(self.NAME, name, known)
        for name, one in known.items():
            value = given.get(name, one.default)
            object.__setattr__(self, name, one.read(value) if name in given or one.unit else value)
        self.check()

    @classmethod
    def ports(cls) -> dict[str, PortInfo]:
        """The ports that it chooses methods of, in `methods`."""
        return {}

    def check(self) -> None:
        """Raise `UserError` for fields that do not go together."""
