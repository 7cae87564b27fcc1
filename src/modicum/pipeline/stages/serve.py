"""serve: the engine behind an OpenAI-compatible server answers questions with the sources that were found."""

from __future__ import annotations

from typing import Any

import numpy as np
from pydantic import Field

from modicum.budget import Cost
from modicum.data.tokenizer import Tokenizer
from modicum.model.folder import load_model
from modicum.pipeline import costs, training
from modicum.pipeline.context import Context
from modicum.pipeline.engine import EngineKnobs, cache_bytes, engine_config
from modicum.pipeline.plan import Planner
from modicum.pipeline.recipe import Recipe
from modicum.pipeline.report import gains, text
from modicum.pipeline.section import Strict
from modicum.pipeline.stage import Finished, Inputs, Report, Stage, StagePlan
from modicum.pipeline.stages.ground import excerpt
from modicum.retrieve.ground import Answer, ask, openai_generator
from modicum.retrieve.search import Searcher
from modicum.serve import native
from modicum.serve.engine import Engine
from modicum.serve.messages import REPETITION

ASKED = 3
CACHE = "64MiB"
PARTS, WORDS = 3, (5, 30)  # of a name worth asking about, and of a summary that answers


class Section(Strict):
    questions: list[str] = []  # empty: three are taken from the corpus
    passages: int = Field(3, ge=1)
    max_tokens: int = Field(64, ge=1)
    prompt_tokens: int = Field(960, ge=64)  # instructions, passages and question at most
    mode: str = "fused"
    engine: EngineKnobs = {}  # what `modicum serve` takes: kv, scheduler, drafter, activation_bits, max_length ...
    dtype: str | None = None  # None: what the recipe pretrains in, or bf16


class Serve(Stage[Section]):
    order, default = 70, True
    needs, gives = ("index", "model"), ("answers",)

    def complete(self, section: Section, recipe: Recipe, name: str) -> Section:
        return section.model_copy(update={"dtype": section.dtype or training.dtype_of(recipe)})

    def check(self, section: Section, recipe: Recipe, name: str) -> None:
        training.dtype_named(section.dtype, name)

    def plan(self, section: Section, inputs: Inputs, planner: Planner) -> StagePlan:
        """One question's worth of prompt and answer through the real engine."""
        model, dtype = inputs["model"], str(section.dtype)
        shape = costs.subject_shape(planner, model)
        questions, answer = len(section.questions) or ASKED, section.max_tokens
        prompt = max(min(section.prompt_tokens, shape.context_length - answer) // 2, 1)
        seconds = costs.answer_seconds(planner, model, dtype, prompt, answer, section.engine)
        load = costs.encoder(planner, inputs["index"]["encoder"])[1]
        cache = cache_bytes(engine_config(section.engine, cache=CACHE), shape, training.torch_dtype(dtype))
        return StagePlan(
            Cost(
                parameters=shape.parameters(),
                tokens=questions * (answer + prompt),
                seconds=load.seconds + seconds * questions,
                peak_bytes=load.peak_bytes + costs.forward_peak(planner, model, dtype, 4, 256) + cache,
            ),
            {},
            "an answer timed; weights, cache and encoder",
        )

    def run(self, section: Section, inputs: Inputs, context: Context) -> dict[str, Any]:
        from modicum.serve.server import BackgroundServer, ServerConfig

        folder = inputs["model"]["folder"]
        searcher = Searcher(inputs["index"]["folder"])
        tokenizer = Tokenizer.load(folder)
        model = load_model(folder, dtype=training.DTYPES[str(section.dtype)])
        engine = Engine(model, tokenizer, engine_config(section.engine, cache=CACHE))
        questions = section.questions or questions_of(searcher, context.recipe.seed)
        answers = []
        with BackgroundServer(engine, ServerConfig(port=0)) as server:
            generate = openai_generator(
                server.url + "/v1",
                max_tokens=section.max_tokens,
                temperature=0.0,
                frequency_penalty=REPETITION,  # as graded questions are asked
            )
            budget = min(engine.max_length - section.max_tokens, section.prompt_tokens)
            with context.events.progress("ask", len(questions), "questions") as progress:
                for question in questions:
                    answer = ask(
                        question,
                        searcher,
                        generate,
                        k=section.passages,
                        mode=section.mode,
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
            "answered_by": gains.names(inputs["model"].values)["answers"],
            "stats": stats,
            "remark": remark,
            "cost": {
                "tokens": total,
                "flops": total * model.config.flops_per_token(512),
                "parameters": model.config.parameters(),
            },
        }

    def miniature(self, section: Section) -> tuple[Section, dict[str, Any]]:
        return Section(questions=["What does dumps do?"], max_tokens=4, dtype=section.dtype), {}

    def prepare(self) -> None:
        native.library()

    def report(self, done: Finished) -> Report:
        return Report(above=text.answers_text(done.figures["answers"]), rank=2)


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
