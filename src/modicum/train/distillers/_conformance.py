"""What must hold for any distiller, on a decoder of two layers with a wider teacher."""

from __future__ import annotations

import dataclasses
import functools
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from modicum.core import registry
from modicum.core.choice import Choice
from modicum.core.events import Events
from modicum.data.shards import MemoryDocuments
from modicum.data.stream import Batch, Stream
from modicum.model.config import llama_like
from modicum.model.decoder import Decoder
from modicum.model.folder import save_model
from modicum.train.config import TrainConfig
from modicum.train.distillers import Distiller
from modicum.train.forecast import blank, step_cost
from modicum.train.loop import TrainResult, train
from modicum.train.objectives import Loss, Objective, Step

STEPS, LENGTH, VOCAB = 8, 16, 61


@functools.cache
def _teacher(width: int, layers: int = 3) -> str:
    """A folder with a decoder."""
    folder = Path(tempfile.mkdtemp()) / "teacher"
    save_model(Decoder(llama_like(VOCAB, width, layers, heads=4), torch.Generator().manual_seed(7)), folder)
    return str(folder)


def _choice(key: str) -> Choice:
    loaded = registry.load("distiller", key)
    toy = getattr(loaded.module, "TOY", loaded.config())
    knobs = dataclasses.asdict(toy)
    if "teacher" in knobs:
        alike = {
            "self-distill-further": (32,),
            "pela": (32, 2),
            "swiftkv": (32, 2),
        }  # that are taught by a model of their shape
        knobs["teacher"] = _teacher(*alike.get(key, (48,)))
    return Choice("distiller", key, knobs)


def _objective() -> Objective:
    return registry.build("objective", "next-token")


def _model() -> Decoder:
    return Decoder(llama_like(VOCAB, 32, 2, context_length=32), torch.Generator().manual_seed(0))


def _batch(rows: int = 6) -> Batch:
    tokens = torch.randint(4, VOCAB, (rows, LENGTH + 1), generator=torch.Generator().manual_seed(1))
    targets = tokens[:, 1:].clone()
    targets[0, 5:] = -100
    targets[3, :2] = -100
    documents = (torch.arange(LENGTH)[None] >= torch.arange(3, 3 + rows)[:, None]).long()
    positions = torch.arange(LENGTH).expand(rows, LENGTH).clone()
    return Batch(tokens[:, :-1].contiguous(), targets, documents, positions)


def _config(key: str, **knobs: Any) -> TrainConfig:
    settings: dict[str, Any] = {
        "steps": STEPS,
        "sequence_length": LENGTH,
        "batch_sequences": 4,
        "lr": 1e-2,
        "device": "cpu",
        "dtype": "float32",
        "distiller": _choice(key),
        "checkpoint_every": 2,
        "keep": STEPS + 1,
    }
    return TrainConfig(**settings | knobs)


def _train(key: str, folder: Path | None, **knobs: Any) -> tuple[Decoder, TrainResult]:
    documents = [([1, *[(i * k) % 57 + 3 for k in range(40)], 2], 1) for i in range(1, 40)]
    stream = Stream(MemoryDocuments({"all": documents}), sequence_length=LENGTH, seed=0)
    model = _model()
    return model, train(model, stream, _config(key, **knobs), folder, events=Events(None), label="")


def _gradient(key: str, cuts: list[slice]) -> tuple[Loss, float, torch.Tensor]:
    model, batch = _model(), _batch()
    method: Distiller = registry.build("distiller", _choice(key))
    total = count = 0.0
    for cut in cuts:
        loss = method.loss(_objective(), model, batch.slice(cut.start, cut.stop), Step())
        loss.total.backward()
        total, count = total + float(loss.total.detach()), count + float(loss.count)
    flat = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    return loss, total / count, flat / count


def check_sum_and_count(key: str) -> None:
    """A finite float32 scalar with a graph, and the objective's count; every weight of the student gets a gradient."""
    loss, total, flat = _gradient(key, [slice(0, 6)])
    assert loss.total.ndim == 0 and loss.total.dtype == torch.float32, f"{key}: {loss.total}"
    assert float(loss.count) == float((_batch().targets_BT != -100).sum()), f"{key}: counts {loss.count}"
    assert flat.numel() == sum(p.numel() for p in _model().parameters()), f"{key}: a weight has no gradient"
    assert bool(flat.isfinite().all()) and total == total, f"{key}: not finite"


def check_accumulates(key: str) -> None:
    """The mean loss and its gradient are the same however the batch is cut."""
    _, whole, one = _gradient(key, [slice(0, 6)])
    _, parts, two = _gradient(key, [slice(0, 1), slice(1, 4), slice(4, 6)])
    assert abs(whole - parts) < 1e-4, f"{key}: the mean loss depends on the cut ({whole}, {parts})"
    assert torch.allclose(one, two, atol=1e-5), f"{key}: the gradient depends on the cut"


def check_the_teacher_stays(key: str) -> None:
    """The teacher has no gradients, and a run leaves its weights and the student's module alone."""
    method: Distiller = registry.build("distiller", _choice(key))
    model = _model()
    method.loss(_objective(), model, _batch(), Step()).total.backward()
    if method.teacher is not None:
        assert all(p.grad is None for p in method.teacher.parameters()), f"{key}: the teacher got a gradient"
    assert "hidden" not in vars(model) and not model.layers[0]._forward_hooks, f"{key}: the student is still watched"


def check_resumes_bit_for_bit(key: str) -> None:
    """Going on from a checkpoint gives the run that was never stopped, with or without a teacher's folder."""
    for dtype, knobs in (("float32", {}), ("bfloat16", {"distiller": Choice("distiller", key)})):
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            if knobs and key == "scalekd":  # the student has too few layers to be its own teacher
                knobs = {}
            straight, _ = _train(key, folder / "whole", dtype=dtype, **knobs)
            for path in (folder / "whole" / "checkpoints").iterdir():
                if int(path.name[5:]) <= 4:
                    shutil.copytree(path, folder / "cut" / "checkpoints" / path.name)
            resumed, result = _train(key, folder / "cut", dtype=dtype, **knobs)
            assert result.resumed_from == 4
            for (name, a), b in zip(straight.named_parameters(), resumed.parameters(), strict=True):
                assert torch.equal(a, b), f"{key}: {name} differs after going on in {dtype}"


def check_it_is_planned(key: str) -> None:
    """A plan without data runs, and counts the teacher's bytes."""
    shape = _model().config
    peaks = [step_cost(lambda: blank(shape), _config(k), VOCAB).peak_bytes for k in (key, "none")]
    if getattr(registry.load("distiller", key).cls, "trains_part", False):  # and saves more than a teacher takes
        assert peaks[0] >= 2 * 4 * shape.parameters(), f"{key}: student and teacher are not in the plan ({peaks})"
        return
    assert peaks[0] >= peaks[1], f"{key}: plans {peaks[0]} bytes with a teacher, {peaks[1]} without"
    if hasattr(registry.load("distiller", key).config(), "teacher"):
        assert peaks[0] > 1.05 * peaks[1], f"{key}: the teacher is not in the plan ({peaks})"
