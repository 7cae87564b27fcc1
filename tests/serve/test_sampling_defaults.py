"""Sampling settings that nobody gave: the publisher's in the folder, the source's by name, the server's, the page's."""

import json

import httpx
import pytest
from serve_tools import engine

from modicum.model import sources
from modicum.model.sampling import advised
from modicum.serve.schema import ChatBody, CompletionBody
from modicum.serve.server import BackgroundServer, ServerConfig


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"temperature": 0.6, "top_k": 20, "eos_token_id": 2}, {"temperature": 0.6, "top_k": 20}),
        ({"do_sample": False, "temperature": 0.6}, {"temperature": 0.0}),
        ({"do_sample": True, "top_p": 0.9}, {"top_p": 0.9}),
        ({"temperature": "hot", "top_p": 7, "top_k": 2.5, "min_p": True, "repetition_penalty": 1.1},
         {"repetition_penalty": 1.1}),
        ({"eos_token_id": 2}, {}),
        ([1, 2], {}),
    ],
)  # fmt: skip
def test_generation_config_is_read_and_nonsense_left_out(tmp_path, config, expected):
    (tmp_path / "generation_config.json").write_text(json.dumps(config))
    assert advised(tmp_path) == expected


def test_a_known_model_brings_what_its_card_advises(tmp_path):
    assert advised(tmp_path) == {}
    (tmp_path / sources.RECORD).write_text(json.dumps({"name": "smollm2"}))
    assert advised(tmp_path) == {"temperature": 0.2, "top_p": 0.9}
    (tmp_path / "generation_config.json").write_text('{"temperature": 1.5}')
    assert advised(tmp_path) == {"temperature": 1.5}  # the folder's own word first
    (tmp_path / "generation_config.json").write_text("{")
    assert advised(tmp_path) == {"temperature": 0.2, "top_p": 0.9}


def test_a_request_overrides_the_defaults_and_misses_none():
    defaults = {"temperature": 0.2, "top_k": 5}
    messages = [{"role": "user", "content": "x"}]
    params = ChatBody(model="m", messages=messages, temperature=0.9).params(defaults)
    assert (params.temperature, params.top_k, params.top_p) == (0.9, 5, 1.0)
    assert ChatBody(model="m", messages=messages, temperature=0).params(defaults).temperature == 0
    assert CompletionBody(model="m", prompt="x").params(defaults).temperature == 0.2
    assert CompletionBody(model="m", prompt="x").params().temperature == 1.0  # OpenAI's


def test_a_server_samples_as_it_was_configured_and_says_so():
    config = ServerConfig(model="tiny", port=0, sampling={"temperature": 0.0})
    body = {"model": "tiny", "prompt": "one two", "max_tokens": 12}
    with BackgroundServer(engine(), config) as server:
        card = httpx.get(server.url + "/v1/models").json()["data"][0]
        texts = {httpx.post(server.url + "/v1/completions", json=body).json()["choices"][0]["text"] for _ in range(3)}
        warm = httpx.post(server.url + "/v1/completions", json=body | {"temperature": 5.0, "seed": 1}).json()
    assert card["sampling"] == {"temperature": 0.0} and len(texts) == 1
    assert warm["choices"][0]["text"] not in texts
