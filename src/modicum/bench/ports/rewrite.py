"""rewrite: bits per byte of clean text after a proxy went on training on spoilt text and what was made of it.

A proxy is pretrained on clean text. Passages that it has not seen are spoilt: lines broken, menus around them, capitals
and stops lost, lines doubled, words cut. It then trains on for equal tokens on these alone (the baseline), or on what
the rewriter returns for them. Two arms are measured beside the baseline: `oracle_bits_per_byte`, the spoilt passages
and their originals, is what a perfect rewriter gives; `placebo_bits_per_byte`, the spoilt passages and what the same
generator goes on to write after each one's first words, is what leaks from the generator's own training. A rewriter is
worth its seconds only where it beats the baseline *and* the placebo.

Text is generated once and shared by all seeds; `generate_seconds` are the CPU seconds of that once. How many requests
passed the rewriter's checks, how long replies are, and how many numbers and capitalised words they keep, stands beside.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from modicum.bench import fixtures, training
from modicum.bench.measurement import Axes, Axis, Measurement, Settings
from modicum.bench.ports._dirty import PHRASES
from modicum.budget import Cost
from modicum.core import registry
from modicum.core.choice import Choice
from modicum.core.errors import UserError
from modicum.data.document import Document, Drop
from modicum.data.replies import Generate, Replies, Request
from modicum.data.rewrites._text import count, overlap
from modicum.data.rewriting import rewrite
from modicum.model.config import llama_like
from modicum.model.decoder import Decoder

AXES = Axes(quality=Axis("bits_per_byte"), cost=Axis("generate_seconds", "lower", "s", against=""))
LIMITS: set[str] = set()
TIER = "laptop"


@dataclass(frozen=True, kw_only=True)
class Scale(training.Scale):
    heldout_bytes: int = 160_000  # half of them to spoil, half to judge by
    tokens: int = 150_000  # of clean text, before
    documents: int = 16  # passages that are spoilt
    words: int = 70  # of a passage
    more_tokens: int = 8192  # that the proxy trains on for
    generator: str = "smollm2"  # "": a fresh small decoder, whose text means nothing


QUICK = Scale(**training.QUICK, documents=6, words=30, more_tokens=512, generator="")


def measure(choice: Choice, seed: int, settings: Settings) -> Measurement:
    scale = settings.scale
    plain = training.Scale(**{f.name: getattr(scale, f.name) for f in dataclasses.fields(training.Scale)})
    bench, model = training.pretrained(dataclasses.replace(settings, scale=plain), seed)
    record = bench.model_record(model, "small decoder, pretrained")
    originals, tests = sides(settings.data, plain, scale.documents, scale.words)
    spoilt = [dataclasses.replace(d, text=spoil(d.text, k)) for k, d in enumerate(originals)]
    dirty = [spoil(text, 1000 + k) for k, text in enumerate(tests)]
    out, counts = generated(str(choice), settings.data, plain, scale.documents, scale.words, scale.generator)
    seconds = flops = tokens = 0.0

    def arm(documents: Sequence[Document]) -> dict[str, float]:
        nonlocal seconds, flops, tokens
        one = copy.deepcopy(model)
        stream = bench.stream(seed, documents, tokens=scale.more_tokens)
        result = bench.train(one, seed, stream, tokens=scale.more_tokens, rate=scale.rate / 5)
        seconds, flops, tokens = seconds + result.seconds, flops + result.flops, tokens + result.tokens
        return {"bits_per_byte": bench.bits(one, tests), "spoilt_bits_per_byte": bench.bits(one, dirty)}

    documents = [item for item in out if isinstance(item, Document)]
    if not documents:
        raise UserError(f"rewrite {choice} left no document of {len(spoilt)}; give another generator")
    metrics = arm(documents) | counts | likeness(spoilt, documents)
    if choice.method == registry.port("rewrite").baseline:
        metrics["before_bits_per_byte"] = bench.bits(model, tests)
        metrics["oracle_bits_per_byte"] = arm([*spoilt, *_apart(originals)])["bits_per_byte"]
        written = placebo(settings.data, plain, scale.documents, scale.words, scale.generator)
        metrics["placebo_bits_per_byte"] = arm([*spoilt, *_apart(written)])["bits_per_byte"]
    cost = Cost(seconds=seconds + counts["generate_seconds"], flops=flops, tokens=tokens)
    return Measurement(metrics=metrics, cost=cost, model=record, data=bench.corpus.record)


def _apart(documents: Sequence[Document]) -> list[Document]:
    """The documents in a domain of their own, as a rewriter's are."""
    return [dataclasses.replace(d, id=f"{d.id}#made", domain=f"{d.domain}-rewritten") for d in documents]


def sides(data: str | None, plain: training.Scale, documents: int, words: int) -> tuple[list[Document], list[str]]:
    """Passages to spoil, and other texts to judge by, none of which the proxy was pretrained on."""
    corpus = fixtures.corpus(data, plain.corpus_bytes, plain.heldout_bytes)
    prose = [d for d in corpus.heldout if d.domain != "code" and len(d.text.split()) >= words]
    if len(prose) < 2:
        prose = [d for d in corpus.heldout if len(d.text.split()) >= words // 2]
    order = [prose[int(i)] for i in np.random.default_rng(31).permutation(len(prose))]
    half = min(documents, len(order) // 2)
    if not half:
        raise UserError("the corpus holds too little prose to rewrite; give --data FOLDER with some")
    chosen = [Document(f"bench/{k}", passage(d.text, words), "prose", d.source) for k, d in enumerate(order[:half])]
    return chosen, [passage(d.text, 3 * words) for d in order[half : 2 * half + documents]]


def passage(text: str, words: int) -> str:
    """Whole sentences of the beginning, about so many words."""
    head = " ".join(text.split()[:words])
    end = max(head.rfind(". "), head.rfind("? "), head.rfind("! "))
    return head[: end + 1] if end > len(head) // 2 else head


def spoil(text: str, number: int) -> str:
    """The text as a careless extraction leaves it."""
    rng = np.random.default_rng([37, number])
    words = text.split()
    for at in np.flatnonzero(rng.random(len(words)) < 0.04):
        words[at] = words[at][: max(1, len(words[at]) // 2)]  # cut
    lines = []
    while words:
        n = int(rng.integers(5, 12))
        lines.append(" ".join(words[:n]))
        words = words[n:]
        if rng.random() < 0.15:
            lines.append(lines[-1])
        if rng.random() < 0.15:
            phrase = PHRASES[int(rng.integers(len(PHRASES)))]
            lines.append(phrase.format(n=int(rng.integers(99)), m=int(rng.integers(999)), y=2011, k=7))
    return re.sub(r"[.!?]", "", "\n".join(lines).lower())


@functools.lru_cache(maxsize=1)
def generator(name: str, data: str | None, plain: training.Scale) -> Generate:
    from modicum.serve.config import EngineConfig
    from modicum.serve.engine import Engine
    from modicum.serve.generate import local, of_engine

    if name:
        return local(name)
    tokenizer = training.Bench.of(Settings(scale=plain, data=data)).tokenizer
    shape = llama_like(tokenizer.vocab_size, plain.width, plain.layers, context_length=2048)
    model = Decoder(shape, fixtures.seeded(0)).eval()
    return of_engine(Engine(model, tokenizer, EngineConfig(cache="8192tok")))


@functools.lru_cache(maxsize=32)
def generated(
    choice: str, data: str | None, plain: training.Scale, documents: int, words: int, name: str
) -> tuple[list[Document | Drop], dict[str, float]]:
    """What a rewriter makes of the spoilt passages, with how it went."""
    originals, _ = sides(data, plain, documents, words)
    spoilt = [dataclasses.replace(d, text=spoil(d.text, k)) for k, d in enumerate(originals)]
    rewriter: Any = registry.build("rewrite", Choice.parse("rewrite", choice))
    replies = Replies(generator(name, data, plain)) if rewriter.generates else None
    start = time.process_time()
    out = list(rewrite(rewriter, spoilt, replies))
    seconds = time.process_time() - start if replies else 0.0
    drops = [item for item in out if isinstance(item, Drop)]
    made = sum(isinstance(item, Document) and "rewritten" in item.meta for item in out)
    reasons = {f"refused_{r}": float(sum(d.reason == r for d in drops)) for r in sorted({d.reason for d in drops})}
    return out, {
        "generate_seconds": seconds,
        "requests": float(replies.generated if replies else 0),
        "made": float(made),
        "accepted": made / max(made + len(drops), 1),
        **reasons,
    }


@functools.lru_cache(maxsize=1)
def placebo(data: str | None, plain: training.Scale, documents: int, words: int, name: str) -> list[Document]:
    """What the generator writes after the first words of each original, as long as that is."""
    originals, _ = sides(data, plain, documents, words)
    requests = [
        Request(prompt=" ".join(d.text.split()[:10]), max_tokens=int(1.4 * words), seed=k)
        for k, d in enumerate(originals)
    ]
    replies = Replies(generator(name, data, plain))(requests)
    return [
        dataclasses.replace(d, text=f"{q.prompt}{r.text}") for d, q, r in zip(originals, requests, replies, strict=True)
    ]


def likeness(sources: Sequence[Document], documents: Sequence[Document]) -> dict[str, float]:
    """Of what was made: length, terms, numbers kept, against the passage that it was made of."""
    of = {d.id: d.text for d in sources}
    pairs = [(of[d.origin], d.text) for d in documents if "rewritten" in d.meta]
    if not pairs:
        return {}
    numbers = [(set(re.findall(r"\d+", a)), set(re.findall(r"\d+", b))) for a, b in pairs]
    total = sum(len(a) for a, _ in numbers)
    return {
        "length_ratio": float(np.mean([count(b) / max(count(a), 1) for a, b in pairs])),
        "cosine": float(np.mean([overlap(a, b) for a, b in pairs])),
        "numbers_kept": sum(len(a & b) for a, b in numbers) / total if total else 1.0,
    }
