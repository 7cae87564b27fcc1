"""Compress a model's weights; say what it takes on disk."""
from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def compress(
    model: Annotated[str, typer.Argument(help="A model folder or hub id.")],
    out: Annotated[Path, typer.Option("--out", help="Folder to write.")],
    form: Annotated[
        str, typer.Option(help="How weights are held: int8, int4:group=64, ... (modicum ls form)")
    ] = "int4:group=64",
    targets: Annotated[str, typer.Option(help="Layers, as globs with commas between.")] = "layers.*",
    embeddings: Annotated[
        str | None, typer.Option(help="Form of the token embedding, e.g. int8 (and of a head tied to it).")
    ] = None,
    head: Annotated[str | None, typer.Option(help="Form of the output head, e.g. int8.")] = None,
    yardstick: Annotated[
        Path | None, typer.Option(help="A curated folder: also say what xz and zstd make of its text.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
) -> None:
    """Compress a model's weights into FORM and write a folder that every verb loads."""
    from modicum.budget.units import bytes_text
    from modicum.compress.run import compress as run
    patterns = [t.strip() for t in targets.split(",") if t.strip()]
    result = run(model, form, out, targets=patterns, embeddings=embeddings, head=head)
    bits = _yardsticks(yardstick) if yardstick else {}
    if as_json:
        print(json.dumps(result.as_dict() | ({"yardsticks": bits} if bits else {}), indent=2))
        return
    print(f"{out}: {bytes_text(result.original_bytes)} -> {bytes_text(result.bytes)} "
          f"({result.ratio:.2f} times smaller)")
    print(f"  {result.modules} matrices in {result.form}: {result.bits_per_weight:.2f} bits per weight, "
          f"relative error {result.error:.4f} (most in {result.worst_module}: {result.worst_error:.4f})")
    for name, value in bits.items():
        print(f"  {name}: {value:.3f} bits per byte of held-out text")
    print(f"next: modicum chat {out}")


def _yardsticks(folder: Path) -> dict[str, float]:
    from modicum.compress.yardstick import yardsticks
    from modicum.data.document import read_documents
    return yardsticks((d.text for d in read_documents(folder, "heldout")),
                      (d.text for d in read_documents(folder, "train")))
