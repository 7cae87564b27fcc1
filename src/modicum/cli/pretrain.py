"""Train a model on a curated folder, from scratch or going on from a given one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from modicum.cli._options import options_of
from modicum.train.config import PretrainSpec

if TYPE_CHECKING:
    from modicum.budget import Cost
    from modicum.train.pretrain import PretrainResult


@options_of(PretrainSpec, flags={"batch_tokens": "--batch"})
def pretrain(
    curated: Annotated[Path, typer.Argument(help="A folder made by `modicum curate`.")],
    out: Annotated[Path, typer.Option("--out", help="Folder of model and checkpoints; a stopped run goes on from it.")],
    spec: PretrainSpec,
    plan: Annotated[bool, typer.Option("--plan", help="Say what it will take, and stop.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
) -> None:
    """Train a model on CURATED and write it as a Hugging Face folder.

    On several devices: torchrun --nproc-per-node 8 --no-python modicum pretrain ... (sharded with FSDP2).
    """
    from modicum.core.events import Events
    from modicum.train import parallel
    from modicum.train.pretrain import plan as cost_of
    from modicum.train.pretrain import pretrain as run

    if plan:
        cost = cost_of(curated, spec)
        print(json.dumps(cost.as_dict(), indent=2) if as_json else _planned(cost))
        return
    try:
        result = run(curated, out, spec, events=Events(out / "events.jsonl", "pretrain"))
        if parallel.current().first:
            if as_json:
                print(json.dumps(result.as_dict(), indent=2))
            else:
                _tell(result, out)
    finally:
        parallel.leave()


def _planned(cost: Cost) -> str:
    from modicum.budget.units import bytes_text
    from modicum.core.events import count_text

    length = f"{count_text(cost.tokens)} tokens, {cost.flops:.3g} FLOPs, " if cost.tokens else ""
    return (
        f"{count_text(cost.parameters)} parameters, {length}peak {bytes_text(cost.peak_bytes)} beside the interpreter, "
        f"{bytes_text(cost.disk_bytes)} on disk"
    )


def _tell(result: PretrainResult, out: Path) -> None:
    from modicum.core.events import count_text, seconds_text

    run = result.run
    print(
        f"{out}: {count_text(result.parameters)} parameters, {run.steps} steps, "
        f"{count_text(run.tokens)} tokens in {seconds_text(run.seconds)} "
        f"({count_text(run.tokens / max(run.seconds, 1e-9))} tokens/s)"
        + (f", {run.skipped} skipped" if run.skipped else "")
    )
    if run.heldout_loss is not None:
        print(f"  loss {run.loss:.4f}, held-out {run.heldout_loss:.4f} nats per token")
    if result.folder:
        print(f"  model {result.folder}\nnext: modicum eval {result.folder}")
