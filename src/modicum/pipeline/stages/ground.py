"""ground: an index over the corpus, and how well known items are found in it."""

from __future__ import annotations

import contextlib
import hashlib
import io
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from modicum.budget import Cost, Meter
from modicum.budget.meter import resident_now
from modicum.core.files import tree_bytes
from modicum.data.curate import Curation
from modicum.data.passages import Passage, passages
from modicum.pipeline import costs
from modicum.pipeline.context import Context
from modicum.pipeline.plan import Planner
from modicum.pipeline.report import gains, plots
from modicum.pipeline.section import Strict, method
from modicum.pipeline.stage import Finished, Inputs, Report, Stage, StagePlan
from modicum.pipeline.worker import trim_allocator
from modicum.retrieve.encoders import Encoder, make_encoder
from modicum.retrieve.known_item import known_item, known_items

BATCH = 64  # passages that an encoder takes at once, which its memory grows with
FIRST, MOST, TIMED = 16, 1000, 1.5  # passages of the plan's first sample, and of its second, seconds for that
EXCERPT = 240


class Section(Strict):
    index: method("index") = "exact"  # type: ignore[valid-type]
    encoder: str | None = None  # an encoder's folder, hub id or name; None: the model pretrained in this run
    queries: int = Field(400, ge=1)
    passages: int | None = 20_000


class Ground(Stage[Section]):
    order, default = 40, True
    gives = ("index",)

    def needed(self, section: Section) -> tuple[str, ...]:
        return ("corpus",) if section.encoder else ("corpus", "model")

    def models(self, section: Section) -> dict[str, str]:
        return {"encoder": section.encoder} if section.encoder and ":" not in section.encoder else {}

    def plan(self, section: Section, inputs: Inputs, planner: Planner) -> StagePlan:
        """The stage's own work on two small parts of the sample, the second as large as a few seconds allow."""
        curate, seed = inputs["corpus"], planner.recipe.seed
        named = section.encoder or costs.subject(planner, inputs["model"])
        scratch = planner.scratch / planner.name
        began = time.perf_counter()
        everything = list(_passages(Curation.load(curate["sample"]), None))
        reading = (time.perf_counter() - began) / curate["sample_share"]
        count = min(section.passages or 1e18, len(everything) / curate["sample_share"])
        encoder, load = costs.encoder(planner, named)
        passages = everything[:: max(len(everything) // MOST, 1)][: int(count)]  # of all documents
        longest = max(passages, key=lambda p: len(p.text))
        fraction = min(section.queries / count, 1.0)
        seconds: list[float] = []
        peaks: list[float] = []
        sizes = [min(FIRST, len(passages))]
        trim_allocator()
        resident = resident_now()
        with contextlib.redirect_stderr(io.StringIO()), Meter() as first:  # first calls take longer
            if not encoder.fitted:  # whose memory the longest passages decide, which go first
                encoder.encode([f"{longest.text} {n}" for n in range(min(int(count), BATCH))])
            else:
                _measure(passages[:FIRST], encoder, section, seed, 4, scratch / "0")
        while len(seconds) < len(sizes):
            size, folder = sizes[-1], scratch / f"{len(sizes)}"
            with contextlib.redirect_stderr(io.StringIO()), Meter() as meter:
                _measure(passages[:size], encoder, section, seed, max(round(fraction * size), 4), folder)
            seconds.append(meter.seconds)
            peaks.append(max(meter.peak_bytes - resident, 0.0))
            if len(sizes) == 1:
                bigger = max(int(TIMED / max(meter.seconds, 1e-3) * size), 4 * size)
                sizes.append(max(min(bigger, MOST, len(passages)), min(size + 1, len(passages))))
        rate = max(seconds[-1] - seconds[0], 0.2 * seconds[-1]) / max(sizes[-1] - sizes[0], 1)
        more = 1.0 if not encoder.fitted else max(1.0, min(count, BATCH) / sizes[-1])
        return StagePlan(
            Cost(
                seconds=load.seconds + reading + rate * count,
                peak_bytes=load.peak_bytes + max(peaks[-1] * more, first.peak_bytes - resident),
                disk_bytes=tree_bytes(scratch / f"{len(sizes)}") / sizes[-1] * count,
            ),
            {"sample": str(scratch / f"{len(sizes)}" / "as_is"), "encoder": named, "published": bool(section.encoder)},
            f"{sizes[-1]} passages indexed, about {count:,.0f} expected",
        )

    def run(self, section: Section, inputs: Inputs, context: Context) -> dict[str, Any]:
        passages = _passages(Curation.load(inputs["corpus"]["folder"]), section.passages)
        encoder = make_encoder(section.encoder or inputs["model"]["folder"])
        result = _measure(
            passages,
            encoder,
            section,
            context.recipe.seed,
            section.queries,
            context.folder,
            events=context.events,
            examples=4,
        )
        by_id = {p.id: p for p in passages}
        metrics = {
            name: {mode: _flat(m) for mode, m in result[name].items()} for name in ("without_query_text", "as_is")
        }
        examples = [
            {
                "query": e["query"],
                "rank": e["rank"],
                "hits": [
                    {"title": h["title"], "source": h["source"], "excerpt": excerpt(by_id[h["id"]].text)}
                    for h in e["hits"]
                ],
            }
            for e in result["examples"]["without_query_text"]
        ]
        return {
            "folder": str(context.folder / "as_is"),
            "encoder": section.encoder,
            "passages": len(passages),
            "queries": result["queries"],
            "metrics": metrics,
            "examples": examples,
            "index_bytes": tree_bytes(context.folder / "as_is"),
            "cost": {},
        }

    def miniature(self, section: Section) -> tuple[Section, dict[str, Any]]:
        return Section(passages=64, queries=8, encoder="lsa:dims=16", index=section.index), {}

    def report(self, done: Finished) -> Report:
        return Report(charts={"retrieval": plots.retrieval(done.figures)}, cards=gains.search(done.figures))


def _passages(curation: Curation, limit: int | None) -> list[Passage]:
    """Passages of the corpus, at most `limit`: all of the held-out documents, which questions are held out with, and
    of the training documents those that a hash of their name draws."""
    heldout = [p for document in curation.documents("heldout") for p in passages(document)]
    train = [p for document in curation.documents("train") for p in passages(document)]
    if limit is None or len(heldout) + len(train) <= limit:
        return train + heldout
    chosen = sorted(train, key=lambda p: hashlib.blake2b(p.id.encode("utf-8", "surrogatepass")).digest())
    kept = {p.id for p in chosen[: max(limit - len(heldout), 0)]}
    return [p for p in train if p.id in kept] + heldout[:limit]


def _measure(
    passages: list[Passage], encoder: Encoder, section: Section, seed: int, queries: int, folder: Path, **more: Any
) -> Any:
    """Known-item figures {"as_is", "without_query_text"} over `found`, with both indexes in `folder`.

    as_is: every passage as it is, the index that is served. without_query_text: the wanted passages lack the sentence
    that is the query; all others are as they are, so that only the former are encoded again.
    """
    knobs: dict[str, Any] = {"encoder": encoder, "index": section.index, "folder": folder} | more
    _remember(encoder)
    _, rows, _ = known_items(passages, queries, seed)
    query_rows = set(rows)
    bare = [p if i in query_rows else replace(p, summary="") for i, p in enumerate(passages)]
    as_is = known_item(passages, variants=("as_is",), limit=queries, seed=seed, **knobs)
    without = known_item(bare, variants=("without_query_text",), limit=None, seed=seed, **knobs)
    return {
        **as_is,
        "without_query_text": without["without_query_text"],
        "examples": as_is["examples"] | without["examples"],
    }


def _remember(encoder: Encoder) -> None:
    """Let an encoder whose vectors depend on nothing but the text encode each text once."""
    if encoder.fitted or "pool" in vars(encoder):
        return
    pool = encoder.pool
    seen: dict[str, np.ndarray] = {}

    def remembered(texts: Sequence[str]) -> np.ndarray:
        fresh = [t for t in dict.fromkeys(texts) if t not in seen]
        if fresh:
            seen.update(zip(fresh, pool(fresh), strict=True))
            trim_allocator()
        return np.stack([seen[t] for t in texts])

    encoder.pool = remembered  # type: ignore[method-assign]


def excerpt(text: str) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= EXCERPT else flat[:EXCERPT].rsplit(" ", 1)[0] + " …"


def _flat(metrics: dict[str, Any]) -> dict[str, float]:
    flat = {name: m["mean"] for name, m in metrics.items() if isinstance(m, dict) and "mean" in m}
    return flat | {"mrr": metrics["mrr@10"]["mean"], "mrr_stderr": metrics["mrr@10"]["error"]}
