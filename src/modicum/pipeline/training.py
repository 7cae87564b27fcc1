"""What the training stages share: the data they read, the knobs they run with, and what a step costs here."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch

from modicum.budget import Cost
from modicum.budget.trace import trace
from modicum.core import registry
from modicum.core.errors import UserError
from modicum.data.curate import Curation
from modicum.data.stream import Batch, Stream
from modicum.model.config import DecoderConfig, llama_like
from modicum.model.decoder import Decoder
from modicum.model.folder import load_config, load_model, save_model
from modicum.pipeline.plan import Planner
from modicum.pipeline.recipe import Recipe
from modicum.pipeline.worker import trim_allocator
from modicum.train.config import TrainConfig, stream_knobs
from modicum.train.engine import TrainEngine
from modicum.train.forecast import blank, phases, step_cost
from modicum.train.forecast import step as train_step

EVAL_SEQUENCES = 512  # held-out sequences behind every loss of a run
DTYPES = {"bf16": "bfloat16", "fp32": "float32", "bfloat16": "bfloat16", "float32": "float32"}


def learning_rate(recipe: Recipe, shape: DecoderConfig) -> float:
    """The recipe's, or 0.2 / width but at most 2e-3 from scratch (found on another seed), 1e-4 for a given model."""
    if recipe.pretrain.lr is not None:
        return recipe.pretrain.lr
    return 1e-4 if recipe.model else min(2e-3, 0.2 / shape.width)


def train_config(recipe: Recipe, shape: DecoderConfig, tokens: float, **more: Any) -> TrainConfig:
    p = recipe.pretrain
    if p.dtype not in DTYPES:
        raise UserError(f"pretrain.dtype={p.dtype!r} is not allowed; write bf16 or fp32")
    marks = registry.build("objective", p.objective).reserved()
    if marks > recipe.curate.reserved and not recipe.model:
        raise UserError(
            f"pretrain.objective={p.objective} needs {marks} tokens that no text uses and curate.reserved="
            f"{recipe.curate.reserved}; write curate.reserved: {marks}"
        )
    return TrainConfig(
        tokens=tokens,
        sequence_length=p.sequence_length,
        batch_tokens=p.batch_tokens,
        micro_batch=p.micro_batch,
        lr=learning_rate(recipe, shape),
        optimizer=p.optimizer,
        schedule=p.schedule,
        objective=p.objective,
        memory=p.memory,
        surgery=p.surgery,
        form=p.form,
        targets=p.targets,
        clip=p.clip,
        masters=p.masters,
        dtype=DTYPES[p.dtype],
        seed=recipe.seed,
        eval_sequences=EVAL_SEQUENCES,
        **more,
    )


def training_stream(recipe: Recipe, curation: Curation, total: float) -> Any:
    p = recipe.pretrain
    if p.recall is not None:
        from modicum.evaluate.recall import RecallConfig, RecallStream

        knobs = p.recall.model_dump(exclude={"vocabulary"}) | {"shares": tuple(p.recall.shares)}
        config = RecallConfig(**knobs | {"lengths": tuple(min(n, p.sequence_length) for n in p.recall.lengths)})
        return RecallStream(
            config,
            curation.tokenizer(),
            curation.shards("train"),
            sequence_length=p.sequence_length,
            total=total,
            seed=recipe.seed,
        )
    return Stream(
        curation.shards("train"),
        p.mixture,
        p.packing,
        sequence_length=p.sequence_length,
        seed=recipe.seed,
        total=total,
        **stream_knobs(p.schedule, p.objective),
    )


def heldout_stream(recipe: Recipe, curation: Curation) -> Stream:
    return Stream(
        curation.shards("heldout"),
        "natural",
        recipe.pretrain.packing,
        sequence_length=recipe.pretrain.sequence_length,
        seed=0,
        epochs=1,
    )


def shape_of(
    recipe: Recipe, width_and_layers: tuple[int, int] | None = None, vocab_size: int | None = None
) -> DecoderConfig:
    """The given model's shape, or a Llama-style one of this width and depth."""
    if recipe.model:
        return load_config(recipe.model)
    assert width_and_layers
    # A model that learns to recall knows no distance beyond its rows, and what serves it should know that.
    length = recipe.pretrain.sequence_length
    return llama_like(
        vocab_size or recipe.curate.vocab_size,
        *width_and_layers,
        recipe.pretrain.heads,
        context_length=length if recipe.pretrain.recall else max(2048, length),
    )


def make_model(recipe: Recipe, shape: DecoderConfig) -> Decoder:
    """Fresh weights from the recipe's seed, or the given model's."""
    if recipe.model:
        return load_model(recipe.model, dtype="float32")
    return Decoder(shape, torch.Generator().manual_seed(recipe.seed))


def step_seconds(
    planner: Planner, shape: DecoderConfig, config: TrainConfig, steps: int = 5, make: Any = None, name: str = "step"
) -> float:
    """Seconds of one training step here: the median of a few real ones on random tokens, after a warm-up; where
    surgery changes the model, the mean over the run."""

    def measure() -> float:
        engine = TrainEngine(make() if make else Decoder(shape), config)
        engine.build()
        engine.surgery.start(engine)
        tokens_BT = torch.randint(shape.vocab_size, (config.sequences, config.sequence_length))
        positions_BT = torch.arange(config.sequence_length).expand_as(tokens_BT)
        documents_BT = (positions_BT >= config.sequence_length // 2).long() if _masked(planner.recipe) else None
        batch = Batch(tokens_BT, tokens_BT.clone(), documents_BT, positions_BT)
        seconds = 0.0
        for begin, end in phases(engine):
            taken = []
            for index in range(steps + 2):
                began = time.perf_counter()
                train_step(engine, batch, index)
                taken.append(time.perf_counter() - began)
            seconds += statistics.median(taken[2:]) * (end - begin) / config.total_steps
        return seconds

    return planner.once((name, shape, config.sequences, config.sequence_length), measure)


def training_cost(planner: Planner, shape: DecoderConfig, config: TrainConfig, evaluations: int = 1) -> Cost:
    """What one run takes beyond a stage's fixed cost: steps timed here, memory traced."""
    traced = planner.once(
        ("trace", shape, config.sequences, config.sequence_length, config.micro_batch),
        lambda: step_cost(lambda: blank(shape), config, shape.vocab_size, masked=_masked(planner.recipe)),
    )
    step = step_seconds(planner, shape, config)
    seconds = config.total_steps * step
    seconds += evaluations * EVAL_SEQUENCES / config.sequences * step / 3  # forward only
    state = shape.parameters() * (4 + 4 + 8)  # checkpoint: masters and AdamW's moments in float32
    return Cost(
        parameters=shape.parameters(),
        tokens=config.total_tokens,
        flops=config.total_steps * traced.flops,
        seconds=seconds,
        peak_bytes=traced.peak_bytes,
        disk_bytes=state,
    )


def _masked(recipe: Recipe) -> bool:
    return bool(registry.build("packing", recipe.pretrain.packing).masks_documents)


def main_shape(planner: Planner) -> DecoderConfig:
    """The shape that the pretrain stage decided on."""
    size = planner.decisions["pretrain"]["shape"]
    return shape_of(planner.recipe, size and (size["width"], size["layers"]), planner.decisions["curate"]["vocab_size"])


def scratch_model(planner: Planner) -> str:
    """A model folder of the main shape with the sample's tokenizer, for measuring with."""
    if planner.recipe.model:
        return planner.recipe.model
    folder = planner.scratch / "model"
    if not folder.is_dir():
        model = Decoder(main_shape(planner)).to(getattr(torch, DTYPES[planner.recipe.pretrain.dtype]))
        save_model(model, folder, tokenizer_folder=planner.decisions["curate"]["sample"])
    return str(folder)


def forward_cost(planner: Planner, shape: DecoderConfig, tokens: int, length: int) -> Cost:
    """One scoring pass over `tokens` tokens in rows of `length`: timed for real, memory traced."""
    from modicum.evaluate.score import chosen

    rows = max(tokens // length, 1)

    def work(make: Any) -> None:
        model = make()
        with torch.inference_mode():
            h_BTD = model.hidden(torch.zeros((rows, length), dtype=torch.int64))
            chosen(model, h_BTD.flatten(0, 1), torch.zeros(rows * length, dtype=torch.int64))

    def measure() -> Cost:
        dtype = getattr(torch, DTYPES[planner.recipe.pretrain.dtype])
        model = Decoder(shape).to(dtype)
        work(lambda: model)
        taken = []
        for _ in range(3):
            began = time.perf_counter()
            work(lambda: model)
            trim_allocator()  # as scoring does
            taken.append(time.perf_counter() - began)
        traced = trace(lambda: work(lambda: blank(shape)))
        return Cost(seconds=statistics.median(taken), peak_bytes=traced.peak_bytes)

    return planner.once(("forward", shape, rows, length), measure)


def adapted_cost(planner: Planner, config: Any) -> tuple[DecoderConfig, Cost, int]:
    """(shape, cost, trainable parameters) of training a form on top of the main model; traced and timed with it."""
    from modicum.model import attach

    shape = main_shape(planner)
    tokens = (
        config.tokens
        // (config.batch_sequences * config.sequence_length)
        * config.batch_sequences
        * config.sequence_length
    )
    told = TrainConfig(
        tokens=tokens,
        sequence_length=config.sequence_length,
        batch_sequences=config.batch_sequences,
        lr=config.lr,
        optimizer=config.optimizer,
        schedule=config.schedule,
        dtype=config.dtype,
    )

    def adapted(model: Decoder) -> Decoder:
        attach.attach(model, dict.fromkeys(config.targets or attach.places(model, config.form), config.form))
        attach.freeze(model)
        return model

    real = adapted(Decoder(shape))
    trainable = sum(p.numel() for p in real.parameters() if p.requires_grad)
    seconds = step_seconds(planner, shape, told, make=lambda: real, name="adapt")
    traced = step_cost(lambda: adapted(blank(shape)), told, shape.vocab_size, masked=True)
    return (
        shape,
        Cost(
            parameters=trainable,
            tokens=tokens,
            flops=traced.flops * told.total_steps,
            seconds=told.total_steps * seconds,
            peak_bytes=traced.peak_bytes,
        ),
        trainable,
    )
