"""An index that takes additions, updates and removals while it is searched, and loses nothing that was committed.

    FOLDER/live.json          generation, segments in order, removed rows of each
           segments/NAME/     folders of `search.build_index`, never changed once they are there
           .writer.lock       held while something is written

A change writes a new segment, then replaces live.json by renaming: that is the commit. Killed before it, the folder is
as it was; after it, the change is there. What no live.json names is removed by the next writer. An update is an
addition that removes the old row of its id in the same commit. `compact` builds one segment of what is left and
commits that. Readers look at live.json before a search and open what is new; segments that a compaction removes stay
readable for those who have them open.

A folder of `build_index` becomes one with `Live.adopt`. An encoder's statistics are those of the first segment, so
that vectors of all segments compare. BM25's statistics belong to all passages: they are counted again after a change,
in memory, when the next search needs them.
"""

from __future__ import annotations

import contextlib
import copy
import os
import shutil
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from modicum.core.errors import CorruptError, UserError
from modicum.core.files import read_json, sync_directory, write_json
from modicum.retrieve import fusion
from modicum.retrieve.bm25 import BM25
from modicum.retrieve.encoders import Encoder, load_encoder, make_encoder
from modicum.retrieve.filters import matching
from modicum.retrieve.indexes import Hits
from modicum.retrieve.passages import Passage, indexed_text
from modicum.retrieve.search import MODES, Hit, Searcher, build_index

FORMAT = 1
HEADER, SEGMENTS = "live.json", "segments"


def open_searcher(
    folder: str | Path, *, device: str = "cpu", model: str | None = None, check: bool = False
) -> Searcher | Live:
    """Whichever index is in `folder`; see `Searcher` for the options, which a live one does not have."""
    if (Path(folder) / HEADER).is_file():
        return Live(folder, device=device)
    return Searcher(folder, device=device, model=model, check=check)


class Live:
    """`Live.create(folder, encoder=...)` or `Live(folder)`; any number of readers and one writer at a time."""

    def __init__(self, folder: str | Path, *, device: str = "cpu"):
        self.folder, self.device = Path(folder), device
        if not (self.folder / HEADER).is_file():
            raise UserError(f"{folder} is no live index (it has no {HEADER}); make one with: modicum index --live")
        self._lock = threading.RLock()
        self._generation = -1
        self.header: dict[str, Any] = {"first": None, "segments": []}
        self._searchers: dict[str, Searcher] = {}
        self._encoder: Encoder | None = None
        self._lexicon: tuple[BM25, np.ndarray] | None = None
        self.refresh()

    # reading ------------------------------------------------------------------------------------------------------

    @classmethod
    def create(
        cls, folder: str | Path, *, encoder: str | None = None, index: str = "exact", device: str = "cpu"
    ) -> Live:
        """An empty one. Raises `UserError` if something is there."""
        folder = Path(folder)
        if folder.exists() and any(folder.iterdir()):
            raise UserError(f"{folder} is not empty; choose another folder, or open the index in it")
        if encoder is not None:
            make_encoder(encoder, device=device)  # a wrong one is refused before anything is written
        (folder / SEGMENTS).mkdir(parents=True)
        write_json(folder / HEADER, _header(0, [], {}, {"encoder": encoder, "index": index}))
        return cls(folder, device=device)

    @classmethod
    def adopt(cls, folder: str | Path, *, device: str = "cpu") -> Live:
        """Turn a folder of `build_index` into a live one with that as its first segment; a live one is opened."""
        folder = Path(folder)
        if (folder / HEADER).is_file():
            return cls(folder, device=device)
        built = Searcher(folder)
        first = folder / SEGMENTS / "000001"
        shutil.rmtree(folder / SEGMENTS, ignore_errors=True)  # of an interrupted attempt
        first.parent.mkdir()
        names = sorted({Path(name).parts[0] for name in built.manifest["files"]} | {"manifest.json"})
        for name in names:  # links, so that the folder is whole at any moment
            part = folder / name
            if part.is_dir():
                shutil.copytree(part, first / name, copy_function=os.link)
            else:
                first.mkdir(exist_ok=True)
                os.link(part, first / name)
        sync_directory(first.parent)
        settings = {"encoder": built.manifest["encoder"], "index": built.manifest["index"]}
        write_json(folder / HEADER, _header(1, ["000001"], {}, settings))
        for name in names:
            shutil.rmtree(folder / name) if (folder / name).is_dir() else (folder / name).unlink()
        return cls(folder, device=device)

    def refresh(self) -> None:
        """Open what was committed since; called by every search."""
        with self._lock:
            for attempt in range(20):  # a compaction may remove a segment between the two reads
                header = read_json(self.folder / HEADER)
                if header.get("format") != FORMAT:
                    raise CorruptError(
                        f"{self.folder / HEADER} has format {header.get('format')!r}; this reads {FORMAT}"
                    )
                if header["generation"] == self._generation:
                    return
                try:
                    for name in header["segments"]:
                        if name not in self._searchers:
                            self._searchers[name] = Searcher(self.folder / SEGMENTS / name, device=self.device)
                    break
                except (UserError, CorruptError, OSError):
                    if attempt == 19:
                        raise
            self._searchers = {name: self._searchers[name] for name in header["segments"]}
            if header["first"] != self.header["first"]:
                self._encoder = None
            self.header, self._generation, self._lexicon = header, header["generation"], None
            sizes = [len(s) for s in self._searchers.values()]
            self._starts = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
            self._alive_N = np.ones(int(self._starts[-1]), bool)
            for start, name in zip(self._starts, header["segments"], strict=False):
                self._alive_N[start + np.array(header["removed"].get(name, []), np.int64)] = False

    def __len__(self) -> int:
        return int(self._alive_N.sum())

    @property
    def modes(self) -> tuple[str, ...]:
        return MODES if self.header["settings"]["encoder"] is not None else ("bm25",)

    def passages(self) -> Iterator[Passage]:
        """Those that are there, oldest first."""
        with self._lock:
            segments, alive_N, starts = list(self._searchers.values()), self._alive_N, self._starts
        for start, segment in zip(starts, segments, strict=False):
            for row, passage in enumerate(segment.passages):
                if alive_N[start + row]:
                    yield passage

    def _passage(self, row: int) -> Passage:
        segment = int(np.searchsorted(self._starts, row, side="right")) - 1
        passage: Passage = list(self._searchers.values())[segment].passages[row - int(self._starts[segment])]
        return passage

    def rank(
        self, queries: Sequence[str], k: int, mode: str | None = None, where: Mapping[str, Any] | None = None
    ) -> dict[str, Hits]:
        """Rows over all segments, by mode: the one asked for and those it is fused from."""
        mode = mode or self.modes[-1]
        if mode not in self.modes:
            raise UserError(f"{self.folder} cannot be searched by {mode!r}; it has {', '.join(self.modes)}")
        if k < 1:
            raise UserError(f"k={k} is not a number of results; ask for 1 or more")
        depth = max(100, 4 * k) if mode == "fused" else k
        may_N = self._alive_N
        if where and self._searchers:
            may_N = may_N & matching([s.passages for s in self._searchers.values()], where)
        result: dict[str, Hits] = {}
        if mode != "dense":
            result["bm25"] = self._lexical(queries, depth, may_N)
        if mode != "bm25":
            result["dense"] = self._dense(queries, depth, may_N)
        if mode == "fused":
            result["fused"] = fusion.fuse([result["bm25"], result["dense"]], k)
        return result

    def _lexical(self, queries: Sequence[str], k: int, may_N: np.ndarray) -> Hits:
        if self._lexicon is None:
            self._lexicon = BM25.build(map(indexed_text, self.passages())), np.flatnonzero(self._alive_N)
        model, rows_A = self._lexicon
        hits = model.search(list(queries), k, None if may_N is self._alive_N else np.flatnonzero(may_N[rows_A]))
        return Hits(np.where(hits.ids_QK >= 0, rows_A[hits.ids_QK], -1), hits.scores_QK) if len(rows_A) else hits

    def _dense(self, queries: Sequence[str], k: int, may_N: np.ndarray) -> Hits:
        ids, scores = [np.full((len(queries), k), -1, np.int64)], [np.full((len(queries), k), -np.inf, np.float32)]
        vectors_QD = self.encoder.encode_queries(queries) if len(self) else None
        for start, segment in zip(self._starts, self._searchers.values(), strict=False):
            rows = np.flatnonzero(may_N[start : start + len(segment)])
            if len(rows) and segment.dense is not None and vectors_QD is not None:
                hits = segment.dense.search(vectors_QD, k, None if len(rows) == len(segment) else rows)
                ids.append(np.where(hits.ids_QK >= 0, hits.ids_QK + start, -1))
                scores.append(hits.scores_QK)
        all_ids, all_scores = np.concatenate(ids, 1), np.concatenate(scores, 1)
        order = np.argsort(-all_scores, axis=1, kind="stable")[:, :k]
        return Hits(np.take_along_axis(all_ids, order, 1), np.take_along_axis(all_scores, order, 1))

    @property
    def encoder(self) -> Encoder:
        if self._encoder is None:
            first = self.header["first"]
            if first is None:
                raise UserError(f"{self.folder} has no passages yet; add some")
            self._encoder = load_encoder(self.folder / SEGMENTS / first / "encoder", device=self.device)
        return self._encoder

    def search(
        self, query: str, k: int = 10, mode: str | None = None, *, where: Mapping[str, Any] | None = None
    ) -> list[Hit]:
        """As `Searcher.search`, on what is committed now."""
        if not query.strip():
            raise UserError("the query is empty; write what to look for")
        with self._lock:
            self.refresh()
            by_mode = self.rank([query], k, mode, where)
            best = by_mode[mode or self.modes[-1]]
            ranks: dict[int, dict[str, int]] = {}
            for name, hits in by_mode.items():
                for rank, row in enumerate(hits.ids_QK[0].tolist(), 1):
                    if row >= 0 and name != "fused":
                        ranks.setdefault(row, {})[name] = rank
            return [
                Hit(self._passage(row), float(score), ranks.get(row, {}))
                for row, score in zip(best.ids_QK[0].tolist(), best.scores_QK[0], strict=True)
                if row >= 0
            ]

    # writing ------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """One writer at a time, also of other processes; what an interrupted one left is removed."""
        import fcntl

        with self._lock, open(self.folder / ".writer.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            self.refresh()
            for path in (self.folder / SEGMENTS).iterdir():
                if path.name not in self.header["segments"]:
                    shutil.rmtree(path, ignore_errors=True)
            yield

    def _commit(self, segments: list[str], removed: dict[str, list[int]], settings: dict[str, Any]) -> None:
        write_json(self.folder / HEADER, _header(self._generation + 1, segments, removed, settings))
        self.refresh()

    def _rows_of(self, ids: set[str]) -> dict[str, list[int]]:
        """Rows of these ids that are there, by segment."""
        rows: dict[str, list[int]] = {}
        for start, (name, segment) in zip(self._starts, self._searchers.items(), strict=False):
            for row, id_ in enumerate(segment.passages.ids()):
                if id_ in ids and self._alive_N[start + row]:
                    rows.setdefault(name, []).append(row)
        return rows

    def add(self, passages: Iterable[Passage]) -> int:
        """Add passages; one whose id is there replaces it. All are there when this returns, or none. Returns how
        many. Raises `UserError` for an id that comes twice."""
        with self._writing():
            fresh = list(passages)
            if not fresh:
                return 0
            name = f"{self._generation + 1:06d}"
            settings = self.header["settings"]
            encoder: Any = None
            if settings["encoder"] is not None:
                known = self.header["first"] is not None
                encoder = (
                    _fitted(self.encoder) if known else make_encoder(_choice(settings["encoder"]), device=self.device)
                )
            index = _choice(settings["index"]) or "exact"
            build_index(fresh, self.folder / SEGMENTS / name, encoder=encoder, index=index)
            removed = dict(self.header["removed"])
            for segment, rows in self._rows_of({p.id for p in fresh}).items():
                removed[segment] = sorted({*removed.get(segment, []), *rows})
            self._commit([*self.header["segments"], name], removed, settings)
            return len(fresh)

    def remove(self, ids: Iterable[str]) -> int:
        """Remove passages by their ids; those not there are skipped. Returns how many were removed."""
        with self._writing():
            gone = self._rows_of(set(ids))
            if gone:
                removed = dict(self.header["removed"])
                for segment, rows in gone.items():
                    removed[segment] = sorted({*removed.get(segment, []), *rows})
                self._commit(self.header["segments"], removed, self.header["settings"])
            return sum(map(len, gone.values()))

    def compact(self) -> None:
        """One segment of what is there. Statistics of encoders are counted anew."""
        with self._writing():
            if not self.header["segments"] or (len(self.header["segments"]) == 1 and not self.header["removed"]):
                return
            settings, old = self.header["settings"], self.header["segments"]
            names = []
            if len(self):
                names = [f"{self._generation + 1:06d}"]
                encoder = settings["encoder"]
                made = make_encoder(_choice(encoder), device=self.device) if encoder is not None else None
                index = _choice(settings["index"]) or "exact"
                build_index(self.passages(), self.folder / SEGMENTS / names[0], encoder=made, index=index)
            self._commit(names, {}, settings)
            for name in old:
                shutil.rmtree(self.folder / SEGMENTS / name, ignore_errors=True)


def _fitted(encoder: Encoder) -> Encoder:
    """The encoder with its statistics as they are, whatever it is shown."""
    made: Any = copy.copy(encoder)
    made.count = made.fit = lambda texts: None
    return made


def _choice(value: Any) -> Any:
    """A method and its knobs as a manifest has them, without what describes the model."""
    return {k: v for k, v in value.items() if k != "fingerprint"} if isinstance(value, dict) else value


def _header(
    generation: int, segments: list[str], removed: dict[str, list[int]], settings: dict[str, Any]
) -> dict[str, Any]:
    kept = {name: rows for name, rows in removed.items() if name in segments}
    first = segments[0] if segments else None
    return {
        "format": FORMAT,
        "generation": generation,
        "segments": segments,
        "first": first,
        "removed": kept,
        "settings": settings,
    }
