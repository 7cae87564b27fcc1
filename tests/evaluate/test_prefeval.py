"""Conversations with a preference at their beginning: what is asked, in which order, and what is refused."""

import json
from pathlib import Path

import pytest
import torch

from modicum.core import registry
from modicum.core.errors import UserError
from modicum.data.tokenizer import Tokenizer
from modicum.evaluate.run import run_tasks
from modicum.evaluate.tasks import prefeval
from modicum.model.config import llama_like
from modicum.model.decoder import Decoder

FILE = Path(prefeval.__file__).parent / "examples" / "preferences.jsonl"


@pytest.fixture
def talk(tmp_path):
    path = tmp_path / "talk.jsonl"
    rows = [
        {"text": f"User: Question {i} about trains?\nSystem: Answer {i}.\nUser: And meat {i}?\nSystem: No {i}."}
        for i in range(12)
    ]
    path.write_text("\n".join(json.dumps(r) for r in rows))
    return path


def docs(knobs=""):
    task = registry.build("task", f"prefeval:file={FILE}{knobs}")
    return task, list(task.docs("test", None, 0))


def test_preference_first_filler_between_question_last(talk):
    task, found = docs(f",filler=7,filler_file={talk}")
    for doc in found:
        lines = task.requests(doc, [])[0].prompt.splitlines()
        assert (
            lines[1] == f"Assistant: {prefeval.NOTED}" and len(lines) == 2 * (1 + 7) + 2 and lines[-1] == "Assistant:"
        )
        assert all("Question" in line or "meat" in line for line in lines[2:-2] if line.startswith("User:"))
    assert found[0]["prompt"].startswith("User: I never eat meat.\n") and found[0]["cluster"] == "food"
    assert len({d["prompt"].split("\n")[2] for d in found}) > 1, "every item has the same filler"


def test_right_option_moves_and_stays_in_place_across_strategies(talk):
    plain = docs()[1]
    assert len({d["answer"] for d in plain}) > 1, "the right option is always in the same place"
    assert plain[0]["choices"][plain[0]["answer"]] == "A vegetable curry with rice."
    for knobs in (
        ",strategy=remind",
        f",filler=5,filler_file={talk}",
        f",filler=5,filler_file={talk},strategy=retrieve",
    ):
        other = docs(knobs)[1]
        assert [(d["choices"], d["answer"]) for d in other] == [(d["choices"], d["answer"]) for d in plain]
    assert docs(",strategy=remind")[1][0]["prompt"].endswith(
        f"What should I cook tonight?{prefeval.REMINDER}\nAssistant:"
    )


def test_retrieval_quotes_what_shares_rare_words(talk):
    texts = ["I never eat meat.", "What time is it?", "Is meat dear?", "Blue is nice.", "Trains are late."]
    assert prefeval.relevant("Which meat should I eat?", texts, 2) == ["I never eat meat.", "Is meat dear?"]
    doc = docs(f",filler=8,filler_file={talk},strategy=retrieve")[1][0]
    assert doc["prompt"].rpartition("User: ")[2].startswith("Earlier I said:\n- ")
    assert doc["prompt"].rpartition("User: ")[2].count("\n- ") == prefeval.QUOTED


def test_repeated_pairs_are_left_out_and_long_talk_is_refused(tmp_path, talk):
    rows = [json.loads(line) for line in FILE.read_text().splitlines()]
    path = tmp_path / "twice.jsonl"
    path.write_text("\n".join(json.dumps(r | {"id": f"{r['id']}{i}"}) for i in range(2) for r in rows))
    task = registry.build("task", f"prefeval:file={path}")
    assert len(list(task.docs("test", None, 0))) == len(rows)
    tokenizer = Tokenizer.train([path.read_text()], 400)
    config = llama_like(tokenizer.vocab_size, 32, 1, context_length=128, eos_ids=(tokenizer.eos_id,))
    model = Decoder(config, torch.Generator().manual_seed(0)).eval()
    with pytest.raises(UserError, match="cut prompts would be other questions"):
        run_tasks(model, tokenizer, [f"prefeval:file={path},filler=10,filler_file={talk}"])
    with pytest.raises(UserError, match="filler_file"):
        registry.build("task", f"prefeval:file={path},filler=3")
