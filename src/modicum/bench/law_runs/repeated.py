"""Three sizes on the same number of tokens, made of 1, 4, 16 or 64 passes over ever less text (token-crisis)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from modicum.bench import training
from modicum.bench.law_runs._training import QUICK, Curve, Scale, decoder
from modicum.bench.measurement import Settings
from modicum.core.choice import Choice
from modicum.core.errors import UserError
from modicum.data.document import Document

PASSES = (1, 4, 16, 64)
SCALE, SMALL = Scale(), Scale(**QUICK)


def rows(settings: Settings, seed: int, done: set[str], domain: str) -> Iterator[list[dict[str, Any]]]:
    """The rows of each run: every size, every number of passes, equal tokens, constant rate."""
    bench, scale = training.Bench.of(settings), settings.scale
    texts = bench.corpus.heldout_texts()
    for passes in PASSES:
        documents = training.memory(first_tokens(bench, scale.tokens // passes, seed), bench.tokenizer)
        for size in scale.sizes:
            name = f"{size[0]}x{size[1]}, {passes} passes, seed {seed}"
            if name in done:
                continue
            model = decoder(bench, size, seed)
            schedule = Choice.parse("schedule", "constant")
            stream = bench.stream(seed, documents, schedule=schedule)
            curve = Curve(bench, texts, scale.checkpoints)
            bench.train(model, seed, stream, schedule=schedule, parts={"curve": curve})
            unique = sum(domain.size for domain in stream.sampler.domains.values())
            yield [
                {
                    "run": name,
                    "seed": seed,
                    "parameters": model.config.parameters(),
                    "tokens": tokens,
                    "unique_tokens": min(unique, scale.tokens),
                    "passes": passes,
                    "schedule": "constant",
                    "vocabulary": bench.tokenizer.vocab_size,
                    "loss": loss,
                }
                for tokens, loss in curve.points
            ]


def first_tokens(bench: training.Bench, tokens: int, seed: int) -> list[Document]:
    """Documents of the corpus in an order of the seed, up to `tokens` tokens; smaller sets are parts of larger ones."""
    documents = bench.corpus.train
    chosen, left = [], tokens
    for i in np.random.default_rng(seed).permutation(len(documents)):
        document = documents[i]
        (ids,) = bench.tokenizer.encode_batch([document.text], specials=False)
        if len(ids) + 1 > left:
            chosen.append(Document(document.id, document.text[: len(document.text) * left // (len(ids) + 1)]))
            return chosen
        chosen.append(Document(document.id, document.text))
        left -= len(ids) + 1
    raise UserError(f"the corpus has {tokens - left} tokens and {tokens} are needed; set corpus_bytes higher")
