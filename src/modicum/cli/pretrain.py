"""Train a model on a curated folder, from scratch or going on from a given one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from modicum.train.pretrain import PretrainResult


def pretrain(
    curated: Annotated[Path, typer.Argument(help="A folder made by `modicum curate`.")],
    out: Annotated[Path, typer.Option("--out", help="Folder of model and checkpoints; a stopped run goes on from it.")],
    parameters: Annotated[
        str | None, typer.Option(help="Size of a new model, e.g. 5M or 125M (5M by default).")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Go on from this model folder or hub id instead.")] = None,
    tokens: Annotated[str | None, typer.Option(help="Length of the run, e.g. 2Mtok.")] = None,
    time: Annotated[str | None, typer.Option(help="Length of the run instead, e.g. 5m.")] = None,
    steps: Annotated[int | None, typer.Option(help="Length of the run instead, in steps.")] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate (by the model's width).")] = None,
    optimizer: Annotated[str, typer.Option(help="Method and knobs, e.g. adamw:beta2=0.99.")] = "adamw",
    schedule: Annotated[str, typer.Option(help="e.g. cosine, wsd:decay=0.1, constant.")] = "cosine",
    objective: Annotated[str, typer.Option(help="What is learnt.")] = "next-token",
    averaging: Annotated[
        str | None,
        typer.Option(help="Which mean of the weights is kept, e.g. ema or lawa (what the schedule asks for)."),
    ] = None,
    mixture: Annotated[str, typer.Option(help="How much of each domain.")] = "natural",
    packing: Annotated[str, typer.Option(help="How documents become sequences.")] = "concat",
    order: Annotated[str | None, typer.Option(help="Order of the documents (what the schedule asks for).")] = None,
    transform: Annotated[
        list[str] | None, typer.Option(help="What is changed in documents' tokens, e.g. meco; may be given again.")
    ] = None,
    sequence_length: Annotated[int, typer.Option(help="Tokens per sequence.")] = 512,
    batch: Annotated[str, typer.Option(help="Tokens per step, over all processes, e.g. 16ktok.")] = "16ktok",
    micro_batch: Annotated[int | None, typer.Option(help="Sequences per forward pass, to save memory.")] = None,
    clip: Annotated[float, typer.Option(help="Limit of the gradient's norm, 0 for none.")] = 1.0,
    dtype: Annotated[str, typer.Option(help="bfloat16 or float32.")] = "bfloat16",
    nonfinite: Annotated[str, typer.Option(help="What a NaN does: stop, or skip the step.")] = "stop",
    checkpoint_every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 100,
    keep: Annotated[int, typer.Option(help="Checkpoints to keep.")] = 2,
    eval_every: Annotated[int, typer.Option(help="Steps between held-out losses, 0 for only at the end.")] = 100,
    memory: Annotated[
        list[str] | None, typer.Option(help="A memory saver, e.g. recompute or cce; may be given again.")
    ] = None,
    surgery: Annotated[str, typer.Option(help="What changes the model while it trains.")] = "none",
    form: Annotated[str | None, typer.Option(help="A linear form to train in, e.g. sltrain:rank=32.")] = None,
    targets: Annotated[str, typer.Option(help="The layers that get it: globs, with commas.")] = "layers.*",
    compile_: Annotated[bool, typer.Option("--compile", help="Compile the layers.")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    seed: Annotated[int, typer.Option(help="Seed of weights and order.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
) -> None:
    """Train a model on CURATED and write it as a Hugging Face folder.

    On several devices: torchrun --nproc-per-node 8 --no-python modicum pretrain ... (sharded with FSDP2).
    """
    from modicum.budget import units
    from modicum.core.events import Events
    from modicum.train import parallel
    from modicum.train.pretrain import PretrainConfig
    from modicum.train.pretrain import pretrain as run

    config = PretrainConfig(
        parameters=_count(parameters),
        model=model,
        tokens=tokens,
        steps=steps,
        seconds=units.parse(time, "seconds") if time else None,
        sequence_length=sequence_length,
        lr=lr,
        seed=seed,
        mixture=mixture,
        packing=packing,
        train={
            "batch_tokens": batch,
            "micro_batch": micro_batch,
            "optimizer": optimizer,
            "schedule": schedule,
            "objective": objective,
            **{k: v for k, v in (("averaging", averaging), ("order", order), ("transform", transform)) if v},
            "memory": memory or (),
            "surgery": surgery,
            "form": form,
            "targets": targets.split(","),
            "clip": clip,
            "dtype": dtype,
            "nonfinite": nonfinite,
            "device": device,
            "checkpoint_every": checkpoint_every,
            "keep": keep,
            "eval_every": eval_every,
            "compile": compile_,
        },
    )
    try:
        result = run(curated, out, config, events=Events(out / "events.jsonl", "pretrain"))
        if parallel.current().first:
            if as_json:
                print(json.dumps(result.as_dict(), indent=2))
            else:
                _tell(result, out)
    finally:
        parallel.leave()


def _count(text: str | None) -> float | None:
    """5M, 1.3B or 5000000 parameters."""
    from modicum.core.errors import UserError

    if text is None:
        return None
    scale = {"k": 1e3, "m": 1e6, "g": 1e9, "b": 1e9}.get(text.strip()[-1:].lower(), 1.0)
    try:
        value = float(text.strip()[:-1] if scale > 1 else text) * scale
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise UserError(f"{text!r} is not a number of parameters; write for example 5M or 1.3B")
    return value


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
