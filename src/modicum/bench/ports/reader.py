"""reader: F1 of short answers from k passages, against the tokens of the prompt.

The same model answers the same questions from the same passages; only their order in the prompt differs. Questions
and passages are those of a folder with answers (--data), or facts read from the documentation of the Python
installation (`data.questions`); passages are the k best by BM25, so most of them are hard negatives. The seed draws
the questions. Replies are greedy.
"""

from __future__ import annotations

import functools
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modicum.bench import training
from modicum.bench.measurement import Axes, Axis, Measurement, Settings
from modicum.budget import Cost
from modicum.core import registry
from modicum.core.choice import Choice
from modicum.core.files import fingerprint
from modicum.data.document import Document
from modicum.data.passages import is_python, passages
from modicum.data.questions import draw, questions
from modicum.data.readers import ReadConfig, find, read
from modicum.evaluate import grounded, reading
from modicum.retrieve.search import Searcher, build_index
from modicum.serve.config import EngineConfig
from modicum.serve.engine import Engine
from modicum.serve.load import load_engine
from modicum.serve.messages import greedy_params, replies

AXES = Axes(quality=Axis("f1", "higher"), cost=Axis("prompt_tokens", "lower", "tokens"))
MODEL = "smollm2"
TIER = "laptop"


@dataclass(frozen=True, kw_only=True)
class Scale(training.Scale):
    questions: int = 48
    passages: int = 4  # k
    prompt_tokens: int = 60  # of instructions and question
    passage_tokens: int = 110
    answer_tokens: int = 16
    document_bytes: int = 4_000_000  # of the documentation, where no folder is given


QUICK = Scale(
    **{**training.QUICK, "sequence_length": 384, "tokens": 4 * 384},
    questions=6,
    passages=2,
    prompt_tokens=160,
    passage_tokens=60,
    answer_tokens=4,
    document_bytes=600_000,
)


def measure(choice: Choice, seed: int, settings: Settings) -> Measurement:
    scale: Scale = settings.scale
    engine = _engine(settings.model, settings.data, scale, settings.device)
    searcher, record = _index(settings.data, scale.document_bytes)
    items = _questions(settings.data, scale, seed)
    reader = registry.build("reader", choice)
    count = grounded.counter(engine)
    budget = scale.prompt_tokens + scale.passages * scale.passage_tokens
    prompts, shown, tokens = [], [], 0
    for item in items:
        hits = searcher.search(item.question, scale.passages, "bm25")
        messages, sources, used = reader.compose(item.question, hits, budget, count)
        prompts.append(messages)
        shown.append([s.id for s in sources])
        tokens += used
    texts = replies(engine, prompts, greedy_params(scale.answer_tokens))
    graded = grounded.grade(items, {"retrieved": texts}, shown)
    figures = graded.figures["retrieved"]
    return Measurement(
        metrics={
            "f1": figures["f1"]["value"],
            "exact": figures["exact"]["value"],
            "contains": figures["contains"]["value"],
            "gold_shown": graded.recall or 0.0,
            "prompt_tokens": tokens / len(items),
        },
        cost=Cost(tokens=tokens),
        data=record | {"questions": len(items)},
    )


@functools.lru_cache(maxsize=1)
def _engine(model: str | None, data: str | None, scale: Scale, device: str) -> Engine:
    config = EngineConfig(max_sequences=8)
    if model:
        return load_engine(model, config, device=device)
    bench, small = training.pretrained(Settings(scale=scale, data=data, device=device), 0)
    return Engine(small, bench.tokenizer, config)


@functools.lru_cache(maxsize=1)
def _index(source: str | None, document_bytes: int) -> tuple[Searcher, dict[str, Any]]:
    kept = tempfile.TemporaryDirectory(prefix="modicum-reader-")
    _FOLDERS.append(kept)  # as long as the process
    folder = Path(kept.name)
    if source:
        checksum = reading.checksums(source)["corpus.parquet"]
        return reading.open_index(source, folder, None), {"name": Path(source).name, "checksum": checksum}
    documents = _documentation(document_bytes)
    build_index(passages(documents), folder / "index")
    record = {"name": "python", "checksum": fingerprint([(d.id, d.nbytes) for d in documents])}
    return Searcher(folder / "index"), record | {"documents": len(documents)}


@functools.lru_cache(maxsize=1)
def _documentation(document_bytes: int) -> tuple[Document, ...]:
    """Python sources of the installation, the first ones up to so many bytes."""
    config, total, documents = ReadConfig(), 0, []
    for unit in find("python", config):
        for item in read(unit, config):
            if isinstance(item, Document) and is_python(item):
                documents.append(item)
                total += item.nbytes
        if total >= document_bytes:
            break
    return tuple(documents)


_FOLDERS: list[Any] = []


def _questions(source: str | None, scale: Scale, seed: int) -> list[grounded.Item]:
    if source:
        return reading.read_items(source, scale.questions, seed=seed)
    return grounded.items(draw(questions(_documentation(scale.document_bytes)), scale.questions, seed))
