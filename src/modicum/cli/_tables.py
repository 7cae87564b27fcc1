"""Tables that `modicum bench` prints: comparisons, missing and stale records, engines side by side."""

from __future__ import annotations

import json
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from modicum.bench.card import claim_text
from modicum.bench.figures import change_text, ratio_text, verdict
from modicum.bench.stats import Row, spread_text
from modicum.bench.todo import Stale


def rows(rows: list[Row]) -> None:
    """The comparison as a table on the terminal."""
    quality, cost = rows[0].axes["quality"], rows[0].axes["cost"]
    table = Table(box=None, pad_edge=False, header_style="bold")
    with_claims = any(row.claim for row in rows) and rows[0].tier != "smoke"
    heads = [
        "method",
        f"{quality['metric']} ({quality['better']} better)",
        "change [95%]",
        cost["metric"],
        "×",
        "seconds",
        "seeds",
        "result",
        *(["claim"] if with_claims else []),
    ]
    for head in heads:
        table.add_column(head, justify="left" if head in ("method", "result", "claim") else "right", overflow="fold")
    for row in rows:
        style = {True: "green", False: "red", None: ""}[None if row.tier == "smoke" else row.better]
        change = Text(change_text(row) or ("baseline" if row.is_baseline else "—"), style=style)
        table.add_row(
            row.choice,
            spread_text(row.quality, quality["unit"]),
            change,
            spread_text(row.cost, cost["unit"]),
            ratio_text(row) or "—",
            f"{row.seconds.mean:.3g}",
            str(len(row.seeds)),
            verdict(row),
            *([claim_text(row.claim)] if with_claims else []),
        )
    console = Console()
    (console if console.width >= 100 else Console(width=120)).print(table)


def todo(port: str, tier: str, missing: list[str], stale: list[Stale], as_json: bool) -> None:
    """The choices that `--missing` and `--stale` would measure."""
    if as_json:
        old = [
            {"choice": s.choice, "lab": s.lab.id, "tier": s.lab.tier, "seeds": s.seeds, "time": s.time} for s in stale
        ]
        print(json.dumps({"port": port, "tier": tier, "missing": missing, "stale": old}, indent=2))
        return
    for choice in missing:
        print(f"{port}/{choice} missing at tier {tier}")
    for s in stale:
        print(f"{port}/{s.choice} stale in lab {s.lab.id} (tier {s.lab.tier}, {s.lab.device}), measured {s.time[:10]}")
    if not missing and not stale:
        print(f"{port}: nothing to measure")


def engine(result: dict[str, Any]) -> None:
    """The results of `bench engine`."""
    table = Table("engine", "column", "tokens/s", "spread", "ratio", box=None, pad_edge=False, header_style="bold")
    for row in sorted(result["rows"], key=lambda r: (r["column"], -r["tokens_per_s"])):
        ratio = "—" if row["ratio"] is None else f"{row['ratio']:.2f}"
        table.add_row(row["engine"], row["column"], f"{row['tokens_per_s']:.1f}", f"{row['spread']:.0%}", ratio)
    for name, why in result["skipped"].items():
        table.add_row(name, f"left out: {why}", "—", "—", "—")
    print(f"{result['model']['name']}, {result['model']['parameters'] / 1e6:.0f}M parameters")
    Console(width=110, highlight=False).print(table)
    reached = ", ".join(f"{form} {fraction:.0%}" for form, fraction in result["share_of_read"].items())
    read = result["ceilings"]["read_bytes_per_s"] / 1e9
    print(f"memory bandwidth {read:.1f} GB/s; decoding reaches of it: {reached}")
    print(f"bfloat16 products at {result['ceilings']['matmul_bfloat16_flop_per_s'] / 1e9:.0f} GFLOP/s")
    print(f"kernels: {result['native']}; threads: {result['threads']}")
    if checks := result["checks"]:
        errors = ", ".join(f"{name} {error:.2g}" for name, error in checks["bf16_logit_error"].items())
        print(f"greedy float32 tokens equal to transformers': {checks['float32_tokens_equal']}; logit error: {errors}")
        if eight := checks["eight_bit_logit_error"]:
            errors = ", ".join(f"{name} {error:.2g}" for name, error in eight.items())
            print(f"logit error of activations in eight bits: {errors}")


def train(result: dict[str, Any]) -> None:
    """The results of `bench train`."""
    from modicum.bench.train import loss_distance

    columns = ("engine", "training", "tokens/s", "spread", "ratio", "loss of the first step", "of the last")
    table = Table(*columns, box=None, pad_edge=False, header_style="bold")
    for row in sorted(result["rows"], key=lambda r: (r["column"], -r["tokens_per_s"])):
        ratio = "—" if row["ratio"] is None else f"{row['ratio']:.2f}"
        figures = (f"{row['tokens_per_s']:.0f}", f"{row['spread']:.0%}", ratio)
        table.add_row(row["engine"], row["column"], *figures, *(f"{row['losses'][i]:.5f}" for i in (0, -1)))
    for name, why in result["skipped"].items():
        table.add_row(name, f"left out: {why}", *"—————")
    counts = ", ".join(f"{name} {count / 1e6:.1f}M" for name, count in result["model"]["parameters"].items())
    size = result["size"]
    print(f"parameters: {counts} ({result['model']['name']}); rows of {size['length']} tokens, bfloat16")
    Console(width=130, highlight=False).print(table)
    far = ", ".join(f"{task} {distance:.1e}" for task, distance in loss_distance(result).items())
    print(f"largest relative distance of losses from the decoder as written: {far or 'not measured'}")
    print(f"bfloat16 products at {result['ceilings']['matmul_bfloat16_flop_per_s'] / 1e9:.0f} GFLOP/s")
    print(f"kernels: {result['native']}; threads: {result['threads']}")
