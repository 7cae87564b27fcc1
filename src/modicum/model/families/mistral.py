"""mistral: Mistral 7B, Nemo, Small (text): Llama with a sliding window in every layer."""

from modicum.model.families import Family
from modicum.model.families import _tables as t

FAMILY = Family(
    model_types=("mistral",),
    architecture="MistralForCausalLM",
    keys=t.KEYS,
    ignored=t.IGNORED,
    rules=t.LLAMA_RULES,
    prefix="model.",
    defaults=t.DEFAULTS | {"max_position_embeddings": 131072},
    read=lambda hf: (
        t.heads(hf)
        | t.activation(hf)
        | {
            "rope": t.rope(hf),
            "window": hf.get("sliding_window") or None,
        }
    ),
    write=lambda c: (
        t.write_heads(c) | t.write_rope(c) | {"sliding_window": c.window} | {"hidden_act": t.activation_name(c)}
    ),
)
