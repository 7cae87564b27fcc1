"""Run tables made here, and the back-tests that read them."""

import json

import numpy as np
import pytest

from modicum.bench import law_runs
from modicum.bench.measurement import Settings
from modicum.bench.ports import law as bench
from modicum.core.choice import Choice
from modicum.core.errors import UserError
from modicum.laws.table import read_runs


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    assert law_runs.main(["repeated", "--quick", "--seeds", "0", "--out", str(folder)]) == 0
    assert law_runs.main(["mixed", "--quick", "--seeds", "0", "--domain", "code", "--out", str(folder)]) == 0
    return folder


def test_repeated_runs_see_the_same_tokens_of_ever_less_text(folder):
    rows = read_runs(folder / "repeated.jsonl")
    ends = {}
    for run, passes, tokens, unique in zip(
        rows["run"], rows["passes"], rows["tokens"], rows["unique_tokens"], strict=True
    ):
        ends[run] = (passes, tokens, unique)
    assert sorted(p for p, _, _ in ends.values()) == [1, 4, 16, 64]
    for passes, tokens, unique in ends.values():
        assert tokens == 2048 and tokens / unique == pytest.approx(passes, rel=0.1)
    assert len(rows["run"]) == 32 and np.isfinite(rows["loss"]).all()


def test_mixed_runs_start_from_one_model(folder):
    rows = read_runs(folder / "mixed.jsonl")
    before = {round(loss - change, 9) for loss, change in zip(rows["loss"], rows["change"], strict=True)}
    assert len(before) == 1 and tuple(sorted(set(rows["ratio"]))) == law_runs.RATIOS
    end = {r: c for r, c, t in zip(rows["ratio"], rows["domain_change"], rows["tokens"], strict=True) if t == 2048}
    assert len(set(end.values())) == len(law_runs.RATIOS)  # each read another mixture


def test_a_finished_run_is_not_made_again(folder, capsys):
    before = (folder / "repeated.jsonl").read_text()
    (folder / "repeated.jsonl").write_text("".join(before.splitlines(keepends=True)[:-8]))
    law_runs.main(["repeated", "--quick", "--seeds", "0", "--out", str(folder)])
    assert len(capsys.readouterr().out.splitlines()) == 1
    again = [json.loads(line) for line in (folder / "repeated.jsonl").read_text().splitlines()]
    assert again == [json.loads(line) for line in before.splitlines()]  # to the same figures
    assert law_runs.main(["mixed", "--quick", "--domain", "poetry", "--out", str(folder)]) == 2


@pytest.mark.parametrize(
    ("protocol", "laws"),
    [("repeated", ("token-crisis", "chinchilla")), ("short", ("onset",)), ("mixed", ("cmr", "chinchilla"))],
)
def test_protocols(folder, protocol, laws):
    settings = Settings(scale=bench.Scale(protocol=protocol), data=str(folder))
    for law in laws:
        choice = Choice.parse("law", law if law == "cmr" else f"{law}:draws=60")
        metrics = bench.measure(choice, 0, settings).metrics
        assert metrics["held_out"] == {"repeated": 16, "short": 4, "mixed": 20}[protocol]
        assert np.isfinite(metrics["error"]) and 0 <= metrics["coverage_95"] <= 1
    if protocol == "mixed":
        ratios = bench.measure(Choice.parse("law", "cmr"), 0, settings).metrics
        assert {k.split("_0")[0] for k in ratios if "ratio" in k} == {"ratio", "measured_ratio", "ratio_error"}
    with pytest.raises(UserError, match="none of the run tables"):
        bench.measure(
            Choice.parse("law", "onset"), 0, Settings(scale=bench.Scale(protocol=protocol), data=str(folder.parent))
        )
