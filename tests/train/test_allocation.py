"""Freed memory stays with the process while it trains, and goes back afterwards."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource
import torch
from modicum.budget.meter import resident_now
from modicum.train import allocation

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        made = [torch.ones(1 << 22) for _ in range(6)]  # 96 MiB
        del made
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

usual = faults()
allocation.keep()
faults()
kept, resident = faults(), resident_now()
allocation.release()
print(usual, kept, resident - resident_now())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="thresholds of glibc")
def test_pages_are_taken_once_and_given_back_at_the_end() -> None:
    out = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True).stdout
    usual, kept, given_back = map(int, out.split())
    assert kept < usual / 10 and given_back > 80 << 20
