"""cmr: how much domain text continued pretraining may hold, from a few runs of several fractions and their law.

    runs         from one model, one schedule, domain fractions R; both losses measured along each
    law          laws/forms/cmr.py: change of the general loss over tokens and R, two powers
    R(T)         the largest R whose general loss has risen by at most `epsilon` nats per token after T

`domain` is what is added; all other domains are the general text, and stand for what the model was pretrained on.
With a given model the study goes on from it; without one it first trains on the general text for `warm` runs. The
whole curve is reported, since a small model may have no feasible fraction at all.

Gu et al. 2024, arXiv:2407.17467 (EMNLP 2024), definitions 1 and 2. Departs: fractions are of tokens of the run; the
measurements of the first `settle` part of each run are left out, because re-warming the rate alone raises the loss.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from modicum.core import registry
from modicum.core.errors import UserError
from modicum.laws.experiments import Conclusion, Experiment, Run, Trial, by_name, left

CLAIM = {"figure": "29.8% (460M) to 47.8% (3.1B) finance text", "where": "Table 2", "scale": "460M to 3.1B, 20B tokens"}


@dataclass(frozen=True, kw_only=True)
class Config:
    domain: str = ""  # what is added; "": the smallest domain
    fractions: tuple[float, ...] = (0.125, 0.25, 1 / 3, 0.5, 0.75)
    epsilon: float = 0.05  # nats per token that the general loss may rise
    warm: float = 2.0  # length of the run on general text; none with a given model
    points: int = 9  # measurements along a run
    settle: float = 0.2  # of a run, whose measurements do not count
    times: float = 1.0  # the critical fraction is wanted for so many times a run's tokens

    def __post_init__(self) -> None:
        if len(self.fractions) < 2 or not all(0 <= f <= 1 for f in self.fractions):
            raise ValueError("fractions are at least two numbers from 0 to 1")
        if self.epsilon <= 0 or self.points < 6 or not 0 <= self.settle < 0.5 or self.times <= 0:
            raise ValueError("epsilon and times are above 0, points at least 6, settle in [0, 0.5)")


TOY = Config(fractions=(0.25, 0.75), points=7)


class Cmr(Experiment):
    config: Config

    @property
    def _domain(self) -> str:
        smallest = min(self.setting.domains, key=lambda d: self.setting.domains[d])
        return self.setting.domain(self.config.domain) if self.config.domain else smallest

    @property
    def _general(self) -> list[str]:
        general = [d for d in self.setting.domains if d != self._domain]
        if not general:
            raise UserError(f"all text is of the domain {self._domain}; general text must stand beside it")
        return general

    def propose(self, runs: Sequence[Run]) -> list[Trial]:
        sizes = {d: self.setting.domains[d] for d in self._general}
        whole = sum(sizes.values())
        if not self.setting.given and (
            todo := left([Trial(name="start", weights=sizes, length=self.config.warm)], runs)
        ):
            return todo
        start = "" if self.setting.given else "start"
        trials = [
            Trial(
                name=f"fraction {r:.4g}",
                weights={self._domain: r} | {d: (1 - r) * s / whole for d, s in sizes.items()},
                start=start,
                points=self.config.points,
            )
            for r in self.config.fractions
        ]
        return left(trials, runs)

    def conclude(self, runs: Sequence[Run]) -> Conclusion:
        rows, records = [], []
        nats = math.log(2) * self.setting.bytes_per_token
        for r in self.config.fractions:
            run = by_name(runs)[f"fraction {r:.4g}"]
            (_, before), *curve = run.curve
            for tokens, losses in curve:
                if tokens > self.config.settle * curve[-1][0]:
                    records.append({"ratio": r, "tokens": tokens, "change": nats * self._change(before, losses)})
            domain = nats * (curve[-1][1][self._domain] - before[self._domain])
            rows.append({"fraction": r, "general_change": records[-1]["change"], "domain_change": domain})
        last = max(record["tokens"] for record in records)
        law = registry.build("law", f"cmr:epsilon={self.config.epsilon},unit={last}")
        fit = law.fit(records, seed=self.setting.seed)
        critical = law.critical_ratio(fit, self.config.times * last)
        ratio, low, high = (critical[k] for k in ("ratio", "low", "high"))
        sensitivity = [
            f"{e:g}: {law.__class__(type(law.config)(epsilon=e, unit=last)).critical_ratio(fit, last)['ratio']:.2f}"
            for e in (self.config.epsilon / 2, 2 * self.config.epsilon)
        ]
        rest = sum(self.setting.domains[d] for d in self._general)
        weights = {self._domain: ratio} | {d: (1 - ratio) * self.setting.domains[d] / rest for d in self._general}
        notes = [
            f"critical fraction of {self._domain} after {self.config.times * last:.3g} tokens: {ratio:.3f} "
            f"({low:.3f} to {high:.3f}) at epsilon {self.config.epsilon:g}; at other epsilons: {', '.join(sensitivity)}"
        ]
        if critical["censored"]:
            notes.append("it is a bound: no fraction, or every fraction that was tried, is feasible")
        return Conclusion(rows=rows, weights=weights, notes=tuple(notes))

    def _change(self, before: object, after: object) -> float:
        """Of the general domains' losses, each counted by its tokens."""
        rest = sum(self.setting.domains[d] for d in self._general)
        return sum(self.setting.domains[d] / rest * (after[d] - before[d]) for d in self._general)  # type: ignore[index]
