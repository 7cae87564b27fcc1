"""Other engines for `modicum bench engine`, used where they are installed (extra `peers`), on the same weights."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import time
from pathlib import Path
from typing import Any

import numpy as np

from modicum.bench.engine_worker import Columns, Size

GGUF_TYPES = {"bf16": "bf16", "int8": "q8_0", "int4": "q4_0"}  # how a form is written for llama.cpp


def absent() -> dict[str, str]:
    """Engines that cannot take part here, and why."""
    reasons = {"openvino": "openvino-genai reads only models exported by optimum-intel, which is not part of the extra"}
    if importlib.util.find_spec("llama_cpp") is None:
        reasons["llama.cpp"] = "llama_cpp not installed; to add: pip install 'modicum[peers]'"
    return reasons


def llama_cpp(folder: Path, size: Size, form: str) -> Columns:
    """Columns of llama.cpp on `FORM.gguf` beside the folder."""
    import llama_cpp as llama

    global _quiet
    _quiet = llama.llama_log_callback(lambda *_: None)
    llama.llama_log_set(_quiet, ctypes.c_void_p(0))
    llama.llama_backend_init()
    path = folder.parent / f"{form}.gguf"
    model = llama.llama_model_load_from_file(str(path).encode(), llama.llama_model_default_params())
    if not model:
        raise RuntimeError(f"llama.cpp could not load {path.name}")
    options = llama.llama_context_default_params()
    options.n_ctx, options.n_batch, options.n_ubatch = max(1024, 2 * size.prefill), 512, 512
    options.n_threads = options.n_threads_batch = int(os.environ["OMP_NUM_THREADS"])
    context = llama.llama_init_from_model(model, options)
    if not context:
        raise RuntimeError("llama.cpp could not make a context")

    def feed(tokens: list[int]) -> int:
        """Compute tokens after what is cached; the likeliest next one."""
        array = (llama.llama_token * len(tokens))(*tokens)
        if llama.llama_decode(context, llama.llama_batch_get_one(array, len(tokens))):
            raise RuntimeError("llama.cpp could not decode")
        return int(np.ctypeslib.as_array(llama.llama_get_logits_ith(context, -1), (size.vocab,)).argmax())

    def clear() -> None:
        llama.llama_memory_clear(llama.llama_get_memory(context), True)

    def decode() -> float:
        clear()
        token = feed(list(range(1, size.prompt + 1)))
        start = time.perf_counter()
        for _ in range(size.tokens):
            token = feed([token])
        return size.tokens / (time.perf_counter() - start)

    def prefill() -> float:
        clear()
        start = time.perf_counter()
        for begin in range(1, size.prefill + 1, 512):
            feed(list(range(begin, min(begin + 512, size.prefill + 1))))
        return size.prefill / (time.perf_counter() - start)

    return {f"decode {form}": decode, f"prefill {form}": prefill}


_quiet: Any = None
