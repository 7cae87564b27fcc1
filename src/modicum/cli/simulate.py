"""Replay a request trace through schedulers: latency percentiles and the sustainable request rate."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer


def simulate(
    trace: Annotated[
        Path | None, typer.Argument(help="Parquet, CSV or JSON Lines with arrivals, prompt and output lengths.")
    ] = None,
    scheduler: Annotated[
        list[str] | None, typer.Option(help="KEY or KEY:knob=value; several times to compare. Default: all.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="A model folder: its steps are timed on this machine.")] = None,
    cost: Annotated[Path | None, typer.Option(help="Step times: read, or written with --calibrate.")] = None,
    calibrate: Annotated[bool, typer.Option("--calibrate", help="Time the model's steps again.")] = False,
    steps: Annotated[int, typer.Option(help="Different steps to time for a calibration.")] = 240,
    rate: Annotated[float | None, typer.Option(help="Requests per second; default: as in the trace.")] = None,
    find_rate: Annotated[
        bool, typer.Option("--find-rate", help="Search the largest request rate that meets the SLO.")
    ] = False,
    poisson: Annotated[
        bool, typer.Option("--poisson", help="Draw Poisson arrivals instead of rescaling the trace's.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of drawn arrivals and random prompts.")] = 0,
    engine: Annotated[bool, typer.Option("--engine", help="Also replay on the real engine (needs --model).")] = False,
    first: Annotated[int, typer.Option(help="Number of the first request.")] = 0,
    requests: Annotated[int | None, typer.Option(help="How many requests; default: the rest of the trace.")] = None,
    shorter: Annotated[float, typer.Option(help="Divide prompts and answers by this.")] = 1.0,
    max_length: Annotated[
        int | None, typer.Option(help="Maximum tokens of prompt and answer; default: the model's context.")
    ] = None,
    slo_tbt: Annotated[
        float | None, typer.Option(help="Seconds between tokens, 99 in 100; default: 5 steps of decodes alone.")
    ] = None,
    slo_ttft: Annotated[float, typer.Option(help="Seconds to the first token, for goodput.")] = 5.0,
    slo_delay: Annotated[float, typer.Option(help="Maximum median queueing delay in seconds.")] = 2.0,
    cache: Annotated[str, typer.Option(help="KV-cache memory: 50ktok, or 1GiB.")] = "64ktok",
    max_sequences: Annotated[int | None, typer.Option(help="Maximum sequences per step.")] = None,
    max_batch_tokens: Annotated[int | None, typer.Option(help="Maximum tokens per step.")] = None,
    block_size: Annotated[int | None, typer.Option(help="Tokens per cache block.")] = None,
    columns: Annotated[str, typer.Option(help="Column names: arrival=NAME,prompt=NAME,output=NAME.")] = "",
    unit: Annotated[str | None, typer.Option(help="Of numeric arrivals: s, ms, us or ns.")] = None,
    timer: Annotated[
        str, typer.Option(help="wall, or cpu: CPU time, for one thread on a machine with other work.")
    ] = "wall",
    device: Annotated[str, typer.Option(help="cpu or cuda, with --model.")] = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
) -> None:
    """Replay a request trace through schedulers: TTFT, TPOT and TBT percentiles, goodput, sustainable rate."""
    import json
    import math

    from modicum.core import registry
    from modicum.core.errors import UserError
    from modicum.serve import simulate as sim
    from modicum.serve import traces
    from modicum.serve.pace import StepTime

    if trace is None and not calibrate:
        raise UserError("no trace was given; type modicum simulate TRACE, or --calibrate --model FOLDER --cost FILE")
    if (calibrate or engine) and model is None:
        raise UserError("--calibrate and --engine time the steps of a model; add --model FOLDER")
    if cost is None and model is None:
        raise UserError("step times are not known; add --model FOLDER to measure them, or --cost FILE to read them")
    known = StepTime.load(cost) if cost is not None and not calibrate else None
    about = known.about if known else {}
    limits: dict[str, Any] = {
        "block_size": block_size or about.get("block_size", 16),
        "max_batch_tokens": max_batch_tokens or about.get("max_batch_tokens", 2048),
        "max_sequences": max_sequences or about.get("max_sequences", 64),
    }
    decoder: Any = _decoder(model, device) if model and (known is None or engine) else None
    pace = known or _calibrated(decoder, limits, cache, max_length, steps, seed, timer)
    about = pace.about
    if calibrate and cost is not None:
        pace.save(cost)
    result: dict[str, Any] = {"calibration": about, "rows": []}
    if not as_json and "error_median" in about:
        print(
            f"step times: {about['model']} on {about['machine']}; relative error on {about['held_out']} held-out "
            f"steps: median {about['error_median']:.1%}, nine in ten below {about['error_p90']:.1%}, "
            f"largest {about['error_max']:.1%}" + (f"; written to {cost}" if calibrate and cost else "")
        )
    beyond = [name for name in ("max_batch_tokens", "max_sequences") if limits[name] > about.get(name, 1 << 62)]
    if beyond and not as_json:
        print(f"{', '.join(beyond)} beyond what was timed: such steps are extrapolated; --calibrate with these limits")
    if trace is None:
        if as_json:
            print(json.dumps(result, indent=2))
        return
    full_trace = traces.read(trace, _columns(columns), unit)
    most = min(max_length or 1 << 62, about.get("max_length", 1 << 62)) - 1
    selected = full_trace.window(first, requests if requests is not None else len(full_trace) - first).shorter(shorter)
    played = selected.within(most)
    slo = sim.SLO(tbt=slo_tbt or sim.strict_tbt(pace, played, limits["max_sequences"]), ttft=slo_ttft, delay=slo_delay)
    seeds = seed if poisson else None
    if rate is not None or (poisson and not find_rate):
        if rate is None and played.rate is None:
            raise UserError(f"{full_trace.name} has no arrival times; add --rate, or --find-rate")
        played = played.at_rate(rate or played.rate or 1.0, seeds)
    choices = [sim.aimed(c, slo) for c in scheduler or registry.methods("scheduler")]
    n_blocks = _blocks(cache, limits["block_size"], about)
    given = (limits["block_size"], n_blocks, limits["max_batch_tokens"], limits["max_sequences"])
    promised = slo if find_rate else None  # a run that cannot meet it is aborted

    def simulated(choice: Any, requests: Any) -> Any:
        return sim.simulate(requests, registry.build("scheduler", choice, *given), pace, promised)

    def on_engine(choice: Any, requests: Any) -> Any:
        size = f"{n_blocks * limits['block_size']}tok"
        config = EngineConfig(cache=size, scheduler=choice, prefix_cache=False, **limits)
        return play(Engine(decoder, None, config), requests, seed, promised, timer)

    ways = {"simulated": simulated}
    if engine:
        from modicum.serve.config import EngineConfig
        from modicum.serve.engine import Engine
        from modicum.serve.simulate_engine import play

        ways["engine"] = on_engine
    start_rate = 1.0
    for choice in choices:
        for how, way in ways.items():
            row: dict[str, Any] = {"scheduler": str(choice), "how": how}
            if find_rate:

                def at(rate: float, way: Any = way, choice: Any = choice) -> Any:
                    return way(choice, played.at_rate(rate, seeds))

                if how == "simulated":
                    best, outcome = sim.search(at, len(played), slo, played.rate or 1.0, 0.02)
                    start_rate = best if 0 < best < math.inf else 1.0
                else:  # real runs are slow: start from the simulator's rate
                    best, outcome = sim.search(at, len(played), slo, start_rate, 0.05, 1.15)
                # None: the trace is over before a queue can form, at any rate
                row["sustained_rate"] = best if math.isfinite(best) else None
            else:
                outcome = way(choice, played)
            result["rows"].append(row | (outcome.report(slo) if outcome else {}))
    result |= {
        "trace": {
            "name": full_trace.name,
            "requests": len(played),
            "first": first,
            "shorter": shorter,
            "cut": int((selected.prompt_N + selected.output_N > most).sum()),
            "prompt_mean": float(played.prompt_N.mean()),
            "output_mean": float(played.output_N.mean()),
        },
        "slo": {"tbt": slo.tbt, "ttft": slo.ttft, "delay": slo.delay},
    }
    print(json.dumps(result, indent=2)) if as_json else _show(result)


def _decoder(model: str, device: str) -> Any:
    from modicum.model.folder import find_folder, load_model

    return load_model(find_folder(model), device=device)


def _calibrated(
    decoder: Any, limits: dict, cache: str, max_length: int | None, steps: int, seed: int, timer: str
) -> Any:
    from modicum.core.events import Progress
    from modicum.serve.config import EngineConfig
    from modicum.serve.simulate_engine import PASSES, calibrate

    config = EngineConfig(cache=cache, max_length=max_length, prefix_cache=False, **limits)
    with Progress("timing steps", steps * PASSES, "steps") as progress:
        return calibrate(decoder, config, steps=steps, seed=seed, by=timer, progress=lambda n: progress.update(n))


def _blocks(cache: str, block_size: int, about: dict) -> int:
    from modicum.budget.units import kind_of
    from modicum.core.errors import UserError

    quantity = kind_of(cache)
    if quantity is None or quantity[0] not in ("tokens", "bytes") or quantity[1] <= 0:
        raise UserError(f"--cache {cache!r} is not a size; write tokens such as 50ktok, or bytes such as 1GiB")
    per_token = about.get("bytes_per_token") if quantity[0] == "bytes" else 1
    if per_token is None:
        raise UserError(f"--cache {cache!r}: this calibration lacks the bytes of a token; write tokens, as 50ktok")
    return max(1, int(quantity[1] // (per_token * block_size)))


def _columns(text: str) -> dict[str, str]:
    from modicum.core.errors import UserError

    parts = [item.partition("=") for item in text.split(",") if item]
    if not all(equals and name for _, equals, name in parts):
        raise UserError(f"--columns {text!r} is not ROLE=NAME,...; write for example prompt=InputTokens")
    return {role.strip(): name.strip() for role, _, name in parts}


def _show(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    trace, slo = result["trace"], result["slo"]
    print(
        f"{trace['name']}: {trace['requests']} requests, {trace['prompt_mean']:.0f} + {trace['output_mean']:.0f} "
        f"tokens on average, {trace['cut']} cut; SLO: 99 in 100 tokens within {slo['tbt']:.3g} s, "
        f"first token within {slo['ttft']:g} s, median wait {slo['delay']:g} s"
    )
    table = Table(box=None, pad_edge=False, header_style="bold")
    for head in ("scheduler", "how", "req/s", "TTFT p50", "p99", "TPOT p50", "p99", "TBT p50", "p99", "max",
                 "good/s", "tok/s", "preempted"):  # fmt: skip
        table.add_column(head, justify="left" if head in ("scheduler", "how") else "right", no_wrap=head != "scheduler")
    for row in result["rows"]:
        rate = row.get("sustained_rate", row.get("rate"))
        shown = [row["scheduler"], row["how"], "any" if rate is None else f"{rate:.3g}"]
        if "tbt_p50" in row:
            shown += [f"{row[k]:.3g}" for k in ("ttft_p50", "ttft_p99", "tpot_p50", "tpot_p99", "tbt_p50", "tbt_p99",
                                                "tbt_max", "goodput", "tokens_per_second")]  # fmt: skip
            shown.append(str(row["preemptions"]))
        table.add_row(*shown)
    console = Console()
    (console if console.width >= 130 else Console(width=140)).print(table)
    if any(row.get("sustained_rate") == 0 for row in result["rows"]):
        print("a rate of 0: the SLO is not met at any rate; give a larger --slo-tbt")
    if any(row.get("sustained_rate", 0.0) is None for row in result["rows"]):
        print("any rate: the trace is over before a queue can form; give more --requests")
