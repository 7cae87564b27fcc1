"""The experiments against what they should find in worlds whose answer is known."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from modicum.core import registry
from modicum.core.errors import UserError
from modicum.laws.experiments import Run, Setting, Trial, rehearsed
from modicum.laws.experiments._mixtures import Predictor, drawn
from modicum.laws.experiments.pretrainers_guide import cut, decay, effects

DOMAINS = {d: 1e6 for d in "abcdef"}
SETTING = Setting(domains=DOMAINS, target={"target": 1.0}, tokens=1e5)
World = Callable[[Trial], dict[str, float]]


def study(choice: str, setting: Setting, world: World, along: Callable | None = None):
    experiment = registry.build("experiment", choice, setting)
    runs: list[Run] = []
    while trials := experiment.propose(runs):
        for t in trials:
            curve = (
                tuple((x, along(t, x)) for x in np.linspace(0, t.length * setting.tokens, t.points)) if along else ()
            )
            runs.append(Run(trial=t, losses=world(t), curve=curve, tokens=t.length * setting.tokens))
    return experiment, runs, experiment.conclude(runs)


def mixed(rng: np.random.Generator) -> tuple[World, np.ndarray]:
    """A target that needs some of the domains with diminishing returns, and its best mixture, by a long search."""
    need = rng.dirichlet([0.6] * 6)
    gain = rng.uniform(0.5, 2.0, 6)

    def loss(w: np.ndarray) -> float:
        return float((need * np.exp(-gain * 4 * w)).sum())

    def world(trial: Trial) -> dict[str, float]:
        w = np.array([(trial.weights or DOMAINS)[d] for d in DOMAINS])
        return {"target": loss(w / w.sum())}

    best = min(np.random.default_rng(1).dirichlet([0.5] * 6, 20_000), key=loss)
    return world, best


def test_climb_beats_as_many_random_runs() -> None:
    wins, gaps = 0, []
    for seed in range(12):
        world, _ = mixed(np.random.default_rng(seed))
        setting = dataclasses.replace(SETTING, seed=seed)
        losses = {}
        for choice in ("climb:rounds=[16,8,4]", "climb:rounds=[28]", "random:runs=28"):
            _, runs, conclusion = study(choice, setting, world)
            assert len(runs) == 28
            losses[choice] = world(Trial(name="chosen", weights=conclusion.weights))["target"]
        wins += losses["climb:rounds=[16,8,4]"] < losses["random:runs=28"]
        gaps.append(losses["climb:rounds=[28]"] - losses["climb:rounds=[16,8,4]"])
    assert wins >= 10
    assert np.mean(gaps) > 0  # rounds are worth more than one round of as many runs


def test_climb_fits_all_rounds_and_leaves_out_what_a_run_cannot_afford() -> None:
    experiment = registry.build("experiment", "climb:rounds=[6,3,2]", SETTING)
    scarce = dataclasses.replace(SETTING, domains=DOMAINS | {"a": 5e3})
    world, _ = mixed(np.random.default_rng(0))
    runs: list[Run] = []
    seen: list[int] = []
    original = experiment._predictor
    experiment._predictor = lambda known: (seen.append(len(known)), original(known))[1]
    while trials := experiment.propose(runs):
        runs += [Run(trial=t, losses=world(t)) for t in trials]
    experiment.conclude(runs)
    assert seen == [6, 9, 11]
    for run in study("climb:rounds=[6,3,2],epochs=2", scarce, world)[1]:
        assert run.trial.weights["a"] * scarce.tokens <= 2 * 5e3 + 1


@pytest.mark.parametrize(("error", "taken"), [(0.05, True), (0.2, False)])
def test_climb_takes_the_predicted_mixture_only_if_better_by_more_than_its_error(error: float, taken: bool) -> None:
    world, _ = mixed(np.random.default_rng(0))
    experiment, runs, _ = study("climb:rounds=[6,3,2]", SETTING, world)
    best = min(runs, key=lambda r: r.losses["target"])

    class Fixed:
        def __init__(self) -> None:
            self.error = error

        def __call__(self, fractions_ND: np.ndarray) -> np.ndarray:
            return np.full(len(fractions_ND), best.losses["target"] - 0.1)

        def errors(self, fractions_ND: np.ndarray) -> np.ndarray:
            return np.full(len(fractions_ND), error)

    experiment._predictor = lambda known: Fixed()
    conclusion = experiment.conclude(runs)
    assert (conclusion.weights != best.trial.weights) == taken
    assert conclusion.predicted == pytest.approx(best.losses["target"] - 0.1 * taken)
    assert conclusion.high - conclusion.low == pytest.approx(4 * error)


def test_the_predictor_s_error_is_that_of_runs_it_has_not_seen() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.dirichlet([1] * 6, 24), rng.normal(size=24)  # nothing to learn
    assert Predictor(x, y).error > 0.8 * y.std()
    fresh = rng.dirichlet([1] * 6, 500)
    x = rng.dirichlet([1] * 6, 60)
    exact = Predictor(x, x[:, 0] ** 2 + x[:, 1])
    assert np.abs(exact(fresh) - fresh[:, 0] ** 2 - fresh[:, 1]).max() < 0.2 * np.std(x[:, 1])


def test_mixtures_are_drawn_around_the_sizes() -> None:
    setting = Setting(domains={"a": 7e5, "b": 2e5, "c": 1e5}, target={"a": 1}, tokens=1e4)
    drawn_N3 = drawn(np.random.default_rng(0), setting, 4000, 1.0)
    assert drawn_N3.mean(0) == pytest.approx([0.7, 0.2, 0.1], abs=0.02)


def merged_world(optima: np.ndarray, target: np.ndarray) -> World:
    """Quadratic losses of one curvature: training moves halfway from the start to the mixture's optimum."""
    names = [*DOMAINS]

    def parameters(trial: Trial) -> np.ndarray:
        if trial.merge:
            return np.mean(
                [parameters(Trial(name=n, weights={n.removeprefix("on "): 1.0})) for n in trial.merge], axis=0
            )
        w = np.array([(trial.weights or DOMAINS).get(d, 0.0) for d in names])
        return 0.5 * (w / w.sum()) @ optima

    return lambda trial: {"target": float(((parameters(trial) - target) ** 2).sum())}


def test_merging_ranks_unions_as_training_does_where_losses_are_quadratic() -> None:
    rng = np.random.default_rng(5)
    optima, target = rng.normal(size=(6, 4)), rng.normal(size=4) * 0.4
    choice = "data-ablation-merging:sizes=[2,3],check=6"
    experiment, runs, conclusion = study(choice, SETTING, merged_world(optima, target))
    assert len(experiment.unions()) == 15 + 20
    for row in conclusion.rows:
        if row["trained"] is not None:
            assert row["merged"] == pytest.approx(row["trained"])
    assert "merged 1.00" in conclusion.notes[0]
    real = [r.trial for r in runs if r.trial.name.startswith("real")]
    assert real[0].name == f"real {conclusion.rows[0]['union']}"  # the winner is trained on in truth
    assert all(t.length == len(t.weights) and t.start == "start" for t in real)
    assert sum(w > 0 for w in conclusion.weights.values()) in (2, 3)


def test_unions_are_scored_without_training() -> None:
    trials = rehearsed(registry.build("experiment", "data-ablation-merging:sizes=[2],check=2", SETTING))
    assert sum(bool(t.merge) for t in trials) == 15
    assert sum(not t.merge for t in trials) == 1 + 6 + 2
    assert len({t.start for t in trials if t.name.startswith("on ")}) == 1


def cmr_world(noise: float, seed: int, scale: float = 0.4) -> Callable[[Trial, float], dict[str, float]]:
    """General loss rises with the fraction, by a power of the tokens; bits per byte with one byte a token and nat."""

    def along(trial: Trial, tokens: float) -> dict[str, float]:
        rng = np.random.default_rng([seed, int(tokens), *trial.name.encode()])
        r = (trial.weights or {}).get("maths", 0.0)
        nats = 3.0 + (scale * r**1.5 * (tokens / 1e5) ** 0.5 if tokens else 0.0)
        bits = nats / math.log(2)
        return {"news": bits + noise * rng.normal(), "fiction": bits + noise * rng.normal(), "maths": 3 - r}

    return along


CMR = Setting(
    domains={"news": 3e5, "fiction": 1e5, "maths": 1e5}, target={"maths": 1.0}, tokens=1e5, bytes_per_token=1.0
)


def test_cmr_names_the_fraction_at_which_general_loss_has_risen_by_epsilon() -> None:
    choice = "cmr:domain=maths,epsilon=0.05,points=8"
    right = (0.05 / 0.4) ** (1 / 1.5)  # 0.25
    inside = 0
    for seed in range(2):
        _, runs, conclusion = study(choice, CMR, lambda t: {}, cmr_world(5e-4, seed))
        ratio = conclusion.weights["maths"]
        inside += abs(ratio - right) < 0.05
        general = [conclusion.weights[d] for d in ("news", "fiction")]
        assert general[0] / general[1] == pytest.approx(3.0)  # as they are in the general text
        assert sum(conclusion.weights.values()) == pytest.approx(1.0)
    assert inside == 2
    assert {r.trial.start for r in runs[1:]} == {"start"} and "maths" not in runs[0].trial.weights


def test_cmr_without_a_feasible_fraction_gives_none_and_says_so() -> None:
    _, _, conclusion = study("cmr:domain=maths", CMR, lambda t: {}, cmr_world(0, 0, scale=40.0))
    assert conclusion.weights["maths"] == 0.0
    assert any("bound" in note for note in conclusion.notes)


def test_cmr_leaves_out_the_beginning_of_each_run() -> None:
    plain = cmr_world(0, 0)

    def warmed(trial: Trial, tokens: float) -> dict[str, float]:
        rise = 0.5 if 0 < tokens <= 2e4 else 0.0  # the rate is warmed up anew
        return {k: v + rise for k, v in plain(trial, tokens).items()}

    choice = "cmr:domain=maths,points=11"
    with_rise = study(choice, CMR, lambda t: {}, warmed)[2].weights["maths"]
    assert with_rise == pytest.approx(study(choice, CMR, lambda t: {}, plain)[2].weights["maths"], abs=1e-6)


def test_projektor_descends_to_the_mixture_of_a_known_surface() -> None:
    """The loss is the distance, which is least at 0.2, 0.3, 0.5."""
    best = np.array([0.2, 0.3, 0.5])

    def distance(w: np.ndarray) -> tuple[float, np.ndarray]:
        return 0.1 + float(((w - best) ** 2).sum()), 2 * (w - best) - (2 * (w - best)).mean()

    # names that do not sort as they are given
    setting = Setting(domains={"z": 5e5, "m": 4e5, "a": 3e5}, target={"z": 1.0}, tokens=1e5, distance=distance)

    def world(trial: Trial) -> dict[str, float]:
        w = np.array([trial.weights[d] for d in setting.domains])
        return {"z": 2.0 + 3 * distance(w / w.sum())[0] - 0.1 * math.log(trial.length)}

    _, runs, conclusion = study("projektor:mixtures=16,times=4", setting, world)
    assert [*conclusion.weights.values()] == pytest.approx(best, abs=0.05)
    assert conclusion.predicted == pytest.approx(2.3 - 0.1 * math.log(4), abs=0.03)
    assert {r.trial.length for r in runs} == {0.5, 1.0}


def test_projektor_needs_distances_and_pilots_enough() -> None:
    with pytest.raises(UserError, match="distances"):
        study("projektor:mixtures=4", SETTING, lambda t: {"target": 1.0})
    setting = dataclasses.replace(SETTING, distance=lambda w: (0.1, 0 * w))
    with pytest.raises(UserError, match="mixtures=17"):
        study("projektor:mixtures=16", setting, lambda t: {"target": 1.0})


def test_a_prediction_far_from_all_runs_is_less_sure() -> None:
    rng = np.random.default_rng(0)
    x = rng.dirichlet([20] * 6, 20)
    predictor = Predictor(x, x[:, 0] + 0.01 * rng.normal(size=20))
    near, far = predictor.errors(np.stack([x.mean(0), np.eye(6)[0]]))
    assert near == pytest.approx(predictor.error, rel=0.2) and far > 2 * near


# ---- pretrainers-guide


def test_effects_are_paired_by_seed_and_their_intervals_pooled() -> None:
    from scipy.stats import t

    rng = np.random.default_rng(0)
    shift = np.array([0.0, 0.3, -0.1, 0.0])
    loss_ASG = 2 + rng.normal(size=(1, 3, 2)) + shift[:, None, None] + 0.01 * rng.normal(size=(4, 3, 2))
    mean, half = effects(loss_ASG)
    difference = loss_ASG[1:] - loss_ASG[0]
    naive = [t.ppf(0.975, 6) * math.sqrt(np.mean([np.var(d[:, g], ddof=1) for d in difference]) / 3) for g in range(2)]
    assert half == pytest.approx(naive)
    assert mean[:, 0] == pytest.approx(shift[1:], abs=0.03)  # seeds differ by 1, pairs by 0.01


def test_intervals_hold_the_true_effect_in_95_of_100_studies() -> None:
    rng, inside = np.random.default_rng(1), 0
    for _ in range(400):
        mean, half = effects(rng.normal(size=(4, 2, 1)))
        inside += int((np.abs(mean) < half).sum())
    assert 0.92 < inside / 1200 < 0.98


def test_both_directions_of_a_filter_at_one_threshold_keep_everything_once() -> None:
    rng = np.random.default_rng(2)
    values, tokens = rng.random(500), rng.integers(5, 900, 500).astype(float)
    setting = dataclasses.replace(SETTING, columns={"q": (values, tokens)})

    def kept(one) -> np.ndarray:
        return (values >= one.low) & (values < one.high)

    best, worst = kept(cut(setting, "q", 0.7, True)), kept(cut(setting, "q", 0.3, False))
    assert tokens[best].sum() / tokens.sum() == pytest.approx(0.7, abs=0.01)
    assert tokens[worst].sum() / tokens.sum() == pytest.approx(0.3, abs=0.01)
    assert (best | worst).all() and (best & worst).sum() <= 1  # the document on the edge
    assert values[best].min() >= values[~best].max()


def test_temporal_decay_is_the_slope_within_years() -> None:
    cutoffs, years = np.array([2010.0, 2013.0, 2016.0]), np.array([2008.5, 2011.5, 2014.5, 2017.5])
    hard = np.array([0.3, -0.2, 0.5, 0.1])
    past = np.maximum(years - cutoffs[:, None], 0)
    slope, r, p = decay(2 + hard + 0.02 * past, cutoffs, years)
    later = past > 0
    x = np.concatenate([past[later[:, j], j] - past[later[:, j], j].mean() for j in range(4) if later[:, j].sum() > 1])
    assert slope == pytest.approx(0.02) and r == pytest.approx(1.0) and p < 1e-6
    assert slope == pytest.approx(np.polyfit(x, 0.02 * x, 1)[0])


def test_the_grid_has_its_arms_for_each_seed_and_one_full_data_model() -> None:
    values = np.arange(100.0)
    setting = dataclasses.replace(
        SETTING, columns={"q": (values, np.ones(100)), "year": (2000 + values / 10, np.ones(100))}
    )
    choice = "pretrainers-guide:quality=q,cutoffs=[2003,2006],seeds=2"
    groups = registry.build("experiment", choice, setting).groups()
    assert [*groups] == ["2000 to 2003", "2003 to 2006", "2006 to 2009"]

    def world(trial: Trial) -> dict[str, float]:
        lost = {"target": 1.0 + (trial.name.startswith("without a")) * 0.5}
        return lost | dict.fromkeys(groups, 1.0)

    _, runs, conclusion = study(choice, setting, world)
    assert len(runs) == 2 * (1 + 6 + 3 + 1 + 2)
    assert {r.trial.length for r in runs} == {1.0}  # every arm on as many tokens
    by_arm = {row["arm"]: row for row in conclusion.rows}
    assert by_arm["without a"]["target"] == pytest.approx(0.5) and by_arm["without b"]["target"] == 0
    before = next(r.trial for r in runs if r.trial.name == "before 2003 #1")
    assert before.keep[0].high == 2003 and before.seed == 1


def test_a_column_that_nobody_wrote_is_refused() -> None:
    with pytest.raises(UserError, match="no document has a number 'q'"):
        study("pretrainers-guide:quality=q", SETTING, lambda t: {"target": 1.0})


# ---- train-once


def test_the_matrix_tells_a_dependence_from_none() -> None:
    """Made effects: verbatim helps itself, and contamination hurts it; canary is alone."""
    rng = np.random.default_rng(4)
    noise = {(n, k): 0.01 * rng.normal() for n in ("v", "c", "k", "t") for k in range(3)}

    def world(trial: Trial) -> dict[str, float]:
        k, on = trial.seed, {i.name.split(" x")[0] for i in trial.insert}
        v = 2.0 - 0.5 * ("verbatim" in on) + 0.3 * ("contamination" in on)
        c, y = 2.0 - 0.4 * ("contamination" in on), 2.0 - 0.6 * ("canary" in on)
        out = {"verbatim x4": v, "contamination x4": c, "canary x4": y, "target": 1.0}
        return {n: x + noise[n[0] if n != "canary x4" else "k", k] for n, x in out.items()}

    choice = "train-once:experiments=[verbatim,contamination,canary],doses=[4],items=2,seeds=3"
    _, runs, conclusion = study(choice, SETTING, world)
    rows = {r["metric"]: r for r in conclusion.rows}
    assert rows["verbatim x4"]["verbatim"] == pytest.approx(-0.5) and rows["verbatim x4"]["canary"] == pytest.approx(0)
    assert rows["verbatim x4"]["all_less_alone"] == pytest.approx(0.3)
    assert "verbatim x4" in conclusion.notes[0] and "canary" not in conclusion.notes[0]
    labels = {r.trial.name.split(" #")[0] for r in runs[1:]}
    assert labels == {"none", "verbatim", "contamination", "canary", "all"}
    assert {r.trial.start for r in runs[1:]} == {"start"}


def test_what_is_probed_is_never_shown_in_its_own_words() -> None:
    experiment = registry.build("experiment", "train-once", SETTING)
    shown = " ".join(t for trial in experiment.propose([]) or [] for i in trial.insert for t in i.texts)
    runs = [Run(trial=Trial(name="start"), losses={})]
    shown = [t for trial in experiment.propose(runs) for i in trial.insert for t in i.texts]
    for context, answer in experiment.probes()["acquisition x8"]:
        assert not any(context in text for text in shown)
        assert any(answer.strip(" .") in text and context.split("of ")[1].split(" is")[0] in text for text in shown)
    for context, answer in experiment.probes()["verbatim x8"]:
        assert context + answer in shown


def names(trials: Sequence[Trial]) -> list[str]:
    return [t.name for t in trials]


def test_train_once_repeats_each_text_by_its_dose() -> None:
    experiment = registry.build("experiment", "train-once:doses=[1,8],items=3,seeds=2", SETTING)
    trials = {t.name: t for t in experiment.propose([Run(trial=Trial(name="start"), losses={})])}
    assert [(i.name, i.repeats, len(i.texts)) for i in trials["canary #0"].insert] == [
        ("canary x1", 1, 3),
        ("canary x8", 8, 3),
    ]
    assert trials["none #1"].insert == () and len(trials["all #0"].insert) == 8
