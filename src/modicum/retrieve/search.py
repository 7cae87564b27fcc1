"""A searchable folder: passages, BM25, dense vectors and their encoder.

    FOLDER/manifest.json      format, counts, settings, size and checksum of every file
           passages.parquet   one row per passage; its number is the id in both indexes
           bm25/              lexical index
           dense/ encoder/    vector index and encoder, if one was asked for

`build_index` keeps finished shards of vectors in `.FOLDER.work` until the folder is whole, so a killed build goes on.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from modicum.budget.budget import Budget, Deadline
from modicum.core.choice import Choice
from modicum.core.errors import CorruptError, ModicumError, UserError, unknown
from modicum.core.events import Events
from modicum.core.files import atomic_directory, atomic_file, fingerprint, read_json, tree_bytes, write_json
from modicum.core.registry import build
from modicum.retrieve import fusion, manifest
from modicum.retrieve.bm25 import BM25
from modicum.retrieve.encoders import Encoder, load_encoder, make_encoder
from modicum.retrieve.filters import matching
from modicum.retrieve.indexes import Hits, Index, open_index
from modicum.retrieve.passages import Passage, Passages, grouped, indexed_text, write_passages

FORMAT = 2
MODES = ("bm25", "dense", "fused")
SHARD = 512  # passages encoded between two saves
MAKE = "modicum index SOURCE --out FOLDER"
# NumPy reads headers by `ast`, which may fail in two threads at once before Python 3.11.8 (gh-106905).
LOADING = threading.Lock()


@dataclass(frozen=True)
class Hit:
    """One result. `score` is of the mode searched; `ranks` maps each ranking that contains it to its rank (from 1)."""

    passage: Passage
    score: float
    ranks: dict[str, int]


def build_index(
    passages: Iterable[Passage],
    out: str | Path,
    *,
    encoder: Encoder | str | Choice | None = None,
    index: str | dict[str, Any] | Choice = "exact",
    without_query_text: bool = False,
    k1: float = 1.5,
    b: float = 0.75,
    device: str = "cpu",
    budget: Budget | None = None,
    deadline: Deadline | None = None,
    events: Events | None = None,
) -> dict[str, Any]:
    """Index a stream of passages into folder `out` and return its manifest.

    encoder: None for BM25 alone. without_query_text: index title and body without the summary
    sentence (for evaluation).
    Interrupted, the same call goes on after the last finished shard; a deadline stops it between two shards.
    Raises `UserError` for no passages or a repeated id, `BudgetError` when the vectors exceed the memory budget.
    """
    out, choice = Path(out), Choice.parse("index", index)
    choice.config()
    if encoder is not None and not isinstance(encoder, Encoder):
        encoder = make_encoder(encoder, device=device)
    work = out.with_name(f".{out.name}.work")
    begun = work.exists()
    try:
        work.mkdir(parents=True, exist_ok=True)
        for stale in out.parent.glob(f".{out.name}.*.part"):  # what a killed build had begun to assemble
            shutil.rmtree(stale, ignore_errors=True)
        header = _build(
            passages,
            out,
            work,
            encoder,
            choice,
            without_query_text,
            {"k1": k1, "b": b},
            budget or Budget(),
            deadline or Deadline(None),
            events or Events(),
        )
    except (UserError, OSError) as error:
        if not begun:  # a mistake leaves nothing behind; an interruption keeps its shards
            shutil.rmtree(work, ignore_errors=True)
        if isinstance(error, OSError):
            raise UserError(
                f"{out} cannot be written ({error.strerror or error}); free space there or choose another "
                "folder with --out"
            ) from None
        raise
    shutil.rmtree(work)
    return header


def _build(
    passages: Iterable[Passage],
    out: Path,
    work: Path,
    encoder: Encoder | None,
    choice: Choice,
    without_query_text: bool,
    lexical: dict[str, float],
    budget: Budget,
    deadline: Deadline,
    events: Events,
) -> dict[str, Any]:
    start, digest = time.monotonic(), hashlib.sha256()
    count = write_passages(work / "passages.parquet", _hashed(passages, digest))
    if not count:
        raise UserError(f"there is no passage to index for {out}; give a source with text in it")
    rows = Passages(work / "passages.parquet")
    header: dict[str, Any] = {
        "format": FORMAT,
        "passages": count,
        "passages_sha256": digest.hexdigest(),
        "without_query_text": without_query_text,
        "bm25": lexical,
        "index": None,
        "encoder": None,
        "dim": None,
    }
    dense: Index = build("index", choice)
    if encoder is not None:
        header |= {"index": choice.resolved(), "encoder": encoder.settings()}
        key = fingerprint([digest.hexdigest(), header["encoder"], without_query_text, SHARD])
        for width in _pool_shards(encoder, rows, work / "vectors", key, without_query_text, deadline, events):
            budget.require(dense.cost(count, width), f"an index of {count} vectors")  # before the long work
        encoder.fit(_shards(work / "vectors"))
    with atomic_directory(out) as staged:
        BM25.build((indexed_text(p, without_query_text=without_query_text) for p in rows), **lexical).save(
            staged / "bm25"
        )
        if encoder is not None:
            dense.build(_blocks(encoder, work / "vectors"), budget)
            dense.save(staged / "dense")
            encoder.save(staged / "encoder")
        shutil.copyfile(work / "passages.parquet", staged / "passages.parquet")
        header |= {
            "dim": dense.dim,
            "bytes": {p.name: tree_bytes(p) for p in sorted(staged.iterdir())},
            "seconds": round(time.monotonic() - start, 3),
            "files": manifest.describe(staged),
        }
        write_json(staged / "manifest.json", header)
    events.emit("index", passages=count, bytes=tree_bytes(out), seconds=header["seconds"])
    return header


def _hashed(passages: Iterable[Passage], digest: Any) -> Iterator[Passage]:
    for passage in passages:
        digest.update(json.dumps(asdict(passage), sort_keys=True, default=str).encode("utf-8", "surrogatepass"))
        yield passage


def _pool_shards(
    encoder: Encoder,
    rows: Passages,
    folder: Path,
    key: str,
    without_query_text: bool,
    deadline: Deadline,
    events: Events,
) -> Iterator[int]:
    """One file of pooled vectors per `SHARD` passages; those of an earlier attempt with the same key are kept.

    Yields the width of the vectors after each new file.
    """
    state = folder / "state.json"
    if not state.is_file() or read_json(state).get("key") != key:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        write_json(state, {"key": key})
    encoder.count(indexed_text(p, without_query_text=without_query_text) for p in rows)
    with events.progress("encode", len(rows), "passages") as progress:
        for i, group in enumerate(grouped(rows, SHARD)):
            path = folder / f"{i:06d}.npy"
            if path.is_file():
                progress.resume_at(progress.done + len(group))
                continue
            if deadline.passed:
                raise ModicumError(
                    f"the deadline stopped the encoding at {i * SHARD} of {len(rows)} passages; they "
                    "are kept, and the same command goes on from there with more time"
                )
            pooled_NE = encoder.pool([indexed_text(p, without_query_text=without_query_text) for p in group])
            with atomic_file(path) as file:
                np.save(file, pooled_NE)
            progress.update(len(group))
            yield int(pooled_NE.shape[1])


def _shards(folder: Path) -> Iterator[np.ndarray]:
    for path in sorted(folder.glob("*.npy")):
        with LOADING:
            shard = np.load(path, allow_pickle=False)
        yield shard


def _blocks(encoder: Encoder, folder: Path) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    row = 0
    for pooled_NE in _shards(folder):
        yield np.arange(row, row + len(pooled_NE)), encoder.finish(pooled_NE)
        row += len(pooled_NE)


class Searcher:
    """A saved folder, opened: `search` for hits, `rank` for many queries. The encoder loads when first needed."""

    def __init__(self, folder: str | Path, *, device: str = "cpu", model: str | None = None, check: bool = False):
        """`model`: where the encoder's model is now, if it moved. `check` reads every byte against its checksum;
        otherwise files over `manifest.FULL_BYTES` are checked by length."""
        self.folder, self._device, self._model = Path(folder), device, model
        self.manifest = manifest.read_header(self.folder, "manifest.json", "index", MAKE)
        if self.manifest.get("format") != FORMAT or "files" not in self.manifest:
            raise CorruptError(
                f"{self.folder / 'manifest.json'} has format {self.manifest.get('format')!r}, this "
                f"version reads {FORMAT}; build it again with: {MAKE}"
            )
        manifest.verify(self.folder, self.manifest["files"], everything=check)
        self.passages = Passages(self.folder / "passages.parquet")
        with LOADING:
            self.bm25 = BM25.load(self.folder / "bm25", len(self.passages))
            self.dense: Index | None = open_index(self.folder / "dense") if self.manifest["encoder"] else None
        self._encoder: Encoder | None = None

    def __len__(self) -> int:
        return len(self.passages)

    @property
    def modes(self) -> tuple[str, ...]:
        return MODES if self.dense is not None else ("bm25",)

    @property
    def encoder(self) -> Encoder:
        if self._encoder is None:
            self._encoder = load_encoder(self.folder / "encoder", device=self._device, model=self._model)
        return self._encoder

    def rankings(
        self, queries: Sequence[str], k: int, mode: str | None = None, subset: Iterable[int] | None = None
    ) -> dict[str, Hits]:
        """Rows and scores by mode: the one asked for (the best there is, if None) and those it is fused from."""
        mode = mode or self.modes[-1]
        if mode not in MODES:
            raise unknown("search mode", mode, MODES)
        if mode not in self.modes:
            raise UserError(
                f"{self.folder} has no dense vectors, so mode {mode!r} cannot be searched; use bm25, or "
                f"type: {MAKE} --encoder MODEL"
            )
        if k < 1:
            raise UserError(f"k={k} is not a number of results; ask for 1 or more")
        depth = max(100, 4 * k) if mode == "fused" else k
        rows_S = None if subset is None else np.unique(np.fromiter(subset, np.int64))
        if rows_S is not None and len(rows_S) and not 0 <= rows_S[0] <= rows_S[-1] < len(self):
            wrong = rows_S[-1] if rows_S[0] >= 0 else rows_S[0]
            raise UserError(f"the subset names row {wrong}; rows are 0 to {len(self) - 1}")
        hits_by_mode: dict[str, Hits] = {}
        if mode != "dense":
            hits_by_mode["bm25"] = self.bm25.search(list(queries), depth, rows_S)
        if mode != "bm25" and self.dense is not None:
            hits_by_mode["dense"] = self.dense.search(self.encoder.encode_queries(queries), depth, rows_S)
        if mode == "fused":
            hits_by_mode["fused"] = fusion.fuse([hits_by_mode["bm25"], hits_by_mode["dense"]], k)
        return hits_by_mode

    def rank(
        self, queries: Sequence[str], k: int, mode: str | None = None, subset: Iterable[int] | None = None
    ) -> Hits:
        """Row numbers and scores, shape (queries, k)."""
        return self.rankings(queries, k, mode, subset)[mode or self.modes[-1]]

    def search(
        self,
        query: str,
        k: int = 10,
        mode: str | None = None,
        subset: Iterable[int] | None = None,
        where: Mapping[str, Any] | None = None,
    ) -> list[Hit]:
        """The k best passages for a query, best first; fewer when fewer match. `subset`: row numbers to search in.
        `where`: conditions on source and metadata (`retrieve.filters`)."""
        if not query.strip():
            raise UserError("the query is empty; write what to look for")
        if where:
            rows = np.flatnonzero(matching([self.passages], where))
            subset = rows if subset is None else np.intersect1d(rows, np.fromiter(subset, np.int64))
        hits_by_mode = self.rankings([query], k, mode, subset)
        ranks: dict[int, dict[str, int]] = {}
        for name, hits in hits_by_mode.items():
            for rank, row in enumerate(hits.ids_QK[0].tolist(), 1):
                if row >= 0 and name != "fused":
                    ranks.setdefault(row, {})[name] = rank
        best = hits_by_mode[mode or self.modes[-1]]
        return [
            Hit(self.passages[row], float(score), ranks.get(row, {}))
            for row, score in zip(best.ids_QK[0].tolist(), best.scores_QK[0], strict=True)
            if row >= 0
        ]
