"""phi3: Phi 3, 3.5 and 4-mini: Llama with fused projections, optionally longrope and partial rotation."""

from modicum.model.config import DecoderConfig, Rope
from modicum.model.families import Family, Keys, rules
from modicum.model.families import _tables as t


def _rope(hf: Keys) -> Rope:
    """Early files call longrope "su" or "yarn"."""
    fields = dict(hf)
    for key in ("rope_scaling", "rope_parameters"):
        given = dict(fields.get(key) or {})
        if "yarn" in (given.get("rope_type"), given.get("type")):
            fields[key] = given | {"rope_type": "longrope"}
    return t.rope(fields)


def _write(c: DecoderConfig) -> Keys:
    original = c.rope.options.get("original_max_position_embeddings", c.context_length)
    return (
        t.write_rope(c)
        | {"sliding_window": c.window}
        | {
            "num_key_value_heads": c.kv_heads,
            "hidden_act": t.activation_name(c),
            "original_max_position_embeddings": original,
        }
    )


FAMILY = Family(
    model_types=("phi3",),
    architecture="Phi3ForCausalLM",
    keys=t.KEYS,
    ignored=t.IGNORED,
    prefix="model.",
    rules=t.EMBED
    + t.PRE_NORMS
    + rules("""
        model.layers.*.self_attn.qkv_proj.weight  layers.*.attention.{q,k,v}.weight
        model.layers.*.self_attn.o_proj.weight    layers.*.attention.o.weight
        model.layers.*.mlp.gate_up_proj.weight    layers.*.mlp.{gate,up}.weight
        model.layers.*.mlp.down_proj.weight       layers.*.mlp.down.weight"""),
    defaults=t.DEFAULTS
    | {"rms_norm_eps": 1e-5, "max_position_embeddings": 4096, "original_max_position_embeddings": 4096},
    read=lambda hf: (
        t.heads(hf)
        | t.activation(hf)
        | {
            "rope": _rope(hf),
            "window": hf.get("sliding_window") or None,
        }
    ),
    write=_write,
)
