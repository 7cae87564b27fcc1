"""Write a model for other programs: a GGUF file for llama.cpp, or a Hugging Face folder, dense or in codes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from modicum.compress.export import Plan
    from modicum.model.gguf.write import Types

CODES = ("gptq", "awq", "compressed-tensors")  # layouts of compress.export_codes


def export(
    model: Annotated[str, typer.Argument(help="A model folder or hub id.")],
    out: Annotated[Path, typer.Argument(help="File OUT.gguf, or a folder with another --format.")],
    format: Annotated[
        str | None, typer.Option(help="gguf, hf (dense), gptq, awq or compressed-tensors [default: by OUT's ending].")
    ] = None,
    type: Annotated[
        str, typer.Option(help="Of the layers' matrices: f32, f16, bf16, q8_0, q4_0, q4_1, q5_0, q5_1, q2_k ... q6_k.")
    ] = "q8_0",
    embeddings: Annotated[
        str | None, typer.Option(help="Type of token embedding and head [default: q8_0 below a quantised type].")
    ] = None,
    fallback: Annotated[
        str | None, typer.Option(help="Type for matrices whose rows are not whole blocks of theirs (256 for q2_k ...).")
    ] = None,
    tensor: Annotated[
        list[str] | None, typer.Option(help="GLOB=TYPE over GGUF's names, e.g. 'blk.*.ffn_down.weight=q6_k'; repeat.")
    ] = None,
    adapter: Annotated[Path | None, typer.Option(help="A PEFT adapter folder to merge in first.")] = None,
    tokenizer: Annotated[bool, typer.Option(help="Put the folder's tokenizer and chat template in.")] = True,
    shrink: Annotated[
        bool, typer.Option(help="Take out MLP channels and key/value groups that are all zeros (--format hf).")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print the tensor types and sizes.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
) -> None:
    """Write MODEL, with its adapters and linear forms merged, for other programs."""
    from modicum.compress import export as run
    from modicum.core.errors import UserError
    from modicum.core.gguf import file_in
    from modicum.model.folder import find_folder, load_model
    from modicum.model.gguf.write import Types

    kind = format or ("gguf" if out.suffix == ".gguf" else "")
    if kind not in ("gguf", "hf", *CODES):
        raise UserError(
            f"{out}: give a file that ends in .gguf, or --format with gguf, hf, {', '.join(CODES)}"
            + (f", not {format}" if format else "")
        )
    types = Types(matrices=type, embeddings=embeddings, fallback=fallback, patterns=_patterns(tensor or []))
    source = find_folder(model)
    # Dequantised GGUF blocks are not exact in bfloat16: rounded to it, they would not be written back unchanged.
    loaded = load_model(source, dtype="float32" if kind == "gguf" and file_in(source) is not None else None)
    if adapter is not None:
        from modicum.adapt.peft_format import load_peft

        load_peft(loaded, adapter)
    if kind in CODES:
        from modicum.compress.export_codes import write

        if out.is_file():
            raise UserError(f"{out} is a file; give the folder to write")
        settings = write(loaded, out, source, kind)  # type: ignore[arg-type]
        print(json.dumps({"out": str(out), "quantization_config": settings}) if as_json else f"{out}: written")
        return
    grids = run.merged(loaded)
    if shrink:
        from modicum.model.submodel import without_zeros

        if kind != "hf":
            raise UserError("--shrink writes a folder: give --format hf")
        loaded = without_zeros(loaded)
    if kind == "hf":
        if not dry_run:
            run.write_folder(loaded, out, source)
        print(json.dumps({"out": str(out), "parameters": loaded.config.parameters()}) if as_json else f"{out}: written")
        return
    planned = run.plan(loaded, types, source if tokenizer else None)
    if not as_json:
        _show(planned, types)
    if not dry_run:
        run.write(loaded, out, types, planned, source.name, grids)
    if as_json:
        print(json.dumps({"out": str(out)} | planned.as_dict(), indent=2))
    elif not dry_run:
        print(f"{out}: written; to run it with llama.cpp: llama-cli -m {out}")


def _patterns(given: list[str]) -> dict[str, str]:
    from modicum.core.errors import UserError

    type_by_pattern = {}
    for text in given:
        pattern, equals, kind = text.rpartition("=")
        if not equals or not pattern or not kind:
            raise UserError(f"--tensor {text}: write GLOB=TYPE, e.g. 'blk.*.ffn_down.weight=q6_k'")
        type_by_pattern[pattern] = kind
    return type_by_pattern


def _show(planned: Plan, types: Types) -> None:
    from rich.console import Console
    from rich.table import Table

    from modicum.budget.units import bytes_text

    table = Table("tensors", "type", "count", "weights", "bits/weight", "size", "", box=None, pad_edge=False)
    for row in planned.rows:
        size = bytes_text(row.bytes)
        table.add_row(row.tensors, row.type, str(row.count), f"{row.weights:,}", f"{row.bits:.4g}", size, row.why)
    Console(width=140, highlight=False).print(table)
    print(f"together {bytes_text(planned.bytes)}, {planned.bits:.3f} bits per weight")
    for note in planned.notes:
        print(f"note: {note}")
