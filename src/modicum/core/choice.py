"""Choosing a method and its knobs, in a recipe or on the command line.

adamw                                     the method with the paper's defaults
galore:rank=64,scale=0.25                 on a command line
{method: galore, rank: 64, scale: 0.25}   in a recipe
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import yaml

from modicum.core import registry
from modicum.core.errors import UserError, unknown


def make_config(config: type, knobs: dict[str, Any], where: str) -> Any:
    """Build the dataclass `config` from `knobs`, with types checked and unknown names refused."""
    import pydantic

    names = [f.name for f in dataclasses.fields(config) if f.init]
    for name in knobs:
        if name not in names:
            raise unknown(f"knob of {where}", name, names, f"Type: modicum show {where}")
    try:
        return pydantic.TypeAdapter(config).validate_python(knobs)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        knob = ".".join(str(p) for p in first["loc"]) or "?"
        # Without a place it is the config's own check of its knobs together that failed.
        what = f"knob {knob}={first['input']!r} is not valid: " if first["loc"] else ""
        raise UserError(
            f"{where}: {what}{first['msg'].removeprefix('Value error, ')}. Type: modicum show {where}"
        ) from None
    except (TypeError, ValueError) as error:
        raise UserError(f"{where}: {error}. Type: modicum show {where}") from None


@dataclass(frozen=True)
class Choice:
    """A method of a port together with its knobs."""

    port: str
    method: str
    knobs: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def parse(cls, port: str, value: Any) -> Choice:
        if isinstance(value, Choice):
            return value
        if isinstance(value, str):
            key, _, rest = value.partition(":")
            knobs = {}
            for item in _split(rest):
                name, equals, text = item.partition("=")
                if not equals:
                    raise UserError(f"{value!r}: {item!r} is not KNOB=VALUE; write for example {key}:rank=8,alpha=16")
                knobs[name.strip()] = yaml.safe_load(text)
        elif isinstance(value, dict) and isinstance(value.get("method"), str):
            key, knobs = value["method"], {k: v for k, v in value.items() if k != "method"}
        else:
            raise UserError(
                f"{value!r} does not name a {port} method; write its key, or a mapping with 'method' "
                f"and its knobs. Allowed: {', '.join(registry.methods(port))}"
            )
        if key not in registry.methods(port):
            raise unknown(f"{port} method", key, registry.methods(port), f"Type: modicum ls {port}")
        return cls(port, key, knobs)

    def config(self) -> Any:
        """The method's validated `Config` (imports the method)."""
        return make_config(registry.load(self.port, self.method).config, self.knobs, f"{self.port}/{self.method}")

    def resolved(self) -> dict[str, Any]:
        """Method and every knob, defaults included: what a run directory records."""
        return {"method": self.method} | dataclasses.asdict(self.config())

    def __str__(self) -> str:
        knobs = ",".join(f"{k}={v}" for k, v in self.knobs.items())
        return f"{self.method}:{knobs}" if knobs else self.method


def _split(text: str) -> list[str]:
    """Split at commas that stand outside brackets."""
    parts, depth, start = [], 0, 0
    for i, char in enumerate(text):
        depth += (char in "[{(") - (char in "]})")
        if char == "," and depth == 0:
            parts.append(text[start:i])
            start = i + 1
    parts.append(text[start:])
    return [p for p in parts if p.strip()]
