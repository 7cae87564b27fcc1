"""task: accuracy of a model on each task, with its standard error, and seconds per document.

The model is SmolLM2-135M-Instruct in bfloat16 or the one given with --model: which of the tasks it can do says where
caches, drafters and compression can be judged by answers. Or (--model proxy) a small decoder trained on the task's own
train split: then the figure says how hard the task is for attention at this size. Tasks are not compared with each
other. Some tasks always train their own (`_task_KEY.py` beside this file).
"""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass

from modicum.bench import fixtures, training
from modicum.bench.measurement import Axes, Axis, Measurement, Settings
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
