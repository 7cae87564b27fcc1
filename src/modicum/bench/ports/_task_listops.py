"""Architectures compared from scratch and after self-pretraining, on a task's own training set (Amos et al. 2024).

Each attention pattern trains two decoders on the same documents for the same number of steps: one supervised from
random weights, one for the first half of the steps on the *inputs* alone (next token of every prompt, no answer, no
document of the test split) and supervised for the second half. The score is that of full attention after
self-pretraining; `gap_scratch` and `gap_self` are the differences between the best and the worst pattern in each arm,
the figure that the paper says shrinks. Departs: causal next-token prediction is the only denoising here, and a window
of eight tokens is what tells patterns apart on expressions of at most 64 tokens.
"""

from __future__ import annotations

import copy
import time
from random import Random
from typing import Any

from modicum.bench import fixtures
from modicum.bench.measurement import Measurement, Settings
from modicum.budget import Cost
from modicum.core import registry
from modicum.core.choice import Choice
from modicum.core.events import Events
from modicum.core.files import fingerprint
from modicum.data.tokenizer import Tokenizer
from modicum.evaluate.run import run_tasks
from modicum.evaluate.teach import AnswerStream, Document
from modicum.model.config import llama_like
from modicum.model.decoder import Decoder
from modicum.model.patterns import set_attention
from modicum.train.config import TrainConfig
from modicum.train.loop import train

PATTERNS = {"causal": "causal", "sliding": "sliding:window=8", "lambda": "lambda:window=8,sinks=1"}
EXAMPLES, TESTED, STEPS = 20_000, 400, 800
VOCABULARY, WIDTH, LAYERS, LENGTH, SEQUENCES, RATE = 320, 96, 2, 128, 8, 3e-3


def measure(choice: Choice, seed: int, settings: Settings) -> Measurement:
    examples, tested, steps = (200, 5, 4) if settings.quick else (EXAMPLES, TESTED, STEPS)
    task: Any = registry.build("task", choice)
    docs = list(task.docs("train", examples, seed))
    documents: list[Document] = [[(doc["prompt"], f" {doc['answer']}")] for doc in docs]
    inputs: list[Document] = [[("", doc["prompt"])] for doc in docs]
    tokenizer = Tokenizer.train((task.text(doc) for doc in docs[:2000]), VOCABULARY)
    shape = llama_like(tokenizer.vocab_size, WIDTH, LAYERS, context_length=2 * LENGTH)
    fresh = Decoder(shape, fixtures.seeded(seed)).to(settings.device)
    metrics: dict[str, float] = {}
    seconds = flops = grading = 0.0
    for name, pattern in PATTERNS.items():
        for arm, phases in {
            "scratch": ((documents, steps),),
            "self": ((inputs, steps // 2), (documents, steps - steps // 2)),
        }.items():
            model = copy.deepcopy(fresh)
            set_attention(model, pattern)
            for phase, (texts, n) in enumerate(phases):
                config = TrainConfig(
                    steps=n,
                    sequence_length=LENGTH,
                    batch_sequences=SEQUENCES,
                    lr=RATE,
                    dtype="float32",
                    seed=seed,
                    device=settings.device,
                )
                stream = AnswerStream(drawn(texts), tokenizer, sequence_length=LENGTH, seed=f"{seed}/{phase}")
                result = train(model, stream, config, None, events=Events(None), label="")
                seconds, flops = seconds + result.seconds, flops + result.flops
            began = time.perf_counter()
            metrics[f"{arm}_{name}"] = accuracy(model.float().eval(), tokenizer, choice, seed, tested)
            grading += time.perf_counter() - began
    arms = {arm: [metrics[f"{arm}_{name}"] for name in PATTERNS] for arm in ("scratch", "self")}
    return Measurement(
        metrics={
            "score": metrics["self_causal"],
            "stderr": (metrics["self_causal"] * (1 - metrics["self_causal"]) / tested) ** 0.5,
            "seconds_per_document": grading / (tested * 2 * len(PATTERNS)),
        }
        | metrics
        | {f"gap_{arm}": max(values) - min(values) for arm, values in arms.items()},
        cost=Cost(seconds=seconds + grading, flops=flops),
        model=fixtures.model_record(model, "small decoders, trained on the task"),
        data={"name": f"{choice}, seed {seed}", "checksum": fingerprint([d["id"] for d in docs])},
    )


def drawn(documents: list[Document]) -> Any:
    def make(rng: Random) -> Document:
        return documents[rng.randrange(len(documents))]

    return make


def accuracy(model: Decoder, tokenizer: Tokenizer, choice: Choice, seed: int, tested: int) -> float:
    (answered,) = run_tasks(
        model, tokenizer, [str(choice)], limit=tested, seed=seed, prefix="start", events=fixtures.Quiet()
    )
    return float(answered.value)
