"""llm-in-a-flash: the table under random changes, bytes read, the oracle, the window, and memory under a limit."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from modicum.core.errors import UserError
from modicum.model.config import llama_like
from modicum.model.decoder import Decoder
from modicum.serve.residency._store import BUNDLES, BundleFile, Table, bundles
from modicum.serve.residency.llm_in_a_flash import Config, FlashMlp, LlmInAFlash, fit, seen

F, D = 96, 32


def decoder(gated: bool = False) -> Decoder:
    shape = llama_like(64, D, 2, 4, mlp_width=F, context_length=128, activation="relu", gated=gated, mlp_bias=not gated)
    model = Decoder(shape, torch.Generator().manual_seed(0))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("up.bias"):
                p.fill_(-1.0)
            elif p.dim() == 2 and "embed" not in name:
                p.mul_(3.0)
    return model.eval()


def test_the_table_is_a_dictionary() -> None:
    """10^4 random insertions and removals, against a dict of rows."""
    random = np.random.default_rng(0)
    table, want = Table(50, 20, 2, 3, torch.float32), {}
    for _ in range(10_000):
        if want and random.random() < 0.5:
            gone = random.choice(list(want), size=random.integers(1, len(want) + 1), replace=False)
            table.remove(gone)
            for n in gone.tolist():
                del want[n]
        else:
            free = [n for n in range(50) if n not in want]
            count = int(random.integers(0, min(len(free), 20 - len(want)) + 1))
            new = np.sort(random.choice(free, size=count, replace=False)).astype(np.int64)
            rows = torch.from_numpy(random.normal(size=(count, 2, 3)).astype(np.float32))
            table.insert(new, rows)
            want |= dict(zip(new.tolist(), rows, strict=True))
        assert table.used == len(want) and sorted(table.neuron_K[: table.used].tolist()) == sorted(want)
        assert (table.neuron_K[table.used :] == -1).all() and (table.slot_F >= 0).sum() == len(want)
        for n, row in want.items():
            assert torch.equal(table.rows_KPD[table.slot_F[n]], row)


@pytest.mark.parametrize("gated", [False, True])
def test_bundles_come_back_with_one_read_for_neighbours(tmp_path: Path, gated: bool) -> None:
    mlp: Any = decoder(gated).layers[0].mlp
    whole = bundles(mlp)
    (tmp_path / BUNDLES).write_bytes(b"\0" * 64 + whole.contiguous().view(torch.uint8).numpy().tobytes())
    file = BundleFile(tmp_path / BUNDLES, 64, F, whole.shape[1], D, torch.float32)
    index = np.array([3, 4, 5, 9, 90, 91])
    assert torch.equal(file.read(index), whole[torch.from_numpy(index)])
    assert file.reads == 3 and file.read_bytes == 6 * whole.shape[1] * D * 4
    assert torch.equal(whole[:, -1], mlp.down.weight.T) and torch.equal(whole[:, 0], mlp.up.weight)


class Oracle(FlashMlp):
    """Knows which neurons are active."""

    truth: Any

    def predicted(self, x_ND: torch.Tensor) -> np.ndarray:
        gate = self.truth.gate if self.truth.gated else self.truth.up
        return (gate(x_ND) > 0).any(0).nonzero()[:, 0].numpy()


@pytest.mark.parametrize("gated", [False, True])
def test_the_oracle_is_exact_and_reads_what_is_new(tmp_path: Path, gated: bool) -> None:
    """Bytes are |needed and not in memory| bundles, memory is the union over the window."""
    mlp: Any = decoder(gated).layers[1].mlp
    (tmp_path / BUNDLES).write_bytes(bundles(mlp).contiguous().view(torch.uint8).numpy().tobytes())
    pair = (torch.zeros(2, D), torch.zeros(F, 2))
    flash = Oracle(mlp, Config(window=3, resident=1.0), tmp_path / BUNDLES, 0, pair)
    flash.truth = mlp
    history: list[set[int]] = []
    read = 0
    x = torch.randn(1, D, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for step in range(30):
            x = x + 0.3 * torch.randn(1, D, generator=torch.Generator().manual_seed(step))
            before = set().union(*history[-3:]) if history else set()
            torch.testing.assert_close(flash(x[None])[0], mlp(x), atol=1e-5, rtol=1e-5)
            history.append(set(flash.predicted(x).tolist()))
            read += len(history[-1] - before)
            assert set(flash.table.neuron_K[: flash.table.used].tolist()) == set().union(*history[-3:])
            assert flash.file.read_bytes == read * flash.file.size
    assert 0 < read < sum(len(h) for h in history)


def test_what_does_not_fit_the_table_is_still_computed(tmp_path: Path) -> None:
    mlp: Any = decoder().layers[0].mlp
    (tmp_path / BUNDLES).write_bytes(bundles(mlp).contiguous().view(torch.uint8).numpy().tobytes())
    flash = Oracle(mlp, Config(window=4, resident=0.05), tmp_path / BUNDLES, 0, (torch.zeros(2, D), torch.zeros(F, 2)))
    flash.truth = mlp
    with torch.no_grad():
        for n in (1, 3, 8, 40):
            x = torch.randn(n, D, generator=torch.Generator().manual_seed(n))
            torch.testing.assert_close(flash(x[None])[0], mlp(x), atol=1e-5, rtol=1e-5)
            assert flash.table.used <= 5


def test_predictors_know_most_active_neurons_and_leave_most_others(tmp_path: Path) -> None:
    model = decoder()
    tokens = torch.randint(1, 64, (16, 32), generator=torch.Generator().manual_seed(1))
    for x, active in seen(model, tokens):
        v, u, recall = fit(x, active, Config(rank=16, steps=200))
        predicted = (x @ v.T @ u.T) > 0
        assert float(predicted[active].float().mean()) == pytest.approx(float(recall), abs=1e-3)
        assert float(recall) > 0.9
        assert float(predicted[~active].float().mean()) < 0.5
        assert float(active.float().mean()) < 0.4


def test_a_model_without_relu_is_refused(tmp_path: Path) -> None:
    model = Decoder(llama_like(64, 32, 1, 4))
    with pytest.raises(UserError, match="silu"):
        LlmInAFlash(Config()).prepare(model, tmp_path, torch.ones(1, 8, dtype=torch.int64))


LIMITED = """
import resource, sys
import torch
from modicum.budget.meter import Meter, resident_now
from modicum.serve.config import EngineConfig
from modicum.serve.engine import Engine
from modicum.serve.request import SamplingParams
from modicum.serve.residency import load_prepared
torch.set_num_threads(1)
params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
def serve(folder):
    method, model = load_prepared(folder)
    engine = Engine(model, None, EngineConfig(cache="128tok", max_sequences=1))
    return list(engine.generate([[5, 9, 2, 7]], params)[0].tokens), method.stats(model)
serve(sys.argv[1])  # imports, and what the first calls keep
before = resident_now()
data = int(open("/proc/self/statm").read().split()[5]) * 4096
resource.setrlimit(resource.RLIMIT_DATA, (data + int(sys.argv[3]), data + int(sys.argv[3])))
with Meter() as meter:
    tokens, stats = serve(sys.argv[2])
print(int(meter.peak_bytes) - before, *tokens)
"""


def test_a_model_is_served_in_half_of_its_bytes(tmp_path: Path) -> None:
    """A process whose data may grow by half of the model serves it; with all weights it cannot."""
    from modicum.core.choice import Choice
    from modicum.core.files import write_json
    from modicum.serve.residency import NOTE, note

    folders: dict[tuple[str, bool], Path] = {}
    whole = 0
    for big in (False, True):
        layers, width = (12, 4096) if big else (1, 64)
        shape = llama_like(
            64, 384, layers, 6, mlp_width=width, context_length=128, activation="relu", gated=False, mlp_bias=True
        )
        model = Decoder(shape, torch.Generator().manual_seed(0))
        with torch.no_grad():
            for layer in model.layers:
                layer.mlp.up.bias.fill_(-1.5)  # type: ignore[union-attr]
        whole = sum(p.nbytes for p in model.parameters())
        for text in ("all", "llm-in-a-flash:rank=8,steps=5,resident=0.2,positive=1.0"):
            choice = Choice.parse("residency", text)
            folder = tmp_path / f"{choice.method}-{big}"
            folder.mkdir()
            from modicum.core import registry

            registry.build("residency", choice).prepare(model, folder, torch.arange(1, 33).view(2, 16))
            write_json(folder / NOTE, note(choice))
            folders[choice.method, big] = folder

    def run(key: str, limit: int) -> Any:
        given = [str(folders[key, False]), str(folders[key, True]), str(limit)]
        return subprocess.run(
            [sys.executable, "-c", LIMITED, *given],
            capture_output=True,
            text=True,
            env=os.environ | {"MODICUM_NATIVE": "0"},
        )

    flash = run("llm-in-a-flash", whole // 2)
    assert flash.returncode == 0, flash.stderr[-1500:]
    peak, *tokens = (int(x) for x in flash.stdout.split())
    assert peak < whole // 2 and len(tokens) == 6, f"{peak >> 20} MiB of {whole >> 20}"
    assert run("all", whole // 2).returncode != 0, "all weights fitted half of their bytes"
