"""gemma2: Gemma 2: sandwich norms, every other layer slides, softcaps on scores and logits."""

from modicum.model.config import by_layer
from modicum.model.families import Family, Keys, gemma
from modicum.model.families import _tables as t


def _read(hf: Keys) -> Keys:
    types = ["full_attention" if i % 2 else "sliding_attention" for i in range(hf["num_hidden_layers"])]
    return gemma.read(hf) | {
        "overrides": by_layer(window=t.windows(hf, types)),
        "scale": hf["query_pre_attn_scalar"] ** -0.5,
        "attention_softcap": hf.get("attn_logit_softcapping"),
        "logit_softcap": hf.get("final_logit_softcapping"),
    }


FAMILY = Family(
    model_types=("gemma2",),
    architecture="Gemma2ForCausalLM",
    keys=t.KEYS,
    ignored=t.IGNORED,
    prefix="model.",
    rules=t.EMBED + t.SANDWICH_NORMS + t.PROJECTIONS,
    fixed={"norm": "rms_plus_one", "norm_place": "sandwich"},
    defaults=gemma.DEFAULTS | {"query_pre_attn_scalar": 256, "sliding_window": 4096},
    read=_read,
    write=lambda c: (
        t.write_heads(c)
        | t.write_rope(c)
        | t.write_windows(c)
        | {
            "hidden_activation": t.activation_name(c),
            "attention_bias": c.qkv_bias,
            "query_pre_attn_scalar": round(c.per_layer[0].attention_scale ** -2),
            "attn_logit_softcapping": c.attention_softcap,
            "final_logit_softcapping": c.logit_softcap,
        }
    ),
)
