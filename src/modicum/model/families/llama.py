"""llama: Llama 1 to 3.3, SmolLM 1 and 2, TinyLlama, and others that write `LlamaForCausalLM`."""

from modicum.model.families import Family
from modicum.model.families import _tables as t

FAMILY = Family(
    model_types=("llama",),
    architecture="LlamaForCausalLM",
    keys=t.KEYS,
    ignored=t.IGNORED,
    rules=t.LLAMA_RULES,
    prefix="model.",
    defaults=t.DEFAULTS | {"attention_bias": False, "mlp_bias": False},
    read=lambda hf: (
        t.heads(hf)
        | t.activation(hf)
        | {
            "rope": t.rope(hf),
            "qkv_bias": hf["attention_bias"],
            "o_bias": hf["attention_bias"],
            "mlp_bias": hf["mlp_bias"],
        }
    ),
    write=lambda c: (
        t.write_heads(c)
        | t.write_rope(c)
        | {
            "hidden_act": t.activation_name(c),
            "attention_bias": c.qkv_bias,
            "mlp_bias": c.mlp_bias,
            "initializer_range": 0.02,
        }
    ),
)
