"""A GGUF file's config, tokenizer and weights as a Hugging Face folder, for Llama-shaped models."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from modicum.core.errors import UserError
from modicum.core.files import write_json

_NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


def complete(folder: Path) -> None:
    """Write config.json, tokenizer and model.safetensors (bfloat16) beside `folder`/model.gguf."""
    import gguf
    import numpy as np
    import torch
    import transformers
    from safetensors.torch import save_file

    reader = gguf.GGUFReader(str(folder / "model.gguf"))

    def read(key: str, default: Any = None) -> Any:
        field = reader.get_field(key)
        return default if field is None else field.contents()

    family = read("general.architecture")
    if family != "llama":
        raise UserError(f"GGUF files of architecture {family!r} are not read; allowed: llama")
    heads = read("llama.attention.head_count")
    kv_heads = read("llama.attention.head_count_kv", heads)
    weights: dict[str, torch.Tensor] = {}
    for tensor in reader.tensors:
        x_OI = np.array(gguf.dequantize(tensor.data, tensor.tensor_type))
        name = tensor.name.removesuffix(".weight")
        if name.startswith("blk."):
            _, layer, part = name.split(".")
            if part in ("attn_q", "attn_k"):  # stored with the two halves of a head interleaved
                n = heads if part == "attn_q" else kv_heads
                x_OI = x_OI.reshape(n, -1, 2, x_OI.shape[1]).swapaxes(1, 2).reshape(x_OI.shape)
            name = f"model.layers.{layer}.{_NAMES[part]}"
        else:
            name = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}[name]
        weights[f"{name}.weight"] = torch.from_numpy(np.ascontiguousarray(x_OI)).bfloat16()
    save_file(weights, str(folder / "model.safetensors"), metadata={"format": "pt"})
    vocab, width = weights["model.embed_tokens.weight"].shape
    ends = {"bos_token_id": read("tokenizer.ggml.bos_token_id"), "eos_token_id": read("tokenizer.ggml.eos_token_id")}
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": width,
        "intermediate_size": read("llama.feed_forward_length"),
        "num_hidden_layers": read("llama.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": width // heads,
        "max_position_embeddings": read("llama.context_length"),
        "rms_norm_eps": round(read("llama.attention.layer_norm_rms_epsilon"), 9),
        "rope_theta": read("llama.rope.freq_base"),
        "tie_word_embeddings": "lm_head.weight" not in weights,
        "vocab_size": vocab,
        "torch_dtype": "bfloat16",
    }
    write_json(folder / "config.json", config | ends)
    write_json(folder / "generation_config.json", ends)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder), gguf_file="model.gguf")
    tokenizer.save_pretrained(str(folder))
