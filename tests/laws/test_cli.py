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
