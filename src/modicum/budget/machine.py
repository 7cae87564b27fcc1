"""The machine's processor, memory and disk: what it has and what is free."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import psutil


def cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def memory_limit(root: str | Path = "/") -> int:
    """Bytes of memory this process may use: the machine's, or its control group's if smaller."""
    limits = [limit for limit, _ in _memory_groups(Path(root))]
    return min([psutil.virtual_memory().total, *limits])


def memory_available(root: str | Path = "/") -> int:
    """Bytes of memory this process could allocate now without anything being swapped out or killed.

    What is free on the machine or within the limits of the control groups above this process, whichever is
    less. Page cache counts as free, as in the kernel's `MemAvailable`.
    """
    headroom = [max(0, limit - used) for limit, used in _memory_groups(Path(root))]
    return min([psutil.virtual_memory().available, *headroom])


def cores(root: str | Path = "/") -> int:
    """Processors available to this process: its CPU affinity, or if less its control groups' quota, rounded up."""
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quotas = []
    for folder, version in _groups("cpu", Path(root)):
        if version == 2:
            quota, _, period = (_read(folder / "cpu.max") or "max").partition(" ")
        else:
            quota, period = _read(folder / "cpu.cfs_quota_us") or "-1", _read(folder / "cpu.cfs_period_us") or "0"
        if quota.isdigit() and period.isdigit() and int(period):
            quotas.append(max(1, -(-int(quota) // int(period))))
    return min([bound, *quotas])


def _memory_groups(root: Path) -> Iterator[tuple[int, int]]:
    """(limit, bytes used that cannot be reclaimed) of every control group with a limit above this process."""
    for folder, version in _groups("memory", root):
        limit, used = (
            _read(folder / name)
            for name in (
                ("memory.max", "memory.current") if version == 2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
            )
        )
        if limit is None or not limit.isdigit():
            continue
        total = "" if version == 2 else "total_"
        stat = dict(line.split(" ", 1) for line in (_read(folder / "memory.stat") or "").splitlines() if " " in line)
        files = sum(int(stat.get(f"{total}{kind}_file", 0)) for kind in ("active", "inactive"))
        yield int(limit), max(0, int(used or 0) - files)


def _groups(controller: str, root: Path) -> Iterator[tuple[Path, int]]:
    """Folders of the control groups of this process, from its own up to the root, and their version."""
    for line in (_read(root / "proc/self/cgroup") or "").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        version = 1 if controllers else 2
        top = root / "sys/fs/cgroup" / (controller if controllers else "")
        # In a container the path is often that of the host, and the container's own group is mounted at the top.
        group = PurePosixPath(path)
        yield from ((top / p.relative_to("/"), version) for p in (group, *group.parents) if p.is_absolute())


def _read(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None


def describe() -> dict[str, Any]:
    """cpu, cores, memory_bytes, available_bytes, system, python."""
    return {
        "cpu": cpu_name(),
        "cores": cores(),
        "memory_bytes": memory_limit(),
        "available_bytes": memory_available(),
        "system": platform.platform(),
        "python": platform.python_version(),
    }


def free_disk(folder: str | Path) -> int:
    """Bytes free where `folder` is, or will be."""
    path = Path(folder).resolve()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free
