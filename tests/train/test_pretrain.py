"""Pretraining as a user does it: new models and given ones, tokens and time."""

from __future__ import annotations

import json
import shutil
import sys
import time

import pytest
import torch
from train_toys import SMALL
from train_toys import curated as make_curated

from modicum.cli import main
from modicum.core.files import read_json
from modicum.data.tokenizer import Tokenizer
from modicum.model.folder import load_config, load_model
from modicum.train.curve import curve


@pytest.fixture(scope="module")
def curated(tmp_path_factory):
    return make_curated(tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def modicum(monkeypatch, capsys):
    """Run the command line here; gives (exit code, output, errors)."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["modicum", *map(str, words)])
        try:
            main()
            code = 0
        except SystemExit as done:
            code = done.code or 0
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


@pytest.fixture(scope="module")
def model(curated, tmp_path_factory):
    from modicum.train.config import PretrainSpec
    from modicum.train.pretrain import pretrain

    out = tmp_path_factory.mktemp("model")
    return pretrain(
        curated,
        out,
        PretrainSpec(parameters="120k", steps=30, sequence_length=64, batch_tokens=512, lr=4e-3, device="cpu"),
    ).folder


def test_from_scratch_to_a_folder_that_transformers_loads(modicum, curated, tmp_path):
    code, out, _ = modicum(
        "pretrain",
        curated,
        "--out",
        tmp_path,
        "--tokens",
        "30ktok",
        "--schedule",
        "wsd:decay=0.5",
        "--eval-every",
        20,
        "--json",
        *SMALL,
    )
    told = json.loads(out)
    assert code == 0 and told["finished"] and told["steps"] == 30_000 // 512 and told["tokens"] <= 30_000
    assert 80_000 < told["parameters"] < 160_000 and told["heldout_loss"] < 5.6  # ln 400 = 5.99
    steps = curve(tmp_path / "events.jsonl")
    assert len(steps) == told["steps"] and steps[0]["loss"] > told["loss"]
    assert [e["step"] for e in curve(tmp_path / "events.jsonl", "heldout")] == [20, 40, 58]

    from transformers import AutoModelForCausalLM, AutoTokenizer

    theirs, ours = AutoModelForCausalLM.from_pretrained(told["folder"]), load_model(told["folder"])
    tokens = torch.arange(5, 25)[None]
    assert theirs.dtype == ours.dtype == torch.bfloat16
    with torch.no_grad():
        assert torch.allclose(theirs(tokens).logits.float(), ours(tokens).float(), atol=0.05)
    assert AutoTokenizer.from_pretrained(told["folder"])("import").input_ids
    assert load_config(told["folder"]).eos_ids == (Tokenizer.load(curated).eos_id,)

    code, again, _ = modicum(
        "pretrain",
        curated,
        "--out",
        tmp_path,
        "--tokens",
        "30ktok",
        "--schedule",
        "wsd:decay=0.5",
        "--eval-every",
        20,
        "--json",
        *SMALL,
    )
    assert code == 0
    assert json.loads(again)["loss"] == told["loss"] and len(curve(tmp_path / "events.jsonl")) == told["steps"]


def test_attention_patterns_by_turns(modicum, curated, model, tmp_path):
    arms = "lambda:window=8,sinks=2"
    said = ["--attention", f"sliding:window=16+{arms}", "--steps", 4, "--json"]
    code, out, _ = modicum("pretrain", curated, "--out", tmp_path / "new", *said, *SMALL)
    assert code == 0
    trained = load_model(json.loads(out)["folder"])
    layers = trained.config.per_layer
    assert [c.window for c in layers[:2]] == [16, None] and [c.attention for c in layers[:2]] == [None, arms]
    assert trained.layers[1].attention.pattern is not None
    given = [word for word in SMALL if word not in ("--parameters", "120k")]
    code, out, _ = modicum("pretrain", curated, "--model", model, "--out", tmp_path / "on", *said, *given)
    assert code == 0 and load_config(json.loads(out)["folder"]).per_layer[1].attention == arms
    code, _, err = modicum("pretrain", curated, "--out", tmp_path / "no", "--attention", "lamda", "--steps", 4, *SMALL)
    assert code == 2 and "Did you mean 'lambda'" in err


def test_a_time_budget_becomes_tokens_once(modicum, curated, tmp_path):
    began = time.monotonic()
    code, out, _ = modicum("pretrain", curated, "--out", tmp_path, "--time", "4s", *SMALL)
    taken = time.monotonic() - began
    plan = read_json(tmp_path / "plan.json")
    assert code == 0 and 1.0 < taken < 30 and "held-out" in out
    assert plan["tokens"] == curve(tmp_path / "events.jsonl")[-1]["tokens"]
    rates = [e["lr"] for e in curve(tmp_path / "events.jsonl")]
    assert rates[-1] < 0.2 * max(rates)  # the schedule came to its end
    assert modicum("pretrain", curated, "--out", tmp_path, "--time", "4s", *SMALL)[0] == 0
    assert read_json(tmp_path / "plan.json") == plan


def test_going_on_from_a_model(modicum, curated, model, tmp_path):
    code, out, _ = modicum(
        "pretrain",
        curated,
        "--out",
        tmp_path,
        "--model",
        model,
        "--steps",
        4,
        "--json",
        *SMALL[:4],
        "--device",
        "cpu",
    )
    told = json.loads(out)
    assert code == 0 and told["lr"] == 1e-4 and told["parameters"] == load_config(model).parameters()
    assert curve(tmp_path / "events.jsonl")[0]["loss"] < 5.7  # it did not start over
    for (name, a), b in zip(load_model(model).named_parameters(), load_model(told["folder"]).parameters(), strict=True):
        assert a.ndim == 1 or not torch.equal(a, b), name  # (bf16 rounds four small steps of a norm away)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--steps", "3", "--tokens", "2Mtok"], "length of the run once"),
        ([], "length of the run once"),
        (["--steps", "3", "--parameters", "5X"], "not a number of parameters"),
        (["--steps", "3", "--parameters", "10k", "--batch", "512tok"], "smallest has"),
        (["--steps", "3", "--optimizer", "adam"], "Did you mean 'adamw'"),
        (["--steps", "3", "--schedule", "wsd:dekay=0.1"], "Did you mean 'decay'"),
        (["--steps", "3", "--mixture", "natural:x=1"], "knob"),
        (["--tokens", "2GiB"], "not a number of tokens"),
        (["--steps", "3", "--model", "nowhere"], "unknown model 'nowhere'"),
        (["--steps", "3", "--model", "x", "--parameters", "5M"], "parameters or model"),
        (["--tokens", "100"], "less than one step"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(modicum, curated, tmp_path, words, told):
    code, out, err = modicum("pretrain", curated, "--out", tmp_path / "out", *words)
    assert code == 2 and told in err and err.count("\n") == 1 and not out
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_not_curated(modicum, tmp_path):
    code, _, err = modicum("pretrain", tmp_path, "--out", tmp_path / "out", "--steps", "3")
    assert code == 2 and "modicum curate" in err


def test_another_tokenizer_is_refused(modicum, curated, model, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(model, other)
    Tokenizer.train(["other words than before " * 9], 300).save(other)
    code, _, err = modicum("pretrain", curated, "--out", tmp_path / "out", "--model", other, "--steps", 3)
    assert code == 2 and "another tokenizer" in err and "--tokenizer" in err


@pytest.mark.parametrize(("surgery", "layers"), [("spdf:sparsity=0.5", None), ("gstack:growth=2,grow=0.5", 2)])
def test_surgery_reaches_the_exported_folder(modicum, curated, tmp_path, surgery, layers):
    words = ["pretrain", curated, "--out", tmp_path, "--steps", "6", "--surgery", surgery, "--json", *SMALL]
    code, out, _ = modicum(*words)
    told, model = json.loads(out), load_model(tmp_path / "model", "float32")
    weights = [p for n, p in model.named_parameters() if p.ndim == 2 and n.startswith("layers.")]
    zeros = sum(int((p == 0).sum()) for p in weights) / sum(p.numel() for p in weights)
    assert code == 0 and told["finished"] and told["average_parameters"] < told["parameters"]
    assert zeros == pytest.approx(0.0 if layers else 0.5, abs=2e-3)
    assert not layers or len(model.layers) == layers


def test_a_plan_is_what_the_run_then_counts(modicum, curated, tmp_path):
    """`--plan` writes nothing; its FLOPs and tokens are the run's, its disk bytes those of checkpoints and model."""
    words = ["pretrain", curated, "--out", tmp_path / "run", "--steps", 4, "--averaging", "ema", "--keep", 1, *SMALL]
    words += ["--schedule", "constant", "--json"]
    code, out, _ = modicum(*words, "--plan")
    planned = json.loads(out)
    assert code == 0 and not (tmp_path / "run").exists()
    code, out, _ = modicum(*words)
    did = json.loads(out)
    assert code == 0 and planned["tokens"] == did["tokens"] and planned["parameters"] == did["parameters"]
    assert planned["flops"] == pytest.approx(did["flops"], rel=0.15)
    written = sum(f.stat().st_size for f in (tmp_path / "run").rglob("*.safetensors"))
    assert planned["disk_bytes"] == pytest.approx(written, rel=0.05)
    code, out, _ = modicum("pretrain", curated, "--out", tmp_path / "x", "--time", "5m", *SMALL, "--plan")
    assert code == 0 and "parameters" in out and "tokens" not in out
