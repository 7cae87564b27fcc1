"""Forms of law against their equations computed naively, and against the mistakes that are easy to make."""

import json

import numpy as np
import pytest
from scipy.integrate import quad
from scipy.optimize import brentq

from modicum.core import registry
from modicum.core.errors import UserError
from modicum.laws.forms import average_params, cod, end_to_end, fine_line, hitchhikers_laws, token_crisis
from modicum.laws.forms.scaling_laws_unraveled import best_batch_rows
from modicum.laws.table import as_table


def grid(rng, n=6, noise=0.0, law="chinchilla", example=None, **columns):
    method = registry.build("law", law)
    points = method.toy_points(n) | columns
    clean = method.value(example or method.example, points)
    return points | {"loss": clean * np.exp(noise * rng.normal(size=len(clean)))}


# average-params


def test_average_of_schedules():
    tokens = np.linspace(0, 1e9, 4001)
    linear = 1e6 - 5e5 * tokens / 1e9
    assert average_params.average(tokens, linear) == pytest.approx(7.5e5, rel=1e-3)
    geometric = 1e6 * 0.25 ** (tokens / 1e9)
    exact = quad(lambda t: 1e6 * 0.25**t, 0, 1)[0]
    assert average_params.average(tokens, geometric) == pytest.approx(exact, rel=1e-3)
    # unequal steps: an average over rounds instead of tokens would give 7/12 of a million
    assert average_params.average([0, 9e8, 9.5e8, 1e9], [1e6, 5e5, 2.5e5, 2.5e5]) == pytest.approx(9.375e5)


def test_dense_rows_give_chinchillas_fit_to_the_bit():
    runs = grid(np.random.default_rng(0), 4, 0.004)
    ours, plain = (registry.build("law", f"{k}:draws=100").fit(runs) for k in ("average-params", "chinchilla"))
    assert np.array_equal(ours.best_P, plain.best_P) and np.array_equal(ours.draws_KP, plain.draws_KP)


def test_sparse_runs_lie_on_the_average_and_not_on_the_final_size():
    rng = np.random.default_rng(1)
    points = registry.build("law", "chinchilla").toy_points(5)
    kept = rng.choice(
        [1.0, 0.7, 0.45], len(points["tokens"])
    )  # average share of the parameters; the final one is lower
    law = registry.build("law", "average-params:draws=60")
    average = points["parameters"] * kept
    loss = law.value(law.example, {"average_parameters": average, "tokens": points["tokens"]})
    residual = {}
    for name, size in (
        ("average", average),
        ("final", points["parameters"] * (2 * kept - 1).clip(0.05)),
        ("initial", points["parameters"]),
    ):
        residual[name] = law.fit({"average_parameters": size, "tokens": points["tokens"], "loss": loss}).residual
    assert residual["average"] < 2e-3 < min(residual["final"], residual["initial"]), residual


# token-crisis


def test_repetition_is_a_sum_of_decaying_showings():
    """D' against passes worth exp(-k / R*) each (in the limit of many small parts), and its limits."""
    law = registry.build("law", "token-crisis")
    p = law.example | {"R_D": 10.0, "R_N": 1e9}
    unique, passes = 1e8, 17.0
    worth = unique + quad(lambda r: unique * np.exp(-r / 10.0), 0, passes - 1)[0]
    at = {"parameters": [1e6], "tokens": [unique * passes], "unique_tokens": [unique]}
    expected = p["E"] + p["A"] / 1e6 ** p["alpha"] + p["B"] / worth ** p["beta"]
    assert law.value(p, at)[0] == pytest.approx(expected, rel=1e-9)
    single = law.value(p, {"parameters": [1e6], "tokens": [1e9]})
    plain = registry.build("law", "chinchilla").value(law.example, {"parameters": [1e6], "tokens": [1e9]})
    assert single == pytest.approx(plain, rel=1e-12)


def test_a_model_too_large_for_its_data_gains_little():
    law = registry.build("law", "token-crisis")
    p = law.example
    unique = 1e8
    best = (p["alpha"] * p["A"] * unique ** p["beta"] / (p["beta"] * p["B"])) ** (1 / p["alpha"])
    size = 20 * best
    excess = size / best - 1
    worth = best + best * p["R_N"] * (1 - np.exp(-excess / p["R_N"]))
    at = {"parameters": [size], "tokens": [unique], "unique_tokens": [unique]}
    expected = p["E"] + p["A"] / worth ** p["alpha"] + p["B"] / unique ** p["beta"]
    assert law.value(p, at)[0] == pytest.approx(expected, rel=1e-9)


def test_excess_of_repeated_runs():
    rows = [
        {"run": "once", "parameters": 1e6, "tokens": d, "unique_tokens": 1e6, "loss": v}
        for d, v in ((5e5, 4.0), (1e6, 3.5))
    ]
    rows += [
        {"run": "often", "parameters": 1e6, "tokens": d, "unique_tokens": 5e4, "loss": v}
        for d, v in ((2e5, 4.2), (5e5, 3.9), (1e6, 4.4))
    ]
    (row,) = token_crisis.excess(rows)
    assert row["excess"] == pytest.approx(0.9) and row["best_epoch"] == 10 and row["rose"] == pytest.approx(0.5)
    with pytest.raises(UserError, match="saw each of its tokens once"):
        token_crisis.excess(rows[2:])


def test_repeated_data_are_refused_by_laws_that_do_not_know_them():
    runs = grid(np.random.default_rng(0), 3)
    runs |= {"unique_tokens": runs["tokens"] / 10}
    with pytest.raises(UserError, match=r"repeated 10\.0 times"):
        registry.build("law", "chinchilla").fit(runs)
    registry.build("law", "chinchilla:mixed=true,draws=60").fit(runs)
    with pytest.raises(UserError, match="schedules"):
        registry.build("law", "chinchilla").fit(
            grid(np.random.default_rng(0), 3) | {"schedule": ["cosine", "wsd", "wsd"] * 3}
        )


# scaling-laws-unraveled


def test_loss_solves_the_equation_with_itself_inside():
    law = registry.build("law", "scaling-laws-unraveled")
    p = law.example
    rng = np.random.default_rng(0)
    points = {
        "parameters": 10 ** rng.uniform(6, 9.5, 40),
        "steps": 10 ** rng.uniform(2.5, 5.5, 40),
        "batch_tokens": 10 ** rng.uniform(3.5, 7, 40),
    }
    found = law.value(p, points)
    for i in range(40):
        n, s, b = (points[k][i] for k in points)

        def left_minus_right(loss, n=n, s=s, b=b):
            critical = p["B_crit"] * (loss / 2.5) ** (-1 / p["aB"])
            least = s / (1 + critical / b)
            return loss - (p["N_c"] / n) ** p["aN"] - (p["S_c"] / least) ** p["aS"]

        assert found[i] == pytest.approx(brentq(left_minus_right, 0.05, 500, xtol=1e-12), rel=1e-8)


def test_critical_batch_doubles_steps_and_tokens():
    law = registry.build("law", "scaling-laws-unraveled")
    p, size = law.example, 1e8
    loss = 3.2
    critical = law.critical_batch(p, loss)
    fewest = law.steps_for(p, size, 1e15, loss)
    assert law.steps_for(p, size, critical, loss) == pytest.approx(2 * fewest, rel=1e-6)
    least_tokens = law.steps_for(p, size, 1e-3, loss) * 1e-3
    assert law.steps_for(p, size, critical, loss) * critical == pytest.approx(2 * least_tokens, rel=1e-4)
    steps = law.steps_for(p, size, 3e5, loss)
    assert law.value(p, {"parameters": [size], "steps": [steps], "batch_tokens": [3e5]})[0] == pytest.approx(
        loss, rel=1e-6
    )
    unlimited = law.value(p, {"parameters": [size], "steps": [1e4], "batch_tokens": [1e16]})[0]
    assert unlimited == pytest.approx((p["N_c"] / size) ** p["aN"] + (p["S_c"] / 1e4) ** p["aS"], rel=1e-9)
    with pytest.raises(UserError, match="never reach"):
        law.steps_for(p, 1e4, 1e5, 1.0)


def test_rows_below_the_best_batch_are_found():
    runs = {
        "parameters": [1e8] * 4 + [2e8],
        "steps": [8000, 4000, 2000, 1000, 500],
        "batch_tokens": [1e5, 2e5, 4e5, 8e5, 1e5],
        "loss": [3.3, 3.1, 3.0, 3.05, 3.2],
    }
    keep, best = best_batch_rows(as_table(runs, ("parameters", "steps", "batch_tokens")))
    assert keep.tolist() == [False, False, True, True, True] and list(best.values()) == [4e5]


# hitchhikers-laws


def family(rng, noise=0.002, within=0.002, bump=0.0, sizes=(1e8, 2e8, 4e8), a=406.4, alpha=0.34, floor=1.7):
    """Runs with checkpoints every 2%, each run with an error of its own, and a bump at the beginning."""
    rows = []
    for size in sizes:
        end, error = 200 * size, noise * rng.normal()
        for share in np.arange(1, 51) / 50:
            tokens = share * end
            clean = floor + a / size**alpha + 410.7 / tokens**0.28
            early = bump * np.exp(-tokens / 1.5e9)
            rows.append(
                {
                    "run": f"{size}",
                    "parameters": size,
                    "tokens": tokens,
                    "loss": (clean + early) * np.exp(error + within * rng.normal()),
                }
            )
    return rows


@pytest.mark.filterwarnings("error::RuntimeWarning")  # an exponent that nothing determines must not overflow
def test_checkpoints_beat_final_losses():
    """Plain fits, without priors: seven runs of noisy single losses, one row each or fifty."""
    rng = np.random.default_rng(0)
    sizes = (5e7, 7e7, 1e8, 1.5e8, 2e8, 3e8, 4e8)
    at = {"parameters": [1.6e9] * 5, "tokens": np.linspace(0.7, 1, 5) * 200 * 1.6e9}
    truth = 1.7 + 406.4 / 1.6e9**0.34 + 410.7 / np.array(at["tokens"]) ** 0.28
    errors = {"hitchhikers-laws:cut=0,": [], "chinchilla:": []}
    for _ in range(12):
        runs = family(rng, within=0.01, sizes=sizes)
        for key, found in errors.items():
            law = registry.build("law", f"{key}prior=none,draws=60,interval=posterior")
            rows = runs if "hitch" in key else [r for r in runs if r["tokens"] == 200 * r["parameters"]]
            found.append(np.abs(law.predict(law.fit(rows), at).mean / truth - 1).mean())
    means = {key: np.mean(found) for key, found in errors.items()}
    assert means["hitchhikers-laws:cut=0,"] < 0.7 * means["chinchilla:"], means


def test_the_warm_up_must_be_cut_by_tokens():
    at = {"parameters": [8e8], "tokens": [1.6e11]}
    truth = 1.7 + 406.4 / 8e8**0.34 + 410.7 / 1.6e11**0.28
    error = {"0": [], "8e9": []}
    for seed in range(4):
        runs = family(np.random.default_rng(seed), noise=0.001, bump=2.0)
        for cut, found in error.items():
            law = registry.build("law", f"hitchhikers-laws:cut={cut},draws=60")
            found.append(abs(law.predict(law.fit(runs), at).mean[0] / truth - 1))
    assert np.mean(error["8e9"]) < 0.5 * np.mean(error["0"]), error
    with pytest.raises(UserError, match="the cut leaves 0 rows"):
        registry.build("law", "hitchhikers-laws:cut=1e13").fit(runs)


def test_one_run_suffices_with_borrowed_exponents(tmp_path):
    """A new family with another floor: with (a, alpha) of an older one a single run gives E and beta."""
    rng, within = np.random.default_rng(2), 0.0002  # with ten times as much noise the older fit differs by processor
    other = registry.build("law", "chinchilla:draws=60").fit(
        [r for r in family(rng, 0.0, within, sizes=(3e7, 1e8, 3e8, 1e9, 3e9)) if r["tokens"] >= 5e9]
    )
    path = tmp_path / "fit.json"
    path.write_text(json.dumps(other.as_dict()))
    new = family(rng, 0.0, within, sizes=(2e8,), floor=1.2)
    at = {"parameters": [2e9], "tokens": [1e11]}
    truth = 1.2 + 406.4 / 2e9**0.34 + 410.7 / 1e11**0.28
    error = {}
    for knobs in ("", f",transfer={path}"):
        law = registry.build("law", f"hitchhikers-laws:cut=0,draws=60{knobs}")
        error[bool(knobs)] = abs(law.predict(law.fit(new), at).mean[0] / truth - 1)
    assert error[True] < 0.015 and error[True] < 0.6 * error[False], error
    with pytest.raises(UserError, match="no fit at"):
        registry.build("law", "hitchhikers-laws:cut=0,transfer=nowhere.json").fit(new)


def test_seed_floor():
    runs = {"parameters": [1e8] * 2 + [2e8], "tokens": [1e9] * 3, "loss": [3.0, 3.06, 2.9]}
    assert hitchhikers_laws.seed_floor(runs) == pytest.approx(0.03 / 3.03 * 2**0.5)


# laws of scores


def test_end_to_end_equation_and_binomial_intervals():
    law = registry.build("law", "end-to-end")
    p = {"g": 0.25, "a": 5e6, "b": 0.36, "c": 0.1}
    flops = np.geomspace(1e17, 1e22, 6)
    assert np.allclose(law.value(p, {"flops": flops}), 0.25 + 0.75 * np.exp(-5e6 * flops**-0.36 - 0.1))
    rng, inside, widths = np.random.default_rng(0), 0, {}
    for items in (100, 1000):
        for _ in range(10):
            truth = law.value(p, {"flops": flops})
            score = rng.binomial(items, truth) / items
            fit = registry.build("law", "end-to-end:draws=200").fit(
                {"flops": flops, "score": score, "items": [items] * 6}
            )
            at = {"flops": [1e21], "items": [items]}
            said = law.predict(fit, at)
            new = rng.binomial(items, law.value(p, at)[0]) / items
            inside += said.low[0] <= new <= said.high[0]
            widths.setdefault(items, []).append(said.high[0] - said.low[0])
    assert inside >= 17, f"the 95% interval held {inside} of 20 new scores"
    few, many = (law.predict(fit, {"flops": [1e21], "items": [n]}) for n in (30, 1e6))
    assert few.high[0] - few.low[0] > 1.5 * (many.high[0] - many.low[0]), (
        "a score of 30 items is no surer than one of many"
    )
    assert np.mean(widths[100]) > 1.5 * np.mean(widths[1000]), "fewer items must widen the interval"


def test_scores_at_chance_are_refused():
    at_chance = {"flops": np.geomspace(1e17, 1e20, 8), "score": 0.25 + 0.01 * np.sin(np.arange(8)), "items": [500] * 8}
    for key in ("end-to-end", "two-step"):
        rows = at_chance | {
            "parameters": np.geomspace(1e7, 1e9, 8),
            "tokens": [1e10] * 8,
            "task_loss": np.linspace(2, 1, 8),
        }
        with pytest.raises(UserError, match="lies at chance"):
            registry.build("law", f"{key}:chance=0.25").fit(rows)
    registry.build("law", "end-to-end:chance=0.25,at_chance=true,draws=60").fit(at_chance)


def test_cod_finds_groups_and_leaves_chance_out():
    law = registry.build("law", "cod:draws=100")
    rng = np.random.default_rng(0)
    runs, far = law.simulate(rng, noise=0.01)
    flops, rates = cod.difficulty(runs)
    labels = cod.cluster(rates, 0.1, 10, 256)
    truth = np.repeat([0, 1, 2, 3], [60, 60, 60, 30])
    pairs = [(a, b) for a in range(0, 210, 3) for b in range(a)]
    same = np.mean([(labels[a] == labels[b]) == (truth[a] == truth[b]) for a, b in pairs])
    assert same > 0.95, f"items of one group end in one cluster in {same:.0%} of pairs"
    fit = law.fit(runs)
    assert fit.parameters["predictable_items"] <= 182 and fit.parameters["flat_items"] >= 25
    said = law.predict(fit, far)
    plain = registry.build("law", "end-to-end:draws=100")
    means = {"flops": flops, "score": rates.mean(0), "items": [210.0] * len(flops)}
    naive = np.abs(plain.predict(plain.fit(means), far).mean - far["score"])
    assert np.abs(said.mean - far["score"]).max() < 0.04, (said.mean, far["score"])
    assert np.abs(said.mean - far["score"]).mean() < naive.mean() + 0.005
    with pytest.raises(UserError, match="every model must answer every item"):
        cod.difficulty({n: list(v)[1:] for n, v in runs.items()})


def test_clusters_keep_their_bounds():
    rng = np.random.default_rng(3)
    rates = rng.random((300, 5))
    labels = cod.cluster(rates, 0.2, 10, 300)
    for label in range(labels.max() + 1):
        members = rates[labels == label]
        assert len(members) >= 10
        apart = np.sqrt(((members[:, None] - members[None]) ** 2).mean(2)).max()
        assert apart <= 0.4 + 1e-9, f"two members of a cluster lie {apart:.2f} apart"


def test_map_rises():
    rng = np.random.default_rng(0)
    x = np.sort(rng.random(8))
    knots = cod.monotone_map(x, np.clip(x**1.5 + 0.02 * rng.normal(size=8), 0, 1), 0.005)
    line = cod.PchipInterpolator(*knots)(np.linspace(0, 1, 500))
    assert (np.diff(line) >= -1e-12).all() and line[0] == 0 and line[-1] == pytest.approx(1)


def test_fine_line_carries_a_curve_over_and_refuses_chance():
    rng = np.random.default_rng(0)
    law = registry.build("law", "fine-line")
    runs, held = law.simulate(rng, noise=0.005)
    runs = {n: list(v) for n, v in runs.items()}
    fit = law.fit(runs)
    assert fit.parameters["k"] == pytest.approx(1.3, abs=0.06)
    assert np.abs(law.predict(fit, held).mean - held["score"]).max() < 0.05
    noise = {"parameters": [1e8] * 12 + [1e9] * 12, "tokens": [*np.geomspace(3e9, 3e11, 12)] * 2}
    flat = 0.25 + 0.01 * rng.normal(size=24)
    with pytest.raises(UserError, match="stays at chance"):
        registry.build("law", "fine-line:chance=0.25").fit(noise | {"score": flat})
    with pytest.raises(UserError, match="rank alike"):
        unlike = np.concatenate([np.linspace(0.3, 0.6, 12), np.linspace(0.6, 0.3, 12)])
        registry.build("law", "fine-line").fit(noise | {"score": unlike})
    said = fine_line.dynamics(runs, chance=0.1)
    assert said["sizes"][0]["agreement"] > 0.9 and said["sizes"][0]["onset"] < 1e11
    up = np.cumsum(rng.random(20))
    assert fine_line.coupling(up, 2 * up) == pytest.approx(1) and abs(fine_line.coupling(up, rng.random(20))) < 0.7


def test_superficial_alignment_tells_style_from_skill():
    law = registry.build("law", "superficial-alignment:draws=200")
    points = {"examples": [0, 10, 30, 100, 300, 1000, 3000]}
    style, skill = {"c": 0.03, "a": 0.9, "b": 1.2}, {"c": 0.2, "a": 0.7, "b": 0.25}
    rng = np.random.default_rng(0)
    reach = []
    for truth in (style, skill):
        clean = law.value(truth, points)
        assert np.allclose(clean, 1 - truth["c"] - truth["a"] * (1 + np.array(points["examples"])) ** -truth["b"])
        fit = law.fit(points | {"score": rng.binomial(2000, clean) / 2000, "items": [2000] * 7})
        assert fit.parameters["b"] == pytest.approx(truth["b"], rel=0.35)
        reach.append(law.examples_to_reach(fit.parameters))
    assert reach[0] < 30 < 300 < reach[1]
    assert end_to_end.COLUMNS[0] == "flops"


def test_poor_tables_are_named_or_widen_the_interval(caplog):
    law = registry.build("law", "chinchilla:draws=200")
    runs = {n: v.tolist() for n, v in grid(np.random.default_rng(0), 3, 0.003).items()}
    for column, value, match in (
        ("loss", float("nan"), "leave diverged runs out"),
        ("loss", None, "not a number"),
        ("tokens", 0.0, "above zero"),
    ):
        with pytest.raises(UserError, match=match):
            law.fit(runs | {column: [value, *runs[column][1:]]})
    with pytest.raises(UserError, match="divide per cent by 100"):
        registry.build("law", "end-to-end").fit({"flops": [1e18, 1e19, 1e20], "score": [31.0, 42.0, 55.0]})
    with caplog.at_level("WARNING"):
        law.fit({n: v[:3] for n, v in runs.items()} | {"tokens": [1e9] * 3})
    assert "column tokens is constant" in caplog.text
    at = {"parameters": [4e9], "tokens": [8e10]}
    widths = []
    for rows in (2, 4, 9):
        said = law.predict(law.fit({n: v[-rows:] for n, v in runs.items()}), at)
        widths.append(float(said.high[0] - said.low[0]))
    assert widths[0] > widths[1] > widths[2], widths
