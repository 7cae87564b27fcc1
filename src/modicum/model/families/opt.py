"""opt: OPT: learned positions from row 2, ReLU, LayerNorm before (in the 350M model after) each branch."""

from modicum.model.config import DecoderConfig
from modicum.model.families import Family, Keys, rules
from modicum.model.families import _tables as t


def _read(hf: Keys) -> Keys:
    t.refuse(hf, layer_norm_elementwise_affine=False, _remove_final_layer_norm=True)
    before, bias, embed = hf["do_layer_norm_before"], hf["enable_bias"], hf.get("word_embed_proj_dim")
    return t.activation(hf, "activation_function") | {
        "kv_heads": hf["num_attention_heads"],
        "head_dim": hf["hidden_size"] // hf["num_attention_heads"],
        "norm_place": "pre" if before else "after",
        "final_norm": before,
        "qkv_bias": bias,
        "o_bias": bias,
        "mlp_bias": bias,
        "embed_width": embed if embed and embed != hf["hidden_size"] else None,
    }


def _write(c: DecoderConfig) -> Keys:
    return {
        "activation_function": c.activation,
        "do_layer_norm_before": c.norm_place == "pre",
        "enable_bias": c.qkv_bias,
        "word_embed_proj_dim": c.embed_width or c.width,
        "dropout": 0.0,
    }


FAMILY = Family(
    model_types=("opt",),
    architecture="OPTForCausalLM",
    prefix="model.",
    keys={
        "vocab_size": "vocab_size",
        "hidden_size": "width",
        "num_hidden_layers": "layers",
        "num_attention_heads": "heads",
        "ffn_dim": "mlp_width",
        "max_position_embeddings": "context_length",
        "tie_word_embeddings": "tied",
    },
    fixed={"norm": "layer", "norm_eps": 1e-5, "gated": False, "position": "learned", "position_offset": 2},
    defaults={
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
        "do_layer_norm_before": True,
        "enable_bias": True,
        "activation_function": "relu",
    },
    read=_read,
    write=_write,
    rules=rules("""
        model.decoder.embed_tokens.weight                     embed.weight
        model.decoder.embed_positions.weight                  positions.weight
        model.decoder.project_in.weight                       embed_in.weight
        model.decoder.project_out.weight                      embed_out.weight
        model.decoder.final_layer_norm.weight                 norm.weight
        model.decoder.final_layer_norm.bias                   norm.bias
        lm_head.weight                                        lm_head.weight
        model.decoder.layers.*.self_attn_layer_norm.weight    layers.*.attention_norm.weight
        model.decoder.layers.*.self_attn_layer_norm.bias      layers.*.attention_norm.bias
        model.decoder.layers.*.final_layer_norm.weight        layers.*.mlp_norm.weight
        model.decoder.layers.*.final_layer_norm.bias          layers.*.mlp_norm.bias
        model.decoder.layers.*.self_attn.q_proj.weight        layers.*.attention.q.weight
        model.decoder.layers.*.self_attn.k_proj.weight        layers.*.attention.k.weight
        model.decoder.layers.*.self_attn.v_proj.weight        layers.*.attention.v.weight
        model.decoder.layers.*.self_attn.out_proj.weight      layers.*.attention.o.weight
        model.decoder.layers.*.self_attn.q_proj.bias          layers.*.attention.q.bias
        model.decoder.layers.*.self_attn.k_proj.bias          layers.*.attention.k.bias
        model.decoder.layers.*.self_attn.v_proj.bias          layers.*.attention.v.bias
        model.decoder.layers.*.self_attn.out_proj.bias        layers.*.attention.o.bias
        model.decoder.layers.*.fc1.weight                     layers.*.mlp.up.weight
        model.decoder.layers.*.fc1.bias                       layers.*.mlp.up.bias
        model.decoder.layers.*.fc2.weight                     layers.*.mlp.down.weight
        model.decoder.layers.*.fc2.bias                       layers.*.mlp.down.bias"""),
)
