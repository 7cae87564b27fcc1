"""What must hold for any surgery, on a decoder of four layers that trains for eight steps."""

from __future__ import annotations

import dataclasses
import math
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from modicum.budget.trace import Live
from modicum.core import registry
from modicum.core.choice import Choice
from modicum.core.events import Events
from modicum.data.shards import MemoryDocuments
from modicum.data.stream import Stream
from modicum.model.config import llama_like
from modicum.model.decoder import Decoder
from modicum.train.config import TrainConfig
from modicum.train.engine import TrainEngine
from modicum.train.forecast import blank, run_flops, step_cost
from modicum.train.loop import TrainResult, train

STEPS, LENGTH, VOCAB = 8, 16, 61


def _model() -> Decoder:
    return Decoder(llama_like(VOCAB, 32, 4), torch.Generator().manual_seed(0))


def _stream() -> Stream:
    documents = [([1, *[(i * k) % 57 + 3 for k in range(40)], 2], 1) for i in range(1, 40)]
    return Stream(MemoryDocuments({"all": documents}), sequence_length=LENGTH, seed=0)


def _config(key: str, **knobs: Any) -> TrainConfig:
    toy = getattr(registry.load("surgery", key).module, "TOY", None)
    choice = Choice("surgery", key, dataclasses.asdict(toy) if toy else {})
    settings: dict[str, Any] = {
        "steps": STEPS,
        "sequence_length": LENGTH,
        "batch_sequences": 8,
        "lr": 1e-2,
        "device": "cpu",
        "dtype": "float32",
        "surgery": choice,
        "checkpoint_every": 2,
        "keep": STEPS + 1,
    }
    return TrainConfig(**settings | knobs)


def _train(key: str, folder: Path | None, **knobs: Any) -> tuple[Decoder, TrainResult]:
    model = _model()
    return model, train(model, _stream(), _config(key, **knobs), folder, events=Events(None), label="")


def check_the_given_model_is_trained(key: str) -> None:
    """The model handed in keeps names and shapes, holds finite trained weights, and its loss has fallen."""
    model, result = _train(key, None, steps=30)
    fresh = _model().state_dict()
    assert {n: t.shape for n, t in model.state_dict().items()} == {n: t.shape for n, t in fresh.items()}, (
        f"{key}: names or shapes of the given model changed"
    )
    for name, tensor in model.state_dict().items():
        assert torch.isfinite(tensor).all(), f"{key}: {name} is not finite"
        assert not torch.equal(tensor, fresh[name]), f"{key}: {name} of the given model was not trained"
    assert result.loss < 0.95 * math.log(VOCAB), f"{key}: the loss stands at {result.loss:.3f}"


def check_resumes_bit_for_bit(key: str) -> None:
    """Going on from any checkpoint gives the run that was never stopped, in float32 and in bf16 with masters."""
    for dtype in ("float32", "bfloat16"):
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            straight, whole = _train(key, folder / "whole", dtype=dtype)
            for cut in range(2, STEPS, 2):
                for path in (folder / "whole" / "checkpoints").iterdir():
                    if int(path.name[5:]) <= cut:
                        shutil.copytree(path, folder / f"cut{cut}" / "checkpoints" / path.name)
                resumed, result = _train(key, folder / f"cut{cut}", dtype=dtype)
                assert result.resumed_from == cut
                for (name, a), b in zip(straight.named_parameters(), resumed.parameters(), strict=True):
                    assert torch.equal(a, b), f"{key}: {name} differs after going on from step {cut} in {dtype}"
                actual, wanted = (
                    dataclasses.replace(r, resumed_from=None, seconds=0, peak_bytes=0, checkpoint=None)
                    for r in (result, whole)
                )
                assert actual == wanted, f"{key}: {actual} after going on from step {cut}, {wanted} without"


def check_tells_what_it_will_do(key: str) -> None:
    """`marks` lie within the run in order; FLOPs and removed weights are those that the run then counts."""
    model, result = _train(key, None)
    engine = TrainEngine(_model(), _config(key))
    engine.build()
    engine.surgery.start(engine)
    marks = engine.surgery.marks(engine)
    assert all(0 < a < STEPS for a in marks) and marks == sorted(set(marks)), f"{key}: marks are {marks}"
    planned = run_flops(_model(), _config(key))
    assert math.isclose(planned, result.flops, rel_tol=1e-6), f"{key}: plans {planned} FLOPs, counts {result.flops}"
    zeros = sum(int((p == 0).sum()) for p in model.parameters())
    removed = engine.surgery.removed(STEPS - 1)
    assert abs(zeros - removed) <= 0.01 * engine.parameters, f"{key}: says {removed} weights are zero, {zeros} are"


def check_forecast_of_the_peak(key: str) -> None:
    """`step_cost`, traced without data, finds the most bytes alive during a whole run to 15%."""
    shape = _model().config
    for dtype in ("float32", "bfloat16"):
        config = _config(key, dtype=dtype)
        predicted = step_cost(lambda: blank(shape), config, VOCAB).peak_bytes
        stream = _stream()
        with Live() as live:
            model = _model()
            train(model, stream, config, None, events=Events(None), label="")
        assert abs(predicted - live.peak) <= 0.15 * live.peak, (
            f"{key}: forecast {predicted} bytes in {dtype}, held {live.peak}"
        )
