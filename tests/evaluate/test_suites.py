"""Suites of tasks, the folders of their files, and what is kept of an evaluation."""

import itertools
import json

import pytest
import torch
from typer.testing import CliRunner

from modicum.cli import app
from modicum.cli.eval import split_tasks, with_file
from modicum.core import registry
from modicum.core.errors import UserError
from modicum.data.tokenizer import Tokenizer
from modicum.evaluate import suites
from modicum.model.config import llama_like
from modicum.model.decoder import Decoder
from modicum.model.folder import save_model


def test_the_base_suite_names_fifteen_tasks_that_exist():
    tasks = suites.tasks("base")
    assert len(tasks) == len({t.partition(":")[0] for t in tasks}) == 15
    for task in tasks:
        registry.build("task", f"{task}{',' if ':' in task else ':'}file=x.parquet")


def test_suites_are_spelt_out_beside_tasks(tmp_path):
    (tmp_path / "mine.txt").write_text("# two\ncopy:length=8\n\nneedle\n")
    assert split_tasks(f"nhop,@{tmp_path / 'mine.txt'},copy:length=4,distinct=true") == [
        "nhop",
        "copy:length=8",
        "needle",
        "copy:length=4,distinct=true",
    ]
    assert split_tasks("base,piqa") == suites.tasks("base")
    with pytest.raises(UserError, match="no file"):
        split_tasks("@nowhere.txt")
    (tmp_path / "empty.txt").write_text("# nothing\n")
    with pytest.raises(UserError, match="names no task"):
        split_tasks(f"@{tmp_path / 'empty.txt'}")


def test_files_are_taken_from_the_first_folder_that_has_one(tmp_path):
    for name in ("a/truthfulqa_mc1.jsonl", "b/truthfulqa.jsonl", "b/arc_easy.jsonl", "b/arc_easy_hard.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    both = [tmp_path / "a", tmp_path / "b"]
    assert with_file("truthfulqa", both).endswith("file=" + str(tmp_path / "a" / "truthfulqa_mc1.jsonl"))
    assert with_file("truthfulqa", both[::-1]).endswith("b/truthfulqa.jsonl")
    assert with_file("arc-easy:shots=1", both).endswith("arc-easy:shots=1,file=" + str(tmp_path / "b/arc_easy.jsonl"))
    (tmp_path / "a" / "truthfulqa_gen.jsonl").write_text("{}")
    with pytest.raises(UserError, match=r"no file for truthfulqa.*truthfulqa\.parquet"):
        with_file("truthfulqa", both[:1])
    assert with_file("needle", both) == "needle"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small model, and rows of three tasks."""
    folder = tmp_path_factory.mktemp("suite")
    words = ["snow", "ice", "sand", "stone", "sun", "sky", "tea", "milk"]
    rows = [
        {"id": f"q{i}", "question": f"Kitchen: What is {a} number {i}?", "choices": [a, b, "both"][: 2 + i % 2]}
        | {"answer": i % 2}
        for i, (a, b) in enumerate(itertools.pairwise(words))
    ]
    for task in ("arc_easy", "piqa", "hellaswag", "openbookqa"):
        kept = [r | {"choices": r["choices"][:2]} for r in rows] if task == "piqa" else rows
        (folder / f"{task}.jsonl").write_text("\n".join(json.dumps(r) for r in kept))
    tokenizer = Tokenizer.train([r["question"] for r in rows] * 4, 400)
    config = llama_like(tokenizer.vocab_size, 64, 2, context_length=256, eos_ids=(tokenizer.eos_id,))
    tokenizer.save(folder / "tokenizer")
    save_model(Decoder(config, torch.Generator().manual_seed(0)), folder / "model", folder / "tokenizer")
    return folder


def invoke(monkeypatch, *words):
    words = [str(w) for w in ("eval", *words)]
    monkeypatch.setattr("sys.argv", ["modicum", *words])
    return CliRunner().invoke(app, words)


def test_the_harness_gives_the_same_item_by_item(folder, tmp_path, monkeypatch):
    pytest.importorskip("lm_eval")
    words = ["--tasks", "arc-easy,piqa,hellaswag,openbookqa", "--data", folder, "--limit", "5", "--harness"]
    done = invoke(monkeypatch, folder / "model", *words, "--out", tmp_path, "--evidence", tmp_path / "e", "--json")
    assert done.exit_code == 0, done.output
    record = json.loads(done.stdout[done.stdout.index("{") :])
    assert [row["items"] for row in record["harness"]] == [5, 5, 5, 5]
    for row in record["harness"]:
        assert 0 < row["nats_apart_most"] < 2e-4 or row["nats_apart_most"] == 0
        assert row["acc_items_apart"] == row["acc_norm_items_apart"] == 0 and row["acc"] == row["acc_harness"]
    (line,) = (tmp_path / "e" / "eval.jsonl").read_text().splitlines()
    kept = json.loads(line)
    assert (
        next(r["task"] for r in kept["results"]) == "arc-easy:file=arc_easy.jsonl" and str(folder / "arc") not in line
    )
    assert kept["harness"][1]["acc"] == record["harness"][1]["acc"] and len(kept["results"][0]["file"]["sha256"]) == 64
    assert kept["seconds"] == pytest.approx(sum(r["seconds"] for r in kept["results"])) and kept["seconds"] > 0


def test_what_the_harness_cannot_answer_is_refused(folder, monkeypatch):
    for words, match in ((("needle", "--harness"), "arc-easy"), (("piqa", "--harness", "--shots", "1"), "zero-shot")):
        done = invoke(monkeypatch, folder / "model", "--data", folder, "--tasks", *words)
        assert isinstance(done.exception, UserError) and match in str(done.exception)
