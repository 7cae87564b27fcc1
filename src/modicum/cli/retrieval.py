"""Compare retrievers on a judged collection: nDCG, MRR and recall, with intervals and paired tests."""

from __future__ import annotations

import json
from typing import Annotated

import typer


def retrieval(
    folder: Annotated[str, typer.Argument(help="corpus, queries and qrels as BEIR has them, or as Parquet.")],
    retrievers: Annotated[
        list[str] | None,
        typer.Argument(metavar="[RETRIEVER]...", help="KEY:knob=value (modicum ls retriever); the first is compared."),
    ] = None,
    fuse: Annotated[
        bool, typer.Option("--fuse", help="Also their fusion, fitted on half of the queries, judged on the rest.")
    ] = False,
    split: Annotated[str, typer.Option(help="Of BEIR's qrels.")] = "test",
    limit: Annotated[int | None, typer.Option(help="Queries, the first ones.")] = None,
    device: Annotated[str, typer.Option(help="Where encoders run: cpu or cuda.")] = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
) -> None:
    """Compare retrievers on a judged collection: nDCG, MRR and recall, with intervals and paired tests."""
    from modicum.core.choice import Choice
    from modicum.retrieve.collection import METRICS, Collection, evaluate

    choices = [Choice.parse("retriever", r) for r in retrievers or ["bm25"]]
    for choice in choices:
        choice.config()  # a wrong knob is refused before anything is read
    result = evaluate(Collection.open(folder, split, limit), choices, fuse=fuse, device=device)
    if as_json:
        print(json.dumps(result, indent=2))
        return
    print(f"{result['collection']}: {result['queries']} queries, {result['passages']} passages")
    if "weights" in result:
        shown = ", ".join(f"{name} {weight:.2g}" for name, weight in result["weights"].items())
        print(f"weights of the fusion: {shown}; fitted on {result['fitted_on']} other queries")
    width = max(map(len, result["retrievers"]))
    for name, figures in result["retrievers"].items():
        shown = "  ".join(
            f"{m} {figures[m]['mean']:.4f} [{figures[m]['low']:.3f}, {figures[m]['high']:.3f}]" for m in METRICS
        )
        print(f"{name:{width}}  {shown}")
    for p in result["paired"]:
        span = f"{p['difference']:+.4f} [{p['low']:+.4f}, {p['high']:+.4f}]"
        print(f"{p['a']} - {p['b']}: {p['metric']} {span} p={p['p']:.3g}")
