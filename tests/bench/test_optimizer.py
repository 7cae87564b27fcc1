"""The optimizer bench: every method's rate is searched alike, away from the seeds that are reported."""

from __future__ import annotations

import math

import pytest

from modicum.bench import harness
from modicum.bench.measurement import Settings
from modicum.bench.ports import optimizer
from modicum.core.choice import Choice
from modicum.core.errors import ModicumError, UserError


def _settings(**changes: object) -> Settings:
    return Settings(scale=harness.make_scale(harness.load("optimizer"), True, {"tokens": 512, **changes}))


def test_search_walks_to_the_best_rate_and_then_tries_decays():
    calls = []

    def bits(factor, decay):
        calls.append((factor, decay))
        return abs(math.log(factor / 30)) + (0.5 if decay is None else abs(decay - 0.1))

    factor, decay, runs = optimizer.search(bits, (0.3, 1.0, 3.0), (0.0, 0.1, 0.5), 2)
    assert factor == pytest.approx(30)  # two steps of the grid's own ratio, the root of ten
    assert decay == 0.1 and runs == len(calls) == 3 + 2 + 3
    assert [f for f, _ in calls[:3]] == [0.3, 1.0, 3.0] and all(d is None for _, d in calls[:5])


def test_search_stops_widening_inside_and_runs_nothing_without_a_choice():
    assert optimizer.search(lambda f, d: (f - 1) ** 2, (0.3, 1.0, 3.0), (), 5) == (1.0, None, 3)
    assert optimizer.search(lambda f, d: pytest.fail("nothing to choose"), (1.0,), (0.2,), 5) == (1.0, 0.2, 0)
    with pytest.raises(UserError, match="diverged at every rate"):
        optimizer.search(lambda f, d: math.inf, (1.0, 3.0), (), 0)
    with pytest.raises(UserError, match="positive factors"):
        optimizer.search(lambda f, d: 0.0, (), (), 0)


def test_the_tuning_seed_is_not_reported_and_its_cost_is(monkeypatch):
    ran = []
    real = optimizer._run

    def counted(bench, choice, seed, factor, decay):
        ran.append((seed, factor, decay))
        if factor == 3.0:
            raise ModicumError("training diverged")
        return real(bench, choice, seed, factor, decay)

    monkeypatch.setattr(optimizer, "_run", counted)
    monkeypatch.setattr(optimizer, "_tuned", {})
    settings = _settings(rates=(1.0, 3.0), decays=(0.3,), widen=0)
    choice = Choice("optimizer", "adamw")
    first, again = (optimizer.measure(choice, seed, settings).metrics for seed in (0, 1))
    assert [seed for seed, _, _ in ran] == [1000] * 3 + [0, 1], "one search for all seeds"
    assert first["rate"] == again["rate"] == pytest.approx(settings.scale.rate)
    assert first["search_runs"] == 3 and first["search_seconds"] > 0
    assert first["weight_decay"] in (0.1, 0.3)
    with pytest.raises(UserError, match="seed 1000 is the one that rates are tuned on"):
        optimizer.measure(choice, 1000, settings)


def test_a_decay_that_was_given_is_kept(monkeypatch):
    decays = []
    monkeypatch.setattr(optimizer, "_tuned", {})
    monkeypatch.setattr(optimizer, "search", lambda bits, rates, given, widen: decays.append(given) or (1.0, None, 0))
    settings = _settings(decays=(0.0, 0.1))
    for knobs, expected in (({}, (0.0, 0.1)), ({"weight_decay": 0.3}, ())):
        made = optimizer.measure(Choice("optimizer", "adamw", knobs), 0, settings)
        assert decays.pop() == expected and made.metrics["weight_decay"] == knobs.get("weight_decay", 0.1)


@pytest.mark.parametrize("choice", ["adamw-8bit", "galore", "galore:bits=8", "gradnormlorp"])
def test_state_is_what_was_held(choice):
    plain, low = (optimizer.measure(Choice.parse("optimizer", c), 0, _settings()).metrics for c in ("adamw", choice))
    assert 0 < low["state_bytes"] < plain["state_bytes"] and math.isfinite(low["bits_per_byte"])


def test_factors_come_with_a_form():
    made = optimizer.measure(Choice.parse("optimizer", "refactor-reset"), 0, _settings(form="lora:rank=4"))
    assert 0 < made.metrics["state_bytes"] < 8 * made.model["parameters"]
