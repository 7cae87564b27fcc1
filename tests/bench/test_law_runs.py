"""Run tables made here, and the back-tests that read them."""

import json

import numpy as np
import pytest

from modicum.bench.law_runs import __main__ as command
from modicum.bench.law_runs import examples, mixed
from modicum.bench.measurement import Settings
from modicum.bench.ports import law as bench
from modicum.core.choice import Choice
from modicum.core.errors import UserError
from modicum.laws.table import read_runs


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    assert command.main(["repeated", "--quick", "--seeds", "0", "--out", str(folder)]) == 0
    assert command.main(["mixed", "--quick", "--seeds", "0", "--domain", "code", "--out", str(folder)]) == 0
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
    assert len(before) == 1 and tuple(sorted(set(rows["ratio"]))) == mixed.RATIOS
    end = {r: c for r, c, t in zip(rows["ratio"], rows["domain_change"], rows["tokens"], strict=True) if t == 2048}
    assert len(set(end.values())) == len(mixed.RATIOS)  # each read another mixture


def test_a_finished_run_is_not_made_again(folder, capsys):
    before = (folder / "repeated.jsonl").read_text()
    (folder / "repeated.jsonl").write_text("".join(before.splitlines(keepends=True)[:-8]))
    command.main(["repeated", "--quick", "--seeds", "0", "--out", str(folder)])
    assert len(capsys.readouterr().out.splitlines()) == 1
    again = [json.loads(line) for line in (folder / "repeated.jsonl").read_text().splitlines()]
    assert again == [json.loads(line) for line in before.splitlines()]  # to the same figures
    assert command.main(["mixed", "--quick", "--domain", "poetry", "--out", str(folder)]) == 2


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


def test_pruned_runs_have_an_average_between_their_two_sizes(tmp_path):
    assert command.main(["pruned", "--quick", "--seeds", "0", "--out", str(tmp_path)]) == 0
    rows = read_runs(tmp_path / "pruned.jsonl")
    by = dict(
        zip(
            zip(rows["pruned"], rows["tokens"], strict=True),
            zip(*map(rows.get, ("parameters", "average_parameters", "dense_parameters")), strict=True),
            strict=True,
        )
    )
    for (name, _), (left, average, dense) in by.items():
        assert left < average < dense if name != "dense" else left == average == dense
    tokens = max(rows["tokens"])
    assert by["early", tokens][1] < by["half", tokens][1] and by["most", tokens][0] < by["half", tokens][0]


def test_mixtures_have_their_distance(tmp_path):
    assert command.main(["mixtures", "--quick", "--seeds", "0", "--out", str(tmp_path)]) == 0
    rows = read_runs(tmp_path / "mixtures.jsonl")
    ratios = np.array([rows[n] for n in rows if n.startswith("ratio_")], float)
    assert ratios.sum(0) == pytest.approx(1) and len(set(rows["tokens"])) == 3
    small, large = (
        {tuple(r) for r, t in zip(ratios.T.tolist(), rows["tokens"], strict=True) if (t == max(rows["tokens"])) == last}
        for last in (False, True)
    )
    assert not small & large and min(rows["transport"]) > 0 and np.isfinite(rows["loss"]).all()


def test_examples_names_are_compared_as_words():
    assert examples.plain(" Card_arrival. ") == "card arrival"
