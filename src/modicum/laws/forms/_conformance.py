"""What must hold for any law: it recovers its own data, its intervals are honest, its optimum is one."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from modicum.core import registry
from modicum.core.errors import UserError
from modicum.laws.fit import Fit
from modicum.laws.forms import Law
from modicum.laws.table import as_table


def _law(key: str) -> Law:
    loaded = registry.load("law", key)
    law: Law = loaded.cls(getattr(loaded.module, "TOY", loaded.config()))
    return law


def _grid(n: int = 6, low: float = 1.0) -> dict[str, np.ndarray]:
    sizes, tokens = np.meshgrid(low * np.geomspace(1e7, 1e9, n), low * np.geomspace(2e8, 2e10, n))
    return {
        "parameters": sizes.ravel(),
        "tokens": tokens.ravel(),
        "flops": 6 * sizes.ravel() * tokens.ravel(),
    }


def _runs(law: Law, noise: float, seed: int, **grid: Any) -> dict[str, np.ndarray]:
    points = _grid(**grid)
    clean = law.value(law.example, points)
    return points | {"loss": clean * np.exp(noise * np.random.default_rng(seed).normal(size=len(clean)))}


def check_recovers_its_parameters(key: str) -> None:
    law = _law(key)
    runs = _runs(law, 0.0, 0)
    found = law.fit(runs)
    for name, truth in law.example.items():
        assert abs(np.log(found.parameters[name] / truth)) < 0.15, (
            f"{name}: fitted {found.parameters[name]:.4g}, generated with {truth:.4g}"
        )
    far = {n: 4 * v for n, v in _grid().items()}
    far["flops"] = 6 * far["parameters"] * far["tokens"]
    error = np.abs(law.predict(found, far).mean / law.value(law.example, far) - 1).max()
    assert error < 0.01, f"noise-free data, 4x larger runs: prediction off by {error:.2%}"


def check_truth_within_spread(key: str) -> None:
    law = _law(key)
    found = law.fit(_runs(law, 0.005, 1), seed=3)
    sd = dict(zip(found.parameters, np.sqrt(np.diag(found.covariance_QQ)), strict=True))
    for name, truth in law.example.items():
        off = abs(found.parameters[name] - truth) / sd[name]
        assert np.isfinite(sd[name]) and sd[name] > 0 and off < 4, f"{name} is {off:.1f} standard deviations off"


def check_gradient(key: str) -> None:
    law = _law(key)
    x = {n: np.array([0.2, 1.0, 7.0]) for n in ("parameters", "tokens", "flops")}
    theta = law.from_parameters(law.example, {n: 1e7 for n in x})
    theta_KP = np.stack([theta, theta + 0.1])
    given_KNP, step = law.gradient(theta_KP, x), 1e-6
    assert given_KNP.shape == (2, 3, len(theta)), f"the gradient's shape is {given_KNP.shape}, not KNP"
    for p in range(len(theta)):
        shift = np.eye(len(theta))[p] * step
        numeric = (law.log_loss(theta_KP + shift, x) - law.log_loss(theta_KP - shift, x)) / (2 * step)
        assert np.allclose(given_KNP[:, :, p], numeric, rtol=1e-4, atol=1e-8), (
            f"d log loss / d {law.coordinates[p]} is {given_KNP[:, :, p]}, finite differences give {numeric}"
        )


def check_parameters_round_trip(key: str) -> None:
    law = _law(key)
    reference = {n: 3e8 for n in law.reads}
    theta = law.from_parameters(law.example, reference)
    back = law.to_parameters(theta[None], reference)
    for name, truth in law.example.items():
        assert np.isclose(back[name][0], truth), f"{name}: {truth} came back as {back[name][0]}"


def check_interval(key: str) -> None:
    law = _law(key)
    found = law.fit(_runs(law, 0.01, 2, n=3))
    near, far = {n: v[-1:] for n, v in _grid(3).items()}, {n: 100 * v[-1:] for n, v in _grid(3).items()}
    narrow, wide = law.predict(found, near, 0.5), law.predict(found, near, 0.95)
    assert wide.low[0] < narrow.low[0] <= narrow.mean[0] <= narrow.high[0] < wide.high[0], "levels are not nested"
    outside = law.predict(found, far, 0.95)
    assert (outside.high - outside.low)[0] / outside.mean[0] > (wide.high - wide.low)[0] / wide.mean[0], (
        "the interval does not widen with the distance from the fitted runs"
    )


def check_three_runs_suffice(key: str) -> None:
    """Few runs must give a finite, wide-enough answer rather than an error or a false certainty."""
    law, inside = _law(key), []
    for seed in range(8):
        rng = np.random.default_rng(seed)
        sizes, tokens = np.array([3e5, 6e5, 1.2e6, 4e6]), np.array([4e5, 1e6, 1.2e6, 5e6])
        points = {"parameters": sizes, "tokens": tokens, "flops": 6 * sizes * tokens}
        example = {n: v * float(np.exp(0.05 * rng.normal())) for n, v in law.small_example.items()}
        loss = law.value(example, points) * np.exp(0.006 * rng.normal(size=4))
        found = law.fit({n: v[:3] for n, v in (points | {"loss": loss}).items()}, seed)
        answer = law.predict(found, {n: v[3:] for n, v in points.items()})
        inside.append(bool(answer.low[0] <= loss[3] <= answer.high[0]))
        assert (answer.high - answer.low)[0] < answer.mean[0], "the interval says nothing"
    assert sum(inside) >= 6, f"the 95% interval from three runs held the truth {sum(inside)} times of 8"


def check_deterministic_and_order_free(key: str) -> None:
    law = _law(key)
    runs = _runs(law, 0.005, 4, n=4)
    order = np.random.default_rng(0).permutation(len(runs["loss"]))
    first, again = law.fit(runs, 7), law.fit(runs, 7)
    assert np.array_equal(first.draws_KP, again.draws_KP), "the same seed gave other draws"
    shuffled = law.fit({n: v[order] for n, v in runs.items()}, 7)
    for name, value in first.parameters.items():
        assert np.isclose(value, shuffled.parameters[name], rtol=2e-2), f"{name} depends on the order of the rows"


def check_stored_fit_predicts_the_same(key: str) -> None:
    law = _law(key)
    found = law.fit(_runs(law, 0.005, 5, n=3))
    again = Fit.from_dict(json.loads(json.dumps(found.as_dict())))
    points = {n: v[-2:] for n, v in _grid(3).items()}
    assert np.array_equal(law.predict(found, points).low, law.predict(again, points).low), (
        "a fit read back from JSON predicts something else"
    )


def check_optimum(key: str) -> None:
    law = _law(key)
    found = law.fit(_runs(law, 0.002, 6, n=4))
    flops = 1e19
    if set(law.reads) != {"parameters", "tokens"}:
        try:
            law.optimum(found, flops)
        except UserError:
            return
        raise AssertionError("a law that does not read parameters and tokens cannot split a budget")
    best = law.optimum(found, flops)
    assert np.isclose(6 * best.parameters * best.tokens, flops), "the optimum does not spend the budget"
    assert best.parameters_interval[0] <= best.parameters <= best.parameters_interval[1]
    sizes = best.parameters * np.array([0.5, 0.8, 1.0, 1.25, 2.0])
    split = as_table({"parameters": sizes, "tokens": flops / 6 / sizes}, law.reads, loss=False)
    loss = law.value(found.parameters, split)
    assert loss.argmin() == 2, f"at equal FLOPs another size is better: {dict(zip(sizes, loss, strict=True))}"


def check_user_mistakes(key: str) -> None:
    law = _law(key)
    runs = _runs(law, 0.005, 8, n=3)
    missing = {n: v for n, v in runs.items() if n == "loss"}
    for bad, what in (
        (missing, "a missing column"),
        (runs | {"loss": -runs["loss"]}, "a negative loss"),
        ({n: v[:0] for n, v in runs.items()}, "an empty table"),
    ):
        try:
            law.fit(bad)
        except UserError:
            continue
        raise AssertionError(f"{what} was accepted")
