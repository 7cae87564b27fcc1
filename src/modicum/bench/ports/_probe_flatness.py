"""flatness where its claim can be seen: decoders that have all but learnt a small language, of nearly the same loss.

Beside the port's simulation (`detected`, `false_alarms`). Decoders of one and two layers, trained at two rates, are
kept at several points after they come near the floor, the grammar's own loss. Of each: the gap to that floor, the
Fisher trace, the Hessian trace, and the transfer: how well a linear classifier reads the hidden labels off its states.

    transfer_by_trace, transfer_by_loss     rank correlation of the transfer with the negative trace and loss, over the
                                            checkpoints within NEAR nats per word of the floor, of one size at a time

The paper's claim: the trace orders transfer among models of equal loss, the loss does not. Two rates, not an
adversarial optimizer, tell the runs of one size apart here.
"""

from __future__ import annotations

import time
from random import Random
from typing import Any

import numpy as np
import torch
from scipy import stats

from modicum.bench import fixtures
from modicum.bench.measurement import Measurement, Settings
from modicum.bench.ports import probe as port
from modicum.budget import Cost
from modicum.core import registry
from modicum.core.choice import Choice
from modicum.core.events import Events
from modicum.data.tokenizer import Tokenizer
from modicum.evaluate.curvature import curvature
from modicum.evaluate.playground import NOUNS
from modicum.evaluate.sentences import gaps, label_accuracy, read, sentence
from modicum.evaluate.teach import AnswerStream, Document
from modicum.model.config import llama_like
from modicum.model.decoder import Decoder
from modicum.train.callback import Callback
from modicum.train.config import TrainConfig
from modicum.train.loop import train

TASK = "metadata-cfg:depth=2,symbols=4,vocabulary=12,metadata_depth=0,fraction=0,prompt=3"
SHAPES, RATES, STEPS, POINTS = ((64, 1), (64, 2)), (1e-3, 4e-3), 1200, 6
SENTENCES, TESTED, TRACED, SIGNS, NEAR = 20_000, 300, 48, 2, 0.02
VOCABULARY, LENGTH, SEQUENCES = 300, 128, 8


class Checkpoints(Callback):
    """Calls `look(model)` at evenly spaced steps of the second half of a run."""

    def __init__(self, points: int, look: Any):
        self.points, self.look = points, look
        self.rows: list[tuple[float, float, float, float]] = []

    def after_step(self, trainer: Any) -> None:
        total, done = trainer.config.total_steps, trainer.steps_done
        late, width = done - total // 2, total - total // 2
        if late > 0 and late * self.points // width > (late - 1) * self.points // width:
            trainer.write_back()
            trainer.model.eval()
            self.rows.append(self.look(trainer.model))
            trainer.model.train()


def measure(choice: Choice, seed: int, settings: Settings) -> Measurement:
    simulated = port.measure(choice, seed, settings)
    if settings.model:
        return simulated
    start = time.perf_counter()
    studied = study(seed, quick=settings.quick)
    return Measurement(
        metrics=simulated.metrics | studied,
        cost=Cost(seconds=simulated.cost.seconds + time.perf_counter() - start),
        data={**simulated.data, "name": "simulated models, and decoders trained on a small language"},
    )


def study(seed: int, *, quick: bool) -> dict[str, float]:
    task: Any = registry.build("task", TASK)
    docs = list(task.docs("train", 300 if quick else SENTENCES, seed))
    tokenizer = Tokenizer.train((task.text(doc) for doc in docs[:2000]), VOCABULARY)
    documents: list[Document] = [[("", task.text(doc))] for doc in docs]
    tested = 16 if quick else TESTED
    test = [sentence(doc, task.config.depth) for doc in task.docs("test", 3 * tested, seed)]
    best = [task.grammar.nats([NOUNS.index(word) for word in one["words"]]) for one in test[:tested]]
    texts = [torch.tensor([[tokenizer.start_id, *tokenizer.encode(text(one), add_special=False)]]) for one in test]

    def look(model: Any) -> tuple[float, float, float, float]:
        reading = read(model, tokenizer, test)
        generator = torch.Generator().manual_seed(seed)
        traces = [curvature(model, ids, generator, probes=SIGNS) for ids in texts[: 4 if quick else TRACED]]
        return (
            gaps(reading, best, slice(None)),
            label_accuracy(reading, slice(None), tested),
            float(np.mean([t.fisher for t in traces])),
            float(np.mean([t.hessian for t in traces])),
        )

    by_trace, by_loss, near, rows = [], [], 0, []
    for width, layers in SHAPES:
        own: list[tuple[float, float, float, float]] = []
        for rate in RATES:
            shape = llama_like(tokenizer.vocab_size, width, layers, context_length=LENGTH)
            kept = Checkpoints(POINTS, look)
            fit(
                Decoder(shape, fixtures.seeded(seed)),
                documents,
                tokenizer,
                rate,
                seed,
                kept,
                steps=12 if quick else STEPS,
            )
            own += kept.rows
        rows += own
        gap, transfer, fisher, _ = np.array([row for row in own if row[0] < NEAR or quick]).reshape(-1, 4).T
        near += len(gap)
        if len(gap) > 3:
            by_trace.append(float(stats.spearmanr(transfer, -fisher).statistic))
            by_loss.append(float(stats.spearmanr(transfer, -gap).statistic))
    gap, transfer, fisher, hessian = np.array(rows).T
    return {
        "transfer_by_trace": float(np.mean(by_trace)) if by_trace else float("nan"),
        "transfer_by_loss": float(np.mean(by_loss)) if by_loss else float("nan"),
        "checkpoints": float(near),
        "gap": float(gap.min()),
        "transfer_low": float(transfer.min()),
        "transfer_high": float(transfer.max()),
        "fisher_low": float(fisher.min()),
        "fisher_high": float(fisher.max()),
        "hessian_over_fisher": float(np.median(hessian / fisher)),
    }


def fit(
    model: Decoder,
    documents: list[Document],
    tokenizer: Tokenizer,
    rate: float,
    seed: int,
    kept: Checkpoints,
    *,
    steps: int,
) -> None:
    def draw(rng: Random) -> Document:
        return documents[rng.randrange(len(documents))]

    stream = AnswerStream(draw, tokenizer, sequence_length=LENGTH, seed=seed)
    config = TrainConfig(
        steps=steps,
        sequence_length=LENGTH,
        batch_sequences=SEQUENCES,
        lr=rate,
        schedule="constant",
        dtype="float32",
        seed=seed,
    )
    train(model, stream, config, None, events=Events(None), label="", parts={"kept": kept})


def text(one: dict[str, Any]) -> str:
    return f"{one['front']} {' '.join(one['words'])}."
