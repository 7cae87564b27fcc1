"""Laws of mixtures (transport, critical ratio) and of descriptions, against brute force."""

import numpy as np
import pytest

from modicum.core import registry
from modicum.core.errors import UserError
from modicum.data import transport
from modicum.laws.forms import cmr, precog, projektor


def test_sinkhorn_comes_near_the_linear_program():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(30, 5)), rng.normal(size=(30, 5)) + 0.5
    a, b = rng.dirichlet(np.ones(30)), rng.dirichlet(np.ones(30))
    cost = transport.cosine_cost(x, y)
    exact, f = transport.exact(cost, a, b)
    near, g = transport.sinkhorn(cost, a, b, epsilon=0.002, iterations=5000)
    assert near == pytest.approx(exact, rel=0.02) and near >= exact - 1e-6
    assert np.corrcoef(f, g)[0, 1] > 0.98
    moved = a + 1e-5 * (np.eye(30)[3] - a)  # the potential is the gradient, up to a constant that shares cancel
    assert (transport.exact(cost, moved, b)[0] - exact) / 1e-5 == pytest.approx(f[3] - f @ a, abs=1e-3)


def test_gradient_in_the_shares():
    rng = np.random.default_rng(1)
    sources = [rng.normal(size=(20, 4)) + shift for shift in ([2, 0, 0, 0], [0, 2, 0, 0], [0, 0, 2, 0])]
    target, p = rng.normal(size=(25, 4)) + np.array([1, 1, 0, 0]), np.array([0.4873, 0.3119, 0.2008])
    cost, slope = transport.mixture_cost(sources, p, target)
    for i, j in ((0, 1), (1, 2)):
        shift = 1e-4 * (np.eye(3)[i] - np.eye(3)[j])
        numeric = (transport.mixture_cost(sources, p + shift, target)[0] - cost) / 1e-4
        assert numeric == pytest.approx(slope[i] - slope[j], abs=2e-3)
    assert cost < transport.mixture_cost(sources, np.array([0.0, 0.0, 1.0]), target)[0]


def test_projection_on_the_simplex_is_the_nearest():
    rng = np.random.default_rng(2)
    for _ in range(20):
        p = rng.normal(size=3)
        found = transport.project_simplex(p)
        assert found.min() >= 0 and found.sum() == pytest.approx(1)
        others = rng.dirichlet(np.ones(3), 2000)
        assert np.linalg.norm(found - p) <= np.linalg.norm(others - p, axis=1).min() + 1e-9


def test_projektor_goes_through_its_sizes_and_finds_the_best_mixture():
    law = registry.build("law", "projektor:ridge=1e-9")
    runs, _ = law.simulate(np.random.default_rng(0))
    fit = law.fit(runs)
    said = law.predict(fit, runs)
    assert np.abs(said.mean - runs["loss"]).max() < 1e-4, "the projection must give back V at N0 and N1"

    def distance(p):
        return 0.3 + 0.2 * p[0] - 0.1 * p[1] + 0.05 * p[2] ** 2, np.array([0.2, -0.1, 0.1 * p[2]])

    found = law.select(fit, distance, 4e5)
    grid = np.array([[a, b, 1 - a - b] for a in np.linspace(0, 1, 21) for b in np.linspace(0, 1 - a, 21)])
    columns = {f"ratio_{s}": grid[:, i] for i, s in enumerate("abc")}
    values = law.predict(fit, columns | {"tokens": [4e5] * len(grid), "transport": [distance(p)[0] for p in grid]}).mean
    at = {f"ratio_{s}": [found[i]] for i, s in enumerate("abc")} | {"tokens": [4e5], "transport": [distance(found)[0]]}
    assert law.predict(fit, at).mean[0] <= values.min() + 0.005  # descent, because V is a loss
    part, p, step = fit.extra["parts"][1], np.array([0.3, 0.3, 0.4]), 1e-6
    for i in range(3):
        ends = []
        for sign in (1, -1):
            q = p + sign * step * np.eye(3)[i]
            ends.append(projektor._apply(part, projektor.regressors(q[None], np.array([distance(q)[0]])))[0])
        slope = law._slope(part, p, *distance(p))
        assert slope[i] == pytest.approx((ends[0] - ends[1]) / (2 * step), abs=1e-4)
    with pytest.raises(UserError, match="far=true"):
        law.predict(fit, at | {"tokens": [4e6]})
    with pytest.raises(UserError, match="sum to 1"):
        law.fit(dict(runs) | {"ratio_a": runs["ratio_a"] + 0.1})


def general(ratio, t):
    return ratio * (0.30 - 0.25 * t**-0.5) - 0.012 * t**0.3


def test_critical_ratio_against_a_fine_grid():
    law = registry.build("law", "cmr:epsilon=0.05")
    runs, _ = law.simulate(np.random.default_rng(0))
    fit = law.fit(runs)
    t_max = 50.0
    grid = np.linspace(0, 1, 100_001)
    exact = grid[general(grid, t_max) <= 0.05].max()
    said = law.critical_ratio(fit, t_max * 2e8)
    assert said["ratio"] == pytest.approx(exact, abs=0.005)
    # feasibility counts at the end, not at the peak: early on the same epsilon allows less or more
    early = law.critical_ratio(fit, 3 * 2e8)["ratio"]
    assert early == pytest.approx(grid[general(grid, 3.0) <= 0.05].max(), abs=0.01) and abs(early - exact) > 0.05
    wider = [
        registry.build("law", f"cmr:epsilon={e}").critical_ratio(fit, t_max * 2e8)["ratio"] for e in (0.02, 0.05, 0.1)
    ]
    assert wider == sorted(wider)


def test_interval_of_the_critical_ratio_covers():
    law, inside = registry.build("law", "cmr:epsilon=0.05"), 0
    grid = np.linspace(0, 1, 10_001)
    exact = grid[general(grid, 50.0) <= 0.05].max()
    for seed in range(6):
        runs, _ = law.simulate(np.random.default_rng(seed), noise=0.02)
        said = law.critical_ratio(law.fit(runs, seed), 50 * 2e8)
        inside += said["low"] - 0.01 <= exact <= said["high"] + 0.01
    assert inside >= 5


def test_a_domain_like_the_general_text_may_be_all_of_it():
    t = np.tile(np.geomspace(2, 50, 12), 3)
    ratio = np.repeat([0.25, 0.5, 0.75], 12)
    fit = registry.build("law", "cmr").fit({"ratio": ratio, "tokens": t * 2e8, "change": -0.02 * t**0.3})
    assert registry.build("law", "cmr").critical_ratio(fit, 1e10)["ratio"] == 1.0
    assert cmr.crossing(np.array([0.1, 0.5]), np.array([0.2, 0.4]), 0.05) == 0.0


def test_records_of_the_same_source_are_not_asked():
    """Planted duplicates: with the exclusion off they would be found and the error would fall."""
    rng = np.random.default_rng(0)
    words = ["alpha", "beta", "gamma", "delta", "kappa", "sigma", "omega", "theta"]
    rows = []
    for source in range(40):
        text, score = " ".join(rng.choice(words, 5, replace=True)) + " task", rng.random()
        rows += [{"description": text, "source": f"s{source}", "score": score, "parameters": 1e9}] * 2
    columns = {n: [r[n] for r in rows] for n in rows[0]}
    law = registry.build("law", "precog:neighbours=1")
    honest = law.fit(columns).parameters["left_out_error"]
    leaking = law.fit(columns | {"source": [f"row {i}" for i in range(len(rows))]}).parameters["left_out_error"]
    assert leaking < 0.4 * honest, (leaking, honest)


def test_conformal_interval_covers_new_sources():
    law = registry.build("law", "precog")
    inside = []
    for seed in range(4):
        runs, _ = law.simulate(np.random.default_rng(seed), noise=0.05)
        new, _ = law.simulate(np.random.default_rng(100 + seed), noise=0.05)
        new |= {"source": [f"new {s}" for s in new["source"]]}
        said = law.predict(law.fit(runs), new, 0.9)
        inside += list((new["score"] >= said.low) & (new["score"] <= said.high))
    assert 0.82 < np.mean(inside) < 0.97


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("We test GPT-4 on HellaSwag.", "We test [NAME] on [NAME]"),
        ("LLaMA-2 reaches 63.4% accuracy", "[NAME] reaches [NUMBER] accuracy"),
        ("Accuracy of 0.71 ± 0.02 on SST-2", "Accuracy of [NUMBER]"),
        ("see https://example.org/x and arXiv:2301.00001", "see [LINK] and [LINK]"),
        ("Questions about physics have four choices.", "Questions about physics have four choices."),
        ("a benchmark called piqa", "a benchmark called [NAME]"),
    ],
)
def test_redaction(text, wanted):
    assert precog.redact(text, ["PIQA"]).startswith(wanted)
    assert not any(c.isdigit() for c in precog.redact(text, ["PIQA"]))
