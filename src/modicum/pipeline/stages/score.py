"""score: bits per byte of several models on the held-out text of several corpora, each paired with the first model.

Without `from` every model and every corpus before it take part; `from: [base, more, old, new]` names some. The
difference between two models is paired by document, so that what makes a document hard cancels out.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from pydantic import Field

from modicum.budget import Cost
from modicum.data.curate import Curation
from modicum.data.tokenizer import Tokenizer
from modicum.evaluate.lm import LMScore, bits_per_byte
from modicum.model.folder import load_model
from modicum.pipeline import costs, training
from modicum.pipeline.context import Context
from modicum.pipeline.plan import Planner
from modicum.pipeline.recipe import Recipe
from modicum.pipeline.section import Bytes, Strict
from modicum.pipeline.stage import Finished, Inputs, Report, Stage, StagePlan
from modicum.pipeline.stages.evaluate import BATCH_TOKENS, heldout_texts
from modicum.pipeline.stages.pretrain import Section as Pretrain
from modicum.pipeline.worker import trim_allocator

RESAMPLES = 1000  # of the documents, behind a difference's standard error


class Section(Strict):
    bytes: Bytes = 200_000.0  # held-out text of each corpus
    sequence_length: int | None = Field(None, ge=16)  # of a window; None: what the recipe pretrains with, or 256
    dtype: str | None = None  # None: what the recipe pretrains in, or bf16


class Score(Stage[Section]):
    order = 85
    needs, several, gives = ("corpus", "model"), ("corpus", "model"), ("scores",)

    def complete(self, section: Section, recipe: Recipe, name: str) -> Section:
        trained = recipe.first(Pretrain)
        length = section.sequence_length or (trained.sequence_length if trained else 256)
        return section.model_copy(
            update={"sequence_length": length, "dtype": section.dtype or training.dtype_of(recipe)}
        )

    def check(self, section: Section, recipe: Recipe, name: str) -> None:
        training.dtype_named(section.dtype, name)

    def plan(self, section: Section, inputs: Inputs, planner: Planner) -> StagePlan:
        """A pass of every model timed and traced."""
        dtype, length = str(section.dtype), section.sequence_length or 256
        rows = max(BATCH_TOKENS // length, 1)
        tokens = sum(_tokens(section, corpus.values) for corpus in inputs.all("corpus"))
        seconds = flops = peak = 0.0
        for model in inputs.all("model"):
            shape = costs.subject_shape(planner, model)
            seconds += tokens / 512 * costs.forward_seconds(planner, model, dtype, 1, 512)
            flops += tokens * shape.flops_per_token(length)
            peak = max(peak, costs.forward_peak(planner, model, dtype, rows, length))
        scored = tokens * len(inputs.all("model"))
        return StagePlan(
            Cost(tokens=scored, flops=flops, seconds=seconds, peak_bytes=peak), {}, "passes timed and traced"
        )

    def run(self, section: Section, inputs: Inputs, context: Context) -> dict[str, Any]:
        texts = {
            corpus.name: heldout_texts(Curation.load(corpus["folder"]), section.bytes)
            for corpus in inputs.all("corpus")
        }
        first: dict[str, LMScore] = {}
        rows: list[dict[str, Any]] = []
        tokens = flops = 0.0
        for model in inputs.all("model"):
            for corpus, documents in texts.items():
                made, per_token = _scored(section, context, model["folder"], f"{model.name} on {corpus}", documents)
                base = first.setdefault(corpus, made)
                change, error = _paired(made, base, context.recipe.seed)
                rows.append({"model": model.name, "corpus": corpus, "change": change, "change_stderr": error})
                rows[-1] |= made.as_dict()
                context.events.emit("score", **rows[-1])
                tokens, flops = tokens + made.tokens, flops + made.tokens * per_token
        return {"rows": rows, "cost": {"tokens": tokens, "flops": flops}}

    def miniature(self, section: Section) -> tuple[Section, dict[str, Any]]:
        return Section(bytes=20_000, sequence_length=64, dtype=section.dtype), {}

    def report(self, done: Finished) -> Report:
        rows = done.figures["rows"]
        corpora = list(dict.fromkeys(row["corpus"] for row in rows))
        table: dict[str, dict[str, Any]] = {}
        for row in rows:
            table.setdefault(row["model"], {})[row["corpus"]] = row
        reference = rows[0]["model"]
        lines = [
            f"{model}: " + ", ".join(f"{_text(by[c], reference)} on {c}" for c in corpora)
            for model, by in table.items()
        ]
        return Report(lines=lines, values={"table": table, "corpora": corpora, "reference": reference}, rank=10)


def _text(row: dict[str, Any], reference: str) -> str:
    change = f" ({row['change']:+.3f} ± {2 * row['change_stderr']:.3f})" if row["model"] != reference else ""
    return f"{row['bits_per_byte']:.3f}{change} bits per byte"


def _tokens(section: Section, corpus: Any) -> float:
    """Held-out tokens of a planned corpus that will be scored."""
    heldout = corpus["train_tokens"] * corpus["bytes_per_token"] * corpus["heldout"]
    return float(min(section.bytes, heldout) / corpus["bytes_per_token"])


def _scored(section: Section, context: Context, folder: str, label: str, texts: list[str]) -> tuple[LMScore, float]:
    """(score, FLOPs of a token). The model is freed on return."""
    tokenizer, length = Tokenizer.load(folder), section.sequence_length or 256
    model = load_model(folder, dtype=training.DTYPES[str(section.dtype)])
    total = sum(len(t) for t in tokenizer.encode_batch(texts, specials=False))
    with context.events.progress(label, total, "tok") as progress:

        def advance(n: int) -> None:
            progress.update(n)
            trim_allocator()

        made = bits_per_byte(
            model, tokenizer, texts, sequence_length=length, overlap=0.0, batch_tokens=BATCH_TOKENS, advance=advance
        )
    return made, model.config.flops_per_token(length)


def _paired(made: LMScore, base: LMScore, seed: int) -> tuple[float, float]:
    """(difference in bits per byte over all documents, its standard error by bootstrap over them)."""
    bits_N, bytes_N = (made.nats_N - base.nats_N) / np.log(2), made.bytes_N
    rng = np.random.default_rng(seed)
    drawn_RN = rng.integers(len(bits_N), size=(RESAMPLES, len(bits_N)))
    means_R = bits_N[drawn_RN].sum(1) / bytes_N[drawn_RN].sum(1)
    return float(bits_N.sum() / bytes_N.sum()), float(means_R.std())
