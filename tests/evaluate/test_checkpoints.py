"""Every checkpoint of a run is scored with its own weights, as a curve."""

import json
import re
import sys

import pytest
import torch
from typer.testing import CliRunner

from modicum.cli import app
from modicum.core.errors import CorruptError, UserError
from modicum.core.events import Events
from modicum.data.document import Document
from modicum.data.shards import MemoryDocuments
from modicum.data.tokenizer import Tokenizer
from modicum.evaluate import checkpoints
from modicum.evaluate.run import run_tasks, solved_texts
from modicum.model.config import llama_like
from modicum.model.decoder import Decoder
from modicum.model.folder import load_model, save_model
from modicum.train.config import TrainConfig
from modicum.train.loop import train

TASK = "copy:length=4"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of 30 steps with four checkpoints, in a run directory's layout."""
    folder = tmp_path_factory.mktemp("run") / "stages" / "pretrain"
    texts = [Document(d["id"], d["text"], "task") for d in solved_texts(TASK, 60)]
    tokenizer = Tokenizer.train([d.text for d in texts], 400)
    encoded = [([tokenizer.start_id, *tokenizer.encode(d.text), tokenizer.eos_id], 1) for d in texts]
    config = llama_like(tokenizer.vocab_size, 32, 1, context_length=128, eos_ids=(tokenizer.eos_id,))
    model = Decoder(config, torch.Generator().manual_seed(0))
    run = TrainConfig(
        tokens=30 * 128, sequence_length=64, batch_sequences=2, lr=1e-2, dtype="float32", checkpoint_every=10, keep=9
    )
    train(model, run.stream(MemoryDocuments({"task": encoded})), run, folder, events=Events(None), label="")
    tokenizer.save(folder / "tokenizer")
    save_model(model, folder / "model", folder / "tokenizer")
    return folder


def test_each_checkpoint_has_its_own_weights(trained):
    steps = checkpoints.find(trained.parents[1])
    assert [s.step for s in steps] == [10, 20, 30] and [s.tokens for s in steps] == [1280, 2560, 3840]
    states = [s.load("float32").state_dict() for s in steps]
    assert not torch.equal(states[0]["embed.weight"], states[1]["embed.weight"])
    final = load_model(trained / "model", "float32").state_dict()
    assert all(torch.equal(final[name], value) for name, value in states[-1].items())


def test_verb_draws_a_curve(trained, tmp_path, monkeypatch):
    words = ["eval", str(trained), "--checkpoints", "--tasks", f"{TASK},mqar:pairs=2,queries=1,length=6"]
    words += ["--limit", "5", "--dtype", "float32", "--out", str(tmp_path), "--page", str(tmp_path / "p.html")]
    monkeypatch.setattr(sys, "argv", ["modicum", *words])
    result = CliRunner().invoke(app, [*words, "--json"])
    assert result.exit_code == 0, result.output
    points = json.loads(result.stdout)["checkpoints"]
    assert [p["step"] for p in points] == [10, 20, 30]
    model, tokenizer = load_model(trained / "model", "float32"), Tokenizer.load(trained / "model")
    (direct,) = run_tasks(model, tokenizer, [TASK], limit=5, template="auto")
    assert points[-1]["tasks"][TASK]["figures"] == json.loads(json.dumps(direct.figures))
    text = (tmp_path / "p.html").read_text()
    assert text.count("<svg") == 2 and text.count("<circle") == 6 and text.count("stroke-dasharray") == 1
    assert not re.search(r"(src|href)\s*=|https?://|@import", text)
    plain = CliRunner().invoke(app, words)
    assert plain.exit_code == 0 and len(plain.stdout.strip().splitlines()) == 4, plain.output


def test_what_is_no_run_is_refused(trained, tmp_path):
    with pytest.raises(UserError, match="has no checkpoints"):
        checkpoints.find(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UserError, match="no finished model"):
        checkpoints.find(tmp_path)
    save_model(load_model(trained / "model"), tmp_path / "model", trained / "tokenizer")
    with pytest.raises(UserError, match="keep=NUMBER"):
        checkpoints.find(tmp_path)
    steps = checkpoints.find(trained)
    wider = Decoder(llama_like(400, 64, 1, context_length=128))
    save_model(wider, tmp_path / "model", trained / "tokenizer")
    other = checkpoints.Checkpoint(steps[0].folder, tmp_path / "model", 10, 1280.0)
    with pytest.raises(UserError, match="other tensors"):
        other.load()
    copied = tmp_path / "checkpoints" / steps[0].folder.name
    copied.mkdir()
    for file in steps[0].folder.iterdir():
        (copied / file.name).write_bytes(file.read_bytes())
    data = bytearray((copied / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (copied / "model.safetensors").write_bytes(data)
    with pytest.raises(CorruptError, match="checksum"):
        checkpoints.find(tmp_path)


def test_drawing_of_one_level_and_of_missing_errors():
    assert "NaN" not in checkpoints.drawing("acc", [(10, 0.5, float("nan")), (20, 0.5, 0.0)], 0.5).replace("nan", "NaN")
