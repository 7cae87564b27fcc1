"""The tokenizer: training, files, chat templates, agreement with transformers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modicum.core.errors import CorruptError, UserError
from modicum.data.tokenizer import EOS, SPECIALS, Tokenizer

TEXTS = [Path(json.__file__).read_text(), Path(subprocess.__file__).read_text()[:40_000]]
MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi?"},
    {"role": "assistant", "content": "Yes."},
    {"role": "user", "content": "Why?"},
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(TEXTS, vocab_size=600)


@given(st.text(max_size=80))
@settings(max_examples=60, deadline=None)
def test_round_trip(tokenizer_text: str) -> None:
    made = _made()
    assert made.decode(made.encode(tokenizer_text, specials=False)) == tokenizer_text


_CACHE: list[Tokenizer] = []


def _made() -> Tokenizer:
    if not _CACHE:
        _CACHE.append(Tokenizer.train(TEXTS, vocab_size=600))
    return _CACHE[0]


def test_ids_and_specials(tokenizer: Tokenizer) -> None:
    assert tokenizer.vocab_size == 600 and tokenizer.eos_id != tokenizer.pad_id
    assert tokenizer.bos_id is None and tokenizer.start_id == tokenizer.eos_id
    assert tokenizer.encode(EOS) == [tokenizer.eos_id]
    plain = tokenizer.encode(EOS, specials=False)
    assert tokenizer.eos_id not in plain and tokenizer.decode(plain) == EOS
    texts = ["one", "", "def f(x):\n        return x"]
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(t) for t in texts]


def test_training_is_deterministic_across_processes(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "texts.json").write_text(json.dumps(TEXTS))
    code = (
        "import json, sys; from modicum.data.tokenizer import Tokenizer\n"
        f"print(Tokenizer.train(json.load(open({str(tmp_path / 'texts.json')!r})), 600).fingerprint)"
    )
    import os

    for seed in ("1", "2"):
        out = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            env=os.environ | {"PYTHONHASHSEED": seed},
        )
        assert out.stdout.strip() == tokenizer.fingerprint


def test_too_small_vocabulary() -> None:
    with pytest.raises(UserError, match=f"at least {256 + len(SPECIALS)}"):
        Tokenizer.train(["x"], vocab_size=100)


def test_transformers_loads_it(tokenizer: Tokenizer, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for text in ["for i in range(10):\n    print(i)", "Ünïcödé 漢字 😀", "<|user|>x", "  spaces   \n\n\n"]:
        assert theirs(text)["input_ids"] == tokenizer.encode(text)
    assert (theirs.eos_token_id, theirs.pad_token_id) == (tokenizer.eos_id, tokenizer.pad_id)
    assert theirs.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True) == tokenizer.chat(MESSAGES)


def test_save_and_load(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    again = Tokenizer.load(tmp_path)
    assert again.fingerprint == tokenizer.fingerprint
    assert again.chat(MESSAGES) == tokenizer.chat(MESSAGES)
    assert again.encode("hello there") == tokenizer.encode("hello there")


def test_foreign_folder(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Token entries as dicts, ids from the model's config, a template in its own file, several stops."""
    tokenizer.save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": {"content": "<|user|>"}, "eos_token": {"content": EOS}, "pad_token": None})
    )
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [tokenizer.eos_id, 5]}))
    (tmp_path / "chat_template.jinja").write_text(
        "{{ bos_token }}{% generation %}{% for m in messages %}{% if loop.index == 2 %}{% break %}{% endif %}"
        "{{ m | tojson }}{% endfor %}{% endgeneration %}"
    )
    loaded = Tokenizer.load(tmp_path)
    assert loaded.bos_id == tokenizer.encode("<|user|>")[0] == loaded.start_id
    assert loaded.stop_ids == (tokenizer.eos_id, 5) and loaded.pad_id == loaded.eos_id
    assert (
        loaded.chat([{"role": "user", "content": "ü <b>"}, {"role": "user", "content": "no"}])
        == '<|user|>{"role": "user", "content": "ü <b>"}'
    )


def test_template_is_sandboxed_and_refusals_are_user_errors(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    for template, message in (
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
        ("{{ messages[0].content.nope.more }}", "nope"),
        ("{% if %}", "template"),
    ):
        (tmp_path / "chat_template.jinja").write_text(template)
        with pytest.raises(UserError, match=message):
            Tokenizer.load(tmp_path).chat([{"role": "user", "content": "x"}])


def test_bad_folders(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no tokenizer\.json"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": ')
    with pytest.raises(CorruptError, match=r"tokenizer\.json"):
        Tokenizer.load(tmp_path)
