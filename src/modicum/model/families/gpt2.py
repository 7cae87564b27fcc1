"""gpt2: GPT-2: learned positions, LayerNorm, biases, weights stored as (in, out)."""

from modicum.core.errors import UserError
from modicum.model.config import DecoderConfig, by_layer
from modicum.model.families import Family, Keys, rules
from modicum.model.families import _tables as t


def _read(hf: Keys) -> Keys:
    t.refuse(hf, add_cross_attention=True)
    head_dim, scale = hf["n_embd"] // hf["n_head"], None if hf["scale_attn_weights"] else 1.0
    scales = [scale] + [(head_dim**-0.5 if scale is None else scale) / (i + 1) for i in range(1, hf["n_layer"])]
    return t.activation(hf, "activation_function") | {
        "kv_heads": hf["n_head"],
        "head_dim": head_dim,
        "scale": scale,
        "overrides": by_layer(scale=scales) if hf["scale_attn_by_inverse_layer_idx"] else (),
        "mlp_width": hf.get("n_inner") or 4 * hf["n_embd"],
    }


def _write(c: DecoderConfig) -> Keys:
    if c.width != c.heads * c.head_dim:
        raise UserError(f"gpt2 needs width = heads * head_dim, not {c.width} and {c.heads} * {c.head_dim}")
    return {
        "n_inner": c.mlp_width,
        "scale_attn_weights": c.scale is None,
        "scale_attn_by_inverse_layer_idx": "scale" in c.varying,
        "activation_function": "gelu_new" if c.activation == "gelu_tanh" else c.activation,
    }


FAMILY = Family(
    model_types=("gpt2",),
    architecture="GPT2LMHeadModel",
    prefix="transformer.",
    keys={
        "vocab_size": "vocab_size",
        "n_embd": "width",
        "n_layer": "layers",
        "n_head": "heads",
        "n_positions": "context_length",
        "layer_norm_epsilon": "norm_eps",
        "tie_word_embeddings": "tied",
    },
    fixed={"norm": "layer", "position": "learned", "gated": False, "qkv_bias": True, "o_bias": True, "mlp_bias": True},
    defaults={
        "vocab_size": 50257,
        "n_embd": 768,
        "n_layer": 12,
        "n_head": 12,
        "n_positions": 1024,
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": True,
        "scale_attn_by_inverse_layer_idx": False,
        "activation_function": "gelu_new",
        "scale_attn_weights": True,
    },
    read=_read,
    write=_write,
    ignored=(r"attn\.(masked_)?bias$",),
    rules=rules("""
        transformer.wte.weight         embed.weight
        transformer.wpe.weight         positions.weight
        transformer.ln_f.weight        norm.weight
        transformer.ln_f.bias          norm.bias
        lm_head.weight                 lm_head.weight
        transformer.h.*.ln_1.weight    layers.*.attention_norm.weight
        transformer.h.*.ln_1.bias      layers.*.attention_norm.bias
        transformer.h.*.ln_2.weight    layers.*.mlp_norm.weight
        transformer.h.*.ln_2.bias      layers.*.mlp_norm.bias""")
    + rules(
        """
        transformer.h.*.attn.c_attn.weight  layers.*.attention.{q,k,v}.weight
        transformer.h.*.attn.c_attn.bias    layers.*.attention.{q,k,v}.bias
        transformer.h.*.attn.c_proj.weight  layers.*.attention.o.weight
        transformer.h.*.attn.c_proj.bias    layers.*.attention.o.bias
        transformer.h.*.mlp.c_fc.weight     layers.*.mlp.up.weight
        transformer.h.*.mlp.c_fc.bias       layers.*.mlp.up.bias
        transformer.h.*.mlp.c_proj.weight   layers.*.mlp.down.weight
        transformer.h.*.mlp.c_proj.bias     layers.*.mlp.down.bias""",
        transposed=True,
    ),
)
