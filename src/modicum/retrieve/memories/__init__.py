"""port kvmemory: documents compressed to a bank of entries, from which a question gets a prefix for a frozen reader.

Shape letters: S documents of the bank, N vectors of an entry, W their width, Q questions.

A method is constructed as `cls(config, reader)` and trained once by `fit` on documents with questions and answers.
From then on documents are written in one forward pass each, no gradient is taken, and the reader's weights never
change. What is read is a `Prefix`: keys and values of every layer. Texts of documents are not kept.
"""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from modicum.core import choice, files, registry
from modicum.core.errors import CorruptError, UserError
from modicum.core.events import Events
from modicum.core.registry import build
from modicum.retrieve import manifest
from modicum.retrieve.prefix import FrozenReader, Prefix

BASELINE = "none"
FORMAT = 1
CLIP = 1.0  # largest norm of the gradient


@dataclass(frozen=True)
class Example:
    """A document, and something that can be answered from it."""

    document: str
    question: str
    answer: str


def prompt(question: str) -> str:
    """What the reader is given; the answer follows."""
    return f"Question: {question}\nAnswer: "


class Memory(registry.Method):
    """Base class. A method defines `compress`, `aggregate` and `loss`, and sets `net`, what is trained."""

    def __init__(self, config: Any, reader: FrozenReader):
        self.config, self.reader = config, reader
        self.net: nn.Module | None = None
        self.bank: dict[str, Tensor] = {}  # (N, W) of each document, float16

    def fit(
        self,
        examples: Sequence[Example],
        *,
        steps: int = 300,
        batch: int = 16,
        lr: float = 3e-4,
        seed: int = 0,
        events: Events | None = None,
    ) -> list[float]:
        """Train what compresses and reads; returns the losses. What the bank has is dropped: it was made otherwise."""
        if self.net is None or not steps:
            return []
        if len(examples) < 2:
            raise UserError(f"{len(examples)} examples cannot train a memory; give at least two documents' questions")
        self.bank.clear()
        parameters = {n: p for n, p in self.net.named_parameters() if p.requires_grad}
        optimizer = build("optimizer", "adamw:weight_decay=0.01", parameters.items(), lr=lr)
        losses: list[float] = []
        events = events or Events()
        size = min(batch, len(examples))
        per_epoch = len(examples) // size
        self.net.train()
        with events.progress("train memory", steps, "steps") as progress:
            for step in range(steps):
                epoch, part = divmod(step, per_epoch)
                order = np.random.default_rng([seed, epoch]).permutation(len(examples))
                chosen = [examples[i] for i in order[part * size : (part + 1) * size]]
                loss = self.loss(chosen, np.random.default_rng([seed, step, 1]))
                loss.backward()
                torch.nn.utils.clip_grad_norm_(parameters.values(), CLIP)
                done = (step + 0.5) / steps
                optimizer.step({"lr": min(done / 0.1, (1 - done) / 0.9)})
                for p in parameters.values():
                    p.grad = None
                losses.append(float(loss.detach()))
                progress.update(1, loss=losses[-1])
        self.net.eval()
        return losses

    def write(self, ids: Sequence[str], texts: Sequence[str]) -> None:
        """Compress documents under new ids; an id that is there is a `UserError`: remove it first."""
        if len(ids) != len(texts):
            raise UserError(f"{len(ids)} ids for {len(texts)} documents; give one for each")
        twice = next((i for n, i in enumerate(ids) if i in self.bank or i in ids[:n]), None)
        if twice is not None:
            raise UserError(f"document {twice!r} is already in the memory; remove it first or use another id")
        empty = next((i for i, text in zip(ids, texts, strict=True) if not text.strip()), None)
        if empty is not None:
            raise UserError(f"document {empty!r} is empty; leave it out")
        for start in range(0, len(ids), 16):
            with torch.inference_mode():
                entries_SNW = self.compress(texts[start : start + 16])
            self.bank.update(zip(ids[start : start + 16], entries_SNW.half().cpu(), strict=True))

    def remove(self, ids: Iterable[str]) -> int:
        """Forget these documents; those not there are skipped. Returns how many were there."""
        return sum(self.bank.pop(i, None) is not None for i in set(ids))

    def read(self, questions: Sequence[str]) -> Prefix | None:
        """One row for each question; None where there is nothing to read."""
        empty = [q for q, text in enumerate(questions) if not text.strip()]
        if empty:
            raise UserError(f"question {empty[0]} is empty; write what you want to know")
        if not self.bank or not questions:
            return None
        with torch.inference_mode():
            entries_SNW = torch.stack(list(self.bank.values())).float().to(self.reader.model.device)
            return self.aggregate(questions, entries_SNW)

    def nbytes(self) -> int:
        """Bytes of the bank; what is trained is the same for any number of documents."""
        return sum(e.numel() * e.element_size() for e in self.bank.values())

    @abstractmethod
    def compress(self, texts: Sequence[str]) -> Tensor:
        """entries_SNW of documents."""

    @abstractmethod
    def aggregate(self, questions: Sequence[str], entries_SNW: Tensor) -> Prefix | None:
        """The prefix of each question from these entries, in whatever order they come."""

    @abstractmethod
    def loss(self, examples: Sequence[Example], rng: np.random.Generator) -> Tensor:
        """A scalar, from a batch whose documents are the bank."""

    @property
    def key(self) -> str:
        return next(m.key for m in registry.methods("kvmemory").values() if m.module == type(self).__module__)

    def save(self, path: str | Path) -> None:
        """Write the folder `path` atomically: what is trained, and the bank; not the reader."""
        from safetensors.torch import save_file

        with files.atomic_directory(path) as folder:
            trained = {} if self.net is None else self.net.state_dict()
            save_file({n: p.detach().contiguous() for n, p in trained.items()}, folder / "net.safetensors")
            rows = {str(n): e.contiguous() for n, e in enumerate(self.bank.values())}
            save_file(rows, folder / "bank.safetensors")
            files.write_json(folder / "ids.json", list(self.bank))
            header = {"format": FORMAT, "method": self.key, "knobs": dataclasses.asdict(self.config)}
            files.write_json(folder / "kvmemory.json", header | {"files": manifest.describe(folder)})


def open_memory(path: str | Path, reader: FrozenReader) -> Memory:
    """The memory saved in folder `path`, for the reader that it was made for."""
    from safetensors.torch import load_file

    folder = Path(path)
    header = manifest.read_header(folder, "kvmemory.json", "memory", "Memory.save")
    if header.get("format") != FORMAT:
        raise CorruptError(f"{folder} has format {header.get('format')!r}, this version reads {FORMAT}; make it again")
    manifest.verify(folder, header["files"])
    made: Memory = build("kvmemory", choice.Choice("kvmemory", header["method"], header["knobs"]), reader)
    if made.net is not None:
        try:
            made.net.load_state_dict(load_file(folder / "net.safetensors"))
        except RuntimeError:
            raise UserError(
                f"{folder} was made for a reader of another shape; give the model it was made for"
            ) from None
        made.net.eval()
    rows = load_file(folder / "bank.safetensors")
    made.bank = {name: rows[str(n)] for n, name in enumerate(files.read_json(folder / "ids.json"))}
    return made
