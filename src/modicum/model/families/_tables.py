"""Tables that most families share: config keys, RoPE in both notations, layer types, Llama's weight names."""

from __future__ import annotations

from typing import Any

from modicum.core.errors import UserError, unknown
from modicum.model.config import DecoderConfig, Rope
from modicum.model.families import Keys, rules

KEYS = {
    "vocab_size": "vocab_size",
    "hidden_size": "width",
    "num_hidden_layers": "layers",
    "num_attention_heads": "heads",
    "intermediate_size": "mlp_width",
    "max_position_embeddings": "context_length",
    "rms_norm_eps": "norm_eps",
    "tie_word_embeddings": "tied",
}
DEFAULTS: Keys = {
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "max_position_embeddings": 2048,
    "hidden_act": "silu",
    "rope_theta": 10000.0,
}

EMBED = rules("""
    model.embed_tokens.weight  embed.weight
    model.norm.weight          norm.weight
    lm_head.weight             lm_head.weight""")
PROJECTIONS = rules("""
    model.layers.*.self_attn.q_proj.weight  layers.*.attention.q.weight
    model.layers.*.self_attn.k_proj.weight  layers.*.attention.k.weight
    model.layers.*.self_attn.v_proj.weight  layers.*.attention.v.weight
    model.layers.*.self_attn.o_proj.weight  layers.*.attention.o.weight
    model.layers.*.self_attn.q_proj.bias    layers.*.attention.q.bias
    model.layers.*.self_attn.k_proj.bias    layers.*.attention.k.bias
    model.layers.*.self_attn.v_proj.bias    layers.*.attention.v.bias
    model.layers.*.self_attn.o_proj.bias    layers.*.attention.o.bias
    model.layers.*.mlp.gate_proj.weight     layers.*.mlp.gate.weight
    model.layers.*.mlp.up_proj.weight       layers.*.mlp.up.weight
    model.layers.*.mlp.down_proj.weight     layers.*.mlp.down.weight
    model.layers.*.mlp.gate_proj.bias       layers.*.mlp.gate.bias
    model.layers.*.mlp.up_proj.bias         layers.*.mlp.up.bias
    model.layers.*.mlp.down_proj.bias       layers.*.mlp.down.bias""")
PRE_NORMS = rules("""
    model.layers.*.input_layernorm.weight           layers.*.attention_norm.weight
    model.layers.*.post_attention_layernorm.weight  layers.*.mlp_norm.weight""")
SANDWICH_NORMS = rules("""
    model.layers.*.input_layernorm.weight             layers.*.attention_norm.weight
    model.layers.*.post_attention_layernorm.weight    layers.*.attention_out_norm.weight
    model.layers.*.pre_feedforward_layernorm.weight   layers.*.mlp_norm.weight
    model.layers.*.post_feedforward_layernorm.weight  layers.*.mlp_out_norm.weight""")
QK_NORMS = rules("""
    model.layers.*.self_attn.q_norm.weight  layers.*.attention.q_norm.weight
    model.layers.*.self_attn.k_norm.weight  layers.*.attention.k_norm.weight""")
LLAMA_RULES = EMBED + PRE_NORMS + PROJECTIONS
IGNORED = (r"rotary_emb\.inv_freq$",)

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
}


def activation(hf: Keys, key: str = "hidden_act") -> Keys:
    if hf[key] not in ACTIVATIONS:
        raise unknown(key, hf[key], ACTIVATIONS)
    return {"activation": ACTIVATIONS[hf[key]]}


def activation_name(config: DecoderConfig) -> str:
    return "gelu_pytorch_tanh" if config.activation == "gelu_tanh" else config.activation


def heads(hf: Keys, always: bool = True) -> Keys:
    """kv_heads and head_dim, which default to heads and width / heads."""
    dim = hf.get("head_dim") if always else None
    return {
        "kv_heads": hf.get("num_key_value_heads") or hf["num_attention_heads"],
        "head_dim": dim or hf["hidden_size"] // hf["num_attention_heads"],
    }


def write_heads(config: DecoderConfig) -> Keys:
    return {"num_key_value_heads": config.kv_heads, "head_dim": config.head_dim}


def refuse(hf: Keys, **unsupported: Any) -> None:
    """Raise for a key that holds a value this decoder does not reproduce."""
    for key, value in unsupported.items():
        if hf.get(key) == value:
            raise UserError(f"config.json has {key}={value!r}, which is not supported for {hf['model_type']} models")


# RoPE: transformers 5 writes rope_parameters (flat, or per layer type), older ones rope_theta, rope_scaling.


def rope(
    hf: Keys,
    layer_type: str | None = None,
    theta_key: str = "rope_theta",
    fraction: float = 1.0,
    fraction_key: str = "partial_rotary_factor",
) -> Rope:
    parameters = hf.get("rope_parameters") or {}
    nested = layer_type is not None and isinstance(parameters.get(layer_type), dict)
    given = dict(parameters[layer_type] if nested else {} if layer_type else parameters)
    if hf.get("rope_scaling") and layer_type in (None, "full_attention"):
        given |= hf["rope_scaling"]
    kind = given.pop("rope_type", None) or given.get("type") or "default"
    given.pop("type", None)
    theta = given.pop("rope_theta", None) or hf[theta_key]
    rotary_fraction = given.pop("partial_rotary_factor", None) or hf.get(fraction_key) or fraction
    kind = {"su": "longrope"}.get(kind, kind)
    if kind == "default":
        return Rope(theta=float(theta), fraction=float(rotary_fraction))
    if hf.get("original_max_position_embeddings"):
        given["original_max_position_embeddings"] = hf["original_max_position_embeddings"]
    return Rope(theta=float(theta), fraction=float(rotary_fraction), kind=kind, options=given)


def _scaling(rope: Rope) -> Keys:
    fraction = {} if rope.fraction == 1.0 else {"partial_rotary_factor": rope.fraction}
    return {"rope_type": rope.kind, "rope_theta": rope.theta, **fraction, **rope.options}


def write_rope(config: DecoderConfig) -> Keys:
    """Both notations, so that older and newer readers agree."""
    kept = _scaling(config.rope)
    written: Keys = {
        "rope_parameters": kept,
        "rope_theta": config.rope.theta,
        "rope_scaling": None if config.rope.kind == "default" else kept,
    }
    if config.rope.fraction != 1.0:
        written["partial_rotary_factor"] = config.rope.fraction
    return written


def write_two_ropes(config: DecoderConfig) -> Keys:
    local = next((layer.rope for layer in config.per_layer if layer.window and layer.rope), config.rope)
    return {
        "rope_parameters": {"full_attention": _scaling(config.rope), "sliding_attention": _scaling(local)},
        "rope_theta": config.rope.theta,
        "rope_local_base_freq": local.theta,
        "rope_scaling": None,
    }


# Windows: a list of layer types, or a rule to derive it.


def windows(hf: Keys, default_types: list[str]) -> list[int | None]:
    """The window of each layer."""
    types, window = hf.get("layer_types") or default_types, hf.get("sliding_window")
    for name in types:
        if name not in ("full_attention", "sliding_attention"):
            raise unknown("layer type", name, ("full_attention", "sliding_attention"))
    return [window if name == "sliding_attention" else None for name in types]


def write_windows(config: DecoderConfig) -> Keys:
    """One window size in a list of layer types. Two sizes are caught by reading the result again."""
    sizes = [layer.window for layer in config.per_layer if layer.window]
    return {
        "sliding_window": sizes[0] if sizes else None,
        "use_sliding_window": bool(sizes),
        "layer_types": ["sliding_attention" if layer.window else "full_attention" for layer in config.per_layer],
    }
