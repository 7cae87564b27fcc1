"""qwen3: Qwen 3 dense: RMSNorm on each head's queries and keys, no biases by default."""

from modicum.model.families import Family
from modicum.model.families import _tables as t
from modicum.model.families.qwen2 import qwen_windows

FAMILY = Family(
    model_types=("qwen3",),
    architecture="Qwen3ForCausalLM",
    keys=t.KEYS,
    ignored=t.IGNORED,
    rules=t.LLAMA_RULES + t.QK_NORMS,
    prefix="model.",
    fixed={"qk_norm": "head"},
    defaults=t.DEFAULTS
    | {"max_position_embeddings": 32768, "max_window_layers": 28, "attention_bias": False, "head_dim": 128},
    read=lambda hf: (
        t.heads(hf)
        | t.activation(hf)
        | qwen_windows(hf)
        | {"rope": t.rope(hf), "qkv_bias": hf["attention_bias"], "o_bias": hf["attention_bias"]}
    ),
    write=lambda c: (
        t.write_heads(c)
        | t.write_rope(c)
        | t.write_windows(c)
        | {"hidden_act": t.activation_name(c), "attention_bias": c.qkv_bias, "max_window_layers": c.layers}
    ),
)
