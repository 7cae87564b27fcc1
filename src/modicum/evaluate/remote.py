"""Tasks answered by an OpenAI-compatible server instead of a model in this process.

Written answers only: chat completions give no likelihood of a text that the model did not write. Every answer is made
by a solver (`greedy` unless another is chosen). Nothing is kept on disk, since a server's name says nothing of its
weights: a cache by name would give the answers of another model.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from modicum.core import registry
from modicum.core.choice import Choice
from modicum.core.errors import UserError
from modicum.core.events import Events
from modicum.evaluate.kept import Kept
from modicum.evaluate.run import LM_EVAL, TaskResult, run_one
from modicum.evaluate.solving import Solving, endpoint
from modicum.evaluate.tasks import Choose, Generate


@dataclass(frozen=True)
class Unencoded:
    """A request whose tokens only the server knows."""

    longest: int = 0


class Remote:
    """What `run_one` asks of an answerer, of which there is no model here."""

    def encode(self, request: Generate | Choose) -> Unencoded:
        if isinstance(request, Choose):
            raise UserError(
                "a server answers in words, and this task scores the likelihood of choices; evaluate a model folder, "
                "or a task that is answered in words (gsm8k, generate, drop, ...)"
            )
        return Unencoded()


def run_endpoint(
    url: str,
    model: str,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    shots: int = 0,
    seed: int = 0,
    shot_seed: int | None = None,
    solver: str | None = None,
    solver_budget: int | None = None,
    client: Any = None,
    events: Events | None = None,
) -> list[TaskResult]:
    """Evaluate `model` of the server at `url` (ending in /v1); arguments as of `run_tasks`.

    The key is OPENAI_API_KEY of the environment. Raises UserError for tasks of likelihoods, and where the server cannot
    be reached or refuses.
    """
    import openai

    chosen = solver or "greedy"
    ask = endpoint(url, model, key=os.environ.get("OPENAI_API_KEY", "none"), client=client)
    method = Solving(registry.build("solver", chosen), ask, solver_budget)
    common = ["endpoint", url, model, Choice.parse("solver", chosen).resolved(), solver_budget]
    kept, results = Kept(), []
    for name in tasks:
        if name.startswith(LM_EVAL):
            raise UserError(f"{name}: lm-eval's own tasks need a model folder; leave --endpoint out")
        task = registry.build("task", name)
        own = getattr(task.config, "shots", None)
        drawing = (limit, shots if own is None else own, seed, seed if shot_seed is None else shot_seed)
        try:
            results.append(run_one(task, name, Remote(), common, drawing, kept, events or Events(), method))
        except openai.APIConnectionError as error:
            raise UserError(f"no server answers at {url} ({error}); start one, e.g. modicum serve MODEL") from None
        except openai.APIStatusError as error:
            raise UserError(f"{url} refused ({error.status_code}): {error.message}") from None
    return results
