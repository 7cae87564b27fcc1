"""serve: the engine behind an OpenAI-compatible server answers questions with the sources that were found."""

from __future__ import annotations

from typing import Any

import numpy as np

from modicum.budget import Cost
from modicum.data.tokenizer import Tokenizer
from modicum.model.folder import load_model
from modicum.pipeline import training
from modicum.pipeline.context import Context
from modicum.pipeline.models import answering
from modicum.pipeline.plan import Planner, StagePlan
from modicum.pipeline.recipe import Recipe
from modicum.pipeline.stages.ground import excerpt
from modicum.retrieve.ground import Answer, ask, openai_generator
from modicum.retrieve.search import Searcher
from modicum.serve.config import EngineConfig
from modicum.serve.engine import Engine
from modicum.serve.messages import REPETITION
from modicum.serve.server import BackgroundServer, ServerConfig

ASKED = 3
CACHE = "64MiB"
PARTS, WORDS = 3, (5, 30)  # of a name worth asking about, and of a summary that answers


def needs(recipe: Recipe) -> tuple[str, ...]:
    return ("ground", answering(recipe))


def uses(recipe: Recipe) -> dict[str, Any]:
    assert recipe.serve
    return {"serve": recipe.serve.model_dump()}


def plan(planner: Planner) -> StagePlan:
    """One question's worth of prompt and answer through the real engine."""
    recipe = planner.recipe
    assert recipe.serve
    shape = training.subject_shape(planner)
    questions, answer = len(recipe.serve.questions) or ASKED, recipe.serve.max_tokens
    prompt = max(min(recipe.serve.prompt_tokens, shape.context_length - answer) // 2, 1)
    seconds = training.answer_seconds(planner, prompt, answer)
    load = training.encoder(planner)[1]
    return StagePlan(
        Cost(
            parameters=shape.parameters(),
            tokens=questions * (answer + prompt),
            seconds=load.seconds + seconds * questions,
            peak_bytes=load.peak_bytes + training.forward_peak(planner, 4, 256) + 64 * 2**20,
        ),
        {},
        "an answer timed; weights, cache and encoder",
    )


def questions_of(searcher: Searcher, seed: int) -> list[str]:
    """Three things of the corpus to ask about: passages with a summary, drawn with the seed."""
    rng = np.random.default_rng(seed)
    wanted: list[str] = []
    for row in rng.permutation(len(searcher.passages)):
        passage = searcher.passages[int(row)]
        name = passage.title.split("(")[0].strip()
        parts = name.split(".")
        plain = name and " " not in name and len(parts) <= PARTS and not any(p.startswith("_") for p in parts)
        if plain and WORDS[0] <= len(passage.summary.split()) <= WORDS[1] and passage.summary.endswith("."):
            wanted.append(f"What does `{name}` do?")  # as the pairs ask that it was adapted to
        if len(wanted) == ASKED:
            return wanted
    for row in rng.permutation(len(searcher.passages))[: ASKED - len(wanted)]:
        wanted.append(f"What is said about {searcher.passages[int(row)].title}?")
    return wanted


def run(context: Context) -> dict[str, Any]:
    recipe = context.recipe
    assert recipe.serve
    folder = context.figures(answering(recipe))["folder"]
    searcher = Searcher(context.figures("ground")["folder"])
    tokenizer = Tokenizer.load(folder)
    model = load_model(folder, dtype=training.DTYPES[recipe.pretrain.dtype])
    engine = Engine(model, tokenizer, EngineConfig(cache=CACHE))
    asked = recipe.serve.questions or questions_of(searcher, recipe.seed)
    answers = []
    with BackgroundServer(engine, ServerConfig(port=0)) as server:
        generate = openai_generator(
            server.url + "/v1",
            max_tokens=recipe.serve.max_tokens,
            temperature=0.0,
            frequency_penalty=REPETITION,  # as graded questions are asked
        )
        budget = min(engine.max_length - recipe.serve.max_tokens, recipe.serve.prompt_tokens)
        with context.events.progress("ask", len(asked), "questions") as progress:
            for question in asked:
                answer = ask(
                    question,
                    searcher,
                    generate,
                    k=recipe.serve.passages,
                    mode=recipe.serve.mode,
                    prompt_budget=budget,
                    count=lambda text: len(tokenizer.encode(text, specials=False)),
                )
                answers.append(_row(answer))
                context.events.emit("answer", **answers[-1])
                progress.update(1)
    stats = engine.stats()
    small = model.config.parameters() < 1e8
    remark = (
        (
            "A model of a few million parameters, trained for minutes, has caught the manner of such texts and not "
            "their meaning: the sources are right long before the sentences are. Give a pretrained model with "
            "adapt.model=smollm2 for answers that read well."
        )
        if small
        else ""
    )
    total = sum(a["prompt_tokens"] + a["tokens"] for a in answers)
    return {
        "answers": answers,
        "model": folder,
        "stats": stats,
        "remark": remark,
        "cost": {
            "tokens": total,
            "flops": total * model.config.flops_per_token(512),
            "parameters": model.config.parameters(),
        },
    }


def _row(answer: Answer) -> dict[str, Any]:
    tokens, first = answer.completion_tokens or 0, answer.seconds_to_first or answer.seconds
    return {
        "question": answer.question,
        "text": answer.text.strip(),
        "citations": answer.citations,
        "sources": [
            {"id": s.id, "title": s.title, "source": s.source, "excerpt": excerpt(s.excerpt)} for s in answer.sources
        ],
        "prompt_tokens": answer.prompt_tokens,
        "tokens": tokens,
        "seconds": answer.seconds,
        "ttft": first,
        "tokens_per_second": tokens / max(answer.seconds - first, 1e-6),
    }
