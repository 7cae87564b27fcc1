"""gemma: Gemma 1: norms stored minus one, embeddings scaled by sqrt(width), wide heads, GeGLU."""

from modicum.model.families import Family, Keys
from modicum.model.families import _tables as t

DEFAULTS: Keys = t.DEFAULTS | {
    "tie_word_embeddings": True, "attention_bias": False, "head_dim": 256, "max_position_embeddings": 8192,
    "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh"}


def read(hf: Keys, activation_key: str = "hidden_activation") -> Keys:
    """What all Gemmas share."""
    t.refuse(hf, use_bidirectional_attention=True)
    return t.heads(hf) | t.activation(hf, activation_key) | {
        "rope": t.rope(hf), "embed_scale": hf["hidden_size"] ** 0.5,
        "qkv_bias": hf["attention_bias"], "o_bias": hf["attention_bias"]}


FAMILY = Family(
    model_types=("gemma",), architecture="GemmaForCausalLM", keys=t.KEYS, ignored=t.IGNORED, rules=t.LLAMA_RULES,
    prefix="model.", fixed={"norm": "rms_plus_one"},
    # Early files say hidden_act "gelu" and mean its tanh approximation.
    defaults=DEFAULTS,
    read=lambda hf: read(hf | {"hidden_act": "gelu_pytorch_tanh" if hf["hidden_act"] == "gelu" else hf["hidden_act"]},
                         "hidden_act"),
    write=lambda c: t.write_heads(c) | t.write_rope(c) | {
        "hidden_act": t.activation_name(c), "attention_bias": c.qkv_bias},
)
