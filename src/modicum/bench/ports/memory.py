"""memory: peak bytes of a training step against held-out bits per byte after equal tokens.

Peak, seconds and the gradient's error of one step are measured in a process of its own, on a model whose
activations outweigh its weights; `planned_bytes` is what `modicum plan` forecasts for that step. The loss by
itself is measured there too, on a vocabulary of a size that makes it heavy: `naive_loss_*` is PyTorch's
cross-entropy on whole logits, `loss_*` the loss as the method computes it, each forward and backward.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from types import SimpleNamespace
from typing import Any

from modicum.bench import training
from modicum.bench.measurement import Axes, Axis, Measurement, Settings
from modicum.budget import Cost
from modicum.core.choice import Choice
from modicum.core.errors import ModicumError

AXES = Axes(quality=Axis("bits_per_byte"), cost=Axis("peak_bytes", "lower", "bytes"))
LIMITS = training.LIMITS
TIER = "laptop"


@dataclass(frozen=True, kw_only=True)
class Scale(training.Scale):
    tokens: int = 200_000
    step_width: int = 128  # the step whose bytes and seconds are measured
    step_layers: int = 4
    step_length: int = 256
    step_sequences: int = 8
    steps: int = 2  # timed, after one that is not
    loss_tokens: int = 512  # the loss by itself; 0: not measured
    loss_vocabulary: int = 65536
    loss_width: int = 256


QUICK = Scale(
    **training.QUICK,
    step_width=64,
    step_layers=2,
    step_length=64,
    step_sequences=16,
    steps=1,
    loss_tokens=64,
    loss_vocabulary=4096,
    loss_width=32,
)


def measure(choice: Choice, seed: int, settings: Settings) -> Measurement:
    bench = training.Bench.of(settings)
    model = bench.model(seed)
    record = bench.model_record(model)
    result = bench.train(model, seed, memory=[choice])
    job = {"choice": str(choice), "seed": seed, "scale": asdict(settings.scale), "device": settings.device}
    done = subprocess.run(
        [sys.executable, "-m", __name__], input=json.dumps(job), capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise ModicumError(f"measuring a step of memory/{choice} failed: {done.stderr.strip().splitlines()[-1:]}")
    reply = json.loads(done.stdout)
    metrics = {
        "bits_per_byte": bench.bits(model),
        "train_seconds": result.seconds,
        "train_loss": result.loss,
        "tokens": result.tokens,
        **reply,
    }
    return Measurement(
        metrics=metrics,
        cost=Cost(seconds=result.seconds, flops=result.flops, tokens=result.tokens, peak_bytes=reply["peak_bytes"]),
        model=record,
        data=bench.corpus.record,
    )


def worker(choice: str, seed: int, scale: Scale, device: str) -> dict[str, float]:
    """What this process measures: one step of a run with `choice`, and the loss."""
    import torch

    from modicum.train.forecast import blank, step_cost

    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).mallopt(-3, 1 << 16)  # freed blocks above 64 KiB go back: what is live is resident
    # First, because first calls load code and allocate buffers that are no step's.
    plain, gradient = _step(None, seed, scale, device, steps=0), _step(choice, seed, scale, device, steps=0)
    error = torch.linalg.vector_norm(gradient["flat"] - plain["flat"]) / torch.linalg.vector_norm(plain["flat"])
    del plain, gradient
    saved: list[dict[str, Any]] = []
    peak, _ = _peak(lambda: saved.append(_step(choice, seed, scale, device, scale.steps)), device)
    shape, config = _shape(scale), _config(choice, seed, scale, device)
    planned = step_cost(lambda: blank(shape), config, shape.vocab_size).peak_bytes
    result = {
        "peak_bytes": peak,
        "planned_bytes": float(planned),
        "step_seconds": saved[0]["seconds"],
        "gradient_error": float(error),
    }
    return result | (_loss(choice, seed, scale, device) if scale.loss_tokens else {})


def _shape(scale: Scale) -> Any:
    from modicum.model.config import llama_like

    return llama_like(scale.vocabulary, scale.step_width, scale.step_layers, context_length=scale.step_length)


def _config(choice: str | None, seed: int, scale: Scale, device: str) -> Any:
    from modicum.train.config import TrainConfig

    return TrainConfig(
        steps=100,
        sequence_length=scale.step_length,
        batch_sequences=scale.step_sequences,
        dtype=scale.dtype,
        seed=seed,
        device=device,
        memory=[choice] if choice else [],
    )


def _step(choice: str | None, seed: int, scale: Scale, device: str, steps: int) -> dict[str, Any]:
    """One step and `steps` more: seconds of one of those, and the last gradient where there are none."""
    import torch

    from modicum.bench import fixtures
    from modicum.data.stream import Batch
    from modicum.model.decoder import Decoder
    from modicum.train.engine import TrainEngine
    from modicum.train.objectives import Step

    engine = TrainEngine(Decoder(_shape(scale), fixtures.seeded(seed)), _config(choice, seed, scale, device))
    engine.build()
    rows, length = scale.step_sequences, scale.step_length
    tokens_BT = torch.randint(scale.vocabulary, (rows, length + 1), generator=fixtures.seeded(seed))
    batch = Batch(
        tokens_BT[:, :-1].contiguous(),
        tokens_BT[:, 1:].contiguous(),
        None,
        torch.arange(length).expand(rows, length),
    )
    began = time.perf_counter()
    for index in range(steps + 1):
        began = time.perf_counter() if index == 1 else began
        engine.steps_done = index
        scales = engine.schedule.scale(0, 1)
        engine.optimizer.begin(scales)
        engine.gradients(batch, rows * length, Step(index, 0, 1, seed))
        if not steps:
            return {"flat": torch.cat([p.grad.flatten().float() for p in engine.named.values() if p.grad is not None])}
        engine.update(scales)
    return {"seconds": (time.perf_counter() - began) / steps}


def _loss(choice: str, seed: int, scale: Scale, device: str) -> dict[str, float]:
    """Bytes and seconds of forward and backward pass of the loss alone, weights and hidden states not counted."""
    import torch
    from torch import nn

    from modicum.bench import fixtures
    from modicum.core import registry
    from modicum.train import loss

    N, D, V = scale.loss_tokens, scale.loss_width, scale.loss_vocabulary
    dtype, draw = getattr(torch, scale.dtype), fixtures.seeded(seed)

    class Headed(nn.Module):
        """A model that is all head."""

        config = SimpleNamespace(logit_softcap=None)
        hidden = None

        def __init__(self) -> None:
            super().__init__()
            self.lm_head = nn.Linear(D, V, bias=False, dtype=dtype, device=device)
            with torch.no_grad():
                self.lm_head.weight.copy_(torch.randn(V, D, generator=draw) / math.sqrt(D))

        def head(self, h: torch.Tensor) -> torch.Tensor:
            return self.lm_head(h)

    model = Headed()
    h_1ND = torch.randn(1, N, D, generator=draw).to(device, dtype).requires_grad_()
    # Frequencies as in text: the r-th entry comes about as often as 1/r.
    targets_1N = torch.rand(1, N, generator=draw).mul(math.log(V)).exp().long().clamp(0, V - 1).to(device)
    saver = registry.build("memory", choice)

    def once(naive: bool) -> None:
        model.zero_grad(set_to_none=True)
        h_1ND.grad = None
        if naive:
            logits = model.head(h_1ND[0]).float()
            nn.functional.cross_entropy(logits, targets_1N[0], reduction="sum").backward()
            return
        around = (
            saver.around(SimpleNamespace(model=model)) if "loss_memory" in saver.provides else contextlib.nullcontext()
        )
        with around:
            loss.cross_entropy(h_1ND, targets_1N, model.head)[0].backward()

    losses: dict[str, float] = {}
    for name, naive in (("loss", False), ("naive_loss", True)):
        model.zero_grad(set_to_none=True)
        losses[f"{name}_bytes"], losses[f"{name}_seconds"] = _peak(lambda naive=naive: once(naive), device)  # type: ignore[misc]
    return losses


def _peak(work: Callable[[], Any], device: str) -> tuple[float, float]:
    """Bytes by which `work` raises this process's peak, and its seconds."""
    import torch

    from modicum.budget.meter import Meter, resident_now

    gc.collect()
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)
    before = torch.cuda.memory_allocated() if torch.device(device).type == "cuda" else resident_now()
    with Meter() as meter:
        work()
    return float(meter.peak_bytes - before), meter.seconds


if __name__ == "__main__":
    job = json.loads(sys.stdin.read())
    print(json.dumps(worker(job["choice"], job["seed"], Scale(**job["scale"]), job["device"])))
