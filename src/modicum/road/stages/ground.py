"""ground: an index over the corpus, and how well known items are found in it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from modicum.budget import Cost, machine
from modicum.core.files import tree_bytes
from modicum.data.curate import Curation
from modicum.data.passages import Passage, passages
from modicum.retrieve.known_item import known_item
from modicum.road import training
from modicum.road.context import Context
from modicum.road.plan import Planner, StagePlan
from modicum.road.recipe import Recipe

NEEDS = ("curate", "pretrain")
EXCERPT = 240


def uses(recipe: Recipe) -> dict[str, Any]:
    assert recipe.ground
    return {"ground": recipe.ground.model_dump()}


def plan(planner: Planner) -> StagePlan:
    """Encoding dominates: every passage passes the model twice (with and without its summary)."""
    recipe, curate = planner.recipe, planner.decisions["curate"]
    assert recipe.ground
    shape = training.main_shape(planner)
    text = curate["train_tokens"] * curate["bytes_per_token"] / (1 - recipe.curate.heldout)
    count = min(recipe.ground.passages or 1e18, text / 900)
    tokens = count * min(900 / curate["bytes_per_token"], 256)
    forward = training.forward_cost(planner, shape, 4096, 256)
    vectors = count * shape.width * 4
    return StagePlan(Cost(tokens=2 * tokens, flops=2 * tokens * shape.flops_per_token(256),
                          seconds=2 * tokens * forward.seconds / 4096 + text / 4e6 + 8,
                          peak_bytes=machine.import_bytes("modicum.road.stages.ground", "faiss", "bm25s", "scipy.sparse")
                          + forward.peak_bytes + 4 * vectors + 3 * count * 900,
                          disk_bytes=2 * (vectors + count * 1200)), {}, f"about {count:,.0f} passages")


def _passages(context: Context) -> Iterator[Passage]:
    curation = Curation.load(context.figures("curate")["folder"])
    limit = context.recipe.ground.passages if context.recipe.ground else None
    count = 0
    for split in ("train", "heldout"):
        for document in curation.documents(split):
            for passage in passages(document):
                if limit is not None and count >= limit:
                    return
                count += 1
                yield passage


def run(context: Context) -> dict[str, Any]:
    recipe = context.recipe
    assert recipe.ground
    found = list(_passages(context))
    encoder = recipe.ground.encoder or context.figures("pretrain")["folder"]
    result = known_item(found, encoder=encoder, index=recipe.ground.index, limit=recipe.ground.queries,
                        seed=recipe.seed, folder=context.folder, events=context.events, examples=4)
    by_id = {p.id: p for p in found}
    metrics = {name: {mode: _flat(m) for mode, m in result[name].items()} for name in ("withheld", "as_is")}
    examples = [{"query": e["query"], "rank": e["rank"],
                 "hits": [{"title": h["title"], "source": h["source"], "excerpt": excerpt(by_id[h["id"]].text)}
                          for h in e["hits"]]} for e in result["examples"]["withheld"]]
    return {"folder": str(context.folder / "as_is"), "passages": len(found), "queries": result["queries"],
            "metrics": metrics, "examples": examples, "index_bytes": tree_bytes(context.folder / "as_is"), "cost": {}}


def excerpt(text: str) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= EXCERPT else flat[:EXCERPT].rsplit(" ", 1)[0] + " …"


def _flat(metrics: dict[str, Any]) -> dict[str, float]:
    flat = {name: m["mean"] for name, m in metrics.items() if isinstance(m, dict) and "mean" in m}
    return flat | {"mrr": metrics["mrr@10"]["mean"], "mrr_stderr": metrics["mrr@10"]["error"]}
