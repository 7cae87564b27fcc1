"""Tool calls: formats by chat template, forced calls, calls read back; response formats, best_of, embeddings."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import jsonschema
import numpy as np
import openai
import pytest
import torch
from serve_tools import assert_clean, tiny, tokenizer

from modicum.serve import tools
from modicum.serve.config import EngineConfig
from modicum.serve.engine import Engine
from modicum.serve.request import InvalidRequest
from modicum.serve.server import BackgroundServer, ServerConfig

TEMPLATE = (
    "{% if tools %}Tools:{% for tool in tools %} {{ tool.function.name }}{% endfor %}. Call like <tool_call>\n"
    '{"name": NAME, "arguments": {}}\n</tool_call>\n{% endif %}'
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
)
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "maxLength": 6},
                "days": {"type": "integer", "minimum": 1, "maximum": 9},
            },
            "required": ["city", "days"],
            "additionalProperties": False,
        },
    },
}
CLOCK = {
    "type": "function",
    "function": {
        "name": "clock",
        "parameters": {"type": "object", "properties": {}, "additionalProperties": False},
    },
}
HERMES, MISTRAL, LLAMA = tools.FORMATS
NAMES = ["weather", "clock"]


class Letters:
    """An encoder of counts of letters."""

    name = "letters"

    def embed(self, texts: list[str]) -> np.ndarray[Any, np.dtype[np.float32]]:
        rows = np.array([[text.count(c) for c in "abcd"] for text in texts], np.float32) + 0.5
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    def tokens(self, texts: list[str]) -> int:
        return sum(map(len, texts))


@pytest.fixture(scope="module")
def server() -> Iterator[BackgroundServer]:
    made = tokenizer()
    made.template = TEMPLATE
    engine = Engine(tiny(context_length=1024), made, EngineConfig(block_size=8, cache="6ktok"))
    with BackgroundServer(engine, ServerConfig(model="tiny", port=0), embedder=Letters()) as running:
        yield running
    assert_clean(engine)


@pytest.fixture(scope="module")
def client(server: BackgroundServer) -> openai.OpenAI:
    return openai.OpenAI(base_url=server.url + "/v1", api_key="any", max_retries=0)


def test_the_template_says_the_format() -> None:
    assert tools.format_of(TEMPLATE) is HERMES
    assert tools.format_of("{% if tools %}[TOOL_CALLS]{% endif %}") is MISTRAL
    assert tools.format_of('{% if tools %}{"name": f, "parameters": {}}{% endif %}') is LLAMA
    assert tools.format_of("{{ messages }}") is None and tools.format_of(None) is None


@pytest.mark.parametrize(
    ("form", "text", "shown", "called"),
    [
        (HERMES, 'Wait. <tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>', "Wait.", ["clock"]),
        (HERMES, '<tool_call>[{"name": "clock", "arguments": {}}]</tool_call>', "", ["clock"]),
        (
            HERMES,
            '<tool_call>{"name": "clock", "arguments": {}}</tool_call>\n<tool_call>{"name": "weather", '
            '"arguments": {"city": "ä"}}</tool_call>',
            "",
            ["clock", "weather"],
        ),
        (HERMES, '<tool_call>{"name": "rm", "arguments": {}}</tool_call>', None, []),
        (HERMES, '<tool_call>{"name": "clock", "arguments": "now"}</tool_call>', None, []),
        (HERMES, "<tool_call>{broken</tool_call> and on", None, []),
        (HERMES, '<tool_call>{"name": "clock", "arguments": {}}', "", ["clock"]),
        (MISTRAL, '[TOOL_CALLS][{"name": "clock", "arguments": {}}]', "", ["clock"]),
        (MISTRAL, '[{"name": "clock", "arguments": {}}]', "", ["clock"]),
        (LLAMA, '{"name": "weather", "parameters": {"city": "x"}}', "", ["weather"]),
        (LLAMA, 'It is {"name": "weather"}', None, []),
    ],
)
def test_calls_are_read_back(form: tools.ToolFormat, text: str, shown: str | None, called: list[str]) -> None:
    rest, calls = tools.read_calls(text, form, NAMES)
    assert rest == (text if shown is None else shown)
    assert [c["function"]["name"] for c in calls] == called
    assert all(isinstance(json.loads(c["function"]["arguments"]), dict) and c["id"] for c in calls)
    for size in (1, 3, 1000):  # streamed: what is shown at once and what is kept make up the whole
        stream = tools.CallStream(form)
        now = "".join(stream.push(text[i : i + size]) for i in range(0, len(text), size))
        assert now + stream.kept == text
        if called:
            assert not any(word in now for word in ("tool_call", "clock", "weather"))


def test_a_demanded_call_is_one(client: openai.OpenAI) -> None:
    ask: dict[str, Any] = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "Rain?"}],
        "max_tokens": 300,
        "seed": 1,
    }
    for choice in ("required", {"type": "function", "function": {"name": "weather"}}):
        answer = client.chat.completions.create(tools=[WEATHER, CLOCK], tool_choice=choice, **ask)  # type: ignore[call-overload]
        (call,) = answer.choices[0].message.tool_calls
        assert answer.choices[0].finish_reason == "tool_calls" and answer.choices[0].message.content is None
        named = {"weather": WEATHER, "clock": CLOCK}[call.function.name]
        jsonschema.validate(json.loads(call.function.arguments), named["function"]["parameters"])
    assert call.function.name == "weather"
    chunks = list(client.chat.completions.create(tools=[CLOCK], tool_choice="required", stream=True, **ask))
    deltas = [c.choices[0].delta for c in chunks if c.choices]
    (streamed,) = [d.tool_calls[0] for d in deltas if d.tool_calls]
    assert streamed.index == 0 and streamed.function.name == "clock" and streamed.function.arguments == "{}"
    assert not any(d.content for d in deltas) and chunks[-1].choices[0].finish_reason == "tool_calls"


def test_what_is_not_demanded_is_free(client: openai.OpenAI) -> None:
    ask: dict[str, Any] = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "Hi"}],
        "max_tokens": 12,
        "seed": 2,
    }
    plain = client.chat.completions.create(**ask).choices[0].message.content
    none = client.chat.completions.create(tools=[CLOCK], tool_choice="none", **ask).choices[0].message
    assert none.content == plain and not none.tool_calls, "the prompt names no tools"
    auto = client.chat.completions.create(tools=[CLOCK], **ask).choices[0]
    assert auto.finish_reason == "length" and auto.message.content
    streamed = client.chat.completions.create(tools=[CLOCK], stream=True, **ask)
    assert "".join(c.choices[0].delta.content or "" for c in streamed) == auto.message.content


def test_response_formats(client: openai.OpenAI) -> None:
    ask: dict[str, Any] = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "Now"}],
        "max_tokens": 300,
        "seed": 3,
    }
    schema = WEATHER["function"]["parameters"]  # type: ignore[index]
    form: Any = {"type": "json_schema", "json_schema": {"name": "w", "schema": schema, "strict": True}}
    text = client.chat.completions.create(response_format=form, **ask).choices[0].message.content
    jsonschema.validate(json.loads(text), schema)
    extra = {"structured_outputs": {"choice": ["left", "right"]}}
    assert client.chat.completions.create(extra_body=extra, **ask).choices[0].message.content in ("left", "right")
    extra = {"structured_outputs": {"regex": "[ab]{4}"}}
    done = client.completions.create(model="tiny", prompt="x", max_tokens=20, extra_body=extra)
    assert set(done.choices[0].text) <= set("ab") and len(done.choices[0].text) == 4


def test_best_of_gives_the_likeliest(client: openai.OpenAI) -> None:
    ask: dict[str, Any] = {"model": "tiny", "prompt": "The", "max_tokens": 6, "seed": 7}
    every = client.completions.create(n=6, logprobs=0, **ask)
    means = {c.text: sum(c.logprobs.token_logprobs) / len(c.logprobs.token_logprobs) for c in every.choices}
    best = client.completions.create(n=2, best_of=6, **ask)
    assert [c.text for c in best.choices] == sorted(means, key=means.__getitem__, reverse=True)[:2]
    assert best.choices[0].logprobs is None and best.usage.completion_tokens == every.usage.completion_tokens


def test_embeddings(client: openai.OpenAI) -> None:
    want = Letters().embed(["abba", "dd"])
    for form in ({"encoding_format": "float"}, {}):  # left to itself the client asks for base64 and decodes it
        answer = client.embeddings.create(model="letters", input=["abba", "dd"], **form)  # type: ignore[call-overload]
        assert np.allclose([e.embedding for e in answer.data], want) and answer.usage.total_tokens == 6
    assert len(client.embeddings.create(model="letters", input="one").data) == 1


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [CLOCK], "tool_choice": "always"}, "tool_choice"),
        ({"tools": [CLOCK], "tool_choice": {"type": "function", "function": {"name": "rm"}}}, "tool_choice"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0"),
        ({"tools": [CLOCK] * 200}, "tools"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}}, "response_format"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "(("}}, "structured_outputs"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs"),
    ],
)
def test_what_cannot_be_is_refused_by_name(client: openai.OpenAI, fields: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as error:
        client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "x"}], extra_body=fields)
    assert error.value.param == param


def test_refusals_of_a_server_without_these() -> None:
    engine = Engine(tiny(), tokenizer(), EngineConfig(block_size=8, cache="1ktok"))
    with BackgroundServer(engine, ServerConfig(model="tiny", port=0)) as running:
        client = openai.OpenAI(base_url=running.url + "/v1", api_key="any", max_retries=0)
        with pytest.raises(openai.BadRequestError, match="has no tools"):
            client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "x"}], tools=[CLOCK])  # type: ignore[list-item]
        with pytest.raises(openai.BadRequestError, match="--encoder"):
            client.embeddings.create(model="tiny", input="x")


def test_a_mark_that_is_a_token_is_written_as_one() -> None:
    wanted = tools.forced([CLOCK], MISTRAL, 17)
    assert wanted.value.startswith("start: <[17]> call") and '"maxItems": 1' in wanted.value
    with pytest.raises(InvalidRequest):
        tools.pick([CLOCK], {"type": "function"})


@pytest.mark.parametrize("most", [0, 3])
def test_an_echoed_prompt_has_its_logprobs(client: openai.OpenAI, server: BackgroundServer, most: int) -> None:
    engine = server.server.worker.engine
    prompts = [engine.tokenizer.encode(text) for text in ("The cache holds keys", "emoji and def f(x)")]
    answer = client.completions.create(
        model="tiny",
        prompt=prompts,
        echo=True,
        logprobs=1,
        max_tokens=most,
        temperature=0,
        extra_body={"ignore_eos": True},
    )
    for prompt, choice in zip(prompts, answer.choices, strict=True):
        given = choice.logprobs
        with torch.no_grad():
            logits_TV = engine.model(torch.tensor([prompt]))[0].float().log_softmax(-1)
        want = [float(logits_TV[i, token]) for i, token in enumerate(prompt[1:])]
        assert given.token_logprobs[0] is None and given.top_logprobs[0] is None
        assert given.token_logprobs[1 : len(prompt)] == pytest.approx(want, abs=1e-4)
        assert len(given.tokens) == len(prompt) + most and choice.text.startswith(engine.tokenizer.decode(prompt))
        likeliest = [max(top, key=top.get) for top in given.top_logprobs[1 : len(prompt)]]
        assert likeliest == [engine.tokenizer.decode([int(i)], skip_special=False) for i in logits_TV[:-1].argmax(-1)]
    assert answer.usage.prompt_tokens == sum(map(len, prompts))
