"""qwen2: Qwen 2 and 2.5: Llama with biases on queries, keys and values."""

from modicum.model.config import by_layer
from modicum.model.families import Family, Keys
from modicum.model.families import _tables as t


def window_types(hf: Keys) -> list[str]:
    """Qwen lets the layers from `max_window_layers` on slide, if `use_sliding_window`."""
    first = hf["max_window_layers"] if hf.get("use_sliding_window") else hf["num_hidden_layers"]
    return ["sliding_attention" if i >= first else "full_attention" for i in range(hf["num_hidden_layers"])]


def qwen_windows(hf: Keys) -> Keys:
    if not hf.get("use_sliding_window"):
        return {}
    return {"overrides": by_layer(window=t.windows({"sliding_window": 4096} | hf, window_types(hf)))}


FAMILY = Family(
    model_types=("qwen2",),
    architecture="Qwen2ForCausalLM",
    keys=t.KEYS,
    ignored=t.IGNORED,
    rules=t.LLAMA_RULES,
    prefix="model.",
    fixed={"qkv_bias": True},
    defaults=t.DEFAULTS | {"max_position_embeddings": 32768, "max_window_layers": 28},
    read=lambda hf: t.heads(hf) | t.activation(hf) | qwen_windows(hf) | {"rope": t.rope(hf)},
    write=lambda c: (
        t.write_heads(c)
        | t.write_rope(c)
        | t.write_windows(c)
        | {"hidden_act": t.activation_name(c), "max_window_layers": c.layers}
    ),
)
