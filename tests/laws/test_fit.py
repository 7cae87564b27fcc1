"""Laws against independent computations, and the honesty of their intervals."""

import numpy as np
import pytest
from scipy.integrate import quad
from scipy.optimize import minimize

from modicum.core import registry
from modicum.core.errors import CorruptError, UserError
from modicum.laws import estimate
from modicum.laws.backtest import backtest
from modicum.laws.curve import CurveLaw
from modicum.laws.fit import Fit
from modicum.laws.table import as_table, read_runs


def runs_of(rng, n=40, noise=0.01):
    sizes, tokens = (
        np.exp(rng.uniform(np.log(2e7), np.log(2e9), n)),
        np.exp(rng.uniform(np.log(2e8), np.log(4e10), n)),
    )
    loss = 1.8 + 480 / sizes**0.35 + 2000 / tokens**0.37
    return {"parameters": sizes, "tokens": tokens, "loss": loss * np.exp(rng.laplace(0, noise, n))}


def test_plain_fit_minimises_the_papers_objective():
    """prior=none against Nelder-Mead on the paper's equation written out, in its own coordinates."""
    runs = runs_of(np.random.default_rng(0))

    def objective(p):
        e, a, b, alpha, beta = p
        log_loss = np.log(
            np.exp(e) + np.exp(a - alpha * np.log(runs["parameters"])) + np.exp(b - beta * np.log(runs["tokens"]))
        )
        r = np.abs(np.log(runs["loss"]) - log_loss)
        return np.where(r <= 1e-3, 0.5 * r**2, 1e-3 * (r - 0.5e-3)).sum()

    fit = registry.build("law", "chinchilla:prior=none,draws=50").fit(runs)
    p = fit.parameters
    ours = np.array([np.log(p["E"]), np.log(p["A"]), np.log(p["B"]), p["alpha"], p["beta"]])
    start = np.array([np.log(1.8), np.log(480), np.log(2000), 0.35, 0.37])
    for _ in range(6):
        found = minimize(
            objective,
            start,
            method="Nelder-Mead",
            options={"maxiter": 20000, "maxfev": 20000, "xatol": 1e-10, "fatol": 1e-16},
        )
        start = found.x
    assert objective(ours) <= found.fun * (1 + 1e-6)
    assert np.allclose(ours[3:], found.x[3:], atol=0.02) or objective(ours) < found.fun


def test_noise_density_is_normalised_and_drawn_from():
    rng = np.random.default_rng(0)
    for scale in (2e-4, 1e-3, 8e-3):

        def density(r, scale=scale):
            return float(np.exp(-estimate.huber(np.array(r), 1e-3) / scale))

        total = 2 * (quad(density, 0, 1e-3)[0] + quad(density, 1e-3, 80 * scale)[0])
        assert np.isclose(np.exp(estimate.log_norm(np.log(scale), 1e-3)), total, rtol=1e-6)
        drawn = estimate.draw_noise(np.full(200_000, scale), 1e-3, rng)
        size = (
            2
            * (
                quad(lambda r, d=density: r * d(r), 0, 1e-3)[0]
                + quad(lambda r, d=density: r * d(r), 1e-3, 80 * scale)[0]
            )
            / total
        )
        assert np.isclose(np.abs(drawn).mean(), size, rtol=0.02)


@pytest.mark.parametrize("single", [True, False])
def test_objective_gradient(single):
    law = registry.build("law", "chinchilla")
    runs = runs_of(np.random.default_rng(1), 12)
    if not single:
        runs |= {"run": np.repeat(np.arange(4), 3), "final": np.tile([False, False, True], 4)}
    table = as_table(runs, law.reads)
    x = {n: table[n] / np.exp(np.log(table[n]).mean()) for n in law.reads}
    problem = law._problem(
        x | {n: table[n] for n in ("loss", "run", "decay_left")} | {"observed": np.log(table["loss"])}
    )
    phi = np.array([[0.5, -0.3, -0.5, -1.0, -1.1, -3.5, -5.0, -5.3], [0.4, -0.2, -0.6, -1.1, -0.9, -4.0, -4.0, -5.0]])
    counts = np.random.default_rng(0).integers(0, 3, (2, 12 if single else 4)).astype(float)
    for count in (None, counts):
        value, given = problem.value_and_gradient(phi, count)
        assert np.allclose(value, problem.value(phi, count))
        for f in range(8):
            shift = np.eye(8)[f] * 1e-6
            numeric = (problem.value(phi + shift, count) - problem.value(phi - shift, count)) / 2e-6
            assert np.allclose(given[:, f], numeric, rtol=1e-3, atol=1e-3)


def test_upper_limits_touch_nothing_below_and_slope_back_above():
    prior = estimate.Prior(np.zeros(2), np.full(2, np.inf), np.array([1.0, np.inf]))
    phi = np.array([[0.9, 50.0], [1.3, 0.0], [4.0, -1.0]])
    assert np.allclose(prior.value(phi), [0, 4.5, 450]) and np.allclose(prior.gradient(phi)[:, 1], 0)
    shift = np.array([1e-6, 0])
    numeric = (prior.value(phi + shift) - prior.value(phi - shift)) / 2e-6
    assert np.allclose(prior.gradient(phi)[:, 0], numeric, rtol=1e-4)


def test_counted_runs_equal_repeated_rows():
    """The bootstrap's weights against a table in which the runs really are repeated."""
    law = registry.build("law", "chinchilla")
    runs = runs_of(np.random.default_rng(1), 6) | {"run": np.array([0, 0, 1, 2, 2, 2])}
    table = as_table(runs, law.reads)
    names = (*law.reads, "loss", "run", "decay_left")

    prior = estimate.Prior(np.zeros(8), np.ones(8))

    def problem_of(index, run):
        x = {n: table[n][index] / (1e9 if n in law.reads else 1) for n in names}
        x |= {"run": np.array(run), "observed": np.log(x["loss"])}
        return estimate.Problem(law.curve, law.gradient, x, prior, 1e-3, 4)

    phi = np.array([[0.5, -0.3, -0.5, -1.0, -1.1, -3.5, -5.0, -5.3]])
    weighted = problem_of(np.arange(6), [0, 0, 1, 2, 2, 2]).value(phi, np.array([[2.0, 0.0, 1.0]]))
    repeated = problem_of(np.array([0, 1, 0, 1, 3, 4, 5]), [0, 0, 1, 1, 2, 2, 2]).value(phi)
    assert np.allclose(weighted, repeated)


def test_posterior_agrees_with_a_grid():
    """The sampler's mean and spread of a two-coordinate posterior, against brute force."""
    rng = np.random.default_rng(0)

    def line(theta_KP, x):
        return theta_KP[:, :1] + theta_KP[:, 1:2] * x["t"]

    def slope(theta_KP, x):
        return np.tile(np.stack([np.ones_like(x["t"]), x["t"]], 1), (len(theta_KP), 1, 1))

    t = np.array([-1.0, 0.0, 1.0])
    rows = {
        "t": t,
        "observed": 0.3 + 0.1 * t + np.array([0.01, -0.02, 0.01]),
        "run": np.arange(3),
        "decay_left": np.zeros(3),
    }
    prior = estimate.Prior(np.array([0, 0, -3.5, np.log(0.01), -5.0]), np.array([1, 0.1, 0.5, 1e-4, 0.7]))
    problem = estimate.Problem(line, slope, rows, prior, 1e-3, 4)
    best = estimate.minimise(problem, np.array([[0.0, 0, -3.5, np.log(0.01), -5]]))[0][0]
    draws = estimate.sample_posterior(problem, best, rng, n_draws=4000, steps=1500)
    a, b = np.meshgrid(np.linspace(0.2, 0.4, 300), np.linspace(0.0, 0.2, 300))
    phi = np.column_stack(
        [a.ravel(), b.ravel(), np.full(a.size, -3.5), np.full(a.size, np.log(0.01)), np.full(a.size, -5.0)]
    )
    weight = np.exp(-problem.value(phi) + problem.value(best[None]))
    weight /= weight.sum()
    for column, values in ((0, a.ravel()), (1, b.ravel())):
        mean = (weight * values).sum()
        sd = np.sqrt((weight * (values - mean) ** 2).sum())
        assert abs(draws[:, column].mean() - mean) < 0.2 * sd
        assert 0.85 < draws[:, column].std() / sd < 1.15


@pytest.mark.parametrize("checkpoints", [False, True])
def test_interval_from_three_proxies_covers(checkpoints):
    """Random true laws at tiny scale: three proxies, one larger run; the interval must hold 85% or more."""
    law, rng, inside, widths = registry.build("law", "chinchilla:draws=400"), np.random.default_rng(0), [], []
    for trial in range(16):
        alpha, beta = rng.uniform(0.2, 0.5, 2)
        floor, n_term, d_term = rng.uniform(0.8, 2.5), rng.uniform(0.2, 1.8), rng.uniform(0.8, 3)

        def loss(n, d, alpha=alpha, beta=beta, floor=floor, n_term=n_term, d_term=d_term):
            return floor + n_term * (n / 1e6) ** -alpha + d_term * (d / 1e6) ** -beta

        rows = []
        for run, (n, d) in enumerate([(3e5, 4e5), (6e5, 1e6), (1.2e6, 1.2e6)]):
            own = 0.006 * rng.normal()
            shares = [0.3, 0.5, 0.75, 1.0] if checkpoints else [1.0]
            for share in shares:
                excess = 1 if share == 1 else 1.03
                error = own + (0.004 * rng.normal() if checkpoints else 0)
                rows.append(
                    {
                        "parameters": n,
                        "tokens": share * d,
                        "run": run,
                        "final": share == 1,
                        "loss": loss(n, share * d) * excess * np.exp(error),
                    }
                )
        outcome = loss(4e6, 5e6) * np.exp(0.006 * rng.normal())
        said = law.predict(law.fit(rows, trial), [{"parameters": 4e6, "tokens": 5e6}])
        inside.append(said.low[0] <= outcome <= said.high[0])
        widths.append((said.high[0] - said.low[0]) / outcome)
    assert np.mean(inside) >= 0.85
    assert np.mean(widths) < 0.2  # and says something


def test_cooldown_gap_is_told_from_the_law():
    """Checkpoints before the cooldown lie 5% high: the final losses of larger runs must still be met."""
    rng, rows = np.random.default_rng(2), []
    for run, (n, d) in enumerate([(1e8, 2e9), (2e8, 4e9), (4e8, 8e9), (8e8, 1.6e10)]):
        for share in (0.25, 0.5, 0.75, 1.0):
            loss = 1.8 + 480 / n**0.35 + 2000 / (share * d) ** 0.37
            rows.append(
                {
                    "parameters": n,
                    "tokens": share * d,
                    "run": run,
                    "final": share == 1,
                    "loss": loss * (1 if share == 1 else 1.05) * np.exp(0.001 * rng.normal()),
                }
            )
    law = registry.build("law", "chinchilla")
    fit = law.fit(rows)
    truth = 1.8 + 480 / 2e9**0.35 + 2000 / 4e10**0.37
    assert abs(fit.gap - 0.05) < 0.02
    assert abs(law.predict(fit, [{"parameters": 2e9, "tokens": 4e10}]).mean[0] / truth - 1) < 0.02


def test_generic_optimum_agrees_with_the_closed_form():
    law = registry.build("law", "chinchilla:draws=100")
    fit = law.fit(runs_of(np.random.default_rng(3)))
    closed = law.best_split(fit.draws_KP, fit.reference, 1e20)
    assert np.allclose(CurveLaw.best_split(law, fit.draws_KP, fit.reference, 1e20), closed, rtol=1e-3)


def test_backtest_and_bootstrap():
    runs = runs_of(np.random.default_rng(4), 60, noise=0.005)
    runs["params"] = runs.pop("parameters")
    report = backtest(runs, {"parameters": "params"}, 0.6, law="chinchilla:draws=60")
    assert report["method"] == "bootstrap" and report["fitted_runs"] == 36 and report["held_out"] == 24
    assert report["error"] < 0.02 and report["coverage"] > 0.7
    with pytest.raises(UserError, match="leaves"):
        backtest(runs, {"parameters": "params"}, 1e30)


def test_more_runs_overrule_the_prior():
    runs = runs_of(np.random.default_rng(5), 60, noise=0.002)
    far = registry.build("law", "chinchilla:alpha=0.6,beta=0.15,draws=50").fit(runs)
    assert abs(far.parameters["alpha"] - 0.35) < 0.04 and abs(far.parameters["beta"] - 0.37) < 0.06


def test_tables(tmp_path):
    for name, text in (
        ("a.csv", "parameters,tokens,loss\n1e6,2e6,5\n2e6,4e6,4.5\n"),
        ("a.jsonl", '{"parameters":1e6,"tokens":2e6,"loss":5}\n{"parameters":2e6,"tokens":4e6,"loss":4.5}\n'),
    ):
        (tmp_path / name).write_text(text)
        assert as_table(read_runs(tmp_path / name), ["parameters", "flops"])["flops"][1] == 6 * 2e6 * 4e6
    (tmp_path / "bad.jsonl").write_text("{nope\n")
    (tmp_path / "bad.parquet").write_bytes(b"PAR0")
    for name, error in (
        ("bad.jsonl", CorruptError),
        ("bad.parquet", CorruptError),
        ("none.csv", UserError),
        ("a.txt", UserError),
    ):
        (tmp_path / "a.txt").write_text("x")
        with pytest.raises(error):
            read_runs(tmp_path / name)
    good = {"parameters": [1e6, 2e6], "tokens": [2e6, 4e6], "loss": [5, 4.5]}
    for change, words in (
        ({"loss": [5, float("nan")]}, "row 1"),
        ({"loss": [5, "x"]}, "not a number"),
        ({"loss": [5]}, "one length"),
        ({"tokens": [0, 1]}, "above zero"),
    ):
        with pytest.raises(UserError, match=words):
            as_table(good | change, ["parameters", "tokens"])
    with pytest.raises(UserError, match="give at least 7 runs"):
        registry.build("law", "chinchilla:prior=none").fit(good)
    with pytest.raises(UserError, match="cannot split"):
        law = registry.build("law", "power:draws=50")
        law.optimum(law.fit(good), 1e20)
    with pytest.raises(CorruptError):
        Fit.from_dict({"law": "chinchilla"})
