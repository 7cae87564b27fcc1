"""Architectures: how each family is written in GGUF, names of tensors and keys of metadata in both directions.

An architecture is a name that llama.cpp has a graph for. Whatever that graph does by itself (where norms stand,
which layers slide, how scores are scaled) is no metadata; a model that differs there cannot be written faithfully
and `require` refuses it. Tensors keep this package's layout but for two things: where llama.cpp rotates neighbouring
dimensions instead of halves, the rows of queries and keys are interleaved head by head, and a norm that is stored
minus one is written with the one added.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from modicum.core.errors import UserError
from modicum.model.config import DecoderConfig, Rope
from modicum.model.families import Rule, pack, rules, unpack
from modicum.model.rope import frequencies

OUTER = """
    token_embd.weight     embed.weight
    position_embd.weight  positions.weight
    output_norm.{}        norm.{}
    output.weight         lm_head.weight"""
NORMS = """
    blk.*.attn_norm.{}           layers.*.attention_norm.{}
    blk.*.ffn_norm.{}            layers.*.mlp_norm.{}
    blk.*.post_attention_norm.{} layers.*.attention_out_norm.{}
    blk.*.post_ffw_norm.{}       layers.*.mlp_out_norm.{}
    blk.*.attn_q_norm.{}         layers.*.attention.q_norm.{}
    blk.*.attn_k_norm.{}         layers.*.attention.k_norm.{}"""
SPLIT = """
    blk.*.attn_q.{}  layers.*.attention.q.{}
    blk.*.attn_k.{}  layers.*.attention.k.{}
    blk.*.attn_v.{}  layers.*.attention.v.{}"""
FUSED = "blk.*.attn_qkv.{} layers.*.attention.[q,k,v].{}"
OUT = "blk.*.attn_output.{} layers.*.attention.o.{}"
GATED = """
    blk.*.ffn_gate.{}  layers.*.mlp.gate.{}
    blk.*.ffn_up.{}    layers.*.mlp.up.{}
    blk.*.ffn_down.{}  layers.*.mlp.down.{}"""
GATE_UP = """
    blk.*.ffn_up.{}    layers.*.mlp.[gate,up].{}
    blk.*.ffn_down.{}  layers.*.mlp.down.{}"""


def _rules(*tables: str) -> tuple[Rule, ...]:
    text = "\n".join(tables)
    lines = [line.replace("{}", end) for end in ("weight", "bias") for line in text.splitlines() if line.strip()]
    return rules("\n".join(dict.fromkeys(lines)).replace("[", "{").replace("]", "}"))


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """`name` as in general.architecture, for the `families` here that it computes.

    fixed: fields of `DecoderConfig` that its graph never varies and whose value is not the field's default;
    free: fields that its tensors or keys decide; interleaved: its rotation pairs neighbouring dimensions.
    """

    name: str
    families: tuple[str, ...]
    rules: tuple[Rule, ...] = _rules(OUTER, NORMS, SPLIT, OUT, GATED)
    fixed: dict[str, Any] = field(default_factory=dict)
    free: tuple[str, ...] = ()
    interleaved: bool = False
    tied: bool | None = None  # None: output.weight may be absent, then the embedding is the head
    square: bool = False  # heads * head_dim must be the width
    ropes: tuple[str, ...] = ("default", "linear", "yarn", "llama3")


GEMMA = {"norm": "rms_plus_one", "activation": "gelu_tanh"}
LAYER_NORM = {"norm": "layer", "gated": False, "qkv_bias": True, "o_bias": True, "mlp_bias": True}
ARCHITECTURES = (
    Architecture(
        name="llama", families=("llama", "mistral"), free=("qkv_bias", "o_bias", "mlp_bias"), interleaved=True
    ),
    Architecture(name="smollm3", families=("smollm3",), interleaved=True),
    Architecture(name="qwen2", families=("qwen2",), fixed={"qkv_bias": True}, square=True),
    Architecture(name="qwen3", families=("qwen3",), fixed={"qk_norm": "head"}),
    Architecture(
        name="olmo2", families=("olmo2",), fixed={"qk_norm": "full", "norm_place": "output"}, tied=False, square=True
    ),
    Architecture(name="gemma", families=("gemma",), fixed=GEMMA, tied=True),
    Architecture(name="gemma2", families=("gemma2",), fixed=GEMMA | {"norm_place": "sandwich"}, tied=True),
    Architecture(name="gemma3", families=("gemma3",), fixed=GEMMA | {"norm_place": "sandwich", "qk_norm": "head"}),
    Architecture(
        name="phi3", families=("phi3",), rules=_rules(OUTER, NORMS, FUSED, OUT, GATE_UP), square=True,
        ropes=("default", "longrope"),
    ),
    Architecture(
        name="gpt2", families=("gpt2",), rules=_rules(OUTER, NORMS, FUSED, OUT, GATED), square=True,
        fixed=LAYER_NORM | {"activation": "gelu_tanh", "position": "learned"},
    ),
    Architecture(
        name="gptneox", families=("gpt_neox",), rules=_rules(OUTER, NORMS, FUSED, OUT, GATED), square=True,
        fixed=LAYER_NORM, free=("parallel", "activation"), tied=False, ropes=("default",),
    ),
)  # fmt: skip
STRUCTURE = (
    "norm", "norm_place", "final_norm", "parallel", "gated", "activation", "qkv_bias", "o_bias", "mlp_bias", "qk_norm",
    "position", "position_offset", "mixer", "attention", "embed_width",
)  # fmt: skip
# Keys of metadata, behind "ARCHITECTURE.", that are a field of `DecoderConfig` as it stands.
KEYS = {
    "block_count": "layers",
    "context_length": "context_length",
    "embedding_length": "width",
    "feed_forward_length": "mlp_width",
    "attention.head_count": "heads",
    "attention.head_count_kv": "kv_heads",
    "attention.key_length": "head_dim",
    "attention.value_length": "head_dim",
    "vocab_size": "vocab_size",
}


def architecture(config: DecoderConfig) -> Architecture:
    """The architecture of a model's family. Raises `UserError` where llama.cpp has none."""
    for candidate in ARCHITECTURES:
        if config.family in candidate.families:
            return candidate
    known = ", ".join(sorted(f for a in ARCHITECTURES for f in a.families))
    raise UserError(f"GGUF has no architecture for the family {config.family}; families that can be written: {known}")


def require(config: DecoderConfig) -> Architecture:
    """The architecture that computes exactly this model. Raises `UserError` naming what it would compute otherwise."""
    arch = architecture(config)
    fields = DecoderConfig.__dataclass_fields__
    wrong = [
        f"{name}={getattr(config, name)!r}"
        for name in STRUCTURE
        if name not in arch.free and getattr(config, name) != arch.fixed.get(name, fields[name].default)
    ]
    if "activation" in arch.free and config.activation not in ("gelu", "gelu_tanh"):
        wrong.append(f"activation={config.activation!r}")
    embed_scale = math.sqrt(config.width) if arch.name.startswith("gemma") else None
    if config.embed_scale != embed_scale and not _close(config.embed_scale, embed_scale):
        wrong.append(f"embed_scale={config.embed_scale}")
    if not _close(config.per_layer[0].attention_scale, graph_scale(config, arch)):
        wrong.append(f"scale={config.scale}")
    for name, having in (("attention_softcap", ("gemma2",)), ("logit_softcap", ("gemma2", "gemma3"))):
        value = getattr(config, name)
        if (value is not None and arch.name not in having) or (value is None and arch.name == "gemma2"):
            wrong.append(f"{name}={value}")
    if differ := config.varying - {"window", "rope"}:
        wrong.append(f"layers that differ in {', '.join(sorted(differ))}")
    local = local_rope(config)
    for i, layer in enumerate(config.per_layer):
        rope = local if arch.name == "gemma3" and layer.window else config.rope
        if config.position == "rope" and layer.rope != (None if arch.name == "smollm3" and i % 4 == 3 else rope):
            wrong.append(f"rope={layer.rope} in layer {i}")
            break
    if config.rope.kind not in arch.ropes or (arch.interleaved and config.rope.fraction != 1):
        wrong.append(f"rope={config.rope.kind} of {config.rope.fraction:g}")
    if config.rope.kind == "yarn" and {"attention_factor", "mscale", "mscale_all_dim"} & set(config.rope.options):
        wrong.append("rope=yarn with a factor on attention of its own")
    if local.kind != "default" and arch.name == "gemma3":
        wrong.append(f"rope={local.kind} of layers with a window")
    if arch.tied and not config.tied:
        wrong.append("tied=False")
    if arch.square and config.heads * config.head_dim != config.width:
        wrong.append(f"heads * head_dim = {config.heads * config.head_dim} for width {config.width}")
    if wrong:
        raise UserError(
            f"llama.cpp's {arch.name} cannot compute {', '.join(wrong)}, so that the file would answer otherwise than "
            "this model; write a Hugging Face folder instead: modicum export MODEL FOLDER --format hf"
        )
    return arch


def _close(a: float | None, b: float | None) -> bool:
    return a is not None and b is not None and math.isclose(a, b, rel_tol=1e-5)


def graph_scale(config: DecoderConfig, arch: Architecture) -> float:
    """What the graph multiplies scores with: the 27B Gemmas, known by their layers, differ."""
    if (arch.name, config.layers) in (("gemma2", 46), ("gemma3", 62)):
        return (config.width / config.heads) ** -0.5
    return float(config.head_dim**-0.5)


def notes(config: DecoderConfig, arch: Architecture) -> list[str]:
    """Where the file says less than the model can, in words."""
    lines = []
    if (length := _context(config, arch)) < config.context_length:
        lines.append(
            f"context_length {length} instead of {config.context_length}: llama.cpp's {arch.name} knows no window"
        )
    if config.activation == "gelu":
        lines.append("llama.cpp computes GELU by its tanh approximation")
    return lines


def local_rope(config: DecoderConfig) -> Rope:
    """The rotation of layers that have a window; where there are none, of all."""
    return next((layer.rope for layer in config.per_layer if layer.window and layer.rope), config.rope)


def _slides(arch: Architecture) -> bool:
    return arch.name in ("gemma2", "gemma3")


def _context(config: DecoderConfig, arch: Architecture) -> int:
    """Where the graph attends to everything, no longer than the windows, so that it still computes the same."""
    windows = [] if _slides(arch) else [layer.window for layer in config.per_layer if layer.window]
    return min([config.context_length, *windows])


def metadata(config: DecoderConfig) -> dict[str, Any]:
    """Keys and values that describe the shape, without vocabulary and types."""
    arch = require(config)
    values: dict[str, Any] = {key: getattr(config, name) for key, name in KEYS.items()}
    values["context_length"] = _context(config, arch)
    values["attention.layer_norm_epsilon" if config.norm == "layer" else "attention.layer_norm_rms_epsilon"] = float(
        config.norm_eps
    )
    if config.position == "rope":
        values |= _rope(config)
    if arch.name == "gptneox":
        values["use_parallel_residual"] = config.parallel
    for key, value in (("attn", config.attention_softcap), ("final", config.logit_softcap)):
        if value is not None:
            values[f"{key}_logit_softcapping"] = float(value)
    if _slides(arch) and (sizes := {layer.window for layer in config.per_layer if layer.window}):
        if len(sizes) > 1:
            raise UserError(f"GGUF has one size of window, this model has {sorted(sizes)}")
        values["attention.sliding_window"] = sizes.pop()
        values["attention.sliding_window_pattern"] = [bool(layer.window) for layer in config.per_layer]
    if arch.name == "gemma2" and "attention.sliding_window" not in values:
        raise UserError("llama.cpp's gemma2 has a sliding window in every other layer, this model has none")
    return {"general.architecture": arch.name} | {f"{arch.name}.{key}": value for key, value in values.items()}


def _rope(config: DecoderConfig) -> dict[str, Any]:
    rope, options = config.rope, config.rope.options
    values: dict[str, Any] = {
        "rope.dimension_count": int(config.head_dim * rope.fraction),
        "rope.freq_base": float(rope.theta),
    }
    if config.family == "gemma3":
        values["rope.freq_base_swa"] = float(local_rope(config).theta)
    original = options.get("original_max_position_embeddings") or config.context_length
    if rope.kind == "linear":
        values |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(options["factor"])}
    elif rope.kind == "yarn":
        factor = options.get("factor") or config.context_length / original
        values |= {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": float(factor),
            "rope.scaling.original_context_length": original,
            "rope.scaling.yarn_beta_fast": float(options.get("beta_fast") or 32),
            "rope.scaling.yarn_beta_slow": float(options.get("beta_slow") or 1),
        }
    elif rope.kind == "longrope":
        factor = frequencies(rope, config.head_dim, config.context_length)[1]
        values |= {
            "rope.scaling.type": "longrope",
            "rope.scaling.original_context_length": original,
            "rope.scaling.attn_factor": float(factor),
        }
    return values


def rope_tensors(config: DecoderConfig) -> dict[str, Tensor]:
    """Factors by which the wavelengths of a stretched rotation differ from the plain ones, where GGUF stores them."""
    rope = config.rope
    if config.position != "rope" or rope.kind not in ("llama3", "longrope"):
        return {}
    if rope.kind == "longrope":
        return {
            f"rope_factors_{kind}.weight": torch.tensor(rope.options[f"{kind}_factor"], dtype=torch.float32)
            for kind in ("long", "short")
        }
    steps = torch.arange(0, int(config.head_dim * rope.fraction), 2, dtype=torch.float32)
    plain = 1.0 / rope.theta ** (steps / int(config.head_dim * rope.fraction))
    return {"rope_freqs.weight": plain / frequencies(rope, config.head_dim, config.context_length)[0]}


# Tensors, both ways ---------------------------------------------------------------------------------


def plan(arch: Architecture, config: DecoderConfig, names: Iterable[str]) -> dict[str, Rule]:
    """GGUF's name -> rule with layer numbers, for those whose parameters are all among `names`."""
    have, sources = set(names), {}
    for rule in arch.rules:
        for layer in range(config.layers if "*" in rule.theirs else 1):
            theirs, *ours = (name.replace("*", str(layer)) for name in (rule.theirs, *rule.ours))
            if all(name in have for name in ours):
                sources[theirs] = Rule(theirs, tuple(ours))
    return sources


def to_gguf(arch: Architecture, config: DecoderConfig, rule: Rule, parameters: list[Tensor]) -> Tensor:
    """The tensor that a rule stores, from its parameters."""
    whole: Tensor = pack(rule, parameters, config.head_dim)
    if _is_interleaved(arch, rule):
        return whole.view(-1, 2, config.head_dim // 2, *whole.shape[1:]).transpose(1, 2).reshape(whole.shape)
    if _is_plus_one(config, rule):
        return whole.float() + 1
    return whole


def from_gguf(
    arch: Architecture, config: DecoderConfig, rule: Rule, stored: Tensor, shapes: list[tuple[int, ...]]
) -> list[Tensor]:
    """The parameters (of `shapes`) that a stored tensor holds: the inverse of `to_gguf`."""
    if _is_interleaved(arch, rule):
        stored = stored.view(-1, config.head_dim // 2, 2, *stored.shape[1:]).transpose(1, 2).reshape(stored.shape)
    if _is_plus_one(config, rule):
        stored = stored.float() - 1
    return unpack(rule, stored, shapes, config.head_dim)


def _is_interleaved(arch: Architecture, rule: Rule) -> bool:
    return arch.interleaved and rule.theirs.split(".")[-2] in ("attn_q", "attn_k")


def _is_plus_one(config: DecoderConfig, rule: Rule) -> bool:
    return config.norm == "rms_plus_one" and rule.theirs.endswith("norm.weight")
