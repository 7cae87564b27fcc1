"""adapt: train a form on question/answer pairs made from the corpus; loss on the answers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from modicum.adapt.examples import prepare
from modicum.adapt.examples import rows as pack_rows
from modicum.adapt.run import AdaptConfig, adapt
from modicum.adapt.sources import Sides
from modicum.budget import Cost, Meter
from modicum.budget.meter import resident_now
from modicum.core import registry
from modicum.core.choice import Choice
from modicum.core.errors import ModicumError
from modicum.core.files import tree_bytes
from modicum.data.tokenizer import Tokenizer
from modicum.model import attach
from modicum.model.decoder import Decoder
from modicum.model.folder import load_model
from modicum.pipeline import training
from modicum.pipeline.context import Context
from modicum.pipeline.examples import examples
from modicum.pipeline.models import folder_of
from modicum.pipeline.plan import Planner, StagePlan
from modicum.pipeline.recipe import Recipe
from modicum.pipeline.worker import trim_allocator
from modicum.retrieve.search import Searcher
from modicum.train.config import TrainConfig

REPLY = 80  # tokens that a prompt with passages leaves for the answer
SAMPLED = 12  # pairs made for the plan


def needs(recipe: Recipe) -> tuple[str, ...]:
    assert recipe.adapt
    base = () if recipe.adapt.model else ("pretrain",)
    return ("curate", *base, *(("ground",) if recipe.adapt.grounded else ()))


def uses(recipe: Recipe) -> dict[str, Any]:
    assert recipe.adapt
    return {"adapt": recipe.adapt.model_dump(), "passages": recipe.serve and recipe.serve.passages}


def _config(recipe: Recipe) -> AdaptConfig:
    a = recipe.adapt
    assert a
    kind: Any = registry.load("linear", Choice.parse("linear", a.form).method).cls
    sequences = max(a.batch_tokens // a.sequence_length, 1)
    return AdaptConfig(
        form=a.form,
        targets=a.targets,
        tokens=max(a.tokens, sequences * a.sequence_length),
        sequence_length=a.sequence_length,
        batch_sequences=sequences,
        micro_batch=a.micro_batch,
        lr=a.lr,
        merge="merge" in kind.provides,
        seed=recipe.seed,
        dtype=training.DTYPES[recipe.pretrain.dtype],
        checkpoint_every=5,
    )


def _sides(recipe: Recipe, curated: str, searcher: Searcher | None, tokenizer: Tokenizer, size: float = 1.0) -> Sides:
    """Pairs of the training documents and of the held-out ones; `size`: fraction of the recipe's numbers."""
    a = recipe.adapt
    assert a
    common: dict[str, Any] = {
        "grounded": a.grounded,
        "searcher": searcher,
        "passages": recipe.serve.passages if recipe.serve else 3,
        "budget": a.sequence_length - REPLY,
        "count": lambda text: len(tokenizer.encode(text, specials=False)),
        "seed": recipe.seed,
    }
    sides = {"train": a.pairs, "heldout": a.heldout_pairs}
    made = {side: examples(curated, side, max(round(limit * size), 1), **common) for side, limit in sides.items()}
    return Sides(made["train"], made["heldout"])


def plan(planner: Planner) -> StagePlan:
    """A step and a scoring pass timed, memory traced; pairs made from the sample for real."""
    recipe, curate = planner.recipe, planner.decisions["curate"]
    assert recipe.adapt
    config, shape = _config(recipe), training.subject_shape(planner)
    told, cost = _training_cost(planner, config)
    trim_allocator()  # what the planner's process holds unused would hide what this stage takes
    before = resident_now()
    tokenizer = Tokenizer.load(training.subject(planner))
    searcher = Searcher(planner.decisions["ground"]["sample"]) if recipe.adapt.grounded else None
    # The planner has loaded the encoder already; the stage's process loads it itself, and its libraries stay.
    encoder = training.encoder(planner)[1] if searcher and recipe.ground and recipe.ground.encoder else Cost()
    wanted = recipe.adapt.pairs + recipe.adapt.heldout_pairs
    with Meter() as reading:
        _sides(recipe, curate["sample"], searcher, tokenizer, 0.0)
    with Meter() as meter:
        sides = _sides(recipe, curate["sample"], searcher, tokenizer, min(1.0, SAMPLED / wanted))
    each = max(meter.seconds - reading.seconds, 0.0) / max(len(sides.train) + len(sides.heldout), 1)
    making = reading.seconds / curate["sample_share"] + each * wanted
    lengths = [len(e) for e in prepare([*sides.heldout, *sides.train], tokenizer, config.sequence_length).examples]
    rows = len(list(pack_rows(lengths, range(len(lengths)), config.sequence_length))) / max(len(lengths), 1)
    passes = 2 * recipe.adapt.heldout_pairs * rows / told.micro  # before and after
    scored = passes * training.forward_seconds(planner, told.micro, config.sequence_length)
    return StagePlan(
        Cost(
            **cost.as_dict()
            | {
                "seconds": cost.seconds + making + scored + encoder.seconds,
                "peak_bytes": cost.peak_bytes + max(meter.peak_bytes - before, 0) + encoder.peak_bytes,
                "disk_bytes": shape.parameters() * 2 + 16 * cost.parameters,
            }
        ),
        {},
        f"{told.config.total_steps} steps of {told.config.step_tokens} tokens at {told.seconds:.2f} s, memory traced",
    )


class _Told:
    """A training configuration of the adaptation, with rows of one forward pass and seconds of a step here."""

    def __init__(self, config: TrainConfig, micro: int, seconds: float):
        self.config, self.micro, self.seconds = config, micro, seconds


def _training_cost(planner: Planner, config: AdaptConfig) -> tuple[_Told, Cost]:
    """Steps with the form on a model of the base's shape: one forward and backward pass timed, memory traced."""
    shape = training.subject_shape(planner)
    common: dict[str, Any] = {
        "sequence_length": config.sequence_length,
        "lr": config.lr,
        "optimizer": config.optimizer,
        "schedule": config.schedule,
        "dtype": config.dtype,
    }
    rows, micro = config.batch_sequences, min(config.micro_batch or config.batch_sequences, config.batch_sequences)
    steps = max(int(float(config.tokens or 0)) // (rows * config.sequence_length), 1)
    whole = TrainConfig(steps=steps, batch_sequences=rows, micro_batch=micro, **common)
    part = TrainConfig(steps=steps, batch_sequences=micro, **common)

    def adapted(make: Callable[[], Decoder]) -> Callable[[], Decoder]:
        def made() -> Decoder:
            model = make()
            attach.attach(model, dict.fromkeys(config.targets or attach.places(model, config.form), config.form))
            attach.freeze(model)
            return model

        return made

    dtype = training.torch_dtype(planner.recipe)
    real = adapted(lambda: load_model(training.subject(planner), dtype=dtype))
    trim_allocator()  # what the planner's process holds unused would hide what this stage takes
    before = resident_now()
    with Meter() as meter:
        seconds = training.step_seconds(planner, shape, part, make=real, name=f"adapt {config.form}") * rows / micro
    traced = planner.once_here(
        ("adapt trace", shape, str(config.form), config.targets, part),
        lambda: training.by_layers(
            shape,
            lambda s: training.traced_step(adapted(lambda: training.blank_in(s, dtype)), part, s, masked=True),
        ),
    )
    trainable = traced["trainable"]
    cost = Cost(
        parameters=trainable,
        tokens=whole.total_tokens,
        flops=traced["flops"] * steps * rows / micro,
        seconds=steps * seconds,
        peak_bytes=max(traced["peak_bytes"], meter.peak_bytes - before),
    )
    return _Told(whole, micro, seconds), cost


def run(context: Context) -> dict[str, Any]:
    recipe = context.recipe
    assert recipe.adapt
    base = str(folder_of(recipe.adapt.model)) if recipe.adapt.model else context.figures("pretrain")["folder"]
    searcher = Searcher(context.figures("ground")["folder"]) if recipe.adapt.grounded else None
    tokenizer = Tokenizer.load(base)
    sides = _sides(recipe, context.figures("curate")["folder"], searcher, tokenizer)
    del searcher
    trim_allocator()  # of what searching took, before training takes its own
    result = adapt(
        base,
        sides,
        _config(recipe),
        context.folder,
        events=context.events,
        deadline=context.deadline,
        tokenizer=tokenizer,
    )
    if result.stopped:
        raise ModicumError(
            "the time budget ended while adapting; the checkpoint is kept, the same command with a "
            "larger budget.time goes on"
        )
    return {
        "model": recipe.adapt.model,
        "base": base,
        "form": str(Choice.parse("linear", recipe.adapt.form)),
        "folder": result.model or base,
        "adapter": result.adapter,
        "pairs_train": result.pairs,
        "pairs_heldout": result.heldout_pairs,
        "before": result.heldout_before,
        "after": result.heldout_after,
        "trainable_parameters": result.trainable,
        "adapter_bytes": tree_bytes(result.adapter) if result.adapter else 0,
        "training_seconds": result.seconds,
        "cost": {"parameters": result.trainable, "tokens": result.tokens, "flops": result.flops},
    }
