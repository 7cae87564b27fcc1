"""Compress a stored model: its linear layers go into a form, and the folder says what it takes on disk."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modicum.core import registry
from modicum.core.choice import Choice
from modicum.core.errors import UserError
from modicum.core.events import Events
from modicum.core.files import write_json
from modicum.model import attach
from modicum.model.decoder import Decoder
from modicum.model.folder import find_folder, load_model, save_model
from modicum.model.forms import LinearForm

ROWS = 4096    # of a matrix compared at a time, so that a large table needs no second copy in float32
WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "modicum.json")


@dataclass(frozen=True)
class CompressResult:
    """Bytes are those of the weight files on disk; bits are of the compressed matrices alone.

    error: ||W - dense()|| / ||W|| (Frobenius) over all compressed matrices together; worst_module and
    worst_error: the one that lost most.
    """

    form: str
    folder: str
    modules: int
    weights: int                # entries of the compressed matrices
    bits_per_weight: float
    bytes: int
    original_bytes: int
    error: float
    worst_module: str
    worst_error: float
    seconds: float

    @property
    def ratio(self) -> float:
        """How many times smaller the weight files are."""
        return self.original_bytes / self.bytes

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"ratio": self.ratio}


def compress(model_folder: str | Path, choice: Any, folder: str | Path, *,
             targets: Sequence[str] = ("layers.*",), embeddings: Any = None, head: Any = None,
             events: Events | None = None) -> CompressResult:
    """Fit the form `choice` to the linear layers that `targets` name and save what `load_model` reads.

    embeddings, head: forms for the token embedding and the output head, which stay as they are by default; a
    head tied to the embedding shares its form. Raises `UserError` for a pattern that matches nothing and for
    a form that cannot be put there; nothing is written then.
    """
    began = time.perf_counter()
    source = find_folder(model_folder)
    if Path(folder).resolve() == source.resolve():
        raise UserError(f"{folder} is the model itself; write the compressed one to another folder")
    picked = Choice.parse("form", choice)
    for form in (picked, *(Choice.parse("form", f) for f in (embeddings, head) if f is not None)):
        kind: Any = registry.load("form", form.method).cls
        if "adapter" in kind.supports:
            raise UserError(f"the form {form.method!r} is an adapter, which adds to the weights; choose one "
                            "that holds them in less, for instance int4:group=64")
        form.config()
    model = load_model(source)
    plan: dict[str, Any] = dict.fromkeys(targets, picked)
    if head is not None:
        if model.config.tied and embeddings is None:
            raise UserError("the head is tied to the embedding, so a form for the head alone would store it "
                            "twice; give a form for the embeddings, which both then share")
        if not model.config.tied or Choice.parse("form", head) != Choice.parse("form", embeddings):
            plan["lm_head"] = head
    tally = _Tally()
    for name, pattern in attach.match(model, plan).items():
        _one(model, name, plan[pattern], tally)
    if embeddings is not None:
        table: Any = model.embed
        weight = table.weight.detach()
        tally.add("embed", weight, attach.attach_embedding(model, "embed", embeddings))
    save_model(model, folder, source)
    result = CompressResult(
        form=str(picked), folder=str(folder), modules=tally.modules, weights=tally.weights,
        bits_per_weight=8 * tally.bytes / tally.weights, bytes=weight_bytes(folder),
        original_bytes=weight_bytes(source), error=(tally.lost / tally.norm) ** 0.5 if tally.norm else 0.0,
        worst_module=tally.worst[1], worst_error=tally.worst[0], seconds=time.perf_counter() - began)
    write_json(Path(folder) / "compress.json", result.as_dict())
    if events:
        events.emit("compressed", **result.as_dict())
    return result


def weight_bytes(folder: str | Path) -> int:
    """Bytes of a model folder's weights and of what describes them; configuration and tokenizer left out."""
    return sum(path.stat().st_size for pattern in WEIGHTS for path in Path(folder).glob(pattern))


@dataclass
class _Tally:
    modules: int = 0
    weights: int = 0
    bytes: int = 0
    lost: float = 0.0
    norm: float = 0.0
    worst: tuple[float, str] = (0.0, "")

    def add(self, name: str, weight_OI: Tensor, form: Any) -> None:
        lost = norm = 0.0
        for after, before in zip(form.dense().split(ROWS), weight_OI.split(ROWS), strict=True):
            lost += (after.float() - before.float()).square().sum(dtype=torch.float64).item()
            norm += before.float().square().sum(dtype=torch.float64).item()
        self.modules += 1
        self.weights += weight_OI.numel()
        self.bytes += form.nbytes()
        self.lost, self.norm = self.lost + lost, self.norm + norm
        self.worst = max(self.worst, ((lost / norm) ** 0.5 if norm else 0.0, name))


@torch.no_grad()
def _one(model: Decoder, name: str, choice: Any, tally: _Tally) -> None:
    """Replace one layer; its weight is freed before the next, so the peak is the model and one layer."""
    layer = model.get_submodule(name)
    if isinstance(layer, LinearForm):
        raise UserError(f"module {name!r} holds the form {layer.choice} already; compress the model it came "
                        "from")
    weight_OI = attach.plain(layer)[0].detach()
    tally.add(name, weight_OI, attach.attach(model, {name: choice})[name])
