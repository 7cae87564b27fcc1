"""Turn text into a deduplicated, filtered, tokenized corpus in one folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

SHOWN = 20  # lines about files that could not be read


def curate(
    sources: Annotated[
        list[str],
        typer.Argument(metavar="SOURCE...", help="Folders, files, hub:NAME, or `python`: its own documentation."),
    ],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder to write.")] = None,
    steps: Annotated[
        str | None,
        typer.Option(
            help="Steps between spaces, with knobs, such as 'normalise minhash:threshold=0.7'. See: modicum ls step"
        ),
    ] = None,
    vocab_size: Annotated[int, typer.Option(help="Size of the tokenizer that is trained.")] = 8192,
    reserved: Annotated[
        int,
        typer.Option(help="Special tokens to reserve at the end of the vocabulary for training objectives (ul2: 103)."),
    ] = 0,
    tokenizer: Annotated[
        str | None, typer.Option(help="Folder of an existing tokenizer (a model's) to use instead.")
    ] = None,
    heldout: Annotated[float, typer.Option(help="Fraction of the text to hold out from training.")] = 0.02,
    limit: Annotated[str | None, typer.Option(help="Read about this much of each source, e.g. 10MB.")] = None,
    text_field: Annotated[str, typer.Option(help="Field or column of JSONL and Parquet files with the text.")] = "text",
    encoder: Annotated[
        str | None, typer.Option(help="Encoder for steps that embed text, such as minilm; default: LSA of a sample.")
    ] = None,
    models: Annotated[
        str | None, typer.Option(help="Models for the step preselect, between commas, the weakest first.")
    ] = None,
    generator: Annotated[
        str | None,
        typer.Option(
            help="Model for the step rewrite: a folder, a name, or MODEL@http://... of an OpenAI-like server."
        ),
    ] = None,
    engine: Annotated[str, typer.Option(help="local, or ray.")] = "local",
    processes: Annotated[int | None, typer.Option(help="Worker processes; default: all cores.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Draw sources and steps with their counts; read and write nothing.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the statistics as JSON.")] = False,
) -> None:
    """Read, normalise, filter, deduplicate, split off held-out text, train a tokenizer, write token shards.

    The same command resumes after an interruption, and returns at once when everything is done. Files that could not be
    read, and documents that a generator failed on, are named, the rest is curated, and the exit code is 1.
    """
    import sys

    from modicum.budget import units
    from modicum.core.errors import UserError
    from modicum.core.events import Events
    from modicum.data.curate import STEPS, CurateConfig, drawing
    from modicum.data.curate import curate as run
    from modicum.data.readers import ReadConfig
    from modicum.pipeline.signals import makers

    most = None if limit is None else int(units.parse(limit, "bytes"))
    config = CurateConfig(
        steps=STEPS if steps is None else steps.split(),
        vocab_size=vocab_size,
        reserved=reserved,
        tokenizer=tokenizer,
        heldout=heldout,
        read=ReadConfig(limit_bytes=most, text_field=text_field),
        signals=makers(encoder, [name.strip() for name in (models or "").split(",") if name.strip()], generator),
    )
    if dry_run:
        print(drawing(sources, config))
        return
    if out is None:
        raise UserError("--out is missing; write for example --out corpus, or --dry-run to see what would be done")
    curation = run(sources, out, config, engine=engine, processes=processes, events=Events(stage="curate"))
    stats = curation.stats
    if as_json:
        print(json.dumps(stats, indent=2, ensure_ascii=False))
    else:
        _print(stats, out)
    failures = {"not read": curation.damaged, "not rewritten": curation.unanswered}
    for what, lines in failures.items():
        for line in lines[:SHOWN]:
            print(f"modicum: {what}: {line}", file=sys.stderr)
        if len(lines) > SHOWN:
            print(f"modicum: {what}: {len(lines) - SHOWN} more, see {out / 'drops.jsonl'}", file=sys.stderr)
    if any(failures.values()):
        raise typer.Exit(1)


def _print(stats: dict[str, Any], out: Path) -> None:
    from modicum.budget import units

    size = units.bytes_text
    print(f"\n{'step':<14}{'documents':>19}{'text':>26}{'seconds':>9}   dropped")
    for step in stats["steps"]:
        drops = ", ".join(f"{r} {n}" for r, n in sorted(step["drops"].items(), key=lambda item: -item[1]))
        count = f"{step['documents_in']:>8} -> {step['documents_out']:>7}"
        text = f"{size(step['bytes_in']):>12} -> {size(step['bytes_out']):>10}"
        print(f"{step['step']:<14}{count}{text}{step['seconds']:>9.1f}   {drops}".rstrip())
    for split, counts in stats["splits"].items():
        domains = ", ".join(f"{name} {entry['tokens']}" for name, entry in counts["domains"].items())
        print(
            f"{split}: {counts['documents']} documents, {size(counts['bytes'])}, {counts['tokens']} tokens"
            + (f" ({domains})" if domains else "")
        )
    print(
        f"{out}: tokenizer of {stats['tokenizer']['vocab_size']}, {stats['seconds']:.1f} s; "
        f"every dropped document and its reason: {out / 'drops.jsonl'}"
    )
