"""Running code that a model wrote, in a process that can do nothing but compute.

    verdict = run("def double(x): return 2 * x", ["assert double(2) == 4"])
    verdict.passed, verdict.reason, verdict.seconds

Each run has: namespaces of its own (no network, no sight of other processes), Landlock (the interpreter's files to
read, one empty folder to write), a seccomp filter (no new processes), limits of address space, CPU seconds, file size
and descriptors, an empty environment, a cap on output, and a wall clock that ends the whole process group. Where the
kernel gives no network namespace or no Landlock the run is refused; `unsafe=True` accepts that.

The verdict is a random word written after the last test by what started the tests, so an early exit, a patched
`AssertionError`, a swallowed exception or printed text cannot fake it. In `assert a == b` both sides must be plain
values of the interpreter's own types: an object whose `__eq__` always agrees fails. This guards against programs that
misbehave or cheat, not against one written to read this harness's memory.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from modicum.core.errors import UserError

JAIL, PROGRAM = (Path(__file__).with_name(name) for name in ("_jail.py", "_sandboxed.py"))


@dataclass(frozen=True)
class Verdict:
    """passed: every test ran through; reason: passed, failed, time, output, memory, crash; output: what was printed."""

    passed: bool
    reason: str
    output: str
    seconds: float


def run(
    code: str,
    tests: Sequence[str],
    *,
    seconds: float = 5.0,
    memory: int = 512 << 20,
    output_bytes: int = 64 << 10,
    processes: int = 16,
    unsafe: bool = False,
) -> Verdict:
    """Run `code`, then each of `tests` (statements). Raises UserError where the kernel cannot isolate it."""
    if not sys.platform.startswith("linux"):
        raise UserError("code is run in namespaces of the Linux kernel; on another system leave code tasks out")
    word = secrets.token_hex(16)
    folder = Path(tempfile.mkdtemp(prefix="modicum-sandbox-"))
    python = os.path.realpath(sys.executable)
    settings = {
        "python": python,
        "program": PROGRAM.read_text(encoding="utf-8"),
        "folder": str(folder),
        "readable": [
            sys.base_prefix,
            str(Path(python).parent),
            "/usr/lib",
            "/lib",
            "/lib64",
            "/dev/urandom",
            "/dev/zero",
        ],
        "unsafe_network": unsafe,
        "unsafe_files": unsafe,
        "limits": {
            "RLIMIT_AS": memory,
            "RLIMIT_CPU": max(1, int(seconds) + 1),
            "RLIMIT_FSIZE": 16 << 20,
            "RLIMIT_NPROC": processes,
            "RLIMIT_NOFILE": 64,
            "RLIMIT_CORE": 0,
        },
    }
    given = repr((word, code, list(tests))).encode("utf-8", "surrogatepass")
    start = time.monotonic()
    child = subprocess.Popen(
        [python, "-I", str(JAIL), json.dumps(settings)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={},
        cwd=folder,
        start_new_session=True,
        close_fds=True,
    )
    try:
        received, ended = _talk(child, given, start + seconds, output_bytes)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
        shutil.rmtree(folder, ignore_errors=True)
    took = time.monotonic() - start
    text = received.decode("utf-8", "replace")
    if "isolation: " in text and f"\n{word}\n" not in text and ended == "end":
        raise UserError(
            f"model-written code cannot be isolated here ({text.strip().splitlines()[-1]}); leave code tasks out, or "
            "accept the risk with unsafe=true"
        )
    passed = ended == "end" and text.endswith(f"\n{word}\n")
    reason = "passed" if passed else {"time": "time", "output": "output"}.get(ended) or _reason(text)
    return Verdict(passed, reason, text.replace(f"\n{word}\n", ""), took)


def _reason(text: str) -> str:
    if "MemoryError" in text:
        return "memory"
    return "failed" if "Error" in text or "Exception" in text else "crash"


def _talk(child: subprocess.Popen[bytes], given: bytes, until: float, output_bytes: int) -> tuple[bytes, str]:
    """Feed the program and read what it prints, to its end, the clock's or the cap's."""
    assert child.stdin is not None and child.stdout is not None
    os.set_blocking(child.stdout.fileno(), False)
    os.set_blocking(child.stdin.fileno(), False)
    received, sent = b"", 0
    with selectors.DefaultSelector() as ready:
        ready.register(child.stdout, selectors.EVENT_READ)
        ready.register(child.stdin, selectors.EVENT_WRITE)
        while True:
            left = until - time.monotonic()
            if left <= 0:
                return received, "time"
            for key, _ in ready.select(min(left, 0.5)):
                if key.fileobj is child.stdin:
                    try:
                        sent += os.write(child.stdin.fileno(), given[sent : sent + 65536])
                    except BlockingIOError:
                        continue
                    except BrokenPipeError:
                        sent = len(given)
                    if sent >= len(given):
                        ready.unregister(child.stdin)
                        child.stdin.close()
                    continue
                part = os.read(child.stdout.fileno(), 65536)
                if not part:
                    return received, "end"
                received += part
                if len(received) > output_bytes:
                    return received[:output_bytes], "output"
