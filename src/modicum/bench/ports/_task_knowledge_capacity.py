"""Bits per parameter: a small decoder trained on biographies, every person equally often, then asked about them.

The score is the fraction of values that greedy decoding gives; `bits_per_parameter` is the figure of the paper, with
`most_bits_per_parameter` beside it. Parameters include the embeddings; `bits_per_layer_parameter` leaves them out. The
same decoder is graded again with its layers in int8 and int4.
"""

from __future__ import annotations

import copy
import time
from typing import Any

from modicum.bench import fixtures, training
from modicum.bench.measurement import Measurement, Settings
from modicum.budget import Cost
from modicum.core import registry
from modicum.core.choice import Choice
from modicum.core.events import Events
from modicum.core.files import fingerprint
from modicum.data.document import Document
from modicum.data.tokenizer import Tokenizer
from modicum.evaluate.run import run_tasks
from modicum.model import attach
from modicum.model.config import llama_like
from modicum.model.decoder import Decoder
from modicum.train.config import TrainConfig
from modicum.train.loop import train

VOCABULARY, WIDTH, LAYERS, LENGTH, SEQUENCES, RATE = 512, 32, 2, 128, 8, 1e-2
TESTED = 300  # people


def measure(choice: Choice, seed: int, settings: Settings) -> Measurement:
    task: Any = registry.build("task", choice)
    people = min(task.config.people, 20) if settings.quick else task.config.people
    exposures = min(task.config.exposures, 3) if settings.quick else task.config.exposures
    name = str(Choice("task", choice.method, {**choice.knobs, "people": people, "exposures": exposures}))
    task = registry.build("task", name)
    documents = [Document(str(d["id"]), task.text(d), "people") for d in task.docs("train", None, seed)]
    tokenizer = Tokenizer.train((d.text for d in documents[:2000]), VOCABULARY)
    shape = llama_like(tokenizer.vocab_size, WIDTH, LAYERS, context_length=2 * LENGTH)
    model = Decoder(shape, fixtures.seeded(seed)).to(settings.device)
    stored = training.memory(documents, tokenizer)
    tokens = sum(len(ids) for ids in tokenizer.encode_batch([d.text for d in documents])) + len(documents)
    config = TrainConfig(
        tokens=tokens,
        sequence_length=LENGTH,
        batch_sequences=SEQUENCES,
        lr=RATE,
        dtype="float32",
        seed=seed,
        device=settings.device,
        packing="concat:mask=true",
    )
    result = train(model, config.stream(stored, total=tokens), config, None, events=Events(None), label="")
    model.float().eval()
    start = time.perf_counter()
    metrics = figures(model, tokenizer, name, seed, "")
    for form in ("int8", "int4"):
        metrics |= figures(formed(model, form), tokenizer, name, seed, f"_{form}")
    seconds = time.perf_counter() - start
    return Measurement(
        metrics={"score": metrics["known"], "seconds_per_document": seconds / (3 * TESTED)}
        | metrics
        | {"training_tokens": float(tokens)},
        cost=Cost(seconds=result.seconds + seconds, flops=result.flops),
        model=fixtures.model_record(model, "small decoder, trained on the biographies"),
        data={"name": f"{choice}, seed {seed}", "checksum": fingerprint([d.text for d in documents[:people]])},
    )


def formed(model: Decoder, form: str) -> Decoder:
    other = copy.deepcopy(model)
    attach.attach(other, {name: form for name in attach.linears(other) if name != "lm_head"})
    return other.eval()


def figures(model: Decoder, tokenizer: Tokenizer, name: str, seed: int, suffix: str) -> dict[str, float]:
    (answered,) = run_tasks(model, tokenizer, [name], limit=TESTED, seed=seed, prefix="start", events=fixtures.Quiet())
    task: Any = registry.build("task", name)
    total = sum(p.numel() for p in model.parameters()) if not suffix else 0
    bits = answered.figures["bits"]["value"]
    if suffix:
        return {f"bits{suffix}": bits}
    embedding = model.config.vocab_size * model.config.width
    known = task.config.people * bits
    return {
        "known": answered.value,
        "bits": bits,
        "most_bits": answered.figures["most_bits"]["value"],
        "bits_per_parameter": known / total,
        "most_bits_per_parameter": task.config.people * answered.figures["most_bits"]["value"] / total,
        "bits_per_layer_parameter": known / (total - embedding),
    }
