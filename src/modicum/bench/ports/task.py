"""task: accuracy of a model on each task, with its standard error, and seconds per document.

The model is SmolLM2-135M-Instruct in bfloat16 or the one given with --model: which of the tasks it can do says where
caches, drafters and compression can be judged by answers. Or (--model proxy) a small decoder trained on the task's own
train split: then the figure says how hard the task is for attention at this size. Tasks are not compared with each
other. knowledge-capacity and listops always train their own (`_task_capacity`, `_task_pretraining`).
"""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass

from modicum.bench import fixtures, training
from modicum.bench.measurement import Axes, Axis, Measurement, Settings
from modicum.bench.ports import _task_capacity, _task_pretraining
from modicum.budget import Cost
from modicum.core import registry
from modicum.core.choice import Choice
from modicum.core.files import fingerprint
from modicum.data.document import Document
from modicum.data.tokenizer import Tokenizer
from modicum.evaluate.run import run_tasks
from modicum.evaluate.tasks import Task
from modicum.model.folder import load_model

AXES = Axes(quality=Axis("score", "higher", against=""), cost=Axis("seconds_per_document", "lower", "s", against=""))
LIMITS = training.LIMITS
MODEL = "smollm2"
NOT_MEASURABLE = {
    "arc-challenge": "its questions are no part of modicum; modicum eval --tasks arc-challenge --data FOLDER asks them",
    "arc-easy": "its questions are no part of modicum; modicum eval --tasks arc-easy --data FOLDER asks them",
    "hellaswag": "its questions are no part of modicum; modicum eval --tasks hellaswag --data FOLDER asks them",
    "piqa": "its questions are no part of modicum; modicum eval --tasks piqa --data FOLDER asks them",
    "openbookqa": "its questions are no part of modicum; modicum eval --tasks openbookqa --data FOLDER asks them",
    "boolq": "its questions are no part of modicum; modicum eval --tasks boolq --data FOLDER asks them",
    "sciq": "its questions are no part of modicum; modicum eval --tasks sciq --data FOLDER asks them",
    "copa": "its questions are no part of modicum; modicum eval --tasks copa --data FOLDER asks them",
    "commonsense-qa": "its questions are no part of modicum; ask them by modicum eval --tasks commonsense-qa",
    "social-iqa": "its questions are no part of modicum; modicum eval --tasks social-iqa --data FOLDER asks them",
    "winogrande": "its questions are no part of modicum; modicum eval --tasks winogrande --data FOLDER asks them",
    "mmlu": "its questions are no part of modicum; modicum eval --tasks mmlu --data FOLDER asks them",
    "medmcqa": "its questions are no part of modicum; modicum eval --tasks medmcqa --data FOLDER asks them",
    "medqa": "its questions are no part of modicum; modicum eval --tasks medqa --data FOLDER asks them",
    "truthfulqa": "its questions are no part of modicum; modicum eval --tasks truthfulqa --data FOLDER asks them",
    "basic-skills": "its questions are no part of modicum; modicum eval --tasks basic-skills --data FOLDER asks them",
    "gsm8k": "its questions are no part of modicum; modicum eval --tasks gsm8k --data FOLDER asks them",
    "math-word-problems": "its questions are no part of modicum; ask them by modicum eval --tasks math-word-problems",
    "lambada": "its questions are no part of modicum; modicum eval --tasks lambada --data FOLDER asks them",
    "nq-open": "its questions are no part of modicum; modicum eval --tasks nq-open --data FOLDER asks them",
    "coqa": "its questions are no part of modicum; modicum eval --tasks coqa --data FOLDER asks them",
    "drop": "its questions are no part of modicum; modicum eval --tasks drop --data FOLDER asks them",
    "mbpp": "its questions are no part of modicum; modicum eval --tasks mbpp --data FOLDER asks them",
    "prefeval": "its questions are no part of modicum; modicum eval --tasks prefeval:file=FILE asks them",
    "choice": "it has no questions of its own, it asks those of any file",
    "generate": "it has no questions of its own, it asks those of any file",
}


@dataclass(frozen=True, kw_only=True)
class Scale(training.Scale):
    tokens: int = 1_000_000
    vocabulary: int = 768
    sequence_length: int = 512
    batch_sequences: int = 8
    documents: int = 2000  # of the train split
    examples: int = 25  # of the test split


QUICK = Scale(**{**training.QUICK, "sequence_length": 256, "tokens": 4 * 256}, documents=30, examples=3)


def measure(choice: Choice, seed: int, settings: Settings) -> Measurement:
    for own in (_task_capacity, _task_pretraining):
        if own.applies(choice):
            return own.measure(choice, seed, settings)
    scale: Scale = settings.scale
    task: Task = registry.build("task", choice)
    if settings.model:
        bench = training.Bench.of(settings)
        model = load_model(settings.model, "bfloat16", settings.device)
        kind, spent = settings.model, Cost()
    else:
        docs = itertools.islice(task.docs("train", scale.documents, seed), scale.documents)
        texts = tuple(Document(str(d["id"]), task.text(d), "task") for d in docs)
        corpus = fixtures.Corpus(str(choice), texts, texts[:1], fingerprint([d.text for d in texts]))
        bench = training.Bench(corpus, Tokenizer.train((d.text for d in texts), scale.vocabulary), scale, settings)
        model = bench.model(seed)
        result = bench.train(model, seed, bench.stream(seed, texts, packing="concat:mask=true"))
        kind, spent = "small decoder, trained on the task", Cost(seconds=result.seconds, flops=result.flops)
    start = time.perf_counter()
    (scores,) = run_tasks(
        model, bench.tokenizer, [str(choice)], limit=scale.examples, seed=seed, events=fixtures.Quiet()
    )
    seconds = time.perf_counter() - start
    figures = {name: figure["value"] for name, figure in scores.figures.items()}
    metrics = {
        "score": scores.value,
        "stderr": scores.figures[scores.metric]["stderr"],
        **figures,
        "seconds_per_document": seconds / len(scores.rows),
    }
    checksum = fingerprint([row["id"] for row in scores.rows])
    return Measurement(
        metrics=metrics,
        cost=Cost(seconds=spent.seconds + seconds, flops=spent.flops),
        model=fixtures.model_record(model, kind),
        data={"name": f"{choice}, seed {seed}", "checksum": checksum, "documents": len(scores.rows)},
    )
