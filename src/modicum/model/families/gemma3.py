"""gemma3: Gemma 3 text: five sliding layers to a full one, a rotation for each, norms on queries and keys."""

from modicum.model.config import by_layer
from modicum.model.families import Family, Keys, gemma
from modicum.model.families import _tables as t


def _read(hf: Keys) -> Keys:
    pattern = hf["sliding_window_pattern"]
    full, local = t.rope(hf, "full_attention"), t.rope(hf, "sliding_attention", "rope_local_base_freq")
    types = ["sliding_attention" if (i + 1) % pattern else "full_attention" for i in range(hf["num_hidden_layers"])]
    windows = t.windows(hf, types)
    return gemma.read(hf) | {
        "rope": full,
        "overrides": by_layer(window=windows, rope=[local if window else full for window in windows]),
        "scale": hf["query_pre_attn_scalar"] ** -0.5,
        "logit_softcap": hf.get("final_logit_softcapping"),
    }


FAMILY = Family(
    model_types=("gemma3_text",),
    architecture="Gemma3ForCausalLM",
    keys=t.KEYS,
    ignored=t.IGNORED,
    prefix="model.",
    rules=t.EMBED + t.SANDWICH_NORMS + t.PROJECTIONS + t.QK_NORMS,
    fixed={"norm": "rms_plus_one", "norm_place": "sandwich", "qk_norm": "head"},
    defaults=gemma.DEFAULTS
    | {
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "sliding_window_pattern": 6,
        "max_position_embeddings": 131072,
        "rope_theta": 1e6,
        "rope_local_base_freq": 10000.0,
    },
    read=_read,
    write=lambda c: (
        t.write_heads(c)
        | t.write_two_ropes(c)
        | t.write_windows(c)
        | {
            "hidden_activation": t.activation_name(c),
            "attention_bias": c.qkv_bias,
            "query_pre_attn_scalar": round(c.per_layer[0].attention_scale ** -2),
            "final_logit_softcapping": c.logit_softcap,
        }
    ),
)
