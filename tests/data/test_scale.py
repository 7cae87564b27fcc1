"""A corpus larger than memory, most of it near-duplicates; and generators that fail in the middle, as typed."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from modicum.budget import units
from modicum.data.curate import Curation

GIB_PER_10GB = 4.0  # of memory for 10 GB of text, beside what the process takes for the text of one file
COPIES = 10  # near-duplicates of each text, itself included
FILE_BYTES = 25_000_000

CURATE = """
import json, resource, sys
from modicum.data.curate import CurateConfig, curate
made = curate(sys.argv[1], sys.argv[2], CurateConfig(steps=["normalise", "minhash"], vocab_size=1024), processes=1)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
kept = made.count("documents") + made.count("documents", "heldout")
print(json.dumps({"peak": peak, "kept": kept, "in": made.stats["steps"][0]["documents_out"]}))
"""


def near_duplicates(folder: Path, size: float) -> int:
    """JSON lines of about `size` bytes; returns how many texts differ."""
    folder.mkdir()
    rng, words = random.Random(0), [f"word{i}" for i in range(5000)]
    written, texts, number = 0.0, 0, 0
    while written < size:
        with open(folder / f"{number:04}.jsonl", "w") as file:
            own = 0
            while own < min(FILE_BYTES, size):
                base = rng.choices(words, k=380)
                texts += 1
                for _ in range(COPIES):
                    copy = list(base)
                    copy[rng.randrange(len(copy))] = rng.choice(words)  # two copies share 0.95 of their 5-grams
                    own += file.write(json.dumps({"text": " ".join(copy)}) + "\n")
        written, number = written + own, number + 1
    return texts


def curated(source: Path, out: Path) -> dict[str, float]:
    run = subprocess.run([sys.executable, "-c", CURATE, str(source), str(out)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    made: dict[str, float] = json.loads(run.stdout.splitlines()[-1])
    return made


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_near_duplicates_are_taken_out_in_bounded_memory(tmp_path: Path) -> None:
    """200 MB by default; MODICUM_TEST_TEXT=10GB for the whole of it, within 4 GiB."""
    size = units.parse(os.environ.get("MODICUM_TEST_TEXT", "200MB"), "bytes")
    near_duplicates(tmp_path / "few", FILE_BYTES)
    least = curated(tmp_path / "few", tmp_path / "few-out")["peak"]
    texts = near_duplicates(tmp_path / "pool", size)
    made = curated(tmp_path / "pool", tmp_path / "out")
    print(f"{size / 1e6:.0f} MB: peak {made['peak'] / 2**20:.0f} MiB, {least / 2**20:.0f} MiB for one file; {made}")
    assert made["in"] == COPIES * texts
    assert texts <= made["kept"] <= 1.05 * texts
    assert made["peak"] - least < GIB_PER_10GB * 2**30 * size / 10e9


# Generators


class Server(BaseHTTPRequestHandler):
    """An OpenAI-compatible server that fails on some texts, in every way that servers do."""

    asked: Counter[str] = Counter()
    sound = False

    def do_GET(self) -> None:
        self._send(200, json.dumps({"object": "list", "data": [{"id": "toy", "object": "model"}]}))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = body["messages"][-1]["content"]
        kind = next((k for k in ("broken", "nonsense", "silent", "empty") if f"kind {k}" in text), "good")
        type(self).asked[kind] += 1
        if self.sound or kind == "good":
            reply = " ".join(text.split()[-40:])
            choice = {"index": 0, "message": {"role": "assistant", "content": reply}, "finish_reason": "stop"}
            self._send(
                200,
                json.dumps({"id": "x", "object": "chat.completion", "created": 0, "model": "toy", "choices": [choice]}),
            )
        elif kind == "broken":
            self._send(400, json.dumps({"error": {"message": "out of memory"}}))
        elif kind == "nonsense":
            self._send(200, json.dumps({"hello": "world"}))
        elif kind == "empty":
            self._send(200, json.dumps({"choices": []}))
        else:
            self.close_connection = True  # not a word
            self.connection.close()

    def _send(self, code: int, text: str) -> None:
        data = text.encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    Server.asked, Server.sound = Counter(), False
    made = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    thread = threading.Thread(target=made.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{made.server_address[1]}"
    made.shutdown()


def test_documents_that_a_generator_fails_on_are_named_and_the_rest_is_done(server: str, tmp_path: Path) -> None:
    pytest.importorskip("openai")
    kinds = ["good", "broken", "good", "nonsense", "good", "empty", "silent", "good"]
    rng = random.Random(0)
    with open(tmp_path / "pool.jsonl", "w") as file:
        for i, kind in enumerate(kinds):
            words = " ".join(rng.choice(("river", "stone", "bread", "light", "window")) for _ in range(45))
            file.write(json.dumps({"text": f"Text {i} of kind {kind}: {words}."}) + "\n")
    command = [sys.executable, "-c", "from modicum.cli import main; main()", "curate", str(tmp_path / "pool.jsonl")]
    command += [
        "--out",
        str(tmp_path / "out"),
        "--vocab-size",
        "300",
        "--processes",
        "1",
        "--generator",
        f"toy@{server}",
    ]
    command += ["--steps", "normalise rewrite:by=tpt"]
    environment = os.environ | {"OPENAI_API_KEY": "none", "NO_PROXY": "127.0.0.1"}
    first = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert first.returncode == 1, first.stderr
    lines = [line for line in first.stderr.splitlines() if line.startswith("modicum: not rewritten: ")]
    named = {line.split("pool.jsonl#")[1].split("#")[0]: line for line in lines}
    assert set(named) == {"2", "4", "6", "7"} and len(lines) == 4
    assert "out of memory" in named["2"] and "cannot be reached" in named["7"]
    assert "completion" in named["4"] or "text" in named["4"]
    documents = {d.id: d for split in ("train", "heldout") for d in Curation.load(tmp_path / "out").documents(split)}
    assert len(documents) == 8  # those that failed stay as they were
    assert sum("rewritten" in d.meta for d in documents.values()) == 4
    Server.sound, before = True, Server.asked["good"]
    again = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert again.returncode == 0, again.stderr
    assert Server.asked["good"] == before  # what was answered is not asked for again
    documents = {d.id: d for split in ("train", "heldout") for d in Curation.load(tmp_path / "out").documents(split)}
    assert sum("rewritten" in d.meta for d in documents.values()) == 8
