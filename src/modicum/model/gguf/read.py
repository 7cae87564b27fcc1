"""A decoder from a GGUF file: every tensor type that the gguf package can dequantise, straight from the mapped file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from modicum.core import registry
from modicum.core.choice import Choice
from modicum.core.errors import UserError
from modicum.core.files import atomic_directory, cache_home, fingerprint
from modicum.core.gguf import NAME, GgufFile, GgufTensor, dequantize, file_in
from modicum.core.gguf.tokenizer import stop_ids, tokenizer_of, tokenizer_settings
from modicum.model.attach import FormEmbedding, linears
from modicum.model.decoder import Decoder
from modicum.model.families import stored_shape, write_config
from modicum.model.gguf.architectures import from_gguf, plan
from modicum.model.gguf.shape import architecture_of, config_of
from modicum.model.linear import LinearForm, LinearShape
from modicum.model.linear.ggml import HEADER

PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
IGNORED = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")  # read with the config
LAYOUT = 1  # raised when `folder_files` makes other files of the same metadata
CHUNK = 1 << 21  # weights that are dequantised at once


def load(
    path: str | Path,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    *,
    keep_quantized: bool = False,
) -> Decoder:
    """A `Decoder` in eval mode with the weights of a GGUF file.

    dtype None: as the file's matrices are; bfloat16 for quantised ones. keep_quantized: matrices in blocks that the
    linear form `ggml` has stay in them, the others and what is no matrix are in `dtype`. What is stored in `dtype`
    stays where the file is mapped and comes into memory as it is used.
    """
    file = GgufFile(path)
    arch, config = architecture_of(file), config_of(file)
    dtype = dtype or own_dtype(file)
    with torch.device("meta"):
        model = Decoder(config)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    if config.tied:
        parameters.pop("lm_head.weight", None)
    rules = plan(arch, config, parameters)
    _require_all(file, set(rules))
    modules = linears(model)
    for name, rule in sorted(rules.items(), key=lambda item: len(file.tensors[item[0]].shape), reverse=True):
        tensor = file.tensors[name]  # matrices first: biases are then a form's, where one has taken over the matrix
        shapes = [tuple(parameters[ours].shape) for ours in rule.ours]
        if tensor.shape != stored_shape(rule, shapes):
            raise UserError(
                f"{file.path}: {name} has shape {tensor.shape}, its metadata asks for {stored_shape(rule, shapes)}"
            )
        owners = [ours.rpartition(".")[0] for ours in rule.ours]
        if keep_quantized and tensor.type.lower() in HEADER and all(o == "embed" or o in modules for o in owners):
            rows = from_gguf(arch, config, rule, torch.from_numpy(tensor.blocks), [(n, -1) for n, _ in shapes])
            for owner, part, shape in zip(owners, rows, shapes, strict=True):
                _put_form(model, owner, tensor.type.lower(), part, shape, f"{owner}.bias" in parameters, dtype, device)
            continue
        values = from_gguf(
            arch, config, rule, values_of(tensor, torch.float32 if len(tensor.shape) == 1 else dtype), shapes
        )
        for ours, owner, part in zip(rule.ours, owners, values, strict=True):
            trained = not isinstance(model.get_submodule(owner), LinearForm)
            value = nn.Parameter(part.to(device, dtype).contiguous(), requires_grad=trained)
            setattr(model.get_submodule(owner), ours.rpartition(".")[2], value)
    if config.tied and isinstance(model.embed, nn.Embedding):
        model.lm_head.weight = model.embed.weight
    return model.eval()


def _put_form(
    model: Decoder,
    name: str,
    type_: str,
    blocks_OB: Tensor,
    shape: tuple[int, ...],
    bias: bool,
    dtype: torch.dtype,
    device: torch.device | str,
) -> None:
    """A `ggml` form with these blocks where the module `name` stands; under a tied head too."""
    choice = Choice("linear", "ggml", {"type": type_})
    made = LinearShape(out_features=shape[0], in_features=shape[1], bias=bias, dtype=dtype, device=device)
    form: Any = registry.build("linear", choice, made)
    form.choice = choice
    form.take_blocks(blocks_OB).eval()
    if name == "embed":
        model.embed = FormEmbedding(form)  # type: ignore[assignment]
        if model.config.tied:
            model.lm_head = form
        return
    parent, _, key = name.rpartition(".")
    setattr(model.get_submodule(parent), key, form)


def own_dtype(file: GgufFile) -> torch.dtype:
    """What to compute in where nobody says: what all matrices are stored as, bfloat16 where any is quantised."""
    types = {tensor.type for tensor in file.tensors.values() if len(tensor.shape) > 1}
    return PLAIN.get(types.pop(), torch.bfloat16) if len(types) == 1 else torch.bfloat16


def _require_all(file: GgufFile, wanted: set[str]) -> None:
    have = set(file.tensors) - set(IGNORED)
    for what, names in (("has unexpected", have - wanted), ("lacks", wanted - have)):
        if names:
            shown = ", ".join(sorted(names)[:4]) + (", ..." if len(names) > 4 else "")
            raise UserError(f"{file.path} {what} {len(names)} tensor(s) for a {file.architecture} model: {shown}")


def values_of(tensor: GgufTensor, dtype: torch.dtype) -> Tensor:
    """The tensor in `dtype`: a view of the map if that is how it is stored, else new memory."""
    if tensor.type in PLAIN:
        return torch.from_numpy(tensor.blocks).view(PLAIN[tensor.type]).view(tensor.shape).to(dtype)
    rows_NB = tensor.blocks.reshape(-1, tensor.blocks.shape[-1])
    columns = tensor.shape[-1]
    out_NI = torch.empty(len(rows_NB), columns, dtype=dtype)
    step = max(1, CHUNK // columns)
    for at in range(0, len(rows_NB), step):
        some = rows_NB[at : at + step]
        part = GgufTensor(tensor.name, tensor.type, (len(some), columns), some)
        out_NI[at : at + step] = torch.from_numpy(dequantize(part))
    return out_NI.view(tensor.shape)


def folder_files(path: str | Path) -> dict[str, bytes]:
    """What a Hugging Face folder of this model holds beside its weights, by file name: made from the metadata.

    path: a GGUF file, or a folder with `model.gguf`.
    """
    where = file_in(path)
    if where is None:
        raise UserError(f"{path} is no GGUF file and holds no model.gguf")
    file = GgufFile(where)
    config = config_of(file)
    stops = stop_ids(file)
    ends = {
        "bos_token_id": config.bos_id,
        "eos_token_id": stops if len(stops) > 1 else next(iter(stops), None),
        "pad_token_id": config.pad_id,
    }
    dtype = str(own_dtype(file)).removeprefix("torch.")
    made = {
        "config.json": write_config(config, dtype),
        "generation_config.json": {key: value for key, value in ends.items() if value is not None},
    }
    has_tokenizer = file.metadata.get("tokenizer.ggml.model", "none") not in ("none", "no_vocab")
    if has_tokenizer:
        made["tokenizer_config.json"] = tokenizer_settings(file)
    contents = {name: (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode() for name, value in made.items()}
    if has_tokenizer:
        contents["tokenizer.json"] = tokenizer_of(file).to_str(pretty=True).encode()
    template = file.metadata.get("tokenizer.chat_template")
    if template:
        contents["chat_template.jinja"] = template.encode()
    return contents


def folder_for(path: str | Path) -> Path:
    """A model's folder for a GGUF file that lies by itself: config and tokenizer from its metadata, the file linked.

    Made once, since a large vocabulary takes seconds, and kept in the user's cache under the file's path, size and
    time of change.
    """
    source = Path(path).expanduser().resolve()
    state = source.stat()
    folder = cache_home() / "gguf" / fingerprint([LAYOUT, str(source), state.st_size, state.st_mtime_ns])
    if not (folder / NAME).exists():
        made = folder_files(source)
        with atomic_directory(folder) as new:
            for name, data in made.items():
                (new / name).write_bytes(data)
            (new / NAME).symlink_to(source)
    return folder
