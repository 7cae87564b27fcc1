"""gemma: Gemma 1: norms stored minus one, embeddings scaled by sqrt(width), wide heads, GeGLU."""

from modicum.model.families import Family, Keys
from modicum.model.families import _tables as t

DEFAULTS: Keys = t.DEFAULTS | {
    "tie_word_embeddings": True,
    "attention_bias": False,
    "head_dim": 256,
    "max_position_embeddings": 8192,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
}


def read(hf: Keys) -> Keys:
    """What all Gemmas share."""
    t.refuse(hf, use_bidirectional_attention=True)
    return (
        t.heads(hf)
        | t.activation(hf, "hidden_activation")
        | {
            "rope": t.rope(hf),
            "embed_scale": hf["hidden_size"] ** 0.5,
            "qkv_bias": hf["attention_bias"],
            "o_bias": hf["attention_bias"],
        }
    )


def _read_first(hf: Keys) -> Keys:
    """Gemma 1 has the activation in hidden_act; early files say "gelu" there and mean its approximation."""
    name = "gelu_pytorch_tanh" if hf["hidden_act"] == "gelu" else hf["hidden_act"]
    return read(hf | {"hidden_activation": name})


FAMILY = Family(
    model_types=("gemma",),
    architecture="GemmaForCausalLM",
    keys=t.KEYS,
    ignored=t.IGNORED,
    rules=t.LLAMA_RULES,
    prefix="model.",
    fixed={"norm": "rms_plus_one"},
    defaults=DEFAULTS,
    read=_read_first,
    write=lambda c: (
        t.write_heads(c) | t.write_rope(c) | {"hidden_act": t.activation_name(c), "attention_bias": c.qkv_bias}
    ),
)
