"""The item table, its page, draws of examples, and work that is neither lost nor taken for another's."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from modicum.cli import app
from modicum.core.errors import UserError
from modicum.data.tokenizer import Tokenizer
from modicum.evaluate import items
from modicum.evaluate.kept import Kept, model_fingerprint
from modicum.evaluate.run import run_tasks
from modicum.evaluate.shots import over_seeds
from modicum.model.config import llama_like
from modicum.model.decoder import Decoder
from modicum.model.folder import load_model, save_model

QUESTIONS = [
    {"id": f"q{i}", "question": f"What is {a} number {i}?", "choices": [a, b, "both"], "answer": i % 2, "split": s}
    for i, (a, b) in enumerate([("snow", "ice"), ("sand", "stone"), ("sun", "sky"), ("tea", "milk")] * 3)
    for s in (["test"] if i % 3 else ["train"])
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("items")
    (folder / "choice.jsonl").write_text("\n".join(json.dumps(r) for r in QUESTIONS))
    tokenizer = Tokenizer.train([r["question"] for r in QUESTIONS] * 4, 400)
    config = llama_like(tokenizer.vocab_size, 64, 2, context_length=256, eos_ids=(tokenizer.eos_id,))
    tokenizer.save(folder / "tokenizer")
    for seed in (0, 1):
        save_model(Decoder(config, torch.Generator().manual_seed(seed)), folder / f"model{seed}", folder / "tokenizer")
    return folder


@pytest.fixture
def asked(place):
    def run(seed=0, **more):
        model, tokenizer = load_model(place / f"model{seed}"), Tokenizer.load(place / "tokenizer")
        return run_tasks(model, tokenizer, [f"choice:file={place / 'choice.jsonl'}"], **more)

    return run


def test_table_holds_what_was_asked_and_answered(asked, tmp_path):
    rows = items.table(asked(), "a", 1e15) + items.table(asked(1), "b")
    first = rows[0]
    assert first["prompt"].startswith("Question: What is") and len(first["nats"]) == len(first["choices"]) == 3
    assert first["right"] == first["choices"].index(first["choices"][first["right"]]) and first["seconds"] > 0
    best = int(np.argmax(np.array(first["nats"]) / [len(c) for c in first["choices"]]))
    assert first["score"] == float(best == first["right"])
    assert any(abs(n - round(n, 4)) > 1e-9 for n in first["nats"]), "likelihoods must not be rounded"
    for suffix in (".parquet", ".jsonl"):
        items.write(rows, tmp_path / f"rows{suffix}")
        again = items.read(tmp_path / f"rows{suffix}")
        assert [r["nats"] for r in again] == [r["nats"] for r in rows]
        assert [r["figures"] for r in again] == [r["figures"] for r in rows] and again[-1]["compute"] is None
    assert [(x["id"], y["id"]) for x, y in items.pairs(rows, "a", "b")] == [(r["id"], r["id"]) for r in rows[:8]]
    with pytest.raises(UserError, match="items were asked of one model only"):
        items.pairs(rows[1:], "a", "b")
    with pytest.raises(UserError, match="model"):
        items.pairs(rows, "a", "c")


def test_page_opens_without_a_network_and_knows_who_was_right(asked, tmp_path):
    rows = items.table(asked(), "model <a>") + items.table(asked(1), "b")
    items.page(rows, tmp_path / "items.html")
    text = (tmp_path / "items.html").read_text()
    assert not re.search(r"(src|href)\s*=|https?://|@import", text)
    data = json.loads(re.search(r"id='rows'>(.*?)</script>", text, re.S)[1])
    assert len(data) == len(rows) // 2
    for entry in data:
        a, b = (m["score"] >= 1 for m in entry["models"])
        words = {True: "right", False: "wrong"}
        assert entry["outcome"] == f"{words[a]} in model <a>, {words[b]} in b"
    assert "model &lt;a&gt;" in text


def test_draws_of_examples_widen_the_error(asked):
    draws = [asked(shots=2, shot_seed=s)[0] for s in range(4)]
    assert len({json.dumps(d.items[0]["prompt"]) for d in draws}) > 1, "the examples were the same in every draw"
    assert [r["id"] for r in draws[0].rows] == [r["id"] for r in draws[3].rows]
    joined = over_seeds(draws)
    f = joined.figures["nats"]
    values = np.array([[r["nats"] for r in d.rows] for d in draws])
    assert f["value"] == pytest.approx(values.mean()) and f["seeds"] == 4
    assert f["stderr_seeds"] == pytest.approx(values.mean(1).std(ddof=1) / 2)
    assert f["stderr_items"] == pytest.approx(values.mean(0).std(ddof=1) / np.sqrt(values.shape[1]))
    assert f["stderr"] == pytest.approx(np.hypot(f["stderr_seeds"], f["stderr_items"]))
    assert over_seeds(draws[:1]) is draws[0]


# What other caches got wrong


def test_a_small_run_does_not_poison_the_full_one(asked, tmp_path):
    """A key without the number of items: ten items asked once were taken for all."""
    keep = tmp_path / "items.jsonl"
    (small,) = asked(limit=3, keep=keep)
    (full,) = asked(keep=keep)
    assert len(small.rows) == 3 and len(full.rows) == 8 and full.resumed == 3
    assert full.figures == asked()[0].figures


def test_other_weights_under_the_same_name_are_asked_anew(place, tmp_path):
    """A key by the model's name: scores of the weights before were given for those after."""
    model, tokenizer = load_model(place / "model0"), Tokenizer.load(place / "tokenizer")
    spec = [f"choice:file={place / 'choice.jsonl'}"]
    keep = tmp_path / "items.jsonl"
    (before,) = run_tasks(model, tokenizer, spec, keep=keep)
    name = model_fingerprint(model, tokenizer)
    with torch.no_grad():
        next(iter(model.parameters())).mul_(1.5)
    assert model_fingerprint(model, tokenizer) != name
    (after,) = run_tasks(model, tokenizer, spec, keep=keep)
    assert after.resumed == 0 and after.rows[0]["nats"] != before.rows[0]["nats"]


def test_kept_items_do_not_depend_on_order_or_part(asked, tmp_path):
    """A key by rank and position: another number of workers could not read it."""
    keep = tmp_path / "items.jsonl"
    asked(keep=keep)
    lines = keep.read_text().splitlines()
    shuffled = tmp_path / "other.jsonl"
    shuffled.write_text("\n".join(reversed(lines)) + "\n")
    (again,) = asked(keep=shuffled)
    assert again.resumed == len(again.rows) and again.figures == asked()[0].figures


def test_items_are_written_as_they_are_finished(place, tmp_path):
    """A cache written at the end: what was killed had to begin again. Killed here, and resumed to the same figures."""
    keep = tmp_path / "items.jsonl"
    code = f"""
import sys, time
sys.path[:0] = {sys.path!r}
from modicum.data.tokenizer import Tokenizer
from modicum.evaluate import kept
from modicum.evaluate.run import run_tasks
from modicum.model.folder import load_model
whole = kept.Kept.add
def slow(self, *a, **k):
    whole(self, *a, **k)
    time.sleep(0.3)
kept.Kept.add = slow
run_tasks(load_model({str(place / "model0")!r}), Tokenizer.load({str(place / "tokenizer")!r}),
          ["choice:file={place / "choice.jsonl"}"], keep={str(keep)!r})
"""
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 120
    while time.monotonic() < until and (not keep.exists() or keep.read_text().count("\n") < 3):
        assert child.poll() is None, "the evaluation ended before it was killed"
        time.sleep(0.02)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    done = len(Kept(keep)._items)
    assert 3 <= done < 8
    model, tokenizer = load_model(place / "model0"), Tokenizer.load(place / "tokenizer")
    spec = [f"choice:file={place / 'choice.jsonl'}"]
    (resumed,) = run_tasks(model, tokenizer, spec, keep=keep)
    (fresh,) = run_tasks(model, tokenizer, spec)
    assert resumed.resumed == done and resumed.figures == fresh.figures and resumed.rows == fresh.rows


def test_verb_writes_items_and_reports_a_planted_one(place, tmp_path, monkeypatch):
    long = {
        "id": "long",
        "question": "Which of the many things that lie in the garden behind the old house is made of ice?",
    }
    rows = [long | {"choices": ["snow", "sand"], "answer": 0}, *(r for r in QUESTIONS if r["split"] == "test")]
    (tmp_path / "choice.jsonl").write_text("\n".join(json.dumps(r) for r in rows))
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    (corpus / "a.txt").write_text("Nothing here. " * 20)
    (corpus / "b.txt").write_text(f"Some page.\n{long['question']} snow, of course.")
    words = ["eval", place / "model0", "--tasks", "choice", "--data", tmp_path, "--against", str(place / "model1")]
    words += ["--samples", tmp_path / "rows.parquet", "--page", tmp_path / "p.html", "--contamination", corpus]
    words += ["--repeat", 2, "--out", tmp_path / "kept", "--json"]
    monkeypatch.setattr("sys.argv", ["modicum", *map(str, words)])
    done = CliRunner().invoke(app, list(map(str, words)))
    assert done.exit_code == 0, done.output
    record = json.loads(done.stdout[done.stdout.index("{") :])
    (said,) = record["contamination"]
    (hit,) = said["hits"]
    assert hit["item"] == "long" and hit["document"].endswith("b.txt") and hit["start"] == len("Some page.\n")
    assert said["touched"]["items"] == 1 and said["clean"]["items"] == 8
    assert {r["p_holm"] <= 1 for r in record["paired"] if r["main"]} == {True}
    assert len(items.read(tmp_path / "rows.parquet")) == 18 and (tmp_path / "p.html").exists()


def test_verb_probes_a_task(place, monkeypatch, tmp_path):
    def invoke(*words):
        words = ["eval", str(place / "model0"), "--data", str(place), "--out", str(tmp_path), *words]
        monkeypatch.setattr("sys.argv", ["modicum", *words])
        return CliRunner().invoke(app, words)

    done = invoke("--tasks", "choice", "--probe", "formatspread:formats=4,batch=2", "--probe-budget", "60", "--json")
    assert done.exit_code == 0, done.output
    ((said,),) = json.loads(done.stdout[done.stdout.index("{") :]).values()
    assert said["graded"] <= 60 and said["figures"]["best"]["value"] >= said["figures"]["worst"]["value"]
    again = invoke("--tasks", "choice", "--probe", "plain")
    assert "above chance" in again.output and "score" in again.output
    failed = invoke("--tasks", "copy:length=2", "--probe", "cbod")
    assert isinstance(failed.exception, UserError) and "multiple-choice" in str(failed.exception)
