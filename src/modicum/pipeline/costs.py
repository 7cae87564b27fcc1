"""What plans measure here and now: training steps, scoring passes, answers of the engine, and traced memory."""

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
from modicum.core.errors import UserError
from modicum.core.files import fingerprint
from modicum.data.stream import Batch
from modicum.model.config import DecoderConfig, llama_like
from modicum.model.decoder import Decoder
from modicum.model.folder import load_config, load_model, save_model
from modicum.pipeline import training
from modicum.pipeline.models import folder_of
from modicum.pipeline.plan import Planner
from modicum.pipeline.stage import Input
from modicum.pipeline.worker import trim_allocator
from modicum.retrieve.encoders import Encoder, make_encoder
from modicum.train import forecast
from modicum.train.config import TrainConfig
from modicum.train.engine import TrainEngine
from modicum.train.forecast import blank, phases, step_cost
from modicum.train.forecast import step as train_step

BATCH = 3  # requests that the plan times together
DEEP = 3  # layers of the shallow models that a deep one is traced by


def step_seconds(
    planner: Planner,
    shape: DecoderConfig,
    config: TrainConfig,
    make: Any = None,
    name: str = "step",
    *,
    masked: bool = False,
) -> float:
    """Seconds of one training step here: the median of a few real ones on random tokens, after a warm-up; where
    surgery changes the model, the mean over the run."""

    def measure() -> float:
        engine = TrainEngine(make() if make else Decoder(shape), config)
        engine.build()
        for part in list(engine.parts.values()):
            part.start(engine)
        tokens_BT = torch.randint(shape.vocab_size, (config.sequences, config.sequence_length))
        positions_BT = torch.arange(config.sequence_length).expand_as(tokens_BT)
        documents_BT = (positions_BT >= config.sequence_length // 2).long() if masked else None
        batch = Batch(tokens_BT, tokens_BT.clone(), documents_BT, positions_BT)
        seconds = 0.0
        for begin, end in phases(engine):
            step = repeated(partial(_next_step, engine, batch, itertools.count()))
            seconds += step * (end - begin) / config.total_steps
        return seconds

    return planner.once((name, shape, config, masked), measure)


def _next_step(engine: TrainEngine, batch: Batch, index: Iterator[int]) -> None:
    train_step(engine, batch, next(index))


def training_cost(
    planner: Planner, shape: DecoderConfig, config: TrainConfig, evaluations: int = 1, *, masked: bool = False
) -> Cost:
    """What one run takes beyond a stage's fixed cost: steps timed here, memory traced."""
    traced = planner.once_here(
        ("trace", shape, config, masked),
        lambda: traced_step(lambda: blank(shape), config, shape, masked=masked),
    )
    step = step_seconds(planner, shape, config, masked=masked)
    seconds = config.total_steps * step
    seconds += evaluations * training.EVAL_SEQUENCES / config.sequences * step / 3  # forward only
    return Cost(
        parameters=shape.parameters(),
        tokens=config.total_tokens,
        flops=config.total_steps * traced["flops"],
        seconds=seconds,
        peak_bytes=traced["peak_bytes"],
        disk_bytes=planner.once_here(("checkpoint", shape, config), lambda: checkpoint_bytes(shape, config)),
    )


def checkpoint_bytes(shape: DecoderConfig, config: TrainConfig) -> float:
    """Bytes of one checkpoint of a model of this shape, made without data."""
    made: list[float] = []
    trace(lambda: made.append(forecast.checkpoint_bytes(blank(shape), config)))
    return made[0]


def fits(shape: DecoderConfig, config: TrainConfig) -> bool:
    """Whether the methods take a model of this shape: a rank, a group or a window may be too large for a small one."""
    try:
        return checkpoint_bytes(shape, config) > 0
    except UserError:
        return False


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


def subject(planner: Planner, model: Input) -> str:
    """The folder to measure with in place of a model that is not there yet: the published one that it comes from, or
    random weights of its shape with the tokenizer of the corpus' sample."""
    if model["model"]:
        return str(folder_of(model["model"]))
    shape, sample = model["shape"], model["sample"]
    folder = planner.scratch / f"model-{fingerprint([shape, sample])}"
    if not folder.is_dir():
        made = Decoder(llama_like(**shape)).to(training.torch_dtype(training.dtype_of(planner.recipe)))
        save_model(made, folder, tokenizer_folder=sample)
    return str(folder)


def subject_shape(planner: Planner, model: Input) -> DecoderConfig:
    return load_config(subject(planner, model))


def subject_model(planner: Planner, model: Input, dtype: str) -> Decoder:
    """The subject, loaded once for all stages; whoever changes it makes a copy."""
    folder = subject(planner, model)
    loaded: Decoder = planner.object(
        f"{folder} in {dtype}", lambda: load_model(folder, dtype=training.torch_dtype(dtype))
    )
    return loaded


def forward_seconds(planner: Planner, model: Input, dtype: str, rows: int, length: int) -> float:
    """Seconds that the subject takes to score `rows` rows of `length` tokens in one pass."""
    from modicum.evaluate.score import chosen

    decoder = subject_model(planner, model, dtype)

    def work() -> None:
        with torch.inference_mode():
            h_BTD = decoder.hidden(torch.zeros((rows, length), dtype=torch.int64))
            chosen(decoder, h_BTD.flatten(0, 1), torch.zeros(rows * length, dtype=torch.int64))
        trim_allocator()  # as scoring does

    key = ("forward", subject(planner, model), dtype, rows, length)
    seconds: float = planner.once(key, lambda: repeated(work))
    return seconds


def forward_peak(planner: Planner, model: Input, dtype: str, rows: int, length: int) -> float:
    """Peak bytes of that pass, weights included, traced."""
    from modicum.evaluate.score import chosen

    whole, kind = subject_shape(planner, model), training.torch_dtype(dtype)

    def peak(shape: DecoderConfig) -> dict[str, float]:
        def work() -> None:
            decoder = blank_in(shape, kind)
            with torch.inference_mode():
                h_BTD = decoder.hidden(torch.zeros((rows, length), dtype=torch.int64))
                chosen(decoder, h_BTD.flatten(0, 1), torch.zeros(rows * length, dtype=torch.int64))

        return {"peak_bytes": trace(work).peak_bytes}

    key = ("forward trace", whole, kind, rows, length)
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


def encoder(planner: Planner, model: str) -> tuple[Encoder, Cost]:
    """An encoder by its folder or name, loaded once, and what that takes: seconds, and bytes that stay."""

    def load() -> tuple[Encoder, Cost]:
        trim_allocator()
        before = resident_now()
        began = time.perf_counter()
        made = make_encoder(model)
        if not made.fitted:  # the others see all texts before they encode one
            made.encode_queries(["what the first call loads"])
        seconds = time.perf_counter() - began
        return made, Cost(seconds=seconds, peak_bytes=max(resident_now() - before, 0))

    loaded: tuple[Encoder, Cost] = planner.object(f"encoder {model}", load)
    return loaded


def batch_seconds(planner: Planner, model: Input, dtype: str, prompt: int, answer: int, knobs: dict[str, Any]) -> float:
    """Seconds for each of `BATCH` requests that the engine answers together; knobs: the engine's."""
    return _engine_seconds(planner, model, dtype, prompt, answer, knobs, BATCH) / BATCH


def answer_seconds(
    planner: Planner, model: Input, dtype: str, prompt: int, answer: int, knobs: dict[str, Any]
) -> float:
    """Seconds of one answer of `answer` tokens to a prompt of `prompt` tokens by the engine, asked alone."""
    return _engine_seconds(planner, model, dtype, prompt, answer, knobs, 1)


def _engine_seconds(
    planner: Planner, model: Input, dtype: str, prompt: int, answer: int, knobs: dict[str, Any], requests: int
) -> float:
    from modicum.pipeline.engine import engine_config
    from modicum.serve.engine import Engine
    from modicum.serve.request import SamplingParams

    key = (subject(planner, model), dtype, knobs)

    def engine() -> Any:
        decoder = subject_model(planner, model, dtype)
        length = min(1024, decoder.config.context_length)
        return Engine(decoder, None, engine_config({"max_length": length} | knobs | {"cache": "128MiB"}))

    def measure() -> float:
        sampling = SamplingParams(temperature=0, max_tokens=answer, ignore_eos=True)
        made = planner.object(f"engine {key}", engine)
        made.generate([[1, 2]], SamplingParams(temperature=0, max_tokens=2))
        first = len(planner.memo)  # no two prompts alike, so that none is found in the cache
        tokens = min(prompt, made.max_length - answer)
        prompts = [[first % 97 + 3, i, *[1] * (tokens - 2)] for i in range(requests)]
        began = time.perf_counter()
        made.generate(prompts, sampling)
        return time.perf_counter() - began

    seconds: float = planner.once(("engine", key, prompt, answer, requests), measure)
    return seconds
