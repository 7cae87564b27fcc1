"""What this machine is and what it has free."""

from __future__ import annotations

import os
import platform
import shutil
from pathlib import Path
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


def memory_limit() -> int:
    """Bytes of memory this process may use: the machine's, or its control group's if smaller."""
    total = psutil.virtual_memory().total
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            total = min(total, int(Path(path).read_text()))
        except (OSError, ValueError):
            continue
    return total


def describe() -> dict[str, Any]:
    """cpu, cores, memory_bytes, available_bytes, system, python."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {
        "cpu": cpu_name(),
        "cores": cores,
        "memory_bytes": memory_limit(),
        "available_bytes": psutil.virtual_memory().available,
        "system": platform.platform(),
        "python": platform.python_version(),
    }


def free_disk(folder: str | Path) -> int:
    """Bytes free where `folder` is, or will be."""
    path = Path(folder).resolve()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free
