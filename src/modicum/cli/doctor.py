"""Report the capabilities of this machine and installation."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Annotated, Any

import typer


def doctor(as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False) -> None:
    """Report the capabilities of this machine and installation: cores, memory, GPU, versions, extras, peak rates."""
    report = examine()
    if as_json:
        print(json.dumps(report, indent=2))
        return
    from modicum.budget.units import bytes_text

    machine, lines = report["machine"], []
    lines.append(("cpu", f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads in use"))
    lines.append(("memory", f"{bytes_text(machine['memory_bytes'])}, {bytes_text(report['memory_free_bytes'])} free"))
    lines.append(("disk here", f"{bytes_text(report['disk_free_bytes'])} free"))
    lines.append(("gpu", ", ".join(machine["gpus"]) or "none: everything runs on the CPU"))
    lines.append(("bfloat16", report["bfloat16"]))
    lines.append(("serving kernels", report["native"]))
    lines += [("prompts", text) for text in prompts(report["prompts"])]
    lines.append(("training kernels", report["training_kernels"]))
    lines.append(("cuda graphs", report["cuda_graphs"]))
    lines.append(("versions", ", ".join(f"{k} {v}" for k, v in report["versions"].items())))
    for device, rates in report["ceilings"].items():
        text = ", ".join(
            (
                f"copy {rates['copy_bytes_per_s'] / 1e9:.1f} GB/s",
                f"float32 {rates['matmul_float32_flop_per_s'] / 1e9:.0f} GFLOP/s",
                f"bfloat16 {rates['matmul_bfloat16_flop_per_s'] / 1e9:.0f} GFLOP/s",
            )
        )
        lines.append((f"{device} reaches", text))
    for extra, missing in report["extras"].items():
        lines.append(
            (
                f"extra {extra}",
                "installed"
                if not missing
                else f"missing {', '.join(missing)}; to add it: pip install 'modicum[{extra}]'",
            )
        )
    width = max(len(name) for name, _ in lines)
    for name, text in lines:
        print(f"{name:<{width}}  {text}")
    for problem in report["problems"]:
        print(f"\nproblem: {problem}")


def examine() -> dict:
    """Everything `doctor` prints, as plain values."""
    import shutil

    import torch

    from modicum.bench import ceilings, record
    from modicum.budget.machine import memory_available
    from modicum.model import native as training_kernels
    from modicum.serve import native
    from modicum.serve.backends import graphs

    machine = record.machine()
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    rates = {d: ceilings.measure(d) for d in devices}
    memory, disk = memory_available(), shutil.disk_usage(".").free
    problems = []
    if memory < 4 * 2**30:
        problems.append("less than 4 GiB of memory are free, which the quickstart may need; close something")
    if disk < 5 * 2**30:
        problems.append("less than 5 GiB of disk are free here, where runs are written; start from another disk")
    return {
        "machine": machine,
        "memory_free_bytes": memory,
        "disk_free_bytes": disk,
        "bfloat16": bfloat16(rates["cpu"]),
        "native": native.reason(),
        "prompts": measured_prompts(),
        "training_kernels": training_kernels.reason(),
        "cuda_graphs": graphs.reason(),
        "versions": record.versions(),
        "extras": extras(),
        "ceilings": rates,
        "problems": problems,
    }


def measured_prompts() -> dict[str, list[dict[str, Any]]]:
    """By stored form, tokens per second of prompts through a few layers of SmolLM2's shape: kernels and PyTorch."""
    import torch

    from modicum.model import attach
    from modicum.model.config import llama_like
    from modicum.model.decoder import Decoder
    from modicum.serve.backends import measured
    from modicum.serve.config import EngineConfig
    from modicum.serve.engine import Engine

    rows: dict[str, list[dict[str, Any]]] = {}
    shape = llama_like(2048, 576, measured.LAYERS, heads=9, kv_heads=3, context_length=1024)
    for form in ("bf16", "int8", "int4"):
        model = Decoder(shape, torch.Generator().manual_seed(0)).to(torch.bfloat16).eval()
        if form != "bf16":
            attach.attach(model, {"layers.*": form})
        timings = measured.timings(model, EngineConfig(), Engine)
        if timings:
            rows[form] = [
                {"rows": t.rows, "kernels": t.rows / t.native, "torch": t.rows / t.torch, "faster": t.faster}
                | ({} if t.tiles is None else {"tiles": t.rows / t.tiles})
                for t in timings
            ]
    return rows


def prompts(measured: dict[str, list[dict[str, Any]]]) -> Iterator[str]:
    """A line for each stored form: what kernels and PyTorch reach, and which of them `--fast-prefill` takes."""
    names = {"kernels": "kernels", "tiles": "tiles", "torch": "PyTorch"}
    for form, rows in measured.items():
        ways = [way for way in names if way in rows[0]]
        each = ", ".join(f"{r['rows']}: " + " / ".join(f"{r[way]:,.0f}" for way in ways) for r in rows)
        first = next((r["rows"] for i, r in enumerate(rows) if all(x["faster"] != "native" for x in rows[i:])), None)
        which = names.get(rows[-1]["faster"], "")
        choice = "kernels for all" if first is None else f"{which} from {first} tokens on with --fast-prefill"
        yield f"{form}, tokens/s by {' / '.join(names[way] for way in ways)} in steps of {each}: {choice}"


def bfloat16(cpu: dict[str, float]) -> str:
    """Whether bfloat16 is worth using, from CPU flags and measured rates."""
    import torch

    from modicum.model.native import products

    flags: list[str] = []
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            flags = next((line.split(":")[1].split() for line in file if line.startswith("flags")), [])
    except OSError:
        pass
    native = [f for f in ("amx_bf16", "avx512_bf16", "bf16") if f in flags]
    ratio = cpu["matmul_bfloat16_flop_per_s"] / cpu["matmul_float32_flop_per_s"]
    gpu = f"; gpu {'yes' if torch.cuda.is_bf16_supported() else 'no'}" if torch.cuda.is_available() else ""
    kind = "yes, " + "/".join(native) if native else "without native instructions"
    if products.lacking():
        kind += ", a model's products go through float32"
    return f"cpu {kind} ({ratio:.2g}x float32){gpu}"


def extras() -> dict[str, list[str]]:
    """Optional extras of this distribution, each with its packages that are not installed."""
    import importlib.metadata
    import re

    missing_by_extra: dict[str, list[str]] = {}
    try:
        metadata = importlib.metadata.metadata("modicum")
    except importlib.metadata.PackageNotFoundError:
        return {}
    needs = metadata.get_all("Requires-Dist") or []
    for extra in metadata.get_all("Provides-Extra") or []:
        missing = []
        for need in needs:
            name = re.match(r"[\w.-]+", need)
            if not re.search(rf"extra\s*==\s*['\"]{re.escape(extra)}['\"]", need) or not name or name[0] == "modicum":
                continue
            try:
                importlib.metadata.version(name[0])
            except importlib.metadata.PackageNotFoundError:
                missing.append(name[0])
        missing_by_extra[extra] = missing
    return missing_by_extra
