"""lm-evaluation-harness over our decoder: its tasks and YAML files, our batching and kept items.

`ModicumLM` is an `lm_eval.api.model.LM`, so it can be given to `lm_eval.simple_evaluate(model=...)` directly.
Needs the extra `eval`.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from modicum.core.errors import MissingExtra, UserError, unknown
from modicum.core.files import fingerprint
from modicum.evaluate.answer import Answerer
from modicum.evaluate.kept import Kept, model_fingerprint
from modicum.evaluate.lm import document_nats
from modicum.evaluate.score import BATCH_TOKENS
from modicum.evaluate.tasks import Choose, Generate

CHUNK = 256  # requests scored and kept at a time

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
try:
    from lm_eval.api.model import LM
except ImportError as error:
    raise MissingExtra("lm_eval", "eval", "running tasks of lm-evaluation-harness") from error


class ModicumLM(LM):
    """A `Decoder` behind the serving engine, as the harness asks for it.

    Each request is kept by its fingerprint, so a stopped evaluation goes on. Where the harness applies a chat
    template it asks `apply_chat_template`; the answerer's own must be "none".
    """

    def __init__(
        self,
        answerer: Answerer,
        *,
        batch_tokens: int = BATCH_TOKENS,
        max_new_tokens: int = 256,
        kept: Kept | None = None,
        fingerprint_of_model: str | None = None,
    ):
        super().__init__()
        self.answerer, self.model, self.tokenizer = answerer, answerer.model, answerer.tokenizer
        self.batch_tokens, self.max_new_tokens = batch_tokens, max_new_tokens
        self.kept = kept or Kept()
        self._name = [fingerprint_of_model or model_fingerprint(self.model, self.tokenizer), *answerer.settings]
        self._device = self.model.device

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.fingerprint

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return self.tokenizer.chat(chat_history, generate=add_generation_prompt)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return (self.tokenizer.template or "") if chat_template else ""

    def _each(self, kind: str, requests: Sequence[Any], work: Callable[[list[Any]], list[Any]]) -> list[Any]:
        """`work` on the arguments of those requests that were not answered before, in chunks."""
        arguments = [request.args for request in requests]
        keys = [fingerprint([self._name, "lm-eval", kind, args]) for args in arguments]
        todo = [i for i, key in enumerate(keys) if key not in self.kept]
        for start in range(0, len(todo), CHUNK):
            chunk = todo[start : start + CHUNK]
            for i, value in zip(chunk, work([arguments[i] for i in chunk]), strict=True):
                self.kept.add(keys[i], value, task=f"lm-eval/{kind}")
        return [self.kept[key] for key in keys]

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        def work(arguments: list[Any]) -> list[Any]:
            # Choices of one question come one after the other, with the same context.
            groups: list[Choose] = []
            for context, continuation in arguments:
                if groups and groups[-1].prompt == context:
                    groups[-1] = Choose(context, (*groups[-1].choices, continuation))
                else:
                    groups.append(Choose(context, (continuation,)))
            return [[s.nats, s.greedy] for scores in self.answerer.answers(groups) for s in scores]

        return [(float(nats), bool(greedy)) for nats, greedy in self._each("loglikelihood", requests, work)]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        def work(arguments: list[Any]) -> list[Any]:
            return [
                -nats
                for nats, _, _ in document_nats(
                    self.model, self.tokenizer, [a[0] for a in arguments], batch_tokens=self.batch_tokens
                )
            ]

        return [float(value) for value in self._each("rolling", requests, work)]

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        def work(arguments: list[Any]) -> list[Any]:
            settings = [dict(a[1]) for a in arguments]
            if any(s.get("do_sample") and float(s.get("temperature", 1) or 0) > 0 for s in settings):
                raise UserError(
                    "this task asks for sampled text, the adapter generates greedily only; set "
                    "do_sample: false in the task's generation_kwargs"
                )
            stops = [[s["until"]] if isinstance(s.get("until"), str) else list(s.get("until") or []) for s in settings]
            most_tokens = int(self.model.config.context_length) - 1
            budgets = [min(int(s.get("max_gen_toks", self.max_new_tokens)), max(most_tokens // 2, 1)) for s in settings]
            return self.answerer.answers(
                [Generate(a[0], budget, tuple(stop)) for a, budget, stop in zip(arguments, budgets, stops, strict=True)]
            )

        return [str(text) for text in self._each("generate", requests, work)]


def run_lm_eval(
    answerer: Answerer,
    names: Sequence[str],
    *,
    limit: int | None = None,
    shots: int | None = None,
    batch_tokens: int = BATCH_TOKENS,
    kept: Kept | None = None,
    include_path: str | Path | None = None,
    fingerprint_of_model: str | None = None,
) -> list[Any]:
    """`evaluate.run.TaskResult` of each named task (a group gives its members, as "lm-eval:GROUP/TASK")."""
    from lm_eval.evaluator import evaluate
    from lm_eval.tasks import TaskManager, get_task_dict

    from modicum.evaluate.run import LM_EVAL, TaskResult

    if include_path is not None and not Path(include_path).is_dir():
        raise UserError(f"--include-path {include_path} is no folder; give the one that holds your task's YAML")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    # The harness's own thousands of files are read only if a name is not in the user's folder.
    manager = TaskManager(include_path=str(include_path), include_defaults=False) if include_path else None
    if manager is None or any(name not in manager.all_tasks for name in names):
        manager = TaskManager(include_path=None if include_path is None else str(include_path))
    for name in names:
        if name not in manager.all_tasks:
            raise unknown("lm-eval task", name, manager.all_tasks, "Add your own with --include-path FOLDER")
    results = []
    for name in names:
        # Not simple_evaluate: it seeds the whole process's generators and runs git and pip for its log.
        loaded = get_task_dict([name], manager)
        for task in _members(loaded):
            own = task.get_config("num_fewshot")
            task.set_config(key="num_fewshot", value=(own or 0) if shots is None or own == 0 else shots)
            task.set_fewshot_seed(seed=1234)
        written = all(task.OUTPUT_TYPE == "generate_until" for task in _members(loaded))
        chat = answerer.template == "always" or (answerer.template == "auto" and written)
        # The harness wraps the prompts itself, and a template brings its own beginning of the text.
        adapter = ModicumLM(
            answerer.plain(prefix="none" if chat else None),
            batch_tokens=batch_tokens,
            kept=kept,
            fingerprint_of_model=fingerprint_of_model,
        )
        outcome = evaluate(
            lm=adapter,
            task_dict=loaded,
            limit=limit,
            log_samples=True,
            bootstrap_iters=1000,
            apply_chat_template=chat,
        )
        if outcome is None:
            raise UserError(f"lm-eval gave no result for {name}")
        members = outcome["samples"]
        for member, samples in members.items():
            figures: dict[str, dict[str, float]] = {}
            for key, value in outcome["results"][member].items():
                figure, _, which = key.partition(",")
                if isinstance(value, int | float) and not figure.endswith("_stderr") and which:
                    error = outcome["results"][member].get(f"{figure}_stderr,{which}")
                    figures[figure] = {
                        "value": float(value),
                        "documents": len(samples),
                        "stderr": float(error) if isinstance(error, int | float) else float("nan"),
                    }
            rows = [
                {"id": str(s["doc_id"])}
                | {m: float(s[m]) for m in s.get("metrics", figures) if isinstance(s.get(m), int | float)}
                for s in samples
            ]
            title = LM_EVAL + (name if list(members) == [name] else f"{name}/{member}")
            metric = next((m for m in ("acc_norm", "acc", "exact_match") if m in figures), next(iter(figures), ""))
            results.append(TaskResult(title, metric, figures, rows))
    return results


def _members(tasks: dict[Any, Any]) -> Iterator[Any]:
    """The tasks of lm-eval's nested groups."""
    for value in tasks.values():
        if isinstance(value, dict):
            yield from _members(value)
        else:
            yield value
