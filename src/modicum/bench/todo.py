"""What is still to be measured: choices without a record in a lab, and choices whose record is stale."""

from __future__ import annotations

import functools
import logging
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


def choices_of(port: str, old: list[Stale], tier: str, device: str) -> list[Choice]:
    """The choices of one tier and device; those whose knobs are no longer there are left out, aloud."""
    found = []
    for entry in old:
        if (entry.lab.tier, entry.lab.device) == (tier, device):
            try:
                choice = Choice.parse(port, entry.choice)
                choice.config()
            except UserError as error:
                log.warning("left out: %s", error)
            else:
                found.append(choice)
    return found


def missing(found: list[Record], choices: list[Choice], seeds: list[int], lab: Lab) -> list[Choice]:
    """Those of `choices` that lack one of `seeds` in the lab, made by whatever code."""
    held = {(r.choice, r.seed) for r in found if r.lab.id == lab.id}
    return [c for c in choices if any((str(c), seed) not in held for seed in seeds)]


def stale(found: list[Record]) -> list[Stale]:
    """Per choice, tier and device: its newest lab, if a record there was not made by today's code.

    Older labs of the same tier and device are history. Methods that are no longer there are left out.
    """
    groups: dict[tuple[str, str, str], list[Record]] = {}
    for record in found:
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
