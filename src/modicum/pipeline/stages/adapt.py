"""adapt: train a form on question/answer pairs made from the corpus; loss on the answers."""

from __future__ import annotations

from typing import Any

from modicum.adapt.examples import prepare, sample
from modicum.adapt.examples import rows as pack_rows
from modicum.adapt.run import HELDOUT_PAIRS, AdaptConfig, adapt
from modicum.adapt.sources import load_sides
from modicum.budget import Cost, Meter
from modicum.budget.meter import resident_now
from modicum.core.choice import Choice
from modicum.core.errors import ModicumError
from modicum.core.files import tree_bytes
from modicum.data.tokenizer import Tokenizer
from modicum.pipeline import training
from modicum.pipeline.context import Context
from modicum.pipeline.plan import Planner, StagePlan
from modicum.pipeline.recipe import Recipe

NEEDS = ("curate", "pretrain")
ROWS = 16  # sequences of a step
HELDOUT = 0.05  # of the pairs


def uses(recipe: Recipe) -> dict[str, Any]:
    assert recipe.adapt
    return {"adapt": recipe.adapt.model_dump()}


def _config(recipe: Recipe) -> AdaptConfig:
    a = recipe.adapt
    assert a
    merge = "merge" in _form(recipe).provides
    return AdaptConfig(
        form=a.form,
        targets=a.targets,
        tokens=max(a.tokens, ROWS * a.sequence_length),
        sequence_length=a.sequence_length,
        batch_sequences=ROWS,
        lr=a.lr,
        limit=a.pairs,
        merge=merge,
        heldout=HELDOUT,
        seed=recipe.seed,
        dtype=training.DTYPES[recipe.pretrain.dtype],
    )


def _form(recipe: Recipe) -> Any:
    from modicum.core import registry

    assert recipe.adapt
    return registry.load("linear", Choice.parse("linear", recipe.adapt.form).method).cls


def plan(planner: Planner) -> StagePlan:
    """Steps timed, pairs made from the sample for real; two held-out passes."""
    recipe, curate = planner.recipe, planner.decisions["curate"]
    config = _config(recipe)
    shape, cost, trainable = training.adapted_cost(planner, config)
    share, tokenizer = curate["sample_share"], Tokenizer.load(curate["sample"])
    before = resident_now()
    with Meter() as meter:
        learn, held = load_sides(curate["sample"], HELDOUT, recipe.seed)
        prepared = prepare(
            sample(learn, recipe.adapt.pairs if recipe.adapt else None), tokenizer, config.sequence_length
        )
    scored = prepare(sample(held, 64), tokenizer, config.sequence_length).examples
    lengths = [len(e) for e in scored]
    rows = len(list(pack_rows(lengths, range(len(lengths)), config.sequence_length))) / max(len(lengths), 1)
    passed = min(len(held) / share, HELDOUT_PAIRS) * rows * config.sequence_length
    forward = training.forward_cost(planner, shape, ROWS * config.sequence_length, config.sequence_length)
    passes = 2 * passed / (ROWS * config.sequence_length) * forward.seconds
    del prepared
    return StagePlan(
        Cost(
            **cost.as_dict()
            | {
                "seconds": cost.seconds + meter.seconds / share + passes,
                "peak_bytes": cost.peak_bytes + max(meter.peak_bytes - before, 0) / share,
                "disk_bytes": shape.parameters() * 2 + 16 * trainable,
            }
        ),
        {},
        "steps and pairs timed, memory traced",
    )


def run(context: Context) -> dict[str, Any]:
    recipe = context.recipe
    assert recipe.adapt
    base = context.figures("pretrain")["folder"]
    result = adapt(
        base,
        context.figures("curate")["folder"],
        _config(recipe),
        context.folder,
        events=context.events,
        deadline=context.deadline,
    )
    if result.stopped:
        raise ModicumError(
            "the time budget ended while adapting; the checkpoint is kept, the same command with a "
            "larger budget.time goes on"
        )
    return {
        "form": str(Choice.parse("linear", recipe.adapt.form)),
        "folder": result.model or base,
        "adapter": result.adapter,
        "pairs_train": result.pairs,
        "pairs_heldout": result.heldout_pairs,
        "before": result.heldout_before,
        "after": result.heldout_after,
        "trainable_parameters": result.trainable,
        "adapter_bytes": tree_bytes(result.adapter) if result.adapter else 0,
        "cost": {"parameters": result.trainable, "tokens": result.tokens, "flops": result.flops},
    }
