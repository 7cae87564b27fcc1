"""Add, replace or remove passages of an index, while it is searched and served."""

from __future__ import annotations

import json
from typing import Annotated

import typer


def update(
    index: Annotated[str, typer.Argument(help="A folder made by `modicum index`.")],
    source: Annotated[
        str | None, typer.Argument(help="What to add, as `modicum index` reads it; known ids are replaced.")
    ] = None,
    remove: Annotated[list[str] | None, typer.Option("--remove", help="Id of a passage to remove; repeatable.")] = None,
    compact: Annotated[bool, typer.Option("--compact", help="Then build one segment of what is there.")] = False,
    device: Annotated[str, typer.Option(help="Where the encoder runs: cpu or cuda.")] = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
) -> None:
    """Add, replace or remove passages of an index, while it is searched and served."""
    from modicum.core.errors import UserError
    from modicum.retrieve.live import Live
    from modicum.retrieve.sources import read_passages

    if source is None and not remove and not compact:
        raise UserError("nothing to do; give a SOURCE to add, --remove ID, or --compact")
    live = Live.adopt(index, device=device)
    removed = live.remove(remove) if remove else 0
    added = live.add(read_passages(source)) if source is not None else 0
    if compact:
        live.compact()
    segments = len(live.header["segments"])
    if as_json:
        print(
            json.dumps(
                {"index": index, "added": added, "removed": removed, "passages": len(live), "segments": segments}
            )
        )
        return
    print(f"{index}: {added} added or replaced, {removed} removed; {len(live)} passages in {segments} segments")
