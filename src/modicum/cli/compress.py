"""Compress a model's weights; say what it takes on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from modicum.compress.run import CompressResult


def compress(
    model: Annotated[str, typer.Argument(help="A model folder or hub id.")],
    out: Annotated[Path, typer.Option("--out", help="Folder to write.")],
    form: Annotated[
        str, typer.Option(help="How weights are held: int8, int4:group=64, bitstack, ... (modicum ls linear)")
    ] = "int4:group=64",
    targets: Annotated[str, typer.Option(help="Layers, as globs with commas between.")] = "layers.*",
    embeddings: Annotated[
        str | None, typer.Option(help="Form of the token embedding, e.g. int8 (and of a head tied to it).")
    ] = None,
    head: Annotated[str | None, typer.Option(help="Form of the output head, e.g. int8.")] = None,
    calibration: Annotated[
        str | None,
        typer.Option(help="Text that shows the layers' inputs: a curated folder or a folder of text."),
    ] = None,
    sequences: Annotated[int, typer.Option(help="Pieces of the calibration text.")] = 64,
    length: Annotated[int, typer.Option(help="Tokens of a piece.")] = 512,
    size: Annotated[
        str | None,
        typer.Option(help="MODEL was made by --form bitstack: write it again in so many bytes, e.g. 24MiB."),
    ] = None,
    yardstick: Annotated[
        Path | None, typer.Option(help="A curated folder: also say what xz and zstd make of its text.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
) -> None:
    """Compress a model's weights into FORM and write a folder that every verb loads."""
    from modicum.budget.units import bytes_text
    from modicum.compress.run import compress as run
    from modicum.core.events import Events

    if size is not None:
        _cut(model, size, out, as_json)
        return
    patterns = [t.strip() for t in targets.split(",") if t.strip()]
    result = run(
        model,
        form,
        out,
        targets=patterns,
        embeddings=embeddings,
        head=head,
        calibration=calibration,
        sequences=sequences,
        length=length,
        events=Events(),
    )
    bits = _yardsticks(yardstick) if yardstick else {}
    if as_json:
        print(json.dumps(result.as_dict() | ({"yardsticks": bits} if bits else {}), indent=2))
        return
    print(
        f"{out}: {bytes_text(result.original_bytes)} -> {bytes_text(result.bytes)} ({result.ratio:.2f} times smaller)"
    )
    print(
        f"  {result.modules} matrices in {result.form}: {result.bits_per_weight:.2f} bits per weight, "
        f"relative error {result.error:.4f} (most in {result.worst_module}: {result.worst_error:.4f})"
    )
    for name, value in bits.items():
        print(f"  {name}: {value:.3f} bits per byte of held-out text")
    if result.least_bytes:
        print(f"  in blocks: loads in any size from {bytes_text(result.least_bytes)} on")
        print(f"next: modicum chat {out} --size {_between(result)}")
        return
    print(f"next: modicum chat {out}")


def _between(result: CompressResult) -> str:
    return f"{(result.least_bytes + result.bytes) / 2 / 2**20:.1f}MiB"


def _cut(model: str, size: str, out: Path, as_json: bool) -> None:
    import dataclasses

    from modicum.budget import units
    from modicum.compress.stacking import cut

    done = cut(model, units.parse(size, "bytes"), out)
    if as_json:
        print(json.dumps(dataclasses.asdict(done), indent=2))
        return
    print(f"{out}: {units.bytes_text(done.bytes)} of weights, {done.blocks} of {done.available} blocks")


def _yardsticks(folder: Path) -> dict[str, float]:
    from modicum.compress.yardstick import yardsticks
    from modicum.data.document import read_documents

    return yardsticks(
        (d.text for d in read_documents(folder, "heldout")), (d.text for d in read_documents(folder, "train"))
    )
