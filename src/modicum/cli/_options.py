"""Command-line options made from a spec: one for each of its fields, and one for each port that it chooses methods of.

    @options_of(PretrainSpec)
    def pretrain(curated: ..., spec: PretrainSpec, as_json: ...) -> None: ...

The command's parameter `spec` becomes the options; the command gets the spec made of them. Names, defaults, limits and
help are the spec's own, so a default exists once.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import typer

from modicum.core.registry import PortInfo
from modicum.core.spec import Option, options

Command = Callable[..., None]


def options_of(spec: Any, *, flags: dict[str, str] | None = None) -> Callable[[Command], Command]:
    """Decorator. spec: a subclass of `Spec`. flags: more names of an option ({"batch_tokens": "--batch"})."""

    def decorate(command: Command) -> Command:
        option_parameters = [
            _parameter(one, (flags or {}).get(name)) for name, one in options(spec).items() if name != "methods"
        ]
        option_parameters += [_port(info, spec.METHODS.get(name, info.baseline)) for name, info in spec.ports().items()]
        names = [p.name for p in option_parameters]

        @functools.wraps(command)
        def run(**given: Any) -> None:
            set_values = {name: value for name in names if (value := given.pop(name)) is not None}
            command(spec=spec(**set_values), **given)

        before = inspect.signature(command, eval_str=True).parameters.values()
        index = next(i for i, p in enumerate(before) if p.name == "spec")
        parameters = [p.replace(kind=p.KEYWORD_ONLY) for p in before]
        parameters[index : index + 1] = option_parameters
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        return run

    return decorate


def _parameter(one: Option, flag: str | None) -> inspect.Parameter:
    dashed = one.name.replace("_", "-")
    names = [f"--{dashed}", *([flag] if flag else [])]
    kind: Any = one.kind if one.unit is None and one.kind in (int, float, bool) else str
    if kind is bool:
        names = [f"--{dashed}/--no-{dashed}" if one.default else f"--{dashed}"]
    shown = ",".join(one.default) if one.kind is tuple and one.default else one.default
    extra = {"min": one.metadata["least"]} if kind in (int, float) and one.metadata.get("least") is not None else {}
    return _keyword(one.name, kind, names, one.metadata["help"], None if shown is None else str(shown), extra)


def _port(info: PortInfo, default: str) -> inspect.Parameter:
    kind: Any = list[str] if info.several else str
    more = "; may be given again" if info.several else ""
    shown = None if info.several else default
    text = f"{info.summary[:1].upper()}{info.summary[1:]}{more}."
    return _keyword(info.name, kind, [f"--{info.name}"], text, shown, {})


def _keyword(
    name: str, kind: Any, names: list[str], text: str, shown: str | None, extra: dict[str, Any]
) -> inspect.Parameter:
    """None stands for what was not given: the spec has the default, which help shows."""
    option: Any = typer.Option(None, *names, help=text, show_default=shown if shown is not None else False, **extra)
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=option, annotation=kind | None)
