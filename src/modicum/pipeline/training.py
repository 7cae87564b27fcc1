"""What the training stages share: the data they read, the knobs they run with, and what a step costs here."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from modicum.budget import Cost
from modicum.budget.meter import resident_now
from modicum.budget.trace import trace
from modicum.core import registry
from modicum.core.errors import UserError
from modicum.data.curate import Curation
from modicum.data.stream import Batch, Stream
from modicum.model.config import DecoderConfig, llama_like
from modicum.model.decoder import Decoder
from modicum.model.folder import load_config, load_model, save_model
from modicum.pipeline.models import folder_of
from modicum.pipeline.plan import Planner
from modicum.pipeline.recipe import Recipe
from modicum.pipeline.worker import trim_allocator
from modicum.retrieve.encoders import Encoder, make_encoder
from modicum.train.config import TrainConfig, run_ports
from modicum.train.engine import TrainEngine
from modicum.train.forecast import blank, phases, step_cost
from modicum.train.forecast import step as train_step

BATCH = 3  # requests that the plan times together
DEEP = 3  # layers of the shallow models that a deep one is traced by
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
        **methods(recipe),
        form=p.form,
        targets=p.targets,
        clip=p.clip,
        masters=p.masters,
        dtype=DTYPES[p.dtype],
        seed=recipe.seed,
        eval_sequences=EVAL_SEQUENCES,
        **more,
    )


def methods(recipe: Recipe) -> dict[str, Any]:
    """The recipe's methods for training and its data, by their port."""
    return {port: getattr(recipe.pretrain, port) for port in run_ports() if hasattr(recipe.pretrain, port)}


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
    told = TrainConfig(steps=1, sequence_length=p.sequence_length, seed=recipe.seed, **methods(recipe))
    return told.stream(curation.shards("train"), total=total)


def heldout_stream(recipe: Recipe, curation: Curation) -> Stream:
    config = TrainConfig(steps=1, sequence_length=recipe.pretrain.sequence_length, **methods(recipe))
    stream: Stream = config.heldout_stream(curation.shards("heldout"))
    return stream


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
    planner: Planner, shape: DecoderConfig, config: TrainConfig, make: Any = None, name: str = "step"
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
            step = repeated(partial(_next_step, engine, batch, itertools.count()))
            seconds += step * (end - begin) / config.total_steps
        return seconds

    return planner.once((name, shape, config, _masked(planner.recipe)), measure)


def _next_step(engine: TrainEngine, batch: Batch, index: Iterator[int]) -> None:
    train_step(engine, batch, next(index))


def training_cost(planner: Planner, shape: DecoderConfig, config: TrainConfig, evaluations: int = 1) -> Cost:
    """What one run takes beyond a stage's fixed cost: steps timed here, memory traced."""
    traced = planner.once_here(
        ("trace", shape, config, _masked(planner.recipe)),
        lambda: traced_step(lambda: blank(shape), config, shape, masked=_masked(planner.recipe)),
    )
    step = step_seconds(planner, shape, config)
    seconds = config.total_steps * step
    seconds += evaluations * EVAL_SEQUENCES / config.sequences * step / 3  # forward only
    state = shape.parameters() * (4 + 4 + 8)  # checkpoint: masters and AdamW's moments in float32
    return Cost(
        parameters=shape.parameters(),
        tokens=config.total_tokens,
        flops=config.total_steps * traced["flops"],
        seconds=seconds,
        peak_bytes=traced["peak_bytes"],
        disk_bytes=state,
    )


def traced_step(
    make: Callable[[], Decoder], config: TrainConfig, shape: DecoderConfig, *, masked: bool
) -> dict[str, float]:
    """{"flops", "peak_bytes", "trainable"} of a step of the model that `make` makes without data."""
    trainable: list[int] = []

    def made() -> Decoder:
        model = make()
        trainable.append(sum(p.numel() for p in model.parameters() if p.requires_grad))
        return model

    traced = step_cost(made, config, shape.vocab_size, masked=masked)
    return {"flops": traced.flops, "peak_bytes": traced.peak_bytes, "trainable": trainable[0]}


def by_layers(shape: DecoderConfig, measure: Callable[[DecoderConfig], dict[str, float]]) -> dict[str, float]:
    """`measure(shape)`, of a deep model from two shallow ones: what is traced grows with equal layers in proportion."""
    if shape.layers <= 2 * DEEP or shape.overrides:
        return measure(shape)
    few, more = (measure(replace(shape, layers=n)) for n in (DEEP, 2 * DEEP))
    return {name: few[name] + (more[name] - few[name]) * (shape.layers - DEEP) / DEEP for name in few}


def blank_in(shape: DecoderConfig, dtype: torch.dtype) -> Decoder:
    """A decoder without values whose weights are in `dtype`, for a trace."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return blank(shape)
    finally:
        torch.set_default_dtype(before)


def _masked(recipe: Recipe) -> bool:
    return bool(registry.build("packing", recipe.pretrain.packing).masks_documents)


def main_shape(planner: Planner) -> DecoderConfig:
    """The shape that the pretrain stage decided on."""
    size = planner.decisions["pretrain"]["shape"]
    return shape_of(planner.recipe, size and (size["width"], size["layers"]), planner.decisions["curate"]["vocab_size"])


def scratch_model(planner: Planner) -> str:
    """A model folder of the pretrained model's shape with the sample's tokenizer, for measuring with."""
    if planner.recipe.model:
        return planner.recipe.model
    folder = planner.scratch / "model"
    if not folder.is_dir():
        model = Decoder(main_shape(planner)).to(torch_dtype(planner.recipe))
        save_model(model, folder, tokenizer_folder=planner.decisions["curate"]["sample"])
    return str(folder)


def subject(planner: Planner) -> str:
    """The folder to measure with in place of the model that is adapted, compressed, served and evaluated."""
    adapt = planner.recipe.adapt
    return str(folder_of(adapt.model)) if adapt and adapt.model else scratch_model(planner)


def subject_shape(planner: Planner) -> DecoderConfig:
    return load_config(subject(planner))


def subject_model(planner: Planner) -> Decoder:
    """The subject in the recipe's dtype, loaded once for all stages; whoever changes it makes a copy."""
    return planner.object("subject", lambda: load_model(subject(planner), dtype=torch_dtype(planner.recipe)))


def torch_dtype(recipe: Recipe) -> torch.dtype:
    found: torch.dtype = getattr(torch, DTYPES[recipe.pretrain.dtype])
    return found


def forward_seconds(planner: Planner, rows: int, length: int) -> float:
    """Seconds that the subject takes to score `rows` rows of `length` tokens in one pass."""
    from modicum.evaluate.score import chosen

    model = subject_model(planner)

    def work() -> None:
        with torch.inference_mode():
            h_BTD = model.hidden(torch.zeros((rows, length), dtype=torch.int64))
            chosen(model, h_BTD.flatten(0, 1), torch.zeros(rows * length, dtype=torch.int64))
        trim_allocator()  # as scoring does

    return planner.once(("forward", rows, length), lambda: repeated(work))


def forward_peak(planner: Planner, rows: int, length: int) -> float:
    """Peak bytes of that pass, weights included, traced."""
    from modicum.evaluate.score import chosen

    whole, dtype = subject_shape(planner), torch_dtype(planner.recipe)

    def peak(shape: DecoderConfig) -> dict[str, float]:
        def work() -> None:
            model = blank_in(shape, dtype)
            with torch.inference_mode():
                h_BTD = model.hidden(torch.zeros((rows, length), dtype=torch.int64))
                chosen(model, h_BTD.flatten(0, 1), torch.zeros(rows * length, dtype=torch.int64))

        return {"peak_bytes": trace(work).peak_bytes}

    key = ("forward trace", whole, dtype, rows, length)
    return float(planner.once_here(key, lambda: by_layers(whole, peak))["peak_bytes"])


def repeated(work: Callable[[], Any], seconds: float = 0.8, most: int = 5) -> float:
    """Median seconds of `work()` after one call that is not counted: as many calls as `seconds` allow, at least one."""
    work()
    taken: list[float] = []
    while not taken or (len(taken) < most and sum(taken) + taken[-1] < seconds):
        began = time.perf_counter()
        work()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def encoder(planner: Planner) -> tuple[Encoder, Cost]:
    """The recipe's encoder, loaded once, and what that takes: seconds, and bytes that stay."""
    ground = planner.recipe.ground
    assert ground

    def load() -> tuple[Encoder, Cost]:
        trim_allocator()
        before = resident_now()
        began = time.perf_counter()
        made = make_encoder(ground.encoder or scratch_model(planner))
        if made.kind == "sentence-transformers":  # the others see all texts before they encode one
            made.encode_queries(["what the first call loads"])
        seconds = time.perf_counter() - began
        return made, Cost(seconds=seconds, peak_bytes=max(resident_now() - before, 0))

    found: tuple[Encoder, Cost] = planner.object("encoder", load)
    return found


def batch_seconds(planner: Planner, prompt: int, answer: int) -> float:
    """Seconds for each of `BATCH` requests that the engine answers together."""
    return _engine_seconds(planner, prompt, answer, BATCH) / BATCH


def answer_seconds(planner: Planner, prompt: int, answer: int) -> float:
    """Seconds of one answer of `answer` tokens to a prompt of `prompt` tokens by the engine, asked alone."""
    return _engine_seconds(planner, prompt, answer, 1)


def _engine_seconds(planner: Planner, prompt: int, answer: int, requests: int) -> float:
    from modicum.serve.config import EngineConfig
    from modicum.serve.engine import Engine
    from modicum.serve.request import SamplingParams

    def engine() -> Any:
        model = subject_model(planner)
        length = min(1024, model.config.context_length)
        return Engine(model, None, EngineConfig(cache="128MiB", max_length=length))

    def measure() -> float:
        sampling = SamplingParams(temperature=0, max_tokens=answer, ignore_eos=True)
        made = planner.object("engine", engine)
        made.generate([[1, 2]], SamplingParams(temperature=0, max_tokens=2))
        first = len(planner.memo)  # no two prompts alike, so that none is found in the cache
        tokens = min(prompt, made.max_length - answer)
        prompts = [[first % 97 + 3, i, *[1] * (tokens - 2)] for i in range(requests)]
        began = time.perf_counter()
        made.generate(prompts, sampling)
        return time.perf_counter() - began

    seconds: float = planner.once(("engine", prompt, answer, requests), measure)
    return seconds
