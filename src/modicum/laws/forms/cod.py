"""cod: a benchmark's score from groups of items of like difficulty, of which only the predictable are extrapolated.

1. an item's difficulty vector: its pass rates over the models fitted, smallest first;
2. items are clustered by mean shift with a bounded diameter and at least `min_items` members; the rest are outliers;
3. in every cluster y(C) = g + (1 - g) exp(-a C^-b - c) is fitted, g free; clusters that rise (b > 0.1, c < 1) are the
   predictable subset, whose score at C is their mean, weighted by items;
4. a monotone cubic map through (0, 0) and (1, 1), knots added until its error is below 0.005, takes the subset's score
   to the whole set's; it is calibrated on the models fitted.

The score of a set is the mean of pass rates of very different items, which no single curve describes; within a cluster
one does. Rows give `item`, flops and score (a pass rate, or the probability of the right choice: the soft variant).

Xu et al. 2025, arXiv:2502.17262 (ICLR 2026), sections 3 and 4. Departs: their filter a > 1 depends on the unit of
compute; here a cluster counts if its fitted curve rises by more than two standard errors over the models fitted.
Curves are fitted by `end-to-end` (robust, with priors). The map is not calibrated on outside models. A prediction
whose subset score lies above all that were seen leaves the calibrated part of the map (`Fit.extra["mapped_to"]`),
which goes on to (1, 1): it promises too much where some items are never solved.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.interpolate import PchipInterpolator
from scipy.optimize import nnls

from modicum.core.errors import UserError, unknown
from modicum.laws.fit import Fit, Prediction
from modicum.laws.forms import Law, ScoreConfig
from modicum.laws.forms import end_to_end as curve
from modicum.laws.table import Runs, as_table, to_columns

CLAIM = {
    "figure": "1.55% mean error on eight sets, against 3.10% end to end",
    "where": "ICLR version, Table 1",
    "scale": "70B from models of 122M to 12B",
}


@dataclass(frozen=True, kw_only=True)
class Config(ScoreConfig):
    radius: float = 0.1  # of a cluster, per model: root mean square distance of pass rates from its centre
    min_items: int = 10
    seeds: int = 256  # items from which means are shifted
    exponent: float = 0.4
    map_error: float = 0.005

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.radius <= 0 or self.min_items < 1 or self.seeds < 1:
            raise ValueError("radius must be above 0, min_items and seeds at least 1")


TOY = Config(draws=200)
SWEEP = ("min_items=2",)  # in the published tables tasks are the items, fewer than ten of them


class Cod(Law):
    config: Config
    of_sets = True
    target = "score"
    columns = ("flops",)

    def _curve(self) -> curve.EndToEnd:
        shared = {f.name for f in dataclasses.fields(curve.Config)}
        return curve.EndToEnd(
            curve.Config(**{n: v for n, v in dataclasses.asdict(self.config).items() if n in shared} | {"chance": None})
        )

    def fit(self, runs: Runs, seed: int = 0) -> Fit:
        flops_M, rates_IM = difficulty(runs)
        if len(flops_M) < 4:
            raise UserError(f"{len(flops_M)} models do not determine the four parameters of a cluster; give at least 4")
        labels_I = cluster(rates_IM, self.config.radius, self.config.min_items, self.config.seeds, seed)
        law, kept = self._curve(), []
        for label in range(int(labels_I.max()) + 1):
            members = labels_I == label
            mean_M = rates_IM[members].mean(0)
            items = np.full(len(flops_M), float(members.sum()))
            fitted = law.fit({"flops": flops_M, "score": mean_M, "items": items}, seed)
            if self._rises(law, fitted, flops_M, int(members.sum())):
                kept.append((label, int(members.sum()), fitted))
        if not kept:
            raise UserError(
                f"none of {int(labels_I.max()) + 1} clusters of items rises with compute; the models are at chance, "
                "or radius and min_items do not suit these items"
            )
        weight_C = np.array([size for _, size, _ in kept], float)
        weight_C /= weight_C.sum()
        subset = np.isin(labels_I, [label for label, _, _ in kept])
        subset_M, full_M = rates_IM[subset].mean(0), rates_IM.mean(0)
        knots_2K = monotone_map(subset_M, full_M, self.config.map_error)
        mapped_M = PchipInterpolator(*knots_2K)(subset_M)
        flat = int((labels_I >= 0).sum() - subset.sum())
        return Fit(
            law="cod",
            target="score",
            parameters={
                "clusters": float(labels_I.max() + 1),
                "predictable_clusters": float(len(kept)),
                "predictable_items": float(subset.sum()),
                "flat_items": float(flat),
                "outliers": float((labels_I < 0).sum()),
            },
            points=int(rates_IM.size),
            runs=len(flops_M),
            seed=seed,
            range={"flops": (float(flops_M.min()), float(flops_M.max()))},
            residual=float(np.abs(mapped_M - full_M).mean()),
            knobs=dataclasses.asdict(self.config),
            extra={
                "weights": weight_C.tolist(),
                "curves": [fitted.as_dict() for _, _, fitted in kept],
                "knots": knots_2K.tolist(),
                "mapped_to": float(subset_M.max()),
                "map_spread": float(max(np.abs(mapped_M - full_M).std(), self.config.map_error)),
                "items": len(labels_I),
            },
        )

    def _rises(self, law: curve.EndToEnd, fitted: Fit, flops_M: np.ndarray, size: int) -> bool:
        ends = law.value(fitted.parameters, {"flops": flops_M[[0, -1]]})
        error = np.sqrt(0.25 / size + fitted.residual**2)
        p = fitted.parameters
        return bool(p["b"] > 0.1 and p["c"] < 1 and ends[1] - ends[0] > 2 * min(error, 0.05))

    def predict(self, fit: Fit, points: Runs, level: float = 0.95) -> Prediction:
        law = self._curve()
        flops = {"flops": as_table(points, ("flops",), target=None)["flops"]}
        fits = [Fit.from_dict(record) for record in fit.extra["curves"]]
        to_full = PchipInterpolator(*np.array(fit.extra["knots"]))
        rng = np.random.default_rng(fit.seed + 3)
        subset_N = np.zeros(len(flops["flops"]))
        drawn_KN = np.zeros((2000, len(subset_N)))
        shared_K = rng.normal(size=2000)
        for weight, fitted in zip(fit.extra["weights"], fits, strict=True):
            values_KN = law.curve_at(fitted, flops)
            subset_N += weight * values_KN.mean(0)
            some_KN = values_KN[rng.integers(len(values_KN), size=2000)]
            drawn_KN += weight * (some_KN + shared_K[:, None] * law.drift_at(fitted, flops))
        drawn_KN = to_full(np.clip(drawn_KN, 0, 1))
        noise_K = rng.normal(size=2000) * np.hypot(fit.extra["map_spread"], self.config.noise / 2)
        low_N, high_N = fit.interval(np.clip(drawn_KN + noise_K[:, None], 0, 1), level)
        return Prediction(to_full(np.clip(subset_N, 0, 1)), low_N, high_N, level)

    def simulate(self, rng: np.random.Generator, *, noise: float = 0.0) -> tuple[dict[str, Any], dict[str, Any]]:
        """Three groups of 60 items that are solved at different compute, and 30 that stay at chance."""
        law, flops = self._curve(), np.geomspace(1e17, 1e20, 7)
        groups = [{"g": 0.25, "a": 1e18**0.4 * scale, "b": 0.4, "c": 0.05} for scale in (0.1, 0.6, 3.0)]

        def rates(at: np.ndarray) -> np.ndarray:
            rows = [law.value(p, {"flops": at}) for p in groups for _ in range(60)]
            return np.array(rows + [np.full(len(at), 0.25)] * 30)

        clean_IM = rates(flops)
        given_IM = rng.binomial(40, clean_IM) / 40 if noise else clean_IM
        items, models = np.meshgrid(np.arange(len(clean_IM)), np.arange(len(flops)), indexing="ij")
        runs = {"item": items.ravel().tolist(), "flops": flops[models.ravel()], "score": given_IM.ravel()}
        runs["family"] = [f"part {i % 3}" for i in items.ravel()]
        far = np.geomspace(1.5e20, 3e20, 3)
        return runs, {"flops": far, "score": rates(far).mean(0), "item": ["all"] * 3}


def difficulty(runs: Runs) -> tuple[np.ndarray, np.ndarray]:
    """FLOPs of the models (M), rising, and the pass rate of each item under each (I x M).

    Rows of one item and one compute are averaged. Raises UserError where an item lacks a model.
    """
    given = to_columns(runs)
    if "item" not in given:
        raise unknown("column", "item", given, "cod needs one row per item and model")
    table = as_table(given, ("flops",), target="score")
    names = list(dict.fromkeys(str(v) for v in given["item"]))
    index = {name: i for i, name in enumerate(names)}
    flops_M, model_N = np.unique(table["flops"], return_inverse=True)
    item_N = np.array([index[str(v)] for v in given["item"]])
    total_IM, count_IM = np.zeros((2, len(names), len(flops_M)))
    np.add.at(total_IM, (item_N, model_N), table["score"])
    np.add.at(count_IM, (item_N, model_N), 1)
    if (count_IM == 0).any():
        i, m = np.argwhere(count_IM == 0)[0]
        raise UserError(
            f"item {names[i]!r} has no score under the model of {flops_M[m]:.3g} FLOPs; "
            "every model must answer every item"
        )
    return flops_M, total_IM / count_IM


def cluster(rates_IM: np.ndarray, radius: float, min_items: int, seeds: int, seed: int = 0) -> np.ndarray:
    """Label of each item, -1 for outliers: flat-kernel mean shift, no member further than `radius` from its centre.

    Distances are root mean squares over models, so a cluster's diameter is at most two radii whatever their number.
    """
    order = np.lexsort(rates_IM.T)  # items in an order of their own: the result does not depend on the rows'
    rng = np.random.default_rng(seed)
    start = order[np.sort(rng.permutation(len(order))[: min(seeds, len(order))])]
    centre_SM = rates_IM[start].copy()
    for _ in range(50):
        distance_SI = np.sqrt(((centre_SM[:, None] - rates_IM[None]) ** 2).mean(2))
        near_SI = distance_SI <= radius
        moved_SM = (near_SI @ rates_IM) / np.maximum(near_SI.sum(1), 1)[:, None]
        moved_SM = np.where(near_SI.any(1)[:, None], moved_SM, centre_SM)
        if np.abs(moved_SM - centre_SM).max() < 1e-6:
            break
        centre_SM = moved_SM
    population_S = (np.sqrt(((centre_SM[:, None] - rates_IM[None]) ** 2).mean(2)) <= radius).sum(1)
    modes: list[np.ndarray] = []
    for s in np.argsort(-population_S, kind="stable"):
        if all(np.sqrt(((centre_SM[s] - mode) ** 2).mean()) > radius for mode in modes):
            modes.append(centre_SM[s])
    distance_CI = np.sqrt(((np.array(modes)[:, None] - rates_IM[None]) ** 2).mean(2))
    label_I = np.where(distance_CI.min(0) <= radius, distance_CI.argmin(0), -1)
    sizes = np.bincount(label_I[label_I >= 0], minlength=len(modes))
    kept = {int(c): i for i, c in enumerate(np.flatnonzero(sizes >= min_items))}
    return np.array([kept.get(int(c), -1) for c in label_I])


def monotone_map(x_M: np.ndarray, y_M: np.ndarray, error: float) -> np.ndarray:
    """Knots (2 x K) of a rising cubic from (0, 0) to (1, 1) near the points; more of them until RMSE < error."""
    order = np.argsort(x_M)
    x_M, y_M = x_M[order], y_M[order]
    best = np.array([[0.0, 1.0], [0.0, 1.0]])
    for inner in range(1, max(len(np.unique(x_M)) - 1, 2)):
        at = np.unique(
            np.concatenate([[0.0], np.quantile(x_M, np.linspace(0, 1, inner + 1)).clip(1e-6, 1 - 1e-6), [1.0]])
        )
        hats_MK = np.stack([np.interp(x_M, at, np.eye(len(at))[k]) for k in range(len(at))], axis=1)
        rising_KK = np.tril(np.ones((len(at), len(at))))  # knot values are sums of increments, none negative
        rows = np.vstack([(hats_MK @ rising_KK)[:, 1:], 1e3 * np.ones((1, len(at) - 1))])
        grown, _ = nnls(rows, np.concatenate([y_M, [1e3]]))
        best = np.array([at, np.concatenate([[0.0], np.cumsum(grown) / grown.sum()])])
        if np.sqrt(((PchipInterpolator(*best)(x_M) - y_M) ** 2).mean()) < error:
            break
    return best
