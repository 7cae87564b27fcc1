"""Write a model so that it is served from less memory than it takes; every verb that serves takes the folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def flash(
    model: Annotated[str, typer.Argument(help="A model folder, hub id or known name.")],
    out: Annotated[Path, typer.Option("--out", help="Folder to write.")],
    method: Annotated[str, typer.Option("--with", help="KEY or KEY:knob=value (modicum ls residency).")] = (
        "llm-in-a-flash"
    ),
    calibration: Annotated[
        str, typer.Option(help="Calibration data: a curated folder, a folder of text, or python (Python's own).")
    ] = "python",
    sequences: Annotated[int, typer.Option(help="Number of calibration sequences.")] = 16,
    length: Annotated[int, typer.Option(help="Tokens per calibration sequence.")] = 256,
    dtype: Annotated[str | None, typer.Option(help="Of the weights; default: the model's.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
) -> None:
    """Write a model so that it is served from less memory than it takes; every verb that serves takes the folder."""
    import shutil

    from modicum.budget.units import bytes_text
    from modicum.compress import calibration as calibrate
    from modicum.core import registry
    from modicum.core.choice import Choice
    from modicum.core.files import atomic_directory, tree_bytes, write_json
    from modicum.data.tokenizer import Tokenizer
    from modicum.model.folder import TOKENIZER_FILES, find_folder, load_model
    from modicum.serve.residency import NOTE, Residency, note

    picked = Choice.parse("residency", method)
    folder = find_folder(model)
    loaded = load_model(folder, dtype=dtype)
    made: Residency = registry.build("residency", picked)
    tokens_NT = None
    if made.reads_text:
        limit = min(length, loaded.config.context_length)
        tokens_NT = calibrate.sequences(calibrate.texts(calibration), Tokenizer.load(folder), sequences, limit)
    with atomic_directory(out) as new:
        made.prepare(loaded, new, tokens_NT)
        for name in TOKENIZER_FILES:
            if (folder / name).is_file():
                shutil.copyfile(folder / name, new / name)
        write_json(new / NOTE, note(picked))
    size = tree_bytes(out)
    print(
        json.dumps({"out": str(out), "bytes": size, "method": str(picked)}) if as_json else f"{out}: {bytes_text(size)}"
    )
    if not as_json:
        print(f"next: modicum serve {out}")
