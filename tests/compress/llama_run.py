"""Run a GGUF file in llama.cpp, in a process of its own: `python llama_run.py FILE < request.json > answer.json`.

Request: {"texts": [...], "prompts": [[ids]...], "tokens": n}. Answer: ids of each text, and for each prompt the n
likeliest next tokens one after another and the logits after the prompt.
"""

from __future__ import annotations

import ctypes
import json
import sys

import llama_cpp as llama


def main() -> None:
    request = json.load(sys.stdin)
    quiet = llama.llama_log_callback(lambda *_: None)
    llama.llama_log_set(quiet, ctypes.c_void_p(0))
    model = llama.llama_model_load_from_file(sys.argv[1].encode(), llama.llama_model_default_params())
    if not model:
        sys.exit("llama.cpp does not load the file")
    vocab = llama.llama_model_get_vocab(model)
    size = llama.llama_vocab_n_tokens(vocab)
    options = llama.llama_context_default_params()
    options.n_ctx, options.n_threads, options.n_threads_batch = 512, 1, 1
    options.type_k = options.type_v = 0  # float32, so that logits are comparable
    options.flash_attn_type = 0
    context = llama.llama_init_from_model(model, options)

    def logits(tokens: list[int]) -> list[float]:
        array = (llama.llama_token * len(tokens))(*tokens)
        if llama.llama_decode(context, llama.llama_batch_get_one(array, len(tokens))):
            sys.exit("llama.cpp could not decode")
        return llama.llama_get_logits_ith(context, -1)[:size]

    def greedy(prompt: list[int]) -> tuple[list[int], list[float]]:
        llama.llama_memory_clear(llama.llama_get_memory(context), True)
        first = last = logits(prompt)
        found: list[int] = []
        for _ in range(request["tokens"]):
            found.append(max(range(size), key=last.__getitem__))
            last = logits(found[-1:])
        return found, first

    def tokenize(text: str) -> list[int]:
        raw = text.encode()
        array = (llama.llama_token * (len(raw) + 16))()
        count = llama.llama_tokenize(vocab, raw, len(raw), array, len(raw) + 16, False, True)
        return list(array[:count])

    answers = [greedy(prompt) for prompt in request["prompts"]]
    json.dump(
        {
            "texts": [tokenize(text) for text in request["texts"]],
            "tokens": [tokens for tokens, _ in answers],
            "logits": [first for _, first in answers],
        },
        sys.stdout,
    )


if __name__ == "__main__":
    main()
