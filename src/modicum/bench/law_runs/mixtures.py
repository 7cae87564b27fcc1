"""Mixtures of three sources for a target that none of them is: losses at two small sizes and at a larger one.

Read by projektor. The target is held-out text of all three in fractions of its own. Ten mixtures are trained at both
small sizes, six others at the larger one. `transport` is the optimal-transport distance of the mixture's MiniLM
embeddings to the target's.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from modicum.bench import training
from modicum.bench.law_runs._training import QUICK, Scale, decoder, nats
from modicum.bench.measurement import Settings
from modicum.core.choice import Choice
from modicum.core.errors import UserError
from modicum.data.transport import mixture_cost
from modicum.retrieve.encoders import make_encoder

TARGET = (0.6, 0.3, 0.1)  # of the sources in alphabetical order
SIZES = (1 / 8, 1 / 4, 1.0)  # of the scale's tokens
GRID, UNSEEN, POINTS, LETTERS = 10, 6, 200, 400
SCALE = Scale(corpus_bytes=3_000_000, heldout_bytes=90_000, sizes=((64, 2),))
SMALL = Scale(**QUICK)


def drawn_mixtures(seed: int, sources: int) -> tuple[np.ndarray, np.ndarray]:
    """(GRID x sources for the small sizes, UNSEEN x sources for the larger one): corners, the middle, then drawn."""
    rng = np.random.default_rng(seed)
    corners = 0.9 * np.eye(sources) + 0.1 / sources
    drawn = rng.dirichlet(np.ones(sources), GRID + UNSEEN - sources - 1)
    every = np.concatenate([corners, np.full((1, sources), 1 / sources), drawn])
    return every[:GRID], every[GRID:]


def rows(settings: Settings, seed: int, done: set[str], domain: str) -> Iterator[list[dict[str, Any]]]:
    bench, scale = training.Bench.of(settings), settings.scale
    sources = sorted(bench.corpus.domains)[: len(TARGET)]
    if len(sources) < 2:
        raise UserError(f"mixtures need two sources or more, and {bench.corpus.name} has {', '.join(sources)}")
    aim = np.array(TARGET[: len(sources)]) / sum(TARGET[: len(sources)])
    texts = {d: bench.corpus.heldout_texts(d) for d in sources}
    points, target = embedded(bench, sources, aim, settings, seed)
    small, large = drawn_mixtures(seed, len(sources))
    for size, fractions in ((s, fractions) for s in SIZES for fractions in (large if s == SIZES[-1] else small)):
        label = ", ".join(f"{d} {p:.2f}" for d, p in zip(sources, fractions, strict=True))
        run = f"{size:g} of the tokens, {label}, seed {seed}"
        if run in done:
            continue
        tokens = round(size * scale.tokens)
        model = decoder(bench, scale.sizes[0], seed)
        mixture = Choice("mixture", "fixed", {"weights": dict(zip(sources, fractions.tolist(), strict=True))})
        bench.train(model, seed, bench.stream(seed, tokens=tokens, mixture=mixture), tokens=tokens, mixture=mixture)
        by_source = [nats(bench, model, texts[d]) for d in sources]
        yield [
            {
                "run": run,
                "seed": seed,
                "parameters": model.config.parameters(),
                "tokens": tokens,
                **{f"ratio_{d}": float(p) for d, p in zip(sources, fractions, strict=True)},
                "transport": mixture_cost(points, fractions, target, epsilon=0.01)[0],
                "loss": float(np.dot(aim, by_source)),
            }
        ]


def embedded(
    bench: training.Bench, sources: list[str], aim: np.ndarray, settings: Settings, seed: int
) -> tuple[list[np.ndarray], np.ndarray]:
    """Embeddings of the sources' training texts, and of the target's held-out ones at its fractions."""
    encoder = make_encoder("lsa" if settings.quick else "minilm")
    rng = np.random.default_rng(seed)
    train = {d: [doc.text for doc in bench.corpus.train if doc.domain == d] for d in sources}
    count = 12 if settings.quick else POINTS
    chosen = {d: [chunk(train[d], rng) for _ in range(count)] for d in sources}
    heldout = {d: bench.corpus.heldout_texts(d) for d in sources}
    wanted = [
        chunk(heldout[d], rng) for d, p in zip(sources, aim, strict=True) for _ in range(max(round(p * count), 1))
    ]
    fit: Any = getattr(encoder, "fit", None)  # of encoders that learn their space from texts
    if fit is not None:
        fit([text for d in sources for text in chosen[d]])
    return [np.asarray(encoder.encode(chosen[d])) for d in sources], np.asarray(encoder.encode(wanted))


def chunk(texts: list[str], rng: np.random.Generator) -> str:
    """LETTERS letters of one of the texts."""
    text = texts[int(rng.integers(len(texts)))]
    start = int(rng.integers(max(len(text) - LETTERS, 0) + 1))
    return text[start : start + LETTERS]
