"""gpt_neox: GPT-NeoX and Pythia: attention and MLP in parallel, a quarter of each head rotated, LayerNorm."""

from modicum.model.config import DecoderConfig
from modicum.model.families import Family, Keys, rules
from modicum.model.families import _tables as t


def _read(hf: Keys) -> Keys:
    return (
        t.heads(hf, always=False)
        | t.activation(hf)
        | {
            "rope": t.rope(hf, theta_key="rotary_emb_base", fraction_key="rotary_pct"),
            "qkv_bias": hf["attention_bias"],
            "o_bias": hf["attention_bias"],
        }
    )


def _write(c: DecoderConfig) -> Keys:
    written = t.write_rope(c)
    written.pop("partial_rotary_factor", None)
    written["rope_parameters"] = written["rope_parameters"] | {"partial_rotary_factor": c.rope.fraction}
    return written | {
        "hidden_act": t.activation_name(c),
        "attention_bias": c.qkv_bias,
        "rotary_pct": c.rope.fraction,
        "rotary_emb_base": c.rope.theta,
    }


FAMILY = Family(
    model_types=("gpt_neox",),
    architecture="GPTNeoXForCausalLM",
    prefix="gpt_neox.",
    keys={
        "vocab_size": "vocab_size",
        "hidden_size": "width",
        "num_hidden_layers": "layers",
        "num_attention_heads": "heads",
        "intermediate_size": "mlp_width",
        "max_position_embeddings": "context_length",
        "layer_norm_eps": "norm_eps",
        "tie_word_embeddings": "tied",
        "use_parallel_residual": "parallel",
    },
    fixed={"norm": "layer", "gated": False, "mlp_bias": True},
    defaults={
        "max_position_embeddings": 2048,
        "layer_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "use_parallel_residual": True,
        "attention_bias": True,
        "hidden_act": "gelu",
        "rotary_emb_base": 10000.0,
        "rotary_pct": 0.25,
    },
    read=_read,
    write=_write,
    aliases={"lm_head.weight": "embed_out.weight"},
    ignored=(r"attention\.(masked_)?bias$", *t.IGNORED),
    rules=rules("""
        gpt_neox.embed_in.weight                                embed.weight
        gpt_neox.final_layer_norm.weight                        norm.weight
        gpt_neox.final_layer_norm.bias                          norm.bias
        embed_out.weight                                        lm_head.weight
        gpt_neox.layers.*.input_layernorm.weight                layers.*.attention_norm.weight
        gpt_neox.layers.*.input_layernorm.bias                  layers.*.attention_norm.bias
        gpt_neox.layers.*.post_attention_layernorm.weight       layers.*.mlp_norm.weight
        gpt_neox.layers.*.post_attention_layernorm.bias         layers.*.mlp_norm.bias
        gpt_neox.layers.*.attention.dense.weight                layers.*.attention.o.weight
        gpt_neox.layers.*.attention.dense.bias                  layers.*.attention.o.bias
        gpt_neox.layers.*.mlp.dense_h_to_4h.weight              layers.*.mlp.up.weight
        gpt_neox.layers.*.mlp.dense_h_to_4h.bias                layers.*.mlp.up.bias
        gpt_neox.layers.*.mlp.dense_4h_to_h.weight              layers.*.mlp.down.weight
        gpt_neox.layers.*.mlp.dense_4h_to_h.bias                layers.*.mlp.down.bias""")
    + rules(
        """
        gpt_neox.layers.*.attention.query_key_value.weight  layers.*.attention.{q,k,v}.weight
        gpt_neox.layers.*.attention.query_key_value.bias    layers.*.attention.{q,k,v}.bias""",
        by_head=True,
    ),
)
