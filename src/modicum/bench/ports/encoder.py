"""encoder: MRR@10 of known-item search without the query's text, against seconds to encode a passage.

Passages are the documented functions and classes of the corpus; each query is the first sentence of a docstring,
which is removed from its passage before indexing, so the search has to match other words (`retrieve.known_item`). The
seed draws the queries. Vectors are searched exactly, so that only the encoder is judged; BM25 stands beside it.
"""

from __future__ import annotations

import functools
import itertools
import tempfile
import time
from dataclasses import dataclass

from modicum.bench.measurement import Axes, Axis, Measurement, Settings
from modicum.budget import Cost
from modicum.core.choice import Choice
from modicum.core.errors import UserError
from modicum.core.files import fingerprint
from modicum.data.passages import Passage
from modicum.retrieve.encoders import make_encoder
from modicum.retrieve.known_item import known_item
from modicum.retrieve.sources import read_passages

AXES = Axes(quality=Axis("mrr_at_10", "higher"), cost=Axis("seconds_per_passage", "lower", "s"))
TIER = "laptop"


@dataclass(frozen=True, kw_only=True)
class Scale:
    passages: int = 400
    queries: int = 200


QUICK = Scale(passages=120, queries=40)


def measure(choice: Choice, seed: int, settings: Settings) -> Measurement:
    scale: Scale = settings.scale
    rows, record = _material(settings.data, scale.passages)
    encoder = make_encoder(choice, device=settings.device)
    start = time.perf_counter()
    texts = [p.text for p in rows[: min(len(rows), 200)]]
    encoder.count(texts)
    encoder.pool(texts)
    seconds = (time.perf_counter() - start) / len(texts)
    with tempfile.TemporaryDirectory() as folder:
        result = known_item(
            list(rows),
            encoder=encoder,
            limit=scale.queries,
            seed=seed,
            folder=folder,
            variants=("without_query_text",),
            examples=0,
        )
    modes = result["without_query_text"]
    metrics = {
        "mrr_at_10": modes["dense"]["mrr@10"]["mean"],
        "ndcg_at_10": modes["dense"]["ndcg@10"]["mean"],
        "fused_mrr_at_10": modes["fused"]["mrr@10"]["mean"],
        "bm25_mrr_at_10": modes["bm25"]["mrr@10"]["mean"],
        "seconds_per_passage": seconds,
    }
    return Measurement(metrics=metrics, cost=Cost(seconds=seconds * len(rows)), data=record)


@functools.lru_cache(maxsize=2)
def _material(source: str | None, count: int) -> tuple[tuple[Passage, ...], dict[str, object]]:
    """The first passages with a summary sentence, and the record of the data."""
    with_summary = (p for p in read_passages(source or "python") if p.summary)
    rows = tuple(itertools.islice(with_summary, count))
    if len(rows) < 20:
        raise UserError(f"{source} gives {len(rows)} passages with a docstring, 20 are needed; give source code")
    checksum = fingerprint([(p.id, p.text) for p in rows])
    return rows, {"name": source or "python", "passages": len(rows), "checksum": checksum}
