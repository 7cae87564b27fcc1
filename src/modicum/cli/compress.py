"""Quantise a model's weights and report their size and loss."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from modicum.compress.run import CompressResult
    from modicum.evaluate.quantization import Effect


def compress(
    model: Annotated[str, typer.Argument(help="A model folder or hub id.")],
    out: Annotated[Path, typer.Option("--out", help="Folder to write.")],
    form: Annotated[
        str | None,
        typer.Option(help="Format of the weights: int8, int4:group=64 (default), bitstack, ... (modicum ls linear)"),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(
            "--with", help="Compression method, instead of FORM: gptq:bits=3, wanda, ... (modicum ls compressor)."
        ),
    ] = None,
    targets: Annotated[str, typer.Option(help="Layers to compress, as comma-separated globs.")] = "layers.*",
    embeddings: Annotated[
        str | None, typer.Option(help="Form of the token embedding, e.g. int8 (and of a head tied to it).")
    ] = None,
    head: Annotated[str | None, typer.Option(help="Form of the output head, e.g. int8.")] = None,
    calibration: Annotated[
        str | None,
        typer.Option(help="Calibration data: a curated folder or a folder of text."),
    ] = None,
    sequences: Annotated[
        int | None, typer.Option(help="Number of calibration sequences [default: 64; 16 with --to].")
    ] = None,
    length: Annotated[
        int | None, typer.Option(help="Tokens per calibration sequence [default: 512; 256 with --to].")
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(help="Truncate a BitStack MODEL (made by --form bitstack) to this many bytes, e.g. 24MiB."),
    ] = None,
    to: Annotated[
        str | None,
        typer.Option(help="Size of the weight files, e.g. 90MiB: bits of each matrix and method by measured error."),
    ] = None,
    baselines: Annotated[
        Path | None,
        typer.Option(help="A curated folder: also compress its held-out text with xz and zstd, as baselines."),
    ] = None,
    measure: Annotated[
        bool, typer.Option(help="Measure bits per byte before and after on a sample of text, and warn of a loss.")
    ] = True,
    sample: Annotated[
        str | None,
        typer.Option(help="The text to measure on; default: the calibration text, else Python's documentation."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
) -> None:
    """Compress a model's weights into FORM, or by a method, and write a folder that every verb loads."""
    from modicum.budget.units import bytes_text
    from modicum.core.errors import UserError
    from modicum.core.events import Events

    if size is not None:
        _cut(model, size, out, as_json)
        return
    if to is not None:
        if form is not None or embeddings is not None or head is not None or targets != "layers.*":
            raise UserError("--to chooses the forms itself; leave out --form, --embeddings, --head and --targets")
        limits = {k: v for k, v in {"sequences": sequences, "length": length}.items() if v is not None}
        _to_size(model, to, out, method, calibration, limits, as_json)
        return
    patterns = [t.strip() for t in targets.split(",") if t.strip()]
    given: dict[str, Any] = {"embeddings": embeddings, "calibration": calibration, "sequences": sequences or 64}
    given |= {"length": length or 512, "targets": patterns, "events": Events()}
    if method is not None:
        if form is not None or head is not None:
            raise UserError("--with chooses the form of the layers itself; leave out --form and --head")
        from modicum.compress.method import compress_with

        result = compress_with(model, method, out, **given)
    else:
        from modicum.compress.run import compress as run

        result = run(model, form or "int4:group=64", out, head=head, **given)
    bits = _compressors(baselines) if baselines else {}
    effects = _effect(model, out, result, sample or calibration or "python", patterns) if measure else None
    if as_json:
        more: dict[str, Any] = {"baselines": bits} if bits else {}
        if effects is not None:
            more["effect"] = effects[0].as_dict() | {"alternatives": [o.as_dict() for o in effects[1]]}
        print(json.dumps(result.as_dict() | more, indent=2))
        return
    print(
        f"{out}: {bytes_text(result.original_bytes)} -> {bytes_text(result.bytes)} ({result.ratio:.2f} times smaller)"
    )
    print(
        f"  {result.modules} matrices in {result.form}: {result.bits_per_weight:.2f} bits per weight, "
        f"relative error {result.error:.4f} (most in {result.worst_module}: {result.worst_error:.4f})"
        + (f", {result.zeros:.1%} of the entries are zero" if result.zeros > 0.01 else "")
    )
    if effects is not None:
        from modicum.evaluate.quantization import advice

        effect, others = effects
        print(
            f"  bits per byte on a sample: {effect.before:.3f} -> {effect.after:.3f} "
            f"({effect.change:+.1%} ± {2 * effect.stderr:.1%})"
        )
        if effect.hurts:
            print("\n".join(advice(effect, others)))
    for name, value in bits.items():
        print(f"  {name}: {value:.3f} bits per byte of held-out text")
    if result.least_bytes:
        print(f"  elastic: loads at any size from {bytes_text(result.least_bytes)} on")
        print(f"next: modicum chat {out} --size {_between(result)}")
        return
    print(f"next: modicum chat {out}")


def _effect(
    model: str, out: Path, result: CompressResult, source: str, targets: list[str]
) -> tuple[Effect, list[Effect]]:
    """The loss that the form costs on a sample of `source`, and, where it is large, what other forms would cost."""
    from modicum.core.events import Progress
    from modicum.data.tokenizer import Tokenizer
    from modicum.evaluate import quantization
    from modicum.model.folder import find_folder, load_model

    folder = find_folder(model)
    tokenizer, texts = Tokenizer.load(folder), quantization.sample(source)
    total = 2 * sum(len(ids) for ids in tokenizer.encode_batch(texts, specials=False))
    with Progress("bits per byte before and after", total, "tok") as progress:
        before = quantization.score(load_model(folder), tokenizer, texts, progress.update)
        after = quantization.score(load_model(out), tokenizer, texts, progress.update)
    effect = quantization.effect(result.form, before, after, result.bits_per_weight)
    others = quantization.alternatives(str(folder), tokenizer, texts, before, effect, targets) if effect.hurts else []
    return effect, others


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


def _to_size(
    model: str,
    size: str,
    out: Path,
    method: str | None,
    calibration: str | None,
    limits: dict[str, int],
    as_json: bool,
) -> None:
    from modicum.budget import units
    from modicum.compress.sizing import METHODS, compress_to

    methods = METHODS if method is None else (method,)
    done = compress_to(
        model,
        units.parse(size, "bytes"),
        out,
        methods=methods,
        calibration=calibration,
        **limits,  # type: ignore[arg-type]
    )
    speeds = {"before": _tokens_per_second(model), "after": _tokens_per_second(str(out))}
    if as_json:
        print(json.dumps(done.as_dict() | {"tokens_per_second": speeds}, indent=2))
        return
    text = units.bytes_text
    print(f"{out}: {text(done.original_bytes)} -> {text(done.bytes)} (at most {text(done.budget)})")
    counts = ", ".join(f"{n} of {name}" for name, n in done.bits.items())
    print(f"  matrices: {counts}; embedding: {done.embedding}")
    tried = ", ".join(f"{name} {kl:.3f}" for name, kl in sorted(done.kl_by_method.items(), key=lambda item: item[1]))
    print(f"  method: {done.method} (KL per token on validation text: {tried})")
    for d in done.domains:
        kl = f"{d.kl:.4f} ± {2 * d.kl_stderr:.4f}"
        print(f"  {d.name}: bits per byte {d.before:.3f} -> {d.after:.3f}, KL per token {kl}")
        if done.uniform_bytes:
            print(
                f"    {done.uniform} everywhere ({text(done.uniform_bytes)}): {d.uniform_kl:.4f}, "
                f"{d.gain:+.4f} ± {2 * d.gain_stderr:.4f} (paired)"
            )
    print(f"  tokens per second here: {speeds['before']:.0f} -> {speeds['after']:.0f}")
    for line in done.warnings:
        print(f"warning: {line}")
    print(f"next: modicum chat {out}")


def _tokens_per_second(model: str, tokens: int = 64) -> float:
    """Of one sequence generated by the engine, after a short one that warms up."""
    import time

    from modicum.model.folder import load_model
    from modicum.serve.config import EngineConfig
    from modicum.serve.engine import Engine
    from modicum.serve.request import SamplingParams

    loaded = load_model(model)
    engine = Engine(loaded, None, EngineConfig(cache="512tok", max_length=min(256, loaded.config.context_length)))
    prompt, seconds = list(range(5, 21)), 0.0
    for count in (4, tokens):
        began = time.perf_counter()
        engine.generate([prompt], SamplingParams(temperature=0, max_tokens=count, ignore_eos=True))
        seconds = time.perf_counter() - began
    return tokens / seconds


def _compressors(folder: Path) -> dict[str, float]:
    from modicum.compress.general_purpose import compressor_bits
    from modicum.data.document import read_documents

    return compressor_bits(
        (d.text for d in read_documents(folder, "heldout")), (d.text for d in read_documents(folder, "train"))
    )
