"""flatness: how sharp a model's loss is where it stands, and whether it stands at a minimum at all.

    hessian  = Tr H of the loss per token      (Hutchinson, by double backward)
    fisher   = E_x E_{y ~ p} |grad log p(y|x)|^2, labels drawn from the model       = Tr H at the optimum of the text
    excess   = hessian - fisher                no longer zero where the text is not what the model has learnt

Among models of equal loss the flatter one (smaller trace) is said to transfer better; the loss cannot tell them apart.
Traces of models of different size or parametrisation are not comparable: `per_parameter` divides by the number of
parameters, `scaled` weights every tensor's part with its squared norm, which a rescaling of weights before a norm
leaves alone. The effect that the probe looks for: the interval of `excess` excludes zero, so the model is not at its
minimum on this text, and the Fisher trace says nothing of the Hessian.

Liu, Xie, Li & Ma 2023, arXiv:2210.14199 (ICML 2023); `fisher` is their estimate of the trace at the minimum, from
memory of the paper. Departs: `scaled` is this project's; on real text the probe is a diagnostic, the paper's claim is
about saturated models of small languages. Needs gradients: texts are a prompt with its right choice, to 256 tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from scipy import stats

from modicum.core.errors import UserError
from modicum.evaluate.probes import Asked, Graded, Grader, Item, Probe, Report, ask

CLAIM = {
    "figure": "trace of the Hessian orders transfer, loss does not",
    "where": "section 4",
    "scale": "PCFG, HMM, OPT",
}
LEAST = 8  # texts of which an interval is given


@dataclass(frozen=True, kw_only=True)
class Config:
    probes: int = 4  # sign vectors per text

    def __post_init__(self) -> None:
        if self.probes < 1:
            raise ValueError(f"probes={self.probes} must be at least 1")


class Flatness(Probe):
    config: Config
    needs: ClassVar[str] = "gradients"

    def run(self, items: Sequence[Item], grade: Grader, budget: int, seed: int = 0) -> Report:
        picked = list(items)[:budget]
        if len(picked) < LEAST:
            raise UserError(
                f"a trace needs {LEAST} texts or more; {len(items)} items and a budget of {budget} give too few"
            )
        rows = [
            (i.id, g.nats) for i, g in zip(picked, grade([ask(i) for i in picked]), strict=True) if len(g.nats) == 5
        ]
        if len(rows) < LEAST:
            raise UserError(
                "flatness needs a grader with gradients (evaluate.curvature.grader), and texts of two tokens"
            )
        loss_N, hessian_N, fisher_N, scaled_N, count_N = np.array([values for _, values in rows]).T
        figures = {
            "loss": interval(loss_N),
            "hessian": interval(hessian_N),
            "fisher": interval(fisher_N),
            "per_parameter": interval(fisher_N / count_N),
            "scaled": interval(scaled_N),
            "excess": interval(hessian_N - fisher_N),
        }
        away = figures["excess"]["low"] > 0 or figures["excess"]["high"] < 0
        trace = figures["fisher"]
        verdict = (
            f"{'not at its minimum on this text' if away else 'at a minimum as far as the traces tell'}: "
            f"Fisher trace {trace['value']:.4g} ({trace['low']:.4g} to {trace['high']:.4g}), "
            f"Hessian trace {figures['hessian']['value']:.4g}"
        )
        names = ("loss", "hessian", "fisher", "scaled")
        return Report(
            figures=figures,
            detected=away,
            verdict=verdict,
            graded=len(picked),
            rows=[{"id": key} | dict(zip(names, values[:4], strict=True)) for key, values in rows],
        )

    def simulate(self, rng: np.random.Generator, effect: bool) -> tuple[list[Item], Grader, int]:
        """A small network of the next symbol, on chains of its own (its optimum), or on chains it finds unlikely."""
        import torch

        from modicum.evaluate.curvature import SymbolNet, curvature

        size, symbols, length = 8, 6, 24
        generator = torch.Generator().manual_seed(int(rng.integers(2**31)))
        net = SymbolNet(symbols, size, generator)
        table = net.next_probabilities(-1.0 if effect else 1.0)
        items = []
        for number in range(64):
            chain = [int(rng.integers(symbols))]
            while len(chain) <= length:
                chain.append(int(rng.choice(symbols, p=table[chain[-1]])))
            items.append(Item(str(number), " ".join(map(str, chain)), ("", ""), 0))

        def grade(prompts: Sequence[Asked]) -> list[Graded]:
            graded = []
            for one in prompts:
                ids = torch.tensor([[int(word) for word in one.item.question.split()]])
                at = curvature(net, ids, torch.Generator().manual_seed(int(one.item.id)), probes=self.config.probes)
                graded.append(Graded(True, (at.loss, at.hessian, at.fisher, at.scaled, float(at.parameters))))
            return graded

        return items, grade, 64


def interval(values_N: np.ndarray, level: float = 0.95) -> dict[str, float]:
    """Mean with Student's interval over texts."""
    mean, error = float(values_N.mean()), float(values_N.std(ddof=1) / np.sqrt(len(values_N)))
    reach = float(stats.t.ppf((1 + level) / 2, len(values_N) - 1)) * error
    return {"value": mean, "low": mean - reach, "high": mean + reach}
