"""evaluate: bits per byte of every variant on held-out text, beside general-purpose compressors, and tasks."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from modicum.budget import Cost, Meter, units
from modicum.budget.meter import resident_now
from modicum.compress.run import weight_bytes
from modicum.compress.yardstick import yardsticks
from modicum.core.choice import Choice
from modicum.data.curate import Curation
from modicum.data.questions import Question, draw, questions
from modicum.data.tokenizer import Tokenizer
from modicum.evaluate import grounded
from modicum.evaluate.lm import LMScore, bits_per_byte
from modicum.model.folder import load_model
from modicum.pipeline import training
from modicum.pipeline.context import Context
from modicum.pipeline.models import answering
from modicum.pipeline.plan import Planner, StagePlan
from modicum.pipeline.recipe import Recipe, Serve
from modicum.pipeline.worker import trim_allocator
from modicum.retrieve.search import Searcher
from modicum.serve.config import EngineConfig
from modicum.serve.engine import Engine
from modicum.serve.request import SamplingParams

BATCH_TOKENS = 2048  # of one forward pass: as fast as more on a CPU, and little memory
OVERLAP = 0.0  # of a window, scored before and context only: small models gain nothing by it
DICTIONARY_TEXT = 3 << 20  # bytes of training text that zstd's dictionary is made from
CACHE = "192MiB"  # of keys and values, while questions are graded
GRADED = (240, 24)  # tokens of a prompt and of a reply that the plan assumes for them: half of them have no passages
TIMED_TEXT = 1 << 20  # and for the plan, which takes the rest to be in proportion
PROMPT = 128  # tokens that a variant reads before it writes, to say how fast it is


def needs(recipe: Recipe) -> tuple[str, ...]:
    more = (("compress",) if recipe.compress else ()) + (("ground",) if recipe.evaluate.questions else ())
    return ("curate", answering(recipe), *more)


def uses(recipe: Recipe) -> dict[str, Any]:
    shown = [recipe.serve.passages, recipe.serve.prompt_tokens, recipe.serve.mode] if recipe.serve else None
    return {"evaluate": recipe.evaluate.model_dump(), "shown": shown if recipe.evaluate.questions else None}


def plan(planner: Planner) -> StagePlan:
    """A scoring pass and an answer timed, memory traced, the compressors run on the sample."""
    recipe, curate = planner.recipe, planner.decisions["curate"]
    shape, length = training.subject_shape(planner), recipe.pretrain.sequence_length
    sample = Curation.load(curate["sample"])
    texts = heldout_texts(sample, recipe.evaluate.bytes)
    per_token = len("".join(texts[:4]).encode()) / max(
        sum(len(t) for t in Tokenizer.load(training.subject(planner)).encode_batch(texts[:4])), 1
    )
    heldout = curate["train_tokens"] * curate["bytes_per_token"] * recipe.curate.heldout
    tokens = min(recipe.evaluate.bytes, heldout) / per_token / (1 - OVERLAP)
    variants = 1 + (len(recipe.compress.forms) if recipe.compress else 0)
    before = variants + (1 if recipe.adapt and recipe.adapt.model else 0)  # the model as it was published
    with Meter() as meter:  # the compressors on the sample; their dictionary takes longer the more text there is
        trim_allocator()
        resident = resident_now()
        yardsticks(texts, _training_texts(sample, TIMED_TEXT))
    text = sample.count("bytes")
    more = max(min(DICTIONARY_TEXT, text / curate["sample_share"]) / max(min(TIMED_TEXT, text), 1), 1)
    rows = max(BATCH_TOKENS // length, 1)
    passes = tokens / (rows * length)
    per_pass = training.forward_seconds(planner, 1, 512) / 512 * rows * length
    seconds = passes * sum(planner.decisions.get("compress", {}).get("dense_seconds", ()))  # of quantised variants
    seconds += before * (
        passes * per_pass + training.answer_seconds(planner, PROMPT, recipe.evaluate.speed_tokens) * 1.3
    )
    more_bytes = 0.0
    if recipe.evaluate.questions:
        graded = min(before, 2) * recipe.evaluate.questions
        encoder = training.encoder(planner)[1]
        seconds += graded * training.batch_seconds(planner, *GRADED) + encoder.seconds
        pages = 4 * recipe.evaluate.questions * GRADED[0] * shape.layers * shape.kv_heads * shape.head_dim
        more_bytes = encoder.peak_bytes + min(units.parse(CACHE, "bytes"), pages * 2)
    peak = max(
        training.forward_peak(planner, rows, length) + more_bytes,
        (meter.peak_bytes - resident) * more,
    )
    return StagePlan(
        Cost(
            tokens=before * tokens,
            flops=before * tokens * shape.flops_per_token(length),
            seconds=seconds + meter.seconds * more,
            peak_bytes=peak,
        ),
        {},
        "scoring, answering and compressors timed on the sample, a pass traced",
    )


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


def _training_texts(curation: Curation, size: int = DICTIONARY_TEXT) -> list[str]:
    """Whole training documents in order, about `size` bytes of them."""
    texts, left = [], size
    for document in curation.documents("train"):
        texts.append(document.text)
        left -= document.nbytes
        if left <= 0:
            break
    return texts


def run(context: Context) -> dict[str, Any]:
    recipe = context.recipe
    curation = Curation.load(context.figures("curate")["folder"])
    variants = _variants(context)
    texts = heldout_texts(curation, recipe.evaluate.bytes)
    rows, tokens, flops = [], 0.0, 0.0
    for variant in variants:
        row, per_token = _scored(context, variant, texts)
        rows.append(row)
        context.events.emit("score", **row)
        tokens, flops = tokens + row["tokens"], flops + row["tokens"] * per_token
    figures = {
        "variants": rows,
        "yardsticks": yardsticks(texts, _training_texts(curation)),
        "documents": len(texts),
        "text_bytes": sum(len(t.encode()) for t in texts),
        "graded": _graded(context, curation, variants),
        "tasks": _tasks(context),
        "cost": {"tokens": tokens, "flops": flops},
    }
    return figures


def _scored(context: Context, variant: dict[str, Any], texts: list[str]) -> tuple[dict[str, Any], float]:
    """(figures of one variant, FLOPs of a token). Its model is freed on return, before the next one is loaded."""
    recipe = context.recipe
    tokenizer = Tokenizer.load(variant["folder"])
    model = load_model(variant["folder"], dtype=training.DTYPES[recipe.pretrain.dtype])
    total = sum(len(t) for t in tokenizer.encode_batch(texts, specials=False))
    with context.events.progress(f"score {variant['name']}", total, "tok") as progress:

        def advance(n: int) -> None:
            progress.update(n)
            trim_allocator()

        began = time.perf_counter()
        found = score(model, tokenizer, texts, recipe, advance)
    seconds = time.perf_counter() - began
    rate = {"tokens_per_second": _speed(model, recipe.evaluate.speed_tokens)}
    row = variant | found.as_dict() | {"seconds": seconds, "bytes": variant["bytes"]} | rate
    return row, model.config.flops_per_token(recipe.pretrain.sequence_length)


def _variants(context: Context) -> list[dict[str, Any]]:
    """What is scored: the model that answers and its compressed copies, and that model before it was adapted.

    `role`: before, answers, compressed.
    """
    recipe = context.recipe
    made = context.figures(answering(recipe))
    rows = (
        context.figures("compress")["variants"]
        if recipe.compress
        else [{"name": recipe.pretrain.dtype, "folder": made["folder"], "bytes": weight_bytes(made["folder"])}]
    )
    rows = [row | {"role": "compressed" if i else "answers"} for i, row in enumerate(rows)]
    if recipe.adapt and recipe.adapt.model:
        base = made["base"]
        before = {"name": Path(recipe.adapt.model).name, "folder": base, "bytes": weight_bytes(base), "role": "before"}
        rows = [before, *rows]
    return rows


def _graded(context: Context, curation: Curation, variants: list[dict[str, Any]]) -> dict[str, Any]:
    """Held-out questions, closed book and with retrieved passages, by the model before it was adapted and after:
    {role: figures}; empty where the corpus gives none."""
    recipe = context.recipe
    asked = draw(questions(curation.documents("heldout")), recipe.evaluate.questions, recipe.seed)
    if not asked:
        return {}
    searcher = Searcher(context.figures("ground")["folder"])
    gold = with_gold(asked, searcher)
    made = {}
    for variant in variants:
        if variant["role"] == "compressed":
            continue
        result = _asked(context, variant, gold, searcher)
        made[variant["role"]] = {"model": variant["name"]} | result.as_dict(rows=True)
        context.events.emit("graded", **made[variant["role"]] | {"rows": len(asked)})
    return made


def _asked(
    context: Context, variant: dict[str, Any], gold: Sequence[grounded.Item], searcher: Searcher
) -> grounded.Graded:
    """The questions put to one variant, whose model is freed on return."""
    recipe = context.recipe
    shown = recipe.serve or Serve()
    model = load_model(variant["folder"], dtype=training.DTYPES[recipe.pretrain.dtype])
    length = min(1024, model.config.context_length)
    return grounded.run(
        Engine(model, Tokenizer.load(variant["folder"]), EngineConfig(cache=CACHE, max_length=length)),
        gold,
        searcher,
        k=shown.passages,
        mode=shown.mode,
        prompt_budget=min(shown.prompt_tokens, length - 64),
        events=context.events,
    )


def with_gold(asked: Sequence[Question], searcher: Searcher) -> list[grounded.Item]:
    """The questions with the ids of the passages that hold their answers."""
    ids: dict[tuple[str, str], list[str]] = {}
    for passage in searcher.passages:
        ids.setdefault((passage.source, passage.title), []).append(passage.id)
    return [grounded.Item(q.id, q.question, q.answers, tuple(ids.get((q.document, q.evidence), ()))) for q in asked]


def _speed(model: Any, tokens: int) -> float:
    """Tokens per second that the engine writes for one request, after a prompt of `PROMPT` tokens."""
    engine = Engine(model, None, EngineConfig(cache="32MiB", max_length=PROMPT + tokens + 16))
    taken = []
    for first in range(3):  # the first calls take longer
        sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
        (output,) = engine.generate([[first + 3] * PROMPT], sampling)
        reply = output.completions[0]
        taken.append((reply.seconds or 0.0) - (reply.first_token_seconds or 0.0))
    return (tokens - 1) / max(min(taken), 1e-9)


def _tasks(context: Context) -> dict[str, Any]:
    if not context.recipe.evaluate.tasks:
        return {}
    from modicum.evaluate.run import run_tasks

    folder = context.figures(answering(context.recipe))["folder"]
    results = run_tasks(
        load_model(folder),
        Tokenizer.load(folder),
        [str(Choice.parse("task", t)) for t in context.recipe.evaluate.tasks],
        keep=context.folder / "items.jsonl",
        events=context.events,
    )
    return {r.task: r.figures[r.metric] for r in results}
