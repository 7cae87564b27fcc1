"""A decoder from a GGUF file, and a model folder for one that lies by itself."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from modicum.core.errors import CorruptError, UserError
from modicum.core.files import atomic_directory, cache_home, fingerprint
from modicum.model import form_state
from modicum.model.attach import forms
from modicum.model.config import DecoderConfig
from modicum.model.decoder import Decoder
from modicum.model.gguf import read


def load(
    path: str | Path,
    shape: DecoderConfig | None = None,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    keep_quantized: bool = False,
) -> Decoder:
    """A `Decoder` with the file's weights in `dtype` (None: bfloat16), in eval mode.

    keep_quantized: matrices in Q4_0, Q4_1 and Q8_0 keep their codes as forms int4 and int8. Raises `CorruptError`
    for damaged files and `UserError` for models that this decoder does not build.
    """
    file = read.GGUFFile(path)
    shape = shape or read.config(file)
    wanted = dtype or torch.bfloat16
    with torch.device("meta"):
        model = Decoder(shape)
    if keep_quantized:
        description = read.described_forms(file, shape, wanted)
        if description is not None:
            kept = set(description["forms"])
            form_state.restore(model, description, dtype=wanted, device=device)
            tensors = dict(read.codes(file, shape, kept))
            inside = {id(p) for form in forms(model).values() for p in form.parameters()}
            biases = {n for n, p in model.named_parameters() if id(p) in inside}
            plain = {n: tuple(p.shape) for n, p in model.named_parameters() if n in biases}
            tensors |= dict(read.parameters(file, shape, plain, wanted))
            form_state.load_form_state(model, tensors, wanted)
    _fill(model, file, shape, wanted, torch.device(device))
    return model.eval()


def _fill(model: Decoder, file: read.GGUFFile, shape: DecoderConfig, dtype: torch.dtype, device: torch.device) -> None:
    """Give every parameter outside forms its stored value."""
    inside = {id(p) for form in forms(model).values() for p in form.parameters()}
    plain = {n: p for n, p in model.named_parameters(remove_duplicate=False) if id(p) not in inside}
    if shape.tied and "embed.weight" in plain:
        plain.pop("lm_head.weight", None)
    missing = set(plain)
    for name, value in read.parameters(file, shape, {n: tuple(p.shape) for n, p in plain.items()}, dtype):
        owner, _, attribute = name.rpartition(".")
        trained = plain[name].requires_grad
        setattr(model.get_submodule(owner), attribute, nn.Parameter(value.to(device), requires_grad=trained))
        missing.discard(name)
    if missing:
        raise CorruptError(
            f"{file.path} lacks {len(missing)} weights ({min(missing)}, ...) of the model that its metadata "
            "describes; fetch it again"
        )
    if shape.tied and isinstance(model.embed, nn.Embedding) and isinstance(model.lm_head, nn.Linear):
        model.lm_head.weight = model.embed.weight


def folder_for(path: str | Path) -> Path:
    """A model folder for a GGUF file that lies by itself: config and tokenizer from its metadata, the file linked.

    Made once and kept in the user's cache directory under the file's path, size and time of change.
    """
    source = Path(path).expanduser().resolve()
    state = source.stat()
    folder = cache_home() / "gguf" / fingerprint([str(source), state.st_size, state.st_mtime_ns])[:16]
    if not (folder / read.FILE).exists():
        files = read.folder_files(source)
        if "tokenizer.json" not in files:
            raise UserError(f"{source} holds no tokenizer; give a file that does, or a folder with tokenizer.json")
        with atomic_directory(folder) as new:
            for name, data in files.items():
                (new / name).write_bytes(data)
            (new / read.FILE).symlink_to(source)
    return folder
