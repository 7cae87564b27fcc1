"""The verbs serve and chat as a user types them."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest
import torch
from serve_tools import engine, folder, tiny
from typer.testing import CliRunner
from ui_tools import toy_index

from modicum.adapt.peft_format import save_peft
from modicum.cli import app
from modicum.core.errors import UserError
from modicum.model.attach import attach, merge
from modicum.serve import ui
from modicum.serve.chat import Conversation, local, remote
from modicum.serve.config import EngineConfig
from modicum.serve.engine import Engine
from modicum.serve.request import SamplingParams
from modicum.serve.server import BackgroundServer, Server, ServerConfig

GREEDY = SamplingParams(temperature=0, max_tokens=12)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder(tmp_path_factory.mktemp("served") / "tiny")


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str, said: str = "") -> str:
    monkeypatch.setattr(sys, "argv", ["modicum", *arguments])  # verbs are found by what was typed
    result = CliRunner().invoke(app, list(arguments), input=said)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout


def test_chat_with_a_folder(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ["chat", str(model), "--temperature", "0", "--max-tokens", "12"]
    once = run(monkeypatch, *options, "-m", "Hello")
    want = "".join(Conversation(local(engine(), GREEDY)).ask("Hello"))
    assert once == want + "\n"
    spoken = run(monkeypatch, *options, said="Hello\n/reset\nHello\n/exit\nnever\n")
    assert spoken == (want + "\n") * 2


def test_chat_with_a_server(monkeypatch: pytest.MonkeyPatch) -> None:
    with BackgroundServer(engine(), ServerConfig(port=0, model="tiny", api_key="sesame")) as server:
        spoken = run(
            monkeypatch,
            "chat",
            server.url,
            "--api-key",
            "sesame",
            "--temperature",
            "0",
            "--max-tokens",
            "12",
            "-m",
            "Hello",
        )
        assert spoken == "".join(Conversation(local(engine(), GREEDY)).ask("Hello")) + "\n"
        with pytest.raises(UserError, match="refused"):
            run(monkeypatch, "chat", server.url, "--api-key", "guess", "-m", "Hello")
        with pytest.raises(UserError, match="refused"):
            list(remote(server.url, "large", {"temperature": 0}, "sesame")([{"role": "user", "content": "x"}]))
    with pytest.raises(UserError, match="is the server running"):
        run(monkeypatch, "chat", server.url, "-m", "Hello")


def test_conversation_remembers_and_drops_the_oldest() -> None:
    e = engine(max_sequences=1)
    talk = Conversation(local(e, SamplingParams(temperature=0, max_tokens=20)), "Be brief.")
    for i in range(12):  # twelve turns do not fit 256 tokens
        answer = "".join(talk.ask(f"question number {i}"))
        assert talk.messages[-1]["content"] == answer or not answer
    assert talk.messages[0]["role"] == "system" and len(talk.messages) > 20
    half = talk.ask("tell me")
    first = next(half)
    half.close()  # type: ignore[attr-defined]
    assert talk.messages[-1] == {"role": "assistant", "content": first}
    before = list(talk.messages)
    with pytest.raises(UserError, match="write less"):
        list(talk.ask("long " * 300))
    assert talk.messages == before
    talk.reset()
    assert [m["role"] for m in talk.messages] == ["system"]


def test_serve_takes_an_adapter_and_a_form(model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What is served is the model with the adapter merged in, held in the form that was asked for."""
    trained = tiny()
    made = attach(trained, {"layers.*.attention.*": "lora:rank=4"})
    with torch.no_grad():
        for i, form in enumerate(made.values()):
            for parameter in form.trainable():
                parameter.normal_(generator=torch.Generator().manual_seed(i)).mul_(0.3)
    save_peft(trained, tmp_path / "adapter")
    served: list[Engine] = []
    monkeypatch.setattr(Server, "serve_until_stopped", lambda self: served.append(self.worker.engine))
    run(monkeypatch, "serve", str(model), "--port", "0", "--adapter", str(tmp_path / "adapter"))
    run(monkeypatch, "serve", str(model), "--port", "0", "--adapter", str(tmp_path / "adapter"), "--form", "int8")
    config = EngineConfig(cache="1ktok")
    want = Engine(trained, None, config).generate([[1, 2, 3]], GREEDY)[0].tokens
    assert served[0].generate([[1, 2, 3]], GREEDY)[0].tokens == want
    assert want != Engine(tiny(), None, config).generate([[1, 2, 3]], GREEDY)[0].tokens
    merge(trained)
    attach(trained, {"layers.*": "int8"})
    assert (
        served[1].generate([[1, 2, 3]], GREEDY)[0].tokens
        == Engine(trained, None, config).generate([[1, 2, 3]], GREEDY)[0].tokens
    )


def test_mistakes_are_one_line(model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for arguments in (
        ["serve", str(tmp_path / "nowhere")],
        ["serve", str(model), "--cache", "lots"],
        ["serve", str(model), "--scheduler", "fcsf"],
        ["serve", str(model), "--form", "int5"],
        ["serve", str(model), "--adapter", str(tmp_path)],
        ["serve", str(model), "--index", str(tmp_path)],
        ["serve", str(model), "--index", str(tmp_path), "--passages", "0"],
        ["chat", str(tmp_path), "-m", "x"],
    ):
        with pytest.raises(UserError) as caught:
            run(monkeypatch, *arguments)
        assert "\n" not in str(caught.value)


def test_serve_until_control_c(model: Path, tmp_path: Path) -> None:
    """The whole verb in a process of its own: URL printed, page, search, answers; a signal under load ends it."""
    command = [
        sys.executable,
        "-c",
        "from modicum.cli import main; main()",
        "serve",
        str(model),
        "--port",
        "0",
        "--form",
        "int8",
        "--cache",
        "1ktok",
        "--drain",
        "3",
        "--no-cuda-graphs",
        "--ui",
        "--index",
        str(toy_index(tmp_path / "orchard")),
        "--passages",
        "2",
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        printed = ""
        while "Ctrl-C" not in printed:
            printed += (line := process.stdout.readline())
            assert line, process.communicate()[1]
        url = printed[printed.index("http") :].split("/v1")[0]
        body = {"model": "tiny", "prompt": "The", "max_tokens": 150, "ignore_eos": True}
        answers: list[int] = []
        thread = threading.Thread(
            target=lambda: answers.append(httpx.post(url + "/v1/completions", json=body, timeout=60).status_code)
        )
        until = time.monotonic() + 60
        while time.monotonic() < until:
            try:
                assert httpx.get(url + "/health").status_code == 200
                break
            except httpx.ConnectError:
                time.sleep(0.05)
        assert httpx.get(url).text == ui.page().decode() and f"chat page: {url}/" in printed
        found = httpx.post(url + "/v1/search", json={"query": "kept"}, timeout=60).json()["data"]
        assert {hit["id"] for hit in found} == {"apples.md", "pears.txt"} and "orchard: 3 passages" in printed
        thread.start()
        while "modicum_queued_requests 0.0" in (text := httpx.get(url + "/metrics").text) and (
            "modicum_generated_tokens_total 0.0" in text
        ):
            time.sleep(0.005)
        process.send_signal(signal.SIGINT)
        thread.join(30)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0, err
    assert answers in ([200], [503])  # within the three seconds it drains
    assert "runner: " in printed and f"curl {url}" in printed and "stopped after" in out and "Traceback" not in err
