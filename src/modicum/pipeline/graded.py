"""Held-out questions put to the models of a run, closed book and with retrieved passages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from modicum.data.curate import Curation
from modicum.data.questions import Question, draw, questions
from modicum.data.tokenizer import Tokenizer
from modicum.evaluate import grounded as grading
from modicum.model.folder import load_model
from modicum.pipeline import training
from modicum.pipeline.context import Context
from modicum.pipeline.engine import engine_config
from modicum.pipeline.stage import Inputs
from modicum.retrieve.search import Searcher
from modicum.serve.engine import Engine

if TYPE_CHECKING:
    from modicum.pipeline.stages.evaluate import Section

CACHE = "192MiB"  # of keys and values, while questions are graded


def graded(
    section: Section, inputs: Inputs, context: Context, curation: Curation, variants: list[dict[str, Any]]
) -> dict[str, Any]:
    """Held-out questions, closed book and with retrieved passages, by the model before it was adapted and after:
    {role: figures}; empty where the corpus gives none."""
    drawn = draw(questions(curation.documents("heldout")), section.questions, context.recipe.seed)
    if not drawn:
        return {}
    searcher = Searcher(inputs["index"]["folder"])
    gold = _with_gold(drawn, searcher)
    made = {}
    for variant in variants:
        if variant["role"] == "compressed":
            continue
        result = _grade(section, context, variant, gold, searcher)
        made[variant["role"]] = {"model": variant["name"]} | result.as_dict(rows=True)
        context.events.emit("graded", **made[variant["role"]] | {"rows": len(drawn)})
    return made


def _grade(
    section: Section, context: Context, variant: dict[str, Any], gold: Sequence[grading.Item], searcher: Searcher
) -> grading.Graded:
    """The questions put to one variant, whose model is freed on return."""
    model = load_model(variant["folder"], dtype=training.DTYPES[str(section.dtype)])
    length = min(1024, model.config.context_length)
    return grading.run(
        Engine(model, Tokenizer.load(variant["folder"]), engine_config(section.engine, cache=CACHE, max_length=length)),
        gold,
        searcher,
        k=section.passages or 3,
        mode=section.mode or "fused",
        prompt_budget=min(section.prompt_tokens or length, length - 64),
        events=context.events,
    )


def _with_gold(drawn: Sequence[Question], searcher: Searcher) -> list[grading.Item]:
    """The questions with the ids of the passages that hold their answers."""
    ids: dict[tuple[str, str], list[str]] = {}
    for passage in searcher.passages:
        ids.setdefault((passage.source, passage.title), []).append(passage.id)
    return [grading.Item(q.id, q.question, q.answers, tuple(ids.get((q.document, q.evidence), ()))) for q in drawn]
