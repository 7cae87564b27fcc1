"""What must hold for any averaging, on a decoder of two layers that trains for eight steps."""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from modicum.core import registry
from modicum.core.choice import Choice
from modicum.core.events import Events
from modicum.data.shards import MemoryDocuments
from modicum.data.stream import Stream
from modicum.model.config import llama_like
from modicum.model.decoder import Decoder
from modicum.train.averaging import Averaging
from modicum.train.callback import Callback
from modicum.train.config import TrainConfig
from modicum.train.forecast import blank, step_cost
from modicum.train.loop import TrainResult, train

STEPS, LENGTH, VOCAB = 8, 16, 61


def _choice(key: str) -> Choice:
    toy = getattr(registry.load("averaging", key).module, "TOY", None)
    return Choice("averaging", key, dataclasses.asdict(toy) if toy else {})


def _config(key: str, **knobs: Any) -> TrainConfig:
    settings: dict[str, Any] = {
        "steps": STEPS,
        "sequence_length": LENGTH,
        "batch_sequences": 4,
        "lr": 1e-2,
        "device": "cpu",
        "dtype": "float32",
        "averaging": _choice(key),
        "checkpoint_every": 2,
        "keep": STEPS + 1,
    }
    return TrainConfig(**settings | knobs)


def _model() -> Decoder:
    return Decoder(llama_like(VOCAB, 32, 2), torch.Generator().manual_seed(0))


class _Watch(Callback):
    """Keeps the weights after every step."""

    def __init__(self) -> None:
        self.seen: list[dict[str, torch.Tensor]] = []

    def after_step(self, trainer: Any) -> None:
        self.seen.append({n: p.detach().double().clone() for n, p in trainer.named.items()})


def _train(key: str, folder: Path | None, watch: _Watch | None = None, **knobs: Any) -> tuple[Decoder, TrainResult]:
    documents = [([1, *[(i * k) % 57 + 3 for k in range(40)], 2], 1) for i in range(1, 40)]
    stream = Stream(MemoryDocuments({"all": documents}), sequence_length=LENGTH, seed=0)
    model, parts = _model(), {"watch": watch} if watch else None
    return model, train(model, stream, _config(key, **knobs), folder, events=Events(None), parts=parts, label="")


def check_ends_between_the_weights_of_the_run(key: str) -> None:
    """Training is the one without averaging; each weight ends between the least and the most that it was."""
    watch, plain = _Watch(), _Watch()
    model, _ = _train(key, None, watch)
    _train("none", None, plain)
    for one, two in zip(watch.seen, plain.seen, strict=True):
        assert all(torch.equal(one[n], two[n]) for n in one), f"{key}: the average acts on training"
    for name, p in model.named_parameters():
        steps = torch.stack([seen[name] for seen in watch.seen])
        low, high = steps.amin(0) - 1e-6, steps.amax(0) + 1e-6
        assert ((p.double() >= low) & (p.double() <= high)).all(), f"{key}: {name} is no mean of what it was"


def check_coefficients(key: str) -> None:
    """Each lies in (0, 1] or is None, and depends on its arguments alone."""
    first, second = (registry.build("averaging", _choice(key)) for _ in range(2))
    for total in (1, 2, 7, 100):
        settings = [first.coefficient(step, total, count) for step in range(1, total + 1) for count in range(step)]
        again = [second.coefficient(step, total, count) for step in range(1, total + 1) for count in range(step)]
        assert settings == again, f"{key}: depends on more than step, total and count"
        assert all(c is None or 0 < c <= 1 for c in settings), f"{key}: {settings}"


def check_resumes_bit_for_bit(key: str) -> None:
    """Going on from any checkpoint gives the run that was never stopped, in float32 and in bf16 with masters."""
    for dtype in ("float32", "bfloat16"):
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            straight, _ = _train(key, folder / "whole", dtype=dtype)
            for cut in (2, 6):
                for path in (folder / "whole" / "checkpoints").iterdir():
                    if int(path.name[5:]) <= cut:
                        shutil.copytree(path, folder / f"cut{cut}" / "checkpoints" / path.name)
                resumed, result = _train(key, folder / f"cut{cut}", dtype=dtype)
                assert result.resumed_from == cut
                for (name, a), b in zip(straight.named_parameters(), resumed.parameters(), strict=True):
                    assert torch.equal(a, b), f"{key}: {name} differs after going on from step {cut} in {dtype}"


def check_memory_is_planned(key: str) -> None:
    """The plan counts the copy that the method keeps."""
    shape = _model().config
    method: Averaging = registry.build("averaging", _choice(key))
    engine = type("Engine", (), {"named": dict(_model().named_parameters())})()
    method.start(engine)
    kept = sum(a.numel() * a.element_size() for a in method.average.values())
    peaks = [step_cost(lambda: blank(shape), _config(k), VOCAB).peak_bytes for k in (key, "none")]
    assert abs(peaks[0] - peaks[1] - kept) <= 0.02 * peaks[1], f"{key}: keeps {kept} bytes, plans {peaks}"
