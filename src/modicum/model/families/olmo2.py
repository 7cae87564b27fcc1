"""olmo2: OLMo 2: norms on the output of each branch, and over all queries and over all keys."""

from modicum.model.families import Family, rules
from modicum.model.families import _tables as t

FAMILY = Family(
    model_types=("olmo2",),
    architecture="Olmo2ForCausalLM",
    keys=t.KEYS,
    ignored=t.IGNORED,
    prefix="model.",
    rules=t.EMBED
    + t.PROJECTIONS
    + t.QK_NORMS
    + rules("""
        model.layers.*.post_attention_layernorm.weight    layers.*.attention_out_norm.weight
        model.layers.*.post_feedforward_layernorm.weight  layers.*.mlp_out_norm.weight"""),
    fixed={"qk_norm": "full", "norm_place": "output"},
    defaults=t.DEFAULTS | {"rms_norm_eps": 1e-5, "attention_bias": False},
    read=lambda hf: (
        t.heads(hf)
        | t.activation(hf)
        | {"rope": t.rope(hf), "qkv_bias": hf["attention_bias"], "o_bias": hf["attention_bias"]}
    ),
    write=lambda c: (
        t.write_heads(c) | t.write_rope(c) | {"hidden_act": t.activation_name(c), "attention_bias": c.qkv_bias}
    ),
)
