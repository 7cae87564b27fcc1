"""Structured outputs: whatever a random model says, its answer matches; neighbours and drafts change nothing."""

from __future__ import annotations

import json
import random
import re
from typing import Any

import jsonschema
import pytest
from serve_tools import assert_clean, tiny, tokenizer

from modicum.serve.config import EngineConfig
from modicum.serve.engine import Engine
from modicum.serve.request import InvalidRequest, Request, SamplingParams, StructuredOutput

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


def make(**config: Any) -> Engine:
    defaults: dict[str, Any] = {"block_size": 8, "cache": "6ktok", "max_sequences": 16}
    return Engine(tiny(context_length=1024), tokenizer(), EngineConfig(**(defaults | config)))


def json_of(schema: Any) -> StructuredOutput:
    return StructuredOutput("json", json.dumps(schema))


def random_schema(rng: random.Random, depth: int = 2) -> dict[str, Any]:
    kinds = ["string", "integer", "boolean", "null", "enum", "number"] + ["object", "array", "anyOf"] * (depth > 0)
    kind = rng.choice(kinds)
    if kind == "string":
        least = rng.randint(0, 3)
        return {"type": "string", "minLength": least, "maxLength": least + rng.randint(0, 5)}
    if kind == "integer":
        low = rng.randint(-50, 50)
        return {"type": "integer", "minimum": low, "maximum": low + rng.randint(0, 500)}
    if kind == "number":
        return {"type": "number", "minimum": 0, "maximum": 1}
    if kind == "enum":
        return {"enum": rng.sample(["red", "grün", 7, 1.5, None, True, "two words"], rng.randint(1, 4))}
    if kind == "array":
        least = rng.randint(0, 2)
        items = random_schema(rng, depth - 1)
        return {"type": "array", "items": items, "minItems": least, "maxItems": least + rng.randint(0, 2)}
    if kind == "anyOf":
        return {"anyOf": [random_schema(rng, depth - 1) for _ in range(2)]}
    if kind == "object":
        names = rng.sample(["a", "key two", "naïve", "d", 'quote"d'], rng.randint(1, 3))
        return {
            "type": "object",
            "properties": {name: random_schema(rng, depth - 1) for name in names},
            "required": rng.sample(names, rng.randint(0, len(names))),
            "additionalProperties": False,
        }
    return {"type": kind}


@pytest.mark.parametrize("count", [40, pytest.param(1000, marks=pytest.mark.slow)])
def test_answers_to_random_schemas_are_valid(count: int) -> None:
    rng, engine = random.Random(count), make()
    schemas = [random_schema(rng) for _ in range(count)]
    params = [
        SamplingParams(temperature=1.5, seed=i, max_tokens=900, structured=json_of(s), ignore_eos=bool(i % 2))
        for i, s in enumerate(schemas)
    ]
    outputs = engine.generate(["Once"] * count, params)
    unfinished = 0
    for schema, output in zip(schemas, outputs, strict=True):
        if output.finish == "length":  # digits of a number have no end
            unfinished += 1
            continue
        assert output.finish == "stop"
        jsonschema.validate(json.loads(output.text), schema)
    assert unfinished <= count // 20
    assert_clean(engine)


def test_each_kind_and_greedy() -> None:
    engine = make()
    kinds = [
        StructuredOutput("regex", "[a-f]{3}-[0-9]{2}"),
        StructuredOutput("choice", json.dumps(["yes", "no", "perhaps not"])),
        StructuredOutput("grammar", 'start: "x" NUMBER\nNUMBER: /[0-9]{1,3}/'),
        json_of(PERSON),
    ]
    for temperature in (0.0, 1.0):
        params = [SamplingParams(temperature=temperature, seed=3, max_tokens=200, structured=k) for k in kinds]
        word, choice, number, person = (o.text for o in engine.generate(["Say"] * 4, params))
        assert re.fullmatch("[a-f]{3}-[0-9]{2}", word) and re.fullmatch("x[0-9]{1,3}", number)
        assert choice in ("yes", "no", "perhaps not")
        jsonschema.validate(json.loads(person), PERSON)


def test_neighbours_say_what_they_say_alone_and_every_sample_has_its_own_place() -> None:
    """A mask of another row, or a matcher that samples of one request share, would show here."""
    engine = make()
    free = SamplingParams(temperature=1.0, seed=5, max_tokens=24)
    alone = engine.generate(["The cache"], free)[0].tokens
    request = Request(engine.encode("Give"), SamplingParams(n=3, seed=1, max_tokens=200, structured=json_of(PERSON)))
    other = Request(engine.encode("The cache"), free)
    outputs = {o.request: o for o in engine.outputs([request, other])}
    assert outputs[other.id].tokens == alone
    people = [json.loads(c.text) for c in outputs[request.id].completions]
    assert len({json.dumps(p) for p in people}) == 3
    for person in people:
        jsonschema.validate(person, PERSON)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_drafts_and_preemption_change_no_token(temperature: float) -> None:
    schema = {"type": "array", "items": {"enum": ["the cache", "the scheduler"]}, "minItems": 6, "maxItems": 6}
    params = [
        SamplingParams(temperature=temperature, seed=i, max_tokens=150, structured=json_of(schema)) for i in range(6)
    ]
    prompts = [f"the cache, the scheduler, the cache {i}" for i in range(6)]
    want = [o.tokens for o in make().generate(prompts, params)]
    drafting = make(drafter="prompt-lookup", draft_when="always")
    assert [o.tokens for o in drafting.generate(prompts, params)] == want
    assert drafting.counters["accepted_tokens"] > 0
    crowded = make(cache="256tok")
    assert [o.tokens for o in crowded.generate(prompts, params)] == want
    assert crowded.counters["preemptions"] > 0


def test_bias_and_logprobs_stay_within_the_grammar() -> None:
    engine = make()
    wanted = StructuredOutput("choice", '["yes", "no"]')
    forbidden = engine.tokenizer.encode("T")[0]
    params = SamplingParams(temperature=0, max_tokens=8, logit_bias={forbidden: 100}, logprobs=2, structured=wanted)
    output = engine.generate(["Well?"], params)[0]
    assert output.text in ("yes", "no") and len(output.completions[0].logprobs) == len(output.tokens)


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (StructuredOutput("regex", "(("), "does not compile"),
        (StructuredOutput("json", '{"type": "objekt"}'), "does not compile"),
        (StructuredOutput("json", "{"), "does not compile"),
        (StructuredOutput("grammar", "nothing"), "does not compile"),
        (StructuredOutput("regex", "a" * 300_000), "at most"),
    ],
)
def test_what_does_not_compile_is_refused_in_a_line(wanted: StructuredOutput, message: str) -> None:
    engine = make()
    with pytest.raises(InvalidRequest, match=message) as error:
        engine.add(Request([1, 2], SamplingParams(structured=wanted)))
    assert "\n" not in str(error.value) and error.value.param == "structured"
    assert not engine.busy
    plain = Engine(tiny(), None, EngineConfig(block_size=8, cache="1ktok"))
    with pytest.raises(InvalidRequest, match="tokenizer"):
        plain.add(Request([1, 2], SamplingParams(structured=StructuredOutput("regex", "a"))))
