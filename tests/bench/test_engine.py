"""`modicum bench engine` on a model of nothing: every column, the records, what is left out and why."""

from __future__ import annotations

from pathlib import Path

import pytest

from modicum.bench import engine as bench
from modicum.bench import record
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


def test_columns_ratios_and_records(tmp_path: Path) -> None:
    found = bench.measure(SIZE, engines=["modicum", "transformers"])
    rows = {(r["engine"], r["column"]): r for r in found["rows"]}
    assert {c for e, c in rows if e == "transformers"} == {"decode bf16", "prefill bf16"}
    assert {"decode int8", "prefill int4", "3 at once bf16"} <= {c for e, c in rows if e == "modicum"}
    assert all(len(r["rates"]) == 2 and r["tokens_per_s"] > 0 for r in rows.values())
    decode = rows["modicum", "decode int8"]["tokens_per_s"] / rows["transformers", "decode bf16"]["tokens_per_s"]
    assert rows["modicum", "decode int8"]["ratio"] == pytest.approx(decode)
    assert found["checks"]["float32_tokens_equal"] and "openvino" in found["skipped"]
    eights = {"w8a8", "w4a8"} if "avx512_vnni" in native.processor() and native.library() else set()
    assert set(found["share_of_read"]) == {"bf16", "int8", "int4"} | eights
    assert set(found["checks"]["eight_bit_logit_error"]) == eights
    assert all(0 < error < 0.05 for error in found["checks"]["eight_bit_logit_error"].values())
    bench.append(found, tmp_path / "engine.jsonl", 0)
    assert len(record.read(tmp_path / "engine.jsonl")) == len(rows)


def test_unknown_engine_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"llama\.cpp"):
        command(["vllm"], 0, quick=True, evidence=tmp_path, as_json=True)
