"""Damaged inputs: one line each, the rest is curated, a non-zero exit; and why a document is where it is."""

from __future__ import annotations

import gzip
import json
import random
import re
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from modicum.core.errors import UserError
from modicum.data.curate import CurateConfig, Curation, curate, drawing
from modicum.data.explain import explain
from modicum.data.readers import ReadConfig

WORDS = re.findall(
    r"\w+", "the of and to that have with be model token layer index cache page budget river winter engine"
)


def text(number: int) -> str:
    rng = random.Random(number)
    return "\n".join(" ".join(rng.choice(WORDS) for _ in range(12)) + f" {number}." for _ in range(9))


def records(start: int, count: int) -> bytes:
    return b"".join(json.dumps({"text": text(start + i)}).encode() + b"\n" for i in range(count))


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with every kind of damage, and twelve good documents around it."""
    root = tmp_path_factory.mktemp("faults") / "pool"
    root.mkdir()
    (root / "good.jsonl").write_bytes(records(0, 4))
    (root / "cut.jsonl.gz").write_bytes(gzip.compress(records(10, 2)) + gzip.compress(records(20, 400))[:-40])
    (root / "utf8.jsonl").write_bytes(records(30, 1) + b'{"text": "caf\xe9 \xff"}\n' + records(31, 1))
    (root / "empty.jsonl").write_bytes(b"")
    (root / "column.jsonl").write_bytes(records(40, 1) + b'{"body": "elsewhere"}\n' + records(41, 1))
    pq.write_table(pa.table({"body": ["x"]}), root / "column.parquet")
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), root / "none.parquet")
    with open(root / "long.jsonl", "wb") as file:
        file.write(records(50, 1) + b'{"text": "')
        for _ in range(200):
            file.write(b"x" * 1_000_000)
        file.write(b'"}\n' + records(51, 1))
    return root


COMMAND = [sys.executable, "-c", "from modicum.cli import main; main()", "curate"]


def test_damage_is_named_and_the_rest_is_done(damaged: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = [str(damaged), "--out", str(out), "--vocab-size", "300", "--processes", "1", "--steps", "normalise"]
    result = subprocess.run([*COMMAND, *arguments], capture_output=True, text=True)
    assert result.returncode == 1, result.stderr
    said = sorted(line for line in result.stderr.splitlines() if line.startswith("modicum: not read: "))
    starts = [
        "pool/column.jsonl#2: no-text-field (no text in 'text'; it has: body)",
        "pool/column.parquet: no-text-field (no column 'text'; it has: body)",
        "pool/cut.jsonl.gz: unreadable (Compressed file ended",
        "pool/empty.jsonl: no-records (the file is empty)",
        "pool/long.jsonl#2: long-line (a line of more than",
        "pool/none.parquet: no-records (the table has no rows)",
        "pool/utf8.jsonl#2: bad-json ('utf-8' codec can't decode byte",
    ]
    assert len(said) == len(starts)
    for line, start in zip(said, starts, strict=True):
        assert line.removeprefix("modicum: not read: ").startswith(start)
    curation = Curation.load(out)
    ids = {d.id for split in ("train", "heldout") for d in curation.documents(split)}
    good = {"good.jsonl#1", "good.jsonl#4", "utf8.jsonl#1", "utf8.jsonl#3", "column.jsonl#1", "column.jsonl#3"}
    assert {f"pool/{name}" for name in (*good, "long.jsonl#1", "long.jsonl#3", "cut.jsonl.gz#2")} <= ids
    again = subprocess.run([*COMMAND, *arguments], capture_output=True, text=True)
    assert (
        again.returncode == 1
        and sorted(line for line in again.stderr.splitlines() if line.startswith("modicum: not read: ")) == said
    ), "the finished folder says so again"


def test_a_sound_folder_exits_with_0(tmp_path: Path) -> None:
    (tmp_path / "pool").mkdir()
    (tmp_path / "pool" / "a.jsonl").write_bytes(records(0, 6))
    arguments = [str(tmp_path / "pool"), "--out", str(tmp_path / "out"), "--vocab-size", "300", "--steps", "normalise"]
    result = subprocess.run([*COMMAND, *arguments], capture_output=True, text=True)
    assert result.returncode == 0 and "not read" not in result.stderr
    missing = subprocess.run([*COMMAND, str(tmp_path / "pool")], capture_output=True, text=True)
    assert missing.returncode == 2 and "--out is missing" in missing.stderr


def test_a_dry_run_draws_and_writes_nothing(damaged: Path, tmp_path: Path) -> None:
    config = CurateConfig(steps=["normalise", "betr:targets=[x.jsonl],sample=77", "minhash", "pii"])
    drawn = drawing([str(damaged)], config)
    assert drawn.splitlines()[0].startswith(f"{damaged}: 8 files (6 jsonl, 2 parquet), ")
    order = [
        "read -> normalise",
        "betr is fitted on 77 documents",
        "betr:targets",
        "minhash, over all",
        "pii",
        "shards",
    ]
    assert [drawn.find(part) for part in order] == sorted(drawn.find(part) for part in order) and -1 not in [
        drawn.find(part) for part in order
    ]
    result = subprocess.run([*COMMAND, str(damaged), "--dry-run"], capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0 and "read -> normalise" in result.stdout and not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def explained(tmp_path_factory: pytest.TempPathFactory) -> Curation:
    root = tmp_path_factory.mktemp("why")
    source = root / "texts"
    source.mkdir()
    for i in range(8):
        (source / f"{i}.txt").write_text(text(i))
    (source / "copy.txt").write_text(text(3))
    (source / "short.txt").write_text("Too short.")
    (source / "m.py").write_text('"""A module of the model that has to be with the token."""\nx = 1\n' * 3)
    (root / "target.jsonl").write_bytes(records(500, 20))
    steps = ["normalise", "python-split", "quality:min_words=20", "exact-dedup"]
    steps.append({"method": "betr", "targets": [str(root / "target.jsonl")], "keep": 0.6, "dims": 4, "sample": 50})
    config = CurateConfig(steps=steps, vocab_size=300, heldout=0.2, read=ReadConfig())
    return curate(str(source), root / "out", config, processes=1)


def test_why_shows_every_step(explained: Curation) -> None:
    (short,) = explain(explained.folder, "texts/short.txt")
    assert [d.step for d in short.decisions] == ["read", "normalise", "python-split", "quality"]
    assert (short.decisions[-1].decision, short.decisions[-1].reason) == ("dropped", "too-short")
    assert "2 words" in short.decisions[-1].detail and short.split == ""
    (copy,) = explain(explained.folder, "texts/copy.txt")
    assert copy.decisions[-1].detail == "same as texts/3.txt" and copy.decisions[-1].step == "exact-dedup"
    kept = next(d for split in ("train", "heldout") for d in explained.documents(split))
    (one,) = explain(explained.folder, kept.id)
    assert one.split in ("train", "heldout") and [d.step for d in one.decisions][-1] == "betr"
    assert all(d.decision == "passed" for d in one.decisions) and one.decisions[-1].detail.startswith("score ")
    lost = next(line for line in explained.examples()["betr: not-selected"])
    (other,) = explain(explained.folder, lost["id"])
    score = float(one.decisions[-1].detail.split()[1])
    assert float(other.decisions[-1].detail.split()[1].rstrip(",")) < score, "the kept one scores higher"
    parts = explain(explained.folder, "texts/m.py")
    assert {v.id.split("#")[1] for v in parts} >= {"code"} and all(v.id.startswith("texts/m.py#") for v in parts)
    with pytest.raises(UserError, match=r"texts/1\.txt"):
        explain(explained.folder, "texts/1.text")


def test_why_as_typed(explained: Curation, tmp_path: Path) -> None:
    why = [*COMMAND[:-1], "why"]
    shown = subprocess.run([*why, str(explained.folder), "texts/short.txt"], capture_output=True, text=True)
    assert shown.returncode == 0 and "texts/short.txt: dropped" in shown.stdout
    assert "quality" in shown.stdout and "dropped too-short 2 words" in shown.stdout
    made = subprocess.run([*why, str(explained.folder), "texts/copy.txt", "--json"], capture_output=True, text=True)
    assert json.loads(made.stdout)[0]["decisions"][-1]["reason"] == "duplicate"
    unknown = subprocess.run([*why, str(explained.folder), "nothing"], capture_output=True, text=True)
    assert unknown.returncode == 2 and "has no document 'nothing'" in unknown.stderr
    empty = subprocess.run([*why, str(tmp_path), "x"], capture_output=True, text=True)
    assert empty.returncode == 2 and "no finished curation" in empty.stderr


def test_ten_examples_of_each_reason(tmp_path: Path) -> None:
    source = tmp_path / "texts"
    source.mkdir()
    for i in range(14):
        (source / f"short{i:02}.txt").write_text(f"Short {i}.")
    for i in range(4):
        (source / f"{i}.txt").write_text(text(i))
    config = CurateConfig(steps=["quality"], vocab_size=300, heldout=0.2)
    made = curate(str(source), tmp_path / "out", config, processes=1)
    assert len(made.examples()["quality: too-short"]) == 10 and made.drops["quality"]["too-short"] == 14
    assert made.damaged == []
