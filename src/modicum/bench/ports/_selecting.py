"""What a step that keeps a fraction of the text is worth, in two pools whose documents' domains it does not see.

From scratch. The pool is as much of every domain, and clones: bulletins made of a few templates, a third of the
domains' bytes. Targets are documents of one domain that are in neither pool nor test. A proxy is trained for equal
tokens on what was kept, less than one epoch where it can be, and scored on the target's domain and on the others.
`precision` and `recall` count bytes of the target's domain, and need no training: they tell a wrong choice from a
right one that does not pay.

Warm. A proxy is pretrained on one domain and a little of another. Candidates have the same proportions; the target is
half of each. The best text for it is the rare domain, which it does not know: `new_share` is how much of what was kept
it is. It is then trained on for one epoch of the kept text, at most `warm_tokens`.

Losses of several models come from proxies of one size, each trained on a mixture of its own of all domains, ordered by
their loss on the targets.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import hashlib
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from modicum.bench import fixtures, training
from modicum.bench.measurement import Settings
from modicum.core import registry
from modicum.core.choice import Choice
from modicum.core.errors import UserError
from modicum.data.document import Document
from modicum.data.signals import Signals
from modicum.data.steps import Context, sampled
from modicum.evaluate.lm import document_nats
from modicum.model.decoder import Decoder
from modicum.train.loop import TrainResult

TEMPLATES = (
    "Station {a} reports {n} degrees and wind from the {b} at {m} knots. Pressure {k} hectopascal, falling. Visibility "
    "good. Next bulletin at {n} hours. Mariners near {a} are advised to keep watch on channel {m}.",
    "Bulletin {k} of station {a}: rain by evening, {n} millimetres expected. Wind {b}, {m} knots, rising later. Roads "
    "around {a} may be wet. The next report follows at {m} hours.",
    "Tide table for {a}: high water at {n} hours {m}, low water at {m} hours {n}. Height {k} centimetres. Stations to "
    "the {b} add ten minutes. Times are local.",
)
NAMES = ("Northpoint", "Graywater", "Eastling", "Harrow", "Stonebay", "Willowmere", "Kestrel", "Low Ferry")
WINDS = ("north", "south", "east", "west")
BULLETINS = 4  # in a clone


@dataclass(frozen=True, kw_only=True)
class Scale(training.Scale):
    pool_bytes: int = 3_000_000  # of all domains together
    test_bytes: int = 800_000  # held out, targets among them
    target: str = "howto"  # the domain to select; where the corpus has no such one, that of most documents
    clones: float = 0.3  # bytes of clones, of the domains'
    labels: int = 300  # documents of the pool with a judge's score
    old: str = "news"  # the common and the rare domain of the warm pool
    new: str = "maths"
    rare: float = 0.12  # of the warm pool's bytes that are of the rare one
    warm_tokens: int = 40_000
    proxies: int = 5  # models whose losses are compared
    proxy_tokens: int = 40_000


QUICK: dict[str, Any] = {
    "pool_bytes": 150_000,
    "test_bytes": 60_000,
    "warm_tokens": 2048,
    "proxies": 2,
    "proxy_tokens": 2048,
}


@dataclass(frozen=True, kw_only=True)
class Pool:
    """pool: documents with their domain hidden in `meta`; texts of the target domain to select for; tests by domain."""

    pool: list[Document]
    targets: tuple[str, ...]
    tests: dict[str, list[str]]
    target: str


def hidden(document: Document) -> Document:
    """The document without what would betray its domain: a neutral id, one domain for all."""
    name = hashlib.sha256(document.id.encode()).hexdigest()[:16]
    return Document(name, document.text, "pool", "pool", {"hidden": document.domain})


@functools.lru_cache(maxsize=1)
def pool_of(data: str | None, pool_bytes: int, test_bytes: int, wanted: str, clones: float) -> Pool:
    corpus = fixtures.corpus(data, pool_bytes, test_bytes)
    if len(corpus.domains) < 2:
        raise UserError("selections are measured on a corpus of several domains; give --data FOLDER with some")
    by_domain = {d: [x for x in corpus.heldout if x.domain == d] for d in corpus.domains}
    target = wanted if by_domain.get(wanted) else min(corpus.domains, key=lambda d: -len(by_domain[d]))
    texts = [d.text for d in by_domain.pop(target)]
    tests = {d: texts_of(documents, test_bytes // 100) for d, documents in by_domain.items() if documents}
    documents = [hidden(d) for d in corpus.train]
    documents += planted_clones(clones * sum(d.nbytes for d in documents))
    order = np.random.default_rng(11).permutation(len(documents))
    return Pool(
        pool=[documents[int(i)] for i in order],
        targets=tuple(texts[::2]),
        tests=tests | {target: texts_of([Document("", t) for t in texts[1::2]], test_bytes // 20)},
        target=target,
    )


def texts_of(documents: Iterable[Document], most: int) -> list[str]:
    """Texts of about `most` bytes, each cut to 4,000 characters so that one does not decide."""
    out: list[str] = []
    size = 0
    for d in documents:
        if size >= most:
            break
        out.append(d.text[:4000])
        size += len(out[-1])
    return out


def planted_clones(size: float) -> list[Document]:
    rng = np.random.default_rng(13)
    out: list[Document] = []
    while size > 0:
        lines = []
        for _ in range(BULLETINS):
            n, m, k = rng.integers(1, 24), rng.integers(1, 60), rng.integers(900, 1100)
            template = TEMPLATES[int(rng.integers(len(TEMPLATES)))]
            lines.append(template.format(a=rng.choice(NAMES), b=rng.choice(WINDS), n=n, m=m, k=k))
        out.append(Document(f"clone{len(out)}", "\n".join(lines), "pool", "pool", {"hidden": "clone"}))
        size -= out[-1].nbytes
    return out


def select(choice: Choice, pool: Sequence[Document], context: Context) -> tuple[list[Document], float]:
    """What the step keeps of the pool, and the CPU seconds it took, its fit included."""
    step = registry.build("step", choice)
    start = time.process_time()
    step.open(context)
    kept = [item for item in step.run(pool) if isinstance(item, Document)]
    step.close()
    if not kept:
        raise UserError(f"step {choice} dropped all {len(pool)} documents; give other knobs or another corpus")
    return kept, time.process_time() - start


def measure(choice: Choice, seed: int, bench: training.Bench, scale: Scale) -> tuple[dict[str, float], list[float]]:
    """Metrics, and seconds, FLOPs and tokens of what was trained."""
    data = bench.settings.data
    given = pool_of(data, scale.pool_bytes, scale.test_bytes, scale.target, scale.clones)

    def losses(texts: Sequence[str]) -> np.ndarray:
        models = proxies(scale, data, bench.settings.device, seed)
        length = scale.sequence_length
        return np.array(
            [[n for n, _, _ in document_nats(m, bench.tokenizer, texts, sequence_length=length)] for m in models]
        ).T

    context = Context(seed, Signals({"losses": losses}), {"target": given.targets})
    kept, seconds = select(choice, _labelled(given.pool, given.target, scale.labels), context)
    model = bench.model(seed)
    stream = bench.stream(seed, kept)
    result = bench.train(model, seed, stream)
    bits = {d: bench.bits(model, texts) for d, texts in given.tests.items()}
    size = {d: sum(x.nbytes for x in kept if x.meta["hidden"] == d) for d in (given.target, "clone")}
    total, whole = sum(d.nbytes for d in kept), sum(d.nbytes for d in given.pool)
    metrics = {
        "target_bits_per_byte": bits[given.target],
        "other_bits_per_byte": float(np.mean([v for d, v in bits.items() if d != given.target])),
        "mean_bits_per_byte": float(np.mean(list(bits.values()))),
        "precision": size[given.target] / total,
        "recall": size[given.target] / sum(d.nbytes for d in given.pool if d.meta["hidden"] == given.target),
        "clone_fraction": size["clone"] / total,
        "kept_fraction": total / whole,
        "select_seconds": seconds,
        "epochs": stream.done / stream.epoch_tokens,
    }
    context = dataclasses.replace(context, targets={"target": _two_domains(data, scale).targets})
    warm_metrics, warm_result = warm(choice, seed, bench, scale, context)
    spent = [getattr(result, n) + getattr(warm_result, n) for n in ("seconds", "flops", "tokens")]
    return metrics | warm_metrics, spent


def _labelled(pool: Sequence[Document], target: str, count: int) -> list[Document]:
    """Some documents with a judge's score: their hidden label, in place of a language model's opinion."""
    judged = {d.id for d in sampled(pool, count)}

    def one(d: Document) -> Document:
        score = float(d.meta["hidden"] == target)
        return dataclasses.replace(d, meta=d.meta | {"topic_score": score}) if d.id in judged else d

    return [one(d) for d in pool]


def warm(
    choice: Choice, seed: int, bench: training.Bench, scale: Scale, context: Context
) -> tuple[dict[str, float], TrainResult]:
    """The second pool: how much of what was kept is new to the model, and what training on it gives."""
    settings = bench.settings
    two = _two_domains(settings.data, scale)
    model = copy.deepcopy(_pretrained(scale, settings.data, settings.device, seed))
    _, candidates = two.split(scale.rare, seed)
    kept, _ = select(choice, _labelled(candidates, "new", scale.labels), context)
    before = np.mean([bench.bits(model, texts) for texts in two.tests])
    row = scale.sequence_length * scale.batch_sequences
    epoch = bench.stream(seed, kept, tokens=scale.warm_tokens).epoch_tokens
    tokens = max(min(scale.warm_tokens, epoch) // row, 1) * row
    stream = bench.stream(seed, kept, tokens=tokens)
    result = bench.train(model, seed, stream, tokens=tokens, rate=scale.rate / 5)
    metrics = {
        "new_fraction": sum(d.nbytes for d in kept if d.meta["hidden"] == "new") / sum(d.nbytes for d in kept),
        "warm_before_bits_per_byte": float(before),
        "warm_bits_per_byte": float(np.mean([bench.bits(model, texts) for texts in two.tests])),
        "warm_tokens": float(tokens),
    }
    return metrics, result


@dataclass(frozen=True)
class TwoDomains:
    """Documents of the common domain and of the rare one; test texts of each; targets of both in equal parts."""

    old: list[Document]
    new: list[Document]
    tests: tuple[list[str], list[str]]
    targets: tuple[str, ...]

    def split(self, rare: float, seed: int) -> tuple[list[Document], list[Document]]:
        """(pretraining documents, candidates), each with `rare` of its bytes of the rare domain, none in both."""
        rng = np.random.default_rng([seed, 19])
        sides: tuple[list[Document], list[Document]] = ([], [])
        for documents, label in ((self.old, "old"), (self.new, "new")):
            order = [documents[int(i)] for i in rng.permutation(len(documents))]
            for side, part in zip(sides, (order[::2], order[1::2]), strict=True):
                most = sum(d.nbytes for d in side) * rare / (1 - rare) if label == "new" else float("inf")
                size = 0
                for d in part:
                    if size >= most:
                        break
                    size += d.nbytes
                    side.append(dataclasses.replace(hidden(d), meta={"hidden": label}))
        return sides


@functools.lru_cache(maxsize=1)
def _two_domains(data: str | None, scale: Scale) -> TwoDomains:
    corpus = fixtures.corpus(data, scale.pool_bytes, scale.test_bytes)
    names = [d for d in (scale.old, scale.new) if d in corpus.domains]
    names = names if len(names) == 2 else sorted(corpus.domains)[:2]
    sides = [[dataclasses.replace(d, text=d.text[:4000]) for d in corpus.train if d.domain == n] for n in names]
    heldout = [[d.text[:4000] for d in corpus.heldout if d.domain == n] for n in names]
    tests = [texts_of([Document("", t) for t in texts[1::2]], scale.test_bytes // 40) for texts in heldout]
    count = min(len(texts[::2]) for texts in heldout)
    targets = tuple(t for texts in heldout for t in texts[::2][:count])
    return TwoDomains(sides[0], sides[1], (tests[0], tests[1]), targets)


def _bench(scale: Scale, data: str | None, device: str) -> training.Bench:
    plain = training.Scale(**{f.name: getattr(scale, f.name) for f in fields(training.Scale)})
    return training.Bench.of(Settings(scale=plain, data=data, device=device))


@functools.lru_cache(maxsize=1)
def _pretrained(scale: Scale, data: str | None, device: str, seed: int) -> Decoder:
    """The model to warm up, once in a process for each seed."""
    bench = _bench(scale, data, device)
    model = bench.model(seed)
    known, _ = _two_domains(data, scale).split(scale.rare, seed)
    bench.train(model, seed, bench.stream(seed, known))
    return model


@functools.lru_cache(maxsize=1)
def proxies(scale: Scale, data: str | None, device: str, seed: int) -> list[Decoder]:
    """Models of one size, each trained on a mixture of its own, from the weakest on the targets to the strongest."""
    bench = _bench(scale, data, device)
    rng = np.random.default_rng([seed, 23])
    targets = list(pool_of(data, scale.pool_bytes, scale.test_bytes, scale.target, scale.clones).targets[:60])
    models = []
    for number in range(scale.proxies):
        weights = rng.dirichlet([0.5] * len(bench.corpus.domains))
        mixture = {"method": "fixed", "weights": dict(zip(bench.corpus.domains, map(float, weights), strict=True))}
        model = bench.model(seed + 100 * number)
        stream = bench.stream(seed, tokens=scale.proxy_tokens, mixture=mixture)
        bench.train(model, seed, stream, tokens=scale.proxy_tokens, mixture=mixture)
        models.append((bench.bits(model, targets), number, model))
    return [model for _, _, model in sorted(models, key=lambda m: -m[0])]
