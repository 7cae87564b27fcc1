"""evaluate: bits per byte of every variant on held-out text, beside general-purpose compressors, and tasks."""

from __future__ import annotations

import time
from typing import Any

from modicum.budget import Cost, Meter
from modicum.budget.meter import resident_now
from modicum.compress.yardstick import yardsticks
from modicum.core.choice import Choice
from modicum.data.curate import Curation
from modicum.data.tokenizer import Tokenizer
from modicum.evaluate.lm import LMScore, bits_per_byte
from modicum.model.folder import load_model
from modicum.pipeline import training
from modicum.pipeline.context import Context
from modicum.pipeline.plan import Planner, StagePlan
from modicum.pipeline.recipe import Recipe
from modicum.pipeline.worker import trim_allocator

NEEDS = ("curate", "pretrain")
BATCH_TOKENS = 2048  # of one forward pass: as fast as more on a CPU, and little memory
OVERLAP = 0.0  # of a window, scored before and context only: small models gain nothing by it
TIMED_BYTES = 100_000  # of the sample's held-out text: scored for the plan
DICTIONARY_TEXT = 3 << 20  # bytes of training text that zstd's dictionary is made from


def uses(recipe: Recipe) -> dict[str, Any]:
    return {
        "evaluate": recipe.evaluate.model_dump(),
        "compress": recipe.compress.model_dump() if recipe.compress else None,
    }


def plan(planner: Planner) -> StagePlan:
    recipe, curate = planner.recipe, planner.decisions["curate"]
    shape = training.main_shape(planner)
    variants = 1 + (len(recipe.compress.forms) if recipe.compress else 0)
    heldout = curate["train_tokens"] * curate["bytes_per_token"] * recipe.curate.heldout
    tokens = min(recipe.evaluate.bytes, heldout) / curate["bytes_per_token"] / (1 - OVERLAP)
    forward = training.forward_cost(planner, shape, BATCH_TOKENS, recipe.pretrain.sequence_length)
    sample = Curation.load(curate["sample"])
    with Meter() as meter:  # the compressors on the sample; their dictionary takes longer the more text there is
        before = resident_now()
        yardsticks(heldout_texts(sample, recipe.evaluate.bytes), _training_texts(sample))
    more = min(1 / curate["sample_share"], max(DICTIONARY_TEXT / max(sample.count("bytes"), 1), 1))
    seconds = variants * tokens * _token_seconds(planner, sample) + meter.seconds * more
    peak = max(forward.peak_bytes, (meter.peak_bytes - before) * more)
    return StagePlan(
        Cost(
            tokens=variants * tokens,
            flops=variants * tokens * shape.flops_per_token(recipe.pretrain.sequence_length),
            seconds=seconds,
            peak_bytes=peak,
        ),
        {},
        "scoring and compressors timed on the sample, a forward pass traced",
    )


def _token_seconds(planner: Planner, sample: Curation) -> float:
    """Seconds that scoring takes per token: of the sample's held-out text, with what is not the forward pass."""
    model = load_model(training.scratch_model(planner), dtype=training.DTYPES[planner.recipe.pretrain.dtype])
    texts, tokenizer = heldout_texts(sample, TIMED_BYTES), sample.tokenizer()
    score(model, tokenizer, texts[:1], planner.recipe)  # first calls take longer
    began = time.perf_counter()
    scored = score(model, tokenizer, texts, planner.recipe, lambda n: trim_allocator())
    return (time.perf_counter() - began) / max(scored.tokens, 1)


def score(model: Any, tokenizer: Tokenizer, texts: list[str], recipe: Recipe, advance: Any = None) -> LMScore:
    return bits_per_byte(
        model,
        tokenizer,
        texts,
        sequence_length=recipe.pretrain.sequence_length,
        overlap=OVERLAP,
        batch_tokens=BATCH_TOKENS,
        advance=advance,
    )


def heldout_texts(curation: Curation, limit: float) -> list[str]:
    """Whole held-out documents in order, up to `limit` bytes (the last one cut)."""
    texts, left = [], int(limit)
    for document in curation.documents("heldout"):
        if left <= 0:
            break
        text = document.text.encode()[:left].decode(errors="ignore")
        texts.append(text)
        left -= document.nbytes
    return texts


def _training_texts(curation: Curation) -> list[str]:
    """Whole training documents in order, about `DICTIONARY_TEXT` bytes of them."""
    texts, left = [], DICTIONARY_TEXT
    for document in curation.documents("train"):
        texts.append(document.text)
        left -= document.nbytes
        if left <= 0:
            break
    return texts


def run(context: Context) -> dict[str, Any]:
    recipe = context.recipe
    curation = Curation.load(context.figures("curate")["folder"])
    source = context.figures("pretrain")
    variants = (
        context.figures("compress")["variants"]
        if recipe.compress
        else [{"name": recipe.pretrain.dtype, "folder": source["folder"], "bytes": source["bytes"]}]
    )
    texts = heldout_texts(curation, recipe.evaluate.bytes)
    rows, tokens, flops = [], 0.0, 0.0
    for variant in variants:
        tokenizer = Tokenizer.load(variant["folder"])
        model = load_model(variant["folder"], dtype=training.DTYPES[recipe.pretrain.dtype])
        total = sum(len(t) for t in tokenizer.encode_batch(texts, specials=False))
        with context.events.progress(f"score {variant['name']}", total, "tok") as progress:

            def advance(n: int, bar: Any = progress) -> None:
                bar.update(n)
                trim_allocator()

            began = time.perf_counter()
            found = score(model, tokenizer, texts, recipe, advance)
        rows.append(variant | found.as_dict() | {"seconds": time.perf_counter() - began, "bytes": variant["bytes"]})
        context.events.emit("score", **rows[-1])
        tokens, flops = (
            tokens + found.tokens,
            flops + found.tokens * model.config.flops_per_token(recipe.pretrain.sequence_length),
        )
    figures = {
        "variants": rows,
        "yardsticks": yardsticks(texts, _training_texts(curation)),
        "documents": len(texts),
        "text_bytes": sum(len(t.encode()) for t in texts),
        "tasks": _tasks(context),
        "cost": {"tokens": tokens, "flops": flops},
    }
    return figures


def _tasks(context: Context) -> dict[str, Any]:
    if not context.recipe.evaluate.tasks:
        return {}
    from modicum.evaluate.run import run_tasks

    folder = context.figures("adapt" if context.recipe.adapt else "pretrain")["folder"]
    results = run_tasks(
        load_model(folder),
        Tokenizer.load(folder),
        [str(Choice.parse("task", t)) for t in context.recipe.evaluate.tasks],
        keep=context.folder / "items.jsonl",
        events=context.events,
    )
    return {r.task: r.figures[r.metric] for r in results}
