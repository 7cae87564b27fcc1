"""trainer: nDCG@10 on articles that were not trained on, after equal steps from one raw encoder, against the seconds.

Questions and passages of half of the articles train, those of the other half are searched: a folder of corpus, queries
and qrels (--data), or the documented functions of the Python installation, whose docstrings' first sentences are the
queries. The raw encoder (`student.Student`) is made of the training texts alone, the same for every method; the seed
draws batches. Negatives are BM25's. The teacher is `minilm`, which has seen such collections, as a teacher may: by the
cosine of its vectors for pairs, by MaxSim over its token states within a batch; `teacher_ndcg_at_10` says what there
is to learn. Beside the whole vectors stands what is left of them at half the layers and a quarter of the dimensions.

Every method gets the same search for its learning rate: each of `rates`, on a seed of its own, trained on three
quarters of the training articles and judged by the rest of them. No article of the test takes part.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from modicum.bench.measurement import Axes, Axis, Measurement, Settings
from modicum.budget import Cost
from modicum.core import registry
from modicum.core.choice import Choice
from modicum.core.files import atomic_file, cache_home, fingerprint
from modicum.retrieve import metrics
from modicum.retrieve.bm25 import BM25
from modicum.retrieve.encoders import make_encoder, unit
from modicum.retrieve.indexes import top_rows
from modicum.retrieve.known_item import read_collection, read_judgements
from modicum.retrieve.pairs import Pairs, max_sim, split_by_article, with_negatives, with_scores
from modicum.retrieve.sources import read_passages
from modicum.retrieve.student import Student
from modicum.retrieve.trainers import RetrieverTrainer
from modicum.retrieve.training import Training, train

AXES = Axes(quality=Axis("ndcg_at_10", "higher"), cost=Axis("train_seconds", "lower", "s"))
TIER = "laptop"
TEACHER = "minilm"
TUNING_SEED, TUNING_FRACTION = 10_007, 0.25


@dataclass(frozen=True, kw_only=True)
class Scale:
    width: int = 128
    layers: int = 4
    vocabulary: int = 5000
    max_tokens: int = 48
    steps: int = 100
    batch: int = 12
    rates: tuple[float, ...] = (1e-4, 3e-4, 1e-3, 3e-3)  # of which the best on tuning articles counts
    negatives: int = 12
    pairs: int = 1000  # most training queries
    queries: int = 300  # most test queries
    teacher_scale: float = 20.0  # what the teacher's cosines are multiplied by
    cosine: float = 20.0  # and the students', who start from a raw encoder
    late_scale: float = 2.0  # what its MaxSim scores (sums of cosines) are multiplied by


QUICK = Scale(width=32, layers=2, vocabulary=700, max_tokens=48, steps=4, batch=4, pairs=60, queries=40, rates=(3e-4,))


@dataclass(frozen=True)
class Material:
    """Training pairs with negatives, and the test: texts, and for each query the rows of its passages."""

    pairs: Pairs
    passages: list[str]
    queries: list[str]
    relevant: list[dict[int, float]]
    record: dict[str, Any]


def measure(choice: Choice, seed: int, settings: Settings) -> Measurement:
    scale: Scale = settings.scale
    rate = best_rate(str(choice), settings)
    student, figures, result = trained(choice, seed, settings, rate)
    data = material(settings.data, scale)
    return Measurement(
        metrics={
            **figures,
            "rate": rate,
            "raw_ndcg_at_10": raw_ndcg(settings.data, scale),
            "bm25_ndcg_at_10": lexical(settings.data, scale),
            **({"teacher_ndcg_at_10": teacher_ndcg(settings.data, scale)} if taught_by(choice) else {}),
            "loss": result.loss,
            "train_seconds": result.seconds,
            "steps": float(result.steps),
        },
        cost=Cost(seconds=result.seconds),
        data=data.record,
        model={"name": "raw encoder", "parameters": sum(p.numel() for p in student.parameters())},
    )


def trained(
    choice: Choice, seed: int, settings: Settings, rate: float, tuning: bool = False
) -> tuple[Student, dict[str, float], Any]:
    """The student after training at a learning rate, its figures, and the result of the training."""
    scale: Scale = settings.scale
    data = material(settings.data, scale, tuning)
    pairs = taught(settings.data, scale, tuning) if taught_by(choice) else data.pairs
    loaded = registry.load("trainer", choice.method)
    knobs = {f.name for f in dataclasses.fields(loaded.config)}
    wanted = ("teacher_scale", "late_scale", *(("cosine",) if loaded.cls.kind == "dense" else ()))
    scales = {k: getattr(scale, k) for k in wanted if k in knobs and k not in choice.knobs}
    student = copy.deepcopy(raw(settings.data, scale, tuning))
    trainer: RetrieverTrainer = registry.build(
        "trainer", Choice("trainer", choice.method, choice.knobs | scales), pairs
    )
    result = train(student, trainer, Training(steps=scale.steps, batch=scale.batch, lr=rate, seed=seed))
    return student, quality(student, trainer, data), result


def taught_by(choice: Choice) -> bool:
    """Whether the method, or the loss that it is given, learns from a teacher's scores."""
    return bool(registry.load("trainer", choice.method).cls.needs) or "margin-mse" in str(choice)


@functools.cache
def best_rate(choice: str, settings: Settings) -> float:
    """The learning rate of the best nDCG@10 on tuning articles."""
    rates = settings.scale.rates
    if len(rates) == 1:
        return float(rates[0])
    parsed = Choice.parse("trainer", choice)
    reached = {r: trained(parsed, TUNING_SEED, settings, r, tuning=True)[1]["ndcg_at_10"] for r in rates}
    return max(reached, key=lambda r: reached[r])


@functools.lru_cache(maxsize=2)
def material(source: str | None, scale: Scale, tuning: bool = False) -> Material:
    """Half of the articles for training, the other half for the test; tuning: a part of the first half is the test."""
    if source and (Path(source) / "qrels.parquet").is_file():
        folder = Path(source)
        rows = list(read_collection(folder / "corpus.parquet"))
        row_of = {p.id: i for i, p in enumerate(rows)}
        _, queries, grades = read_judgements(folder / "queries.parquet", folder / "qrels.parquet")
        texts, articles = [p.text for p in rows], [p.title or p.id for p in rows]
        judged = [{row_of[d]: g for d, g in g_of.items() if d in row_of and g > 0} for g_of in grades]
    else:
        summed = (p for p in read_passages(source or "python") if p.summary)
        rows = list(itertools.islice(summed, 2 * (scale.pairs + scale.queries)))  # no more is read
        texts, articles = [p.body for p in rows], [p.source.partition(":")[0] for p in rows]
        queries, judged = [p.summary for p in rows], [{i: 1.0} for i in range(len(rows))]
    test_P = split_by_article(articles, 0.5)
    train_P = ~test_P
    if tuning:
        first = [a for a, trains in zip(articles, train_P, strict=True) if trains]
        test_P = np.zeros(len(rows), dtype=bool)
        test_P[train_P] = split_by_article(first, TUNING_FRACTION, seed=1)
        train_P &= ~test_P
    rng = np.random.default_rng(0)
    own = [(q, next(iter(j))) for q, j in zip(queries, judged, strict=True) if j]
    kept = [j for j in judged if j]
    order = rng.permutation(len(own)).tolist()
    training = [i for i in order if train_P[own[i][1]]][: scale.pairs]
    test = [i for i in order if all(test_P[r] for r in kept[i])][: scale.queries]
    here = {r: i for i, r in enumerate(np.flatnonzero(train_P).tolist())}
    there = {r: i for i, r in enumerate(np.flatnonzero(test_P).tolist())}
    pairs = Pairs(
        [own[i][0] for i in training],
        [texts[r] for r in here],
        np.array([here[own[i][1]] for i in training]),
        articles_Q=[articles[own[i][1]] for i in training],
    )
    pairs = with_negatives(pairs, BM25.build(pairs.passages).search, scale.negatives)
    record = {
        "name": Path(source).name if source else "python",
        "train_queries": len(training),
        "test_queries": len(test),
        "test_passages": len(there),
        "checksum": fingerprint([texts, queries]),
    }
    relevant = [{there[r]: g for r, g in kept[i].items()} for i in test]
    return Material(pairs, [texts[r] for r in there], [own[i][0] for i in test], relevant, record)


@functools.lru_cache(maxsize=2)
def raw(source: str | None, scale: Scale, tuning: bool = False) -> Student:
    pairs = material(source, scale, tuning).pairs
    shape: dict[str, Any] = dict(width=scale.width, layers=scale.layers, heads=max(1, scale.width // 48))
    texts = [*pairs.queries, *pairs.passages]
    return Student.new(texts, vocabulary=scale.vocabulary, max_tokens=scale.max_tokens, **shape)


@functools.lru_cache(maxsize=2)
def taught(source: str | None, scale: Scale, tuning: bool = False) -> Pairs:
    """The training pairs with the teacher's scores, and its token states for MaxSim."""
    pairs = material(source, scale, tuning).pairs
    passages = tuple(_head(p, scale) for p in pairs.passages)
    passages_PD, queries_QD = teacher_vectors(passages), teacher_vectors(tuple(pairs.queries))
    row_of = {text: r for r, text in enumerate(pairs.passages)}
    query_of = {text: q for q, text in enumerate(pairs.queries)}

    def score(query: str, texts: list[str]) -> list[float]:
        return (passages_PD[[row_of[t] for t in texts]] @ queries_QD[query_of[query]]).tolist()

    tokens_P, tokens_Q = teacher_tokens(passages), teacher_tokens(tuple(pairs.queries))

    def late(query_B: np.ndarray, rows_P: np.ndarray) -> np.ndarray:
        docs = [tokens_P[r].astype(np.float32) for r in rows_P]
        return np.stack([max_sim(tokens_Q[q].astype(np.float32), docs) for q in query_B])

    return replace(with_scores(pairs, score), late=late)


def teacher_tokens(texts: tuple[str, ...]) -> list[np.ndarray]:
    """Token states of length 1, float16, kept in the cache: methods and seeds may be separate processes."""
    path = cache_home() / "bench" / f"{TEACHER}-{fingerprint(texts)}.npz"
    if not path.is_file():
        states = make_encoder(TEACHER).tokens(texts)
        ends = np.cumsum([len(s) for s in states])
        with atomic_file(path) as file:
            np.savez(file, states=np.concatenate(states).astype(np.float16), ends=ends)
    with np.load(path, allow_pickle=False) as kept:
        return np.split(kept["states"], kept["ends"][:-1])


def teacher_vectors(texts: tuple[str, ...]) -> np.ndarray:
    """Their means at length 1, which are the teacher's vectors but for the lengths of its states."""
    return unit(np.stack([s.astype(np.float32).mean(0) for s in teacher_tokens(texts)]))


def _head(text: str, scale: Scale) -> str:
    """What the student can read of a passage, so that the teacher judges no more."""
    return " ".join(text.split()[: scale.max_tokens])


def quality(student: Student, trainer: RetrieverTrainer, data: Material) -> dict[str, float]:
    """nDCG@10, MRR@10 and bytes of a passage; of dense vectors also what is left of them when cut."""
    hits, size = trainer.ranking(student, data.passages, data.queries, 10)
    figures = {
        "ndcg_at_10": float(metrics.ndcgs(hits.ids_QK, data.relevant).mean()),
        "mrr_at_10": float(metrics.reciprocal_ranks(hits.ids_QK, data.relevant).mean()),
        "bytes_per_passage": size,
    }
    if trainer.kind != "dense":
        return figures
    layers, dims = max(1, student.depth // 2), max(1, student.width // 4)
    passages, queries = pooled(student, data.passages, layers), pooled(student, data.queries, layers)
    for name, which, width in (("half_layers", 1, student.width), ("quarter_dims", 0, dims), ("both_cut", 1, dims)):
        x_PD, q_QD = passages[which][:, :width], queries[which][:, :width]
        if trainer.unit:
            x_PD, q_QD = unit(x_PD), unit(q_QD)
        ids_QK, _ = top_rows(np.ascontiguousarray(q_QD), np.ascontiguousarray(x_PD), 10)
        figures[f"ndcg_at_10_{name}"] = float(metrics.ndcgs(ids_QK, data.relevant).mean())
    return figures


def pooled(student: Student, texts: Sequence[str], layers: int) -> tuple[np.ndarray, np.ndarray]:
    """Vectors of the last layer and of layer `layers`."""
    import torch

    last, shallow = np.empty((len(texts), student.width), np.float32), np.empty((len(texts), student.width), np.float32)
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    student.eval()
    with torch.inference_mode():
        for start in range(0, len(order), 64):
            rows = order[start : start + 64]
            states = student([texts[i] for i in rows])
            last[rows], shallow[rows] = states.pooled().numpy(), states.pooled(layers - 1).numpy()
    return last, shallow


@functools.lru_cache(maxsize=2)
def raw_ndcg(source: str | None, scale: Scale) -> float:
    data, student = material(source, scale), raw(source, scale)
    passages_PD, queries_QD = unit(student.encode(data.passages)), unit(student.encode(data.queries))
    return float(metrics.ndcgs(top_rows(queries_QD, passages_PD, 10)[0], data.relevant).mean())


@functools.lru_cache(maxsize=2)
def lexical(source: str | None, scale: Scale) -> float:
    data = material(source, scale)
    return float(metrics.ndcgs(BM25.build(data.passages).search(data.queries, 10).ids_QK, data.relevant).mean())


@functools.lru_cache(maxsize=2)
def teacher_ndcg(source: str | None, scale: Scale) -> float:
    data = material(source, scale)
    passages_PD = teacher_vectors(tuple(_head(p, scale) for p in data.passages))
    ids_QK, _ = top_rows(teacher_vectors(tuple(data.queries)), passages_PD, 10)
    return float(metrics.ndcgs(ids_QK, data.relevant).mean())
