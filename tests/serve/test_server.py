"""The server as clients see it: the official client, raw HTTP, and everything that can go wrong."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
from serve_tools import assert_clean, engine

from modicum.core.errors import UserError
from modicum.serve.engine import Engine
from modicum.serve.request import Request, SamplingParams
from modicum.serve.server import BackgroundServer, ServerConfig
from modicum.serve.ticket import ClientGone, Ticket
from modicum.serve.worker import Worker


@pytest.fixture(scope="module")
def server() -> Iterator[BackgroundServer]:
    with BackgroundServer(engine(max_sequences=8), ServerConfig(model="tiny", port=0, max_body=50_000)) as running:
        yield running
    assert_clean(running.server.worker.engine)


@pytest.fixture(scope="module")
def client(server: BackgroundServer) -> openai.OpenAI:
    return openai.OpenAI(base_url=server.url + "/v1", api_key="any", max_retries=0)


def settle(worker: Worker, seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while (worker.engine.busy or worker.queued) and time.monotonic() < end:
        time.sleep(0.01)
    assert not worker.engine.busy
    assert worker.engine.stats()["used_blocks"] == 0


def slow_down(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny model is quicker than clients come and go: 20 ms more for each step."""
    step = engine.step
    monkeypatch.setattr(engine, "step", lambda: (time.sleep(0.02), step())[1])


def test_models(client: openai.OpenAI) -> None:
    assert [m.id for m in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("large")


def test_a_local_server_answers_to_no_foreign_name(server: BackgroundServer) -> None:
    """A name that is pointed at this machine (DNS rebinding) gets nothing, unless there is a key to know."""
    port = server.url.rsplit(":", 1)[1]
    for host, status in (
        ("localhost", 200),
        (f"LOCALHOST:{port}", 200),
        ("me.localhost", 200),
        ("192.168.0.7", 200),
        ("[::1]:80", 200),
        ("evil.example", 403),
        (f"127.0.0.1.evil.example:{port}", 403),
        ("localhost.evil.example", 403),
    ):
        answer = httpx.get(server.url + "/v1/models", headers={"host": host})
        assert answer.status_code == status, host
        assert status == 200 or "--api-key" in answer.json()["error"]["message"]
    with BackgroundServer(engine(), ServerConfig(port=0, api_key="sesame")) as keyed:
        headers = {"host": "models.example", "authorization": "Bearer sesame"}
        assert httpx.get(keyed.url + "/v1/models", headers=headers).status_code == 200


def test_completion_is_the_engines(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="tiny", prompt="The cache", temperature=0, max_tokens=20)
    want = engine().generate(["The cache"], SamplingParams(temperature=0, max_tokens=20))[0]
    assert answer.choices[0].text == want.text
    assert answer.choices[0].finish_reason == want.finish
    assert answer.usage is not None and answer.usage.completion_tokens == len(want.tokens)
    assert answer.usage.prompt_tokens == want.prompt_tokens


def test_completion_stream_joins_to_the_whole(client: openai.OpenAI) -> None:
    ask = {"model": "tiny", "prompt": "def f(x)", "seed": 7, "max_tokens": 40}
    whole = client.completions.create(**ask)
    chunks = list(client.completions.create(**ask, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].text for c in chunks if c.choices) == whole.choices[0].text
    assert chunks[-1].usage == whole.usage or chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == whole.choices[0].finish_reason


def test_chat(client: openai.OpenAI) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who runs?"}]
    ask = {"model": "tiny", "messages": messages, "temperature": 0, "max_tokens": 16}
    whole = client.chat.completions.create(**ask)
    assert whole.choices[0].message.role == "assistant"
    chunks = list(client.chat.completions.create(**ask, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == whole.choices[0].message.content
    parts = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Who "}, {"type": "text", "text": "runs?"}]},
    ]
    assert client.chat.completions.create(**ask | {"messages": parts}).choices[0].message == whole.choices[0].message


def test_chat_logprobs(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "Hi"}],
        temperature=0,
        max_tokens=5,
        logprobs=True,
        top_logprobs=3,
    )
    content = answer.choices[0].logprobs.content
    assert answer.usage is not None and len(content) == answer.usage.completion_tokens
    for entry in content:
        assert len(entry.top_logprobs) == 3 and entry.logprob == entry.top_logprobs[0].logprob <= 0


def test_completion_lists_n_echo_and_logprobs(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="tiny", prompt=["The", [5, 6, 7]], n=2, max_tokens=4, logprobs=2, seed=1)
    assert [c.index for c in answer.choices] == [0, 1, 2, 3]
    for choice in answer.choices:
        assert len(choice.logprobs.tokens) == len(choice.logprobs.token_logprobs) <= 4
        assert choice.logprobs.text_offset[0] == 0
    again = client.completions.create(model="tiny", prompt=["The", [5, 6, 7]], n=2, max_tokens=4, seed=1)
    assert [c.text for c in again.choices] == [c.text for c in answer.choices]
    echo = client.completions.create(model="tiny", prompt="The", echo=True, max_tokens=2, temperature=0)
    assert echo.choices[0].text.startswith("The")


def test_extensions_pass_through(client: openai.OpenAI) -> None:
    ask = {"model": "tiny", "prompt": "The", "max_tokens": 30, "temperature": 1.5}
    greedy = client.completions.create(**ask | {"temperature": 0})
    assert client.completions.create(**ask, extra_body={"top_k": 1}).choices[0].text == greedy.choices[0].text
    stop = engine().generate(["The"], SamplingParams(temperature=0, max_tokens=30))[0].tokens[3]
    short = client.completions.create(**ask | {"temperature": 0}, extra_body={"stop_token_ids": [stop]})
    assert short.choices[0].finish_reason == "stop" and short.usage is not None and short.usage.completion_tokens <= 4


BAD = [
    ("/v1/completions", b"{", 400, "invalid_json"),
    ("/v1/completions", b"\xff\xfe", 400, "invalid_json"),
    ("/v1/completions", b"[1]", 400, "invalid_json"),
    ("/v1/completions", b"[" * 40_000, 400, "invalid_json"),
    ("/v1/completions", b'{"model": "tiny", "prompt": "a", "temperature": NaN}', 400, "invalid_json"),
    ("/v1/completions", {"prompt": "a"}, 400, "missing_required_parameter"),
    ("/v1/completions", {"model": "tiny"}, 400, "missing_required_parameter"),
    ("/v1/completions", {"model": "tiny", "prompt": "a", "temperature": "hot"}, 400, "invalid_type"),
    ("/v1/completions", {"model": "tiny", "prompt": "a", "max_tokens": 1.5}, 400, "invalid_type"),
    ("/v1/completions", {"model": "tiny", "prompt": {"a": 1}}, 400, "invalid_type"),
    ("/v1/completions", {"model": "tiny", "prompt": "a", "colour": "red"}, 400, "unknown_parameter"),
    ("/v1/completions", {"model": "tiny", "prompt": "a", "suffix": "b"}, 400, "unsupported_parameter"),
    ("/v1/completions", {"model": "tiny", "prompt": "a", "temperature": -1}, 400, None),
    ("/v1/completions", {"model": "tiny", "prompt": "a", "top_p": 0}, 400, None),
    ("/v1/completions", {"model": "tiny", "prompt": "a", "n": 0}, 400, None),
    ("/v1/completions", {"model": "tiny", "prompt": "a", "stop": [""]}, 400, None),
    ("/v1/completions", {"model": "tiny", "prompt": "a", "logit_bias": {"x": 1}}, 400, None),
    ("/v1/completions", {"model": "tiny", "prompt": "a", "logit_bias": {"99999": 1}}, 400, None),
    ("/v1/completions", {"model": "tiny", "prompt": ""}, 400, None),
    ("/v1/completions", {"model": "tiny", "prompt": []}, 400, None),
    ("/v1/completions", {"model": "tiny", "prompt": [-1]}, 400, None),
    ("/v1/completions", {"model": "tiny", "prompt": "\ud800"}, 400, None),
    ("/v1/completions", {"model": "tiny", "prompt": [1] * 256}, 400, "context_length_exceeded"),
    ("/v1/completions", {"model": "large", "prompt": "a"}, 404, "model_not_found"),
    ("/v1/completions", b" " * 60_000, 413, "request_too_large"),
    ("/v1/chat/completions", {"model": "tiny", "messages": []}, 400, "invalid_type"),
    ("/v1/chat/completions", {"model": "tiny", "messages": "hi"}, 400, "invalid_type"),
    (
        "/v1/chat/completions",
        {"model": "tiny", "messages": [{"role": "user", "content": 3}]},
        400,
        "invalid_type",
    ),
    (
        "/v1/chat/completions",
        {
            "model": "tiny",
            "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
        },
        400,
        "invalid_type",
    ),
    (
        "/v1/chat/completions",
        {"model": "tiny", "messages": [{"role": "user", "content": "x"}], "tools": [{"type": "function"}]},
        400,
        "missing_required_parameter",
    ),
    (
        "/v1/chat/completions",
        {"model": "tiny", "messages": [{"role": "user", "content": "x"}], "top_logprobs": 2},
        400,
        None,
    ),
    ("/v1/nothing", {"model": "tiny"}, 404, None),
]


@pytest.mark.parametrize(("path", "body", "status", "code"), BAD, ids=range(len(BAD)))
def test_bad_requests(server: BackgroundServer, path: str, body: object, status: int, code: str | None) -> None:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    answer = httpx.post(server.url + path, content=data)
    error = answer.json()["error"]
    assert answer.status_code == status, error
    assert set(error) == {"message", "type", "param", "code"} and error["message"]
    assert error["code"] == code


def test_wrong_method(server: BackgroundServer) -> None:
    answer = httpx.get(server.url + "/v1/completions")
    assert answer.status_code == 405 and "POST" in answer.json()["error"]["message"]


def test_health_and_metrics(server: BackgroundServer, client: openai.OpenAI) -> None:
    assert httpx.get(server.url + "/health").json() == {"status": "ok", "model": "tiny"}
    before = _metric(server, "modicum_generated_tokens_total")
    client.completions.create(model="tiny", prompt="The", max_tokens=5, extra_body={"ignore_eos": True})
    assert _metric(server, "modicum_generated_tokens_total") == before + 5
    assert _metric(server, "modicum_free_blocks") == _metric(server, "modicum_blocks")
    assert _metric(server, 'modicum_http_requests_total{path="/v1/completions",status="200"}') > 0
    assert _metric(server, "modicum_time_to_first_token_seconds_count") > 0


def _metric(server: BackgroundServer, name: str) -> float:
    text = httpx.get(server.url + "/metrics").text
    return next(float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line.rsplit(" ", 1)[0] == name)


def test_client_that_goes_away_frees_its_blocks(server: BackgroundServer, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = server.server.worker
    slow_down(worker.engine, monkeypatch)  # else all is said before the news of the closed connection
    aborted = _metric(server, "modicum_aborted_requests_total")
    body = {"model": "tiny", "prompt": "The", "max_tokens": 240, "ignore_eos": True}
    with httpx.stream("POST", server.url + "/v1/completions", json=body | {"stream": True, "n": 4}) as answer:
        next(answer.iter_lines())
    with pytest.raises(httpx.ReadTimeout):
        patience = httpx.Timeout(30, read=0.02)
        httpx.post(server.url + "/v1/completions", json=body | {"n": 8}, timeout=patience)
    end = time.monotonic() + 10
    while _metric(server, "modicum_aborted_requests_total") < aborted + 2 and time.monotonic() < end:
        time.sleep(0.02)
    assert _metric(server, "modicum_aborted_requests_total") == aborted + 2
    settle(worker)


def test_a_stream_that_catches_up_hears_of_a_lost_client(server: BackgroundServer) -> None:
    """Updates that wait in the queue are not all told first, and the end is not taken for the answer's."""

    async def read_one_then_leave() -> int:
        worker = server.server.worker
        request = Request(worker.engine.tokenizer.encode("The"), SamplingParams(max_tokens=30, ignore_eos=True))
        ticket = Ticket(worker, [request])
        await asyncio.to_thread(settle, worker)  # every update is in the queue
        seen = 0
        with pytest.raises(ClientGone):
            async for _ in ticket.updates():
                seen += 1
                if seen == 1:
                    asyncio.get_running_loop().call_soon(ticket.cancel)
        return seen

    assert asyncio.run(read_one_then_leave()) < 5


def test_storm_leaks_nothing(server: BackgroundServer) -> None:
    """Good, bad, long, short, streamed and abandoned requests at once; afterwards every block is free."""
    worker = server.server.worker

    def one(i: int) -> int:
        body: dict[str, object] = {
            "model": "tiny",
            "prompt": "The cache holds " * (i % 12 + 1),
            "max_tokens": 3 * i + 1,
            "seed": i,
        }
        if i % 7 == 3:
            body["temperature"] = "hot"
        if i % 7 == 5:
            body["prompt"] = [1] * 999
        try:
            if i % 3 == 0:
                with httpx.stream("POST", server.url + "/v1/completions", json=body | {"stream": True}) as answer:
                    for k, _ in enumerate(answer.iter_lines()):
                        if i % 2 and k > 4:
                            break
                    return answer.status_code
            timeout = 0.03 if i % 4 == 1 else 60
            return httpx.post(server.url + "/v1/completions", json=body, timeout=timeout).status_code
        except httpx.TimeoutException:
            return -1

    with ThreadPoolExecutor(12) as pool:
        statuses = list(pool.map(one, range(48)))
    assert {200, 400} <= set(statuses) <= {200, 400, -1}
    settle(worker)
    worker.engine.blocks.check()


def test_failing_step_is_a_500_and_the_server_goes_on(
    server: BackgroundServer, client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    under_test = server.server.worker.engine
    runner = under_test.runner
    calls = []

    def broken(*args: object, **more: object) -> object:
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("a bit fell over")
        return runner(*args, **more)

    ask = {"model": "tiny", "prompt": "The", "temperature": 0, "max_tokens": 9}
    want = client.completions.create(**ask).choices[0].text
    monkeypatch.setattr(under_test, "runner", broken)
    with pytest.raises(openai.InternalServerError, match="a bit fell over"):
        client.completions.create(**ask)
    calls.clear()
    with pytest.raises(openai.APIError, match="a bit fell over"):
        list(client.completions.create(**ask, stream=True))
    assert client.completions.create(**ask).choices[0].text == want
    settle(server.server.worker)


def test_api_key() -> None:
    with BackgroundServer(engine(), ServerConfig(port=0, api_key="sesame", model="tiny")) as server:
        assert httpx.get(server.url + "/health").status_code == 200
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=server.url + "/v1", api_key="guess").models.list()
        assert openai.OpenAI(base_url=server.url + "/v1", api_key="sesame").models.list().data[0].id == "tiny"


def test_full_queue_is_429(monkeypatch: pytest.MonkeyPatch) -> None:
    with BackgroundServer(engine(max_sequences=1), ServerConfig(port=0, max_queue=2, model="tiny")) as server:
        slow_down(server.server.worker.engine, monkeypatch)
        body = {"model": "tiny", "prompt": "The", "max_tokens": 60, "ignore_eos": True}
        with ThreadPoolExecutor(12) as pool:
            statuses = list(
                pool.map(
                    lambda _: httpx.post(server.url + "/v1/completions", json=body, timeout=60).status_code,
                    range(12),
                )
            )
        assert 200 in statuses and 429 in statuses and set(statuses) == {200, 429}
        settle(server.server.worker)


def test_shutdown_under_load_drains_or_says_so() -> None:
    slow = engine()
    server = BackgroundServer(slow, ServerConfig(port=0, model="tiny", drain=2.0)).__enter__()
    runner = slow.runner

    def sleepy(*args: object, **more: object) -> object:
        time.sleep(0.03)
        return runner(*args, **more)

    slow.runner = sleepy  # type: ignore[assignment]
    outcomes: list[object] = []

    def ask(tokens: int, stream: bool) -> None:
        body = {"model": "tiny", "prompt": "The", "max_tokens": tokens, "ignore_eos": True, "stream": stream}
        answer = httpx.post(server.url + "/v1/completions", json=body, timeout=60)
        outcomes.append((tokens, answer.status_code, answer.text))

    threads = [threading.Thread(target=ask, args=(n, s)) for n in (8, 240) for s in (False, True)]
    for thread in threads:
        thread.start()
    while slow.counters["generated_tokens"] < 8:
        time.sleep(0.01)
    server.stop()
    for thread in threads:
        thread.join(30)
    assert len(outcomes) == 4
    for tokens, status, text in outcomes:  # type: ignore[misc]
        if tokens == 8:
            assert status == 200 and "shutting down" not in text
        else:  # a stream has said 200 already: the error comes as its last event
            assert "shutting down" in text and status in (503, 200)
    assert_clean(slow)
    with pytest.raises(httpx.ConnectError):
        httpx.get(server.url + "/health")


def test_taken_port_is_a_user_error() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(UserError, match="choose another"):
            BackgroundServer(engine(), ServerConfig(port=taken.getsockname()[1]))
