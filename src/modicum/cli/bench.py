"""Measure a port's methods beside its baseline, at equal budget, over several seeds."""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer


def bench(
    port: Annotated[str, typer.Argument(help="A port, all, or engine, train or curate: speed beside other programs.")],
    method: Annotated[
        list[str] | None,
        typer.Argument(metavar="[METHOD]...", help="Methods, KEY or KEY:knob=value,...; all of the port if left out."),
    ] = None,
    seeds: Annotated[str, typer.Option(help="Seeds, e.g. 0,1,2 or 0-4.")] = "0,1,2",
    budget: Annotated[str | None, typer.Option(help="Limit of each measurement, e.g. 60s or 2Mtok.")] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Seconds instead of minutes: shows that it works, says little.")
    ] = False,
    scale: Annotated[str, typer.Option(help="Change the bench's size, e.g. tokens=200000,layers=4.")] = "",
    data: Annotated[
        str | None, typer.Option(help="A folder or file to measure on, instead of the Python installation.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="A model folder, name or hub id; proxy: a small one made here [default: the bench's]."),
    ] = None,
    limit: Annotated[str, typer.Option(help="bench engine, train: time for each measurement.")] = "5m",
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    evidence: Annotated[Path | None, typer.Option(help="Folder of the records [default: evidence/].")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Skip what was measured with these settings and today's code.")
    ] = False,
    missing: Annotated[
        bool, typer.Option("--missing", help="Only what has no record yet in the lab that these settings make.")
    ] = False,
    stale: Annotated[
        bool, typer.Option("--stale", help="Only what was last measured by other code than today's.")
    ] = False,
    listing: Annotated[
        bool, typer.Option("--list", "--dry-run", help="With --missing or --stale: say what, and measure nothing.")
    ] = False,
    plot: Annotated[Path | None, typer.Option(help="Page to draw [default: runs/bench/PORT.html].")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
) -> None:
    """Measure a port's methods beside its baseline, at equal budget, over several seeds."""
    from modicum.bench import harness, plots, record, stats, todo
    from modicum.budget import Budget, units
    from modicum.cli import _tables as tables
    from modicum.core import registry
    from modicum.core.choice import Choice
    from modicum.core.errors import ModicumError, UserError
    from modicum.core.events import Progress

    if port == "curate":
        if method or plot or budget or scale or resume or missing or stale or model:
            raise UserError("bench curate takes --data, --limit, --quick and --json")
        curate(data, quick=quick, as_json=as_json, limit=units.parse(limit, "seconds"))
        return
    if port in ("engine", "train"):
        if plot or data or budget or scale or resume or missing or stale:
            raise UserError(f"bench {port} takes METHOD (whom to measure), --model, --limit, --quick and --json")
        (engine if port == "engine" else train)(
            method or [],
            parse_seeds(seeds)[0],
            quick=quick,
            evidence=evidence,
            as_json=as_json,
            model=model,
            limit=units.parse(limit, "seconds"),
        )
        return
    if port == "all":
        if method or plot or as_json:
            raise UserError("all measures every method of every port; leave METHOD, --plot and --json out")
        every_port(
            seeds=seeds,
            budget=budget,
            quick=quick,
            scale=scale,
            data=data,
            model=model,
            device=device,
            evidence=evidence,
            resume=resume,
            missing=missing,
            stale=stale,
            listing=listing,
        )
        return
    if listing and not (missing or stale):
        raise UserError("--list goes with --missing or --stale; methods are listed by: modicum ls PORT")
    numbers = parse_seeds(seeds)
    limits = Budget.parse(budget)
    loaded = harness.load(port)
    choices = harness.pick(port, method or [])
    changes = Choice.parse(port, f"{choices[0].method}:{scale}").knobs if scale else {}
    settings = harness.Settings(
        scale=harness.make_scale(loaded, quick, changes),
        budget=limits,
        data=data,
        model=None if model == "proxy" else model or (None if quick else loaded.model),
        device=device,
        quick=quick,
    )
    folder = record.folder(evidence)
    if missing or stale:
        baseline, records = registry.port(port).baseline, record.read(folder, port)
        tier = harness.tier_of(loaded, settings)
        fits = functools.partial(harness.fits, bench=loaded, settings=settings)
        absent = todo.missing(records, choices, numbers, fits) if missing else []
        named = {str(c) for c in choices}
        old = [s for s in todo.stale(records) if not method or s.choice in named] if stale else []
        if listing:
            tables.todo(port, tier, [str(c) for c in absent], old, as_json)
            return
        again = todo.choices_of(port, old, fits)
        choices = sorted({str(c): c for c in absent + again}.values(), key=lambda c: str(c) != baseline)
        if not choices:
            print(f"{port}: nothing to measure at tier {tier}")
            return
        if str(choices[0]) != baseline:  # it is there already, or is measured beside them
            choices.insert(0, Choice(port, baseline))
        resume = True
    with Progress(f"bench {port}", len(numbers) * len(choices), "runs") as progress:
        outcome = harness.run(
            loaded,
            choices,
            numbers,
            settings,
            folder,
            resume=resume,
            again=registry.port(port).baseline in (method or []),
            progress=progress,
        )
    parts = stats.compare(outcome.records)
    drawn = plot or Path("runs") / "bench" / f"{port}.html"
    if parts:
        plots.write_page(drawn, port, parts)
    if as_json:
        print(
            json.dumps(
                {
                    "port": port,
                    "lab": vars(outcome.lab),
                    "rows": [r.as_dict() for rows in parts for r in rows],
                    "failures": outcome.failures,
                    "records": str(folder / port),
                    "measured": outcome.measured,
                    "skipped": outcome.skipped,
                    "plot": str(drawn),
                },
                indent=2,
            )
        )
    elif parts:
        for rows in parts:
            tables.rows(rows)
        print(
            f"{outcome.measured} measured, {outcome.skipped} from earlier; tier {outcome.lab.tier}; "
            f"records {folder / port}; plot {drawn}"
        )
    for label, reason in outcome.failures.items():
        print(f"{port}/{label} failed: {reason}", file=sys.stderr)
    if outcome.interrupted:
        print("stopped: what was measured is kept; the same command with --resume goes on", file=sys.stderr)
        raise KeyboardInterrupt
    if outcome.failures:
        raise ModicumError(f"{len(outcome.failures)} of {len(choices)} methods could not be measured; see above")


def engine(
    names: list[str],
    seed: int,
    *,
    quick: bool,
    evidence: Path | None,
    as_json: bool,
    model: str | None = None,
    limit: float = 300.0,
) -> None:
    """`bench engine`: modicum's engine beside others, as tables on the terminal or as JSON."""
    from modicum.bench import engine as bench_engine
    from modicum.bench import record
    from modicum.cli import _tables as tables
    from modicum.core.errors import UserError

    known = ("modicum", "transformers", "llama.cpp")
    if odd := [name for name in names if name not in known]:
        raise UserError(f"bench engine knows {', '.join(known)}; got {', '.join(odd)}")
    size = bench_engine.QUICK if quick else bench_engine.Size()
    measured = bench_engine.measure(
        size,
        engines=names or None,
        model=model,
        limit=limit,
        seed=seed,
        progress=lambda text: print(text, file=sys.stderr),
    )
    path = record.folder(evidence) / "engine.jsonl"
    if not quick:
        bench_engine.append(measured, path, seed)
    if as_json:
        print(json.dumps(measured, indent=2))
        return
    tables.engine(measured)


def train(
    names: list[str],
    seed: int,
    *,
    quick: bool,
    evidence: Path | None,
    as_json: bool,
    model: str | None = None,
    limit: float = 300.0,
) -> None:
    """`bench train`: modicum's training step beside others', as tables on the terminal or as JSON."""
    from modicum.bench import engine as bench_engine
    from modicum.bench import record
    from modicum.bench import train as bench_train
    from modicum.cli import _tables as tables

    if model is None and not quick:
        model = "smollm2"
    result = bench_train.measure(
        bench_train.QUICK if quick else bench_train.Size(),
        names=names,
        model=None if model == "proxy" else model,
        limit=limit,
        progress=lambda text: print(text, file=sys.stderr),
    )
    if not quick:
        path = record.folder(evidence) / "train.jsonl"
        bench_engine.append(result, path, seed, bench="train", base="the fastest of the others")
    if as_json:
        print(json.dumps(result, indent=2))
        return
    tables.train(result)


def curate(data: str | None, *, quick: bool, as_json: bool, limit: float) -> None:
    """MinHash and the Gopher filters beside datatrove."""
    from modicum.bench import curate as side

    megabytes, seconds = (0.3, 0.5) if quick else (4.0, min(limit, 60.0) / 3)
    rows = side.measure(data, megabytes=megabytes, seconds=seconds)
    print(json.dumps(side.as_dicts(rows), indent=2) if as_json else side.table(rows))


def every_port(**options: Any) -> None:
    """`bench` for each port in turn; one that fails leaves the others."""
    from modicum.bench import harness
    from modicum.core.errors import ModicumError

    failed = []
    for name in harness.benches():
        print(f"\n{name}")
        try:
            bench(name, **options)
        except ModicumError as error:
            print(f"modicum: {error}", file=sys.stderr)
            failed.append(name)
    if failed:
        raise ModicumError(f"not everything could be measured: {', '.join(failed)}")


def parse_seeds(text: str) -> list[int]:
    """`0,1,2` or `0-4`. Raises `UserError` for anything else."""
    from modicum.core.errors import UserError

    numbers: list[int] = []
    for part in text.split(","):
        low, dash, high = part.strip().partition("-")
        if not low.isdigit() or (dash and not high.isdigit()):
            raise UserError(f"--seeds {text!r}: {part!r} is not a seed; write 0,1,2 or 0-4")
        numbers += range(int(low), int(high or low) + 1)
    if not numbers:
        raise UserError(f"--seeds {text!r} names no seed; write 0,1,2 or 0-4")
    return list(dict.fromkeys(numbers))
