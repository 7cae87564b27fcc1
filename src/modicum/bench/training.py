"""A small training run, the same for every bench that needs one: only the method differs."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from modicum.bench import fixtures
from modicum.bench.measurement import Settings
from modicum.budget import Budget, Deadline
from modicum.core.events import Events
from modicum.data.document import Document
from modicum.data.shards import METADATA, MemoryDocuments
from modicum.data.stream import Stream
from modicum.data.tokenizer import Tokenizer
from modicum.evaluate.lm import bits_per_byte
from modicum.model.config import llama_like
from modicum.model.decoder import Decoder
from modicum.model.folder import find_folder, load_model
from modicum.train.callback import Callback
from modicum.train.config import TrainConfig
from modicum.train.loop import TrainResult, train


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Size of a measurement that trains. Given --model, the vocabulary and the shape are that model's.

    The proxy has a quarter of a million parameters and sees about one token for each: what one core trains in a quarter
    of a minute, so that three seeds of a port take minutes. It tells apart what moves the loss by more than about 1%,
    and says nothing of what only a well trained model shows.
    """

    tokens: int = 300_000
    corpus_bytes: int = 1_500_000
    heldout_bytes: int = 60_000
    vocabulary: int = 512
    width: int = 64
    layers: int = 4
    sequence_length: int = 128
    batch_sequences: int = 8
    rate: float = 5e-3  # peak learning rate
    dtype: str = "bfloat16"


QUICK: dict[str, Any] = {
    "tokens": 8 * 4 * 64,
    "corpus_bytes": 120_000,
    "heldout_bytes": 12_000,
    "vocabulary": 512,
    "width": 32,
    "layers": 1,
    "sequence_length": 64,
    "batch_sequences": 4,
    "dtype": "float32",
}
LIMITS = {"tokens", "seconds"}


@dataclass(frozen=True)
class Bench:
    """Corpus, tokenizer and sizes that the runs of one bench share."""

    corpus: fixtures.Corpus
    tokenizer: Tokenizer
    scale: Scale
    settings: Settings

    @classmethod
    def of(cls, settings: Settings, reserved: int = 0) -> Bench:
        """reserved: tokens that the fresh tokenizer keeps free at its end; bits per byte stay comparable."""
        scale = settings.scale
        corpus = fixtures.corpus(settings.data, scale.corpus_bytes, scale.heldout_bytes)
        if settings.model:
            tokenizer = Tokenizer.load(find_folder(settings.model))
        else:
            tokenizer = fixtures.tokenizer(
                settings.data, scale.corpus_bytes, scale.heldout_bytes, scale.vocabulary, reserved
            )
        return cls(corpus, tokenizer, scale, settings)

    def model(self, seed: int) -> Decoder:
        """A fresh small decoder, or the one given, in float32, the same for the same seed."""
        if self.settings.model:
            return load_model(self.settings.model, "float32", self.settings.device)
        shape = llama_like(
            self.tokenizer.vocab_size,
            self.scale.width,
            self.scale.layers,
            context_length=self.scale.sequence_length,
        )
        return Decoder(shape, fixtures.seeded(seed)).to(self.settings.device)

    def config(self, seed: int, *, tokens: int | None = None, rate: float | None = None, **methods: Any) -> TrainConfig:
        """The run of a bench; `methods` are choices by their port, those of its data among them."""
        scale = self.scale
        return TrainConfig(
            tokens=tokens or self.total,
            sequence_length=scale.sequence_length,
            batch_sequences=scale.batch_sequences,
            lr=rate or scale.rate,
            dtype=scale.dtype,
            seed=seed,
            device=self.settings.device,
            **methods,
        )

    def stream(
        self,
        seed: int,
        documents: Iterable[Document] | MemoryDocuments | None = None,
        *,
        tokens: int | None = None,
        **methods: Any,
    ) -> Stream:
        """Batches of the corpus, or of `documents`, for a run of `tokens` with `methods`."""
        if documents is None:
            documents = self._tokens()
        memory_documents = documents if isinstance(documents, MemoryDocuments) else memory(documents, self.tokenizer)
        config = self.config(seed, tokens=tokens, **methods)
        stream: Stream = config.stream(memory_documents, total=tokens or self.total)
        return stream

    def _tokens(self) -> MemoryDocuments:
        s = self.scale
        return corpus_tokens(self.settings.data, s.corpus_bytes, s.heldout_bytes, self.tokenizer)

    @property
    def total(self) -> int:
        """Tokens of one training run: the budget's, or the scale's."""
        return int(self.settings.budget.tokens or self.scale.tokens)

    def train(
        self,
        model: Decoder,
        seed: int,
        stream: Stream | None = None,
        *,
        rate: float | None = None,
        parts: Mapping[str, Callback] | None = None,
        tokens: int | None = None,
        budget: Budget | None = None,
        **methods: Any,
    ) -> TrainResult:
        """Train in place to the budget; `methods` as in `config`, and as the stream was built with, if it is given.

        A budget of seconds stops the run where it is. Afterwards the model is in float32 and in eval mode.
        """
        budget = budget or self.settings.budget
        result = train(
            model,
            stream or self.stream(seed, tokens=tokens, **methods),
            self.config(seed, tokens=tokens, rate=rate, **methods),
            None,
            events=Events(None),
            label="",
            deadline=Deadline(budget.seconds),
            parts=parts,
        )
        model.float().eval()
        return result

    def bits(self, model: Decoder, texts: list[str] | None = None) -> float:
        """Bits per byte of the held-out side, or of `texts`."""
        return bits_per_byte(
            model,
            self.tokenizer,
            texts or self.corpus.heldout_texts(),
            resamples=2,
            sequence_length=self.scale.sequence_length,
        ).bits_per_byte

    def model_record(self, model: Decoder, kind: str = "small decoder, fresh") -> dict[str, Any]:
        return fixtures.model_record(model, self.settings.model or kind)


def memory(documents: Iterable[Document], tokenizer: Tokenizer) -> MemoryDocuments:
    """Documents encoded as shards hold them: start, text, end; with their metadata, and scores if they have any."""
    domains: dict[str, list[tuple[list[int], int]]] = {}
    metadata: dict[str, list[list[int]]] = {}
    quality: dict[str, list[float]] = {}
    rows = list(documents)
    sites = list(dict.fromkeys(d.site for d in rows))
    site_ids = dict(
        zip(sites, tokenizer.encode_batch([METADATA.format(s) for s in sites], specials=False), strict=True)
    )
    for document, ids in zip(rows, tokenizer.encode_batch([d.text for d in rows], specials=False), strict=True):
        domains.setdefault(document.domain, []).append(([tokenizer.start_id, *ids, tokenizer.eos_id], 1))
        metadata.setdefault(document.domain, []).append(site_ids[document.site])
        score = document.quality
        quality.setdefault(document.domain, []).append(math.nan if score is None else score)
    return MemoryDocuments(domains, metadata=metadata, quality=quality, reserved=tokenizer.reserved)


@functools.lru_cache(maxsize=2)
def corpus_tokens(source: str | None, corpus_bytes: int, heldout_bytes: int, tokenizer: Tokenizer) -> MemoryDocuments:
    return memory(fixtures.corpus(source, corpus_bytes, heldout_bytes).train, tokenizer)


@functools.lru_cache(maxsize=6)
def _pretrained(scale: Scale, data: str | None, device: str, seed: int) -> Decoder:
    bench = Bench.of(Settings(scale=scale, data=data, device=device))
    model = bench.model(seed)
    bench.train(model, seed)
    return model


def pretrained(settings: Settings, seed: int, dtype: str = "float32") -> tuple[Bench, Decoder]:
    """The given model in `dtype`, or a small one trained with the baselines (once per seed and process), as a copy."""
    import copy

    bench = Bench.of(settings)
    if settings.model:
        return bench, load_model(settings.model, dtype, settings.device)
    plain = Scale(**{f.name: getattr(settings.scale, f.name) for f in fields(Scale)})
    return bench, copy.deepcopy(_pretrained(plain, settings.data, settings.device, seed))
