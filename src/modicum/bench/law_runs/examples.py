"""Adaptations on ever more examples of one task, the smaller sets parts of the larger ones (superficial-alignment).

    --data banking77.parquet        columns text, label_name, split: a customer's question, and what it is about

SmolLM2-135M-Instruct learns to answer with the name of the intent. A reply has the *format* if it is one of the names,
and is *right* if it is the question's; without the untuned model's row nothing tells style from skill. Equal epochs,
and `least` steps where that would be fewer. Prompt and template are the same for every row, the untuned model's
included.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from modicum.adapt.examples import Example
from modicum.bench.law_runs._adapting import replies, tuned
from modicum.bench.measurement import Settings
from modicum.core.errors import UserError
from modicum.evaluate.rows import read_rows

QUESTION = "What is this bank customer's message about? Answer with the name of the intent.\n\n{text}"


@dataclass(frozen=True, kw_only=True)
class Scale:
    sizes: tuple[int, ...] = (0, 10, 30, 100, 300)
    questions: int = 150
    epochs: float = 2.0
    least: int = 25  # steps


SCALE, SMALL = Scale(), Scale(sizes=(0, 4), questions=3, epochs=1.0, least=1)


def rows(settings: Settings, seed: int, done: set[str], domain: str) -> Iterator[list[dict[str, Any]]]:
    """One row per number of examples: `score` over all replies, `format`, and `score_parsed` among those in form."""
    scale: Scale = settings.scale
    if settings.data is None:
        raise UserError("give --data FILE with columns text, label_name and split, for instance banking77.parquet")
    table = list(read_rows(Path(settings.data)))
    train, test = ([r for r in table if r["split"] == side] for side in ("train", "test"))
    names = {plain(r["label_name"]) for r in table}
    rng = np.random.default_rng(seed)
    order, chosen = rng.permutation(len(train)), rng.permutation(len(test))[: scale.questions]
    for size in scale.sizes:
        run = f"{size} examples, seed {seed}"
        if run in done:
            continue
        pairs = [_pair(train[i], int(i)) for i in order[:size]]
        model = tuned(pairs, seed, epochs=scale.epochs, least=scale.least, model=settings.model)
        texts = [QUESTION.format(text=test[i]["text"]) for i in chosen]
        given = [plain(reply) for reply in replies(model, texts, 16, settings.model)]
        formed = [reply in names for reply in given]
        right = [reply == plain(test[i]["label_name"]) for reply, i in zip(given, chosen, strict=True)]
        yield [
            {
                "run": run,
                "seed": seed,
                "examples": size,
                "items": len(given),
                "score": float(np.mean(right)),
                "format": float(np.mean(formed)),
                "score_parsed": float(np.sum(right) / max(np.sum(formed), 1)),
            }
        ]


def _pair(row: dict[str, Any], number: int) -> Example:
    return Example.of(QUESTION.format(text=row["text"]), plain(row["label_name"]), str(row.get("id", number)))


def plain(name: str) -> str:
    """A name as it is compared: lower case, words apart, no final stop."""
    return " ".join(name.lower().replace("_", " ").strip().strip(".").split())
