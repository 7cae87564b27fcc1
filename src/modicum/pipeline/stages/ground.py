"""ground: an index over the corpus, and how well known items are found in it."""

from __future__ import annotations

import contextlib
import io
import itertools
import time
from collections.abc import Iterator
from typing import Any

from modicum.budget import Cost, Meter
from modicum.core.files import tree_bytes
from modicum.data.curate import Curation
from modicum.data.passages import Passage, passages
from modicum.pipeline import training
from modicum.pipeline.context import Context
from modicum.pipeline.plan import Planner, StagePlan
from modicum.pipeline.recipe import Recipe
from modicum.retrieve.known_item import known_item

NEEDS = ("curate", "pretrain")
EXCERPT = 240


def uses(recipe: Recipe) -> dict[str, Any]:
    assert recipe.ground
    return {"ground": recipe.ground.model_dump()}


def plan(planner: Planner) -> StagePlan:
    """Does the stage's work on two small parts of the sample; time and memory grow in proportion from there."""
    recipe, curate = planner.recipe, planner.decisions["curate"]
    assert recipe.ground
    encoder = recipe.ground.encoder or training.scratch_model(planner)
    began = time.perf_counter()
    found = list(itertools.islice(_passages(Curation.load(curate["sample"])), recipe.ground.passages))
    reading = (time.perf_counter() - began) / curate["sample_share"]
    count = min(recipe.ground.passages or 1e18, len(found) / curate["sample_share"])
    points = []
    for number, size in enumerate((len(found) // 8, len(found) // 3)):
        folder = planner.scratch / f"ground-{number}"
        with contextlib.redirect_stderr(io.StringIO()), Meter() as meter:
            known_item(found[:size], encoder=encoder, index=recipe.ground.index, limit=32, folder=folder, examples=0)
        points.append((size, meter.seconds, meter.peak_bytes, tree_bytes(folder)))
    (n1, t1, m1, _), (n2, t2, m2, d2) = points
    rate, growth = max(t2 - t1, 0.5 * t2) / max(n2 - n1, 1), max(m2 - m1, 0) / max(n2 - n1, 1)
    return StagePlan(
        Cost(seconds=reading + rate * count, peak_bytes=growth * count, disk_bytes=d2 / n2 * count),
        {},
        f"{n1} and {n2} passages indexed, about {count:,.0f} expected",
    )


def _passages(curation: Curation) -> Iterator[Passage]:
    for split in ("train", "heldout"):
        for document in curation.documents(split):
            yield from passages(document)


def run(context: Context) -> dict[str, Any]:
    recipe = context.recipe
    assert recipe.ground
    curation = Curation.load(context.figures("curate")["folder"])
    found = list(itertools.islice(_passages(curation), recipe.ground.passages))
    encoder = recipe.ground.encoder or context.figures("pretrain")["folder"]
    result = known_item(
        found,
        encoder=encoder,
        index=recipe.ground.index,
        limit=recipe.ground.queries,
        seed=recipe.seed,
        folder=context.folder,
        events=context.events,
        examples=4,
    )
    by_id = {p.id: p for p in found}
    metrics = {name: {mode: _flat(m) for mode, m in result[name].items()} for name in ("withheld", "as_is")}
    examples = [
        {
            "query": e["query"],
            "rank": e["rank"],
            "hits": [
                {"title": h["title"], "source": h["source"], "excerpt": excerpt(by_id[h["id"]].text)} for h in e["hits"]
            ],
        }
        for e in result["examples"]["withheld"]
    ]
    return {
        "folder": str(context.folder / "as_is"),
        "passages": len(found),
        "queries": result["queries"],
        "metrics": metrics,
        "examples": examples,
        "index_bytes": tree_bytes(context.folder / "as_is"),
        "cost": {},
    }


def excerpt(text: str) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= EXCERPT else flat[:EXCERPT].rsplit(" ", 1)[0] + " …"


def _flat(metrics: dict[str, Any]) -> dict[str, float]:
    flat = {name: m["mean"] for name, m in metrics.items() if isinstance(m, dict) and "mean" in m}
    return flat | {"mrr": metrics["mrr@10"]["mean"], "mrr_stderr": metrics["mrr@10"]["error"]}
