"""`modicum bench engine` on a model of nothing: every column, the records, what is left out and why."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from modicum.bench import engine as bench
from modicum.bench.engine_worker import EngineFailed, Job, Worker
from modicum.cli.bench import engine as command
from modicum.core.errors import UserError
from modicum.serve import native

SIZE = bench.Size(
    layers=1,
    width=64,
    heads=2,
    kv_heads=1,
    mlp_width=128,
    vocab=300,
    prompt=5,
    tokens=3,
    prefill=20,
    answer=3,
    requests=3,
    rounds=2,
)


@pytest.fixture
def idle(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine's ceilings, which take seconds to measure and are not what is asked here."""
    monkeypatch.setattr(bench, "ceilings", lambda: {"read_bytes_per_s": 1e10})


def test_ceilings_are_measured() -> None:
    found = bench.ceilings(1 << 22)
    assert found["read_bytes_per_s"] > 1e7 and found["matmul_bfloat16_flop_per_s"] > 1e7


def test_columns_ratios_and_records(idle: None, tmp_path: Path) -> None:
    found = bench.measure(SIZE, engines=["modicum", "transformers"])
    rows = {(r["engine"], r["column"]): r for r in found["rows"]}
    assert {c for e, c in rows if e == "transformers"} == {"decode bf16", "prefill bf16"}
    assert {"decode int8", "prefill int4", "3 at once bf16"} <= {c for e, c in rows if e == "modicum"}
    assert all(len(r["rates"]) == 2 and r["tokens_per_s"] > 0 for r in rows.values())
    decode = rows["modicum", "decode int8"]["tokens_per_s"] / rows["transformers", "decode bf16"]["tokens_per_s"]
    assert rows["modicum", "decode int8"]["ratio"] == pytest.approx(decode)
    assert found["checks"]["float32_tokens_equal"]
    eights = {"w8a8", "w4a8"} if "avx512_vnni" in native.processor() and native.library() else set()
    assert set(found["share_of_read"]) == {"bf16", "int8", "int4"} | eights
    assert set(found["checks"]["eight_bit_logit_error"]) == eights
    assert all(0 < error < 0.05 for error in found["checks"]["eight_bit_logit_error"].values())
    bench.append(found, tmp_path / "engine.jsonl", 0)
    assert len((tmp_path / "engine.jsonl").read_text().splitlines()) == len(rows)


def test_unknown_engine_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"llama\.cpp"):
        command(["vllm"], 0, quick=True, evidence=tmp_path, as_json=True)


ENGINES = """
import os, signal, sys, time

def _columns(work):
    return {"decode bf16": work, "prefill bf16": lambda: 3.0}

def good(folder, size, form):
    print("a library's chatter")
    assert folder.joinpath("config.json").exists() and os.environ["OMP_NUM_THREADS"]
    return _columns(lambda: 7.0)

def dies(folder, size, form):
    turns = []
    def work():
        turns.append(1)
        if len(turns) > 1:
            sys.stderr.write("kernel gave up\\n")
            sys.stderr.flush()
            os.kill(os.getpid(), signal.SIGSEGV)
        return 5.0
    return _columns(work)

def dies_at_once(folder, size, form):
    os._exit(3)

def hangs(folder, size, form):
    return _columns(lambda: time.sleep(600))

def fails(folder, size, form):
    raise RuntimeError("no such weights")
"""


@pytest.fixture
def engines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Job]:
    (tmp_path / "made_up_engines.py").write_text(ENGINES)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    names = ("good", "dies", "dies_at_once", "hangs", "fails")
    return {n: Job(n.replace("_", " "), f"made_up_engines:{n}", ("bf16",)) for n in names}


def test_an_engine_that_crashes_or_hangs_leaves_the_others(engines: dict[str, Job], idle: None, capfd: Any) -> None:
    found = bench.measure(SIZE, engines=["nobody"], limit=5, more=list(engines.values()))
    rows = {(r["engine"], r["column"]): r["rates"] for r in found["rows"]}
    assert rows == {("good", "decode bf16"): [7.0, 7.0], ("good", "prefill bf16"): [3.0, 3.0]}
    skipped = found["skipped"]
    assert skipped["dies bf16"] == "decode bf16: its process was ended by signal 11 (SIGSEGV): kernel gave up"
    assert skipped["dies at once bf16"] == "its process ended with exit code 3"
    assert skipped["hangs bf16"].startswith("decode bf16: gave no answer within 5 s")
    assert skipped["fails bf16"] == "RuntimeError: no such weights"
    assert "chatter" not in capfd.readouterr().out


def test_a_worker_answers_until_it_is_killed(engines: dict[str, Job], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    worker = Worker(engines["good"], tmp_path, SIZE, 1, 30)
    assert worker.time("decode bf16") == 7.0 and worker.call("math:prod", [2, 3]) == 6
    with pytest.raises(EngineFailed, match="KeyError"):
        worker.time("nothing")
    worker.kill()
    with pytest.raises(EngineFailed, match="SIGKILL"):
        worker.time("decode bf16")
    worker.close()


def test_a_given_model_is_measured(idle: None, tmp_path: Path) -> None:
    from modicum.bench.engine_columns import shape_of
    from modicum.model.decoder import Decoder
    from modicum.model.gguf.write import Types, write

    model = Decoder(shape_of(SIZE), torch.Generator().manual_seed(0))
    (tmp_path / "folder").mkdir()
    write(model, tmp_path / "folder" / "model.gguf", Types(matrices="q4_1"))
    from modicum.core.files import write_json
    from modicum.model.families import write_config

    write_json(tmp_path / "folder" / "config.json", write_config(model.config, "bfloat16"))
    found = bench.measure(bench.replace(SIZE, rounds=1), engines=["modicum"], model=str(tmp_path / "folder"))
    columns = {r["column"] for r in found["rows"]}
    assert {"decode bf16", "decode q4_1", "prefill q4_1"} <= columns
    assert found["model"] == {"name": str(tmp_path / "folder"), "parameters": model.config.parameters()}
    with pytest.raises(UserError, match="context of 2048"):
        bench.measure(bench.replace(SIZE, prefill=4000), model=str(tmp_path / "folder"))
