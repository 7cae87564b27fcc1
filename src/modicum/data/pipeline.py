"""The curation pipeline: reads groups of units, runs steps over them, counts what each step did.

A *group* is a deterministic list of units of about equal bytes. A *pass* takes each group through the
document steps up to the next corpus step, in any process, and writes `part-GGGGG.parquet`, the dropped
documents, and one row of columns per document (bytes, split key, signature); the corpus step then decides
in one process, in the order of groups and rows. Each finished group leaves a marker (a JSON of its
statistics), so that a resumed run skips it. The output depends on the sources and the steps alone: not on
the engine, the number of processes or where a run was interrupted.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from modicum.core import registry
from modicum.core.choice import Choice
from modicum.core.errors import ModicumError
from modicum.core.files import atomic_file, read_json, write_json
from modicum.data.document import Document, Drop, read_parquet, write_documents
from modicum.data.readers import ReadConfig, Unit, read
from modicum.data.signals import Signals
from modicum.data.steps import Context, Step, sample_key

SIGNATURE_ROWS, SIGNATURE_BYTES = 64, 4 << 20  # documents handed to a corpus step at once


class StepError(ModicumError):
    """A step failed on a document; the message names both."""


@dataclass
class StepStats:
    """Statistics of one step: documents and UTF-8 bytes in and out, its own seconds, drops by reason."""

    step: str
    documents_in: int = 0
    bytes_in: int = 0
    documents_out: int = 0
    bytes_out: int = 0
    seconds: float = 0.0
    drops: Counter[str] = field(default_factory=Counter)
    stats: Counter[str] = field(default_factory=Counter)

    def add(self, other: dict[str, Any]) -> None:
        for name in ("documents_in", "bytes_in", "documents_out", "bytes_out", "seconds"):
            setattr(self, name, getattr(self, name) + other[name])
        self.drops.update(other["drops"])
        self.stats.update(other["stats"])

    def as_dict(self) -> dict[str, Any]:
        return vars(self) | {
            "drops": dict(sorted(self.drops.items())),
            "seconds": round(self.seconds, 4),
            "stats": dict(sorted(self.stats.items())),
        }


class _Feed:
    """The input of a step: counts documents, remembers the current one, and times the steps before it."""

    def __init__(self, items: Iterator[Document], step_stats: StepStats):
        self.items, self.step_stats, self.seconds, self.current = items, step_stats, 0.0, "(before the first document)"

    def __iter__(self) -> _Feed:
        return self

    def __next__(self) -> Document:
        start = time.perf_counter()
        try:
            document = next(self.items)
        finally:
            self.seconds += time.perf_counter() - start
        self.current = document.id
        self.step_stats.documents_in += 1
        self.step_stats.bytes_in += document.nbytes
        return document


def stage(step: Step, items: Iterator[Document], step_stats: StepStats, drops: list[str]) -> Iterator[Document]:
    """`step` over `items`: documents come out, drops go to `drops` with the step's name."""
    feed = _Feed(items, step_stats)
    output = iter(step.run(feed))
    while True:
        start, before = time.perf_counter(), feed.seconds
        try:
            item = next(output)
        except StopIteration:
            return
        except ModicumError:
            raise
        except Exception as error:
            raise StepError(
                f"step {step_stats.step} failed on document {feed.current!r}: {type(error).__name__}: {error}"
            ) from error
        finally:
            step_stats.seconds += time.perf_counter() - start - (feed.seconds - before)
        if isinstance(item, Drop):
            step_stats.drops[item.reason] += 1
            drops.append(drop_line(item.document_id, step_stats.step, item.reason, item.detail))
        else:
            step_stats.documents_out += 1
            step_stats.bytes_out += item.nbytes
            yield item


def drop_line(id_: str, step: str, reason: str, detail: str) -> str:
    """One line of drops.jsonl."""
    line = {"id": id_, "step": step, "reason": reason, "detail": detail}
    return json.dumps(line, ensure_ascii=False) + "\n"


def group_units(units: Sequence[Unit], most_bytes: int, most_units: int = 2000) -> list[list[Unit]]:
    """Consecutive units in groups of at most `most_bytes` (a larger unit is a group by itself)."""
    groups: list[list[Unit]] = []
    size = 0
    for unit in units:
        if not groups or size + unit.nbytes > most_bytes or len(groups[-1]) >= most_units:
            groups.append([])
            size = 0
        groups[-1].append(unit)
        size += unit.nbytes
    return groups


@dataclass
class Pass:
    """Document steps, then a corpus step or none. Steps with something to fit are `fitted` before the pass, on what
    the passes before it left; arrays: the file of each, by its number in the pass (that of the corpus step is the
    last).
    """

    line: list[Choice] = field(default_factory=list)
    corpus: Choice | None = None
    fitted: list[int] = field(default_factory=list)
    arrays: dict[int, Path] = field(default_factory=dict)

    @property
    def steps(self) -> list[Choice]:
        return [*self.line, *([self.corpus] if self.corpus else [])]

    def part(self, stem: Path) -> dict[str, Any]:
        """The task's fields that say what to run."""
        paths = {str(number): str(path.resolve()) for number, path in self.arrays.items()}
        return {
            "stem": str(stem.resolve()),
            "steps": [as_mapping(c) for c in self.line],
            "signature": as_mapping(self.corpus) if self.corpus else None,
            "arrays": paths,
        }


def passes(steps: Sequence[Choice]) -> list[Pass]:
    """Steps cut after each corpus step, which compares all documents, and before each that has to be fitted first."""
    out = [Pass()]
    for choice in steps:
        step: Step = registry.build("step", choice)
        if step.sample:
            if len(out) == 1 or out[-1].steps:  # there have to be documents to sample
                out.append(Pass())
            out[-1].fitted = [0]
        if step.scope == "corpus":
            out[-1].corpus = choice
            out.append(Pass())
        else:
            out[-1].line.append(choice)
    return out


def as_mapping(choice: Choice) -> dict[str, Any]:
    return {"method": choice.method} | choice.knobs


def ready(choice: Any, context: Context, arrays: str | Path | None) -> Step:
    """A step, opened, with what was fitted for it."""
    step: Step = registry.build("step", choice)
    step.open(context)
    if arrays is not None:
        with np.load(arrays, allow_pickle=False) as stored:
            step.load(dict(stored))
    return step


def run_group(task: dict[str, Any]) -> dict[str, Any]:
    """One group through one pass; runs in any process. Returns the group's statistics and writes its marker."""
    stem = Path(task["stem"])
    context = Context(task["seed"], Signals.of_task(task["signals"]), replies=Path(task["replies"]))
    drops: list[str] = []
    all_stats: list[StepStats] = []
    items: Iterator[Document]
    if "units" in task:
        all_stats.append(StepStats("read"))
        items = _read(task["units"], ReadConfig(**task["read"]), all_stats[0], drops)
    else:
        items = undecided(task["input"], task["decisions"])
    arrays: dict[str, str] = task["arrays"]
    steps = [ready(choice, context, arrays.get(str(k))) for k, choice in enumerate(task["steps"])]
    for choice, step in zip(task["steps"], steps, strict=True):
        all_stats.append(StepStats(choice["method"]))
        items = stage(step, items, all_stats[-1], drops)
    last = str(len(steps))
    columns = _Columns(ready(task["signature"], context, arrays.get(last)) if task["signature"] else None)
    count = write_documents(stem.with_suffix(".parquet"), columns.collect(items))
    for step, step_stats in zip(steps, all_stats[-len(steps) :] if steps else [], strict=True):
        step_stats.stats.update(step.close())
    columns.save(stem.with_suffix(".npz"))
    with atomic_file(stem.with_suffix(".drops.jsonl"), "w") as file:
        file.writelines(drops)
    result = {"books": [b.as_dict() for b in all_stats], "documents": count, "signature_seconds": columns.seconds}
    write_json(stem.with_suffix(".json"), result)
    return result


def _read(
    units: Iterable[dict[str, Any]], config: ReadConfig, step_stats: StepStats, drops: list[str]
) -> Iterator[Document]:
    start = time.perf_counter()
    for fields in units:
        unit = Unit(**fields)
        step_stats.documents_in += 1
        step_stats.bytes_in += unit.nbytes
        for item in read(unit, config):
            if isinstance(item, Drop):
                step_stats.drops[item.reason] += 1
                drops.append(drop_line(item.document_id, "read", item.reason, item.detail))
                continue
            step_stats.documents_out += 1
            step_stats.bytes_out += item.nbytes
            step_stats.seconds += time.perf_counter() - start
            yield item
            start = time.perf_counter()
    step_stats.seconds += time.perf_counter() - start


def undecided(path: str | Path, decisions: str | Path | None) -> Iterator[Document]:
    """Documents of a part without those that `decisions` ({row: ...} as JSON) names."""
    dropped = set(map(int, read_json(decisions))) if decisions else set()
    if Path(path).exists():
        for row, document in enumerate(read_parquet(path)):
            if row not in dropped:
                yield document


class _Columns:
    """Per document of a part: its bytes, the key of the held-out split, its signature."""

    def __init__(self, step: Step | None):
        self.step = step
        self.sizes: list[int] = []
        self.keys: list[int] = []
        self.rows: list[np.ndarray] = []
        self.seconds = 0.0
        self._waiting: list[Document] = []

    def collect(self, items: Iterable[Document]) -> Iterator[Document]:
        waiting_bytes = 0
        for document in items:
            self.sizes.append(document.nbytes)
            digest = hashlib.blake2b(document.origin.encode("utf-8", "surrogatepass"), digest_size=8).digest()
            self.keys.append(int.from_bytes(digest, "little"))
            if self.step:
                self._waiting.append(document)
                waiting_bytes += self.sizes[-1]
                if len(self._waiting) == SIGNATURE_ROWS or waiting_bytes >= SIGNATURE_BYTES:
                    self._sign()
                    waiting_bytes = 0
            yield document
        if self.step:
            self._sign()

    def _sign(self) -> None:
        assert self.step
        start = time.perf_counter()
        try:
            self.rows.append(self.step.signatures(self._waiting))
        except ModicumError:
            raise
        except Exception as error:
            raise StepError(
                f"step {type(self.step).__module__} failed on one of the documents "
                f"{self._waiting[0].id!r} ... {self._waiting[-1].id!r}: {error}"
            ) from error
        self.seconds += time.perf_counter() - start
        self._waiting = []

    def save(self, path: Path) -> None:
        arrays = {"sizes": np.array(self.sizes, np.int64), "keys": np.array(self.keys, np.uint64)}
        if self.rows:
            arrays["signatures"] = np.concatenate(self.rows)
        with atomic_file(path) as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]


def finished(stem: Path) -> dict[str, Any] | None:
    """A group's statistics if its marker exists."""
    with suppress(FileNotFoundError, json.JSONDecodeError):
        result: dict[str, Any] = read_json(stem.with_suffix(".json"))
        return result
    return None


def sample_of(stems: Sequence[Path], decisions: Sequence[Path | None], count: int) -> list[Document]:
    """`count` documents of some parts by a hash of their ids (`steps.sampled`), in bounded memory."""

    def keyed() -> Iterator[tuple[bytes, str, int, int]]:
        for g, (stem, decision) in enumerate(zip(stems, decisions, strict=True)):
            dropped = set(map(int, read_json(decision))) if decision else set()
            ids = Ids([stem])
            for row in range(len(ids)):
                if row not in dropped:
                    yield sample_key(ids[row]), ids[row], g, row

    chosen = heapq.nsmallest(count, keyed())
    documents: dict[tuple[int, int], Document] = {}
    for g in sorted({item[2] for item in chosen}):
        rows = {row for _, _, part, row in chosen if part == g}
        for row, document in enumerate(read_parquet(stems[g].with_suffix(".parquet"))):
            if row in rows:
                documents[g, row] = document
    return [documents[g, row] for _, _, g, row in chosen]


def load_columns(stems: Sequence[Path], name: str, file: Path | None = None) -> np.ndarray:
    """One column over all documents, in the order of parts and rows; memory-mapped from `file` if one is given."""

    def arrays() -> Iterator[np.ndarray]:
        for stem in stems:
            with np.load(stem.with_suffix(".npz"), allow_pickle=False) as stored:
                if name in stored.files and len(stored[name]):
                    yield stored[name]

    if file is None:
        return np.concatenate([np.zeros(0, np.int64 if name == "sizes" else np.uint64), *arrays()])
    rows, last_array = 0, None
    with open(file, "wb") as out:
        for array in arrays():
            out.write(np.ascontiguousarray(array).data)
            rows, last_array = rows + len(array), array
    if last_array is None:
        return np.zeros((0, 1), np.uint64)
    return np.memmap(file, last_array.dtype, "r", shape=(rows, *last_array.shape[1:]))


class Ids:
    """Ids of all documents of some parts by their number, read on demand."""

    def __init__(self, stems: Sequence[Path]):
        import pyarrow as pa
        import pyarrow.parquet as pq

        columns = [
            pq.read_table(s.with_suffix(".parquet"), columns=["id"])["id"]
            for s in stems
            if s.with_suffix(".parquet").exists()
        ]
        self._ids = pa.chunked_array([chunk for column in columns for chunk in column.chunks], pa.string())

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, i: int) -> str:
        return str(self._ids[int(i)].as_py())
