"""What a process may use, as its control groups say: trees of files like those of /proc and /sys."""

from __future__ import annotations

import os
from pathlib import Path

import psutil
import pytest

from modicum.budget import machine

MIB = 1 << 20


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def version_2(root: Path, group: str = "/", at: str = "", **files: str) -> Path:
    """A process in `group`, whose folder `at` below the mount has these files (`memory_max` is memory.max)."""
    named = {f"sys/fs/cgroup/{at}{name.replace('_', '.', 1)}": text for name, text in files.items()}
    return tree(root, {"proc/self/cgroup": f"0::{group}\n", **named})


def test_a_container_sees_its_limit_and_what_is_left_of_it(tmp_path: Path) -> None:
    stat = f"anon {40 * MIB}\nfile {30 * MIB}\ninactive_file {20 * MIB}\nactive_file {10 * MIB}\nslab 5\n"
    root = version_2(
        tmp_path, memory_max=f"{100 * MIB}\n", memory_current=f"{75 * MIB}\n", memory_stat=stat, cpu_max="max 100000\n"
    )
    assert machine.memory_limit(root) == 100 * MIB
    assert machine.memory_available(root) == 100 * MIB - (75 - 30) * MIB, "pages of files can be had back"


def test_the_tightest_group_above_a_process_counts(tmp_path: Path) -> None:
    group = "/user.slice/job.scope"
    root = version_2(tmp_path, group, "user.slice/", memory_max=f"{50 * MIB}", memory_current=f"{20 * MIB}")
    version_2(tmp_path, group, "user.slice/job.scope/", memory_max=f"{80 * MIB}", memory_current=f"{10 * MIB}")
    assert machine.memory_limit(root) == 50 * MIB
    assert machine.memory_available(root) == 30 * MIB


def test_groups_of_version_1(tmp_path: Path) -> None:
    memory = "sys/fs/cgroup/memory/job/"
    root = tree(
        tmp_path,
        {
            "proc/self/cgroup": "4:memory:/job\n2:cpu,cpuacct:/\n",
            memory + "memory.limit_in_bytes": f"{60 * MIB}",
            memory + "memory.usage_in_bytes": f"{50 * MIB}",
            memory + "memory.stat": f"total_inactive_file {15 * MIB}\ntotal_active_file {5 * MIB}\n",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "50000",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
        },
    )
    assert (machine.memory_limit(root), machine.memory_available(root)) == (60 * MIB, 30 * MIB)
    assert machine.cores(root) == 1


@pytest.mark.parametrize("limit", ["max", "", f"{1 << 62}"])
def test_without_a_limit_it_is_the_machine(tmp_path: Path, limit: str) -> None:
    root = version_2(tmp_path, memory_max=limit, memory_current="1", cpu_max="max 100000")
    assert machine.memory_limit(root) == psutil.virtual_memory().total
    assert machine.cores(root) == len(os.sched_getaffinity(0))
    assert machine.memory_available(tmp_path / "nowhere") <= psutil.virtual_memory().total


def test_a_quota_of_processor_time_is_rounded_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)), raising=False)
    for i, (quota, want) in enumerate((("200000 100000", 2), ("150000 100000", 2), ("5000 100000", 1))):
        assert machine.cores(version_2(tmp_path / str(i), cpu_max=quota)) == want
