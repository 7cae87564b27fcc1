"""Budget: units, limits, what was really used, and the trace against a real training step."""

import subprocess
import sys
import time

import pytest

from modicum.budget import Budget, Cost, Deadline, Meter, units
from modicum.core.errors import BudgetError, UserError


@pytest.mark.parametrize(
    "text, kind, value",
    [
        ("2GiB", "bytes", 2 * 2**30),
        ("1.5GB", "bytes", 1.5e9),
        ("90m", "seconds", 5400),
        ("1.5h", "seconds", 5400),
        ("45s", "seconds", 45),
        ("50Mtok", "tokens", 50e6),
        ("1e15flop", "flops", 1e15),
        ("3Pflops", "flops", 3e15),
        ("200", "tokens", 200),
        (64, "bytes", 64),
    ],
)
def test_quantities(text, kind, value):
    assert units.parse(text, kind) == pytest.approx(value)


@pytest.mark.parametrize(
    "text, kind",
    [
        ("2GiB", "seconds"),
        ("fast", "seconds"),
        ("", "bytes"),
        (-1, "bytes"),
        ("10 parsecs", "seconds"),
        ("50Mtok", "flops"),
    ],
)
def test_wrong_quantities_are_explained(text, kind):
    with pytest.raises(UserError, match="write"):
        units.parse(text, kind)


def test_a_budget_is_read_whole_and_refuses_with_the_arithmetic():
    budget = Budget.parse("10m, 2GiB, 50Mtok", disk="1GB")
    assert (budget.seconds, budget.memory_bytes, budget.tokens, budget.disk_bytes) == (600, 2 * 2**30, 50e6, 1e9)
    budget.require(Cost(seconds=599, peak_bytes=2 * 2**30), "training")
    with pytest.raises(BudgetError, match=r"training needs 3.00 GiB of memory, the budget is 2.00 GiB \(1.00 GiB too"):
        budget.require(Cost(peak_bytes=3 * 2**30), "training")
    with pytest.raises(UserError, match="unknown limit"):
        Budget.parse(speed=3)


def test_costs_add_and_peaks_do_not():
    both = Cost(seconds=1, peak_bytes=5, tokens=2).then(Cost(seconds=2, peak_bytes=3, tokens=4))
    assert both == Cost(seconds=3, peak_bytes=5, tokens=6)


def test_a_deadline_passes():
    assert not Deadline(None).passed and not Deadline(60).passed
    short = Deadline(0.01)
    time.sleep(0.02)
    assert short.passed


def test_the_meter_sees_a_peak_that_is_gone_again():
    code = (
        "from modicum.budget import Meter\nfrom modicum.budget.meter import resident_now\n"
        "before = resident_now()\n"
        "with Meter() as meter:\n    block = bytearray(300 * 2**20)\n"
        "    block[::4096] = b'x' * len(block[::4096])\n    del block\n"
        "print(meter.peak_bytes - before)"
    )
    grown = float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert grown == pytest.approx(300 * 2**20, rel=0.02)


def test_the_meter_counts_children():
    code = "import time; block = bytearray(200 * 2**20); block[::4096] = b'x' * len(block[::4096]); time.sleep(0.6)"
    with Meter(children=True) as meter:
        base = meter._sampled
        subprocess.run([sys.executable, "-c", code], check=True)
    assert meter.peak_bytes - base > 190 * 2**20 and meter.seconds > 0.5


def test_the_meter_counts_flops():
    import torch

    a, b = torch.ones(8, 16), torch.ones(16, 32)
    with Meter(flops=True) as meter:
        a @ b
    assert meter.flops == 2 * 8 * 16 * 32


def test_trace_follows_live_bytes_and_flops():
    import torch

    from modicum.budget.trace import trace

    def work():
        a = torch.empty(1000, 1000)  # 4 MB
        b = a @ a  # 4 MB more
        del a
        c = b.view(-1)[:10] + 1  # a view shares its storage
        return c

    traced = trace(work)
    assert traced.flops == 2 * 1000**3
    assert traced.peak_bytes == 8_000_000 and traced.kept_bytes == 40


def test_a_traced_training_step_is_the_real_one():
    """Peak of a real process against the trace, within the promised 15%."""
    code = """
import ctypes
import torch
from modicum.budget.meter import Meter, resident_now
from modicum.budget.trace import trace

def work():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(256, 2048), torch.nn.GELU(), torch.nn.Linear(2048, 256))
    optimizer = torch.optim.AdamW(net.parameters())
    for _ in range(2):
        net(torch.randn(6000, 256)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

ctypes.CDLL(None).mallopt(-3, 1 << 20)   # freed blocks above 1 MiB go back at once: what is live is resident
planned = trace(work).peak_bytes
work_small = torch.nn.Linear(64, 64)(torch.randn(64, 64)).sum().backward()
before = resident_now()
with Meter() as meter:
    work()
print(planned, meter.peak_bytes - before)
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    planned, measured = map(float, out)
    assert measured == pytest.approx(planned, rel=0.15)
