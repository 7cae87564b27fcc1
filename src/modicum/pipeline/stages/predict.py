"""predict: a scaling law fitted on proxy runs says what the main run will reach, before it starts.

From scratch the proxies are smaller models on fewer tokens; for a given model they are the model itself
on fewer tokens.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field

from modicum.budget import Cost
from modicum.core import registry
from modicum.core.choice import Choice
from modicum.core.errors import ModicumError, UserError
from modicum.data.curate import Curation
from modicum.model.config import DecoderConfig, llama_like
from modicum.model.folder import load_config
from modicum.pipeline import costs, training
from modicum.pipeline.context import Context
from modicum.pipeline.plan import Planner
from modicum.pipeline.recipe import Recipe
from modicum.pipeline.report import gains, plots
from modicum.pipeline.section import Strict, method
from modicum.pipeline.stage import Finished, Inputs, Report, Stage, StagePlan
from modicum.pipeline.stages import pretrain
from modicum.train.loop import train


class Section(Strict):
    of: str | None = None  # the pretrain stage that is predicted; None: the next one
    law: method("law") = "chinchilla"  # type: ignore[valid-type]
    parameters: list[float] = [0.06, 0.12, 0.25]  # proxies' sizes as shares of the main model's
    tokens: list[float] = [0.08, 0.12, 0.18]  # and their tokens as shares of the main run's
    level: float = Field(0.95, gt=0.5, lt=1)


class Predict(Stage[Section]):
    order, default = 20, True
    needs = ("corpus",)

    def complete(self, section: Section, recipe: Recipe, name: str) -> Section:
        after = recipe.entries[recipe.entries.index(recipe.entry(name)) :]
        main = next((e.name for e in after if isinstance(e.section, pretrain.Section)), None)
        return section.model_copy(update={"of": section.of or main})

    def check(self, section: Section, recipe: Recipe, name: str) -> None:
        if len(section.parameters) != len(section.tokens) or len(section.tokens) < 3:
            raise UserError(
                f"{name}.parameters and {name}.tokens must name as many proxies each, three or more; got "
                f"{len(section.parameters)} and {len(section.tokens)}"
            )
        if section.of is None or not isinstance(recipe.entry(section.of).section, pretrain.Section):
            raise UserError(f"{name} predicts a pretrain stage, and {section.of or 'none'} follows it; remove {name}")
        if recipe.sources(section.of)["model"]:
            raise UserError(
                f"{name}.of={section.of} goes on from another stage's model, which has no law; remove {name}"
            )

    def uses(self, section: Section, recipe: Recipe, name: str) -> dict[str, Any]:
        return {"predict": section.model_dump(), "pretrain": recipe.section(str(section.of)).model_dump()}

    def plan(self, section: Section, inputs: Inputs, planner: Planner) -> StagePlan:
        recipe, curate = planner.recipe, inputs["corpus"]
        main = recipe.section(str(section.of))
        decided = recipe.entry(str(section.of)).stage.plan(main, inputs, planner).decisions
        shape = load_config(decided["model"]) if decided["model"] else llama_like(**decided["shape"])
        cost, proxies = Cost(), []
        for fraction, token_share in zip(section.parameters, section.tokens, strict=True):
            small = shape if main.model else _smaller(main, shape, fraction, curate["vocab_size"])
            tokens = max(token_share * decided["tokens"], 20 * main.batch_tokens)
            config = training.train_config(main, small, tokens, recipe.seed)
            cost = cost.then(costs.training_cost(planner, small, config, masked=training.masked(main)))
            proxies.append(
                {
                    "shape": None if main.model else {"width": small.width, "layers": small.layers},
                    "tokens": config.total_tokens,
                    "parameters": small.parameters(),
                }
            )
        return StagePlan(
            cost,
            {"proxies": proxies, "main": decided | {"parameters": shape.parameters()}},
            f"{len(proxies)} runs, steps timed, memory traced",
        )

    def run(self, section: Section, inputs: Inputs, context: Context) -> dict[str, Any]:
        seed, main = context.recipe.seed, context.recipe.section(str(section.of))
        curation = Curation.load(inputs["corpus"]["folder"])
        vocab = curation.tokenizer().vocab_size
        rows, flops, tokens, proxies = [], 0.0, 0.0, []
        for number, proxy in enumerate(context.plan["proxies"], 1):
            size = proxy["shape"] or {}
            shape = (
                load_config(main.model) if main.model else training.shape_of(main, size["width"], size["layers"], vocab)
            )
            config = training.train_config(main, shape, proxy["tokens"], seed, checkpoint_every=50)
            result = train(
                training.make_model(shape, main.model, seed),
                training.training_stream(main, curation, config.total_tokens, seed),
                config,
                context.folder / f"proxy-{number}",
                events=context.events,
                deadline=context.deadline,
                heldout=training.heldout_stream(main, curation),
                label=f"proxy {number}",
            )
            if result.stopped or result.heldout_loss is None:
                raise ModicumError(
                    f"the time budget ended in proxy {number}; its checkpoint is kept, the same command "
                    "with a larger budget.time goes on"
                )
            rows.append(
                {"run": number, "parameters": shape.parameters(), "tokens": result.tokens, "loss": result.heldout_loss}
            )
            proxies.append(rows[-1] | {"seconds": result.seconds})
            flops, tokens = flops + result.flops, tokens + result.tokens
        law = registry.build("law", _law(section.law, vocab))
        fit = law.fit(rows, seed=seed)
        point = context.plan["main"]
        answer = law.predict(
            fit, {"parameters": [point["parameters"]], "tokens": [point["tokens"]]}, section.level
        ).rows()[0]
        context.events.emit("prediction", **answer)
        return {
            "of": section.of,
            "proxies": proxies,
            "law": fit.law,
            "fit": fit.parameters,
            "prediction": answer | {"parameters": point["parameters"], "tokens": point["tokens"]},
            "cost": {"tokens": tokens, "flops": flops, "parameters": max(r["parameters"] for r in rows)},
        }

    def miniature(self, section: Section) -> tuple[Section, dict[str, Any]]:
        tokens = 16 * 64
        proxies = [{"shape": pretrain.TOY, "tokens": tokens * n, "parameters": 1} for n in (1, 2, 3)]
        return Section(), {"proxies": proxies, "main": {"tokens": tokens, "parameters": 100_000}}

    def report(self, done: Finished) -> Report:
        record = done.run.done(done.figures["of"])
        main = record["figures"] if record else None
        return Report(
            charts={"law": plots.law(done.figures, main)},
            cards=gains.predicted(done.figures["prediction"], main),
            lines=gains.predicted_line(done.figures["prediction"], main),
            values={"main": main},
        )


def _smaller(section: pretrain.Section, shape: DecoderConfig, fraction: float, vocab_size: int) -> DecoderConfig:
    """The shape whose parameters outside the embedding are nearest to `share` of the main one's, of
    those that the methods take."""

    def body(c: DecoderConfig) -> int:
        return c.parameters() - c.vocab_size * c.width

    sizes = [(w, n) for w in range(32, shape.width + 1, 32) for n in range(1, shape.layers + 1) if 16 <= w / n <= 96]
    made = [training.shape_of(section, *s, vocab_size) for s in sizes or [(32, 1)]]
    made.sort(key=lambda c: abs(body(c) / body(shape) - fraction))
    config = training.train_config(section, shape, section.batch_tokens, 0)
    return next((c for c in made if costs.fits(c, config)), made[0])


def _law(given: Any, vocabulary: int) -> Choice:
    """The recipe's law; one that asks for the vocabulary is told the tokenizer's, unless the recipe says another."""
    choice = Choice.parse("law", given)
    asks = hasattr(choice.config(), "vocabulary") and "vocabulary" not in choice.knobs
    return Choice("law", choice.method, choice.knobs | ({"vocabulary": vocabulary} if asks else {}))
