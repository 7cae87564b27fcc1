"""What this machine can do at most: memory bandwidth and matrix products, measured in a second."""

from __future__ import annotations

import time
from typing import Any


def _rate(work: Any, amount: float, seconds: float, sync: Any) -> float:
    """Best rate of `work` (`amount` units a call) over at least `seconds`."""
    work()
    sync()
    best, end = 0.0, time.perf_counter() + seconds
    while True:
        start = time.perf_counter()
        work()
        sync()
        stop = time.perf_counter()
        best = max(best, amount / max(stop - start, 1e-9))
        if stop >= end:
            return best


def measure(device: str = "cpu", seconds: float = 0.25) -> dict[str, float]:
    """Bytes/s of a copy (read plus write) and FLOP/s of square products in float32 and bfloat16.

    The copy is larger than common caches (64 MiB; 1 GiB on a GPU). A best-of over `seconds` each.
    """
    import torch

    cuda = device.startswith("cuda")

    def sync() -> None:
        if cuda:
            torch.cuda.synchronize()

    numbers = (256 if cuda else 16) * 2**20
    source, target = (torch.zeros(numbers, dtype=torch.float32, device=device) for _ in range(2))
    rates = {"copy_bytes_per_s": _rate(lambda: target.copy_(source), 2 * 4 * numbers, seconds, sync)}
    size = 8192 if cuda else 1024
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        rates[f"matmul_{name}_flop_per_s"] = _rate(lambda a=a, b=b: a @ b, 2 * size**3, seconds, sync)
    return rates
