"""Adapting a stored model from end to end: losses, files, resume, forms and mistakes."""

import json
import shutil
import sys
from pathlib import Path

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

from modicum.adapt.peft_format import load_peft
from modicum.adapt.run import adapt
from modicum.adapt.spec import AdaptSpec
from modicum.budget import Deadline
from modicum.core.errors import UserError
from modicum.core.events import Events, read_events
from modicum.data.tokenizer import Tokenizer
from modicum.model import attach
from modicum.model.config import llama_like
from modicum.model.decoder import Decoder
from modicum.model.folder import load_model, save_model

PAIRS = [(f"what is {a} plus {b}?", f"{a} plus {b} is {a + b}") for a in range(10) for b in range(10)]
QUICK = dict(form="lora:rank=4", lr=1e-2, steps=12, sequence_length=48, batch_sequences=2, dtype="float32")
TOKENS = torch.arange(3, 19).view(1, 16)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a tiny random model (`model`) and pairs (`pairs.jsonl`)."""
    root = tmp_path_factory.mktemp("adapt")
    tokenizer = Tokenizer.train([f"{q} {a}" for q, a in PAIRS], 400)
    tokenizer.save(root / "tokenizer")
    config = llama_like(tokenizer.vocab_size, 32, 2, 2, context_length=64)
    model = Decoder(config, torch.Generator().manual_seed(0))
    save_model(model, root / "model", root / "tokenizer")
    (root / "pairs.jsonl").write_text("\n".join(json.dumps({"question": q, "answer": a}) for q, a in PAIRS))
    return root


def run(place: Path, out: Path, **knobs):
    more = {k: knobs.pop(k) for k in ("deadline", "events") if k in knobs}
    return adapt(place / "model", place / "pairs.jsonl", AdaptSpec(**(QUICK | knobs)), out, **more)


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        out = model.eval()(TOKENS)
    return getattr(out, "logits", out)


def test_learns_and_saves_what_peft_and_transformers_load(place: Path, tmp_path: Path) -> None:
    events = Events(tmp_path / "events.jsonl", "adapt")
    result = run(place, tmp_path / "out", steps=60, merge=True, events=events)
    assert result.heldout_after < 0.7 * result.heldout_before
    assert result.pairs + result.heldout_pairs == 100 and result.heldout_pairs > 0 and result.steps == 60
    assert result.trainable == sum(4 * (i + o) for i, o in [(32, 32)] * 4 + [(32, 128)] * 2 + [(128, 32)]) * 2
    assert json.loads((tmp_path / "out" / "adapt.json").read_text()) == result.as_dict()
    assert [e["loss"] for e in read_events(tmp_path / "events.jsonl", "heldout")] == [
        result.heldout_before,
        result.heldout_after,
    ]

    base = transformers.AutoModelForCausalLM.from_pretrained(place / "model", dtype=torch.float32)
    with_adapter = logits(peft.PeftModel.from_pretrained(base, result.adapter))
    merged = transformers.AutoModelForCausalLM.from_pretrained(result.model, dtype=torch.float32)
    torch.testing.assert_close(logits(merged), with_adapter, atol=1e-4, rtol=1e-4)
    ours = load_model(place / "model")
    plain = logits(ours)
    load_peft(ours, result.adapter)
    torch.testing.assert_close(logits(ours), with_adapter, atol=1e-4, rtol=1e-4)
    assert (with_adapter - plain).abs().max() > 0.1
    assert Tokenizer.load(result.model).vocab_size == Tokenizer.load(place / "model").vocab_size


class AfterPolls(Deadline):
    """A deadline that passes when it has been looked at `n` times."""

    def __init__(self, n: int):
        super().__init__(None)
        self.n = n

    @property
    def passed(self) -> bool:
        self.n -= 1
        return self.n < 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_stopped_by_its_deadline_it_goes_on_bit_for_bit(place: Path, tmp_path: Path, dtype: str) -> None:
    knobs = {"dtype": dtype, "form": "lora:rank=4,dropout=0.1"}
    whole = run(place, tmp_path / "whole", **knobs)
    stopped = run(place, tmp_path / "parts", **knobs, deadline=AfterPolls(5))
    assert stopped.stopped == "deadline" and stopped.steps == 5
    assert stopped.heldout_after is not None and Path(stopped.adapter).is_dir()
    resumed = run(place, tmp_path / "parts", **knobs)
    assert resumed.resumed_from == 5 and resumed.steps == 12
    assert (resumed.heldout_before, resumed.heldout_after, resumed.loss) == (
        whole.heldout_before,
        whole.heldout_after,
        whole.loss,
    )
    first, second = (load_file(f"{r.adapter}/adapter_model.safetensors") for r in (whole, resumed))
    assert first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)

    again = run(place, tmp_path / "parts", **knobs)  # finished: nothing is trained again
    assert again.steps == 12 and again.heldout_after == whole.heldout_after


def test_a_deadline_that_has_passed_leaves_the_model_as_it_was(place: Path, tmp_path: Path) -> None:
    result = run(place, tmp_path / "out", deadline=Deadline(0))
    assert (result.stopped, result.steps, result.loss) == ("deadline", 0, None)
    assert result.heldout_after == result.heldout_before
    json.loads((tmp_path / "out" / "adapt.json").read_text(), parse_constant=pytest.fail)  # no NaN


def test_over_a_quantised_base(place: Path, tmp_path: Path) -> None:
    result = run(place, tmp_path / "out", base="int4:group=32", targets="layers.*.attention.*")
    model = load_model(result.model)
    kinds = {name: form.choice.method for name, form in attach.forms(model).items()}
    assert kinds["layers.0.attention.q"] == "lora" and kinds["layers.0.mlp.up"] == "int4"
    assert model.layers[0].attention.q.base.choice.method == "int4"
    other = load_model(place / "model")
    attach.attach(other, {"layers.*": "int4:group=32"})
    load_peft(other, result.adapter)
    torch.testing.assert_close(logits(other), logits(model))


def test_an_adapter_is_trained_further_from_its_file_alone(place: Path, tmp_path: Path) -> None:
    def phase(name: str, **more):
        return run(place, tmp_path / name, base="int4:group=32", seed=3, **more)

    first = phase("first", dtype="bfloat16", steps=12)
    shutil.copytree(first.adapter, tmp_path / "sent")
    second = phase("second", dtype="bfloat16", adapter=str(tmp_path / "sent"))
    assert second.heldout_before == first.heldout_after  # the same function, to the last bit
    assert second.steps == 12 and second.heldout_after < second.heldout_before
    anew = phase("anew", dtype="bfloat16")
    assert anew.heldout_before > first.heldout_after + 0.1
    # New moments and a new schedule: nothing else of the first run is read, so its folder may be gone.
    shutil.rmtree(tmp_path / "first")
    again = phase("again", dtype="bfloat16", adapter=str(tmp_path / "sent"))
    assert (again.heldout_after, again.loss) == (second.heldout_after, second.loss)
    with pytest.raises(UserError, match="leave form out"):
        AdaptSpec(**(QUICK | {"form": "svfit", "adapter": str(tmp_path / "sent")}))


def test_dense_trains_the_layers_whole_and_saves_a_plain_folder(place: Path, tmp_path: Path) -> None:
    result = run(place, tmp_path / "out", form="dense", targets="layers.*.mlp.*", lr=3e-3)
    assert result.adapter is None and result.heldout_after < result.heldout_before
    folders = place / "model", Path(result.model)
    before, after = (load_file(folder / "model.safetensors") for folder in folders)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if ".mlp." in name}
    assert not (Path(result.model) / "modicum.json").exists()


def test_epochs_count_passes_over_the_pairs(place: Path, tmp_path: Path) -> None:
    once, twice = (run(place, tmp_path / str(e), steps=None, epochs=e, batch_sequences=8) for e in (1.0, 2.0))
    assert once.steps < twice.steps <= 2 * once.steps
    assert run(place, tmp_path / "limit", steps=None, epochs=1.0, limit=10).pairs == 10


@pytest.mark.parametrize(
    "knobs,word",
    [
        ({"targets": "layers.*.attn.*"}, "layers.\\*.attention"),
        ({"form": "lora:rank=33"}, "rank=33"),
        ({"form": "int8"}, "requires trainable"),
        ({"form": "lora:ranks=4"}, "rank"),
        ({"epochs": 2}, "the run once"),
        ({"heldout": 1.0}, "heldout"),
        ({"targets": ""}, "targets"),
        ({"sequence_length": 4}, "question"),
        ({"base": "lora"}, "requires adapter_base"),
        ({"form": "lora:rank=4", "dtype": "int8"}, "dtype"),
    ],
)
def test_mistakes_are_told_in_one_line_and_leave_nothing(place, tmp_path, knobs: dict, word: str) -> None:
    with pytest.raises(UserError, match=word) as caught:
        run(place, tmp_path / "out", **knobs)
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_another_rank_in_the_same_folder_is_refused(place: Path, tmp_path: Path) -> None:
    run(place, tmp_path / "out", deadline=AfterPolls(3))
    with pytest.raises(UserError, match="another"):
        run(place, tmp_path / "out", form="lora:rank=3")


def test_verb(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    from modicum.cli import main

    words = ["--form", "lora:rank=2", "--steps", "2", "--merge", "--sequence-length", "48", "--batch", "2"]
    source = [str(place / "model"), str(place / "pairs.jsonl"), "--out", str(tmp_path / "out"), "--dtype", "float32"]
    monkeypatch.setattr(sys, "argv", ["modicum", "adapt", *source, *words, "--json"])
    with pytest.raises(SystemExit, match="0"):
        main()
    told = json.loads(capsys.readouterr().out)
    assert told["steps"] == 2 and told["heldout_before"] > 0 and Path(told["model"]).is_dir()
    monkeypatch.setattr(sys, "argv", ["modicum", "adapt", *source, *words])
    with pytest.raises(SystemExit, match="0"):
        main()
    text = capsys.readouterr().out
    assert "held-out loss" in text and "PEFT format" in text and "modicum chat" in text
