"""Evaluate a model: bits per byte of text, tasks, lm-eval tasks; or two models, paired."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from modicum.core.errors import UserError


def eval(
    model: Annotated[str, typer.Argument(help="A model folder or hub id.")],
    tasks: Annotated[
        str,
        typer.Option(
            help="Tasks with knobs, separated by commas: needle,copy:length=64,choice:file=F.jsonl,lm-eval:TASK."
        ),
    ] = "",
    text: Annotated[
        list[str] | None,
        typer.Option(help="Bits per byte of this folder, file or curated corpus (its held-out part); repeat for more."),
    ] = None,
    against: Annotated[str | None, typer.Option(help="A second model: paired differences with their errors.")] = None,
    limit: Annotated[int | None, typer.Option(help="Documents per task.")] = None,
    shots: Annotated[int, typer.Option(help="Solved examples before each question.")] = 0,
    seed: Annotated[int, typer.Option(help="Seed of generated tasks.")] = 0,
    include_path: Annotated[Path | None, typer.Option(help="Folder of your own lm-eval YAML tasks.")] = None,
    sequence_length: Annotated[int | None, typer.Option(help="Window for --text (default: the model's).")] = None,
    overlap: Annotated[float, typer.Option(help="Share of each window that only gives context.")] = 0.0,
    prefix: Annotated[
        str, typer.Option(help="Before a prompt: auto (bos if the model has one), start (bos or eos), none.")
    ] = "auto",
    size: Annotated[
        str | None,
        typer.Option(help="Of a model in blocks (compress --form bitstack): load so much, e.g. 24MiB."),
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; default: as stored.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps.")] = "cpu",
    batch_tokens: Annotated[int, typer.Option(help="Tokens of one forward pass; lower it if memory is short.")] = 8192,
    out: Annotated[
        Path, typer.Option(help="Folder where finished items are kept; the same command goes on from there.")
    ] = Path("evaluations"),
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
) -> None:
    """Evaluate a model: bits per byte of text, tasks, lm-eval tasks; or two models, paired."""
    from modicum.core import registry
    from modicum.core.choice import Choice

    names = split_tasks(tasks)
    if not names and not text:
        raise UserError(
            "nothing to evaluate; give --tasks (for example needle,copy:length=64) or --text FOLDER. "
            f"Tasks: {', '.join(registry.methods('task'))}, lm-eval:TASK"
        )
    for name in names:  # refuse a mistyped task before a model is loaded
        if not name.startswith("lm-eval:"):
            Choice.parse("task", name).config()
    for source in text or []:
        if not Path(source).exists() and not source.startswith(("hub:", "python")):
            raise UserError(f"--text {source}: no such folder or file")
    from modicum.data.tokenizer import Tokenizer
    from modicum.evaluate.compare import compare
    from modicum.evaluate.kept import Kept
    from modicum.evaluate.run import TaskResult, run_tasks, run_text, text_documents
    from modicum.model.folder import find_folder, load_model

    kept = Kept(out / "items.jsonl")

    def run(path: str, size: str | None = None) -> list[TaskResult]:
        tokenizer = Tokenizer.load(find_folder(path))
        decoder = load_model(path, dtype, device, size)
        results = [
            run_text(
                decoder,
                tokenizer,
                text_documents(source, limit),
                name=source,
                overlap=overlap,
                sequence_length=sequence_length,
                batch_tokens=batch_tokens,
                keep=kept,
            )
            for source in text or []
        ]
        return results + run_tasks(
            decoder,
            tokenizer,
            names,
            limit=limit,
            shots=shots,
            seed=seed,
            prefix=prefix,
            batch_tokens=batch_tokens,
            keep=kept,
            include_path=include_path,
        )

    first = run(model, size)
    rows = compare(first, run(against)) if against else []
    if as_json:
        record: dict[str, Any] = {"model": model, "results": [r.as_dict() for r in first]}
        if against:
            record |= {"against": against, "paired": rows}
        print(json.dumps(record, indent=2))
    elif against:
        _table(
            [("task", "figure", model, against, "difference", "95% interval", "items")]
            + [
                (
                    r["task"],
                    r["figure"],
                    f"{r['a']:.4f}",
                    f"{r['b']:.4f}",
                    f"{r['difference']:+.4f} ± {r['stderr']:.4f}",
                    f"{r['low']:+.4f} to {r['high']:+.4f}",
                    str(r["items"]),
                )
                for r in rows
            ]
        )
    else:
        _table(
            [("task", "figure", "value", "standard error", "documents")]
            + [
                (
                    r.task,
                    name,
                    f"{f['value']:.4f}",
                    f"{f['stderr']:.4f}" if f["stderr"] == f["stderr"] else "",
                    str(f["documents"]),
                )
                for r in first
                for name, f in r.figures.items()
            ]
        )


def split_tasks(text: str) -> list[str]:
    """`needle,copy:length=64,digits=2,lm-eval:arc` into tasks: a part with "=" but no ":" is a knob."""
    names: list[str] = []
    for part in filter(None, (p.strip() for p in text.split(","))):
        head, equals, _ = part.partition("=")
        if equals and ":" not in head and names and ":" in names[-1]:
            names[-1] += f",{part}"
        else:
            names.append(part)
    return list(dict.fromkeys(names))


def _table(rows: Sequence[tuple[str, ...]]) -> None:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
