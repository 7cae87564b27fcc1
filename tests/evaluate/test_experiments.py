"""Studies trained for real at toy size: what trials are made of, what is kept, and what a killed study repeats."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from modicum.cli import main
from modicum.core.errors import ModicumError, UserError
from modicum.data.curate import CurateConfig, Curation, curate
from modicum.data.insertions import Inserting, positions
from modicum.data.stream import Stream
from modicum.evaluate import experiments
from modicum.evaluate.experiments import Study
from modicum.evaluate.study import Corpus, StudySpec, number, table_text
from modicum.laws.experiments import Between, Insertion, Trial
from modicum.model.folder import load_model

TINY: dict[str, Any] = {
    "tokens": 1024,
    "sequence_length": 64,
    "batch_tokens": 256,
    "parameters": 60_000,
    "dtype": "float32",
    "heldout_bytes": 1500,
}


@pytest.fixture(scope="module")
def curation(tmp_path_factory: pytest.TempPathFactory) -> Curation:
    folder = tmp_path_factory.mktemp("study")
    rng = np.random.default_rng(0)
    words = {
        "sea": ["heron", "reed", "tide", "gull", "harbour", "salt"],
        "law": ["clause", "party", "court", "motion", "order", "ruling"],
        "sums": [str(n) for n in range(40)],
    }
    with open(folder / "pool.jsonl", "w") as file:
        for domain, known in words.items():
            for i in range(60):
                text = f"{domain} {i}: " + " ".join(str(rng.choice(known)) for _ in range(60))
                row = {"text": text, "domain": domain, "quality": i / 60, "date": f"{2010 + i % 6}-07-01"}
                file.write(json.dumps(row) + "\n")
    return curate(
        str(folder / "pool.jsonl"), folder / "out", CurateConfig(steps=["normalise"], vocab_size=400, heldout=0.2)
    )


def study_of(curation: Curation, choice: Any, folder: Path, columns: tuple[str, ...] = (), **more: Any) -> Study:
    return Study(choice, Corpus.of(curation, columns), StudySpec(**TINY | more), folder)


def test_a_killed_study_resumes_to_the_same_table_without_training_again(
    curation: Curation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    choice = "pretrainers-guide:quality=quality,quality_keep=[0.5],quality_inverse=[0.5],domains=false,seeds=2"
    whole = study_of(curation, choice, tmp_path / "whole", ("quality",))
    assert whole.estimate()["trials"] == 6 and whole.estimate()["cost"]["tokens"] == 6 * 1024
    whole.run()
    calls, real = [], experiments.train

    def dies(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(experiments, "train", dies)
    with pytest.raises(KeyboardInterrupt):
        study_of(curation, choice, tmp_path / "cut", ("quality",)).run()
    assert not (tmp_path / "cut" / "study.json").exists()
    again = study_of(curation, choice, tmp_path / "cut", ("quality",))
    assert again.estimate()["finished"] == 3
    again.run()
    assert len(calls) == 4 + 3
    tables = [json.loads((tmp_path / n / "study.json").read_text()) for n in ("whole", "cut")]
    assert tables[0]["rows"] == tables[1]["rows"] and tables[0]["trials"] == 6
    assert "±" in table_text(tables[0])
    study_of(curation, choice, tmp_path / "cut", ("quality",), lr=1e-3).run()
    assert len(calls) == 7 + 6  # another learning rate is another study


def test_filters_cut_by_the_column_and_a_smaller_set_is_repeated_more(curation: Curation, tmp_path: Path) -> None:
    study = study_of(curation, "random:runs=1", tmp_path, ("quality", "year"))
    kept = study._kept(Trial(name="x", keep=(Between(column="quality", low=0.5), Between(column="year", high=2013))))
    by_domain = {d: [*curation.documents("train", d)] for d in kept.domains}
    for domain, documents in by_domain.items():
        right = [d for d in documents if d.quality >= 0.5 and int(d.meta["date"][:4]) < 2013]
        assert kept.documents(domain) == len(right) > 0
        tokens = curation.tokenizer().decode(kept.tokens(domain, 0)[1:-1].tolist())
        assert tokens == right[0].text
    few = study._train(
        Trial(name="few", keep=(Between(column="quality", low=0.9),)), tmp_path / "few", study_deadline()
    )
    all_ = study._train(Trial(name="all"), tmp_path / "all", study_deadline())
    assert few.epochs > 3 * all_.epochs and few.tokens == all_.tokens
    with pytest.raises(UserError, match="keeps no document"):
        study._kept(Trial(name="x", keep=(Between(column="quality", low=2),)))


def study_deadline() -> Any:
    from modicum.budget import Deadline

    return Deadline(None)


def test_a_merge_is_the_mean_of_the_parameters_and_starts_alike(curation: Curation, tmp_path: Path) -> None:
    study = study_of(curation, "data-ablation-merging:sizes=[2],check=1,warm=1", tmp_path)
    conclusion, runs = study.run()
    folders = {r.trial.name: study._path(r.trial.name) / "model" for r in runs}
    a, b = (load_model(folders[f"on {d}"], "float32").state_dict() for d in ("sea", "law"))
    merged = next(r for r in runs if set(r.trial.merge) == {"on sea", "on law"})
    model = load_model(folders["on sea"], "float32")
    with torch.no_grad():
        for name, value in model.state_dict().items():
            value.copy_(((a[name].double() + b[name].double()) / 2).float())
    assert study.losses(model) == pytest.approx(merged.losses, rel=1e-6)
    assert len(conclusion.rows) == 3
    on_sea, on_law = (next(r for r in runs if r.trial.name == f"on {d}") for d in ("sea", "law"))
    assert on_sea.losses["sea"] < on_law.losses["sea"]  # it learnt what it was trained on


def test_measuring_along_a_run_changes_nothing(curation: Curation, tmp_path: Path) -> None:
    study = study_of(curation, "random:runs=1", tmp_path)
    plain = study._train(Trial(name="plain"), tmp_path / "plain", study_deadline())
    seen = study._train(Trial(name="seen", points=4), tmp_path / "seen", study_deadline())
    assert plain.losses == seen.losses
    assert [at for at, _ in seen.curve] == [0, 256, 768, 1024] and seen.curve[-1][1] == seen.losses
    assert seen.curve[0][1]["sea"] > seen.curve[-1][1]["sea"]


def test_the_deadline_keeps_finished_trials(curation: Curation, tmp_path: Path) -> None:
    from modicum.budget import Deadline

    study = study_of(curation, "random:runs=3", tmp_path)
    study._run(study.experiment.propose([])[0], study_deadline())
    with pytest.raises(ModicumError, match="before trial 'mix-1'"):
        study.run(deadline=Deadline(0))
    assert study.estimate()["finished"] == 1


def test_a_wrong_domain_is_refused_with_the_nearest(curation: Curation, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="sea"):
        study_of(curation, "random", tmp_path, target="see")
    with pytest.raises(UserError, match="law"):
        study_of(curation, "random", tmp_path, pool="lay")


def test_only_the_pool_is_trained_on_and_only_the_target_counts(curation: Curation, tmp_path: Path) -> None:
    study = study_of(curation, "random:runs=2", tmp_path, pool="sea,law", target="sums")
    assert set(study.experiment.setting.domains) == {"sea", "law"}
    assert study.experiment.setting.target == {"sums": 1.0}
    assert set(study.documents.domains) == {"sea", "law"}


# ---- insertions


def stream_of(curation: Curation, packing: str = "concat") -> Stream:
    return Stream(curation.shards("train"), packing=packing, sequence_length=64, seed=3, total=64 * 40)


@pytest.mark.parametrize("packing", ["concat", "concat:mask=true"])
def test_insertions_replace_their_own_positions_and_nothing_else(curation: Curation, packing: str) -> None:
    tokenizer = curation.tokenizer()
    texts = [("canary/0", "The code is 123.", 30), ("fact/0", "heron tide heron", 20)]
    inserted = positions(texts, tokenizer, rows=40, length=64, seed=0)
    plain, with_texts = stream_of(curation, packing), Inserting(stream_of(curation, packing), inserted)
    changed = 0
    for step in range(10):
        before, after = plain.next_batch(4), with_texts.next_batch(4)
        mask = torch.zeros_like(before.tokens_BT, dtype=torch.bool)
        for one in inserted:
            if step * 4 <= one.row < step * 4 + 4:
                at = slice(one.offset, one.offset + len(one.ids) - 1)
                mask[one.row - step * 4, at] = True
                row = one.row - step * 4
                assert after.tokens_BT[row, at].tolist() == one.ids[:-1].tolist()
                assert after.targets_BT[row, at].tolist() == one.ids[1:].tolist()
                changed += 1
        assert (before.tokens_BT == after.tokens_BT)[~mask].all()
        assert (before.targets_BT == after.targets_BT)[~mask].all()
        if before.documents_BT is not None:
            assert after.documents_BT is not None
            assert (before.documents_BT == after.documents_BT)[~mask].all()
            assert not (before.documents_BT == after.documents_BT)[mask].any()
    assert len({one.row for one in inserted}) < len(inserted)  # some stand together in a row
    assert changed == 50 and plain.state() == with_texts.state()


def test_a_stream_without_insertions_is_the_plain_one_and_resumes(curation: Curation) -> None:
    tokenizer = curation.tokenizer()
    inserted = positions([("a", "one two three", 20)], tokenizer, 40, 64, 0)
    whole, first = (Inserting(stream_of(curation), inserted) for _ in range(2))
    batches = [whole.next_batch(4) for _ in range(10)]
    for _ in range(4):
        first.next_batch(4)
    rest = Inserting(stream_of(curation), inserted)
    rest.load_state(json.loads(json.dumps(first.state())))
    for batch in batches[4:]:
        assert torch.equal(batch.tokens_BT, rest.next_batch(4).tokens_BT)
    plain, none = stream_of(curation), Inserting(stream_of(curation), [])
    assert all(torch.equal(plain.next_batch(4).tokens_BT, none.next_batch(4).tokens_BT) for _ in range(10))


def test_texts_are_spread_over_the_run_and_stay_where_they_are_when_others_join(curation: Curation) -> None:
    tokenizer = curation.tokenizer()
    alone = positions([("b", "clause party", 8)], tokenizer, 80, 64, 0)
    gaps = np.diff([one.row for one in alone])
    assert gaps.min() >= 9 and gaps.max() <= 11
    joined = positions([("a", "court", 5), ("b", "clause party", 8)], tokenizer, 80, 64, 0)
    assert {one.row for one in alone} <= {one.row for one in joined}


def test_too_long_or_too_many_texts_are_refused(curation: Curation) -> None:
    tokenizer = curation.tokenizer()
    with pytest.raises(UserError, match="longer rows"):
        positions([("a", "heron " * 200, 1)], tokenizer, 40, 64, 0)
    with pytest.raises(UserError, match="fewer texts"):
        positions([("a", "heron tide", 5000)], tokenizer, 40, 64, 0)


def test_what_was_inserted_often_is_learnt(curation: Curation, tmp_path: Path) -> None:
    study = study_of(curation, "random:runs=1", tmp_path, tokens=16 * 1024, lr=1e-2)
    study.probes = {"code": (("The code of gull is", " 90417."),)}
    shown = Insertion(name="code", texts=("The code of gull is 90417.",), repeats=64)
    none = study._train(Trial(name="none"), tmp_path / "none", study_deadline())
    some = study._train(Trial(name="some", insert=(shown,)), tmp_path / "some", study_deadline())
    assert some.losses["code"] < none.losses["code"] - 1.0
    assert some.losses["sea"] == pytest.approx(none.losses["sea"], abs=0.2)


def test_a_probe_s_loss_is_that_of_its_answer_alone(curation: Curation, tmp_path: Path) -> None:
    from modicum.evaluate.lm import document_nats

    study = study_of(curation, "random:runs=1", tmp_path)
    study.probes = {"p": (("heron reed", " tide"),)}
    model = study.fresh(0).eval()
    ids = [study.corpus.tokenizer.start_id, *study.corpus.tokenizer.encode("heron reed tide")]
    known = len(study.corpus.tokenizer.encode("heron reed"))
    with torch.no_grad():
        log_p = torch.log_softmax(model(torch.tensor([ids[:-1]]))[0].double(), -1)
    right = -sum(float(log_p[i, ids[i + 1]]) for i in range(known, len(ids) - 1)) / len(" tide") / np.log(2)
    assert study.losses(model)["p"] == pytest.approx(right, rel=1e-5)
    assert next(iter(document_nats(model, study.corpus.tokenizer, ["heron"])))[1] == 5


def test_years_come_from_dates() -> None:
    from modicum.data.document import Document

    assert number(Document("a", "", meta={"date": "2014-07-15"}), "year") == pytest.approx(2014.5)
    assert number(Document("a", "", meta={"date": "2014"}), "year") == 2014
    assert number(Document("a", "", meta={"year": 2003}), "year") == 2003
    assert np.isnan(number(Document("a", "", meta={"date": "unknown"}), "year"))


def test_the_command_plans_runs_and_prints_json(
    curation: Curation, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def typed(*words: str) -> str:
        monkeypatch.setattr(sys, "argv", ["modicum", *words])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code in (0, None)
        return capsys.readouterr().out

    options = ["--tokens", "1024", "--sequence-length", "64", "--batch-tokens", "256", "--dtype", "float32"]
    options += ["--parameters", "60k", "--heldout-bytes", "1500"]
    command = ["experiment", str(curation.folder), "random:runs=2", "--out", str(tmp_path / "s"), *options]
    assert "2 trainings" in typed(*command, "--plan")
    assert not (tmp_path / "s" / "trials").exists()
    result = json.loads(typed(*command, "--json"))
    assert result["mixture"].startswith("fixed:weights={law:") and result["trials"] == 2
    Stream(curation.shards("train"), result["mixture"], sequence_length=64)  # it is a mixture as it stands
