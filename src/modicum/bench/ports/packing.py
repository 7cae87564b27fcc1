"""packing: held-out bits per byte after equal tokens of batch, against the seconds they took.

A batch's tokens count whether they are text or padding, as they cost alike; padding, cut documents and the
keys that attention looks at are reported beside, and how much of the text that was drawn is in no row (`left_out`).
"""

from __future__ import annotations

import numpy as np

from modicum.bench import training
from modicum.bench.measurement import Axes, Axis, Measurement, Settings
from modicum.budget import Cost
from modicum.core.choice import Choice
from modicum.data.stream import NO_LOSS

AXES = Axes(quality=Axis("bits_per_byte"), cost=Axis("train_seconds", "lower", "s"))
LIMITS = training.LIMITS
TIER = "laptop"
Scale = training.Scale
QUICK = Scale(**training.QUICK)


def measure(choice: Choice, seed: int, settings: Settings) -> Measurement:
    bench = training.Bench.of(settings)
    model = bench.model(seed)
    record = bench.model_record(model)
    result = bench.train(model, seed, packing=choice)
    metrics = {
        "bits_per_byte": bench.bits(model),
        "train_seconds": result.seconds,
        "train_loss": result.loss,
        **layout(bench, choice, seed),
    }
    return Measurement(
        metrics=metrics,
        cost=Cost(seconds=result.seconds, flops=result.flops, tokens=result.tokens),
        model=record,
        data=bench.corpus.record,
    )


def layout(bench: training.Bench, choice: Choice, seed: int) -> dict[str, float]:
    """Shares over the batches of the run: padding, rows that begin within a document, keys per query."""
    stream = bench.stream(seed, packing=choice)
    rows = tokens = pads = cut = 0
    keys = 0.0
    while tokens < bench.total:
        batch = stream.next_batch(bench.scale.batch_sequences)
        T = batch.tokens_BT.shape[1]
        rows += len(batch)
        tokens += len(batch) * T
        pads += int((batch.targets_BT == NO_LOSS).sum())
        # A row whose first token is no document's start goes on with a document that was cut.
        cut += int((batch.tokens_BT[:, 0] != bench.tokenizer.start_id).sum())
        if batch.documents_BT is None:
            keys += len(batch) * T * (T + 1) / 2
        else:
            for row in batch.documents_BT.numpy():
                lengths = np.diff(np.flatnonzero(np.diff(row, prepend=row[0] - 1, append=row[-1] - 1)))
                keys += float((lengths * (lengths + 1) / 2).sum())
    given = stream.done + sum(span.length for span in stream.pending)
    return {
        "padding": pads / tokens,
        "cut_rows": cut / rows,
        "keys_per_query": keys / tokens,
        "left_out": 1 - given / max(stream.sampler.drawn_tokens, 1),
    }
