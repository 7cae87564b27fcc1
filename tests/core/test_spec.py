"""Specs: fields with units, limits and help."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Any

import pytest

from modicum.budget.units import Parameters, Seconds, Tokens
from modicum.core.errors import UserError
from modicum.core.spec import MethodOf, Spec, option, options


@dataclass(frozen=True, kw_only=True, init=False)
class Run(Spec):
    tokens: Tokens | None = option(None, "Length.")
    time: Seconds = option(60.0, "Length instead.")
    size: Parameters | None = option(None, "Of a new model.")
    keep: int = option(2, "Checkpoints.", least=1, resumable=True)
    share: float = option(0.5, "Of the data.", above=0, most=1)
    dtype: str = option("bf16", "Precision.", allowed=("bf16", "fp32"))
    names: tuple[str, ...] = option(("a",), "Names.")
    form: Annotated[Any, MethodOf("linear")] = option(None, "A form.")

    def check(self) -> None:
        if self.tokens is not None and self.size is not None and self.tokens < self.size:
            raise UserError("fewer tokens than parameters")


def test_values_come_with_or_without_their_units() -> None:
    run = Run(tokens="2Gtok", time="5m", size="1.3B", names="a,b", form="lora:rank=2")
    assert (run.tokens, run.time, run.size, run.names) == (2e9, 300.0, 1.3e9, ("a", "b"))
    assert Run(size="5M").size == 5e6, "M is a million, not minutes"
    assert Run(share="3e-4", keep="7") == Run(share=3e-4, keep=7), "numbers that YAML reads as words"
    assert dataclasses.replace(run, keep=3).keep == 3 and run.keep == 2
    assert run == Run(tokens=2e9, time=300, size=1.3e9, names=["a", "b"], form="lora:rank=2")
    assert options(Run)["keep"].metadata["resumable"] and not options(Run)["share"].metadata["resumable"]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"kep": 1}, "Did you mean 'keep'"),
        ({"keep": 0}, "keep=0 must be a whole number of at least 1"),
        ({"keep": 2.5}, "keep=2.5 must be a whole number"),
        ({"keep": True}, "keep=True must be a whole number"),
        ({"share": 0}, "share=0 must be a number above 0 and at most 1"),
        ({"share": float("nan")}, "share=nan must be a number"),
        ({"dtype": "bf61"}, "Did you mean 'bf16'"),
        ({"tokens": "5 minutes"}, "not a number of tokens"),
        ({"size": "5X"}, "not a number of parameters"),
        ({"form": "lorra"}, "Did you mean 'lora'"),
        ({"tokens": 5, "size": "1k"}, "fewer tokens than parameters"),
        ({"time": None}, "not a number of seconds"),
    ],
)
def test_what_is_wrong_is_said_by_name(given: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        Run(**given)
