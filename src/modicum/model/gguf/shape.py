"""A model's shape from the metadata of its GGUF file: the other direction of `architectures.metadata`.

What the file does not say is what llama.cpp's graph of that architecture does.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from modicum.core.errors import UserError, unknown
from modicum.core.gguf import GgufFile, dequantize
from modicum.core.gguf.tokenizer import stop_ids
from modicum.model.config import DecoderConfig, Rope, by_layer
from modicum.model.gguf.architectures import ARCHITECTURES, Architecture, graph_scale
from modicum.model.rope import frequencies

#: Layers of a period that slide, by architecture: all but the last, where the file has no pattern.
PERIODS = {"gemma2": 2, "gemma3": 6}
SCALINGS = ("none", "linear", "yarn", "longrope")


def architecture_of(file: GgufFile) -> Architecture:
    known = next((arch for arch in ARCHITECTURES if arch.name == file.architecture), None)
    if known is None:
        raise unknown(f"general.architecture in {file.path}", file.architecture, (a.name for a in ARCHITECTURES))
    return known


def config_of(file: GgufFile) -> DecoderConfig:
    """The shape of the model in a GGUF file. Raises `UserError` for what cannot be computed faithfully."""
    arch = architecture_of(file)
    width, heads = _number(file, "embedding_length"), _number(file, "attention.head_count")
    head_dim = _number(file, "attention.key_length", width // heads)
    if _number(file, "attention.value_length", head_dim) != head_dim:
        raise UserError(f"{file.path} has values of another size than keys, which this decoder does not compute")
    if "token_embd.weight" not in file.tensors:
        raise UserError(f"{file.path} has no token_embd.weight; it holds a vocabulary only, or another kind of model")
    layers, context = _number(file, "block_count"), _number(file, "context_length")
    epsilon = (
        "attention.layer_norm_epsilon" if arch.fixed.get("norm") == "layer" else "attention.layer_norm_rms_epsilon"
    )
    fields: dict[str, Any] = arch.fixed | {
        "family": arch.families[0],
        "vocab_size": file.tensors["token_embd.weight"].shape[0],
        "width": width,
        "layers": layers,
        "heads": heads,
        "kv_heads": _number(file, "attention.head_count_kv", heads),
        "head_dim": head_dim,
        "mlp_width": _number(file, "feed_forward_length"),
        "context_length": context,
        "norm_eps": _decimal(file.require(f"{arch.name}.{epsilon}")),
        "tied": "output.weight" not in file.tensors,
    }
    fields |= _optional(file, arch, fields)
    windows = _windows(file, arch, layers)
    columns: dict[str, Sequence[Any]] = {"window": windows}
    if fields.get("position", "rope") == "rope":
        rope = fields["rope"] = _rope(file, head_dim, context)
        columns["rope"] = [rope] * layers
        if arch.name == "gemma3":
            local = Rope(theta=_decimal(file.metadata.get("gemma3.rope.freq_base_swa", 10000.0)))
            columns["rope"] = [local if window else rope for window in windows]
        if arch.name == "smollm3":
            columns["rope"] = [rope if (i + 1) % 4 else None for i in range(layers)]
    fields["overrides"] = by_layer(**columns)
    metadata, stops = file.metadata, stop_ids(file)
    config = DecoderConfig(
        **fields,
        bos_id=metadata.get("tokenizer.ggml.bos_token_id"),
        pad_id=metadata.get("tokenizer.ggml.padding_token_id"),
        eos_ids=tuple(stops),
    )
    if arch.name in PERIODS:
        config = dataclasses.replace(config, scale=graph_scale(config, arch))
    return config


def _optional(file: GgufFile, arch: Architecture, fields: dict[str, Any]) -> dict[str, Any]:
    """What some architectures have: biases and softcaps."""
    given: dict[str, Any] = {}
    ends = {"qkv_bias": "attn_q.bias", "o_bias": "attn_output.bias", "mlp_bias": "ffn_down.bias"}
    for name, end in ends.items():
        if name in arch.free:
            given[name] = f"blk.0.{end}" in file.tensors
    if arch.name.startswith("gemma"):
        given["embed_scale"] = fields["width"] ** 0.5
    if arch.name == "gemma2":
        given["attention_softcap"] = _decimal(file.metadata.get("gemma2.attn_logit_softcapping", 50.0))
        given["logit_softcap"] = _decimal(file.metadata.get("gemma2.final_logit_softcapping", 30.0))
    if arch.name == "gemma3" and "gemma3.final_logit_softcapping" in file.metadata:
        given["logit_softcap"] = _decimal(file.metadata["gemma3.final_logit_softcapping"])
    if arch.name == "gptneox":
        given["parallel"] = bool(file.metadata.get("gptneox.use_parallel_residual", True))
        given["activation"] = "gelu"
    return given


def _windows(file: GgufFile, arch: Architecture, layers: int) -> list[int | None]:
    window = file.metadata.get(f"{arch.name}.attention.sliding_window")
    if arch.name == "phi3":
        return [window or None] * layers
    if arch.name not in PERIODS:
        return [None] * layers
    window = window or 4096
    pattern = file.metadata.get(f"{arch.name}.attention.sliding_window_pattern", PERIODS[arch.name])
    if not isinstance(pattern, list):
        pattern = [(i + 1) % pattern != 0 for i in range(layers)]
    return [window if slides else None for slides in pattern[:layers]]


def _rope(file: GgufFile, head_dim: int, context: int) -> Rope:
    def value(key: str, default: Any = None) -> Any:
        return file.metadata.get(f"{file.architecture}.rope.{key}", default)

    theta, rotated = _decimal(value("freq_base", 10000.0)), value("dimension_count", head_dim)
    plain = Rope(theta=theta, fraction=rotated / head_dim)
    kind = value("scaling.type", "none")
    # Old files have the factor of linear scaling without its name.
    factor = value("scaling.factor") or value("scale_linear")
    original = value("scaling.original_context_length", context)
    if "rope_freqs.weight" in file.tensors:
        return _llama3(file, plain, head_dim)
    if {"rope_factors_long.weight", "rope_factors_short.weight"} <= set(file.tensors):
        factors = {
            f"{length}_factor": [_decimal(f) for f in dequantize(file.tensors[f"rope_factors_{length}.weight"])]
            for length in ("long", "short")
        }
        options = factors | {"original_max_position_embeddings": original}
        if value("scaling.attn_factor") is not None:
            options["attention_factor"] = _decimal(value("scaling.attn_factor"))
        return dataclasses.replace(plain, kind="longrope", options=options)
    if kind not in SCALINGS or kind == "longrope":
        raise unknown(f"rope.scaling.type in {file.path}", kind, SCALINGS)
    if kind == "yarn":
        options = {"factor": _decimal(factor), "original_max_position_embeddings": original}
        for ours, key in (("beta_fast", "scaling.yarn_beta_fast"), ("beta_slow", "scaling.yarn_beta_slow")):
            if value(key) is not None:
                options[ours] = _decimal(value(key))
        return dataclasses.replace(plain, kind="yarn", options=options)
    if factor and factor != 1:
        return dataclasses.replace(plain, kind="linear", options={"factor": _decimal(factor)})
    return plain


def _llama3(file: GgufFile, plain: Rope, head_dim: int) -> Rope:
    """Llama 3's stretching from the factors that files store instead of its four numbers.

    Between the two bends the inverse of the factor is linear in the number of turns over the original context, so
    two of the factors there give both bends; that the numbers reproduce all factors is checked.
    """
    factors = torch.from_numpy(dequantize(file.tensors["rope_freqs.weight"]).astype(np.float64))
    angles, _ = frequencies(plain, head_dim, 1)
    whole = float(factors.max())
    options = {"factor": _decimal(whole), "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    tries = [options | {"original_max_position_embeddings": 8192}]
    blend = (1 / factors - 1 / whole) / (1 - 1 / whole) if whole > 1 else torch.zeros_like(factors)
    between = (blend > 1e-6) & (blend < 1 - 1e-6)
    if int(between.sum()) >= 2:
        turns = angles.double() / (2 * torch.pi)  # per token
        design = torch.stack([turns[between], -torch.ones_like(turns[between])], 1)
        slope, offset = torch.linalg.lstsq(design, blend[between, None]).solution[:, 0].tolist()
        high = 1 + 1 / offset
        tries.append(options | {"high_freq_factor": high, "original_max_position_embeddings": slope * (high - 1)})
    for candidate in tries:
        rope = dataclasses.replace(plain, kind="llama3", options=candidate)
        again = angles / frequencies(rope, head_dim, 1)[0]
        if torch.allclose(again.double(), factors, rtol=1e-4):
            return rope
    raise UserError(f"{file.path} stretches its rotation by factors that are not Llama 3's; this decoder lacks those")


def _number(file: GgufFile, key: str, default: int | None = None) -> int:
    """A count; where the file has one per layer, they must be the same."""
    key = f"{file.architecture}.{key}"
    value = file.metadata.get(key, default) if default is not None else file.require(key)
    values = set(value) if isinstance(value, list) else {value}
    if len(values) != 1:
        raise UserError(f"{file.path} has {key} that differs from layer to layer; this decoder has one for all layers")
    return int(values.pop())


def _decimal(value: Any) -> float:
    """The shortest decimal that is this float32: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))
