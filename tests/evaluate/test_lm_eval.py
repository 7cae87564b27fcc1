"""The lm-eval adapter: local YAML tasks without network, agreement with lm-eval's own Hugging Face model."""

import json

import pytest
import torch

from modicum.core.errors import UserError
from modicum.data.tokenizer import Tokenizer
from modicum.evaluate.run import run_tasks
from modicum.model.config import llama_like
from modicum.model.decoder import Decoder
from modicum.model.folder import load_model, save_model

pytest.importorskip("lm_eval")

HEAD = """
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
test_split: test
"""
TASKS = {
    "local_choice": 'output_type: multiple_choice\ndoc_to_text: "Question: {{question}}\\nAnswer:"\n'
    'doc_to_choice: "{{choices}}"\ndoc_to_target: label\nmetric_list: [{metric: acc}, {metric: acc_norm}]\n',
    "local_written": 'output_type: generate_until\ndoc_to_text: "{{question}}"\n'
    'doc_to_target: "{{choices[label]}}"\n'
    'generation_kwargs: {until: ["\\n", "is"], max_gen_toks: 6}\nmetric_list: [{metric: exact_match}]\n',
    "local_text": 'output_type: loglikelihood_rolling\ndoc_to_text: ""\ndoc_to_target: "{{question}}"\n'
    "metric_list: [{metric: bits_per_byte}]\n",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lm_eval")
    things = [("snow", "white ice"), ("sand", "stone"), ("sun", "sky")] * 3
    rows = [
        {
            "question": f"What is {a} and {b}? " + "It is a long story. " * (i % 3),
            "choices": [a, b, "both"],
            "label": i % 3,
        }
        for i, (a, b) in enumerate(things)
    ]
    (folder / "data.json").write_text("\n".join(json.dumps(r) for r in rows))
    for name, body in TASKS.items():
        (folder / f"{name}.yaml").write_text(f"task: {name}\n" + HEAD.format(data=folder / "data.json") + body)
    tokenizer = Tokenizer.train([r["question"] for r in rows] * 3, 400)
    config = llama_like(tokenizer.vocab_size, 64, 2, context_length=128, eos_ids=(tokenizer.eos_id,))
    tokenizer.save(folder / "tokenizer")
    save_model(Decoder(config, torch.Generator().manual_seed(0)), folder / "model", folder / "tokenizer")
    return folder


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    import datasets

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def test_agrees_with_lm_evals_own_model(place, tmp_path):
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager, get_task_dict

    model, tokenizer = load_model(place / "model"), Tokenizer.load(place / "model")
    names = [f"lm-eval:{t}" for t in TASKS]
    ours = run_tasks(model, tokenizer, names, include_path=place, keep=tmp_path / "items.jsonl")
    assert [r.task for r in ours] == names
    manager = TaskManager(include_path=str(place), include_defaults=False)
    hugging_face = HFLM(pretrained=str(place / "model"), device="cpu", dtype="float32", batch_size=4)
    theirs = evaluate(hugging_face, get_task_dict(list(TASKS), manager), bootstrap_iters=0)
    for result in ours:
        name = result.task.removeprefix("lm-eval:")
        for figure, said in result.figures.items():
            (value,) = [v for k, v in theirs["results"][name].items() if k.split(",")[0] == figure]
            assert said["value"] == pytest.approx(value, rel=1e-4), (name, figure)
        for mine, other in zip(result.rows, theirs["samples"][name], strict=True):
            assert mine["id"] == str(other["doc_id"])
    # every request was kept: the second run answers without the model
    lines = len((tmp_path / "items.jsonl").read_text().splitlines())
    model.forward = model.hidden = None
    again = run_tasks(model, tokenizer, names, include_path=place, keep=tmp_path / "items.jsonl")
    assert [r.figures for r in again][:2] == [r.figures for r in ours][:2]
    assert len((tmp_path / "items.jsonl").read_text().splitlines()) == lines


def test_no_such_folder(place):
    model, tokenizer = load_model(place / "model"), Tokenizer.load(place / "model")
    with pytest.raises(UserError, match="no folder"):
        run_tasks(model, tokenizer, ["lm-eval:local_choice"], include_path=place / "none")


@pytest.mark.slow
def test_unknown_task_reads_every_task_of_the_harness(place):
    model, tokenizer = load_model(place / "model"), Tokenizer.load(place / "model")
    with pytest.raises(UserError, match="Did you mean 'local_choice'"):
        run_tasks(model, tokenizer, ["lm-eval:local_choise"], include_path=place)


def test_a_chat_template_is_applied_once(place, monkeypatch):
    """Written answers are asked for through the template by default, choices only with `always`; the harness wraps."""
    from modicum.evaluate.answer import Answerer

    model, tokenizer = load_model(place / "model"), Tokenizer.load(place / "model")
    prompts = []
    whole = Answerer.encode
    monkeypatch.setattr(Answerer, "encode", lambda self, r: prompts.append(r.prompt) or whole(self, r))
    mark = tokenizer.chat([{"role": "user", "content": "What"}]).partition("What")[0]
    for template, name, marks in (
        ("auto", "local_written", 1),
        ("auto", "local_choice", 0),
        ("always", "local_choice", 1),
        ("none", "local_written", 0),
    ):
        prompts.clear()
        run_tasks(model, tokenizer, [f"lm-eval:{name}"], include_path=place, limit=2, template=template)
        assert prompts and all(p.count(mark) == marks for p in prompts), (template, name, prompts[:1])
