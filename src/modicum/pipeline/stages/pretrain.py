"""pretrain: train the decoder on the curated text, or go on training a given one.

From scratch the planner chooses a shape that sees enough tokens in the time, unless the recipe fixes them. `model` goes
on from a published model, `from: NAME` from the one that an earlier stage left.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import Field

from modicum.budget import Cost
from modicum.core import compose, registry
from modicum.core.errors import BudgetError, ModicumError, UserError
from modicum.core.events import count_text, seconds_text
from modicum.core.files import tree_bytes
from modicum.data.curate import Curation
from modicum.model.config import DecoderConfig, llama_like
from modicum.model.folder import save_model
from modicum.pipeline import costs, training
from modicum.pipeline.context import Context
from modicum.pipeline.plan import Planner
from modicum.pipeline.recipe import Recipe
from modicum.pipeline.report import plots
from modicum.pipeline.section import (
    Bytes,
    Parameters,
    Seconds,
    Strict,
    Tokens,
    from_spec,
    method,
    methods,
    with_ports,
)
from modicum.pipeline.stage import Finished, Input, Inputs, Report, Stage, StagePlan
from modicum.train.config import PretrainSpec, members, run_ports
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
TOY = {"width": 64, "layers": 2}


class Recall(Strict):
    """Rows of the playground's recall tasks beside the corpus, growing longer (evaluate.recall)."""

    lengths: list[int] = [64, 256, 1024]  # tokens of a row, one after another over the run
    fractions: list[float] = [0.5, 0.25, 0.25]  # of the run, for each length
    text: float = Field(0.15, ge=0, lt=1)  # share of the rows that hold the corpus
    copies: float = Field(0.25, ge=0, lt=1)  # share of the documents that are a list and its copy
    vocabulary: Bytes = 2.0 * 2**20  # such text among what the tokenizer is trained on


# The runs of a recipe take minutes: shorter rows and smaller steps than a run's own defaults.
Settings: Any = from_spec(PretrainSpec, training.SETTINGS, sequence_length=256, batch_tokens=1024)


class Section(Settings):
    model: str | None = None  # a folder or hub id to go on from; None: the recipe's `model`, or from scratch
    parameters: Parameters | None = None  # None: the planner chooses
    shape: tuple[int, int] | None = None  # width and layers, for who wants to say them
    heads: int | None = Field(None, ge=1)  # None: of 64 dimensions, 32 in models narrower than 256
    attention: methods("attention") | None = None  # type: ignore[valid-type]  # of all layers, or several by turns
    time: Seconds | None = 210.0  # with tokens None: as many as fit in this time
    tokens: Tokens | None = None
    schedule: method("schedule") = "wsd"  # type: ignore[valid-type]
    recall: Recall | None = None  # learn to recall from the context as well
    # And a key for every other training port (optimizer, objective, memory, averaging ...), data ports included
    # (mixture, order, transform, packing).


if not TYPE_CHECKING:
    Section = with_ports(Section, run_ports())


class Pretrain(Stage[Section]):
    order, default = 30, True
    needs, named, gives = ("corpus",), ("model",), ("model",)

    def complete(self, section: Section, recipe: Recipe, name: str) -> Section:
        if recipe.entry(name).sources and section.model is None:
            return section
        return section.model_copy(update={"model": section.model or recipe.model})

    def check(self, section: Section, recipe: Recipe, name: str) -> None:
        sources = recipe.sources(name)
        curate = recipe.section(sources["corpus"][0])
        if sources["model"] and section.model:
            raise UserError(f"{name} goes on from {sources['model'][0]} and from {section.model}; leave one out")
        _check_methods(section, curate.tokenizer is not None or curate.reserved, name, sources["corpus"][0])
        if sources["model"] and _vocabulary(recipe, sources["model"][0]) != _vocabulary(recipe, name):
            raise UserError(
                f"{name} goes on from {sources['model'][0]} with text of another tokenizer; add to "
                f"{sources['corpus'][0]}: from: {_vocabulary(recipe, sources['model'][0])}, so that it takes that one's"
            )

    def plan(self, section: Section, inputs: Inputs, planner: Planner) -> StagePlan:
        """Choose the largest shape that sees enough tokens in the time (unless the recipe fixes them)."""
        curate, base = inputs["corpus"], inputs.get("model")
        candidates, given = _candidates(section, curate, base)
        shape, tokens = _choose(planner, section, candidates, curate["train_tokens"] * EPOCHS)
        config = training.train_config(section, shape, tokens, planner.recipe.seed)
        masked = training.masked(section)
        cost = costs.training_cost(planner, shape, config, EVALUATIONS, masked=masked)
        cost = Cost(**cost.as_dict() | {"disk_bytes": cost.disk_bytes * 2 + shape.parameters() * 2})
        step = costs.step_seconds(planner, shape, config, masked=masked)
        return StagePlan(
            cost,
            {
                "shape": None if given else _described(section, shape),
                "model": given,
                "sample": curate["sample"],
                "tokens": config.total_tokens,
                "lr": config.lr,
            },
            f"{config.total_steps} steps of {config.step_tokens} tokens at {step:.3f} s, memory traced",
        )

    def run(self, section: Section, inputs: Inputs, context: Context) -> dict[str, Any]:
        recipe, decided = context.recipe, context.plan
        curation = Curation.load(inputs["corpus"]["folder"])
        given = inputs["model"]["folder"] if "model" in inputs else section.model
        size = decided["shape"] or {}
        shape = (
            training.given_shape(section, given)
            if given
            else training.shape_of(section, size["width"], size["layers"], curation.tokenizer().vocab_size)
        )
        config = training.train_config(
            section,
            shape,
            decided["tokens"],
            recipe.seed,
            checkpoint_every=100,
            eval_every=-(-int(decided["tokens"]) // int(section.batch_tokens) // EVALUATIONS),
        )
        model = training.make_model(shape, given, recipe.seed, section.attention)
        result = train(
            model,
            training.training_stream(section, curation, config.total_tokens, recipe.seed),
            config,
            context.folder,
            events=context.events,
            deadline=context.deadline,
            heldout=training.heldout_stream(section, curation),
            label=context.name,
        )
        if result.stopped:
            raise ModicumError(
                f"the time budget ended after {count_text(result.tokens)} of "
                f"{count_text(config.total_tokens)} tokens; the checkpoint is kept, and the same command "
                "with a larger budget.time goes on from it"
            )
        folder = context.folder / "model"
        save_model(merged(model) if section.form else model, folder, tokenizer_folder=curation.folder)
        what = f"a Llama-style decoder of {shape.layers} layers and width {shape.width}"
        if given:
            what = f"went on from {inputs['model'].name if 'model' in inputs else section.model}"
        return {
            "folder": str(folder),
            "parameters": shape.parameters(),
            "tokens": result.tokens,
            "loss": result.loss,
            "heldout_loss": result.heldout_loss,
            "seconds": result.seconds,
            "bytes": tree_bytes(folder),
            "description": f"{shape.parameters() / 1e6:.2f} M parameters: {what}; {result.steps} steps of "
            f"{config.step_tokens:,} tokens in {section.dtype}, "
            f"{result.tokens / result.seconds:,.0f} tokens/s over {seconds_text(result.seconds)}.",
            "cost": {"parameters": shape.parameters(), "tokens": result.tokens, "flops": result.flops},
        }

    def miniature(self, section: Section) -> tuple[Section, dict[str, Any]]:
        length = 64
        small = Section(
            sequence_length=length, batch_tokens=4 * length, tokens=16 * length, time=None, dtype=section.dtype
        )
        return small, {"shape": TOY, "tokens": 16 * length, "lr": 1e-3}

    def report(self, done: Finished) -> Report:
        chart = plots.loss_curve(done.run, done.name)
        return Report(charts={"loss": chart})


def _check_methods(section: Section, reserved: bool | int, name: str, curate: str) -> None:
    """Refuse what does not go together, before anything is planned. reserved: tokens of the vocabulary that no text
    uses; True where the vocabulary is a given model's, which is asked when it is loaded."""
    config = training.train_config(section, None, section.batch_tokens, 0)
    chosen = members(config)
    marks = registry.build("objective", config.choice("objective")).reserved()
    if reserved is True or reserved >= marks:
        chosen.append(compose.setting("the vocabulary", provides={"reserved_tokens"}))
    compose.resolve(
        chosen,
        options={
            "linear": f"{name}.form",
            "document_mask": f"set {name}.packing=concat:mask=true",
            "reserved_tokens": f"set {curate}.reserved={marks}",
        },
        where=name,
    )


def _vocabulary(recipe: Recipe, name: str) -> str:
    """The stage whose tokenizer a stage's text or model has."""
    given = recipe.sources(name).get("corpus") or []
    return _vocabulary(recipe, given[0]) if given else name


def _candidates(section: Section, curate: Input, base: Input | None) -> tuple[list[DecoderConfig], str | None]:
    """Shapes to choose from, and the published model that fixes the only one."""
    if base is not None:
        known = training.given_shape(section, base["model"]) if base["model"] else llama_like(**base["shape"])
        return [known], base["model"]
    if section.model:
        return [training.given_shape(section, section.model)], section.model
    sizes = [section.shape] if section.shape else SHAPES
    shapes = [training.shape_of(section, *size, curate["vocab_size"]) for size in sizes]
    if section.parameters:
        wanted = section.parameters
        shapes = [min(shapes, key=lambda c: abs(c.parameters() - wanted))]
    return shapes, None


def _described(section: Section, shape: DecoderConfig) -> dict[str, Any]:
    """What `llama_like` makes the shape from."""
    return {
        "vocab_size": shape.vocab_size,
        "width": shape.width,
        "layers": shape.layers,
        "heads": section.heads,
        "context_length": shape.context_length,
        "attention": section.attention,
    }


def _choose(
    planner: Planner, section: Section, candidates: list[DecoderConfig], most: float
) -> tuple[DecoderConfig, float]:
    recipe = planner.recipe
    if section.tokens is not None and len(candidates) == 1:
        return candidates[0], section.tokens
    best: tuple[DecoderConfig, float] | None = None
    for shape in candidates:
        if recipe.budget.memory and shape.parameters() * 18 > recipe.budget.memory and len(candidates) > 1:
            break
        config = training.train_config(section, shape, section.batch_tokens * 100, recipe.seed)
        if shape is not candidates[-1] and not costs.fits(shape, config):
            continue
        if section.tokens is not None:
            tokens = section.tokens
        elif section.time is not None:
            tokens = (
                section.time
                / costs.step_seconds(planner, shape, config, masked=training.masked(section))
                * config.step_tokens
            )
        else:
            raise BudgetError("pretrain has neither time nor tokens; set pretrain.time=5m or pretrain.tokens=2Mtok")
        tokens = min(tokens, most)
        if best is None or tokens >= TOKENS_PER_PARAMETER * shape.parameters():
            best = shape, tokens
        else:
            break
    assert best
    return best[0], max(best[1], section.batch_tokens)
