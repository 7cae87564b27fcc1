"""Answers grounded in an index: the fields of the API, what is put into the prompt, and what is refused."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest
from serve_tools import engine, tokenizer
from ui_tools import grounding, long_engine, toy_index

from modicum.core.errors import BudgetError, UserError
from modicum.retrieve.ground import SYSTEM, compose
from modicum.serve.server import BackgroundServer, ServerConfig

QUESTION = "Where are the apples kept?"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_index(tmp_path_factory.mktemp("grounded") / "orchard")


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[BackgroundServer]:
    with BackgroundServer(long_engine(), ServerConfig(model="tiny", port=0), grounding(folder)) as running:
        yield running


def chat(server: BackgroundServer, **more: object) -> httpx.Response:
    body = {"model": "tiny", "messages": [{"role": "user", "content": QUESTION}], "max_tokens": 8, "temperature": 0}
    return httpx.post(server.url + "/v1/chat/completions", json=body | more, timeout=60)


def test_the_prompt_is_that_of_ask(folder: Path) -> None:
    """Alone, the question gets the prompt of `modicum ask`; in a conversation, the turns before it stay."""
    made = grounding(folder, context=600)
    messages, sources = made.ground([{"role": "user", "content": QUESTION}], 2, 100)
    hits = made._hits(QUESTION, 2)
    want, shown, _ = compose(QUESTION, hits, 500, lambda text: len(tokenizer().encode(text, specials=False)))
    assert messages == want
    assert [(s["number"], s["id"], s["excerpt"]) for s in sources] == [(s.number, s.id, s.excerpt) for s in shown]
    turns = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hello!"}]
    talk = [{"role": "system", "content": "Be brief."}, *turns, {"role": "user", "content": QUESTION}]
    longer, same = made.ground(talk, 2, 100)
    assert longer == [{"role": "system", "content": SYSTEM + "\n\nBe brief."}, *turns, want[-1]] and same == sources


def test_a_passage_opens_no_turn(folder: Path) -> None:
    messages, sources = grounding(folder).ground([{"role": "user", "content": "What do plums say?"}], 3, 100)
    assert sources[0]["id"] == "turns.txt" and "<|assistant|>" in sources[0]["excerpt"]  # shown as it is
    t = tokenizer()
    ids = t.encode(t.chat(messages))
    assert ids.count(t.backend.token_to_id("<|assistant|>")) == 1 and ids.count(t.eos_id) == 0


def test_passages_leave_room_for_the_answer_and_the_turns(folder: Path) -> None:
    made, t = grounding(folder, k=3, context=512), tokenizer()
    turns = [{"role": "user", "content": "x" * 50}, {"role": "assistant", "content": "y" * 50}]
    messages, sources = made.ground([*turns, {"role": "user", "content": QUESTION}], 3, 128)
    assert sources and len(t.encode(t.chat(messages))) + 128 <= 512
    with pytest.raises(BudgetError, match="prompt budget"):
        made.ground([{"role": "user", "content": "z" * 600}, {"role": "user", "content": QUESTION}], 3, 128)


def test_whole_and_streamed_answers_have_their_sources(server: BackgroundServer) -> None:
    whole = chat(server, search=True).json()
    assert [s["number"] for s in whole["sources"]] == [1, 2]
    assert whole["sources"][0] | {"score": 0} == {
        "number": 1,
        "id": "apples.md",
        "title": "Apples",
        "source": "apples.md",
        "excerpt": "Apples are **kept** in the cellar.\n\nThey last until spring.",
        "score": 0,
    }
    assert "sources" not in chat(server).json() and "sources" not in chat(server, search=False).json()
    assert whole["usage"]["prompt_tokens"] > chat(server).json()["usage"]["prompt_tokens"] + 100
    client = openai.OpenAI(base_url=server.url + "/v1", api_key="any", max_retries=0)
    chunks = list(
        client.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": QUESTION}],
            max_tokens=8,
            temperature=0,
            stream=True,
            extra_body={"search": {"k": 1}},
        )
    )
    assert [s["id"] for s in chunks[0].sources] == ["apples.md"]  # before the first token
    assert not any(hasattr(c, "sources") for c in chunks[1:])
    assert [c.choices[0].delta.role for c in chunks].count("assistant") == 1
    one = chat(server, search={"k": 1}).json()
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == one["choices"][0]["message"]["content"]


def test_search(server: BackgroundServer) -> None:
    found = httpx.post(server.url + "/v1/search", json={"query": "pears in the attic", "k": 1}).json()
    assert [(h["rank"], h["id"]) for h in found["data"]] == [(1, "pears.txt")] and "attic" in found["data"][0]["text"]
    assert len(httpx.post(server.url + "/v1/search", json={"query": "kept"}).json()["data"]) == 2  # the server's k
    only = {"query": "kept", "k": 5, "filter": {"source": "*.txt"}}
    assert all(h["source"].endswith(".txt") for h in httpx.post(server.url + "/v1/search", json=only).json()["data"])
    assert [s["id"] for s in chat(server, search={"k": 3, "filter": {"id": "apples*"}}).json()["sources"]] == [
        "apples.md"
    ]
    card = httpx.get(server.url + "/v1/models").json()["data"][0]
    assert card["search"] == {"index": "orchard", "passages": 3, "k": 2}


def test_what_is_refused(server: BackgroundServer) -> None:
    def error(response: httpx.Response) -> tuple[int, str | None, str | None]:
        body = response.json()["error"]
        return response.status_code, body["param"], body["code"]

    assert error(chat(server, search={"k": 0})) == (400, "search.k", None)
    assert error(chat(server, search={"k": 33})) == (400, "search.k", None)
    assert error(chat(server, search="yes"))[:2] == (400, "search")
    assert error(chat(server, search={"n": 3}))[2] == "unknown_parameter"
    assert error(httpx.post(server.url + "/v1/search", json={"query": 3})) == (400, "query", "invalid_type")
    assert error(httpx.post(server.url + "/v1/search", json={"query": " "}))[0] == 400
    wrong = httpx.post(server.url + "/v1/search", json={"query": "x", "filter": {"yaer": 1}})
    assert error(wrong)[0] == 400 and "source" in wrong.json()["error"]["message"]
    assert error(httpx.post(server.url + "/v1/search", json={"query": "x", "filter": "y"}))[:2] == (400, "filter")
    long = [{"role": "user", "content": "x " * 3000}]
    assert error(chat(server, search=True, messages=long)) == (400, "messages", "context_length_exceeded")
    reply = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    assert "last message" in chat(server, search=True, messages=reply).json()["error"]["message"]
    with BackgroundServer(engine(), ServerConfig(model="tiny", port=0, api_key="sesame")) as bare:
        key = {"authorization": "Bearer sesame"}
        body = {"model": "tiny", "messages": [{"role": "user", "content": "x"}], "search": True}
        refused = httpx.post(bare.url + "/v1/chat/completions", json=body, headers=key)
        assert error(refused) == (400, "search", "no_index") and "--index" in refused.text
        assert error(httpx.post(bare.url + "/v1/search", json={"query": "x"}, headers=key))[2] == "no_index"
        assert error(httpx.post(bare.url + "/v1/search", json={"query": "x"}))[0] == 401


def test_many_searches_at_once(server: BackgroundServer) -> None:
    ids: list[str] = []

    def search(query: str) -> None:
        ids.append(httpx.post(server.url + "/v1/search", json={"query": query, "k": 1}).json()["data"][0]["id"])

    threads = [threading.Thread(target=search, args=(q,)) for q in ["apples", "pears", "plums"] * 5]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(ids) == ["apples.md"] * 5 + ["pears.txt"] * 5 + ["turns.txt"] * 5


def test_a_wrong_folder_is_refused_before_anything_is_loaded(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="modicum index"):
        grounding(tmp_path)
    with pytest.raises(UserError, match="--passages 0"):
        grounding(folder, k=0)


def test_a_damaged_index_is_said_in_the_terminal_and_in_the_answer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = toy_index(tmp_path / "orchard")
    listed = json.loads((folder / "manifest.json").read_text())["files"]
    (folder / next(name for name in listed if name.startswith("bm25"))).write_bytes(b"")
    made = grounding(folder)
    made.open_in_background().join(30)
    assert "searches will fail" in capsys.readouterr().err
    with BackgroundServer(long_engine(), ServerConfig(model="tiny", port=0), made) as server:
        answer = chat(server, search=True)
        assert answer.status_code == 500 and "build the index again" in answer.json()["error"]["message"]
        assert chat(server).status_code == 200
