"""The local engine: tasks in this process, or in worker processes on this machine.

Workers are fresh interpreters that exchange JSON lines: no fork of a process with threads, no pickling,
no second import of the user's script; the same from a notebook, a script or the command line.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

from modicum.data.engines import answer
from modicum.data.engines.worker import execute

PATIENCE = 10.0  # seconds a worker has to end after an error elsewhere


class Local:
    def __init__(self, processes: int):
        self.processes = processes
        self.workers: list[subprocess.Popen[str]] = []

    def __enter__(self) -> Local:
        return self

    def __exit__(self, *error: object) -> None:
        for worker in self.workers:
            if error[0] is not None:
                worker.terminate()  # ends it with its half-written file removed
            with contextlib.suppress(OSError):
                if worker.stdin:
                    worker.stdin.close()
        for worker in self.workers:
            try:
                worker.wait(None if error[0] is None else PATIENCE)
            except subprocess.TimeoutExpired:
                worker.kill()
                worker.wait()
            if worker.stdout:
                worker.stdout.close()
        self.workers = []

    def _start(self, count: int) -> None:
        threads = str(max(1, (os.cpu_count() or 1) // self.processes))
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
            "RAYON_NUM_THREADS": threads,
            "OMP_NUM_THREADS": threads,
        }
        while len(self.workers) < count:
            self.workers.append(
                subprocess.Popen(
                    [sys.executable, "-m", "modicum.data.engines.worker"],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                    encoding="utf-8",
                    env=environment,
                )
            )

    def run(self, function: str, tasks: list[dict[str, Any]]) -> Iterator[tuple[int, dict[str, Any]]]:
        if self.processes == 1 or len(tasks) <= 1:
            for i, task in enumerate(tasks):
                yield i, answer(execute(function, task))
            return
        self._start(min(self.processes, len(tasks)))
        waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
        replies: queue.SimpleQueue[tuple[int, dict[str, Any]]] = queue.SimpleQueue()
        for i in range(len(tasks)):
            waiting.put(i)
        stop = threading.Event()

        def serve(worker: subprocess.Popen[str]) -> None:
            while not stop.is_set():
                try:
                    i = waiting.get_nowait()
                except queue.Empty:
                    return
                line = ""
                with contextlib.suppress(OSError, ValueError):
                    assert worker.stdin and worker.stdout
                    worker.stdin.write(json.dumps({"function": function, "task": tasks[i]}) + "\n")
                    worker.stdin.flush()
                    line = worker.stdout.readline()
                if not line:
                    replies.put((i, {"error": "ModicumError", "message": died(worker.wait(), i)}))
                    return
                replies.put((i, json.loads(line)))

        threads = [threading.Thread(target=serve, args=(worker,), daemon=True) for worker in self.workers]
        for thread in threads:
            thread.start()
        try:
            for _ in tasks:
                i, reply = replies.get()
                yield i, answer(reply)
        finally:
            stop.set()
        for thread in threads:
            thread.join()


def died(code: int, i: int) -> str:
    why = "killed, most likely because memory ran out" if code == -9 else f"ended with code {code}"
    return f"a worker process was {why} in task {i}; use fewer processes, then type the same command again"
