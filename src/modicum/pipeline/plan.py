"""The cost estimate of a recipe, before anything is spent.

Each stage's `plan` returns its `Cost` and its decisions (sizes the stage must then keep to).
The fixed part comes from running a miniature of the recipe (`pipeline.rehearse`). On top of it, memory comes from
tracing the real training step on tensors without data; seconds come from running a few real steps, or a
small sample, here and now. The planner runs in a process of its own, so that what it measures is not disturbed.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from modicum.budget import Cost, machine
from modicum.budget.units import bytes_text
from modicum.core.errors import BudgetError, ModicumError, UserError
from modicum.core.events import count_text, seconds_text
from modicum.pipeline.measured import Memo
from modicum.pipeline.recipe import Recipe, as_data, parse


@dataclass
class Planner:
    """What a stage's `plan` gets: the recipe, the stages planned before it, and ways to measure."""

    recipe: Recipe
    machine: dict[str, Any]
    scratch: Path  # a folder for measuring, removed afterwards
    notify: Callable[[str], None] = lambda line: None
    name: str = ""  # of the stage that is planned now
    decisions: dict[str, dict[str, Any]] = field(default_factory=dict)  # by stage
    fixed: dict[str, Cost] = field(default_factory=dict)  # by stage's key: what it takes on a miniature
    memo: dict[str, Any] = field(default_factory=dict)  # measurements that several stages share
    kept: Memo = field(default_factory=Memo)  # and those that later plans share, as they are no matter of the moment
    objects: dict[str, Any] = field(default_factory=dict)

    def once(self, key: Any, measure: Callable[[], Any]) -> Any:
        """`measure()`, remembered under `key` (anything whose repr says what was measured)."""
        name = repr(key)
        if name not in self.memo:
            self.memo[name] = measure()
        return self.memo[name]

    def once_here(self, key: Any, measure: Callable[[], Any]) -> Any:
        """The same for what does not change on this machine (a trace), kept between plans: JSON only."""
        return self.kept.once(key, measure)

    def object(self, name: str, make: Callable[[], Any]) -> Any:
        """`make()`, made once and kept in memory while the plan is made."""
        if name not in self.objects:
            self.objects[name] = make()
        return self.objects[name]


def plan_here(recipe: Recipe, notify: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
    """Plan every stage in this process: {"machine", "stages": {name: {cost, decisions, basis}}, "total"}."""
    from modicum.pipeline.rehearse import fixed_costs

    began = time.monotonic()
    notify("plan: fixed cost of every stage, once per machine")
    with tempfile.TemporaryDirectory(prefix="modicum-plan-") as scratch:
        planner = Planner(
            recipe, machine.describe(), Path(scratch), notify, fixed=fixed_costs(recipe), kept=Memo.of_machine()
        )
        return _plan_stages(planner, began)


def _plan_stages(planner: Planner, began: float) -> dict[str, Any]:
    stages: dict[str, Any] = {}
    total = Cost()
    entries, recipe = planner.recipe.entries, planner.recipe
    for number, entry in enumerate(entries):
        name = entry.name
        planner.notify(f"plan: {name} ({number + 2} of {len(entries) + 1}, {time.monotonic() - began:.0f} s so far)")
        planner.name = name
        made = entry.stage.plan(recipe.section(name), recipe.inputs(name, planner.decisions), planner)
        cost = _above(planner.fixed[entry.key], made.cost)
        planner.decisions[name] = made.decisions
        stages[name] = {"cost": cost.as_dict(), "decisions": made.decisions, "basis": made.basis}
        total = total.then(cost)
    return {"machine": planner.machine, "stages": stages, "total": total.as_dict()}


def _above(fixed: Cost, grown: Cost) -> Cost:
    """The work's own cost, with the fixed part of time and memory under it."""
    return Cost(
        **grown.as_dict()
        | {"seconds": fixed.seconds + grown.seconds, "peak_bytes": fixed.peak_bytes + grown.peak_bytes}
    )


def make_plan(recipe: Recipe) -> dict[str, Any]:
    """Plan in a process of its own. Raises the planner's own errors."""
    from modicum.pipeline.worker import environment

    done = subprocess.run(
        [sys.executable, "-m", "modicum.pipeline.plan"],
        input=json.dumps(as_data(recipe)),
        stdout=subprocess.PIPE,
        text=True,
        check=False,
        env=environment(),
    )
    try:
        reply = json.loads(done.stdout.strip().splitlines()[-1])
    except (ValueError, IndexError):
        if done.returncode in (130, -2):
            raise KeyboardInterrupt from None
        raise ModicumError(f"planning ended with exit code {done.returncode}; what it said stands above") from None
    if "error" in reply:
        error = UserError(reply["error"])
        error.exit_code = reply["exit_code"]
        raise error
    return reply


def require_fits(recipe: Recipe, plan: dict[str, Any], folder: str | Path) -> None:
    """Raise `BudgetError` with the arithmetic if a stage, or the run, cannot fit the budget or the machine."""
    limits = recipe.limits()
    for name, stage in plan["stages"].items():
        cost = Cost(**stage["cost"])
        memory = Cost(peak_bytes=cost.peak_bytes)
        limits.require(memory, f"{name} ({stage['basis']})")
        have = plan["machine"]["memory_bytes"]
        if cost.peak_bytes > have:
            raise BudgetError(
                f"{name} needs {bytes_text(cost.peak_bytes)} of memory ({stage['basis']}), this machine "
                f"has {bytes_text(have)}; ask for a smaller model, batch or sequence length"
            )
    total = Cost(**plan["total"])
    limits.require(Cost(disk_bytes=total.disk_bytes, seconds=total.seconds), "the whole run")
    free = machine.free_disk(folder)
    if total.disk_bytes > free:
        raise BudgetError(
            f"the run writes {bytes_text(total.disk_bytes)}, {bytes_text(free)} are free where "
            f"{folder} is; free space or choose another folder with --out"
        )


def bill_text(plan: dict[str, Any]) -> str:
    """The bill as a table, one stage a line."""
    head = ["stage", "parameters", "tokens", "FLOPs", "peak memory", "disk", "time", "from"]
    lines = [head]
    for name, stage in [*plan["stages"].items(), ("whole run", {"cost": plan["total"], "basis": ""})]:
        c = Cost(**stage["cost"])
        lines.append(
            [
                name,
                *(count_text(v) if v else "–" for v in (c.parameters, c.tokens, c.flops)),
                bytes_text(c.peak_bytes),
                bytes_text(c.disk_bytes),
                seconds_text(c.seconds),
                stage["basis"],
            ]
        )
    widths = [max(len(row[i]) for row in lines) for i in range(len(head))]
    return "\n".join(
        "  ".join(
            cell.ljust(w) if i in (0, 7) else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in lines
    )


def main() -> int:
    from modicum.pipeline.worker import frugal_allocator

    frugal_allocator()
    recipe = parse(json.load(sys.stdin))
    if recipe.threads:
        import torch

        torch.set_num_threads(recipe.threads)
    try:
        plan = plan_here(recipe, notify=lambda line: print(line, file=sys.stderr, flush=True))
    except ModicumError as error:
        print(json.dumps({"error": str(error), "exit_code": error.exit_code}))
        return 0
    except KeyboardInterrupt:
        return 130
    print(json.dumps(plan, default=float))
    return 0


if __name__ == "__main__":
    sys.exit(main())
