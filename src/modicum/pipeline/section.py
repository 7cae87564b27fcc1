"""What a stage's part of a recipe is made of: a strict pydantic model, quantities with units, methods of a port."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict

from modicum.budget import units
from modicum.core.choice import Choice

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


class Strict(BaseModel):
    """A part of a recipe. Unknown keys are refused; values do not change once read."""

    model_config = ConfigDict(extra="forbid", frozen=True)
