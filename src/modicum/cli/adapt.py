"""Adapt a model to question/answer pairs with a small trained form."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from modicum.adapt.spec import AdaptSpec
from modicum.cli._options import options_of

if TYPE_CHECKING:
    from modicum.adapt.run import AdaptResult


@options_of(AdaptSpec, flags={"batch_sequences": "--batch"})
def adapt(
    model: Annotated[str, typer.Argument(help="A model folder or hub id.")],
    pairs: Annotated[Path, typer.Argument(help="A JSONL file of question/answer or messages, or a curated folder.")],
    out: Annotated[
        Path, typer.Option("--out", help="Folder of adapter and checkpoints; a stopped run goes on from it.")
    ],
    spec: AdaptSpec,
    time: Annotated[str | None, typer.Option(help="Stop after so long and keep the work, e.g. 10m.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
) -> None:
    """Train FORM on the answers of PAIRS and write the adapter in PEFT format."""
    from modicum.adapt.run import adapt as run
    from modicum.budget import Deadline, units
    from modicum.core.events import Events

    deadline = Deadline(units.parse(time, "seconds") if time else None)
    result = run(model, pairs, spec, out, events=Events(out / "events.jsonl", "adapt"), deadline=deadline)
    if as_json:
        print(json.dumps(result.as_dict(), indent=2))
    else:
        _tell(result, out)


def _tell(result: AdaptResult, out: Path) -> None:
    from modicum.budget.units import bytes_text

    stopped = f"; stopped by {result.stopped}" if result.stopped else ""
    print(
        f"{out}: {result.steps} steps on {result.pairs} pairs in {result.seconds:.0f} s, "
        f"{result.trainable:,} trained parameters{stopped}"
    )
    for count, what in ((result.cut, "answers cut to fit"), (result.dropped, "left out: question too long")):
        if count:
            print(f"  {count} {what}")
    if result.heldout_before is not None and result.heldout_after is not None:
        print(
            f"  held-out loss {result.heldout_before:.4f} -> {result.heldout_after:.4f} "
            f"nats per answer token ({result.heldout_pairs} pairs)"
        )
    if result.adapter:
        print(f"  adapter {result.adapter} ({bytes_text(result.adapter_bytes)}), in PEFT format")
    if result.model:
        print(f"  model {result.model}")
        print(f"next: modicum chat {result.model}")
