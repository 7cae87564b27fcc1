"""Other engines for `modicum bench engine`, used where they are installed (extra `peers`), on the same weights."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from modicum.bench.engine_columns import Size

Columns = dict[str, Callable[[], float]]


def peers(folder: Path, size: Size) -> dict[str, tuple[str | None, Callable[[], Columns]]]:
    """Engine and form to (why it cannot take part, or None; what prepares its columns)."""
    lacking = [p for p in ("llama_cpp", "gguf") if importlib.util.find_spec(p) is None]
    why = f"{' and '.join(lacking)} not installed; to add: pip install 'modicum[peers]'" if lacking else None
    found: dict[str, tuple[str | None, Callable[[], Columns]]] = {
        f"llama.cpp {form}": (why, functools.partial(llama_cpp, folder, size, form))
        for form in ("bf16", "int8", "int4")
    }
    found["openvino"] = (
        "openvino-genai reads only models exported by optimum-intel, which is not part of the extra",
        dict,
    )
    return found


def write_gguf(folder: Path, path: Path) -> None:
    """The folder's Llama weights in bfloat16 as GGUF, without a tokenizer: prompts are token ids."""
    import gguf
    import numpy as np
    from safetensors import safe_open

    config = json.loads((folder / "config.json").read_text())
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(config.get("head_dim") or config["hidden_size"] // heads)
    writer.add_rope_freq_base((config.get("rope_parameters") or config).get("rope_theta", 10000.0))
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    names = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    outer = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as stored:
            for name in stored.keys():  # noqa: SIM118  no mapping
                tensor, stem = stored.get_tensor(name), name.removesuffix(".weight")
                if stem in outer:
                    to = outer[stem]
                else:
                    _, _, layer, rest = stem.split(".", 3)
                    to = f"blk.{layer}.{names[rest]}"
                    if rest.endswith(("q_proj", "k_proj")):  # its rotation pairs neighbours, not halves
                        n = heads if rest.endswith("q_proj") else kv_heads
                        tensor = tensor.unflatten(0, (n, 2, -1)).transpose(1, 2).flatten(0, 2)
                if tensor.dim() == 1:
                    writer.add_tensor(f"{to}.weight", tensor.float().numpy())
                else:
                    raw = tensor.to(torch.bfloat16).contiguous().view(torch.int16).numpy()
                    writer.add_tensor(f"{to}.weight", raw.view(np.uint8), raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def llama_cpp(folder: Path, size: Size, form: str) -> Columns:
    import llama_cpp as llama

    global _quiet
    _quiet = llama.llama_log_callback(lambda *_: None)
    llama.llama_log_set(_quiet, ctypes.c_void_p(0))
    llama.llama_backend_init()
    source = folder.parent / "bf16.gguf"
    if not source.exists():
        write_gguf(folder, source)
    path = folder.parent / f"{form}.gguf"
    if not path.exists():
        params = llama.llama_model_quantize_default_params()
        params.ftype = {"int8": llama.LLAMA_FTYPE_MOSTLY_Q8_0, "int4": llama.LLAMA_FTYPE_MOSTLY_Q4_0}[form]
        params.nthread = torch.get_num_threads()
        if llama.llama_model_quantize(str(source).encode(), str(path).encode(), ctypes.byref(params)):
            raise RuntimeError(f"llama.cpp could not quantise to {form}")
    model = llama.llama_model_load_from_file(str(path).encode(), llama.llama_model_default_params())
    if not model:
        raise RuntimeError(f"llama.cpp could not load {path.name}")
    options = llama.llama_context_default_params()
    options.n_ctx, options.n_batch, options.n_ubatch = 1024, 512, 512
    options.n_threads = options.n_threads_batch = torch.get_num_threads()
    context = llama.llama_init_from_model(model, options)
    if not context:
        raise RuntimeError("llama.cpp could not make a context")

    def feed(tokens: list[int]) -> int:
        """Compute tokens after what is cached; the likeliest next one."""
        array = (llama.llama_token * len(tokens))(*tokens)
        if llama.llama_decode(context, llama.llama_batch_get_one(array, len(tokens))):
            raise RuntimeError("llama.cpp could not decode")
        logits = llama.llama_get_logits_ith(context, -1)
        address = ctypes.addressof(logits.contents)
        return int(torch.frombuffer((ctypes.c_float * size.vocab).from_address(address), dtype=torch.float32).argmax())

    def decode() -> float:
        llama.llama_memory_clear(llama.llama_get_memory(context), True)
        token = feed(list(range(1, size.prompt + 1)))
        start = time.perf_counter()
        for _ in range(size.tokens):
            token = feed([token])
        return size.tokens / (time.perf_counter() - start)

    def prefill() -> float:
        llama.llama_memory_clear(llama.llama_get_memory(context), True)
        start = time.perf_counter()
        feed(list(range(1, size.prefill + 1)))
        return size.prefill / (time.perf_counter() - start)

    return {f"decode {form}": decode, f"prefill {form}": prefill}


_quiet: Any = None
