"""The playground's generators, grading, the runner, kept items, comparison and the verb."""

import json
import math
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from modicum.cli import app
from modicum.cli.eval import Side, split_tasks
from modicum.core import registry
from modicum.core.errors import UserError
from modicum.data.tokenizer import Tokenizer
from modicum.evaluate.answer import Answerer
from modicum.evaluate.compare import compare, paired, paired_ratio
from modicum.evaluate.kept import Kept, model_fingerprint
from modicum.evaluate.run import run_tasks, run_text, solved_texts
from modicum.model.config import llama_like
from modicum.model.decoder import Decoder
from modicum.model.folder import save_model
from modicum.model.linear import LinearForm
from modicum.serve.engine import Engine


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
    with pytest.raises(UserError, match=r"'validation'\. Allowed: test, train"):
        list(registry.build("task", spec | {"split": "validation"}).docs("test", None, 0))
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


def test_splits_are_chosen(tmp_path):
    def asked(*splits, **knobs):
        """What rows of these splits are asked and shown, by their split's name."""
        rows = [
            {"id": f"{name}-{i}", "question": "q", "answer": "a", "split": name} for name in splits for i in range(9)
        ]
        (tmp_path / "t.jsonl").write_text("\n".join(json.dumps(r) for r in rows))
        task = registry.build("task", {"method": "generate", "file": str(tmp_path / "t.jsonl")} | knobs)
        return [[d["id"].split("-")[0] for d in task.docs(side, 1, 0)] for side in ("test", "train")], task

    assert asked("validation")[0] == [["validation"], []]
    assert asked("train", "validation", "test")[0] == [["test"], ["train"]]
    assert asked("train", "dev", "validation")[0] == [["validation"], ["train"]]
    assert asked("test", "validation")[0] == [["test"], ["validation"]]
    assert asked("train", "validation", "test", split="train")[0] == [["train"], ["validation"]]
    assert asked("one", "two", split="two")[0] == [["two"], []]
    for splits, knobs, match in (
        (("one", "two"), {}, "one, two; choose one with split=NAME"),
        (("validation", "test"), {"split": "vaildation"}, "Did you mean 'validation'"),
        (("test",), {"split": "test", "split_column": "part"}, "no column 'part'"),
    ):
        with pytest.raises(UserError, match=match):
            asked(*splits, **knobs)
    task = asked("train", "test")[1]
    shown = [[d["id"] for d in task.docs("train", 9, seed)] for seed in (0, 0, 1)]
    assert shown[0] == shown[1] != shown[2] and sorted(shown[0]) == sorted(shown[2])
    assert [d["id"] for d in task.docs("test", 3, 0)] == ["test-0", "test-1", "test-2"]


def test_few_shot(model, tokenizer, tmp_path):
    """The same drawn examples before every question; none of them the question itself."""
    rows = [
        {"id": f"{split}{i}", "question": f"{split} {i}", "choices": ["yes", "no"], "answer": i % 2, "split": split}
        for split in ("train", "test")
        for i in range(6)
    ]
    (tmp_path / "t.jsonl").write_text("\n".join(json.dumps(r) for r in rows))
    prompts = []
    whole = Answerer.encode
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Answerer, "encode", lambda self, r: prompts.append(r.prompt) or whole(self, r))
        run_tasks(model, tokenizer, [f"choice:file={tmp_path}/t.jsonl,shots=2"], shots=0)
        with pytest.raises(UserError, match="has 6 examples to show, 7 were asked for"):
            run_tasks(model, tokenizer, [f"choice:file={tmp_path}/t.jsonl"], shots=7)
    shots = {p.rpartition("Question: ")[0] for p in prompts}
    assert len(prompts) == 6 and len(shots) == 1 and shots.pop().count("Question: train") == 2


LAYOUTS = {
    "piqa": (
        [{"goal": "Dry a plate", "sol1": "use a towel", "sol2": "use a sponge", "label": 0}],
        ("Question: Dry a plate\nAnswer:", ["use a towel", "use a sponge"], 0),
    ),
    "hellaswag": (
        [
            {
                "activity_label": "Washing",
                "ctx_a": "A man  holds a plate. [header] Soap",
                "ctx_b": "he",
                "endings": ["dries it. [title] Done", "eats it.", "sings.", "[step] runs."],
                "label": "1",
            }
        ],
        ("Washing: A man holds a plate. Soap He", ["dries it.. Done", "eats it.", "sings.", " runs."], 1),
    ),
    "arc-easy": (
        [{"question": "What melts?", "choices": {"text": ["ice", "fire"], "label": ["1", "2"]}, "answerKey": "2"}],
        ("Question: What melts?\nAnswer:", ["ice", "fire"], 1),
    ),
}
LAYOUTS["arc-challenge"] = LAYOUTS["arc-easy"]


@pytest.mark.parametrize("key", LAYOUTS)
def test_the_data_sets_own_columns(key, tmp_path):
    """Files as they are published ask the same as files with question, choices and answer."""
    rows, (prompt, choices, answer) = LAYOUTS[key]
    (tmp_path / "own.jsonl").write_text("\n".join(json.dumps(r) for r in rows))
    question = prompt.removeprefix("Question: ").removesuffix("\nAnswer:")
    common = {"question": question, "choices": choices, "answer": answer}
    (tmp_path / "common.jsonl").write_text(json.dumps(common))
    found = []
    for name in ("own", "common"):
        task = registry.build("task", f"{key}:file={tmp_path}/{name}.jsonl")
        (doc,) = task.docs("test", None, 0)
        found.append(doc)
        assert (doc["prompt"], doc["choices"], doc["answer"]) == (prompt, choices, answer)
    (tmp_path / "bad.jsonl").write_text(json.dumps({"text": "x"}))
    with pytest.raises(UserError, match="none of the columns"):
        list(registry.build("task", f"{key}:file={tmp_path}/bad.jsonl").docs("test", None, 0))


def test_choice_picks_by_likelihood(model, tokenizer):
    """The runner's accuracy on a file equals the argmax computed from single likelihoods."""
    from modicum.evaluate.score import loglikelihood

    spec = f"choice:file={registry.load('task', 'choice').module.TOY.file}"
    (result,) = run_tasks(model, tokenizer, [spec])
    task, right = registry.build("task", spec), {"acc": [], "acc_norm": [], "acc_token": []}
    for doc in task.docs("test", None, 0):
        scores = [loglikelihood(model, tokenizer, [(doc["prompt"], " " + c)])[0] for c in doc["choices"]]
        nats = np.array([s.nats for s in scores])
        for name, size in (
            ("acc", [1] * len(nats)),
            ("acc_norm", [len(c) for c in doc["choices"]]),
            ("acc_token", [s.tokens for s in scores]),
        ):
            right[name].append((nats / size).argmax() == doc["answer"])
    for name, values in right.items():
        assert result.figures[name]["value"] == pytest.approx(np.mean(values))
    assert result.value == result.figures["acc_norm"]["value"] and result.figures["acc_norm"]["documents"] == 6
    (raw,) = run_tasks(model, tokenizer, [f"{spec},normalise=none"])
    assert raw.value == result.figures["acc"]["value"]


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
    whole = Answerer.replies

    def stops(self, documents, longest):
        for i, reply in enumerate(whole(self, documents, longest)):
            if i == 4:
                raise KeyboardInterrupt
            yield reply

    monkeypatch.setattr(Answerer, "replies", stops)
    with pytest.raises(KeyboardInterrupt):
        run_tasks(model, tokenizer, tasks, limit=10, keep=file)
    with open(file, "a") as torn:
        torn.write('{"kind": "item", "key": "torn')
    monkeypatch.setattr(Answerer, "replies", whole)
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


def test_compare_asks_for_the_same_items(model, tokenizer):
    a = run_tasks(model, tokenizer, ["copy:length=2"], limit=6)
    b = run_tasks(make(tokenizer, 1), tokenizer, ["copy:length=2"], limit=6)
    rows = compare(a, b)
    assert {r["figure"] for r in rows} == {"accuracy", "words"} and all(r["items"] == 6 for r in rows)
    assert [r["figure"] for r in rows if "p_holm" in r] == ["accuracy"]
    with pytest.raises(UserError, match="no result for 2 items"):
        compare(a, run_tasks(make(tokenizer, 1), tokenizer, ["copy:length=2"], limit=4))
    with pytest.raises(UserError, match="asked in other words"):
        compare(a, run_tasks(model, tokenizer, ["copy:length=2"], limit=6, shots=1))


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


def test_sides():
    side = Side("m", kv="snapkv:budget=0.5", form="int8")
    assert side.other("other") == Side("other", kv="snapkv:budget=0.5", form="int8")
    assert side.other("owner/name:form=int4,kv=snapkv:budget=0.3,window=8,activation-bits=8") == Side(
        "owner/name", kv="snapkv:budget=0.3,window=8", form="int4", activation_bits=8
    )
    assert side.other("kv=full") == Side("m", form="int8") and str(side.other("kv=full")) == "m:form=int8"
    for text, match in (("m:from=int4", "Did you mean 'form'"), ("form=int8,window=8", "unknown option")):
        with pytest.raises(UserError, match=match):
            side.other(text)


def test_verb_with_data_and_engine_options(tokenizer, tmp_path, monkeypatch):
    """Tasks find their files, the engine's options reach it, and the same model in another form is paired with it."""
    tokenizer.save(tmp_path / "tokenizer")
    save_model(make(tokenizer), tmp_path / "a", tmp_path / "tokenizer")
    toy = registry.load("task", "piqa").module.TOY.file
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "arc_easy.jsonl").write_text(Path(toy).read_text())
    engines = []
    whole = Engine.__init__
    monkeypatch.setattr(Engine, "__init__", lambda self, *a: engines.append(self) or whole(self, *a))

    def invoke(*words):
        words = ["eval", str(tmp_path / "a"), "--data", str(tmp_path / "data"), "--out", str(tmp_path / "out"), *words]
        monkeypatch.setattr("sys.argv", ["modicum", *words])
        return CliRunner().invoke(app, words)

    done = invoke("--tasks", "arc-easy", "--against", "form=int8,kv=snapkv:budget=0.5", "--json")
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    assert said["results"][0]["published"]["figure"].startswith("SmolLM2")
    assert said["against"].endswith("a:form=int8,kv=snapkv:budget=0.5")
    nats = [next(r for r in said["paired"] if r["figure"] == "nats")[side] for side in "ab"]
    assert nats[0] != nats[1] and nats[0] == pytest.approx(nats[1], rel=0.05)
    assert [e.config.kv for e in engines] == ["full", "snapkv:budget=0.5"]
    assert [e.config.block_size for e in engines] == [4, 16]  # a policy's blocks are those it is served with
    assert any(isinstance(m, LinearForm) for m in engines[1].model.modules())
    table = invoke("--tasks", "arc-easy").output
    assert "published" in table and "acc_norm *" in table and str(tmp_path / "data") not in table
    for words, match in ((("--tasks", "piqa"), "piqa.parquet"), (("--tasks", "choice"), "choice.parquet")):
        failed = invoke(*words)
        assert isinstance(failed.exception, UserError) and match in str(failed.exception)


def test_mqar_and_phone_book_and_sets_ask_what_can_be_known():
    task, found = docs("mqar:pairs=6,queries=3,length=60")
    for doc in found:
        text = task.text(doc)
        pairs = dict(p.split(" = ") for p in doc["prompt"].split(". ")[:6])
        requests = task.requests(doc, [])
        assert len(requests) == 3 and len(pairs) == len(set(pairs.values())) == 6
        keys = [r.prompt.split()[-2] for r in requests]
        assert len(set(keys)) == 3 and all(text.startswith(r.prompt) for r in requests)
        right = [f" {pairs[key]}" for key in keys]
        assert all(text[len(r.prompt) :].startswith(a + ".") for r, a in zip(requests, right, strict=True))
        assert task.grade(doc, right) == {"accuracy": 1, "all": 1}
        assert task.grade(doc, [right[0], " no", right[2]]) == {"accuracy": pytest.approx(2 / 3), "all": 0}
        assert 55 <= len(doc["prompt"].replace("=", "").split()) <= 70 and task.chance(doc) == 1 / 6
    for distinct in ("false", "true"):
        _, found = docs(f"phone-book:entries=12,digits=5,distinct={distinct}")
        for doc in found:
            *lines, last = doc["prompt"].split("\n")
            book = dict(line.split(": ") for line in lines)
            assert len(book) == len(set(book.values())) == 12 and len(doc["answer"]) == 5
            assert book[last.removeprefix("The number of ").removesuffix(" is")] == doc["answer"]
            if distinct == "true":
                assert len({n.split()[0] for n in book}) == len({n.split()[1] for n in book}) == 12
    _, found = docs("phone-book:entries=5,depth=0")
    assert all(d["prompt"].split(":")[0] in d["prompt"].split("\n")[-1] for d in found)
    task, found = docs("set-disjointness:first=4,second=30")
    for doc in found:
        first, second = (part.split(": ")[1].split(", ") for part in doc["prompt"].split(". ")[:2])
        second[-1] = second[-1].split(".")[0]
        assert (len(first), len(second)) == (4, 30) and set(first) & set(second) == {doc["answer"]}
        assert task.chance(doc) == 0.25
    task, found = docs("set-disjointness:answer=decide", 60)
    yes = 0
    for doc in found:
        first, second = (part.split(": ")[1].split(", ") for part in doc["prompt"].split(". ")[:2])
        second[-1] = second[-1].split(".")[0]
        assert (len(set(first) & set(second)) == 1) == (doc["answer"] == "yes")
        yes += doc["answer"] == "yes"
    assert 18 <= yes <= 42 and task.chance(found[0]) == 0.5
