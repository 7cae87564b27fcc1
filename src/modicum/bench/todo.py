"""What is still to be measured: choices without a record in a lab, and choices whose record is stale."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass

from modicum.bench import code
from modicum.bench.labs import Lab
from modicum.bench.record import Record
from modicum.core import registry
from modicum.core.choice import Choice
from modicum.core.errors import UserError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Stale:
    """A choice whose newest records of a tier were made by other code than today's."""

    choice: str
    lab: Lab
    seeds: list[int]
    time: str  # of the newest record


def choices_of(port: str, old: list[Stale], fits: Callable[[Lab], bool]) -> list[Choice]:
    """The choices whose lab `fits`; those whose knobs are no longer there are left out, with a warning."""
    choices = []
    for entry in old:
        if fits(entry.lab):
            try:
                choice = Choice.parse(port, entry.choice)
                choice.config()
            except UserError as error:
                log.warning("left out: %s", error)
            else:
                choices.append(choice)
    return choices


def missing(
    records: list[Record], choices: list[Choice], seeds: list[int], fits: Callable[[Lab], bool]
) -> list[Choice]:
    """Those of `choices` that stand, with all of `seeds`, in no lab that `fits`, made by whatever code."""
    measured: dict[str, set[tuple[str, int]]] = {}
    for record in records:
        if fits(record.lab):
            measured.setdefault(record.lab.id, set()).add((record.choice, record.seed))
    return [c for c in choices if not any({(str(c), s) for s in seeds} <= pairs for pairs in measured.values())]


def stale(records: list[Record]) -> list[Stale]:
    """Per choice, tier and device: its newest lab, if a record there was not made by today's code.

    Older labs of the same tier and device are history. Methods that are no longer there are left out.
    """
    groups: dict[tuple[str, str, str], list[Record]] = {}
    for record in records:
        if record.method in registry.methods(record.lab.port):
            groups.setdefault((record.choice, record.lab.tier, record.lab.device), []).append(record)
    today = functools.cache(code.code_hash)
    result = []
    for group in groups.values():
        newest = max(group, key=lambda r: r.time)
        old = [r for r in group if r.lab.id == newest.lab.id and r.code != today(newest.lab.port, newest.method)]
        if old:
            result.append(Stale(newest.choice, newest.lab, sorted(r.seed for r in old), newest.time))
    return result
