"""The playground's generators, grading, the runner, kept items, comparison and the verb."""

import json
import math
import re
from collections import Counter

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from modicum.cli import app
from modicum.cli.eval import split_tasks
from modicum.core import registry
from modicum.core.errors import UserError
from modicum.data.tokenizer import Tokenizer
from modicum.evaluate import run as running
from modicum.evaluate.compare import compare, paired, paired_ratio
from modicum.evaluate.kept import Kept, model_fingerprint
from modicum.evaluate.run import run_tasks, run_text, solved_texts
from modicum.model.config import llama_like
from modicum.model.decoder import Decoder
from modicum.model.folder import save_model


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train((d["text"] for d in solved_texts("needle:length=40", 60)), 800)


def make(tokenizer, seed=0):
    config = llama_like(tokenizer.vocab_size, 64, 2, context_length=256, eos_ids=(tokenizer.eos_id,))
    return Decoder(config, torch.Generator().manual_seed(seed)).eval()


@pytest.fixture(scope="module")
def model(tokenizer):
    return make(tokenizer)


def docs(spec, n=30):
    task = registry.build("task", spec)
    return task, list(task.docs("test", n, 0))


@pytest.mark.parametrize("length", [32, 300])
def test_needle_holds_its_fact_once_at_its_length(length):
    _, found = docs(f"needle:length={length},value_words=3")
    for doc in found:
        fact = f"{doc['prompt'].rsplit('. ', 1)[1]} {doc['answer']}."
        assert doc["prompt"].count(fact) == 1 and len(doc["answer"].split()) == 3
        assert abs(len(doc["prompt"].split()) - length) <= 12
    _, first = docs("needle:depth=0", 3)
    _, last = docs("needle:depth=1", 3)
    assert all(d["prompt"].startswith("The secret of") for d in first)
    assert all(d["answer"] in d["prompt"].split(". ")[-2] for d in last)
    depths = [d["prompt"].index("The secret") / len(d["prompt"]) for d in docs("needle:length=400", 60)[1]]
    assert 0.3 < np.mean(depths) < 0.65 and np.std(depths) > 0.15


def test_multikey_binds_every_asked_key():
    task, found = docs("multikey:keys=6,queries=3,length=120")
    for doc in found:
        facts = dict(re.findall(r"The secret of (\w+) is (\w+)\.", doc["prompt"]))
        asked = re.search(r"The secrets of (.*) :$", doc["prompt"])[1].split(" | ")
        assert len(facts) == 6 and [facts[k] for k in asked] == doc["answer"].split(" | ")
        requests = task.requests(doc, [])
        assert [
            r.prompt.endswith(f" {a} |") for r, a in zip(requests[1:], doc["answer"].split(" | "), strict=False)
        ] == [True, True]
        graded = task.grade(doc, [f" {facts[asked[0]]} ", " wrong", f" {facts[asked[2]]}"])
        assert graded == {"accuracy": 0.0, "words": pytest.approx(2 / 3)}


def test_nhop_chain_leads_to_the_answer():
    for hops in (1, 3):
        _, found = docs(f"nhop:hops={hops},chains=4,length=120")
        for doc in found:
            step = dict(re.findall(r"From (\w+) go to (\w+)\.", doc["prompt"]))
            place = re.search(r"From (\w+) after \d steps? comes$", doc["prompt"])[1]
            assert len(step) == 4 * hops
            for _ in range(hops):
                place = step[place]
            assert place == doc["answer"] and place not in step


def test_copy_and_arithmetic():
    task, found = docs("copy:length=12")
    for doc in found:
        assert doc["prompt"] == f"Copy: {doc['answer']}. Again:" and len(doc["answer"].split()) == 12
        half = " ".join(doc["answer"].split()[:6])
        assert task.grade(doc, [half])["words"] == 0.5 and task.grade(doc, [half])["accuracy"] == 0
    _, found = docs("copy:length=20,distinct=true")
    assert all(len(set(d["answer"].split())) == 20 for d in found)
    _, found = docs("arithmetic:digits=3,terms=4,operations=+-*", 200)
    for doc in found:
        assert eval(doc["prompt"].removesuffix(" =")) == int(doc["answer"])
    lengths = Counter(len(n) for d in found for n in re.findall(r"\d+", d["prompt"]))
    assert min(lengths[1], lengths[2], lengths[3]) > 0.25 * sum(lengths.values())
    _, found = docs("arithmetic:digits=3,spaced=true")
    assert all(
        eval(d["prompt"].removesuffix(" =").replace(" ", "")) == int(d["answer"].replace(" ", "")) for d in found
    )


def test_choice_and_generate_read_files(tmp_path):
    rows = [
        {"q": "2+2", "opts": ["3", "4"], "key": "B", "split": "test"},
        {"q": "1+1", "opts": ["2", "5"], "key": "2", "split": "train"},
    ]
    (tmp_path / "t.jsonl").write_text("\n".join(json.dumps(r) for r in rows))
    spec = {
        "method": "choice",
        "file": str(tmp_path / "t.jsonl"),
        "question": "q",
        "choices": "opts",
        "answer": "key",
    }
    task = registry.build("task", spec)
    (doc,), (shot,) = list(task.docs("test", None, 0)), list(task.docs("train", None, 0))
    (request,) = task.requests(doc, [shot])
    assert request.prompt == "Question: 1+1\nAnswer: 2\n\nQuestion: 2+2\nAnswer:" and request.choices == (
        " 3",
        " 4",
    )
    assert doc["answer"] == 1 and shot["answer"] == 0
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet")
    again = registry.build("task", spec | {"file": str(tmp_path / "t.parquet")})
    assert list(again.docs("test", None, 0)) == [doc]
    with pytest.raises(UserError, match="Did you mean 'opts'"):
        list(registry.build("task", spec | {"choices": "opt"}).docs("test", None, 0))
    with pytest.raises(UserError, match="no file"):
        list(registry.build("task", "choice:file=nowhere.jsonl").docs("test", None, 0))
    with pytest.raises(UserError, match="no index"):
        list(registry.build("task", spec | {"answer": "q"}).docs("test", None, 0))
    written = registry.build(
        "task",
        {
            "method": "generate",
            "file": str(tmp_path / "t.jsonl"),
            "question": "q",
            "answer": "opts",
            "context": "key",
        },
    )
    (doc,) = written.docs("test", None, 0)
    assert doc["prompt"].startswith("B\n\nQuestion: 2+2")
    assert written.grade(doc, [" The 4. "])["accuracy"] == 1 and written.grade(doc, ["it is 4"]) == {
        "accuracy": 0.0,
        "f1": 0.5,
        "contains": 1.0,
    }


def test_choice_picks_by_likelihood(model, tokenizer):
    """The runner's accuracy on a file equals the argmax computed from single likelihoods."""
    from modicum.evaluate.score import loglikelihood

    spec = f"choice:file={registry.load('task', 'choice').module.TOY.file}"
    (result,) = run_tasks(model, tokenizer, [spec])
    task, right = registry.build("task", spec), []
    for doc in task.docs("test", None, 0):
        scores = [loglikelihood(model, tokenizer, [(doc["prompt"], " " + c)])[0] for c in doc["choices"]]
        right.append(np.argmax([s.nats / s.nbytes for s in scores]) == doc["answer"])
    assert result.value == pytest.approx(np.mean(right)) and result.figures["accuracy"]["documents"] == 6


def test_a_model_that_knows_scores_one(tokenizer):
    """A decoder trained for a moment on eight sums must pass them: the road from text to grade."""
    config = llama_like(tokenizer.vocab_size, 64, 1, context_length=64, eos_ids=(tokenizer.eos_id,))
    model = Decoder(config, torch.Generator().manual_seed(0))
    task = registry.build("task", "arithmetic:digits=1,operations=+,examples=8")
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    rows = [[tokenizer.eos_id, *tokenizer.encode(task.text(d)), tokenizer.eos_id] for d in task.docs("test", None, 0)]
    width = max(map(len, rows))
    tokens = torch.tensor([r + [tokenizer.pad_id] * (width - len(r)) for r in rows])
    for _ in range(300):
        logits = model(tokens[:, :-1])
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), tokens[:, 1:].flatten(), ignore_index=tokenizer.pad_id
        )
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    (result,) = run_tasks(model, tokenizer, ["arithmetic:digits=1,operations=+,examples=8"], prefix="start")
    assert result.value == 1.0


def test_kept_items_are_not_asked_again(model, tokenizer, tmp_path, monkeypatch):
    file, tasks = tmp_path / "items.jsonl", ["copy:length=3", "multikey:keys=2,length=20"]
    monkeypatch.setattr(running, "CHUNK", 4)
    calls = []
    whole = running.answer

    def stops(*args, **kwargs):
        calls.append(len(args[2]))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return whole(*args, **kwargs)

    monkeypatch.setattr(running, "answer", stops)
    with pytest.raises(KeyboardInterrupt):
        run_tasks(model, tokenizer, tasks, limit=10, keep=file)
    with open(file, "a") as torn:
        torn.write('{"kind": "item", "key": "torn')
    monkeypatch.setattr(running, "answer", whole)
    results = run_tasks(model, tokenizer, tasks, limit=10, keep=file)
    assert [r.resumed for r in results] == [4, 0]
    again = run_tasks(model, tokenizer, tasks, limit=10, keep=file)
    fresh = run_tasks(model, tokenizer, tasks, limit=10)
    assert [r.resumed for r in again] == [10, 10]
    assert [r.figures for r in again] == [r.figures for r in fresh] == [r.figures for r in results]
    (other,) = run_tasks(make(tokenizer, 1), tokenizer, tasks[:1], limit=10, keep=file)
    (shots,) = run_tasks(model, tokenizer, tasks[:1], limit=10, shots=1, keep=file)
    assert other.resumed == shots.resumed == 0
    assert model_fingerprint(model, tokenizer) == model_fingerprint(make(tokenizer), tokenizer)


def test_text_resumes_and_agrees(model, tokenizer, tmp_path):
    from modicum.evaluate.lm import bits_per_byte

    texts = [(str(i), d["text"]) for i, d in enumerate(solved_texts("needle:length=60", 12))]
    kept = Kept(tmp_path / "items.jsonl")
    run_text(model, tokenizer, texts[:5], keep=kept)
    result = run_text(model, tokenizer, texts, keep=tmp_path / "items.jsonl")
    direct = bits_per_byte(model, tokenizer, [t for _, t in texts])
    assert result.resumed == 5 and result.value == pytest.approx(direct.bits_per_byte, rel=1e-5)
    assert result.figures["bits_per_byte"]["stderr"] == pytest.approx(direct.stderr, rel=1e-4)


def test_paired_differences():
    rng = np.random.default_rng(0)
    hard = rng.random(500)
    a, b = (hard + 0.1 + 0.02 * rng.normal(size=500)), hard + 0.02 * rng.normal(size=500)
    said = paired(a, b)
    assert said["low"] < 0.1 < said["high"]
    assert said["stderr"] == pytest.approx((a - b).std(ddof=1) / math.sqrt(500))
    assert said["stderr"] < 0.2 * math.hypot(a.std(), b.std()) / math.sqrt(500)
    assert said["above"] + said["below"] + said["equal"] == 500
    size = rng.integers(50, 150, 500)
    ratio = paired_ratio(a * size, b * size, size)
    assert (
        ratio["difference"] == pytest.approx(((a - b) * size).sum() / size.sum()) and ratio["low"] < 0.1 < ratio["high"]
    )
    with pytest.raises(UserError, match="same items"):
        paired([1.0], [1.0, 2.0])


def test_compare_uses_common_items(model, tokenizer):
    a = run_tasks(model, tokenizer, ["copy:length=2"], limit=6)
    b = run_tasks(make(tokenizer, 1), tokenizer, ["copy:length=2"], limit=4)
    rows = compare(a, b)
    assert {r["figure"] for r in rows} == {"accuracy", "words"} and all(r["items"] == 4 for r in rows)


def test_split_tasks():
    assert split_tasks("needle, copy:length=64,distinct=true,lm-eval:arc_easy,nhop") == [
        "needle",
        "copy:length=64,distinct=true",
        "lm-eval:arc_easy",
        "nhop",
    ]


def test_verb(model, tokenizer, tmp_path, monkeypatch):
    tokenizer.save(tmp_path / "tokenizer")
    for name, decoder in (("a", model), ("b", make(tokenizer, 1))):
        save_model(decoder, tmp_path / name, tmp_path / "tokenizer")
    (tmp_path / "texts").mkdir()
    for i, doc in enumerate(solved_texts("needle:length=30", 3)):
        (tmp_path / "texts" / f"{i}.txt").write_text(doc["text"])

    def invoke(*words):
        monkeypatch.setattr("sys.argv", ["modicum", "eval", *words])
        return CliRunner().invoke(app, ["eval", *words])

    common = [
        "--tasks",
        "copy:length=2,arithmetic",
        "--text",
        str(tmp_path / "texts"),
        "--limit",
        "3",
        "--out",
        str(tmp_path / "out"),
        "--json",
    ]
    done = invoke(str(tmp_path / "a"), *common)
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    assert [r["task"] for r in said["results"]] == [str(tmp_path / "texts"), "copy:length=2", "arithmetic"]
    assert said["results"][0]["figures"]["bits_per_byte"]["documents"] == 3
    both = json.loads(invoke(str(tmp_path / "a"), *common, "--against", str(tmp_path / "b")).stdout)
    assert all(r["resumed"] == 3 for r in both["results"])
    assert {r["figure"] for r in both["paired"]} == {"bits_per_byte", "accuracy", "words"}
    for words in (
        ("a",),
        ("a", "--tasks", "neddle"),
        ("a", "--text", "nowhere"),
        ("nowhere", "--tasks", "copy"),
        ("a", "--tasks", "choice"),
    ):
        failed = invoke(str(tmp_path / words[0]), *words[1:])
        assert isinstance(failed.exception, UserError) and "\n" not in str(failed.exception)
