"""A soak: clients of all habits on a small cache while steps fail and threads die; nothing may leak or hang.

Answers go through adapters, keep to grammars, are drafted ahead or lose entries of their caches; some bodies make no
sense. `pytest tests/serve/test_soak.py` runs seconds of it, `pytest -m slow tests/serve/test_soak.py` an hour.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections import Counter
from collections.abc import Mapping
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
import torch
from serve_tools import assert_clean, engine

from modicum.model import attach
from modicum.model.decoder import Decoder
from modicum.model.linear import LinearForm
from modicum.serve.request import Request, SamplingParams
from modicum.serve.server import BackgroundServer, ServerConfig

CLIENTS = 6
PATIENCE = 60.0  # seconds after which an answer counts as stuck
ENGINES: dict[str, dict[str, Any]] = {
    "sarathi-serve, drafts": {"scheduler": "sarathi-serve:tbt=0.05", "drafter": "prompt-lookup"},
    "fcfs, chunks": {"chunked_prefill": True},
    "snapkv": {"kv": "snapkv:budget=48,window=8", "cache": "400tok"},
}
FORMS: list[dict[str, Any]] = [
    {"choice": ["yes", "no", "perhaps"]},
    {"regex": "[a-d]{2,30}"},
    {"json": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 99}, "maxItems": 6}},
]
SENSELESS: list[dict[str, Any]] = [
    {"prompt": []},
    {"prompt": [1 << 40]},
    {"prompt": {"a": 1}},
    {"max_tokens": -1},
    {"n": 10**9},
    {"temperature": "warm"},
    {"stop": [""]},
    {"logit_bias": {"x": 1}},
    {"structured_outputs": {"regex": "(("}},
    {"structured_outputs": {"json": {"type": "objekt"}}},
    {"no such field": 1},
    {"model": "large"},
]
FLAT = 24 << 20  # bytes by which the process may differ between its second fifth and its last


class Fault(RuntimeError):
    pass


def _body(rng: random.Random) -> dict[str, Any]:
    """Two in three short, the others long; many begin alike, so that blocks are shared."""
    long = rng.random() < 0.33
    length = rng.randint(90, 200) if long else rng.randint(1, 30)
    shared = [7] * (length // 2) if rng.random() < 0.5 else []
    prompt = shared + [rng.randrange(1, 400) for _ in range(length - len(shared))]
    senseless = rng.choice(SENSELESS) if rng.random() < 0.1 else {}
    form = {"structured_outputs": rng.choice(FORMS)} if rng.random() < 0.3 else {}
    return {
        "model": rng.choice(("tiny", "tiny", "red")),
        "prompt": prompt,
        "max_tokens": rng.randint(1, 50 if long else 20),
        "ignore_eos": True,
        "temperature": rng.choice((0.0, 1.0)),
        "n": rng.choice((1, 1, 1, 2)),
        **form,
        **senseless,
    }


def _red(model: Decoder, folder: str) -> Mapping[str, LinearForm]:
    """An adapter that changes what is said."""
    made = attach.attach(model, {"*.down": "lora:rank=2"}, generator=torch.Generator().manual_seed(1))
    for form in made.values():
        for parameter in form.trainable():
            torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(2))
    return made


def _client(number: int, url: str, end: threading.Event, counts: Counter[str], faults: list[str]) -> None:
    """Asks until `end` is set; waits for the whole answer, reads a stream, leaves in its middle, or gives up early."""
    rng = random.Random(number)
    try:
        with httpx.Client(timeout=PATIENCE) as http:
            while not end.is_set():
                body, habit = _body(rng), rng.choice(("whole", "stream", "leave", "give up"))
                try:
                    if habit in ("whole", "give up"):
                        patience = PATIENCE if habit == "whole" else rng.choice((0.005, 0.03))
                        answer = http.post(url, json=body, timeout=httpx.Timeout(PATIENCE, read=patience))
                        status, text = answer.status_code, answer.text
                    else:
                        with http.stream("POST", url, json=body | {"stream": True}) as answer:
                            status, text = answer.status_code, ""
                            stop = rng.randint(0, 8) if habit == "leave" else 1 << 30
                            for k, line in enumerate(answer.iter_lines()):
                                text += line
                                if k >= stop:
                                    break
                            else:
                                if status == 200 and "[DONE]" not in text and "error" not in text:
                                    faults.append(f"a stream ended in its middle: {text[-200:]}")
                    if 400 <= status < 500 and any(v in SENSELESS for v in ({k: x} for k, x in body.items())):
                        counts["refused"] += 1
                    elif status == 200 and '"error"' not in text:
                        counts[habit] += 1
                    elif "soak" in text:
                        counts["failed on purpose"] += 1
                    else:
                        faults.append(f"{status}: {text[:300]}")
                except httpx.ReadTimeout:
                    if habit != "give up":
                        faults.append(f"stuck for {PATIENCE} s: {habit}, {len(body['prompt'])} tokens")
                    counts[habit] += 1
    except Exception as error:  # a client's own failure is this test's failure
        faults.append(f"client {number}: {type(error).__name__}: {error}")


def _dying(worker: Any, counts: Counter[str]) -> None:
    """A thread that submits a long request and dies, leaving a listener that raises at the second token."""

    def listener(updates: list[Any], seen: list[Any] = []) -> None:  # noqa: B006
        seen.extend(updates)
        if len(seen) >= 2:
            counts["listener raised"] += 1
            raise Fault("soak: the listener is gone")

    worker.submit(Request([5] * 150, SamplingParams(max_tokens=90, ignore_eos=True)), listener)
    raise Fault("soak: a worker thread dies")


def _all_seen(made: Any, counts: Counter[str]) -> bool:
    """Whether everything has happened that a soak is to have in it."""
    wanted = ("whole", "stream", "leave", "give up", "failed on purpose", "refused", "steps that raised")
    stats = made.stats()
    return all(counts[w] for w in (*wanted, "listener raised")) and stats["preemptions"] and stats["cached_tokens"]


def soak(seconds: float, kind: str) -> dict[str, Any]:
    """`seconds` of requests; on a slow machine longer, up to six times, until all has been seen."""
    limits = {"cache": "640tok", "max_batch_tokens": 128, "max_sequences": 12, "max_length": 256}
    made = engine(**(limits | ENGINES[kind]))
    made.add_adapter("red", "", _red)
    process, rss, counts, faults = psutil.Process(), [], Counter[str](), []
    runner, fail = made.runner, threading.Event()

    def broken(*given: Any, **more: Any) -> Any:
        if fail.is_set():
            fail.clear()
            counts["steps that raised"] += 1
            raise Fault("soak: this step fails")
        return runner(*given, **more)

    made.runner = broken  # type: ignore[assignment]
    rng, ignored = random.Random(1), threading.excepthook
    threading.excepthook = lambda args: None if args.exc_type is Fault else ignored(args)
    logging.getLogger("modicum.serve").setLevel(logging.CRITICAL)
    try:
        with BackgroundServer(made, ServerConfig(model="tiny", port=0)) as server:
            worker, began = server.server.worker, time.monotonic()
            url, end = server.url + "/v1/completions", threading.Event()
            threads = [
                threading.Thread(target=_client, args=(i, url, end, counts, faults), daemon=True)
                for i in range(CLIENTS)
            ]
            for thread in threads:
                thread.start()
            due = began + seconds / 10
            while not end.is_set():
                time.sleep(0.1)
                elapsed = time.monotonic() - began
                if elapsed >= 6 * seconds or (elapsed >= seconds and _all_seen(made, counts)):
                    end.set()
                rss.append(process.memory_info().rss)
                if time.monotonic() >= due:
                    due += seconds / 10 if seconds < 60 else rng.uniform(3, 9)
                    fail.set()
                    thread = threading.Thread(target=_dying, args=(worker, counts), daemon=True)
                    thread.start()
                    thread.join()
                    counts["threads that died"] += 1
            for thread in threads:
                thread.join(PATIENCE + 10)
            stuck = sum(thread.is_alive() for thread in threads)
            fail.clear()
            rest = time.monotonic() + PATIENCE
            while made.busy and time.monotonic() < rest:
                time.sleep(0.02)
            stats = made.stats()
            held = stats["used_blocks"]
            alive = worker.accepting
            made.blocks.check()
        assert_clean(made)
    finally:
        threading.excepthook = ignored
        logging.getLogger("modicum.serve").setLevel(logging.NOTSET)
    fifth = len(rss) // 5
    early, late = float(np.median(rss[fifth : 2 * fifth])), float(np.median(rss[-fifth:]))
    return {
        "seconds": seconds,
        **counts,
        "stuck": stuck,
        "blocks held at the end": held,
        "engine lives": alive,
        "steps": stats["steps"],
        "generated tokens": stats["generated_tokens"],
        "cached tokens": stats["cached_tokens"],
        "preemptions": stats["preemptions"],
        "MiB early": round(early / 2**20, 1),
        "MiB late": round(late / 2**20, 1),
        "growth": late - early,
        "faults": faults,
    }


def _check(figures: dict[str, Any], capsys: pytest.CaptureFixture[str], kind: str) -> None:
    with capsys.disabled():
        print(f"\nsoak {kind}: " + ", ".join(f"{k} {v}" for k, v in figures.items() if k != "faults"))
    assert not figures["faults"], figures["faults"][:5]
    assert figures["stuck"] == 0 and figures["blocks held at the end"] == 0 and figures["engine lives"]
    assert figures["growth"] < FLAT, f"memory grew by {figures['growth'] / 2**20:.1f} MiB"
    assert figures["threads that died"] and figures["steps that raised"] and figures["listener raised"]
    assert figures["preemptions"] and figures["cached tokens"] and figures["failed on purpose"] and figures["refused"]
    assert all(figures[habit] for habit in ("whole", "stream", "leave", "give up"))


def test_soak_of_seconds(capsys: pytest.CaptureFixture[str]) -> None:
    kind = "sarathi-serve, drafts"
    _check(soak(10.0, kind), capsys, kind)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kind", list(ENGINES))
def test_soak_of_an_hour(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    _check(soak(1200.0, kind), capsys, kind)
