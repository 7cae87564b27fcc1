"""The same items by lm-evaluation-harness: its own task files, its own Hugging Face model, compared item by item.

A task's rows are written in the data set's own columns to a temporary folder, where the harness's YAML file reads them
instead of the hub's; nothing is downloaded. What is compared: the log-likelihood of every choice, `acc`, and the
harness's `acc_norm`, which divides by characters (`acc_char` here).
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from modicum.core.choice import Choice
from modicum.core.errors import UserError
from modicum.evaluate.rows import rows_of

if TYPE_CHECKING:
    from modicum.evaluate.run import TaskResult

Row = dict[str, Any]


def _labelled(texts: list[str]) -> Row:
    return {"text": texts, "label": [chr(ord("A") + i) for i in range(len(texts))]}


def _arc(row: Row) -> Row:
    return {
        "question": row["question"],
        "choices": _labelled(row["choices"]),
        "answerKey": chr(ord("A") + row["answer"]),
    }


def _piqa(row: Row) -> Row:
    return {
        "goal": row["question"],
        "sol1": row["choices"][0],
        "sol2": row["choices"][1],
        "label": row["answer"],
    }


def _hellaswag(row: Row) -> Row:
    """The texts are cleaned already; a mark before a space keeps the harness from stripping it."""
    label, _, scene = row["question"].partition(": ")
    endings = [f"[header]{choice}" if choice.startswith(" ") else choice for choice in row["choices"]]
    return {"activity_label": label, "ctx_a": scene, "ctx_b": "", "endings": endings, "label": row["answer"]}


def _openbookqa(row: Row) -> Row:
    return {
        "question_stem": row["question"],
        "choices": _labelled(row["choices"]),
        "answerKey": chr(ord("A") + row["answer"]),
    }


# task: the harness's file, and a row of (question, choices, answer) in the data set's own columns
TASKS: dict[str, tuple[str, Callable[[Row], Row]]] = {
    "arc-challenge": ("arc/arc_challenge.yaml", _arc),
    "arc-easy": ("arc/arc_easy.yaml", _arc),
    "hellaswag": ("hellaswag/hellaswag.yaml", _hellaswag),
    "openbookqa": ("openbookqa/openbookqa.yaml", _openbookqa),
    "piqa": ("piqa/piqa.yaml", _piqa),
}


def check(names: Sequence[str]) -> None:
    """Raises UserError for tasks that are not in `TASKS`, and where lm-eval is not installed."""
    for name in names:
        if key_of(name) not in TASKS:
            raise UserError(f"--harness compares {', '.join(TASKS)}; {name} is none of them")
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("--harness needs lm-evaluation-harness: pip install modicum[eval]")


def key_of(name: str) -> str:
    return name.partition(":")[0]


def compared(folder: Path, results: Sequence[TaskResult], dtype: str = "float32") -> list[dict[str, Any]]:
    """Figures of zero-shot results beside those of the harness, item by item, of the model in `folder`."""
    check([result.task for result in results])
    with tempfile.TemporaryDirectory() as scratch, _offline(Path(scratch)):
        return [
            _side_by_side(result, *answered)
            for result, answered in zip(results, _evaluated(folder, results, Path(scratch), dtype), strict=True)
        ]


def _evaluated(folder: Path, results: Sequence[TaskResult], scratch: Path, dtype: str) -> list[tuple[list[Row], float]]:
    """(samples in the order of the result's rows, seconds) of each task."""
    import lm_eval
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager, get_task_dict

    from modicum.model.folder import load_model, save_model

    for number, result in enumerate(results):
        file, convert = TASKS[key_of(result.task)]
        config: Any = Choice.parse("task", result.task).config()
        rows = {str(row.get("id", n)): row for n, row in rows_of(config, "test", None, 0)}
        data = scratch / f"{number}.jsonl"
        lines = [json.dumps(convert(rows[str(row["id"])])) for row in result.rows]
        data.write_text("\n".join(lines), encoding="utf-8")
        (scratch / f"{number}.yaml").write_text(
            f"include: {Path(lm_eval.__file__).parent / 'tasks' / file}\ntask: local-{number}\n"
            f"dataset_path: json\ndataset_name: null\ndataset_kwargs: {{data_files: {{test: {data}}}}}\n"
            "test_split: test\nvalidation_split: null\ntraining_split: null\nfewshot_split: null\ntag: null\n",
            encoding="utf-8",
        )
    # Quantised files are read here and written densely, so that both sides have the same weights.
    save_model(load_model(folder, dtype), scratch / "model", folder)
    model = HFLM(pretrained=str(scratch / "model"), device="cpu", dtype=dtype, batch_size=8)
    manager = TaskManager(include_path=str(scratch), include_defaults=False)
    answered = []
    for number in range(len(results)):
        start, name = time.perf_counter(), f"local-{number}"
        outcome = evaluate(model, get_task_dict([name], manager), bootstrap_iters=0)
        samples = sorted(outcome["samples"][name], key=lambda s: s["doc_id"])
        answered.append((samples, time.perf_counter() - start))
    return answered


def _side_by_side(result: Any, samples: list[Row], seconds: float) -> dict[str, Any]:
    ours = [item["nats"] for item in result.items]
    theirs = [[float(r[0]) for r in sample["filtered_resps"]] for sample in samples]
    apart = np.concatenate([np.abs(np.array(a) - np.array(b)) for a, b in zip(ours, theirs, strict=True)])
    row: dict[str, Any] = {"task": result.task, "items": len(ours), "nats_apart_mean": float(apart.mean())}
    row["nats_apart_most"] = float(apart.max())
    for name, other in (("acc", "acc"), ("acc_char", "acc_norm")):
        a = [r[name] for r in result.rows]
        b = [float(sample[other]) for sample in samples]
        row[other] = float(np.mean(a))
        row[f"{other}_harness"] = float(np.mean(b))
        row[f"{other}_items_apart"] = int(np.sum(np.array(a) != np.array(b)))
    rate = result.items_per_second
    return row | {"items_per_second": rate, "items_per_second_harness": len(ours) / seconds}


@contextlib.contextmanager
def _offline(scratch: Path) -> Iterator[None]:
    """The hub is not asked, and the data sets' cache is the scratch folder."""
    import datasets

    before = {name: os.environ.get(name) for name in ("HF_HUB_OFFLINE", "TQDM_DISABLE")}
    cache = datasets.config.HF_DATASETS_CACHE
    os.environ.update({"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"})
    datasets.config.HF_DATASETS_CACHE = scratch / "datasets"
    try:
        yield
    finally:
        datasets.config.HF_DATASETS_CACHE = cache
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})
