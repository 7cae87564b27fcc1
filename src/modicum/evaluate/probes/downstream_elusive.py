"""downstream-elusive: where along the way from log-likelihood to accuracy a benchmark's link with scale is lost.

    log p_vocab(c)  = sum of the tokens' log-probabilities of the right choice
    p_choices(c)    = p_vocab(c) / sum_j p_vocab(j)            whole choices, not by length
    accuracy        = [c is the largest of them],       Brier = sum_j ([j = c] - p_choices(j))^2

For every ITEM each score is correlated with log compute over the models of a family; the distribution over items of
these correlations is the result, as medians (averaging the scores first hides the effect) and as a curve of how many
items lie above each value. A score falls apart where mass on particular wrong choices fluctuates: the second part
correlates, over models, the mass on the likeliest wrong choice with that on the right one.

Schaeffer et al. 2024, arXiv:2406.04391. Departs: families of a few models give correlations of few values, so
checkpoints may stand in for models; intervals are bootstraps over items. The effect is there if the correlation is lost
on the way to p_choices: that accuracy, a step, loses some more is true of any model.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import kendalltau, pearsonr, spearmanr

from modicum.core.errors import UserError
from modicum.evaluate.probes import Asked, Graded, Grader, Item, Probe, Report, ask

CLAIM = {
    "figure": "each step away from log-likelihood lowers the correlation",
    "where": "Figure 3",
    "scale": "5 families",
}
CHAIN = ("log_p_vocab", "log_p_choices", "p_choices", "brier", "accuracy")
CORRELATIONS = {"spearman": spearmanr, "pearson": pearsonr, "kendall": kendalltau}


@dataclass(frozen=True, kw_only=True)
class Config:
    correlation: str = "spearman"  # spearman, pearson or kendall
    resamples: int = 500

    def __post_init__(self) -> None:
        if self.correlation not in CORRELATIONS or self.resamples < 10:
            raise ValueError(f"correlation must be one of {', '.join(CORRELATIONS)}, resamples at least 10")


class DownstreamElusive(Probe):
    config: Config

    def run(self, items: Sequence[Item], grade: Grader, budget: int, seed: int = 0) -> Report:
        by_id: dict[str, list[Item]] = {}
        for item in items:
            if item.compute is None:
                raise UserError(
                    f"item {item.id} of model {item.model or '?'} has no compute; correlate with scale needs it"
                )
            by_id.setdefault(item.id, []).append(item)
        models = max(len({i.model for i in group}) for group in by_id.values())
        if models < 4:
            raise UserError(f"{models} models or checkpoints give no correlation; four or more are needed")
        whole = [group for group in by_id.values() if len(group) == models][: budget // models]
        if not whole:
            raise UserError(f"a budget of {budget} gradings covers no item under all {models} models")
        prompts = [ask(item) for group in whole for item in group]
        graded = grade(prompts)
        rows, wrong = [], []
        for g, group in enumerate(whole):
            scores = [chain(graded[g * models + m].nats, group[m].right) for m in range(models)]
            compute = np.log([float(item.compute or 1.0) for item in group])
            rows.append({name: abs(self._link(compute, [s[name] for s in scores])) for name in CHAIN})
            wrong.append(self._link([s["p_choices"] for s in scores], [s["p_wrong"] for s in scores]))
        rng = np.random.default_rng(seed)
        figures: dict[str, dict[str, float]] = {}
        values = {name: np.array([row[name] for row in rows]) for name in CHAIN}
        for name, column in values.items():
            drawn = [
                np.median(column[rng.integers(len(column), size=len(column))]) for _ in range(self.config.resamples)
            ]
            low, high = np.quantile(drawn, [0.025, 0.975])
            figures[name] = {"value": float(np.median(column)), "low": float(low), "high": float(high)}
        lost = values["log_p_vocab"] - values["p_choices"]
        drawn = [np.median(lost[rng.integers(len(lost), size=len(lost))]) for _ in range(self.config.resamples)]
        figures["lost"] = {"value": float(np.median(lost))} | dict(
            zip(("low", "high"), map(float, np.quantile(drawn, [0.025, 0.975])), strict=True)
        )
        figures["wrong_with_right"] = {"value": float(np.median(wrong)), "low": min(wrong), "high": max(wrong)}
        detected = figures["lost"]["low"] > 0.05
        verdict = (
            f"median correlation with scale falls from {figures['log_p_vocab']['value']:.2f} (log p) to "
            f"{figures['accuracy']['value']:.2f} (accuracy)" + ("" if detected else ": no clear loss")
        )
        ids = [group[0].id for group in whole]
        return Report(
            figures=figures,
            detected=bool(detected),
            verdict=verdict,
            graded=len(prompts),
            rows=[{"id": i} | row for i, row in zip(ids, rows, strict=True)],
        )

    def _link(self, a: Any, b: Any) -> float:
        if np.ptp(a) == 0 or np.ptp(b) == 0:
            return 0.0
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return float(CORRELATIONS[self.config.correlation](a, b)[0])

    def simulate(self, rng: np.random.Generator, effect: bool) -> tuple[list[Item], Grader, int]:
        """Right mass rises smoothly with compute; wrong mass fluctuates by model and item, or falls as smoothly."""
        models = [(f"m{i}", 10.0**i) for i in range(8)]
        items = [
            Item(str(i), f"question {i}", ("a", "b", "c", "d"), 0, name, compute)
            for i in range(80)
            for name, compute in models
        ]
        ease = {str(i): float(rng.uniform(-1, 1)) for i in range(80)}

        def grade(prompts: Sequence[Asked]) -> list[Graded]:
            rows = []
            for a in prompts:
                scale = float(np.log10(a.item.compute or 1)) + 0.05 * float(rng.normal())
                right = -12 + ease[a.item.id] + 0.4 * scale
                wrong = rng.normal(size=3) * 1.5 + right if effect else -9.5 - 0.4 * scale + 0.02 * rng.normal(size=3)
                # without the effect accuracy flips once, in the middle of the range: it follows scale like the rest
                rows.append(Graded(bool(right > max(wrong)), (right, *map(float, wrong))))
            return rows

        return items, grade, len(items)


def chain(nats: Sequence[float], right: int) -> dict[str, float]:
    """The scores of one item under one model, from whole-choice log-likelihoods in nats."""
    values = np.asarray(nats, dtype=float)
    weights = np.exp(values - values.max())
    weights /= weights.sum()
    others = np.delete(weights, right)
    return {
        "log_p_vocab": float(values[right]),
        "log_p_choices": float(np.log(max(weights[right], 1e-300))),
        "p_choices": float(weights[right]),
        "brier": float(((weights - (np.arange(len(weights)) == right)) ** 2).sum()),
        "accuracy": float(values.argmax() == right),
        "p_wrong": float(others.max()),
    }
