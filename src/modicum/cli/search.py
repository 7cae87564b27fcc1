"""Search an index: lexical (BM25), dense, or both fused."""

from __future__ import annotations

import json
from typing import Annotated

import typer


def search(
    index: Annotated[str, typer.Argument(help="A folder made by `modicum index`.")],
    query: Annotated[str, typer.Argument(help="What to look for.")],
    k: Annotated[int, typer.Option("-k", help="Results to show.")] = 5,
    mode: Annotated[str | None, typer.Option(help="bm25, dense or fused (if there is an encoder).")] = None,
    where: Annotated[
        list[str] | None,
        typer.Option(help="Only passages of which this holds: source=docs/*, language=en,de, year>=2020; repeatable."),
    ] = None,
    encoder: Annotated[str | None, typer.Option(help="New path of the encoder's model, if it moved.")] = None,
    device: Annotated[str, typer.Option(help="Where the encoder runs: cpu or cuda.")] = "cpu",
    full: Annotated[bool, typer.Option("--full", help="Print full passages.")] = False,
    check: Annotated[bool, typer.Option("--check", help="Verify every file's checksum first.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
) -> None:
    """Search an index: lexical (BM25), dense, or both fused."""
    from modicum.retrieve.excerpt import excerpt
    from modicum.retrieve.filters import parse_where
    from modicum.retrieve.ground import approximate_tokens
    from modicum.retrieve.live import open_searcher

    searcher = open_searcher(index, device=device, model=encoder, check=check)
    hits = searcher.search(query, k, mode, where=parse_where(where or ()))
    if as_json:
        print(
            json.dumps(
                [
                    {
                        "rank": i,
                        "score": h.score,
                        "ranks": h.ranks,
                        "id": h.passage.id,
                        "title": h.passage.title,
                        "source": h.passage.source,
                        "meta": h.passage.meta,
                        "text": h.passage.text,
                    }
                    for i, h in enumerate(hits, 1)
                ],
                indent=2,
                ensure_ascii=False,
            )
        )
        return
    if not hits:
        print("nothing matches")
    for i, hit in enumerate(hits, 1):
        ranks = ", ".join(f"{name} #{rank}" for name, rank in hit.ranks.items())
        print(f"{i}. {hit.passage.title or hit.passage.id}  ({hit.passage.source})  {hit.score:.4g} [{ranks}]")
        text = hit.passage.text if full else excerpt(hit.passage.text, query, 80, approximate_tokens)
        print("   " + text.strip().replace("\n", "\n   ") + "\n")
