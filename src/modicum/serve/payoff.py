"""Whether drafts pay, judged by the clock: seconds per token with them and without, of steps like this one.

A drafted token costs a row of every matrix product. Where weights must be fetched from far away that is nearly
nothing, on a core that is busy with one row it is nearly a token's price, and among many sequences it always is. So
nothing is assumed: steps are compared by the clock, apart for 1, 2 to 3, 4 to 7, ... sequences, the better way is
taken, and the other one is tried again now and then, more and more rarely while it loses.
"""

from __future__ import annotations

from dataclasses import dataclass, field

MEMORY = 0.9  # weight of the past in what a way costs
OUTLIER = 3.0  # a step that took this many times what is usual was held up by something else
SOONEST, LATEST = 4, 64  # steps until the losing way is tried again
TRIAL = 3  # steps of a trial: one says little


@dataclass(slots=True)
class _Way:
    """Averages over steps that went this way; `seen` steps so far."""

    seconds: float = 0.0
    tokens: float = 0.0
    seen: int = 0

    def note(self, seconds: float, tokens: int) -> None:
        if self.seen > TRIAL:
            seconds = min(seconds, OUTLIER * self.seconds)
        past = min(MEMORY, self.seen / (self.seen + 1))
        self.seconds = past * self.seconds + (1 - past) * seconds
        self.tokens = past * self.tokens + (1 - past) * tokens
        self.seen += 1

    @property
    def price(self) -> float:
        """Seconds per token."""
        return self.seconds / max(self.tokens, 1e-9)


@dataclass(slots=True)
class _Size:
    """Steps of about one number of sequences."""

    drafted: _Way = field(default_factory=_Way)
    plain: _Way = field(default_factory=_Way)
    since: int = 0  # steps since the losing way was tried
    wait: int = SOONEST


class Payoff:
    """Ask `wants` before a step of sequences that each compute one token, tell `note` what it took."""

    def __init__(self) -> None:
        self._sizes: dict[int, _Size] = {}

    def wants(self, sequences: int) -> bool:
        """Whether this step should draft."""
        size = self._sizes.setdefault(sequences.bit_length(), _Size())
        for way in (size.drafted, size.plain):
            if way.seen < TRIAL:
                return way is size.drafted
        better = size.drafted.price < size.plain.price
        size.since += 1
        if size.since <= size.wait:
            return better
        if size.since == size.wait + 1:  # what it cost long ago counts for little
            losing = size.plain if better else size.drafted
            losing.seen = min(losing.seen, TRIAL)
        if size.since == size.wait + TRIAL:  # the trial's last step: judge it at the next question
            size.since, size.wait = 0, min(2 * size.wait, LATEST)
        return not better

    def note(self, sequences: int, drafted: bool, seconds: float, tokens: int) -> None:
        size = self._sizes[sequences.bit_length()]
        before = size.drafted.price < size.plain.price
        (size.drafted if drafted else size.plain).note(seconds, tokens)
        if min(size.drafted.seen, size.plain.seen) >= TRIAL and before != (size.drafted.price < size.plain.price):
            size.since, size.wait = 0, SOONEST
