"""`from modicum import Model`: the same tokens as the parts below it, and what it saves, adapts and serves."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import openai
import pytest
import serve_tools
import torch

import modicum
from modicum import Model
from modicum.core.errors import UserError
from modicum.model.folder import load_model
from modicum.model.generate import greedy

PAIRS = [
    {"id": str(i), "question": f"What is {i}?", "answer": f"It is {'odd' if i % 2 else 'even'}."} for i in range(24)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return serve_tools.folder(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def model(folder: Path) -> Model:
    return Model(folder, cache="2ktok", block_size=8)


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = "import sys, modicum; dir(modicum); print(sorted({'torch', 'numpy', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


def test_every_name_is_there_and_no_other() -> None:
    for name in modicum.__all__:
        assert getattr(modicum, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'Modle'"):
        modicum.Modle  # noqa: B018


def test_generate_continues_each_text_greedily(model: Model) -> None:
    texts = ["The cache", "the scheduler says"]
    told = model.generate(texts, max_tokens=12, temperature=0, ignore_eos=True)
    for text, continuation in zip(texts, told, strict=True):
        ids = model.tokenizer.encode(text, add_special=True)
        tokens_BT = greedy(model.decoder, torch.tensor([ids]), 12)
        assert continuation == model.tokenizer.decode(tokens_BT[0, len(ids) :].tolist())
    assert model.generate(texts[0], max_tokens=12, temperature=0, ignore_eos=True) == told[0]


def test_chat_is_the_template_and_the_stream(model: Model) -> None:
    asked = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    prompt = model.tokenizer.chat(asked)
    want = model.generate(prompt, max_tokens=10, temperature=0)
    assert model.chat(asked, max_tokens=10, temperature=0) == want
    pieces = list(model.stream("Hello", system="Be brief.", max_tokens=10, temperature=0))
    assert "".join(pieces) == want and len(pieces) > 1
    assert not model.engine.busy


def test_a_stream_left_early_ends_its_request(model: Model) -> None:
    stream = model.stream("Hello", max_tokens=50)
    next(stream)
    assert model.engine.busy
    stream.close()
    assert not model.engine.busy


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda m: m.chat("x", temprature=0), "Did you mean 'temperature'"),
        (lambda m: m.chat([]), "messages must be"),
        (lambda m: m.chat([{"role": "user"}]), "messages must be"),
        (lambda m: m.generate("x", n=2), "model.engine.generate"),
        (lambda m: m.server(prt=1), "unknown server setting 'prt'"),
        (lambda m: m.adapt(PAIRS, "out", epoch=1), "Did you mean 'epochs'"),
        (lambda m: Model(m.folder, chache="1GiB"), "Did you mean 'cache'"),
        (lambda m: Model(m.folder, form="int5"), "Did you mean 'int4'|Did you mean 'int8'"),
    ],
)
def test_a_wrong_word_is_refused_with_the_right_one(model: Model, call, said: str) -> None:
    with pytest.raises(UserError, match=said):
        call(model)


def test_adapt_returns_another_model_and_save_merges_it(model: Model, tmp_path: Path) -> None:
    before = model.generate("What is 3?", max_tokens=8, temperature=0)
    (tmp_path / "pairs.jsonl").write_text("\n".join(json.dumps(p) for p in PAIRS))
    better = model.adapt(
        tmp_path / "pairs.jsonl",
        tmp_path / "run",
        form="lora:rank=4",
        epochs=4,
        lr=1e-2,
        sequence_length=64,
        dtype="float32",
    )
    losses = json.loads((tmp_path / "run" / "adapt.json").read_text())
    assert losses["heldout_after"] < losses["heldout_before"]
    assert model.generate("What is 3?", max_tokens=8, temperature=0) == before
    tokens_BT = torch.tensor([model.tokenizer.encode("What is 3?")])
    with torch.inference_mode():
        adapted_BTV = better.decoder(tokens_BT)
        assert not torch.allclose(adapted_BTV, model.decoder(tokens_BT), atol=1e-2)
        with pytest.raises(UserError, match="save it and adapt the saved folder"):
            better.adapt(PAIRS, tmp_path / "again")
        text = better.generate("What is 3?", max_tokens=8, temperature=0)
        saved = better.save(tmp_path / "saved")
        assert sorted(p.name for p in saved.iterdir()) == [
            "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
        ]  # fmt: skip
        assert torch.allclose(load_model(saved)(tokens_BT), adapted_BTV, atol=1e-4)
    assert better.generate("What is 3?", max_tokens=8, temperature=0) == text
    assert Model(saved, cache="2ktok").generate("What is 3?", max_tokens=8, temperature=0) == text


def test_a_form_holds_the_matrices_and_is_saved(folder: Path, tmp_path: Path) -> None:
    small = Model(folder, form="int8:group=16", cache="2ktok")
    tokens_BT = torch.tensor([small.tokenizer.encode("The cache holds")])
    saved = small.save(tmp_path / "int8")
    with torch.inference_mode():
        assert torch.equal(load_model(saved)(tokens_BT), small.decoder(tokens_BT))
        assert not torch.equal(load_model(folder)(tokens_BT), small.decoder(tokens_BT))


def test_server_answers_the_openai_client(model: Model) -> None:
    want = model.chat("Hello", max_tokens=10, temperature=0)
    with model.server() as server:
        client = openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)
        assert [m.id for m in client.models.list()] == ["tiny"]
        answer = client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "Hello"}], max_tokens=10, temperature=0
        )
    assert answer.choices[0].message.content == want
