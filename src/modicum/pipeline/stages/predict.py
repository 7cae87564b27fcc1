"""predict: a scaling law fitted on proxy runs says what the main run will reach, before it starts.

From scratch the proxies are smaller models on fewer tokens; for a given model they are the model itself
on fewer tokens.
"""

from __future__ import annotations

from typing import Any

from modicum.budget import Cost
from modicum.core import registry
from modicum.core.choice import Choice
from modicum.core.errors import ModicumError, UserError
from modicum.data.curate import Curation
from modicum.model.config import DecoderConfig
from modicum.pipeline import training
from modicum.pipeline.context import Context
from modicum.pipeline.plan import Planner, StagePlan
from modicum.pipeline.recipe import Recipe
from modicum.pipeline.stages import pretrain
from modicum.train.loop import train


def needs(recipe: Recipe) -> tuple[str, ...]:
    return ("curate",)


def uses(recipe: Recipe) -> dict[str, Any]:
    assert recipe.predict
    return {"predict": recipe.predict.model_dump(), "pretrain": recipe.pretrain.model_dump(), "model": recipe.model}


def plan(planner: Planner) -> StagePlan:
    recipe = planner.recipe
    assert recipe.predict
    shares = list(zip(recipe.predict.parameters, recipe.predict.tokens, strict=False))
    if len(recipe.predict.parameters) != len(recipe.predict.tokens) or len(shares) < 3:
        raise UserError(
            "predict.parameters and predict.tokens must name as many proxies each, three or more; got "
            f"{len(recipe.predict.parameters)} and {len(recipe.predict.tokens)}"
        )
    main = pretrain.plan(planner)
    vocab = planner.decisions["curate"]["vocab_size"]
    size = main.decisions["shape"] and (main.decisions["shape"]["width"], main.decisions["shape"]["layers"])
    shape = training.shape_of(recipe, size, vocab)
    cost, proxies = Cost(), []
    for share, token_share in shares:
        small = shape if recipe.model else _smaller(recipe, shape, share)
        config = training.train_config(
            recipe, small, max(token_share * main.decisions["tokens"], 20 * recipe.pretrain.batch_tokens)
        )
        one = training.training_cost(planner, small, config)
        cost = cost.then(one)
        proxies.append(
            {
                "shape": None if recipe.model else {"width": small.width, "layers": small.layers},
                "tokens": config.total_tokens,
                "parameters": small.parameters(),
            }
        )
    return StagePlan(
        cost,
        {"proxies": proxies, "main": main.decisions | {"parameters": shape.parameters()}},
        f"{len(proxies)} runs, steps timed, memory traced",
    )


def _smaller(recipe: Recipe, shape: DecoderConfig, share: float) -> DecoderConfig:
    """The shape whose parameters outside the embedding are nearest to `share` of the main one's."""

    def body(c: DecoderConfig) -> int:
        return c.parameters() - c.vocab_size * c.width

    sizes = [(w, n) for w in range(32, shape.width + 1, 32) for n in range(1, shape.layers + 1) if 16 <= w / n <= 96]
    made = [training.shape_of(recipe, s, shape.vocab_size) for s in sizes or [(32, 1)]]
    return min(made, key=lambda c: abs(body(c) / body(shape) - share))


def _law(given: Any, vocabulary: int) -> Choice:
    """The recipe's law; one that asks for the vocabulary is told the tokenizer's, unless the recipe says another."""
    choice = Choice.parse("law", given)
    asks = hasattr(choice.config(), "vocabulary") and "vocabulary" not in choice.knobs
    return Choice("law", choice.method, choice.knobs | ({"vocabulary": vocabulary} if asks else {}))


def run(context: Context) -> dict[str, Any]:
    recipe = context.recipe
    assert recipe.predict
    curation = Curation.load(context.figures("curate")["folder"])
    vocab = curation.tokenizer().vocab_size
    rows, flops, tokens, proxies = [], 0.0, 0.0, []
    for number, proxy in enumerate(context.plan["proxies"], 1):
        size = proxy["shape"] and (proxy["shape"]["width"], proxy["shape"]["layers"])
        shape = training.shape_of(recipe, size, vocab)
        config = training.train_config(recipe, shape, proxy["tokens"], checkpoint_every=50)
        result = train(
            training.make_model(recipe, shape),
            training.training_stream(recipe, curation, config.total_tokens),
            config,
            context.folder / f"proxy-{number}",
            events=context.events,
            deadline=context.deadline,
            heldout=training.heldout_stream(recipe, curation),
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
    law = registry.build("law", _law(recipe.predict.law, vocab))
    fit = law.fit(rows, seed=recipe.seed)
    main = context.plan["main"]
    point = {"parameters": [main["parameters"]], "tokens": [main["tokens"]]}
    answer = law.predict(fit, point, recipe.predict.level).rows()[0]
    context.events.emit("prediction", **answer)
    return {
        "proxies": proxies,
        "law": fit.law,
        "fit": fit.parameters,
        "prediction": answer | {"parameters": main["parameters"], "tokens": main["tokens"]},
        "cost": {"tokens": tokens, "flops": flops, "parameters": max(r["parameters"] for r in rows)},
    }
