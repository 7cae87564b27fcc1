"""adapt: train a form on question/answer pairs made from the corpus; loss on the answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pydantic import Field

from modicum.adapt.examples import prepare
from modicum.adapt.run import adapt
from modicum.adapt.sources import Sides
from modicum.adapt.spec import AdaptSpec, members
from modicum.budget import Cost, Meter
from modicum.budget.meter import resident_now
from modicum.core import compose, registry
from modicum.core.choice import Choice
from modicum.core.errors import ModicumError, UserError
from modicum.core.files import tree_bytes
from modicum.data.tokenizer import Tokenizer
from modicum.model import attach
from modicum.model.decoder import Decoder
from modicum.model.folder import load_model
from modicum.pipeline import costs, training
from modicum.pipeline.context import Context
from modicum.pipeline.examples import examples
from modicum.pipeline.models import folder_of
from modicum.pipeline.plan import Planner
from modicum.pipeline.recipe import Recipe
from modicum.pipeline.report import gains, plots
from modicum.pipeline.section import Tokens, from_spec, with_ports
from modicum.pipeline.stage import Finished, Input, Inputs, Report, Stage, StagePlan
from modicum.pipeline.worker import trim_allocator
from modicum.retrieve.search import Searcher
from modicum.train.config import TrainConfig, training_ports

REPLY = 80  # tokens that a prompt with passages leaves for the answer
SAMPLED = 12  # pairs made for the plan


SETTINGS = ("form", "base", "targets", "sequence_length", "batch_tokens", "micro_batch", "lr")
Settings: Any = from_spec(AdaptSpec, SETTINGS)


class Section(Settings):
    model: str | None = None  # a folder, a hub id or a name of `modicum get`; None: the model pretrained in this run
    go_on: bool = False  # train the adapter of the stage that `from` names further, its file alone handed over
    merge: bool | None = None  # the trained update into plain weights; None: where it can be and has no base
    tokens: Tokens = 200_000.0
    pairs: int = Field(20_000, ge=8)
    heldout_pairs: int = Field(1000, ge=1)  # at most so many give the loss before and after
    grounded: float = Field(0.0, ge=0, le=1)  # fraction of the pairs that are asked with retrieved passages
    passages: int | None = Field(None, ge=1)  # in such a prompt; None: as many as `serve` shows, or 3
    dtype: str | None = None  # None: what the recipe pretrains in, or bf16
    # And a key for every training port (optimizer, schedule, memory, averaging ...).


if not TYPE_CHECKING:
    Section = with_ports(Section, training_ports())


class Adapt(Stage[Section]):
    order, default = 50, True
    gives = ("model", "adapter")

    def needed(self, section: Section) -> tuple[str, ...]:
        base = ("adapter",) if section.go_on else () if section.model else ("model",)
        return ("corpus", *base, *(("index",) if section.grounded else ()))

    def complete(self, section: Section, recipe: Recipe, name: str) -> Section:
        from modicum.pipeline.stages.serve import Section as Serve

        serve = recipe.first(Serve)
        earlier = [e.section for e in recipe.entries if e.name in recipe.entry(name).sources]
        before = next((s for s in earlier if section.go_on and isinstance(s, Section)), None)
        return section.model_copy(
            update={
                "passages": section.passages or (serve.passages if serve else 3),
                "base": section.base or (before.base if before else None),
                "form": before.form if before else section.form,  # the adapter's, for plans
                "dtype": section.dtype or training.dtype_of(recipe),
            }
        )

    def check(self, section: Section, recipe: Recipe, name: str) -> None:
        training.dtype_named(section.dtype, name)
        if section.go_on and section.model:
            raise UserError(f"{name}.go_on trains an earlier stage's adapter on that stage's model; leave model out")
        if section.go_on:
            (first,) = recipe.sources(name)["adapter"]
            form = recipe.section(first).form
            if Choice.parse("linear", form).method != "lora":
                raise UserError(f"{name}.go_on needs an adapter in PEFT's format, and {first}.form={form} has none")
        config = _config(section, recipe.seed)
        if section.base is not None and not _provides(section.form, "adapter"):
            raise UserError(
                f"{name}.base={section.base} lies under an adapter, and {name}.form={section.form} is none; choose "
                f"{name}.form=lora:rank=16, or leave {name}.base out"
            )
        compose.resolve(members(config), options={"linear": f"{name}.form"}, where=name)

    def models(self, section: Section) -> dict[str, str]:
        return {"model": section.model} if section.model else {}

    def plan(self, section: Section, inputs: Inputs, planner: Planner) -> StagePlan:
        """A step and a scoring pass timed, memory traced; pairs made from the sample for real."""
        curate, seed, dtype = inputs["corpus"], planner.recipe.seed, str(section.dtype)
        config, model = _config(section, seed), _base(section, inputs)
        shape = costs.subject_shape(planner, model)
        trained, cost = _training_cost(planner, config, model)
        trim_allocator()  # what the planner's process holds unused would hide what this stage takes
        before = resident_now()
        tokenizer = Tokenizer.load(costs.subject(planner, model))
        searcher = Searcher(inputs["index"]["sample"]) if section.grounded else None
        # The planner has loaded the encoder already; the stage's process loads it itself, and its libraries stay.
        loaded = searcher and inputs["index"]["published"]
        encoder = costs.encoder(planner, inputs["index"]["encoder"])[1] if loaded else Cost()
        wanted = section.pairs + section.heldout_pairs
        with Meter() as reading:
            _sides(section, curate["sample"], searcher, tokenizer, seed, 0.0)
        with Meter() as meter:
            sides = _sides(section, curate["sample"], searcher, tokenizer, seed, min(1.0, SAMPLED / wanted))
        each = max(meter.seconds - reading.seconds, 0.0) / max(len(sides.train) + len(sides.heldout), 1)
        making = reading.seconds / curate["sample_share"] + each * wanted
        made = prepare([*sides.heldout, *sides.train], tokenizer, config.sequence_length)
        packed = config.stream(made.documents(), epochs=1, total=None) if made.examples else None
        rows = packed.count_rows() / len(made.examples) if packed else 1.0
        passes = 2 * section.heldout_pairs * rows / trained.micro  # before and after
        scored = passes * costs.forward_seconds(planner, model, dtype, trained.micro, config.sequence_length)
        return StagePlan(
            Cost(
                **cost.as_dict()
                | {
                    "seconds": cost.seconds + making + scored + encoder.seconds,
                    "peak_bytes": cost.peak_bytes + max(meter.peak_bytes - before, 0) + encoder.peak_bytes,
                    "disk_bytes": shape.parameters() * 2 + 16 * cost.parameters,
                }
            ),
            {key: model[key] for key in ("model", "shape", "sample")} | {"published": section.model is not None},
            f"{trained.config.total_steps} steps of {trained.config.step_tokens} tokens at {trained.seconds:.2f} s, "
            "memory traced",
        )

    def run(self, section: Section, inputs: Inputs, context: Context) -> dict[str, Any]:
        seed = context.recipe.seed
        first = inputs["adapter"].values if section.go_on else {}
        base = first.get("base") or (str(folder_of(section.model)) if section.model else inputs["model"]["folder"])
        searcher = Searcher(inputs["index"]["folder"]) if section.grounded else None
        tokenizer = Tokenizer.load(base)
        sides = _sides(section, inputs["corpus"]["folder"], searcher, tokenizer, seed)
        del searcher
        trim_allocator()  # of what searching took, before training takes its own
        result = adapt(
            base,
            sides,
            replace(_config(section, seed), adapter=first.get("adapter")),
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
            "model": first.get("model") or section.model,
            "base": base,
            "form": str(Choice.parse("linear", section.form)),
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

    def miniature(self, section: Section) -> tuple[Section, dict[str, Any]]:
        small = Section(
            form="lora:rank=4",
            tokens=8 * 64,
            batch_tokens=4 * 64,
            sequence_length=64,
            pairs=16,
            heldout_pairs=8,
            dtype=section.dtype,
        )
        return small, {}

    def report(self, done: Finished) -> Report:
        chart = plots.adapting(done.run, done.name)
        return Report(
            charts={"loss": chart},
            cards=gains.adapted(done.figures),
            lead=gains.lead({}, done.figures, gains.names(done.figures)),
            rank=3,
        )


def _base(section: Section, inputs: Inputs) -> Input:
    """The model that is adapted, as plans know it."""
    if section.go_on:
        return inputs["adapter"]
    if not section.model:
        return inputs["model"]
    return Input("adapt", section, {"model": section.model, "shape": None, "sample": None})


def _provides(form: Any, word: str) -> bool:
    return word in registry.load("linear", Choice.parse("linear", form).method).cls.provides


def _config(section: Section, seed: int) -> AdaptSpec:
    settings = {name: getattr(section, name) for name in SETTINGS}
    merge = _provides(section.form, "merge") and section.base is None if section.merge is None else section.merge
    spec = AdaptSpec(steps=1, **settings)
    return AdaptSpec(
        **settings,
        tokens=max(section.tokens, spec.step_tokens),
        merge=merge,
        seed=seed,
        dtype=training.dtype_named(section.dtype, "adapt"),
        checkpoint_every=5,
        **training.methods(section),
    )


def _sides(
    section: Section,
    curated: str,
    searcher: Searcher | None,
    tokenizer: Tokenizer,
    seed: int,
    size: float = 1.0,
) -> Sides:
    """Pairs of the training documents and of the held-out ones; `size`: fraction of the recipe's numbers."""
    a = section
    common: dict[str, Any] = {
        "grounded": a.grounded,
        "searcher": searcher,
        "passages": a.passages or 3,
        "budget": a.sequence_length - REPLY,
        "count": lambda text: len(tokenizer.encode(text, specials=False)),
        "seed": seed,
    }
    sides = {"train": a.pairs, "heldout": a.heldout_pairs}
    made = {side: examples(curated, side, max(round(limit * size), 1), **common) for side, limit in sides.items()}
    return Sides(made["train"], made["heldout"])


class _Told:
    """A training configuration of the adaptation, with rows of one forward pass and seconds of a step here."""

    def __init__(self, config: TrainConfig, micro: int, seconds: float):
        self.config, self.micro, self.seconds = config, micro, seconds


def _training_cost(planner: Planner, config: AdaptSpec, model: Input) -> tuple[_Told, Cost]:
    """Steps with the form on a model of the base's shape: one forward and backward pass timed, memory traced."""
    shape = costs.subject_shape(planner, model)
    rows = config.sequences
    micro = min(config.micro_batch or rows, rows)
    steps = max(config.total_steps, 1)
    bare = replace(config, form=None, tokens=None, steps=steps, batch_tokens=None, batch_sequences=rows)
    whole, part = replace(bare, micro_batch=micro), replace(bare, batch_sequences=micro, micro_batch=None)

    def adapted(make: Callable[[], Decoder]) -> Callable[[], Decoder]:
        def adapted_one() -> Decoder:
            made = make()
            if config.base is not None:
                attach.attach(made, {"layers.*": config.base})
            attach.attach(made, dict.fromkeys(config.targets or attach.target_modules(made, config.form), config.form))
            attach.freeze(made)
            return made

        return adapted_one

    dtype = training.torch_dtype(config.dtype)
    real = adapted(lambda: load_model(costs.subject(planner, model), dtype=dtype))
    trim_allocator()  # what the planner's process holds unused would hide what this stage takes
    before = resident_now()
    with Meter() as meter:
        seconds = (
            costs.step_seconds(planner, shape, part, make=real, name=f"adapt {config.form} over {config.base}")
            * rows
            / micro
        )
    traced = planner.once_here(
        ("adapt trace", shape, str(config.form), str(config.base), config.targets, part),
        lambda: costs.by_layers(
            shape,
            lambda s: costs.traced_step(adapted(lambda: costs.blank_in(s, dtype)), part, s, masked=True),
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
