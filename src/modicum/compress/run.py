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

from modicum.compress import calibration as calibrate
from modicum.compress.stacking import sort_blocks
from modicum.core import compose, registry
from modicum.core.choice import Choice
from modicum.core.errors import UserError
from modicum.core.events import Events
from modicum.core.files import write_json
from modicum.data.tokenizer import Tokenizer
from modicum.model import attach, elastic
from modicum.model.decoder import Decoder
from modicum.model.folder import find_folder, load_model, save_model
from modicum.model.linear import LinearForm
from modicum.model.linear._elastic import Elastic, bits_of

ROWS = 4096  # of a matrix compared at a time, so that a large table needs no second copy in float32
WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "modicum.json", "*.gguf")


@dataclass(frozen=True)
class CompressResult:
    """Bytes are those of the weight files on disk; bits are of the compressed matrices alone.

    error: ||W - dense()|| / ||W|| (Frobenius) over all compressed matrices together; worst_module and
    worst_error: the one that lost most. least_bytes: of the weights loaded with one block per layer, for a
    form in blocks (see `model.elastic`), else 0.
    """

    form: str
    folder: str
    modules: int
    weights: int  # entries of the compressed matrices
    bits_per_weight: float
    bytes: int
    original_bytes: int
    error: float
    worst_module: str
    worst_error: float
    seconds: float
    least_bytes: int = 0
    zeros: float = 0.0  # part of the compressed matrices' entries that are zero; counted by a compressor alone
    layers: int = 0  # of the model written by a compressor

    @property
    def ratio(self) -> float:
        """How many times smaller the weight files are."""
        return self.original_bytes / self.bytes

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"ratio": self.ratio}


def compress(
    model_folder: str | Path,
    choice: Any,
    folder: str | Path,
    *,
    targets: Sequence[str] = ("layers.*",),
    embeddings: Any = None,
    head: Any = None,
    calibration: str | Path | None = None,
    sequences: int = 64,
    length: int = 512,
    events: Events | None = None,
) -> CompressResult:
    """Fit the form `choice` to the linear layers that `targets` name and save what `load_model` reads.

    embeddings, head: forms for the token embedding and the output head, which stay as they are by default; a
    head tied to the embedding shares its form. calibration: text (a curated folder, or anything the readers
    know) of which `sequences` pieces of `length` tokens show the forms the layers' inputs; a form in blocks
    needs it, and has its blocks sorted by as many pieces again. Raises `UserError` for a pattern that matches
    nothing and for a form that cannot be put there; nothing is written then.
    """
    began = time.perf_counter()
    source = find_folder(model_folder)
    if Path(folder).resolve() == source.resolve():
        raise UserError(f"{folder} is the model itself; write the compressed one to another folder")
    if sequences < 1 or length < 2:
        raise UserError(
            f"{sequences} sequences of {length} tokens are too few to calibrate with; give at least 1 of 2 tokens"
        )
    picked = Choice.parse("linear", choice)
    chosen = [picked, *(Choice.parse("linear", f) for f in (embeddings, head) if f is not None)]
    for form in chosen:
        compose.resolve(members(form))
    in_blocks = any(_is_elastic(form) for form in chosen)
    if in_blocks and calibration is None:
        raise UserError(
            f"{picked} loads the blocks first that matter most, which is measured on text; give "
            "some: --calibration CURATED, or a folder of text"
        )
    model = load_model(source)
    if elastic.elastic_forms(model):
        raise UserError(
            f"{source} holds its weights in blocks already; for fewer bytes type: modicum "
            f"compress {source} --size 24MiB --out {folder}"
        )
    tokens_NT = None
    if calibration is not None:
        tokens_NT = calibrate.sequences(
            calibrate.texts(calibration),
            Tokenizer.load(source),
            2 * sequences if in_blocks else sequences,
            min(length, model.config.context_length),
        )
    plan: dict[str, Any] = dict.fromkeys(targets, picked)
    if head is not None:
        if model.config.tied and embeddings is None:
            raise UserError(
                "the head is tied to the embedding, so a form for the head alone would store it "
                "twice; give a form for the embeddings, which both then share"
            )
        if not model.config.tied or Choice.parse("linear", head) != Choice.parse("linear", embeddings):
            plan["lm_head"] = head
    tally = _Tally()
    matched = attach.match(model, plan)
    inputs: dict[str, Tensor] = {}
    if tokens_NT is not None:
        inputs = calibrate.activations(model, tokens_NT[-sequences:], list(matched))
    for name, pattern in matched.items():
        _one(model, name, _whole(plan[pattern]), tally, inputs.pop(name, None))
    if embeddings is not None:
        table: Any = model.embed
        weight = table.weight.detach()
        tally.add("embed", weight, attach.attach_embedding(model, "embed", _whole(embeddings)))
    least = 0
    if in_blocks and tokens_NT is not None:
        forms = elastic.elastic_forms(model)
        sort_blocks(model, forms, tokens_NT[:sequences], events=events)
        choices = {name: plan[matched[name]] if name in matched else embeddings for name in forms}
        elastic.trim(forms, {name: bits_of(Choice.parse("linear", form).config()) for name, form in choices.items()})
        beyond = {name: range(1, form.loaded) for name, form in forms.items()}
        least = elastic.nbytes(model) - sum(forms[name].block_nbytes(i) for name in forms for i in beyond[name])
    tally.close()
    save_model(model, folder, source)
    result = CompressResult(
        form=str(picked),
        folder=str(folder),
        modules=tally.modules,
        weights=tally.weights,
        bits_per_weight=8 * tally.bytes / tally.weights,
        bytes=weight_bytes(folder),
        original_bytes=weight_bytes(source),
        error=(tally.lost / tally.norm) ** 0.5 if tally.norm else 0.0,
        worst_module=tally.worst[1],
        worst_error=tally.worst[0],
        seconds=time.perf_counter() - began,
        least_bytes=least,
    )
    write_json(Path(folder) / "compress.json", result.as_dict())
    if events:
        events.emit("compressed", **result.as_dict())
    return result


def weight_bytes(folder: str | Path) -> int:
    """Bytes of a model folder's weights and of what describes them; configuration and tokenizer left out."""
    return sum(path.stat().st_size for pattern in WEIGHTS for path in Path(folder).glob(pattern))


@dataclass
class _Tally:
    """What compressing lost. Of a form in blocks the loss is noted for any number of blocks, since how many
    stay is decided when all layers are there."""

    modules: int = 0
    weights: int = 0
    bytes: int = 0
    lost: float = 0.0
    norm: float = 0.0
    worst: tuple[float, str] = (0.0, "")
    noted: list[tuple[str, Any, float, list[float]]] = dataclasses.field(default_factory=list)

    def add(self, name: str, weight_OI: Tensor, form: Any) -> None:
        self.weights += weight_OI.numel()
        norm = _square(weight_OI)
        if isinstance(form, Elastic):
            left = weight_OI.float()
            lost = [_square(left := left - form.block_weight(i)) for i in range(form.loaded)]
        else:
            lost = [
                sum(
                    _square(after.float() - before.float())
                    for after, before in zip(form.dense().split(ROWS), weight_OI.split(ROWS), strict=True)
                )
            ]
        self.noted.append((name, form, norm, lost))

    def close(self) -> None:
        for name, form, norm, losses in self.noted:
            lost = losses[getattr(form, "loaded", 1) - 1]
            self.modules += 1
            self.bytes += form.nbytes()
            self.lost, self.norm = self.lost + lost, self.norm + norm
            self.worst = max(self.worst, ((lost / norm) ** 0.5 if norm else 0.0, name))


def _square(values: Tensor) -> float:
    return sum(part.float().square().sum(dtype=torch.float64).item() for part in values.split(ROWS))


def _whole(choice: Any) -> Choice:
    """A form in blocks is made with all of them; which ones stay is decided when they are sorted."""
    parsed = Choice.parse("linear", choice)
    if not _is_elastic(parsed):
        return parsed
    return Choice("linear", parsed.method, {k: v for k, v in parsed.knobs.items() if k != "bits"})


def _is_elastic(choice: Choice) -> bool:
    return issubclass(registry.load("linear", choice.method, LinearForm).cls, Elastic)


def members(form: Any) -> list[compose.Member]:
    """A form and what compressing asks of it, for `core.compose.resolve`."""
    remedy = "choose one that holds given weights in less, for instance int4:group=64"
    return [
        compose.member("linear", form),
        compose.setting("compressing", requires={"fit"}, conflicts={"adapter"}, remedy=remedy),
    ]


@torch.no_grad()
def _one(model: Decoder, name: str, choice: Any, tally: _Tally, inputs_RI: Tensor | None = None) -> None:
    """Replace one layer; its weight is freed before the next, so the peak is the model and one layer."""
    layer = model.get_submodule(name)
    if isinstance(layer, LinearForm):
        raise UserError(f"module {name!r} holds the form {layer.choice} already; compress the model it came from")
    weight_OI = attach.plain(layer)[0].detach()
    calibration = None if inputs_RI is None else {name: inputs_RI}
    tally.add(name, weight_OI, attach.attach(model, {name: choice}, calibration=calibration)[name])
