"""scaling-laws-unraveled: the loss at any size, number of steps and batch, with the critical batch that the loss sets.

    L = (N_c / N)^aN + (S_c / S_min)^aS,      S_min = S / (1 + B_crit(L) / B),      B_crit(L) = B* / L^(1/aB)

steps S of B tokens each. A batch far above B_crit wastes tokens, one far below wastes steps; at B = B_crit a run takes
twice the fewest steps and twice the fewest tokens. B_crit depends on the loss that is reached, so the equation holds L
on both sides; the right side falls as L rises, hence one root, found by bisection and Newton's steps, its gradient by
the implicit function theorem. `best_batch_rows`, `steps_for` and `critical_batch` answer what follows from it.

Su et al. 2024, arXiv:2403.06563 (Kaplan et al. 2020, arXiv:2001.08361, sections 5 and 6; McCandlish et al. 2018,
arXiv:1812.06162). Departs: converged models are out of reach, so size and steps are fitted jointly instead of N_c from
converged ones; B* spans many orders of magnitude, so the coordinate is B_crit at the loss `at_loss`; priors around the
exponents of Kaplan et al. (0.076, 0.76, 0.21) within a factor of three. The form says that a smaller batch never hurts
at equal tokens. Sweeps disagree, so rows of a smaller batch than the best of their size and tokens are dropped, aloud
(`below_best`).
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from scipy.optimize import nnls

from modicum.core.errors import UserError
from modicum.laws.curve import CurveLaw
from modicum.laws.fit import Fit
from modicum.laws.forms import LawConfig, Table
from modicum.laws.plan import RunSpec
from modicum.laws.table import Runs, as_table, to_columns

log = logging.getLogger(__name__)
CLAIM = {"figure": "33B predicted from models of 1M to 60M", "where": "abstract", "scale": "33B parameters"}
HALVINGS, NEWTON = 9, 4  # a bracket of e^8 shrinks to 1.6% of the loss, then to rounding


@dataclass(frozen=True, kw_only=True)
class Config(LawConfig):
    at_loss: float = 2.5  # the loss at which the critical batch is a parameter
    below_best: str = "drop"  # rows of a smaller batch than the best one of their size and tokens: drop or keep

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.at_loss <= 0 or self.below_best not in ("drop", "keep"):
            raise ValueError("at_loss must be above 0 and below_best be drop or keep")


TOY = Config(draws=300, below_best="keep")


class ScalingLawsUnraveled(CurveLaw):
    config: Config
    columns = ("parameters", "steps", "batch_tokens")
    coordinates: ClassVar[tuple[str, ...]] = (
        "log (N_c/N0)^aN",
        "log aN",
        "log (S_c/S0)^aS",
        "log aS",
        "log B_crit/B0",
        "log 1/aB",
    )
    example = {"N_c": 5e13, "aN": 0.076, "S_c": 2e3, "aS": 0.7, "B_crit": 4e5, "aB": 0.21}
    small_example = {"N_c": 3e11, "aN": 0.09, "S_c": 2e2, "aS": 0.7, "B_crit": 4e3, "aB": 0.25}

    # the curve --------------------------------------------------------------------------------------

    def _parts(self, theta_KP: np.ndarray, x: Table) -> tuple[np.ndarray, ...]:
        """n, s (terms at an unlimited batch), log B_crit/B at `at_loss`, aS and 1/aB."""
        n_KN = np.exp(theta_KP[:, 0:1] - np.exp(theta_KP[:, 1:2]) * np.log(x["parameters"]))
        power_K1 = np.exp(theta_KP[:, 3:4])
        s_KN = np.exp(theta_KP[:, 2:3] - power_K1 * np.log(x["steps"]))
        return n_KN, s_KN, theta_KP[:, 4:5] - np.log(x["batch_tokens"]), power_K1, np.exp(theta_KP[:, 5:6])

    def _batch_ratio(self, log_loss: np.ndarray, log_batch: np.ndarray, slope: np.ndarray) -> np.ndarray:
        """B_crit / B at a loss."""
        return np.exp(np.clip(log_batch - slope * (log_loss - np.log(self.config.at_loss)), -700, 700))

    def curve(self, theta_KP: np.ndarray, x: Table) -> np.ndarray:
        n_KN, s_KN, log_batch_KN, power_K1, slope_K1 = self._parts(theta_KP, x)
        low_KN = np.log(n_KN + s_KN)  # the batch only adds
        high_KN = low_KN + 8.0
        at_KN = (low_KN + high_KN) / 2
        for i in range(HALVINGS + NEWTON):
            ratio_KN = self._batch_ratio(at_KN, log_batch_KN, slope_K1)
            term_KN, loss_KN = s_KN * (1 + ratio_KN) ** power_K1, np.exp(at_KN)
            miss_KN = loss_KN - n_KN - term_KN
            low_KN, high_KN = np.where(miss_KN < 0, at_KN, low_KN), np.where(miss_KN < 0, high_KN, at_KN)
            middle_KN = (low_KN + high_KN) / 2
            # Near the root Newton's step doubles the digits; one that leaves the bracket is replaced by a halving.
            slope_KN = loss_KN + term_KN * power_K1 * slope_K1 * ratio_KN / (1 + ratio_KN)
            step_KN = at_KN - miss_KN / slope_KN
            near = (step_KN >= low_KN) & (step_KN <= high_KN) if i >= HALVINGS - 1 else False
            at_KN = np.where(near, step_KN, middle_KN)
        return at_KN

    def gradient(self, theta_KP: np.ndarray, x: Table) -> np.ndarray:
        n_KN, s_KN, log_batch_KN, power_K1, slope_K1 = self._parts(theta_KP, x)
        log_loss_KN = self.curve(theta_KP, x)
        ratio_KN = self._batch_ratio(log_loss_KN, log_batch_KN, slope_K1)
        step_KN = s_KN * (1 + ratio_KN) ** power_K1
        by_batch_KN = step_KN * power_K1 * ratio_KN / (1 + ratio_KN)  # d right / d log share
        above_KN = log_loss_KN - np.log(self.config.at_loss)
        direct = [
            n_KN,
            -n_KN * np.exp(theta_KP[:, 1:2]) * np.log(x["parameters"]),
            step_KN,
            step_KN * power_K1 * (np.log1p(ratio_KN) - np.log(x["steps"])),
            by_batch_KN,
            -by_batch_KN * slope_K1 * above_KN,
        ]
        return np.stack(direct, axis=2) / (np.exp(log_loss_KN) + by_batch_KN * slope_K1)[..., None]

    # fitting ----------------------------------------------------------------------------------------

    def fit(self, runs: Runs, seed: int = 0) -> Fit:
        given = to_columns(runs)
        if self.config.below_best == "drop" and {*self.columns, "loss"} <= given.keys():
            keep_N, best = best_batch_rows(as_table(given, self.columns))
            if not keep_N.all():
                log.warning("%d of %d rows have a smaller batch than the best; dropped", (~keep_N).sum(), len(keep_N))
                log.info("best batch by size and tokens: %s", best)
                given = {n: [v for v, keep in zip(c, keep_N, strict=True) if keep] for n, c in given.items()}
        return super().fit(given, seed)

    def priors(self, x: Table) -> tuple[np.ndarray, np.ndarray]:
        mean = np.log(x["loss"]).mean()
        return (
            np.array([mean - 0.2, np.log(0.076), mean - 1.6, np.log(0.76), 0.0, np.log(1 / 0.21)]),
            np.array([0.4, 0.5, 1.0, 0.5, 2.0, 0.5]),
        )

    def starts(self, x: Table) -> np.ndarray:
        loss_N, starts = x["loss"], []
        for a_n in (0.04, 0.07, 0.11, 0.17):
            for a_s in (0.35, 0.6, 1.0):
                for batch in (-3.0, -1.0, 0.5, 2.0):
                    for slope in (2.5, 5.0, 9.0):
                        ratio_N = self._batch_ratio(np.log(loss_N), batch - np.log(x["batch_tokens"]), np.array(slope))
                        basis_N2 = np.stack([x["parameters"] ** -a_n, (x["steps"] / (1 + ratio_N)) ** -a_s], axis=1)
                        terms_2, misfit = nnls(basis_N2 / loss_N[:, None], np.ones_like(loss_N))
                        n, s = np.log(np.maximum(terms_2, 1e-3 * loss_N.mean()))
                        starts.append((misfit, [n, np.log(a_n), s, np.log(a_s), batch, np.log(slope)]))
        starts.sort(key=lambda item: item[0])
        return np.array([theta for _, theta in starts[:6]] + [self.priors(x)[0]])

    def to_parameters(self, theta_KP: np.ndarray, reference: dict[str, float]) -> dict[str, np.ndarray]:
        a_n, a_s = np.exp(theta_KP[:, 1]), np.exp(theta_KP[:, 3])
        return {
            "N_c": np.exp(np.clip(theta_KP[:, 0] / a_n, -300, 300)) * reference["parameters"],
            "aN": a_n,
            "S_c": np.exp(np.clip(theta_KP[:, 2] / a_s, -300, 300)) * reference["steps"],
            "aS": a_s,
            "B_crit": np.exp(theta_KP[:, 4]) * reference["batch_tokens"],
            "aB": np.exp(-theta_KP[:, 5]),
        }

    def from_parameters(self, parameters: dict[str, float], reference: dict[str, float]) -> np.ndarray:
        p = parameters
        return np.array(
            [
                p["aN"] * np.log(p["N_c"] / reference["parameters"]),
                np.log(p["aN"]),
                p["aS"] * np.log(p["S_c"] / reference["steps"]),
                np.log(p["aS"]),
                np.log(p["B_crit"] / reference["batch_tokens"]),
                -np.log(p["aB"]),
            ]
        )

    def toy_points(self, n: int = 6, scale: float = 1.0) -> dict[str, np.ndarray]:
        size, steps, batch = np.meshgrid(
            np.geomspace(1e7, 1e9, n // 2 + 1),
            np.geomspace(1e3, 1e5, n // 2 + 1),
            np.geomspace(5e4, 4e6, 3),
            indexing="ij",
        )
        points = {"parameters": scale * size.ravel(), "steps": scale**0.5 * steps.ravel()}
        points["batch_tokens"] = scale**0.5 * batch.ravel()
        return points | {"tokens": points["steps"] * points["batch_tokens"]}

    # what follows -----------------------------------------------------------------------------------

    def runs(self, flops: float) -> list[RunSpec]:
        """Four sizes at five batches each, the rate constant: iso-loss points of several batches show B_crit."""
        run_flops = flops / 20
        specs = []
        for i in range(4):
            size = np.sqrt(run_flops / 120) / 2**i
            tokens = run_flops / (6 * size)
            specs += [
                RunSpec(
                    parameters=float(size),
                    tokens=float(tokens),
                    batch_tokens=float(tokens / steps),
                    schedule="constant",
                    checkpoints=50,
                    why="the same loss at several batches gives the critical batch",
                )
                for steps in (500, 1000, 2000, 4000, 8000)
            ]
        return specs

    def critical_batch(self, parameters: dict[str, float], loss: float) -> float:
        """B_crit in tokens at a loss: a run of this batch takes twice the fewest steps and twice the fewest tokens."""
        return float(parameters["B_crit"] * (loss / self.config.at_loss) ** (-1 / parameters["aB"]))

    def steps_for(self, parameters: dict[str, float], size: float, batch_tokens: float, loss: float) -> float:
        """Steps that reach `loss`. Raises UserError where a model of this size never does."""
        left = loss - (parameters["N_c"] / size) ** parameters["aN"]
        if left <= 0:
            raise UserError(f"{size:.3g} parameters never reach {loss}: their lowest loss is {loss - left:.3f}")
        fewest = parameters["S_c"] * left ** (-1 / parameters["aS"])
        return float(fewest * (1 + self.critical_batch(parameters, loss) / batch_tokens))


def best_batch_rows(table: Table) -> tuple[np.ndarray, dict[Any, float]]:
    """Rows (N) whose batch is at least the best of their size and tokens, and that batch by (parameters, tokens)."""
    tokens_N = table["steps"] * table["batch_tokens"]
    keep_N, best = np.ones(len(tokens_N), bool), {}
    cells: dict[Any, list[int]] = {}
    for i, key in enumerate(zip(table["parameters"], np.round(np.log(tokens_N), 1), strict=True)):
        cells.setdefault(key, []).append(i)
    for (size, log_tokens), picked in cells.items():
        rows = np.array(picked)
        batches = table["batch_tokens"][rows]
        if len(np.unique(batches)) >= 3:
            best[float(size), float(np.exp(log_tokens))] = at = float(batches[np.argmin(table["loss"][rows])])
            keep_N[rows] = batches >= at
    return keep_N, best
