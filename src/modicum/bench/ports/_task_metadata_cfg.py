"""metadata-cfg on decoders trained for it: those that read labels before half of their texts beside one that did not.

A decoder of two layers is trained on the task's own sentences, with loss on their words and ends and none on the
metadata, for equal steps whatever `metadata_depth`; depth 0 is the arm without metadata. Then, all without metadata:

    gap_{early, middle, late}       nats per word above the best possible model, at words 1-4, 5-16 and after
    label_{early, middle, late}     accuracy of a linear classifier of the labels from the last hidden state
    grammatical_{2, 4, 7}           share of greedy continuations of so many words that are sentences of the grammar

The score is `grammatical_7`. The paper's claim: the gap stays as it is, `label` and `grammatical` fall for short
prompts and rise for long ones.
"""

from __future__ import annotations

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
from modicum.evaluate.playground import NOUNS
from modicum.evaluate.run import run_tasks
from modicum.evaluate.sentences import gaps, label_accuracy, read, sentence
from modicum.evaluate.teach import AnswerStream, Document
from modicum.model.config import llama_like
from modicum.model.decoder import Decoder
from modicum.train.config import TrainConfig
from modicum.train.loop import train

SENTENCES, TESTED, STEPS = 40_000, 200, 250  # half trained: the gap is then some hundredths of a nat
VOCABULARY, WIDTH, LAYERS, LENGTH, SEQUENCES, RATE = 320, 128, 2, 128, 8, 3e-3
PROMPTS = (2, 4, 7)
BUCKETS = {"early": slice(0, 4), "middle": slice(4, 16), "late": slice(16, None)}


def measure(choice: Choice, seed: int, settings: Settings) -> Measurement:
    sentences, tested, steps = (300, 12, 3) if settings.quick else (SENTENCES, TESTED, STEPS)
    task: Any = registry.build("task", choice)
    docs = list(task.docs("train", sentences, seed))
    documents = [split(task.text(doc), task.config.depth) for doc in docs]
    tokenizer = Tokenizer.train((task.text(doc) for doc in docs[:2000]), VOCABULARY)
    shape = llama_like(tokenizer.vocab_size, WIDTH, LAYERS, context_length=LENGTH)
    model = Decoder(shape, fixtures.seeded(seed)).to(settings.device)

    def draw(rng: Random) -> Document:
        return documents[rng.randrange(len(documents))]

    stream = AnswerStream(draw, tokenizer, sequence_length=LENGTH, seed=seed)
    config = TrainConfig(
        steps=steps,
        sequence_length=LENGTH,
        batch_sequences=SEQUENCES,
        lr=RATE,
        dtype="float32",
        seed=seed,
        device=settings.device,
    )
    result = train(model, stream, config, None, events=Events(None), label="")
    model.float().eval()
    start = time.perf_counter()
    test = [sentence(doc, task.config.depth) for doc in task.docs("test", 3 * tested, seed)]
    best = [task.grammar.nats([NOUNS.index(word) for word in one["words"]]) for one in test[:tested]]
    reading = read(model, tokenizer, test)
    metrics = {f"gap_{name}": gaps(reading, best, where) for name, where in BUCKETS.items()}
    metrics |= {f"label_{name}": label_accuracy(reading, where, tested) for name, where in BUCKETS.items()}
    for words in PROMPTS:
        other = str(Choice("task", choice.method, {**choice.knobs, "prompt": words}))
        (scores,) = run_tasks(model, tokenizer, [other], limit=tested, seed=seed, events=fixtures.Quiet())
        metrics[f"grammatical_{words}"] = scores.value
    seconds = time.perf_counter() - start
    return Measurement(
        metrics={"score": metrics[f"grammatical_{PROMPTS[-1]}"], "seconds_per_document": seconds / (5 * tested)}
        | metrics,
        cost=Cost(seconds=result.seconds + seconds, flops=result.flops),
        model=fixtures.model_record(model, "small decoder, trained on the sentences"),
        data={"name": f"{choice}, seed {seed}", "checksum": fingerprint([task.text(d) for d in docs])},
    )


def split(text: str, depth: int) -> Document:
    """(metadata, sentence) of a training text: the loss stands on the second."""
    words = text.split(" ")
    return [(" ".join(words[:depth]), " " + " ".join(words[depth:]))]
