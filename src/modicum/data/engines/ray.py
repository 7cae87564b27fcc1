"""The ray engine: tasks as rows of a Ray Data set, on this machine or on the cluster RAY_ADDRESS names.

On a cluster the source and the output folder must be on a file system that all nodes can read and write.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Iterator
from typing import Any

from modicum.core.errors import MissingExtra
from modicum.data.engines import answer
from modicum.data.engines.worker import execute


def _row(row: dict[str, Any]) -> dict[str, Any]:
    return {"index": row["index"], "reply": json.dumps(execute(row["function"], json.loads(row["task"])))}


class Ray:
    def __init__(self, processes: int):
        if importlib.util.find_spec("ray") is None:
            raise MissingExtra("ray", "ray", "engine ray")
        self.processes = processes
        self._mine = False

    def __enter__(self) -> Ray:
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
        import logging

        import ray
        import ray.data

        self._mine = not ray.is_initialized()
        if self._mine:
            paths = {"env_vars": {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}}
            local: dict[str, Any] = {"num_cpus": self.processes, "include_dashboard": False}
            if os.environ.get("RAY_ADDRESS"):
                local = {}  # a running cluster has its own
            ray.init(
                ignore_reinit_error=True, log_to_driver=False, logging_level=logging.ERROR, runtime_env=paths, **local
            )
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        return self

    def __exit__(self, *error: object) -> None:
        if self._mine:
            import ray

            ray.shutdown()

    def run(self, function: str, tasks: list[dict[str, Any]]) -> Iterator[tuple[int, dict[str, Any]]]:
        if not tasks:
            return
        import ray.data

        rows = [{"index": i, "function": function, "task": json.dumps(task)} for i, task in enumerate(tasks)]
        for row in ray.data.from_items(rows, override_num_blocks=len(rows)).map(_row).iter_rows():
            yield int(row["index"]), answer(json.loads(row["reply"]))
