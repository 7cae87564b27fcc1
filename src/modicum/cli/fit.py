"""Fit a cache form on calibration data, once, for `--cache-form KEY:fit=FILE`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def fit(
    model: Annotated[str, typer.Argument(help="A model folder, hub id or known name.")],
    form: Annotated[str, typer.Argument(help="The form, e.g. cskv or matryoshkakv:steps=200.")],
    out: Annotated[Path, typer.Option("--out", help="File to write.")],
    calibration: Annotated[
        str, typer.Option(help="Calibration data: a curated folder, a folder of text, or python (Python's own).")
    ] = "python",
    sequences: Annotated[int, typer.Option(help="Number of calibration sequences.")] = 32,
    length: Annotated[int, typer.Option(help="Tokens per calibration sequence.")] = 512,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
) -> None:
    """Fit a cache form on calibration data, once, for `--cache-form KEY:fit=FILE`."""
    from modicum.budget.units import bytes_text
    from modicum.compress import calibration as calibrate
    from modicum.core.choice import Choice
    from modicum.core.errors import UserError
    from modicum.data.tokenizer import Tokenizer
    from modicum.model.folder import find_folder, load_model
    from modicum.serve.cacheforms._fitted import fit_form, write_fit

    picked = Choice.parse("cacheform", form)
    folder = find_folder(model)
    if sequences < 1 or length < 2:
        raise UserError(f"{sequences} sequences of {length} tokens are too few; give at least 1 of 2 tokens")
    loaded = load_model(folder)
    limit = min(length, loaded.config.context_length)
    tokens_NT = calibrate.sequences(calibrate.texts(calibration), Tokenizer.load(folder), sequences, limit)
    write_fit(out, fit_form(picked, loaded, tokens_NT), loaded.config)
    text = f"{picked.method}:" + ",".join([f"fit={out}", *(f"{k}={v}" for k, v in picked.knobs.items() if k != "fit")])
    size = out.stat().st_size
    shown = {"file": str(out), "bytes": size, "tokens": tokens_NT.numel(), "cache_form": text}
    if as_json:
        print(json.dumps(shown, indent=2))
        return
    print(f"{out}: {bytes_text(size)}, fitted on {tokens_NT.numel():,} tokens")
    print(f"next: modicum serve {model} --cache-form {text}")
