"""What a stage's part of a recipe is made of: a strict pydantic model, quantities with units, methods of a port."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, cast

import pydantic
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from modicum.budget import units
from modicum.core.choice import Choice
from modicum.core.registry import PortInfo
from modicum.core.spec import Option, options

Bytes = Annotated[float, BeforeValidator(lambda value: units.parse(value, "bytes"))]
Seconds = Annotated[float, BeforeValidator(lambda value: units.parse(value, "seconds"))]
Tokens = Annotated[float, BeforeValidator(lambda value: units.parse(value, "tokens"))]
Parameters = Annotated[float, BeforeValidator(lambda value: units.parse(value, "parameters"))]


def method(port: str) -> Any:
    """A pydantic type that reads a method of `port` and checks that it and its knobs exist."""

    def check(value: Any) -> Any:
        Choice.parse(port, value).config()
        return value

    return Annotated[str | dict[str, Any], BeforeValidator(check)]


def methods(port: str) -> Any:
    """The same for any number of methods: one, or a list of them."""

    def check(value: Any) -> Any:
        values = [value] if isinstance(value, str | dict) else value
        for one in values if isinstance(values, list) else ():
            Choice.parse(port, one).config()
        return values

    return Annotated[list[str | dict[str, Any]], BeforeValidator(check)]


def with_ports(model: Any, ports: Mapping[str, PortInfo]) -> Any:
    """The section `model` with a field for every port that it has none of: a method, several where the port takes any
    number, or None for what the run's own settings say."""
    more: dict[str, Any] = {}
    for name, info in ports.items():
        if name not in model.model_fields:
            more[name] = ((methods(name) if info.several else method(name)) | None, None)
    return pydantic.create_model(model.__name__, __base__=model, __module__=model.__module__, **more)


class Strict(BaseModel):
    """A part of a recipe. Unknown keys are refused; values do not change once read."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def from_spec(spec: Any, names: Iterable[str], **defaults: Any) -> Any:
    """A section with the settings `names` of a `core.spec.Spec`: its units, limits and defaults, unless `defaults` say
    otherwise. A value is kept as the spec reads it."""
    known = options(spec)
    fields: dict[str, Any] = {}
    for name in names:
        one = known[name]
        kind: Any = one.kind if one.kind in (bool, int, float, str) else Any
        if one.optional and kind is not Any:
            kind = kind | None
        hint = cast(Any, Annotated)[kind, BeforeValidator(_reader(one))]
        fields[name] = (hint, Field(defaults.get(name, one.default), description=one.metadata["help"]))
    return pydantic.create_model(spec.__name__, __base__=Strict, **fields)


def _reader(one: Option) -> Callable[[Any], Any]:
    def read(value: Any) -> Any:
        if one.method is not None and value is not None:
            Choice.parse(one.method, value).config()
        return one.read(value)

    return read
