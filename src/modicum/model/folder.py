"""A model as a Hugging Face folder: loading shard by shard, saving bit for bit."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from modicum.core.errors import CorruptError, UserError, unknown
from modicum.core.files import atomic_directory
from modicum.model.config import DecoderConfig
from modicum.model.decoder import Decoder
from modicum.model.families import expand, families, is_ignored, pack, read_config, stored_shape, unpack, write_config
from modicum.model.safetensor import SafetensorsFile, write_safetensors

DTYPE_NAMES = {"float32": torch.float32, "fp32": torch.float32, "bfloat16": torch.bfloat16, "bf16": torch.bfloat16,
               "float16": torch.float16, "fp16": torch.float16, "float64": torch.float64}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
                   "vocab.json", "merges.txt", "tokenizer.model", "chat_template.jinja", "generation_config.json")
HEADS = ("lm_head.weight", "embed_out.weight")  # stored again by some, though tied to the embedding
_HUB_ID = re.compile(r"^[\w.-]+/[\w.-]+$")


def parse_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    if isinstance(dtype, str):
        if dtype.removeprefix("torch.") not in DTYPE_NAMES:
            raise unknown("dtype", dtype, DTYPE_NAMES)
        return DTYPE_NAMES[dtype.removeprefix("torch.")]
    return dtype


def find_folder(path_or_hub_id: str | Path) -> Path:
    """The folder itself, or the local snapshot of a Hugging Face hub id (fetched if need be)."""
    path = Path(path_or_hub_id).expanduser()
    if path.is_dir():
        return path
    text = str(path_or_hub_id)
    if path.is_file():
        raise UserError(f"{text} is a file; give the folder that holds config.json and model.safetensors")
    if not _HUB_ID.match(text) or text.startswith((".", "/", "~")):
        raise UserError(f"no model at {text}; give a folder with config.json and model.safetensors, or a hub id OWNER/NAME")
    from huggingface_hub import snapshot_download
    try:
        return Path(snapshot_download(text, allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]))
    except Exception as error:  # the hub's client raises a dozen unrelated types
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"no folder {text}, and the hub did not give it ({type(error).__name__}: {reason[:160]}); check the "
                        "name and the network, or give a local folder") from None


def load_config(path_or_hub_id: str | Path) -> DecoderConfig:
    """The shape of a stored model, without its weights."""
    return _read_config(find_folder(path_or_hub_id))


def _read_config(folder: Path) -> DecoderConfig:
    path = folder / "config.json"
    if not path.exists():
        raise UserError(f"{folder} has no config.json; give a Hugging Face model folder")
    try:
        hf = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CorruptError(f"{path} is not valid JSON ({error}); fetch or write it again") from None
    return read_config(hf, str(path))


def _shards(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.exists():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError) as error:
            raise CorruptError(f"{index} is not a valid index ({error}); fetch it again") from None
        missing = [n for n in names if Path(n).name != n or not (folder / n).is_file()]
        if missing:
            raise UserError(f"{index} names {missing[0]}, which is not in {folder} ({len(missing)} of {len(names)} shards "
                            "missing); fetch the model again")
        return [folder / n for n in names]
    if (folder / "model.safetensors").exists():
        return [folder / "model.safetensors"]
    if list(folder.glob("*.bin")) or list(folder.glob("*.pt")) or list(folder.glob("*.pth")):
        raise UserError(f"{folder} holds pickled weights (.bin), which can run code when opened and are not read; convert them "
                        "to model.safetensors first (transformers: model.save_pretrained(FOLDER) writes it)")
    raise UserError(f"{folder} has no model.safetensors nor model.safetensors.index.json; give a folder with weights")


def load_model(path_or_hub_id: str | Path, dtype: torch.dtype | str | None = None,
               device: torch.device | str = "cpu") -> Decoder:
    """A `Decoder` with the weights of a Hugging Face folder or hub id, in eval mode.

    `dtype` None keeps each tensor's own. Weights are in memory once: the modules are made without
    storage and each tensor goes from its shard to its place, converted on the way. Raises `UserError` for
    what is missing, unexpected, misshapen or of an unknown family, and `CorruptError` for damaged files.
    """
    folder = find_folder(path_or_hub_id)
    config, wanted, device = _read_config(folder), parse_dtype(dtype), torch.device(device)
    with torch.device("meta"):
        model = Decoder(config)
    fill_weights(model, folder, wanted, device)
    return model.eval()


def fill_weights(model: Decoder, folder: Path, dtype: torch.dtype | None, device: torch.device) -> None:
    """Give every parameter of `model` its stored value, replacing what it held."""
    config = model.config
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)}
    if config.tied:
        del shapes["lm_head.weight"]
    plan = expand(config, shapes)
    family = families()[config.family]
    filled: dict[str, Tensor] = {}
    unexpected = []
    for shard in _shards(folder):
        with SafetensorsFile(shard) as file:
            for name in file.names:
                rule = plan.get(name) or plan.get(family.prefix + name) or plan.get(family.aliases.get(name, ""))
                if rule is None:
                    if not is_ignored(config, name) and not (config.tied and name in HEADS):
                        unexpected.append(name)
                    continue
                ours = [shapes[n] for n in rule.ours]
                if file.shape(name) != stored_shape(rule, ours):
                    raise UserError(f"{shard.name}: {name} has shape {file.shape(name)}, config.json asks for "
                                    f"{stored_shape(rule, ours)}; config and weights are of different models")
                for target, part in zip(rule.ours, unpack(rule, file.read(name), ours, config.head_dim), strict=True):
                    part = part.to(device, dtype or part.dtype)
                    # A part of a larger tensor gets its own storage, so that nothing keeps the whole alive.
                    alone = part.is_contiguous() and part.untyped_storage().nbytes() == part.nbytes
                    filled[target] = part if alone else part.clone(memory_format=torch.contiguous_format)
    missing = [stored for stored, rule in plan.items() if any(n not in filled for n in rule.ours)]
    for what, names in (("lacks", missing), ("has unexpected", unexpected)):
        if names:
            raise UserError(f"{folder} {what} {len(names)} weight(s) for a {config.family} model: {', '.join(names[:4])}"
                            f"{', ...' if len(names) > 4 else ''}; config.json and weights do not belong together")
    for name, tensor in filled.items():
        owner, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(owner), attribute, nn.Parameter(tensor))
    if config.tied:
        model.lm_head.weight = model.embed.weight


def save_model(model: Decoder, folder: str | Path, tokenizer_folder: str | Path | None = None, *,
               max_shard_bytes: int = 5 << 30) -> None:
    """Write a Hugging Face folder that `transformers` loads: config.json, safetensors, and the tokenizer's files.

    The folder appears whole or not at all, and replaces one of the same name. Weights keep their dtype; a
    model that was loaded and not changed is written with the tensors it was read from, bit for bit.
    """
    target = Path(folder)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    if model.config.tied:
        parameters.pop("lm_head.weight", None)
    plan = expand(model.config, parameters)
    covered = {name for rule in plan.values() for name in rule.ours}
    left = sorted(set(parameters) - covered)
    if left:
        raise UserError(f"a {model.config.family} folder has no place for {', '.join(left[:4])}; "
                        "merge or detach what was attached before saving")
    dtype = str(model.dtype).removeprefix("torch.")
    items: list[tuple[str, tuple[int, ...], torch.dtype, Callable[[], Tensor]]] = []
    for stored, rule in plan.items():
        parts = [parameters[n].data for n in rule.ours]
        items.append((stored, stored_shape(rule, [tuple(p.shape) for p in parts]), parts[0].dtype,
                      partial(pack, rule, parts, model.config.head_dim)))
    with atomic_directory(target) as new:
        (new / "config.json").write_text(json.dumps(write_config(model.config, dtype), indent=2) + "\n", encoding="utf-8")
        _write_shards(new, items, max_shard_bytes)
        if tokenizer_folder is not None:
            for name in TOKENIZER_FILES:
                if (Path(tokenizer_folder) / name).is_file():
                    shutil.copyfile(Path(tokenizer_folder) / name, new / name)


def _write_shards(folder: Path, items: list[Any], limit: int) -> None:
    shards: list[list[Any]] = [[]]
    size = total = 0
    for item in items:
        nbytes = item[2].itemsize * torch.Size(item[1]).numel()
        if shards[-1] and size + nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(item)
        size, total = size + nbytes, total + nbytes
    if len(shards) == 1:
        write_safetensors(folder / "model.safetensors", shards[0])
        return
    where = {}
    for i, shard in enumerate(shards, 1):
        name = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(folder / name, shard)
        where |= {item[0]: name for item in shard}
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": where}, indent=2) + "\n", encoding="utf-8")
