"""`modicum predict` as a user types it."""

import json

import numpy as np
from typer.testing import CliRunner

from modicum.cli import app
from modicum.core.errors import UserError


def invoke(*words, monkeypatch):
    monkeypatch.setattr("sys.argv", ["modicum", *map(str, words)])
    return CliRunner().invoke(app, list(map(str, words)))


def table(path):
    rng = np.random.default_rng(0)
    lines = ["params,tokens,val"]
    for n in (1e7, 3e7, 1e8):
        for d in (2e8, 1e9, 5e9):
            lines.append(f"{n},{d},{(1.8 + 480 / n**0.35 + 2000 / d**0.37) * np.exp(0.002 * rng.normal())}")
    path.write_text("\n".join(lines))
    return path


def test_predict(tmp_path, monkeypatch):
    runs = table(tmp_path / "runs.csv")
    done = invoke(
        "predict",
        runs,
        "--columns",
        "parameters=params,loss=val",
        "--law",
        "chinchilla:draws=200",
        "--at",
        "parameters=1e9,tokens=20Gtok",
        "--budget",
        "1e20flop",
        "--cut",
        "0.7",
        "--plot",
        tmp_path / "p.html",
        "--json",
        monkeypatch=monkeypatch,
    )
    assert done.exit_code == 0, done.output
    said = json.loads(done.output)
    truth = 1.8 + 480 / 1e9**0.35 + 2000 / 2e10**0.37
    (point,) = said["predictions"]
    assert point["low"] < truth < point["high"] and abs(point["mean"] / truth - 1) < 0.05
    best = said["optimum"]
    assert np.isclose(6 * best["parameters"] * best["tokens"], 1e20)
    assert said["backtest"]["held_out"] >= 1
    assert "plotly" in (tmp_path / "p.html").read_text()[:200_000]
    text = invoke(
        "predict",
        runs,
        "--columns",
        "parameters=params,loss=val",
        "--law",
        "power:draws=100",
        monkeypatch=monkeypatch,
    )
    assert text.exit_code == 0 and "gamma" in text.output


def test_mistakes_are_one_line(tmp_path, monkeypatch):
    runs = table(tmp_path / "runs.csv")
    for words in (
        ("predict", runs),
        ("predict", tmp_path / "none.csv"),
        ("predict", runs, "--columns", "parameters"),
        ("predict", runs, "--law", "chinchila"),
        ("predict", runs, "--columns", "parameters=params,loss=val", "--at", "tokens=x"),
        ("predict", runs, "--columns", "parameters=params,loss=val", "--budget", "3GiB"),
    ):
        done = invoke(*words, monkeypatch=monkeypatch)
        assert isinstance(done.exception, UserError) and "\n" not in str(done.exception)


def test_buy_names_the_run_that_narrows_the_interval(tmp_path, monkeypatch):
    runs = table(tmp_path / "runs.csv")
    base = ["predict", runs, "--columns", "parameters=params,loss=val", "--law", "chinchilla:draws=200"]
    target = ["--at", "parameters=1e9,tokens=2e10"]
    near, again = "parameters=5e8,tokens=1e10", "parameters=1e7,tokens=2e8"
    done = invoke(*base, *target, "--buy", again, "--buy", near, "--json", monkeypatch=monkeypatch)
    first, second = json.loads(done.stdout)["buy"]
    assert first["parameters"] == 5e8 and first["narrows"] > 2 * second["narrows"] > 0
    assert first["width"] < second["width"] < first["width_now"]
    done = invoke(*base, *target, "--buy", "2e17flop", "--json", monkeypatch=monkeypatch)
    offers = json.loads(done.stdout)["buy"]
    assert offers and all(6 * o["parameters"] * o["tokens"] <= 2e17 for o in offers)
    assert [o["narrows"] for o in offers] == sorted((o["narrows"] for o in offers), reverse=True)


def test_buying_the_run_does_narrow_the_interval(tmp_path):
    """The forecast of `buy` against really adding the run and fitting again."""
    from modicum.core import registry
    from modicum.laws import plan

    law = registry.build("law", "chinchilla")
    rng = np.random.default_rng(3)
    rows = {"parameters": [1e7, 3e7, 1e8, 1e7, 3e7], "tokens": [2e8, 1e9, 5e9, 5e9, 2e8]}
    example = {"E": 1.8, "A": 480.0, "B": 2000.0, "alpha": 0.35, "beta": 0.37}

    def fitted(points):
        loss = law.value(example, points) * np.exp(0.003 * rng.normal(size=len(points["tokens"])))
        return law.fit(points | {"loss": loss})

    target = {"parameters": 1e9, "tokens": 2e10}
    candidates = [{"parameters": 5e8, "tokens": 1e10}, {"parameters": 2e7, "tokens": 5e8}]
    offers = plan.buy(law, fitted(rows), target, candidates)
    widths = []
    for offer in offers:
        more = {n: [*v, offer[n]] for n, v in rows.items()}
        said = law.predict(fitted(more), {n: [v] for n, v in target.items()})
        widths.append(said.high[0] - said.low[0])
    assert offers[0]["parameters"] == 5e8 and widths[0] < 0.85 * widths[1]


def test_leave_out_save_and_runs_for(tmp_path, monkeypatch):
    runs = table(tmp_path / "runs.csv")
    text = runs.read_text().splitlines()
    runs.write_text("\n".join([text[0] + ",family", *(f"{t},{'ab'[i % 2]}" for i, t in enumerate(text[1:]))]))
    words = ["--columns", "parameters=params,loss=val", "--law", "chinchilla:draws=100", "--leave-out", "family"]
    done = invoke("predict", runs, *words, "--save", tmp_path / "fit.json", monkeypatch=monkeypatch)
    assert done.exit_code == 0, done.output
    assert "without a:" in done.output and "left out in turn" in done.output
    assert json.loads((tmp_path / "fit.json").read_text())["target"] == "loss"
    done = invoke("predict", "--law", "hitchhikers-laws", "--runs-for", "1e17flop", monkeypatch=monkeypatch)
    specs = [json.loads(line) for line in done.output.splitlines()]
    assert len(specs) == 5 and abs(sum(s["flops"] for s in specs) - 1e17) < 1e13
    done = invoke("predict", "--law", "power", "--runs-for", "1e17flop", monkeypatch=monkeypatch)
    assert isinstance(done.exception, UserError) and "does not say which runs" in str(done.exception)
