"""What `modicum bench engine` times of modicum and of transformers: columns, each a function to tokens per second."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

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


@dataclass(frozen=True, kw_only=True)
class Size:
    """What is measured. prompt: before decoding; tokens: decoded; prefill: prompt of the prefill column; answer: tokens
    of each of `requests` at once (and of one alone), their prompts' time included; drafts: tokens checked beside
    the one that is computed anyway."""

    layers: int = 24
    width: int = 1024
    heads: int = 16
    kv_heads: int = 4
    mlp_width: int = 2816
    vocab: int = 32000
    prompt: int = 32
    tokens: int = 48
    prefill: int = 512
    requests: int = 16
    answer: int = 128
    drafts: int = 10
    rounds: int = 5


QUICK = Size(
    layers=4, width=256, heads=4, kv_heads=2, mlp_width=704, vocab=4000, tokens=16, prefill=128, answer=16, rounds=2
)


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
        place = np.arange(min(self.nodes, budget))
        return Tree(self.vocab_size - 1 - place, np.where(place % 2, place - 1, -1))


def load_in(folder: Path, form: str) -> Decoder:
    """The folder's model with its matrices in that form."""
    from modicum.model.attach import attach
    from modicum.model.folder import load_model

    model = load_model(folder)
    if places := FORMS[form][0]:
        attach(model, places)
    return model


# what is timed: each of these returns {column: () -> tokens per second} ------------------------------


def modicum(folder: Path, size: Size, form: str) -> dict[str, Callable[[], float]]:
    from modicum.serve.config import EngineConfig
    from modicum.serve.engine import Engine
    from modicum.serve.request import Request, SamplingParams

    model = load_in(folder, form)
    cache = f"{size.prefill + (size.prompt + size.answer + 16) * size.requests}tok"
    config = EngineConfig(cache=cache, prefix_cache=False, activation_bits=FORMS[form][1])
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
    found: dict[str, Callable[[], float]] = {f"decode {form}": decode, f"prefill {form}": prefill}
    found[f"{size.drafts} drafts {form}"] = checked
    if form == "bf16":
        found[f"{size.requests} at once bf16"] = lambda: together(many)
        found["one by one bf16"] = lambda: together(many[:1])
    return found


def transformers(folder: Path, size: Size) -> dict[str, Callable[[], float]]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()

    def run(prompt: int, tokens: int) -> float:
        ids = torch.arange(1, prompt + 1)[None]
        options = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}
        return seconds_of(lambda: model.generate(ids, attention_mask=torch.ones_like(ids), **options))

    def decode() -> float:
        return size.tokens / (run(size.prompt, size.tokens + 1) - run(size.prompt, 1))

    return {"decode bf16": decode, "prefill bf16": lambda: size.prefill / run(size.prefill, 1)}


def seconds_of(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    with torch.inference_mode():
        work()
    return time.perf_counter() - start
