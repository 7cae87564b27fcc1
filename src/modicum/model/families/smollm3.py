"""smollm3: SmolLM 3: Llama in which every fourth layer does not rotate (NoPE)."""

from modicum.model.config import DecoderConfig, by_layer
from modicum.model.families import Family, Keys
from modicum.model.families import _tables as t


def _rotating(hf: Keys) -> tuple[bool, ...]:
    n, interval = hf["num_hidden_layers"], hf["no_rope_layer_interval"]
    flags = hf.get("no_rope_layers") or [(i + 1) % interval for i in range(n)]  # 1 means: rotates
    return tuple(bool(flag) for flag in flags[:n])


def _read(hf: Keys) -> Keys:
    rotating = _rotating(hf)
    slides = bool(hf.get("use_sliding_window") and hf.get("sliding_window"))
    types = ["sliding_attention" if slides and not r else "full_attention" for r in rotating]
    windows, rope = t.windows(hf, types) if slides else [None] * len(types), t.rope(hf)
    return (
        t.heads(hf)
        | t.activation(hf)
        | {
            "rope": rope,
            "overrides": by_layer(window=windows, rope=[rope if r else None for r in rotating]),
            "qkv_bias": hf["attention_bias"],
            "o_bias": hf["attention_bias"],
            "mlp_bias": hf["mlp_bias"],
        }
    )


def _write(c: DecoderConfig) -> Keys:
    return (
        t.write_heads(c)
        | t.write_rope(c)
        | t.write_windows(c)
        | {
            "hidden_act": t.activation_name(c),
            "attention_bias": c.qkv_bias,
            "mlp_bias": c.mlp_bias,
            "no_rope_layers": [int(layer.rope is not None) for layer in c.per_layer],
        }
    )


FAMILY = Family(
    model_types=("smollm3",),
    architecture="SmolLM3ForCausalLM",
    keys=t.KEYS,
    ignored=t.IGNORED,
    rules=t.LLAMA_RULES,
    prefix="model.",
    defaults=t.DEFAULTS
    | {
        "max_position_embeddings": 32768,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "no_rope_layer_interval": 4,
        "rope_theta": 2e6,
    },
    read=_read,
    write=_write,
)
