"""mixture: mean held-out bits per byte over domains after equal tokens, each domain counted alike.

The mean over domains, not over bytes, is the target: a corpus' sizes are an accident of collecting. The
cost is how many times the most repeated domain was seen.
"""

from __future__ import annotations

import statistics

from modicum.bench import training
from modicum.bench.measurement import Axes, Axis, Measurement, Settings
from modicum.budget import Cost
from modicum.core.choice import Choice

AXES = Axes(quality=Axis("domain_bits_per_byte"), cost=Axis("most_epochs", "lower", "epochs"))
LIMITS = training.LIMITS
TIER = "laptop"
Scale = training.Scale
QUICK = Scale(**training.QUICK)


def measure(choice: Choice, seed: int, settings: Settings) -> Measurement:
    bench = training.Bench.of(settings)
    model = bench.model(seed)
    record = bench.model_record(model)
    stream = bench.stream(seed, mixture=choice)
    result = bench.train(model, seed, stream)
    by_domain = {d: bench.bits(model, texts) for d in bench.corpus.domains if (texts := bench.corpus.heldout_texts(d))}
    seen = {name: domain.consumed / domain.size for name, domain in stream.sampler.domains.items()}
    metrics = {
        "domain_bits_per_byte": statistics.fmean(by_domain.values()),
        "most_epochs": max(seen.values()),
        **{f"{d}_bits_per_byte": v for d, v in by_domain.items()},
        **{f"{d}_share": domain.consumed / stream.done for d, domain in stream.sampler.domains.items()},
    }
    return Measurement(
        metrics=metrics,
        cost=Cost(seconds=result.seconds, flops=result.flops, tokens=result.tokens),
        model=record,
        data=bench.corpus.record,
    )
