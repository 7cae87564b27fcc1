"""What `modicum bench engine` times of modicum and of transformers: columns, each a function to tokens per second."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from modicum.bench.engine_worker import Columns, Size
from modicum.model.config import DecoderConfig, llama_like
from modicum.model.decoder import Decoder
from modicum.serve.drafters import Drafter, Tree

INT8, INT4 = {"layers.*": "int8", "lm_head": "int8"}, {"layers.*": "int4", "lm_head": "int8"}
FORMS: dict[str, tuple[dict[str, str], int]] = {  # forms of the matrices, bits of what they are multiplied with
    "bf16": ({}, 16),
    "int8": (INT8, 16),
    "int4": (INT4, 16),
    "w8a8": (INT8, 8),
    "w4a8": (INT4, 8),
}
SOURCE, EIGHT = "source", "-a8"  # beside the folder: the GGUF folder it was made of; its type, activations in 8 bits


def shape_of(size: Size) -> DecoderConfig:
    return llama_like(
        size.vocab, size.width, size.layers, size.heads, size.kv_heads, size.mlp_width, context_length=2048, tied=True
    )


def make_folder(size: Size, path: Path, seed: int) -> None:
    """Random weights of the usual spread, in bfloat16, as a model folder."""
    from modicum.model.folder import save_model

    save_model(Decoder(shape_of(size), torch.Generator().manual_seed(seed)).to(torch.bfloat16), path)


class Pairs(Drafter):
    """Drafts `nodes` tokens in pairs, one below the other."""

    def __init__(self, config: Any, vocab_size: int, nodes: int = 0):
        super().__init__(config, vocab_size)
        self.nodes = nodes

    def propose(self, tokens: Sequence[int], budget: int) -> Tree:
        node = np.arange(min(self.nodes, budget))
        return Tree(self.vocab_size - 1 - node, np.where(node % 2, node - 1, -1))


def load_in(folder: Path, form: str) -> Decoder:
    """The folder's model with its matrices in that form; one that is not of `FORMS` is a GGUF file's own type, whose
    codes are kept."""
    from modicum.model.attach import attach
    from modicum.model.folder import load_model

    if form not in FORMS:
        return load_model(folder.parent / SOURCE, keep_quantized=True)
    model = load_model(folder)
    if targets := FORMS[form][0]:
        attach(model, targets)
    return model


# what is timed: each of these returns {column: () -> tokens per second} ------------------------------


def bits_of(form: str) -> int:
    """Of what the matrices are multiplied with."""
    return FORMS[form][1] if form in FORMS else 8 if form.endswith(EIGHT) else 16


def modicum(folder: Path, size: Size, form: str) -> Columns:
    from modicum.serve.config import EngineConfig
    from modicum.serve.engine import Engine
    from modicum.serve.request import Request, SamplingParams

    model = load_in(folder, form)
    cache = f"{size.prefill + (size.prompt + size.answer + 16) * size.requests}tok"
    config = EngineConfig(cache=cache, prefix_cache=False, activation_bits=bits_of(form))
    engine = Engine(model, None, config)

    def run(prompts: list[list[int]], tokens: int) -> list[Any]:
        params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
        return [o.completions[0] for o in engine.generate(prompts, params)]

    def decode() -> float:
        (done,) = run([list(range(1, size.prompt + 1))], size.tokens + 1)
        return size.tokens / (done.seconds - done.first_token_seconds)

    def prefill() -> float:
        return size.prefill / seconds_of(lambda: run([list(range(1, size.prefill + 1))], 1))

    def together(prompts: list[list[int]]) -> float:
        return len(prompts) * size.answer / seconds_of(lambda: run(prompts, size.answer))

    def checked() -> float:
        """Steps per second that check drafts, none of which is right."""
        drafting = Engine(model, None, replace(config, drafter="prompt-lookup", draft_when="always"))
        assert drafting.drafting is not None
        drafting.drafting.drafter = Pairs(None, size.vocab, size.drafts)
        params = SamplingParams(temperature=0, max_tokens=size.tokens + size.drafts, ignore_eos=True)
        drafting.add(Request(list(range(1, size.prompt + 1)), params))
        drafting.step()
        seconds = seconds_of(lambda: [drafting.step() for _ in range(size.tokens // 2)])
        return (drafting.counters["steps"] - 1) / seconds

    many = [[i + 1] * size.prompt for i in range(size.requests)]
    columns: Columns = {f"decode {form}": decode, f"prefill {form}": prefill}
    columns[f"{size.drafts} drafts {form}"] = checked
    if form == "bf16":
        columns[f"{size.requests} at once bf16"] = lambda: together(many)
        columns["one by one bf16"] = lambda: together(many[:1])
    return columns


def transformers(folder: Path, size: Size, form: str) -> Columns:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()

    def run(prompt: int, tokens: int) -> list[float]:
        """The moments of the start and of each token's arrival."""
        ids = torch.arange(1, prompt + 1)[None]
        options = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}
        arrivals = Arrivals()
        with torch.inference_mode():
            model.generate(ids, attention_mask=torch.ones_like(ids), streamer=arrivals, **options)
        return arrivals.moments

    def decode() -> float:
        _, first, *_, last = run(size.prompt, size.tokens + 1)
        return size.tokens / (last - first)

    def prefill() -> float:
        start, first = run(size.prefill, 1)
        return size.prefill / (first - start)

    return {f"decode {form}": decode, f"prefill {form}": prefill}


class Arrivals:
    """A streamer for `generate`, which gives it the prompt, then each token."""

    def __init__(self) -> None:
        self.moments: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.moments.append(time.perf_counter())

    def end(self) -> None:
        pass


def seconds_of(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    with torch.inference_mode():
        work()
    return time.perf_counter() - start
