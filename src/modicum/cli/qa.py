"""Grade short answers over a folder of questions: closed book, with retrieved passages, with the right passage."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def qa(
    model: Annotated[str, typer.Argument(help="A model folder, a known name (modicum ls models) or a hub id.")],
    folder: Annotated[str, typer.Argument(help="corpus.parquet, queries.parquet with answers, qrels.parquet.")],
    limit: Annotated[int, typer.Option(help="Questions.")] = 200,
    arms: Annotated[str, typer.Option(help="Of closed, retrieved, gold; the first is the baseline.")] = (
        "closed,retrieved,gold"
    ),
    encoder: Annotated[str | None, typer.Option(help="Dense vectors beside BM25: minilm, lsa, a folder.")] = None,
    k: Annotated[int, typer.Option("-k", help="Passages to ground on; more for a larger model.")] = 1,
    prompt_tokens: Annotated[
        int | None, typer.Option(help="Maximum prompt tokens; default: 40 + 160 per passage.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="Maximum tokens of an answer.")] = 32,
    split: Annotated[str, typer.Option(help="test, or dev: a tenth of the questions, to choose settings on.")] = "test",
    seed: Annotated[int, typer.Option(help="Seed of the sample of questions.")] = 0,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; default: as stored.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    out: Annotated[Path, typer.Option(help="Folder for the index and the replies.")] = Path("evaluations"),
    evidence: Annotated[Path | None, typer.Option(help="Append the results to qa.jsonl in this folder.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
) -> None:
    """Grade short answers over a folder of questions: closed book, with retrieved passages, with the right passage."""
    import time

    from modicum.budget import Meter
    from modicum.core.events import Events
    from modicum.core.files import atomic_file
    from modicum.evaluate import grounded, reading
    from modicum.evaluate.kept import model_fingerprint
    from modicum.retrieve import ground
    from modicum.serve.config import EngineConfig
    from modicum.serve.load import load_engine

    questions = reading.read_items(folder, limit, split=split, seed=seed)
    names = [arm.strip() for arm in arms.split(",") if arm.strip()]
    grounded.check_arms(names)
    events = Events()
    searcher = reading.open_index(folder, out, encoder, events)
    budget = prompt_tokens or ground.prompt_budget_for(k)
    with Meter() as meter:
        engine = load_engine(model, EngineConfig(max_sequences=16), dtype=dtype, device=device)
        began = time.monotonic()
        graded = grounded.run(
            engine, questions, searcher, arms=names, k=k, prompt_budget=budget, max_tokens=max_tokens, events=events
        )
        seconds = time.monotonic() - began
    settings = {"encoder": encoder, "k": k, "prompt_tokens": budget, "max_tokens": max_tokens, "split": split}
    record = {"model": model, "folder": folder, "settings": settings, "seed": seed} | graded.as_dict(rows=True)
    with atomic_file(out / f"qa-{Path(model).name}-{Path(folder).name}.json") as file:
        file.write(json.dumps(record, indent=1, ensure_ascii=False).encode())
    if evidence is not None:
        from modicum.bench import qa as bench_qa

        bench_qa.append(
            graded,
            evidence,
            model={
                "name": Path(model).name,
                "parameters": engine.model.config.parameters(),
                "fingerprint": model_fingerprint(engine.model, engine.tokenizer),
            },
            data={"name": Path(folder).name, "sha256": reading.checksums(folder)},
            settings=settings,
            seed=seed,
            seconds=seconds,
            peak_bytes=meter.peak_bytes,
        )
    if as_json:
        print(json.dumps({k: v for k, v in record.items() if k != "rows"}, indent=2))
        return
    print(f"{len(questions)} questions of {folder}, {model}, {seconds:.0f} s; 95% intervals")
    for arm, figures in graded.figures.items():
        shown = "  ".join(f"{n} {f['value']:.3f} ({f['low']:.3f} to {f['high']:.3f})" for n, f in figures.items())
        print(f"{arm:10s} {shown}  {graded.prompt_tokens[arm]:.0f} prompt tokens")
    for row in graded.paired:
        if row["against"] == names[0]:
            interval = f"({row['low']:+.3f} to {row['high']:+.3f})"
            print(f"{row['arm']} - {row['against']}: {row['figure']} {row['difference']:+.3f} {interval}")
    if graded.recall is not None:
        print(f"the right passage was among the {k} retrieved for {graded.recall:.1%} of the questions")
