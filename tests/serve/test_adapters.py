"""Several adapters in one batch: each sequence says what it says with its adapter alone; loading and unloading."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from serve_tools import assert_clean, tiny, tokenizer

from modicum.adapt.peft_format import load_peft, save_peft
from modicum.core.errors import UserError
from modicum.model import attach
from modicum.model.decoder import Decoder
from modicum.model.linear import LinearForm
from modicum.serve.config import EngineConfig
from modicum.serve.engine import Engine
from modicum.serve.request import InvalidRequest, Request, SamplingParams
from modicum.serve.server import BackgroundServer, ServerConfig

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
FORMS = {"red": {"*.q": "lora:rank=2", "*.down": "lora:rank=3"}, "blue": {"layers.*": "lora:rank=4"}}


def trained(model: Decoder, choices: Mapping[str, Any], seed: int) -> dict[str, LinearForm]:
    """Attach and move every trained parameter far enough to change what is said."""
    generator = torch.Generator().manual_seed(seed)
    made = attach.attach(model, dict(choices), generator=generator)
    with torch.no_grad():
        for form in made.values():
            for parameter in form.trainable():
                parameter.add_(0.6 * torch.randn(parameter.shape, generator=generator))
    return made


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    made = {}
    for i, (name, choices) in enumerate(FORMS.items()):
        model = tiny()
        trained(model, choices, i)
        made[name] = str(save_peft(model, tmp_path_factory.mktemp(name)))
    return made


def make(folders: Mapping[str, str], **config: Any) -> Engine:
    defaults: dict[str, Any] = {"block_size": 8, "cache": "2ktok", "max_sequences": 8}
    engine = Engine(tiny(), tokenizer(), EngineConfig(**(defaults | config)))
    for name, folder in folders.items():
        engine.add_adapter(name, folder, load_peft)
    return engine


def alone(folders: Mapping[str, str], name: str | None, prompts: list[list[int]]) -> list[list[int]]:
    model = tiny()
    if name is not None:
        load_peft(model, folders[name])
    engine = Engine(model, tokenizer(), EngineConfig(block_size=8, cache="2ktok"))
    return [o.tokens for o in engine.generate(prompts, GREEDY)]


def run(engine: Engine, asks: list[tuple[str | None, list[int]]]) -> list[list[int]]:
    requests = [Request(prompt, GREEDY, adapter=name) for name, prompt in asks]
    outputs = {o.request: o.tokens for o in engine.outputs(requests)}
    return [outputs[r.id] for r in requests]


PROMPTS = [[random.Random(i).randrange(5, 390) for _ in range(9 + 3 * i)] for i in range(4)]


@pytest.mark.parametrize("drafter", ["none", "prompt-lookup"])
def test_each_sequence_goes_through_its_own(folders: dict[str, str], drafter: str) -> None:
    engine = make(folders, drafter=drafter)
    asks = [(name, prompt) for prompt in PROMPTS for name in (None, "red", "blue")]
    random.Random(1).shuffle(asks)
    want = {name: alone(folders, name, PROMPTS) for name in (None, "red", "blue")}
    assert want[None] != want["red"] != want["blue"]
    assert run(engine, asks) == [want[name][PROMPTS.index(prompt)] for name, prompt in asks]
    assert_clean(engine)


def test_prefixes_of_one_adapter_are_not_anothers(folders: dict[str, str]) -> None:
    """The same prompt, one after another: without names of its own each would find the other's keys and values."""
    engine = make(folders)
    for name in ("red", "blue", None, "red"):
        before = engine.counters["cached_tokens"]
        assert run(engine, [(name, PROMPTS[3])]) == alone(folders, name, PROMPTS[3:])
    assert engine.counters["cached_tokens"] > before, "its own prefix is found again"
    engine.remove_adapter("red")
    engine.add_adapter("red", folders["blue"], load_peft)
    assert run(engine, [("red", PROMPTS[3])]) == alone(folders, "blue", PROMPTS[3:])


@pytest.mark.parametrize("form", ["compacter:bottleneck=8,norms=false", "svfit:rank=4", "increlora:rank=3"])
def test_other_forms_than_lora(form: str) -> None:
    def put_on(model: Decoder, folder: str) -> Mapping[str, LinearForm]:
        return trained(model, dict.fromkeys(attach.target_modules(model, form), form), seed=5)

    model = tiny()
    put_on(model, "")
    single = Engine(model, tokenizer(), EngineConfig(block_size=8, cache="2ktok"))
    want = [o.tokens for o in single.generate(PROMPTS, GREEDY)]
    engine = make({})
    engine.add_adapter("other", "somewhere", put_on)
    plain = alone({}, None, PROMPTS)
    assert run(engine, [(n, p) for p in PROMPTS for n in ("other", None)]) == [
        tokens for pair in zip(want, plain, strict=True) for tokens in pair
    ]
    assert want != plain


def test_the_base_is_untouched_and_steps_without_adapters_do_not_fall_back(folders: dict[str, str]) -> None:
    engine, want = make(folders), alone({}, None, PROMPTS)
    assert run(engine, [(None, p) for p in PROMPTS]) == want
    assert not any("adapters" in reason for reason in engine.stats()["fallbacks"])
    for name in folders:
        engine.remove_adapter(name)
    assert run(engine, [(None, p) for p in PROMPTS]) == want and not attach.forms(engine.model)


def test_what_is_refused_leaves_the_rest_as_it_was(folders: dict[str, str], tmp_path: Path) -> None:
    engine = make({"red": folders["red"]})
    with pytest.raises(UserError, match="already"):
        engine.add_adapter("red", folders["blue"], load_peft)
    with pytest.raises(UserError):
        engine.add_adapter("green", str(tmp_path / "nothing"), load_peft)
    with pytest.raises(UserError, match="lm_head"):
        engine.add_adapter("head", "", lambda model, _: trained(model, {"lm_head": "lora:rank=2"}, 0))
    with pytest.raises(UserError, match="norms"):
        compacter = dict.fromkeys(attach.target_modules(engine.model, "compacter"), "compacter:bottleneck=8")
        engine.add_adapter("norms", "", lambda model, _: trained(model, compacter, 0))
    with pytest.raises(InvalidRequest, match="no adapter"):
        engine.add(Request([5], GREEDY, adapter="green"))
    with pytest.raises(UserError, match="no adapter 'green'; here: red"):
        engine.remove_adapter("green")
    request = Request(PROMPTS[0], GREEDY, adapter="red")
    engine.add(request)
    with pytest.raises(UserError, match="1 requests use"):
        engine.remove_adapter("red")
    engine.abort(request.id)
    assert run(engine, [("red", PROMPTS[0])]) == alone(folders, "red", PROMPTS[:1])
    assert run(engine, [(None, PROMPTS[0])]) == alone(folders, None, PROMPTS[:1])
    with_one = tiny()
    load_peft(with_one, folders["red"])
    with pytest.raises(UserError, match="attached already"):
        Engine(with_one, None, EngineConfig(block_size=8, cache="1ktok")).add_adapter("b", folders["blue"], load_peft)


@pytest.fixture
def server(folders: dict[str, str]) -> Iterator[BackgroundServer]:
    config = ServerConfig(model="tiny", port=0, runtime_adapters=True)
    with BackgroundServer(make({"red": folders["red"]}), config, put_on=load_peft) as running:
        yield running
    assert_clean(running.server.worker.engine)


def test_clients_choose_load_and_unload(server: BackgroundServer, folders: dict[str, str]) -> None:
    client = openai.OpenAI(base_url=server.url + "/v1", api_key="any", max_retries=0)

    def said(model: str) -> str:
        extra = {"ignore_eos": True}
        done = client.completions.create(model=model, prompt=PROMPTS[1], temperature=0, max_tokens=12, extra_body=extra)
        assert done.model == model
        return str(done.choices[0].text)

    def post(path: str, **body: str) -> httpx.Response:
        return httpx.post(f"{server.url}/v1/{path}", json=body)

    assert [m.id for m in client.models.list()] == ["tiny", "red"]
    tokens = tokenizer()
    assert said("red") == tokens.decode(alone(folders, "red", PROMPTS[1:2])[0])
    assert said("tiny") == tokens.decode(alone(folders, None, PROMPTS[1:2])[0])
    assert post("load_lora_adapter", lora_name="blue", lora_path=folders["blue"]).status_code == 200
    assert said("blue") == tokens.decode(alone(folders, "blue", PROMPTS[1:2])[0])
    assert client.models.retrieve("blue").id == "blue"
    assert post("unload_lora_adapter", lora_name="blue").json()["deleted"]
    with pytest.raises(openai.NotFoundError, match="'tiny', 'red'"):
        said("blue")
    for body in ({"lora_name": "x", "lora_path": "/nowhere"}, {"lora_name": "tiny", "lora_path": folders["blue"]}, {}):
        answer = post("load_lora_adapter", **body)
        assert answer.status_code == 400 and "\n" not in answer.json()["error"]["message"]


def test_without_the_option_clients_load_nothing(folders: dict[str, str]) -> None:
    with BackgroundServer(make({}), ServerConfig(model="tiny", port=0), put_on=load_peft) as running:
        body = {"lora_name": "red", "lora_path": folders["red"]}
        assert httpx.post(f"{running.url}/v1/load_lora_adapter", json=body).status_code == 404
