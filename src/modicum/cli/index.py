"""Index a folder, a curated folder or a collection, for search and grounded answers."""

from __future__ import annotations

import json
from typing import Annotated

import typer


def index(
    source: Annotated[
        str,
        typer.Argument(
            help="A folder or file of text, a folder made by `modicum curate`, "
            "`python`, or a corpus.parquet with id and text."
        ),
    ],
    out: Annotated[str, typer.Option("--out", help="Folder to write.")],
    encoder: Annotated[
        str | None,
        typer.Option(
            help="For dense vectors: a model's folder, known name or hub id, or KEY:knob=value such as lsa:dims=256 "
            "(modicum show encoder). BM25 alone if left out."
        ),
    ] = None,
    words: Annotated[int, typer.Option(help="Words of a passage, at most about so many.")] = 200,
    overlap: Annotated[
        int, typer.Option(help="Words that a passage repeats of the one before, where a text is split.")
    ] = 0,
    method: Annotated[str, typer.Option("--index", help="Vector index: exact, or hnsw:M=32.")] = "exact",
    device: Annotated[str, typer.Option(help="Where the encoder runs: cpu or cuda.")] = "cpu",
    memory: Annotated[str | None, typer.Option(help="Refuse vectors that need more memory, e.g. 2GiB.")] = None,
    time: Annotated[str | None, typer.Option(help="Stop encoding after this time, keep the work: 10m.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
) -> None:
    """Index a folder, a curated folder or a collection, for search and grounded answers."""
    from modicum.budget import units
    from modicum.budget.budget import Budget, Deadline
    from modicum.core.choice import Choice
    from modicum.retrieve.encoders import make_encoder
    from modicum.retrieve.search import build_index
    from modicum.retrieve.sources import read_passages

    budget = Budget.parse(memory=memory, time=time)
    choice = Choice.parse("index", method)
    choice.config()  # a wrong knob is refused before anything is read
    skipped: dict[str, int] = {}
    made = make_encoder(encoder, device=device) if encoder else None
    header = build_index(
        read_passages(source, skipped, words=words, overlap=overlap),
        out,
        encoder=made,
        index=choice,
        budget=budget,
        deadline=Deadline(budget.seconds),
    )
    if as_json:
        shown = {k: v for k, v in header.items() if k != "files"}
        print(json.dumps(shown | {"out": out, "skipped": skipped}, indent=2))
        return
    sizes = ", ".join(f"{name} {units.bytes_text(n)}" for name, n in header["bytes"].items())
    print(f"{out}: {header['passages']} passages in {header['seconds']:.1f} s ({sizes})")
    for reason, n in sorted(skipped.items()):
        print(f"  left out: {n} {reason}")
    print(f'next: modicum search {out} "what to look for"')
