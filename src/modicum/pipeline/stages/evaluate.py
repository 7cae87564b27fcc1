"""evaluate: bits per byte of every variant on held-out text, beside general-purpose compressors, and tasks."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from pydantic import Field

from modicum.budget import Cost, Meter
from modicum.budget.meter import resident_now
from modicum.compress.general_purpose import compressor_bits
from modicum.compress.run import weight_bytes
from modicum.core.choice import Choice
from modicum.data.curate import Curation
from modicum.data.tokenizer import Tokenizer
from modicum.evaluate.lm import LMScore, bits_per_byte
from modicum.model.folder import load_model
from modicum.pipeline import costs, training
from modicum.pipeline.context import Context
from modicum.pipeline.engine import EngineKnobs, cache_bytes, engine_config
from modicum.pipeline.graded import CACHE, graded
from modicum.pipeline.plan import Planner
from modicum.pipeline.recipe import Recipe
from modicum.pipeline.report import gains, plots
from modicum.pipeline.section import Bytes, Strict, method
from modicum.pipeline.stage import Finished, Inputs, Report, Stage, StagePlan
from modicum.pipeline.stages.pretrain import Section as Pretrain
from modicum.pipeline.stages.serve import Section as Serve
from modicum.pipeline.worker import trim_allocator
from modicum.serve import native
from modicum.serve.engine import Engine
from modicum.serve.request import SamplingParams

BATCH_TOKENS = 2048  # of one forward pass: as fast as more on a CPU, and little memory
OVERLAP = 0.0  # of a window, scored before and context only: small models gain nothing by it
DICTIONARY_TEXT = 3 << 20  # bytes of training text that zstd's dictionary is made from
GRADED = (240, 24)  # tokens of a prompt and of a reply that the plan assumes for them: half of them have no passages
TIMED_TEXT = 1 << 20  # and for the plan, which takes the rest to be in proportion
PROMPT = 128  # tokens that a variant reads before it writes, to say how fast it is


class Section(Strict):
    tasks: list[method("task")] = []  # type: ignore[valid-type]
    solver: method("solver") | None = None  # type: ignore[valid-type]  # how written answers of the tasks are made
    solver_budget: int | None = Field(None, ge=1)  # tokens that it may generate for an item
    engine: EngineKnobs = {}  # that answers, as in `serve`: whatever is served can be evaluated
    bytes: Bytes = 400_000.0  # held-out text scored by each variant of the model
    sequence_length: int | None = Field(None, ge=16)  # of a window; None: what the recipe pretrains with, or 256
    questions: int = Field(0, ge=0)  # held-out questions with one documented answer, closed book against grounded
    passages: int | None = Field(None, ge=1)  # shown with a question; None: as `serve` does
    prompt_tokens: int | None = Field(None, ge=64)  # of a question with passages at most; None: as `serve` does
    mode: str | None = None  # of the search; None: as `serve` does
    speed_tokens: int = Field(32, ge=2)  # that each variant writes to say how fast it is
    dtype: str | None = None  # None: what the recipe pretrains in, or bf16


class Evaluate(Stage[Section]):
    order, default = 80, True
    optional = ("variants",)
    gives = ("scores",)

    def needed(self, section: Section) -> tuple[str, ...]:
        return ("corpus", "model", *(("index",) if section.questions else ()))

    def complete(self, section: Section, recipe: Recipe, name: str) -> Section:
        serve = recipe.first(Serve) or Serve()
        trained = recipe.first(Pretrain)
        return section.model_copy(
            update={
                "sequence_length": section.sequence_length or (trained.sequence_length if trained else 256),
                "passages": section.passages or serve.passages,
                "prompt_tokens": section.prompt_tokens or serve.prompt_tokens,
                "mode": section.mode or serve.mode,
                "dtype": section.dtype or training.dtype_of(recipe),
            }
        )

    def check(self, section: Section, recipe: Recipe, name: str) -> None:
        training.dtype_named(section.dtype, name)

    def uses(self, section: Section, recipe: Recipe, name: str) -> dict[str, Any]:
        shown = {"passages", "prompt_tokens", "mode"}  # matter for questions alone
        return section.model_dump(exclude=None if section.questions else shown)

    def plan(self, section: Section, inputs: Inputs, planner: Planner) -> StagePlan:
        """A scoring pass and an answer timed, memory traced, the compressors run on the sample."""
        curate, model, dtype = inputs["corpus"], inputs["model"], str(section.dtype)
        shape, length = costs.subject_shape(planner, model), section.sequence_length or 256
        heldout_share = curate["heldout"]
        sample = Curation.load(curate["sample"])
        texts = heldout_texts(sample, section.bytes)
        per_token = len("".join(texts[:4]).encode()) / max(
            sum(len(t) for t in Tokenizer.load(costs.subject(planner, model)).encode_batch(texts[:4])), 1
        )
        heldout = curate["train_tokens"] * curate["bytes_per_token"] * heldout_share
        tokens = min(section.bytes, heldout) / per_token / (1 - OVERLAP)
        variants = inputs["variants"]["variants"] if "variants" in inputs else 1
        before = variants + (1 if model.values.get("published") else 0)  # the model as it was published
        with Meter() as meter:  # the compressors on the sample; their dictionary takes longer the more text there is
            trim_allocator()
            resident = resident_now()
            compressor_bits(texts, _training_texts(sample, TIMED_TEXT))
        text = sample.count("bytes")
        more = max(min(DICTIONARY_TEXT, text / curate["sample_share"]) / max(min(TIMED_TEXT, text), 1), 1)
        rows = max(BATCH_TOKENS // length, 1)
        passes = tokens / (rows * length)
        per_pass = costs.forward_seconds(planner, model, dtype, 1, 512) / 512 * rows * length
        unpacking = inputs["variants"]["dense_seconds"] if "variants" in inputs else ()  # of quantised variants
        seconds = passes * sum(unpacking)
        seconds += before * (
            passes * per_pass
            + costs.answer_seconds(planner, model, dtype, PROMPT, section.speed_tokens, section.engine) * 1.3
        )
        more_bytes = 0.0
        if section.questions:
            graded = min(before, 2) * section.questions
            encoder = costs.encoder(planner, inputs["index"]["encoder"])[1]
            seconds += graded * costs.batch_seconds(planner, model, dtype, *GRADED, section.engine) + encoder.seconds
            kind = training.torch_dtype(dtype)
            cache = cache_bytes(engine_config(section.engine, cache=CACHE), shape, kind)
            pages = 2 * section.questions * GRADED[0] * shape.kv_bytes_per_token(kind)
            more_bytes = encoder.peak_bytes + min(cache, pages)
        peak = max(
            costs.forward_peak(planner, model, dtype, rows, length) + more_bytes,
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

    def run(self, section: Section, inputs: Inputs, context: Context) -> dict[str, Any]:
        curation = Curation.load(inputs["corpus"]["folder"])
        variants = _variants(section, inputs)
        texts = heldout_texts(curation, section.bytes)
        rows, tokens, flops = [], 0.0, 0.0
        for variant in variants:
            row, per_token = _scored(section, context, variant, texts)
            rows.append(row)
            context.events.emit("score", **row)
            tokens, flops = tokens + row["tokens"], flops + row["tokens"] * per_token
        figures = {
            "variants": rows,
            "names": gains.names(inputs["model"].values),
            "compressors": compressor_bits(texts, _training_texts(curation)),
            "documents": len(texts),
            "text_bytes": sum(len(t.encode()) for t in texts),
            "graded": graded(section, inputs, context, curation, variants),
            "tasks": _tasks(section, inputs, context),
            "cost": {"tokens": tokens, "flops": flops},
        }
        return figures

    def miniature(self, section: Section) -> tuple[Section, dict[str, Any]]:
        return Section(bytes=20_000, speed_tokens=4, sequence_length=64, dtype=section.dtype), {}

    def prepare(self) -> None:
        native.library()

    def report(self, done: Finished) -> Report:
        known = done.figures["names"]
        model = done.inputs["model"].values
        return Report(
            charts={
                "graded": plots.graded(done.figures, known),
                "compression": plots.compression(done.figures),
            },
            cards=gains.evaluated(done.figures),
            lines=gains.evaluated_lines(done.figures, known),
            lead=gains.lead(done.figures, model, known),
            values={
                "titles": {v["name"]: gains.title(v, known) for v in done.figures["variants"]},
                "names": known,
                "arms": gains.ARMS,
            },
            rank=1,
        )


def score(model: Any, tokenizer: Tokenizer, texts: list[str], length: int, advance: Any = None) -> LMScore:
    return bits_per_byte(
        model,
        tokenizer,
        texts,
        sequence_length=length,
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


def _scored(
    section: Section, context: Context, variant: dict[str, Any], texts: list[str]
) -> tuple[dict[str, Any], float]:
    """(figures of one variant, FLOPs of a token). Its model is freed on return, before the next one is loaded."""
    length = section.sequence_length or 256
    tokenizer = Tokenizer.load(variant["folder"])
    model = load_model(variant["folder"], dtype=training.DTYPES[str(section.dtype)])
    total = sum(len(t) for t in tokenizer.encode_batch(texts, specials=False))
    with context.events.progress(f"score {variant['name']}", total, "tok") as progress:

        def advance(n: int) -> None:
            progress.update(n)
            trim_allocator()

        began = time.perf_counter()
        result = score(model, tokenizer, texts, length, advance)
    seconds = time.perf_counter() - began
    rate = {"tokens_per_second": _speed(model, section.speed_tokens, section.engine)}
    row = variant | result.as_dict() | {"seconds": seconds, "bytes": variant["bytes"]} | rate
    return row, model.config.flops_per_token(length)


def _variants(section: Section, inputs: Inputs) -> list[dict[str, Any]]:
    """What is scored: the model that answers and its compressed copies, and that model before it was adapted.

    `role`: before, answers, compressed.
    """
    made = inputs["model"]
    rows = (
        inputs["variants"]["variants"]
        if "variants" in inputs
        else [{"name": section.dtype, "folder": made["folder"], "bytes": weight_bytes(made["folder"])}]
    )
    rows = [row | {"role": "compressed" if i else "answers"} for i, row in enumerate(rows)]
    if made.values.get("model"):
        base = made["base"]
        before = {"name": Path(made["model"]).name, "folder": base, "bytes": weight_bytes(base), "role": "before"}
        rows = [before, *rows]
    return rows


def _speed(model: Any, tokens: int, knobs: dict[str, Any]) -> float:
    """Tokens per second that the engine writes for one request, after a prompt of `PROMPT` tokens."""
    engine = Engine(model, None, engine_config(knobs | {"cache": "32MiB", "max_length": PROMPT + tokens + 16}))
    taken = []
    for first in range(3):  # the first calls take longer
        sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
        (output,) = engine.generate([[first + 3] * PROMPT], sampling)
        reply = output.completions[0]
        taken.append((reply.seconds or 0.0) - (reply.first_token_seconds or 0.0))
    return (tokens - 1) / max(min(taken), 1e-9)


def _tasks(section: Section, inputs: Inputs, context: Context) -> dict[str, Any]:
    if not section.tasks:
        return {}
    from modicum.evaluate.run import run_tasks

    folder = inputs["model"]["folder"]
    results = run_tasks(
        load_model(folder),
        Tokenizer.load(folder),
        [str(Choice.parse("task", t)) for t in section.tasks],
        engine=engine_config(section.engine) if section.engine else None,
        solver=str(Choice.parse("solver", section.solver)) if section.solver else None,
        solver_budget=section.solver_budget,
        keep=context.folder / "items.jsonl",
        events=context.events,
    )
    return {r.task: r.figures[r.metric] for r in results}
