"""Compress a stored model by a method of the port compressor, block by block, and go on where a killed run stopped."""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from modicum.compress import calibration as calibrate
from modicum.compress.blocks import Walk
from modicum.compress.compressors import Compressor
from modicum.compress.run import CompressResult, members, weight_bytes
from modicum.core import compose, registry
from modicum.core.choice import Choice
from modicum.core.errors import UserError
from modicum.core.events import Events
from modicum.core.files import fingerprint, read_json, write_json
from modicum.data.tokenizer import Tokenizer
from modicum.model import attach
from modicum.model.config import DecoderConfig
from modicum.model.decoder import Decoder
from modicum.model.folder import find_folder, load_config, load_model, save_model

REMEDY = "give --calibration CURATED, a folder of text, or python (this Python's documentation)"


def compress_with(
    model_folder: str | Path,
    choice: Any,
    folder: str | Path,
    *,
    targets: Sequence[str] = ("layers.*",),
    embeddings: Any = None,
    per_matrix: Mapping[str, Mapping[str, Any]] | None = None,
    calibration: str | Path | Tensor | None = None,
    sequences: int = 64,
    length: int = 512,
    events: Events | None = None,
) -> CompressResult:
    """Compress the layers that `targets` name by the method `choice` and save what `load_model` reads.

    embeddings: a form for the token embedding (and a head tied to it), fitted by itself. per_matrix: knobs of single
    matrices by full name, in place of the method's. calibration: text of which `sequences` sequences of `length` tokens
    are read, or tokens_NT. Finished blocks lie in `.NAME.compressing` beside `folder` until it
    is written; the same call goes on from them. Raises `UserError` for what does not go together, patterns that match
    nothing and layers outside the blocks; nothing is written then.
    """
    began = time.perf_counter()
    source, out = find_folder(model_folder), Path(folder)
    if out.resolve() == source.resolve():
        raise UserError(f"{folder} is the model itself; write the compressed one to another folder")
    picked = Choice.parse("compressor", choice)
    shape = load_config(source)
    compose.resolve(setting_up(picked, shape, calibration is not None), options={"calibration_text": REMEDY})
    method: Compressor = registry.build("compressor", picked)
    method.per_matrix = per_matrix or {}
    method.check(shape)
    if embeddings is not None:
        compose.resolve(members(embeddings))
    model = load_model(source)
    if attach.forms(model):
        raise UserError(f"{source} holds linear forms already; compress the model it came from")
    names = list(attach.match(model, targets))
    if outside := [name for name in names if not name.startswith("layers.")]:
        raise UserError(
            f"{picked.method!r} compresses decoder blocks, and {outside[0]!r} is in none; give --targets 'layers.*' "
            "and a form for the embedding: --embeddings int8"
        )
    tokens_NT: Tensor | None = None
    if calibration is not None and reads_text(picked):
        limit = min(length, model.config.context_length)
        tokens_NT = calibration if isinstance(calibration, Tensor) else _tokens(calibration, source, sequences, limit)
    work = out.with_name(f".{out.name}.compressing")
    prepare(work, _plan(source, picked, names, tokens_NT, method.per_matrix))
    rows = Walk(model, method, names, tokens_NT, work).run(events or Events())
    model = method.finish(model)
    if embeddings is not None:
        attach.attach_embedding(model, "embed", Choice.parse("linear", embeddings))
    save_model(model, out, source)
    weights, norm = sum(r["weights"] for r in rows), sum(r["norm"] for r in rows)
    worst = max(rows, key=lambda r: r["lost"] / r["norm"] if r["norm"] else 0.0)
    result = CompressResult(
        form=str(picked),
        folder=str(folder),
        modules=len(rows),
        weights=weights,
        bits_per_weight=8 * sum(r["bytes"] for r in rows) / weights,
        bytes=weight_bytes(out),
        original_bytes=weight_bytes(source),
        error=(sum(r["lost"] for r in rows) / norm) ** 0.5 if norm else 0.0,
        worst_module=worst["name"],
        worst_error=(worst["lost"] / worst["norm"]) ** 0.5 if worst["norm"] else 0.0,
        seconds=time.perf_counter() - began,
        zeros=sum(r["zeros"] for r in rows) / weights,
        layers=model.config.layers,
    )
    write_json(out / "compress.json", result.as_dict())
    shutil.rmtree(work)
    if events:
        events.emit("compressed", **result.as_dict())
    return result


def compress_model(
    model: Decoder, choice: Any, tokens_NT: Tensor | None, work: Path, events: Events | None = None
) -> Decoder:
    """Compress all blocks of a model in memory; `work` is the folder of its finished blocks and streams."""
    method: Compressor = registry.build("compressor", choice)
    names = [name for name in attach.linears(model) if name.startswith("layers.")]
    Walk(model, method, names, tokens_NT if reads_text(choice) else None, work).run(events or Events())
    return method.finish(model)


def setting_up(choice: Any, config: DecoderConfig, text: bool) -> list[compose.Member]:
    """A method, the model and the text that it is given, for `core.compose.resolve`."""
    norm_sites = {layer.norm_place for layer in config.per_layer}
    model = compose.setting(
        f"a {config.family} model", provides={"pre_norm"} if norm_sites <= {"pre", "sandwich"} else ()
    )
    given = [compose.setting("calibration text", provides={"calibration_text"})] if text else []
    return [compose.member("compressor", choice), model, *given]


def reads_text(choice: Any) -> bool:
    """Whether a method looks at calibration text under these knobs; others are not shown any."""
    return "calibration_text" in compose.member("compressor", choice).requires


def _tokens(calibration: str | Path, source: Path, sequences: int, length: int) -> Tensor:
    if sequences < 1 or length < 2:
        raise UserError(
            f"{sequences} sequences of {length} tokens are too few to calibrate with; give at least 1 of 2 tokens"
        )
    return calibrate.sequences(calibrate.texts(calibration), Tokenizer.load(source), sequences, length)


def _plan(
    source: Path,
    choice: Choice,
    names: list[str],
    tokens_NT: Tensor | None,
    per_matrix: Mapping[str, Mapping[str, Any]],
) -> str:
    """A fingerprint of all that decides the result."""
    return fingerprint(
        {
            "files": model_files(source),
            "method": choice.resolved(),
            "modules": names,
            "tokens": tokens_hash(tokens_NT),
            "batches": calibrate.BATCH,
            "per_matrix": {name: dict(knobs) for name, knobs in per_matrix.items()},
        }
    )


def model_files(source: Path) -> list[tuple[str, int, int]]:
    """Name, size and time of the files that a model's weights come from, for a fingerprint."""
    files = sorted(p for pattern in ("*.safetensors", "*.gguf", "config.json") for p in source.glob(pattern))
    return [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in files]


def tokens_hash(tokens_NT: Tensor | None) -> str | None:
    return None if tokens_NT is None else hashlib.sha256(tokens_NT.numpy().tobytes()).hexdigest()


def prepare(work: Path, plan: str) -> None:
    """Keep a work folder of the same plan, and begin anew in place of another."""
    path = work / "plan.json"
    if work.exists() and not (path.exists() and read_json(path)["plan"] == plan):
        shutil.rmtree(work)
    write_json(path, {"plan": plan})
