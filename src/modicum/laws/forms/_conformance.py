"""What must hold for any law: it recovers its own data, its intervals are honest, its optimum is one."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from modicum.core import registry
from modicum.core.errors import UserError
from modicum.laws.backtest import figures, leave_out
from modicum.laws.curve import CurveLaw
from modicum.laws.fit import Fit
from modicum.laws.forms import Law
from modicum.laws.table import as_table, to_columns


def _law(key: str) -> Law:
    loaded = registry.load("law", key)
    law: Law = loaded.cls(getattr(loaded.module, "TOY", None) or loaded.config())
    return law


def _runs(law: Law, noise: float, seed: int) -> tuple[dict[str, Any], dict[str, Any]]:
    return law.simulate(np.random.default_rng(seed), noise=noise)


def _scored(law: Law, fit: Fit, heldout: dict[str, Any], level: float = 0.95) -> dict[str, float]:
    truth = as_table(heldout, law.reads, target=law.target)[law.target]
    result = law.predict(fit, heldout, level).rows()
    return figures([row | {law.target: float(t)} for row, t in zip(result, truth, strict=True)], law.target)


def check_recovers_its_own_data(key: str) -> None:
    """Noise-free runs: the parameters (of a curve), and larger runs within a per cent or a point."""
    law = _law(key)
    runs, far = _runs(law, 0.0, 0)
    fit = law.fit(runs)
    if isinstance(law, CurveLaw):
        for name, truth in law.example.items():
            assert abs(np.log(fit.parameters[name] / truth)) < 0.15, (
                f"{name}: fitted {fit.parameters[name]:.4g}, generated with {truth:.4g}"
            )
    error = _scored(law, fit, far)["worst"]
    assert error < (0.01 if isinstance(law, CurveLaw) else 0.05), f"noise-free data: larger runs are off by {error:.2%}"


def check_truth_within_spread(key: str) -> None:
    """The interval of noisy runs holds the truth of most of the larger ones."""
    law = _law(key)
    runs, far = _runs(law, 0.01, 1)
    fit = law.fit(runs, seed=3)
    if isinstance(law, CurveLaw):
        sd = dict(zip(fit.parameters, np.sqrt(np.diag(fit.covariance_QQ)), strict=True))
        for name, truth in law.example.items():
            off = abs(fit.parameters[name] - truth) / sd[name]
            assert np.isfinite(sd[name]) and sd[name] > 0 and off < 4, f"{name} is {off:.1f} standard deviations off"
    heldout = _scored(law, fit, far)
    assert heldout["coverage"] >= 0.75, (
        f"the 95% interval held the noise-free truth in {heldout['coverage']:.0%} of cases"
    )


def check_gradient(key: str) -> None:
    law = _law(key)
    if not isinstance(law, CurveLaw):
        return
    points = law.toy_points(3)
    table = as_table(points, law.reads, target=None)
    reference = law.reference_of(table)
    x = {n: table[n] / reference[n] for n in law.reads}
    theta = law.from_parameters(law.example, reference)
    theta_KP = np.stack([theta, theta + 0.1])
    given_KNP, step = law.gradient(theta_KP, x), 1e-6
    n_rows = len(next(iter(x.values())))
    assert given_KNP.shape == (2, n_rows, len(theta)), f"the gradient's shape is {given_KNP.shape}, not KNP"
    for p in range(len(theta)):
        shift = np.eye(len(theta))[p] * step
        numeric = (law.curve(theta_KP + shift, x) - law.curve(theta_KP - shift, x)) / (2 * step)
        assert np.allclose(given_KNP[:, :, p], numeric, rtol=1e-3, atol=1e-7), (
            f"d curve / d {law.coordinates[p]} is {given_KNP[:, :, p]}, finite differences give {numeric}"
        )


def check_parameters_round_trip(key: str) -> None:
    law = _law(key)
    if not isinstance(law, CurveLaw):
        return
    reference = {n: 3e8 for n in law.reads}
    theta = law.from_parameters(law.example, reference)
    back = law.to_parameters(theta[None], reference)
    for name, truth in law.example.items():
        assert np.isclose(back[name][0], truth), f"{name}: {truth} came back as {back[name][0]}"


def check_interval(key: str) -> None:
    law = _law(key)
    runs, far = _runs(law, 0.01, 2)
    fit = law.fit(runs)
    narrow, wide = law.predict(fit, far, 0.5), law.predict(fit, far, 0.95)
    assert ((wide.low <= narrow.low) & (narrow.low < narrow.high) & (narrow.high <= wide.high)).all(), (
        "levels are not nested"
    )
    assert (wide.low < wide.high).all() and np.isfinite(wide.mean).all()
    if not isinstance(law, CurveLaw):
        return
    points = law.toy_points()
    near, further = {n: v[-1:] for n, v in points.items()}, {n: 100 * v[-1:] for n, v in points.items()}
    sd = [float(np.std(law.sample(fit, at))) for at in (near, further)]
    assert sd[1] > sd[0] or law.target == "score", "the interval does not widen with the distance from the fitted runs"
    assert law.drift_at(fit, further)[0] > law.drift_at(fit, near)[0]


def check_few_runs_suffice(key: str) -> None:
    """Few runs must give a finite, wide-enough answer rather than an error or a false certainty."""
    law, inside = _law(key), []
    if not isinstance(law, CurveLaw):
        return
    for seed in range(8):
        rng = np.random.default_rng(seed)
        points = law.toy_points(4, 0.003 if law.target == "loss" else 1.0)
        picked = np.sort(rng.choice(len(next(iter(points.values()))) - 1, 3, replace=False))
        picked = np.append(picked, -1)
        points = {n: np.asarray(v)[picked] for n, v in points.items()}
        example = law.small_example if law.target == "loss" else law.example
        example = {n: v * float(np.exp(0.05 * rng.normal())) for n, v in example.items()}
        clean, error = law.value(example, points), 0.006 * rng.normal(size=4)
        given = clean * np.exp(error) if law.target == "loss" else clean + error
        given = np.clip(given, 0, 1) if law.target == "score" else given
        fit = law.fit({n: v[:3] for n, v in (points | {law.target: given}).items()}, seed)
        answer = law.predict(fit, {n: v[3:] for n, v in points.items()})
        inside.append(bool(answer.low[0] <= given[3] <= answer.high[0]))
        assert (answer.high - answer.low)[0] < max(answer.mean[0], 1), "the interval says nothing"
    assert sum(inside) >= 6, f"the 95% interval from three runs held the truth {sum(inside)} times of 8"


def check_deterministic_and_order_free(key: str) -> None:
    law = _law(key)
    runs, far = _runs(law, 0.005, 4)
    size = len(next(iter(runs.values())))
    first, again = law.fit(runs, 7), law.fit(runs, 7)
    assert np.array_equal(law.predict(first, far).low, law.predict(again, far).low), "the same seed gave another answer"
    order = np.random.default_rng(0).permutation(size)
    shuffled = law.fit({n: [v[i] for i in order] for n, v in to_columns(runs).items()}, 7)
    for name, value in first.parameters.items():
        assert np.isclose(value, shuffled.parameters[name], rtol=2e-2, atol=1e-6), f"{name} depends on the rows' order"


def check_stored_fit_predicts_the_same(key: str) -> None:
    law = _law(key)
    runs, far = _runs(law, 0.005, 5)
    fit = law.fit(runs)
    assert fit.target == law.target
    again = Fit.from_dict(json.loads(json.dumps(fit.as_dict())))
    assert np.array_equal(law.predict(fit, far).low, law.predict(again, far).low), (
        "a fit read back from JSON predicts something else"
    )


def check_optimum(key: str) -> None:
    law = _law(key)
    runs, _ = _runs(law, 0.002, 6)
    fit = law.fit(runs)
    flops = 1e19
    if not isinstance(law, CurveLaw) or set(law.reads) != {"parameters", "tokens"} or law.target != "loss":
        try:
            law.optimum(fit, flops)
        except UserError:
            return
        raise AssertionError("a law that does not give loss by parameters and tokens cannot split a budget")
    best = law.optimum(fit, flops)
    assert np.isclose(6 * best.parameters * best.tokens, flops), "the optimum does not spend the budget"
    assert best.parameters_interval[0] <= best.parameters <= best.parameters_interval[1]
    sizes = best.parameters * np.array([0.5, 0.8, 1.0, 1.25, 2.0])
    split = as_table({"parameters": sizes, "tokens": flops / 6 / sizes}, law.reads, target=None)
    loss = law.value(fit.parameters, split)
    assert loss.argmin() == 2, f"at equal FLOPs another size is better: {dict(zip(sizes, loss, strict=True))}"


def check_families_can_be_left_out(key: str) -> None:
    law = _law(key)
    runs, _ = _runs(law, 0.01, 9)
    size = len(next(iter(runs.values())))
    labels = runs.get("family") or [f"family {i % 3}" for i in range(size)]
    result = leave_out(
        dict(runs) | {"family": labels}, law=key if getattr(law, "config", None) is None else _choice(key)
    )
    assert np.isfinite(result["error"]) and len(result["parts"]) >= 2


def _choice(key: str) -> Any:
    """The key with the knobs of its toy configuration, as `registry.build` takes them."""
    import dataclasses

    loaded = registry.load("law", key)
    toy = getattr(loaded.module, "TOY", None)
    return {"method": key} | ({f.name: getattr(toy, f.name) for f in dataclasses.fields(toy)} if toy else {})


def check_user_mistakes(key: str) -> None:
    law = _law(key)
    runs, _ = _runs(law, 0.005, 8)
    missing = {n: v for n, v in runs.items() if n == law.target}
    wrong = {"loss": -1.0, "score": 1.5, "change": float("nan")}[law.target]
    for bad, what in (
        (missing, "a missing column"),
        (dict(runs) | {law.target: [wrong] * len(runs[law.target])}, f"a {law.target} of {wrong}"),
        (dict(runs) | {law.target: [float("inf")] * len(runs[law.target])}, f"an infinite {law.target}"),
        ({n: v[:0] for n, v in runs.items()}, "an empty table"),
    ):
        try:
            law.fit(bad)
        except UserError:
            continue
        raise AssertionError(f"{what} was accepted")
