"""Tasks in the wording of lm-evaluation-harness: the log-likelihood of every choice equals its own, task by task."""

import json
from pathlib import Path

import pytest
import torch

from modicum.core import registry
from modicum.core.errors import UserError
from modicum.data.tokenizer import Tokenizer
from modicum.evaluate.run import run_tasks
from modicum.model.config import llama_like
from modicum.model.decoder import Decoder
from modicum.model.folder import load_model, save_model

lm_eval = pytest.importorskip("lm_eval")
FOLDER = Path(lm_eval.__file__).parent / "tasks"
LETTERS = ["A", "B", "C", "D", "E"]


def labelled(texts):
    return {"text": texts, "label": LETTERS[: len(texts)]}


# task: (the harness's file, rows in the data set's own columns)
TASKS = {
    "openbookqa": (
        "openbookqa/openbookqa.yaml",
        [
            {
                "question_stem": "Snow in the sun will",
                "choices": labelled(["melt", "burn", "grow", "sing"]),
                "answerKey": "A",
            },
            {
                "question_stem": "A magnet pulls",
                "choices": labelled(["wood", "iron", "glass", "air"]),
                "answerKey": "B",
            },
        ],
    ),
    "boolq": (
        "super_glue/boolq/default.yaml",
        [
            {"passage": "Sand is made of small stones.", "question": "is sand made of stones", "label": 1},
            {"passage": "The sun is a star.", "question": "is the sun a planet", "label": 0},
        ],
    ),
    "sciq": (
        "sciq/sciq.yaml",
        [
            {
                "support": " Ice is frozen water.",
                "question": "What is ice?",
                "distractor1": "stone",
                "distractor2": "sand",
                "distractor3": "air",
                "correct_answer": "frozen water",
            },
            {
                "support": "",
                "question": "What shines by day?",
                "distractor1": "the moon",
                "distractor2": "snow",
                "distractor3": "sand",
                "correct_answer": "the sun",
            },
        ],
    ),
    "copa": (
        "super_glue/copa/default.yaml",
        [
            {
                "premise": "The snow melted.",
                "question": "cause",
                "choice1": "The sun shone.",
                "choice2": "It was cold.",
                "label": 0,
            },
            {
                "premise": "He dropped the ice.",
                "question": "effect",
                "choice1": "It sang.",
                "choice2": "It broke.",
                "label": 1,
            },
        ],
    ),
    "commonsense_qa": (
        "commonsense_qa/default.yaml",
        [
            {
                "question": " Where is sand? ",
                "choices": labelled(["beach", "sky", "sun", "ice", "book"]),
                "answerKey": "A",
            },
            {"question": "What is cold?", "choices": labelled(["fire", "sun", "ice", "tea", "sand"]), "answerKey": "C"},
        ],
    ),
    "social_iqa": (
        "siqa/siqa.yaml",
        [
            {
                "context": "Ann gave Tom ice.",
                "question": "How does Tom feel?",
                "answerA": "glad",
                "answerB": "like a stone",
                "answerC": "blue",
                "label": "1",
            },
            {
                "context": "Tom lost his book.",
                "question": "What will Tom do next?",
                "answerA": "sing",
                "answerB": "look for it",
                "answerC": "melt",
                "label": "2",
            },
        ],
    ),
    "mmlu": (
        "mmlu/default/mmlu_anatomy.yaml",
        [
            {
                "question": " What is bone? ",
                "choices": ["ice", "hard", "sand", "sky"],
                "answer": 1,
                "subject": "anatomy",
            },
            {
                "question": "What is skin?",
                "choices": ["soft", "stone", "sun", "air"],
                "answer": 0,
                "subject": "anatomy",
            },
        ],
    ),
    "winogrande": (
        "winogrande/default.yaml",
        [
            {"sentence": "Ann thanked Sue as _ had helped.", "option1": "Ann", "option2": "Sue", "answer": "2"},
            {"sentence": "The ice was in the sun so the _ melted.", "option1": "ice", "option2": "sun", "answer": "1"},
        ],
    ),
    "medmcqa": (
        "medmcqa/medmcqa.yaml",
        [
            {"question": "What is ice?", "opa": "sand", "opb": "water", "opc": "stone", "opd": "air", "cop": 1},
            {"question": "What is bone?", "opa": "hard", "opb": "blue", "opc": "ice", "opd": "sky", "cop": 0},
        ],
    ),
    "piqa": (
        "piqa/piqa.yaml",
        [
            {"goal": "To melt ice", "sol1": "put it in the sun", "sol2": "put it in the snow", "label": 0},
            {"goal": "To cool tea", "sol1": "put sand in it", "sol2": "put ice in it", "label": 1},
        ],
    ),
    "arc_easy": (
        "arc/arc_easy.yaml",
        [
            {
                "question": "What melts in the sun?",
                "choices": labelled(["sand", "ice", "stone", "iron"]),
                "answerKey": "B",
            },
            {
                "question": "What is blue?",
                "choices": labelled(["the sky", "snow", "sand", "the sun"]),
                "answerKey": "A",
            },
        ],
    ),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wordings")
    texts = []
    for name, (file, rows) in TASKS.items():
        data = folder / f"{name}.jsonl"
        data.write_text("\n".join(json.dumps(r) for r in rows))
        texts += [json.dumps(r) for r in rows]
        (folder / f"local_{name}.yaml").write_text(
            f"include: {FOLDER / file}\ntask: local_{name}\ndataset_path: json\ndataset_name: null\n"
            f"dataset_kwargs: {{data_files: {{test: {data}}}}}\ntest_split: test\nvalidation_split: null\n"
            "training_split: null\nfewshot_split: null\ntag: null\n"
        )
    tokenizer = Tokenizer.train(texts * 2, 600)
    config = llama_like(tokenizer.vocab_size, 64, 2, context_length=256, eos_ids=(tokenizer.eos_id,))
    tokenizer.save(folder / "tokenizer")
    save_model(Decoder(config, torch.Generator().manual_seed(0)), folder / "model", folder / "tokenizer")
    return folder


def test_every_choice_scores_as_in_the_harness(place, tmp_path, monkeypatch):
    import datasets
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager, get_task_dict

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    model, tokenizer = load_model(place / "model"), Tokenizer.load(place / "model")
    names = list(TASKS)
    keys = [n.replace("_", "-") for n in names]
    ours = run_tasks(model, tokenizer, [f"{k}:file={place / n}.jsonl" for k, n in zip(keys, names, strict=True)])
    manager = TaskManager(include_path=str(place), include_defaults=False)
    theirs = evaluate(
        HFLM(pretrained=str(place / "model"), device="cpu", dtype="float32", batch_size=4),
        get_task_dict([f"local_{n}" for n in names], manager),
        bootstrap_iters=0,
    )
    for name, result in zip(names, ours, strict=True):
        samples = theirs["samples"][f"local_{name}"]
        assert len(samples) == len(result.items) == 2
        for mine, other in zip(result.items, samples, strict=True):
            expected = [float(r[0]) for r in other["filtered_resps"]]
            assert mine["nats"] == pytest.approx(expected, abs=2e-4), (name, mine["prompt"])
            assert mine["figures"]["acc"] == other["acc"], name
            if "acc_norm" in other and name not in ("medmcqa",):
                assert mine["figures"]["acc_char"] == other["acc_norm"], name


def test_normalisations_stand_side_by_side(tmp_path):
    from modicum.evaluate.score import LogLikelihood

    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps({"question": "x", "choices": ["é" * 6, "b" * 8, "cc"], "answer": 0}))
    task = registry.build("task", f"choice:file={path},pmi=true")
    (doc,) = task.docs("test", None, 0)
    # raw: 2 wins; by characters 0 (12 / 6 = 2) after 1 (15 / 8): 1 wins; by bytes 0 (12 / 12); by tokens 2 (6 / 3)
    replies = [LogLikelihood(-12.0, False, 4, 13), LogLikelihood(-15.0, False, 5, 9), LogLikelihood(-6.0, False, 3, 3)]
    alone = [LogLikelihood(-20.0, False, 4, 13), LogLikelihood(-15.0, False, 5, 9), LogLikelihood(-7.0, False, 3, 3)]
    said = task.grade(doc, [replies, alone])
    assert (said["acc"], said["acc_norm"], said["acc_char"], said["acc_token"], said["acc_pmi"]) == (0, 1, 0, 0, 1)
    p = torch.softmax(torch.tensor([-12.0, -15.0, -6.0], dtype=torch.float64), 0)
    assert said["prob"] == pytest.approx(float(p[0]))
    assert said["brier"] == pytest.approx(float((1 - p[0]) ** 2 + p[1] ** 2 + p[2] ** 2))
    assert said["bits_per_byte"] == pytest.approx(
        12 / 0.6931471805599453 / 13
    )  # the bytes that were scored, space included
    assert len(task.requests(doc, [])) == 2
    with pytest.raises(UserError, match="pmi=true"):
        registry.build("task", f"choice:file={path},normalise=pmi")


def test_forms_of_one_question(tmp_path):
    path = tmp_path / "arc_easy.jsonl"
    path.write_text(json.dumps({"question": "What is ice?", "choices": ["sand", "water"], "answer": 1}))
    asked = {}
    for form in ("cloze", "letters", "hybrid"):
        task = registry.build("task", f"arc-easy:file={path},form={form}")
        (doc,) = task.docs("test", None, 0)
        (asked[form],) = task.requests(doc, [])
    listed = "Question: What is ice?\nA. sand\nB. water\nAnswer:"
    assert (asked["cloze"].prompt, asked["cloze"].choices) == ("Question: What is ice?\nAnswer:", (" sand", " water"))
    assert (asked["letters"].prompt, asked["letters"].choices) == (listed, (" A", " B"))
    assert (asked["hybrid"].prompt, asked["hybrid"].choices) == (listed, (" sand", " water"))


def test_clustered_errors_of_subjects(tmp_path):
    rows = [
        {"question": f"{s} {i}?", "choices": ["a", "b", "c", "d"], "answer": 0, "subject": s}
        for s in ("anatomy", "law", "sky")
        for i in range(4)
    ]
    path = tmp_path / "mmlu.jsonl"
    path.write_text("\n".join(json.dumps(r) for r in rows))
    tokenizer = Tokenizer.train([json.dumps(r) for r in rows] * 3, 300)
    config = llama_like(tokenizer.vocab_size, 64, 1, context_length=128, eos_ids=(tokenizer.eos_id,))
    model = Decoder(config, torch.Generator().manual_seed(0)).eval()
    (result,) = run_tasks(model, tokenizer, [f"mmlu:file={path}"])
    assert result.figures["acc"]["clusters"] == 3 and {r["cluster"] for r in result.rows} == {"anatomy", "law", "sky"}
    (one,) = run_tasks(model, tokenizer, [f"mmlu:file={path},subject=law"], limit=2)
    assert [r["cluster"] for r in one.rows] == ["law", "law"]
