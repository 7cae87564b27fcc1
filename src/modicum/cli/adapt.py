"""Adapt a model to question/answer pairs with a small trained form."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from modicum.adapt.run import AdaptResult


def adapt(
    model: Annotated[str, typer.Argument(help="A model folder or hub id.")],
    pairs: Annotated[Path, typer.Argument(help="A JSONL file of question/answer or messages, or a curated folder.")],
    out: Annotated[
        Path, typer.Option("--out", help="Folder of adapter and checkpoints; a stopped run goes on from it.")
    ],
    form: Annotated[
        str, typer.Option(help="What is trained: lora:rank=8,alpha=16, dense, ... (modicum ls linear)")
    ] = "lora:rank=8",
    targets: Annotated[
        str | None,
        typer.Option(help="Layers, as globs with commas between, e.g. 'layers.*.attention.*' (the paper's)."),
    ] = None,
    base: Annotated[str | None, typer.Option(help="Form of the frozen weights below it, e.g. int4:group=64.")] = None,
    epochs: Annotated[float | None, typer.Option(help="Passes over the pairs (3 by default).")] = None,
    tokens: Annotated[str | None, typer.Option(help="Length of the run instead, e.g. 2Mtok.")] = None,
    steps: Annotated[int | None, typer.Option(help="Length of the run instead, in steps.")] = None,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 5e-4,
    sequence_length: Annotated[int, typer.Option(help="Tokens per row; longer answers are cut.")] = 512,
    batch: Annotated[int, typer.Option(help="Rows per step.")] = 8,
    micro_batch: Annotated[int | None, typer.Option(help="Rows per forward pass, to save memory.")] = None,
    heldout: Annotated[float, typer.Option(help="Share of questions kept for the loss.")] = 0.1,
    limit: Annotated[int | None, typer.Option(help="Pairs to train on at most.")] = None,
    merge: Annotated[bool, typer.Option(help="Also write the model with the update merged in.")] = False,
    dtype: Annotated[str, typer.Option(help="bfloat16 or float32.")] = "bfloat16",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    time: Annotated[str | None, typer.Option(help="Stop after so long and keep the work, e.g. 10m.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of weights, order and held-out choice.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
) -> None:
    """Train FORM on the answers of PAIRS and write the adapter in PEFT format."""
    from modicum.adapt.run import AdaptConfig
    from modicum.adapt.run import adapt as run
    from modicum.budget import Deadline, units
    from modicum.core.events import Events

    config = AdaptConfig(
        form=form,
        targets=targets,
        base=base,
        epochs=epochs,
        tokens=tokens,
        steps=steps,
        lr=lr,
        sequence_length=sequence_length,
        batch_sequences=batch,
        micro_batch=micro_batch,
        heldout=heldout,
        limit=limit,
        merge=merge,
        dtype=dtype,
        device=device,
        seed=seed,
    )
    deadline = Deadline(units.parse(time, "seconds") if time else None)
    result = run(model, pairs, config, out, events=Events(out / "events.jsonl", "adapt"), deadline=deadline)
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
