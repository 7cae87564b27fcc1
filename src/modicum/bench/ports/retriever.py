"""retriever: nDCG@10 of judged queries, against the bytes that a passage takes.

Passages and queries are those of a judged collection (--data), all of them, or documented functions of the Python
installation without the first sentences of their docstrings, which are the queries. Queries are ranked one by one, as
a server does: p50 and p99 are of one query, its encoding included. `all_at_5` says how often every relevant passage is
among the first five, which questions over several passages need. The seed draws the queries.
"""

from __future__ import annotations

import functools
import time
from dataclasses import dataclass

import numpy as np

from modicum.bench.measurement import Axes, Axis, Measurement, Settings
from modicum.bench.ports import trainer as collections
from modicum.budget import Cost
from modicum.core import registry
from modicum.core.choice import Choice
from modicum.core.files import fingerprint
from modicum.retrieve import metrics
from modicum.retrieve.collection import Collection

AXES = Axes(quality=Axis("ndcg_at_10", "higher"), cost=Axis("bytes_per_passage", "lower", "bytes"))
TIER = "laptop"
NOT_MEASURABLE = {
    "colberter": "it needs a model that was trained; bench trainer colberter measures both",
    "lexlip": "it needs a model that was trained; bench trainer lexlip measures both",
}


@dataclass(frozen=True, kw_only=True)
class Scale:
    passages: int = 800
    queries: int = 150


QUICK = Scale(passages=80, queries=20)


def measure(choice: Choice, seed: int, settings: Settings) -> Measurement:
    data = judged(settings.data, settings.scale)
    kept = np.random.default_rng(seed).permutation(len(data.queries))[: settings.scale.queries].tolist()
    relevant = [data.relevant[q] for q in kept]
    made = registry.build("retriever", choice, settings.device)
    start = time.perf_counter()
    made.build(data.texts)
    built = time.perf_counter() - start
    made.rank([data.queries[kept[0]]], 10)
    results, taken = [], []
    for q in kept:
        start = time.perf_counter()
        results.append(made.rank([data.queries[q]], 10).ids_QK)
        taken.append(time.perf_counter() - start)
    ids_QK = np.concatenate(results)
    return Measurement(
        metrics={
            "ndcg_at_10": float(metrics.ndcgs(ids_QK, relevant).mean()),
            "mrr_at_10": float(metrics.reciprocal_ranks(ids_QK, relevant).mean()),
            "recall_at_2": float(metrics.recalls(ids_QK, relevant, 2).mean()),
            "recall_at_5": float(metrics.recalls(ids_QK, relevant, 5).mean()),
            "recall_at_10": float(metrics.recalls(ids_QK, relevant, 10).mean()),
            "all_at_5": float(np.mean(metrics.recalls(ids_QK, relevant, 5) > 1 - 1e-9)),
            "bytes_per_passage": made.nbytes() / len(data.texts),
            "p50_seconds": float(np.percentile(taken, 50)),
            "p99_seconds": float(np.percentile(taken, 99)),
            "build_seconds": built,
        },
        cost=Cost(seconds=built),
        data={
            "name": data.name,
            "passages": len(data.texts),
            "queries": len(kept),
            "checksum": fingerprint(data.texts),
        },
    )


@functools.lru_cache(maxsize=1)
def judged(source: str | None, scale: Scale) -> Collection:
    """The judged collection of a folder, or `scale.passages` of the documented functions with their queries."""
    if source:
        return Collection.open(source)
    data = collections.material(None, collections.Scale(pairs=scale.queries, queries=2 * scale.queries))
    used = sorted({r for grades in data.relevant for r in grades})
    rows = (used + sorted(set(range(len(data.passages))) - set(used)))[: scale.passages]
    number = {r: i for i, r in enumerate(rows)}
    kept = [q for q, grades in enumerate(data.relevant) if all(r in number for r in grades)]
    return Collection(
        "python",
        [str(r) for r in rows],
        [data.passages[r] for r in rows],
        [data.queries[q] for q in kept],
        [{number[r]: g for r, g in data.relevant[q].items()} for q in kept],
    )
