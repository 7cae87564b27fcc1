"""An engine in a process of its own: the worker that prepares and times it, and the handle that asks it.

Requests and answers are lines of JSON over the worker's standard input and output. A worker that ends by a signal,
does not answer in time or raises becomes `EngineFailed` with the reason; nothing it does reaches the other engines.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from modicum.core.errors import UserError

Columns = dict[str, Callable[[], float]]


@dataclass(frozen=True, kw_only=True)
class Size:
    """What is measured. prompt: before decoding; tokens: decoded; prefill: prompt of the prefill column; answer: tokens
    of each of `requests` at once (and of one alone), their prompts' time included; drafts: tokens checked beside
    the one that is computed anyway."""

    layers: int = 24
    width: int = 1024
    heads: int = 16
    kv_heads: int = 4
    mlp_width: int = 2816
    vocab: int = 32000
    prompt: int = 32
    tokens: int = 48
    prefill: int = 512
    requests: int = 16
    answer: int = 128
    drafts: int = 10
    rounds: int = 5


QUICK = Size(
    layers=4, width=256, heads=4, kv_heads=2, mlp_width=704, vocab=4000, tokens=16, prefill=128, answer=16, rounds=2
)


@dataclass(frozen=True)
class Job:
    """What one worker times: `target` ("package.module:function") called with (folder, size, form) for each form gives
    columns, name to what returns a rate."""

    engine: str
    target: str
    forms: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{self.engine} {self.forms[0]}" if len(self.forms) == 1 else self.engine


class EngineFailed(Exception):
    """Why an engine gave no figure, in a line."""


class Worker:
    """A running worker. `columns`: what it can time; `skipped`: form to why not; `broken`: those that are bugs."""

    def __init__(self, job: Job, folder: Path, size: Any, threads: int, limit: float):
        """size: a dataclass of plain values, what the job's target takes."""
        self.job, self.limit = job, limit
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  (closed by close)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "modicum.bench.engine_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=os.environ | {"OMP_NUM_THREADS": str(threads)},
        )
        self._buffer = b""
        try:
            kind = f"{type(size).__module__}:{type(size).__name__}"
            ready = self._ask({"job": asdict(job), "folder": str(folder), "kind": kind, "size": asdict(size)})
        except BaseException:
            self.close()
            raise
        self.columns: list[str] = ready["columns"]
        self.skipped: dict[str, str] = ready["skipped"]
        self.broken: list[str] = ready["broken"]

    def time(self, column: str) -> float:
        """Tokens per second of one turn. Raises `EngineFailed`."""
        return float(self._ask({"column": column})["rate"])

    def call(self, target: str, *arguments: Any) -> Any:
        """What a function returns there; plain values both ways."""
        return self._ask({"call": target, "arguments": arguments})["value"]

    def close(self) -> None:
        self.kill()
        for pipe in (self._process.stdin, self._process.stdout, self._errors):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):  # what was not written to a process that is gone
                    pipe.close()

    def kill(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        stdin = self._process.stdin
        assert stdin is not None
        try:
            stdin.write(json.dumps(request).encode() + b"\n")
            stdin.flush()
        except BrokenPipeError:
            raise EngineFailed(self._ended()) from None
        answer: dict[str, Any] = json.loads(self._line())
        if "error" in answer:
            raise EngineFailed(answer["error"])
        return answer

    def _line(self) -> bytes:
        stdout = self._process.stdout
        assert stdout is not None
        deadline = time.monotonic() + self.limit
        with selectors.DefaultSelector() as selector:
            selector.register(stdout, selectors.EVENT_READ)
            while b"\n" not in self._buffer:
                if not selector.select(max(deadline - time.monotonic(), 0)):
                    self.kill()
                    raise EngineFailed(f"gave no answer within {self.limit:g} s and was ended (see --limit)")
                block = os.read(stdout.fileno(), 1 << 16)
                if not block:
                    raise EngineFailed(self._ended())
                self._buffer += block
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line

    def _ended(self) -> str:
        """How the process ended, with the last line it wrote to standard error."""
        try:
            code = self._process.wait(self.limit)
        except subprocess.TimeoutExpired:
            return f"closed its output and gave no answer within {self.limit:g} s"
        self._errors.seek(0)
        errors = self._errors.read().decode(errors="replace").strip().splitlines()
        tail = f": {errors[-1].strip()[:160]}" if errors else ""
        if code < 0:
            return f"its process was ended by signal {-code} ({signal.Signals(-code).name}){tail}"
        return f"its process ended with exit code {code}{tail}"


# The worker's side ----------------------------------------------------------------------------------


def _find(target: str) -> Callable[..., Any]:
    module, _, name = target.partition(":")
    function: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return function


def _reason(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}".removesuffix(": ")


def main() -> None:
    with os.fdopen(os.dup(1), "w") as out:  # what libraries print goes elsewhere
        os.dup2(2, 1)

        def answer(value: dict[str, Any]) -> None:
            out.write(json.dumps(value) + "\n")
            out.flush()

        columns: Columns = {}
        for line in sys.stdin:
            request = json.loads(line)
            try:
                if "job" in request:
                    answer(_prepare(request, columns))
                elif "call" in request:
                    answer({"value": _find(request["call"])(*request["arguments"])})
                else:
                    answer({"rate": columns[request["column"]]()})
            except Exception as error:
                answer({"error": _reason(error)})


def _prepare(request: dict[str, Any], columns: Columns) -> dict[str, Any]:
    job, size = request["job"], _find(request["kind"])(**request["size"])
    make, skipped, broken = _find(job["target"]), {}, []
    for form in job["forms"]:
        try:
            columns.update(make(Path(request["folder"]), size, form))
        except Exception as error:
            skipped[form] = _reason(error)
            if not isinstance(error, UserError):
                broken.append(form)
    return {"columns": list(columns), "skipped": skipped, "broken": broken}


if __name__ == "__main__":
    main()
