"""codec: bits per byte of held-out text by a proxy that learns its tokens, after equal tokens, against tokens per byte.

    bits per byte = loss per token x tokens / (bytes ln 2)

A codec that packs more text into a token lets a model see more text in as many tokens and steps, if it can learn the
tokens at all. `uniform_bits_per_byte` is what a model that has learnt nothing gives; a codec whose figure stays there
cannot be learnt. Codecs are fitted on the corpus' training side.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from modicum.bench import fixtures, training
from modicum.bench.measurement import Axes, Axis, Measurement, Settings
from modicum.budget import Cost
from modicum.core import registry
from modicum.core.choice import Choice
from modicum.data.codecs import Codec
from modicum.data.shards import MemoryDocuments
from modicum.evaluate.lm import bits_per_byte
from modicum.model.config import llama_like
from modicum.model.decoder import Decoder

AXES = Axes(quality=Axis("bits_per_byte"), cost=Axis("tokens_per_byte"))
LIMITS = {"tokens"}
TIER = "laptop"


@dataclass(frozen=True, kw_only=True)
class Scale(training.Scale):
    tokens: int = 200_000


QUICK = Scale(**training.QUICK)


class _Tokens:
    """A codec as the scorer sees a tokenizer: its ids, and one more that starts and ends a text."""

    def __init__(self, codec: Codec):
        self.codec = codec
        self.start_id = self.eos_id = self.pad_id = codec.vocab_size
        self.vocab_size = codec.vocab_size + 1
        self.reserved = 0

    def encode_batch(self, texts: Iterable[str], **options: Any) -> list[list[int]]:
        return [self.codec.encode(text) for text in texts]


def measure(choice: Choice, seed: int, settings: Settings) -> Measurement:
    bench = training.Bench.of(settings)
    tokens, documents = encoded(str(choice), settings.data, settings.scale)
    shape = llama_like(
        tokens.vocab_size, bench.scale.width, bench.scale.layers, context_length=bench.scale.sequence_length
    )
    model = Decoder(shape, fixtures.seeded(seed)).to(settings.device)
    record = bench.model_record(model)
    stream = bench.stream(seed, documents)
    result = bench.train(model, seed, stream)
    texts = bench.corpus.heldout_texts()
    score: Any = bits_per_byte(
        model,
        tokens,  # type: ignore[arg-type]
        texts,
        resamples=2,
        sequence_length=bench.scale.sequence_length,
    )
    size = sum(len(t.encode("utf-8", "surrogatepass")) for t in texts)
    count = sum(map(len, tokens.encode_batch(texts)))
    metrics = {
        "bits_per_byte": score.bits_per_byte,
        "tokens_per_byte": count / size,
        "bytes_per_token": size / count,
        "uniform_bits_per_byte": math.log2(tokens.vocab_size) * count / size,
        "epochs": stream.done / stream.epoch_tokens,
    }
    return Measurement(
        metrics=metrics,
        cost=Cost(seconds=result.seconds, flops=result.flops, tokens=result.tokens),
        model=record,
        data=bench.corpus.record,
    )


@functools.lru_cache(maxsize=2)
def encoded(choice: str, data: str | None, scale: Any) -> tuple[_Tokens, MemoryDocuments]:
    corpus = fixtures.corpus(data, scale.corpus_bytes, scale.heldout_bytes)
    codec: Codec = registry.build("codec", Choice.parse("codec", choice))
    tokens = _Tokens(codec.fit([d.text for d in corpus.train]))
    domains: dict[str, list[tuple[list[int], int]]] = {}
    for document in corpus.train:
        ids = [tokens.start_id, *codec.encode(document.text), tokens.eos_id]
        domains.setdefault(document.domain, []).append((ids, 1))
    return tokens, MemoryDocuments(domains)
