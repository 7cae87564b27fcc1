"""What a budget buys, by the records of earlier runs: `laws.plan.split`, `pipeline.records`, `modicum plan --runs`."""

import json

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from modicum.cli import app
from modicum.core import registry
from modicum.core.errors import UserError
from modicum.laws import plan
from modicum.pipeline.recipe import parse, resolved
from modicum.pipeline.records import comparable, run_records

LAW = {"E": 1.8, "A": 60.0, "B": 200.0, "alpha": 0.35, "beta": 0.34}


def fitted(noise=0.001):
    law = registry.build("law", "chinchilla:draws=100")
    size, tokens = (v.ravel() for v in np.meshgrid(np.geomspace(2e5, 4e6, 4), np.geomspace(3e5, 6e6, 4)))
    points = {"parameters": size, "tokens": tokens}
    loss = law.value(LAW, points) * np.exp(noise * np.random.default_rng(0).normal(size=16))
    seconds = 1e-9 * size**0.8 * tokens
    return law, law.fit(points | {"loss": loss}), points | {"loss": loss, "seconds": seconds}


def test_split_of_flops_is_the_optimum():
    law, fit, _ = fitted()
    best, closed = plan.split(law, fit, flops=1e14), law.optimum(fit, 1e14)
    assert best.parameters == pytest.approx(closed.parameters, rel=0.06)  # the grid's step
    assert 6 * best.parameters * best.tokens == pytest.approx(1e14)
    assert best.loss == pytest.approx(closed.loss, rel=1e-3)
    assert best.parameters_interval[0] <= best.parameters <= best.parameters_interval[1]
    assert all(row["loss"] >= best.loss - 1e-9 for row in best.rows) and len(best.rows) == 5
    assert best.beyond == pytest.approx(np.log10(1e14 / (6 * 4e6 * 6e6)))


def test_a_time_buys_tokens_at_the_measured_rate():
    law, fit, runs = fitted()
    rate = plan.seconds_per_token(runs)
    assert rate.power == pytest.approx(0.8) and rate(np.array([1e6]))[0] == pytest.approx(1e-9 * 1e6**0.8)
    # no faster per FLOP than the largest run, no faster per token than the smallest
    assert rate(np.array([4e7]))[0] == pytest.approx(10 * rate(np.array([4e6]))[0])
    assert rate(np.array([2e4]))[0] == pytest.approx(rate(np.array([2e5]))[0])
    best = plan.split(law, fit, seconds=600, rate=rate)
    assert best.tokens == pytest.approx(600 / rate(np.array([best.parameters]))[0])
    assert plan.split(law, fit, seconds=6000, rate=rate).loss < best.loss
    one = {"parameters": [1e6] * 3, "tokens": [1e6] * 3, "seconds": [10.0] * 3}
    assert plan.seconds_per_token(one)(np.array([2e6]))[0] == pytest.approx(2e-5)
    with pytest.raises(UserError, match="no column seconds"):
        plan.seconds_per_token({"parameters": [1e6], "tokens": [1e6]})
    with pytest.raises(UserError, match="cannot split"):
        power = registry.build("law", "power:draws=60")
        plan.split(power, power.fit(runs), flops=1e14)


RECIPE = {
    "name": "small",
    "stages": [
        {"curate": {"corpus": "python"}},
        {"predict": {}},
        {"pretrain": {"shape": [64, 2], "tokens": "1Mtok"}},
        {"pretrain": {"from": "pretrain", "tokens": "1Mtok"}, "as": "more"},
    ],
}


def run_directory(folder, corpus="c1", scale=1.0, lr=None):
    """As a run leaves it: the recipe with its defaults, and what each stage wrote."""
    recipe = yaml.safe_load(yaml.safe_dump(RECIPE))
    recipe["stages"][2]["pretrain"] |= {"lr": lr} if lr else {}
    folder.mkdir(parents=True)
    (folder / "run.yaml").write_text(resolved(parse(recipe)))
    size, tokens = scale * np.array([2e5, 4e5, 8e5]), scale * np.array([4e5, 8e5, 1.6e6])
    loss = registry.build("law", "chinchilla").value(LAW, {"parameters": size, "tokens": tokens})
    proxies = [
        {
            "run": i + 1,
            "parameters": size[i],
            "tokens": tokens[i],
            "loss": loss[i],
            "seconds": 1e-9 * size[i] * tokens[i],
        }
        for i in range(3)
    ]
    end = {
        "parameters": 2e6 * scale,
        "tokens": 2e6 * scale,
        "loss": 9.0,
        "heldout_loss": 4.0,
        "seconds": 4e3 * scale**2,
    }
    for name, figures in (
        ("curate", {"vocab_size": 2048}),
        ("predict", {"proxies": proxies}),
        ("pretrain", end),
        ("more", end | {"heldout_loss": 3.0}),
    ):
        (folder / "stages" / name).mkdir(parents=True)
        record = {"fingerprint": corpus, "figures": figures, "measured": {}}
        (folder / "stages" / name / "done.json").write_text(json.dumps(record))


def test_records_of_runs(tmp_path):
    run_directory(tmp_path / "a")
    rows = run_records(tmp_path / "a")
    assert [r["run"] for r in rows] == ["a/predict/1", "a/predict/2", "a/predict/3", "a/pretrain"]
    assert rows[3]["loss"] == 4.0 and rows[0]["vocabulary"] == 2048  # held-out; what goes on from a model is no run
    run_directory(tmp_path / "b", scale=1.5)
    run_directory(tmp_path / "c", corpus="c2")
    run_directory(tmp_path / "d", lr=1e-4)
    rows, others = comparable(run_records(tmp_path))
    assert {r["run"].split("/")[0] for r in rows} == {"a", "b"} and len(rows) == 8
    assert {name.split("/")[0] for name in others} == {"c", "d"}
    with pytest.raises(UserError, match="no finished training run"):
        run_records(tmp_path / "a" / "stages")


def invoke(*words, monkeypatch):
    monkeypatch.setattr("sys.argv", ["modicum", *map(str, words)])
    return CliRunner().invoke(app, list(map(str, words)))


def test_plan_answers_from_runs(tmp_path, monkeypatch):
    run_directory(tmp_path / "a")
    run_directory(tmp_path / "b", scale=1.5)
    run_directory(tmp_path / "other", corpus="c2")
    done = invoke("plan", "--runs", tmp_path, "--budget", "2h", "--json", monkeypatch=monkeypatch)
    assert done.exit_code == 0, done.output
    assert "left out" in done.stderr and "other/pretrain" in done.stderr
    result = json.loads(done.stdout)
    assert result["law"] == "onset:vocabulary=2048" and result["runs"] == 8
    assert result["loss_interval"][0] < result["loss"] < result["loss_interval"][1]
    done = invoke("plan", "--runs", tmp_path, "--budget", "1e14flop", monkeypatch=monkeypatch)
    assert done.exit_code == 0 and "parameters on" in done.output
    done = invoke("predict", tmp_path / "a", "--at", "parameters=3e6,tokens=3e6", monkeypatch=monkeypatch)
    assert done.exit_code == 0 and "onset:vocabulary=2048" in done.output
    for words, match in (
        (("plan",), "name a recipe"),
        (("plan", "quickstart", "--runs", tmp_path), "not both"),
        (("plan", "--runs", tmp_path), "neither a time nor compute"),
        (("plan", "--runs", tmp_path / "none.csv", "--budget", "1h"), "no file"),
    ):
        done = invoke(*words, monkeypatch=monkeypatch)
        assert isinstance(done.exception, UserError) and match in str(done.exception)


def test_rows_without_a_finite_loss_are_left_out_and_named(tmp_path, monkeypatch):
    path = tmp_path / "runs.csv"
    _, _, runs = fitted()
    lines = [f"{n},{d},{v}" for n, d, v in zip(runs["parameters"], runs["tokens"], runs["loss"], strict=True)]
    path.write_text("\n".join(["parameters,tokens,loss", *lines]))
    whole = json.loads(
        invoke("predict", path, "--law", "chinchilla:draws=60", "--json", monkeypatch=monkeypatch).stdout
    )
    path.write_text("\n".join(["parameters,tokens,loss", "1e6,1e6,", "1e6,2e6,nan", *lines, "2e6,1e6,inf"]))
    done = invoke("predict", path, "--law", "chinchilla:draws=60", "--json", monkeypatch=monkeypatch)
    assert "3 of 19 rows left out" in done.stderr and "row 0, 1, 18" in done.stderr
    assert json.loads(done.stdout)["parameters"] == whole["parameters"]
    path.write_text("parameters,tokens,loss\n1e6,1e6,\n2e6,1e6,x\n")
    done = invoke("predict", path, monkeypatch=monkeypatch)
    assert isinstance(done.exception, UserError) and "no finite number" in str(done.exception)


def test_plot_shows_intervals_and_heldout_runs_and_needs_no_network(tmp_path, monkeypatch):
    from modicum.laws.backtest import backtest
    from modicum.laws.plot import figure

    law, fit, runs = fitted()
    tested = backtest(runs, None, 0.7, law="chinchilla:draws=60")
    at = {"parameters": [1e7], "tokens": [1e7]}
    traces = {t.name: t for t in figure(law, fit, runs, at, heldout=tested["rows"], measured=[3.0]).data}
    bars = traces["held out, 95% interval"]
    assert len(bars.x) == tested["held_out"] and (np.array(bars.error_y.array) > 0).all()
    assert list(traces["held out, measured"].y) == [row["loss"] for row in tested["rows"]]
    assert traces["predicted, 95% interval"].error_y.arrayminus[0] > 0 and list(traces["outcome"].y) == [3.0]
    band = np.array(traces["law, 95% of its draws"].y)
    assert (band[60:][::-1] > band[:60]).all()
    scores = registry.build("law", "end-to-end:draws=60")
    rows = {"flops": np.geomspace(1e17, 1e21, 8), "score": np.linspace(0.3, 0.7, 8), "items": [1000] * 8}
    chart = figure(scores, scores.fit(rows), rows, {"flops": [1e22]})
    assert chart.layout.yaxis.title.text == "score" and chart.layout.yaxis.type == "linear"
    path, page = tmp_path / "runs.csv", tmp_path / "law.html"
    lines = [f"{n},{d},{v}" for n, d, v in zip(runs["parameters"], runs["tokens"], runs["loss"], strict=True)]
    path.write_text("\n".join(["parameters,tokens,loss", *lines]))
    words = ("predict", path, "--law", "chinchilla:draws=60", "--cut", "0.7", "--plot", page)
    assert invoke(*words, monkeypatch=monkeypatch).exit_code == 0
    text = page.read_text()
    assert "held out, measured" in text and 'src="http' not in text
