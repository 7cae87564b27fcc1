"""A model as a Hugging Face folder: loading shard by shard, saving bit for bit."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from modicum.budget import units
from modicum.core import gguf
from modicum.core.errors import CorruptError, UserError, unknown
from modicum.core.files import atomic_directory, write_json
from modicum.model import elastic, form_state, sources
from modicum.model.attach import forms
from modicum.model.config import DecoderConfig
from modicum.model.decoder import Decoder
from modicum.model.families import (
    Rule,
    expand,
    families,
    is_ignored,
    pack,
    read_config,
    stored_shape,
    unpack,
    write_config,
)
from modicum.model.safetensor import Item, SafetensorsFile, write_safetensors

DTYPE_NAMES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
    "float64": torch.float64,
}
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "generation_config.json",
)
FORMS_JSON, FORMS_FILE = "modicum.json", "modicum.safetensors"
HEADS = ("lm_head.weight", "embed_out.weight")  # stored again by some, though tied to the embedding
_HUB_ID = re.compile(r"^[\w.-]+/[\w.-]+$")


def parse_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    if isinstance(dtype, str):
        if dtype.removeprefix("torch.") not in DTYPE_NAMES:
            raise unknown("dtype", dtype, DTYPE_NAMES)
        return DTYPE_NAMES[dtype.removeprefix("torch.")]
    return dtype


def find_folder(path_or_name: str | Path) -> Path:
    """The folder itself, the folder of a known name, or the local snapshot of a hub id; the latter two are fetched
    if need be.

    A text without a slash that `model.sources` knows is that model, unless a folder of the same name in the
    working directory holds config.json; `./NAME` is always the folder.
    """
    text = str(path_or_name)
    if isinstance(path_or_name, str):
        text = sources.resolve(text)
    path = Path(text).expanduser()
    if path.is_dir():
        return path
    if path.is_file() and path.suffix == ".gguf":
        from modicum.model.gguf.read import folder_for

        return folder_for(path)
    if path.is_file():
        raise UserError(
            f"{text} is a file; give a .gguf file, or the folder that holds config.json and model.safetensors"
        )
    if not _HUB_ID.match(text) or text.startswith((".", "/", "~")):
        if re.fullmatch(r"[\w.-]+", text) and not text.startswith("."):
            sources.source(text)  # refuses it with the nearest name
        raise UserError(
            f"no model at {text}; give a folder with config.json and model.safetensors, a hub id OWNER/NAME, or a "
            f"known name ({', '.join(sources.sources())})"
        )
    from huggingface_hub import snapshot_download

    try:
        wanted = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
        return Path(snapshot_download(text, allow_patterns=wanted))
    except Exception as error:  # the hub's client raises a dozen unrelated types
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"no folder {text}, and the hub did not give it ({type(error).__name__}: "
            f"{reason[:160]}); check the name and the network, or give a local folder"
        ) from None


def load_config(path_or_hub_id: str | Path) -> DecoderConfig:
    """The shape of a stored model, without its weights."""
    return _read_config(find_folder(path_or_hub_id))


def _read_config(folder: Path) -> DecoderConfig:
    path = folder / "config.json"
    if not path.exists():
        if (file := gguf.file_in(folder)) is not None:
            from modicum.model.gguf.shape import config_of

            return config_of(gguf.GgufFile(file))
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
            raise UserError(
                f"{index} names {missing[0]}, which is not in {folder} "
                f"({len(missing)} of {len(names)} shards missing); fetch the model again"
            )
        return [folder / n for n in names]
    if (folder / "model.safetensors").exists():
        return [folder / "model.safetensors"]
    if list(folder.glob("*.bin")) or list(folder.glob("*.pt")) or list(folder.glob("*.pth")):
        raise UserError(
            f"{folder} holds pickled weights (.bin), which can run code when opened and are not "
            "read; convert them to model.safetensors first (transformers: "
            "model.save_pretrained(FOLDER) writes it)"
        )
    raise UserError(f"{folder} has no model.safetensors nor model.safetensors.index.json; give a folder with weights")


def load_model(
    path_or_hub_id: str | Path,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str = "cpu",
    size: float | str | None = None,
    *,
    keep_quantized: bool = False,
) -> Decoder:
    """A `Decoder` with the weights of a Hugging Face folder or hub id, in eval mode.

    `dtype` None keeps each tensor's own. Weights are in memory once: the modules are made without
    storage and each tensor goes from its shard to its place, converted on the way. Linear forms that the
    folder describes are attached again. `size` ("24MiB"): of a folder in blocks (`model.elastic`), so many
    bytes of weights at most; without it, all blocks. A GGUF file, or a folder that holds model.gguf instead of
    safetensors, loads like its Hugging Face folder; `keep_quantized`, without a dtype and on a CPU, leaves its
    matrices in Q4_0, Q4_1 and Q8_0 as they are (linear form `ggml`) instead of in bfloat16. Raises `UserError` for
    what is missing, unexpected, misshapen or of an unknown family, and `CorruptError` for damaged files.
    """
    wanted, device = parse_dtype(dtype), torch.device(device)
    lone = gguf.file_in(Path(path_or_hub_id).expanduser())  # its tokenizer is of no interest here
    folder = lone or find_folder(path_or_hub_id)
    if (file := gguf.file_in(folder)) is not None:
        from modicum.model.gguf.read import load

        if size is not None:
            raise UserError(f"size={size!r} is for a folder in blocks (modicum compress --stack); {file} is not one")
        return load(file, wanted, device, keep_quantized=keep_quantized and wanted is None and device.type == "cpu")
    config = _read_config(folder)
    with torch.device("meta"):
        model = Decoder(config)
    stored_forms = _restore_forms(model, folder, wanted, device)
    fill_weights(model, folder, wanted, device, beside=stored_forms)
    if size is not None or elastic.elastic_forms(model):
        elastic.resize(model, folder, None if size is None else units.parse(size, "bytes"))
    return model.eval()


def _restore_forms(model: Decoder, folder: Path, dtype: torch.dtype | None, device: torch.device) -> Path | None:
    """Attach and fill the forms described in modicum.json; the file that holds them, None without any."""
    if not (folder / FORMS_JSON).exists():
        return None
    try:
        description = json.loads((folder / FORMS_JSON).read_text(encoding="utf-8"))
    except ValueError as error:
        raise CorruptError(f"{FORMS_JSON} in {folder} is not valid JSON ({error}); write it again") from None
    form_state.restore(model, elastic.emptied(description), dtype=dtype, device=device)
    path = folder / FORMS_FILE
    if not path.exists():
        raise CorruptError(f"{folder} describes linear forms but lacks {FORMS_FILE}; write the folder again")
    with SafetensorsFile(path) as file:
        plain = set(_plain_parameters(model))
        form_state.load_form_state(model, file.mapping(n for n in file.names if n not in plain), dtype)
    return path


def _plain_parameters(model: Decoder) -> dict[str, nn.Parameter]:
    """Parameters outside forms, a tied head once."""
    inside = {id(p) for form in forms(model).values() for p in form.parameters()}
    named = {n: p for n, p in model.named_parameters(remove_duplicate=False) if id(p) not in inside}
    if model.config.tied and "embed.weight" in named:
        named.pop("lm_head.weight", None)
    return named


def fill_weights(
    model: Decoder, folder: Path, dtype: torch.dtype | None, device: torch.device, beside: Path | None = None
) -> None:
    """Give every plain parameter its stored value; `beside` holds those the family has no place for."""
    config = model.config
    family = families()[config.family]
    parameters = _plain_parameters(model)
    plan = expand(config, parameters)
    homeless = set(parameters) - {n for rule in plan.values() for n in rule.ours}
    if beside is not None:
        plan |= {n: Rule(n, (n,)) for n in homeless}
    filled: dict[str, Tensor] = {}
    unexpected: list[str] = []
    second_head: Tensor | None = None
    for shard in [*_shards(folder), *([beside] if beside is not None else [])]:
        with SafetensorsFile(shard) as file:
            for name in file.names:
                spellings = (name, family.prefix + name, family.aliases.get(name, name))
                rule = next((plan[n] for n in spellings if n in plan), None)
                if rule is not None:
                    _fill(filled, rule, file, name, parameters, config.head_dim, dtype, device)
                elif config.tied and name in HEADS:
                    second_head = file.read(name)
                elif shard != beside and not is_ignored(config, name):
                    unexpected.append(name)
    missing = [stored for stored, rule in plan.items() if any(n not in filled for n in rule.ours)]
    for what, names in (("lacks", missing), ("has unexpected", unexpected)):
        if names:
            raise UserError(
                f"{folder} {what} {len(names)} weight(s) for a {config.family} model: "
                f"{', '.join(names[:4])}{', ...' if len(names) > 4 else ''}; config.json and "
                "weights do not belong together"
            )
    if second_head is not None and not torch.equal(second_head.to(device, dtype), filled["embed.weight"].to(dtype)):
        raise UserError(
            f"{folder}: config.json ties the head to the embedding but the file holds another "
            "head; set tie_word_embeddings to false in config.json"
        )
    for name, tensor in filled.items():
        owner, _, attribute = name.rpartition(".")
        trained = parameters[name].requires_grad
        setattr(model.get_submodule(owner), attribute, nn.Parameter(tensor, requires_grad=trained))
    if config.tied and isinstance(model.embed, nn.Embedding) and isinstance(model.lm_head, nn.Linear):
        model.lm_head.weight = model.embed.weight


def _fill(
    filled: dict[str, Tensor],
    rule: Rule,
    file: SafetensorsFile,
    name: str,
    parameters: dict[str, nn.Parameter],
    head_dim: int,
    dtype: torch.dtype | None,
    device: torch.device,
) -> None:
    """Read one stored tensor into `filled`, under the names of the parameters it holds."""
    shapes = [tuple(parameters[n].shape) for n in rule.ours]
    if file.shape(name) != stored_shape(rule, shapes):
        raise UserError(
            f"{file.path}: {name} has shape {file.shape(name)}, config.json asks for "
            f"{stored_shape(rule, shapes)}; config and weights are of different models"
        )
    for target, part in zip(rule.ours, unpack(rule, file.read(name), shapes, head_dim), strict=True):
        part = part.to(device, dtype or part.dtype)
        # A part of a larger tensor gets its own storage, so that nothing keeps the whole alive.
        alone = part.is_contiguous() and part.untyped_storage().nbytes() == part.nbytes
        filled[target] = part if alone else part.clone(memory_format=torch.contiguous_format)


def save_model(
    model: Decoder, folder: str | Path, tokenizer_folder: str | Path | None = None, *, max_shard_bytes: int = 5 << 30
) -> None:
    """Write a Hugging Face folder that `transformers` loads: config.json, safetensors, tokenizer files.

    The folder appears whole or not at all, and replaces one of the same name. Weights keep their dtype; a
    model that was loaded and not changed is written with the tensors it was read from, bit for bit. Attached
    forms go into modicum.json and modicum.safetensors beside it; such a folder is whole for modicum only
    (`merge` before saving makes it whole for everyone).
    """
    config = model.config
    if (
        config.tied
        and isinstance(model.lm_head, nn.Linear)
        and model.lm_head.weight is not getattr(model.embed, "weight", None)
    ):
        config = model.config = dataclasses.replace(config, tied=False)  # a method gave the head its own
    parameters = _plain_parameters(model)
    plan = expand(config, parameters)
    homeless = sorted(set(parameters) - {name for rule in plan.values() for name in rule.ours})
    description = form_state.describe(model)
    if homeless and description is None:
        raise UserError(
            f"a {config.family} folder has no place for {', '.join(homeless[:4])}; choose "
            f"another family for this shape (families: {', '.join(families())})"
        )
    items: list[Item] = []
    for stored, rule in plan.items():
        parts = [parameters[n].data for n in rule.ours]
        items.append(
            (
                stored,
                stored_shape(rule, [tuple(p.shape) for p in parts]),
                parts[0].dtype,
                partial(pack, rule, parts, config.head_dim),
            )
        )
    dtype = str(model.dtype).removeprefix("torch.")
    with atomic_directory(Path(folder)) as new:
        write_json(new / "config.json", write_config(config, dtype))
        _write_shards(new, items, max_shard_bytes)
        if description is not None:
            blocks = elastic.block_items(model)
            if blocks:
                write_safetensors(new / elastic.BLOCKS_FILE, blocks.values(), as_given=True)
            state = form_state.form_state(model) | {n: parameters[n] for n in homeless}
            write_safetensors(
                new / FORMS_FILE,
                [(n, tuple(x.shape), x.dtype, partial(_itself, x)) for n, x in state.items() if n not in blocks],
            )
            write_json(new / FORMS_JSON, description)
        if tokenizer_folder is not None:
            copied = [n for n in TOKENIZER_FILES if (Path(tokenizer_folder) / n).is_file()]
            if not copied and gguf.file_in(tokenizer_folder) is not None:
                from modicum.model.gguf.read import folder_files

                made = folder_files(tokenizer_folder)
                for name in made.keys() & set(TOKENIZER_FILES):
                    (new / name).write_bytes(made[name])
            elif not copied:
                raise UserError(f"{tokenizer_folder} has no tokenizer files; it should hold tokenizer.json")
            for name in copied:
                shutil.copyfile(Path(tokenizer_folder) / name, new / name)


def _itself(tensor: Tensor) -> Tensor:
    return tensor


def _write_shards(folder: Path, items: list[Item], limit: int) -> None:
    shards: list[list[Item]] = [[]]
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
    where: dict[str, str] = {}
    for i, shard in enumerate(shards, 1):
        name = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(folder / name, shard)
        where |= {item[0]: name for item in shard}
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": where})
