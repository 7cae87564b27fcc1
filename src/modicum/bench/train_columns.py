"""What `modicum bench train` times: whole optimizer steps of modicum, of transformers and of peft, on the same weights,
batches and settings.

Every column starts from the folder's weights and takes the same batches in turn: AdamW with decoupled decay on matrices
apart from the embedding, gradients limited to a norm of 1, a constant rate, bfloat16 with float32 weights behind it.
Whoever computes the same has the same losses, to rounding. Columns of transformers in mixed precision run under
autocast, as its Trainer does; `bf16` ones hold and update bfloat16 weights, which is quicker and loses small updates.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from modicum.bench.engine_worker import Columns
from modicum.core.errors import UserError
from modicum.data.batch import Batch
from modicum.model.folder import load_config, load_model

ADAPTER = "lora"  # the task that trains an adapter; the others train the whole model of their size
CHOICE = "lora:rank=8,alpha=16"
BETAS, EPS, DECAY, RATE, CLIP = (0.9, 0.95), 1e-8, 0.1, 1e-3, 1.0


@dataclass(frozen=True, kw_only=True)
class Size:
    """What is measured: parameters of the models that are pretrained, tokens of a row, rows of an optimizer step and of
    a forward pass; the same of a step that trains an adapter; steps of one turn."""

    models: tuple[str, ...] = ("5M", "20M")
    vocab: int = 8192
    length: int = 512
    rows: int = 8
    micro: int = 8
    adapter_rows: int = 2
    adapter_micro: int = 2
    rounds: int = 3


LOSSES: dict[str, list[float]] = {}


def losses() -> dict[str, list[float]]:
    """The loss of every step so far, by column."""
    return LOSSES


def tokens_of(size: Size, rows: int, vocabulary: int, step: int) -> torch.Tensor:
    """(rows, length + 1) token ids that can be learnt: walks with small steps, the same for everybody."""
    rng = np.random.default_rng((7, step))
    start = rng.integers(1, vocabulary, (rows, 1))
    walk = start + np.cumsum(rng.integers(1, 4, (rows, size.length + 1)), axis=1)
    return torch.from_numpy(walk % (vocabulary - 1) + 1)


def _rows(size: Size, task: str) -> tuple[int, int]:
    return (size.adapter_rows, size.adapter_micro) if task == ADAPTER else (size.rows, size.micro)


def _column(size: Size, name: str, task: str, step: Callable[[int], float]) -> Columns:
    """One optimizer step a turn, in tokens per second."""
    rows, taken = _rows(size, task)[0], LOSSES.setdefault(name, [])

    def timed() -> float:
        began = time.perf_counter()
        loss = step(len(taken))
        seconds = time.perf_counter() - began
        taken.append(loss)
        return rows * size.length / seconds

    return {name: timed}


# modicum ----------------------------------------------------------------------------------------------


def modicum(folder: Path, size: Size, task: str) -> Columns:
    return _modicum(folder, size, task)


def modicum_plain(folder: Path, size: Size, task: str) -> Columns:
    """The decoder as written, without kernels."""
    os.environ["MODICUM_NATIVE"] = "0"
    return _modicum(folder, size, task)


def _modicum(folder: Path, size: Size, task: str) -> Columns:
    from modicum.train.config import TrainConfig
    from modicum.train.loop import Trainer

    model = load_model(folder / task, dtype="float32")
    if task == ADAPTER:
        attach_adapter(model)
    rows, micro = _rows(size, task)
    config = TrainConfig(
        steps=1 << 30, sequence_length=size.length, batch_sequences=rows, micro_batch=micro, lr=RATE, clip=CLIP,
        device="cpu", schedule="constant:warmup=0",
        optimizer=f"adamw:beta1={BETAS[0]},beta2={BETAS[1]},eps={EPS},weight_decay={DECAY}",
    )  # fmt: skip
    trainer = Trainer(model, _Stream(size, model.config.vocab_size), config, None, label="")
    trainer.open()
    return _column(size, task, task, lambda _: trainer.step()["loss"])


class _Stream:
    """The bench's batches as a training stream."""

    choices = ()

    def __init__(self, size: Size, vocabulary: int):
        self.size, self.vocabulary, self.step = size, vocabulary, 0

    def state(self) -> dict[str, Any]:
        return {"step": self.step}

    def load_state(self, state: dict[str, Any]) -> None:
        self.step = state["step"]

    def next_batch(self, rows: int) -> Batch:
        tokens = tokens_of(self.size, rows, self.vocabulary, self.step)
        self.step += 1
        positions = torch.arange(self.size.length).expand(rows, -1)
        return Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), None, positions)


def attach_adapter(model: Any) -> None:
    from modicum.model import attach

    attach.attach(model, {"layers.*": CHOICE}, generator=torch.Generator().manual_seed(0))
    attach.freeze(model)


# transformers and peft --------------------------------------------------------------------------------


def transformers(folder: Path, size: Size, task: str) -> Columns:
    return _transformers(folder, size, task, compiled=False, half=False)


def transformers_compiled(folder: Path, size: Size, task: str) -> Columns:
    return _transformers(folder, size, task, compiled=True, half=False)


def transformers_bf16(folder: Path, size: Size, task: str) -> Columns:
    return _transformers(folder, size, task, compiled=False, half=True)


def transformers_bf16_compiled(folder: Path, size: Size, task: str) -> Columns:
    return _transformers(folder, size, task, compiled=True, half=True)


def _transformers(folder: Path, size: Size, task: str, *, compiled: bool, half: bool) -> Columns:
    """Under torch.compile, where wanted; an adapter is peft's, with float32 factors on a bfloat16 base."""
    from transformers import AutoModelForCausalLM

    adapter = task == ADAPTER
    dtype = torch.bfloat16 if half or adapter else torch.float32
    model = AutoModelForCausalLM.from_pretrained(folder / task, dtype=dtype).train()
    model.config.use_cache = False
    if adapter:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, folder / "adapter", is_trainable=True)
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    matrices = [p for name, p in named.items() if p.ndim >= 2 and "embed" not in name]
    rest = [p for name, p in named.items() if p.ndim < 2 or "embed" in name]
    groups = [{"params": matrices, "weight_decay": DECAY}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=RATE, betas=BETAS, eps=EPS, fused=True)
    forward = torch.compile(model) if compiled else model
    rows, micro = _rows(size, task)
    vocabulary = load_config(folder / task).vocab_size

    def step(number: int) -> float:
        tokens, total = tokens_of(size, rows, vocabulary, number), 0.0
        for start in range(0, rows, micro):
            inputs, targets = (t[start : start + micro].contiguous() for t in (tokens[:, :-1], tokens[:, 1:]))
            with torch.autocast("cpu", torch.bfloat16, enabled=not half):
                out = forward(input_ids=inputs, labels=targets, shift_labels=targets, use_cache=False)
            loss = out.loss * (len(inputs) / rows)
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(list(named.values()), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        return total

    return _column(size, task, task, step)


def prepare(folder: Path, size: Size, model: str | None, tasks: Sequence[str]) -> dict[str, int]:
    """Write the models of `tasks`, and the adapter that everybody starts from; parameters of each task."""
    from modicum.adapt.peft_format import save_peft
    from modicum.budget import units
    from modicum.compress.export import merged
    from modicum.model.config import llama_like, sized
    from modicum.model.decoder import Decoder
    from modicum.model.folder import find_folder, save_model

    counts: dict[str, int] = {}
    for name in (task for task in tasks if task != ADAPTER):
        shape = sized(units.parse(name, "parameters"), size.vocab, context_length=max(2048, size.length))
        save_model(Decoder(shape, torch.Generator().manual_seed(0)), folder / name)
        counts[name] = shape.parameters()
    if ADAPTER not in tasks:
        return counts
    if model is None:
        adapted = Decoder(llama_like(size.vocab, 128, 2), torch.Generator().manual_seed(0)).to(torch.bfloat16)
    else:
        adapted = load_model(find_folder(model), dtype="bfloat16")
        merged(adapted)
    if adapted.config.context_length < size.length:
        raise UserError(f"{model} has a context of {adapted.config.context_length} tokens; rows have {size.length}")
    save_model(adapted, folder / ADAPTER)
    counts[ADAPTER] = adapted.config.parameters()
    wide = adapted.float()
    attach_adapter(wide)
    save_peft(wide, folder / "adapter", base_model=str(folder / ADAPTER))
    return counts
