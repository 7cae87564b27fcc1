"""pretrain: train the decoder on the curated text, or go on training a given one."""

from __future__ import annotations

from typing import Any

from modicum.budget import Cost
from modicum.core.errors import BudgetError, ModicumError
from modicum.core.events import count_text, seconds_text
from modicum.core.files import tree_bytes
from modicum.data.curate import Curation
from modicum.model.config import DecoderConfig
from modicum.model.folder import save_model
from modicum.pipeline import training
from modicum.pipeline.context import Context
from modicum.pipeline.plan import Planner, StagePlan
from modicum.pipeline.recipe import Recipe
from modicum.train.forms import merged
from modicum.train.loop import train

SHAPES = (
    (64, 2),
    (96, 2),
    (128, 2),
    (192, 2),
    (256, 2),
    (256, 4),
    (320, 6),
    (384, 8),
    (512, 8),
    (512, 12),
    (768, 12),
    (1024, 16),
    (1024, 24),
)  # width and layers the planner chooses from; at few tokens two
#                                                layers learn as much per token as four, for half the time
TOKENS_PER_PARAMETER = 3.0  # least tokens per parameter: what a run of minutes should still see
EVALUATIONS = 2  # held-out losses of a run, the last one at its end
EPOCHS = 4.0  # most passes over the corpus


def needs(recipe: Recipe) -> tuple[str, ...]:
    return ("curate",)


def uses(recipe: Recipe) -> dict[str, Any]:
    return {"pretrain": recipe.pretrain.model_dump(), "model": recipe.model}


def plan(planner: Planner) -> StagePlan:
    """Choose the largest shape that sees enough tokens in the time (unless the recipe fixes them)."""
    recipe, curate = planner.recipe, planner.decisions["curate"]
    candidates = (
        [training.shape_of(recipe)]
        if recipe.model
        else [
            training.shape_of(recipe, s, curate["vocab_size"])
            for s in ([recipe.pretrain.shape] if recipe.pretrain.shape else SHAPES)
        ]
    )
    if recipe.pretrain.parameters and not recipe.model:
        candidates = [min(candidates, key=lambda c: abs(c.parameters() - float(recipe.pretrain.parameters or 0)))]
    shape, tokens = _choose(planner, candidates, curate["train_tokens"] * EPOCHS)
    config = training.train_config(recipe, shape, tokens)
    cost = training.training_cost(planner, shape, config, EVALUATIONS)
    cost = Cost(**cost.as_dict() | {"disk_bytes": cost.disk_bytes * 2 + shape.parameters() * 2})
    step = training.step_seconds(planner, shape, config)
    return StagePlan(
        cost,
        {
            "shape": None if recipe.model else {"width": shape.width, "layers": shape.layers},
            "tokens": config.total_tokens,
            "lr": config.lr,
        },
        f"{config.total_steps} steps of {config.step_tokens} tokens at {step:.3f} s, memory traced",
    )


def _choose(planner: Planner, candidates: list[DecoderConfig], most: float) -> tuple[DecoderConfig, float]:
    recipe = planner.recipe
    if recipe.pretrain.tokens is not None and len(candidates) == 1:
        return candidates[0], recipe.pretrain.tokens
    best: tuple[DecoderConfig, float] | None = None
    for shape in candidates:
        if recipe.budget.memory and shape.parameters() * 18 > recipe.budget.memory and len(candidates) > 1:
            break
        config = training.train_config(recipe, shape, recipe.pretrain.batch_tokens * 100)
        if recipe.pretrain.tokens is not None:
            tokens = recipe.pretrain.tokens
        elif recipe.pretrain.time is not None:
            tokens = recipe.pretrain.time / training.step_seconds(planner, shape, config) * config.step_tokens
        else:
            raise BudgetError("pretrain has neither time nor tokens; set pretrain.time=5m or pretrain.tokens=2Mtok")
        tokens = min(tokens, most)
        if best is None or tokens >= TOKENS_PER_PARAMETER * shape.parameters():
            best = shape, tokens
        else:
            break
    assert best
    return best[0], max(best[1], recipe.pretrain.batch_tokens)


def run(context: Context) -> dict[str, Any]:
    recipe, decided = context.recipe, context.plan
    curation = Curation.load(context.figures("curate")["folder"])
    size = decided["shape"] and (decided["shape"]["width"], decided["shape"]["layers"])
    shape = training.shape_of(recipe, size, curation.tokenizer().vocab_size)
    config = training.train_config(
        recipe,
        shape,
        decided["tokens"],
        checkpoint_every=100,
        eval_every=-(-int(decided["tokens"]) // recipe.pretrain.batch_tokens // EVALUATIONS),
    )
    model = training.make_model(recipe, shape)
    result = train(
        model,
        training.training_stream(recipe, curation, config.total_tokens),
        config,
        context.folder,
        events=context.events,
        deadline=context.deadline,
        heldout=training.heldout_stream(recipe, curation),
        label="pretrain",
    )
    if result.stopped:
        raise ModicumError(
            f"the time budget ended after {count_text(result.tokens)} of "
            f"{count_text(config.total_tokens)} tokens; the checkpoint is kept, and the same command "
            "with a larger budget.time goes on from it"
        )
    folder = context.folder / "model"
    save_model(merged(model) if recipe.pretrain.form else model, folder, tokenizer_folder=curation.folder)
    what = (
        "went on from " + str(recipe.model)
        if recipe.model
        else f"a Llama-style decoder of {shape.layers} layers and width {shape.width}"
    )
    return {
        "folder": str(folder),
        "parameters": shape.parameters(),
        "tokens": result.tokens,
        "loss": result.loss,
        "heldout_loss": result.heldout_loss,
        "seconds": result.seconds,
        "bytes": tree_bytes(folder),
        "description": f"{shape.parameters() / 1e6:.2f} M parameters: {what}; {result.steps} steps of "
        f"{config.step_tokens:,} tokens in {recipe.pretrain.dtype}, "
        f"{result.tokens / result.seconds:,.0f} tokens/s over {seconds_text(result.seconds)}.",
        "cost": {"parameters": shape.parameters(), "tokens": result.tokens, "flops": result.flops},
    }
