"""Measured cost: wall seconds, resident-set peak (or the GPU allocator's), FLOPs, bytes on disk.

On Linux the kernel's own high-water mark is read (`VmHWM`, reset on entry), so no peak between two
samples is missed; child processes are added by a sampling thread (proportional set size, so shared
pages are counted once). Elsewhere the sampling thread does both.
"""

from __future__ import annotations

import os
import threading
import time
from types import TracebackType
from typing import Any

import psutil

from modicum.budget.cost import Cost


def reset_peak() -> bool:
    """Set this process's high-water mark to its present size; False where the system cannot."""
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
        return True
    except OSError:
        return False


def resident_peak() -> int:
    """High-water mark of this process's resident set, in bytes."""
    try:
        with open("/proc/self/status") as file:
            for line in file:
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if os.uname().sysname == "Darwin" else peak * 1024


def resident_now() -> int:
    return psutil.Process().memory_info().rss


def _children_bytes(process: psutil.Process) -> int:
    total = 0
    for child in process.children(recursive=True):
        try:
            full = child.memory_full_info()
            total += getattr(full, "pss", 0) or full.rss
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return total


class Meter:
    """Context manager: `with Meter() as meter: ...; meter.cost`.

    children=True also counts child processes, sampled every `interval` seconds.
    flops=True counts floating-point operations of PyTorch calls inside (slows them a little).
    """

    def __init__(self, *, children: bool = False, flops: bool = False, interval: float = 0.05):
        self.children, self.interval = children, interval
        self.peak_bytes = self.flops = self.seconds = 0.0
        self._count_flops = flops
        self._counter: Any = None
        self._stop = threading.Event()

    def __enter__(self) -> Meter:
        self._exact = reset_peak()
        self._sampled = resident_now()
        self._thread: threading.Thread | None = None
        if self.children or not self._exact:
            self._thread = threading.Thread(target=self._sample, daemon=True, name="meter")
            self._thread.start()
        if self._count_flops:
            from torch.utils.flop_counter import FlopCounterMode

            self._counter = FlopCounterMode(display=False)
            self._counter.__enter__()
        self._cuda = _cuda()
        if self._cuda:
            self._cuda.reset_peak_memory_stats()
        self._start = time.perf_counter()
        return self

    def _sample(self) -> None:
        process = psutil.Process()
        while not self._stop.wait(self.interval):
            now = process.memory_info().rss + (_children_bytes(process) if self.children else 0)
            self._sampled = max(self._sampled, now)

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._cuda:
            self._cuda.synchronize()
        self.seconds = time.perf_counter() - self._start
        if self._counter is not None:
            self._counter.__exit__(kind, value, trace)
            self.flops = float(self._counter.get_total_flops())
        self._stop.set()
        if self._thread:
            self._thread.join()
        self.peak_bytes = float(max(self._sampled, resident_peak() if self._exact else 0))
        if self._cuda:
            self.peak_bytes = float(self._cuda.max_memory_allocated())

    @property
    def cost(self) -> Cost:
        return Cost(seconds=self.seconds, peak_bytes=self.peak_bytes, flops=self.flops)


def _cuda() -> Any:
    import sys

    torch = sys.modules.get("torch")
    return torch.cuda if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized() else None
