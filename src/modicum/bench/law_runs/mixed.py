"""Two sizes trained on general text, each then continued at several fractions of a domain's text (cmr).

One run goes on with general text alone, which shows what warming the rate up again costs.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from modicum.bench import training
from modicum.bench.law_runs._training import QUICK, Curve, Scale, decoder, nats
from modicum.bench.measurement import Settings
from modicum.core.choice import Choice
from modicum.core.errors import UserError

RATIOS = (0.0, 0.125, 0.25, 0.5, 0.75)
SCALE = Scale(corpus_bytes=4_000_000, heldout_bytes=80_000, vocabulary=1024, sizes=((64, 3), (128, 4)), checkpoints=12)
SMALL = Scale(**QUICK)


def rows(settings: Settings, seed: int, done: set[str], domain: str) -> Iterator[list[dict[str, Any]]]:
    """Change of the general loss (rows of each run) in continual pretraining at several domain fractions."""
    bench, scale = training.Bench.of(settings), settings.scale
    if domain not in bench.corpus.domains:
        raise UserError(f"no domain {domain!r} in {bench.corpus.name}; it has {', '.join(bench.corpus.domains)}")
    general = [d for d in bench.corpus.domains if d != domain]
    texts = [text for d in general for text in bench.corpus.heldout_texts(d)]
    own = bench.corpus.heldout_texts(domain)
    plain = dict.fromkeys(general, 1.0)
    for size in scale.sizes:
        names = {ratio: f"{size[0]}x{size[1]}, {domain} {ratio:g}, seed {seed}" for ratio in RATIOS}
        if done >= set(names.values()):
            continue
        base = decoder(bench, size, seed)
        first: dict[str, Any] = {
            "schedule": Choice.parse("schedule", "wsd"),
            "mixture": Choice("mixture", "fixed", {"weights": plain}),
        }
        bench.train(base, seed, bench.stream(seed, **first), **first)
        before, before_own = nats(bench, base, texts), nats(bench, base, own)
        for ratio, name in names.items():
            if name in done:
                continue
            model = copy.deepcopy(base)
            weights = {d: (1 - ratio) / len(general) for d in general} | {domain: ratio}
            more: dict[str, Any] = {
                "schedule": Choice.parse("schedule", "rewarm"),
                "mixture": Choice("mixture", "fixed", {"weights": weights}),
            }
            curve, ours = Curve(bench, texts, scale.checkpoints), Curve(bench, own, scale.checkpoints)
            stream = bench.stream(seed + 100, **more)  # other documents first than the first run read
            bench.train(model, seed, stream, parts={"curve": curve, "domain": ours}, **more)
            yield [
                {
                    "run": name,
                    "seed": seed,
                    "parameters": model.config.parameters(),
                    "domain": domain,
                    "ratio": ratio,
                    "tokens": tokens,
                    "change": loss - before,
                    "loss": loss,
                    "domain_change": domain_loss - before_own,
                }
                for (tokens, loss), (_, domain_loss) in zip(curve.points, ours.points, strict=True)
            ]
