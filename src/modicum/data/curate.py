"""Curation: sources -> documents -> steps -> held-out split -> tokenizer -> token shards, in one folder.

    FOLDER/documents/{train,heldout}-00000.parquet     what is left, with ids and sources
    FOLDER/tokens/{train,heldout}/                     token shards (data.shards)
    FOLDER/tokenizer.json, tokenizer_config.json
    FOLDER/drops.jsonl                                 every dropped document, the step, the reason
    FOLDER/curation.json                               the books; written last: without it a folder is unfinished

A run that was stopped goes on by itself: what is finished is found by its marker in FOLDER/.work.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from modicum.core import registry
from modicum.core.choice import Choice
from modicum.core.errors import CorruptError, UserError
from modicum.core.events import Events
from modicum.core.files import atomic_file, fingerprint, read_json, write_json
from modicum.data import engines, pipeline
from modicum.data.document import document_files, read_documents, read_parquet, write_documents
from modicum.data.engines.worker import no_space
from modicum.data.readers import ReadConfig, Unit, default_label, find
from modicum.data.shards import TokenShards, write_manifest, write_part
from modicum.data.split import heldout_rows
from modicum.data.tokenizer import Tokenizer

STEPS = ("normalise", "python-split", "quality", "exact-dedup", "minhash")
OURS = ("documents", "tokens", "tokenizer.json", "tokenizer_config.json", "drops.jsonl", "curation.json")
SPLITS = ("train", "heldout")
VERSION = 1   # of what is written; another one makes old folders be curated again


@dataclass(frozen=True, kw_only=True)
class CurateConfig:
    """steps: choices of the port `step`. tokenizer: a folder whose tokenizer is taken as it is (continued
    pretraining); else one of vocab_size is trained on about tokenizer_bytes of text. heldout: share of the
    bytes no model is trained on, at most heldout_bytes."""

    steps: Sequence[Any] = STEPS
    vocab_size: int = 8192
    tokenizer: str | None = None
    tokenizer_bytes: int = 8 << 20
    heldout: float = 0.02
    heldout_bytes: int = 8 << 20
    read: ReadConfig = field(default_factory=ReadConfig)
    seed: int = 0


@dataclass(frozen=True)
class Curation:
    """A finished curated folder and its books."""

    folder: Path
    books: dict[str, Any]

    @classmethod
    def load(cls, folder: str | Path) -> Curation:
        """Raises UserError if the folder is none or unfinished."""
        path = Path(folder) / "curation.json"
        if not path.is_file():
            state = "is unfinished" if (Path(folder) / ".work").is_dir() else "is not a curated folder"
            raise UserError(f"{folder} {state} (it has no curation.json); "
                            f"type: modicum curate SOURCE --out {folder}")
        try:
            return cls(Path(folder), read_json(path))
        except ValueError as error:
            raise CorruptError(f"{path} is damaged ({error}); delete it and curate again") from None

    @property
    def domains(self) -> list[str]:
        return sorted(self.books["splits"]["train"]["domains"])

    @property
    def drops(self) -> dict[str, dict[str, int]]:
        """step -> reason -> documents."""
        return {b["step"]: b["drops"] for b in self.books["steps"] if b["drops"]}

    def count(self, what: str, split: str = "train") -> int:
        """"documents", "bytes" of text, or "tokens" (stored) of a split."""
        return int(self.books["splits"][split][what])

    def shards(self, split: str = "train") -> TokenShards:
        return TokenShards(self.folder / "tokens" / split)

    def tokenizer(self) -> Tokenizer:
        return Tokenizer.load(self.folder)

    def documents(self, split: str = "train", domain: str | None = None) -> Iterator[Any]:
        return read_documents(self.folder, split, domain)


def curate(sources: str | Sequence[str], folder: str | Path, config: CurateConfig | None = None, *,
           events: Events | None = None, engine: str = "local", processes: int | None = None) -> Curation:
    """Curate `sources` (a folder, a file, `python`, `hub:NAME`, or several) into `folder`.

    The outcome depends on sources and config alone, not on engine or processes. A folder that holds the
    same curation already is returned at once; one with another is replaced. Raises UserError for sources
    that cannot be read or leave nothing, and for a folder with files of another origin.
    """
    config, events, folder = config or CurateConfig(), events or Events(), Path(folder)
    sources = [sources] if isinstance(sources, str) else list(sources)
    processes = processes or len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else processes or 1
    choices = [Choice.parse("step", step) for step in config.steps]
    resolved = [choice.resolved() for choice in choices]
    own = None if config.tokenizer is None else Tokenizer.load(config.tokenizer)
    if not 0 <= config.heldout < 1:
        raise UserError(f"heldout={config.heldout} must be a share, at least 0 and below 1")
    units = _find_all(sources, config.read, folder)
    name = fingerprint({"version": VERSION, "steps": resolved, "units": [[u.id, u.kind, u.stamp] for u in units],
                        "read": asdict(config.read), "heldout": [config.heldout, config.heldout_bytes],
                        "tokenizer": own.fingerprint if own else [config.vocab_size, config.tokenizer_bytes],
                        "seed": config.seed})
    if (folder / "curation.json").is_file():
        done = Curation.load(folder)
        if done.books.get("fingerprint") == name:
            shutil.rmtree(folder / ".work", ignore_errors=True)
            return done
    with engines.make(engine, processes) as machine:   # refuses a missing engine before anything is touched
        try:
            with _claim(folder, name) as work:
                return _Run(units, folder, work, config, choices, own, events, machine, name, sources).all()
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise UserError(no_space(error)) from None
            raise


def _find_all(sources: Sequence[str], config: ReadConfig, folder: Path) -> list[Unit]:
    if not sources:
        raise UserError("no source given; give a folder, a file, `python` or hub:NAME")
    units, taken = [], set()
    for source in sources:
        if source != "python" and not source.startswith("hub:") and Path(source).resolve() == folder.resolve():
            raise UserError(f"--out {folder} is the source itself; give another folder")
        label, n = default_label(source), 1
        while label in taken:
            n += 1
            label = f"{default_label(source)}-{n}"
        taken.add(label)
        units += find(source, config, label=label, exclude=[folder])
    return units


@contextlib.contextmanager
def _claim(folder: Path, name: str) -> Iterator[Path]:
    """The work folder of this curation: that of a stopped run of the same, or an empty one."""
    work = folder / ".work"
    if not work.is_dir() and not (folder / "curation.json").is_file():
        foreign = [n for n in OURS if (folder / n).exists()]
        if foreign:
            raise UserError(f"{folder} holds {foreign[0]}, which no curation wrote; give an empty folder")
    work.mkdir(parents=True, exist_ok=True)
    with open(work / "lock", "w") as lock:
        try:
            import fcntl
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:
            pass
        except BlockingIOError:
            raise UserError(f"another process is curating into {folder}; wait for it, or give another folder") \
                from None
        mark = work / "fingerprint"
        if not mark.is_file() or mark.read_text() != name:
            for path in [folder / n for n in OURS] + [p for p in work.iterdir() if p.name != "lock"]:
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
            with atomic_file(mark, "w") as file:
                file.write(name)
        (folder / "curation.json").unlink(missing_ok=True)
        yield work


class _Run:
    """One curation, stage after stage; each stage finds what an earlier run finished."""

    def __init__(self, units: list[Unit], folder: Path, work: Path, config: CurateConfig, choices: list[Choice],
                 own: Tokenizer | None, events: Events, machine: engines.Engine, name: str,
                 sources: Sequence[str]):
        self.units, self.folder, self.work, self.config, self.choices = units, folder, work, config, choices
        self.own, self.events, self.machine, self.name, self.sources = own, events, machine, name, sources
        self.books: list[pipeline.Book] = []
        self.drop_files: list[Path] = []
        self.start = time.monotonic()

    def all(self) -> Curation:
        total = sum(u.nbytes for u in self.units)
        groups = pipeline.group_units(self.units, min(max(total // 1024, 4 << 20), 256 << 20))
        stems = self._clean(groups, total)
        heldout = self._split(stems)
        tokenizer = self._tokenizer(stems, heldout)
        manifests = self._tokenize(tokenizer)
        return self._finish(tokenizer, manifests)

    def _tasks(self, label: str, function: str, tasks: list[dict[str, Any]], weights: Sequence[float],
               unit: str = "B") -> list[dict[str, Any]]:
        """Results of tasks, those with a marker (`stem`.json) read from it."""
        results: list[dict[str, Any] | None] = [pipeline.finished(Path(t["stem"])) for t in tasks]
        todo = [i for i, result in enumerate(results) if result is None]
        with self.events.progress(label, sum(weights) or None, unit) as progress:
            progress.resume_at(sum(w for w, r in zip(weights, results, strict=True) if r is not None))
            for k, result in self.machine.run(function, [tasks[i] for i in todo]):
                results[todo[k]] = result
                progress.update(weights[todo[k]])
        return [r for r in results if r is not None]

    def _clean(self, groups: list[list[Unit]], total: int) -> list[Path]:
        """Every pass over every group. Gives the last pass's parts."""
        plan = pipeline.passes(self.choices)
        before: list[Path] = []
        decisions: list[Path | None] = []
        weights = [float(sum(u.nbytes for u in g)) for g in groups]
        for number, (line, corpus) in enumerate(plan):
            place = self.work / f"pass-{number}"
            place.mkdir(exist_ok=True)
            stems = [place / f"part-{g:05d}" for g in range(len(groups))]
            tasks = []
            for g, stem in enumerate(stems):
                source = ({"units": [u.as_dict() for u in groups[g]], "read": asdict(self.config.read)}
                          if number == 0 else
                          {"input": str(before[g].resolve()) + ".parquet",
                           "decisions": None if decisions[g] is None else str(decisions[g])})
                tasks.append(source | {"stem": str(stem.resolve()), "seed": self.config.seed,
                                       "steps": [_choice(c) for c in line],
                                       "signature": _choice(corpus) if corpus else None})
            what = ", ".join(["read"] * (number == 0) + [c.method for c in line]
                             + ([f"{corpus.method} signatures"] if corpus else ["gather"] * (not line)))
            results = self._tasks(f"curate: {what}", "modicum.data.pipeline:run_group", tasks, weights)
            books: dict[int, pipeline.Book] = {}
            for result in results:
                for k, book in enumerate(result["books"]):
                    books.setdefault(k, pipeline.Book(book["step"])).add(book)
            self.books += books.values()
            self.drop_files += [s.with_suffix(".drops.jsonl") for s in stems]
            if corpus:
                seconds = sum(r["signature_seconds"] for r in results)
                decisions = list(self._decide(corpus, stems, place, seconds))
            before = stems
        return before

    def _decide(self, choice: Choice, stems: list[Path], place: Path, seconds: float) -> list[Path]:
        """The corpus step's decision over all parts, as one JSON file for each: {row: [reason, detail]}."""
        start = time.perf_counter()
        sizes = pipeline.load_figures(stems, "sizes")
        paths = [place / f"decisions-{g:05d}.json" for g in range(len(stems))]
        rows = [len(pipeline.load_figures([s], "sizes")) for s in stems]
        first = np.cumsum([0, *rows])
        book = pipeline.Book(choice.method, len(sizes), int(sizes.sum()))
        if not all(p.exists() for p in paths):
            step = registry.build("step", choice)
            drops: dict[int, tuple[str, str]] = {}
            if len(sizes):
                signatures = pipeline.load_figures(stems, "signatures", place / "signatures.bin")
                with self.events.progress(f"curate: {choice.method} decides", float(len(sizes)), "documents") as bar:
                    drops = step.decide(signatures, pipeline.Ids(stems))
                    bar.update(len(sizes))
                del signatures
                (place / "signatures.bin").unlink()
            for g, path in enumerate(paths):
                write_json(path, {str(i - int(first[g])): list(drops[i]) for i in sorted(drops)
                                  if first[g] <= i < first[g + 1]})
        for g, path in enumerate(paths):
            ids = None
            lines = []
            for row, (reason, detail) in read_json(path).items():
                ids = ids or pipeline.Ids([stems[g]])
                book.drops[reason] += 1
                book.bytes_out -= int(sizes[int(first[g]) + int(row)])
                lines.append(pipeline.drop_line(ids[int(row)], choice.method, reason, detail))
            with atomic_file(path.with_suffix(".drops.jsonl"), "w") as file:
                file.writelines(lines)
            self.drop_files.append(path.with_suffix(".drops.jsonl"))
        book.documents_out = len(sizes) - sum(book.drops.values())
        book.bytes_out += book.bytes_in
        book.seconds = seconds + time.perf_counter() - start
        self.books.append(book)
        return [p.resolve() for p in paths]

    def _split(self, stems: list[Path]) -> np.ndarray:
        """Write documents/{train,heldout}-*.parquet. Gives which documents are held out."""
        keys, sizes = pipeline.load_figures(stems, "keys"), pipeline.load_figures(stems, "sizes")
        if len(keys) == 0:
            reasons: dict[str, int] = {}
            for book in self.books:
                for reason, n in book.drops.items():
                    reasons[reason] = reasons.get(reason, 0) + n
            why = ", ".join(f"{r} {n}" for r, n in sorted(reasons.items(), key=lambda x: -x[1]))
            shutil.rmtree(self.work, ignore_errors=True)
            with contextlib.suppress(OSError):
                self.folder.rmdir()
            raise UserError(f"nothing is left of {', '.join(self.sources)} to learn from (dropped: {why}); "
                            "give other files, or fewer --steps")
        held = heldout_rows(keys, sizes, self.config.heldout, self.config.heldout_bytes)
        place = self.work / "split"
        place.mkdir(exist_ok=True)
        at, tasks, weights = 0, [], []
        for g, stem in enumerate(stems):
            n = len(pipeline.load_figures([stem], "sizes"))
            tasks.append({"input": str(stem.resolve()) + ".parquet", "part": g, "out": str(self.folder.resolve()),
                          "heldout": np.flatnonzero(held[at:at + n]).tolist(),
                          "stem": str((place / f"part-{g:05d}").resolve())})
            weights.append(float(sizes[at:at + n].sum()))
            at += n
        self._tasks("curate: held-out split", "modicum.data.curate:write_split", tasks, weights)
        return held

    def _tokenizer(self, stems: list[Path], held: np.ndarray) -> Tokenizer:
        if self.own is not None:
            self.own.save(self.folder)
            return self.own
        if (self.folder / "tokenizer_config.json").is_file():   # written second
            return Tokenizer.load(self.folder)
        keys, sizes = pipeline.load_figures(stems, "keys"), pipeline.load_figures(stems, "sizes")
        chosen = np.zeros(len(keys), bool)
        order = np.argsort(keys, kind="stable")[::-1]   # from the other end than the held-out documents
        order = order[~held[order]]
        chosen[order[:1 + int(np.searchsorted(np.cumsum(sizes[order]), self.config.tokenizer_bytes))]] = True

        def texts() -> Iterator[str]:
            at = 0
            left = self.config.tokenizer_bytes
            with self.events.progress("curate: tokenizer", float(min(left, int(sizes[chosen].sum()))), "B") as bar:
                for stem in stems:
                    if stem.with_suffix(".parquet").exists():
                        for document in read_parquet(stem.with_suffix(".parquet")):
                            if chosen[at] and left > 0:
                                text = document.text[:left]
                                left -= len(text)
                                yield text
                                bar.update(len(text))
                            at += 1

        tokenizer = Tokenizer.train(texts(), self.config.vocab_size)
        tokenizer.save(self.folder)
        return tokenizer

    def _tokenize(self, tokenizer: Tokenizer) -> dict[str, dict[str, Any]]:
        manifests = {}
        for split in SPLITS:
            place = self.work / f"tokens-{split}"
            place.mkdir(exist_ok=True)
            files = document_files(self.folder, split)
            tasks = [{"input": str(f.resolve()), "part": int(f.stem.split("-")[1]),
                      "out": str((self.folder / "tokens" / split).resolve()),
                      "tokenizer": str(self.folder.resolve()),
                      "stem": str((place / f.stem).resolve())} for f in files]
            entries = self._tasks(f"curate: tokens, {split}", "modicum.data.curate:tokenize_part", tasks,
                                  [float(f.stat().st_size) for f in files], "B (packed)")
            manifests[split] = write_manifest(self.folder / "tokens" / split, [e["domains"] for e in entries],
                                              tokenizer)
        return manifests

    def _finish(self, tokenizer: Tokenizer, manifests: dict[str, dict[str, Any]]) -> Curation:
        with atomic_file(self.folder / "drops.jsonl") as out:
            for path in self.drop_files:
                if path.exists():
                    with open(path, "rb") as file:
                        shutil.copyfileobj(file, out)
        splits = {}
        for split, manifest in manifests.items():
            domains = {d: {k: v for k, v in e.items() if k != "shards"} for d, e in manifest["domains"].items()}
            splits[split] = {k: sum(d[k] for d in domains.values()) for k in ("documents", "bytes", "tokens")}
            splits[split]["domains"] = domains  # type: ignore[assignment]
        books = {"version": VERSION, "fingerprint": self.name, "sources": list(self.sources),
                 "steps": [b.as_dict() for b in self.books], "splits": splits,
                 "heldout": {"by": "hash of document id", "share": self.config.heldout,
                             "most_bytes": self.config.heldout_bytes},
                 "tokenizer": {"fingerprint": tokenizer.fingerprint, "vocab_size": tokenizer.vocab_size,
                               "trained": self.own is None},
                 "seconds": round(time.monotonic() - self.start, 3)}
        write_json(self.folder / "curation.json", books)
        for book in books["steps"]:  # type: ignore[attr-defined]
            self.events.emit("step", **book)
        self.events.emit("curated", **splits["train"] | {"seconds": books["seconds"]})
        shutil.rmtree(self.work, ignore_errors=True)
        return Curation(self.folder, read_json(self.folder / "curation.json"))


def _choice(choice: Choice) -> dict[str, Any]:
    return {"method": choice.method} | choice.knobs


def write_split(task: dict[str, Any]) -> dict[str, Any]:
    """One part's documents, by split. A file is absent where a split has none of them."""
    held = set(task["heldout"])
    counts = {}
    for split in SPLITS:
        chosen = (document for row, document in enumerate(pipeline.undecided(task["input"], None))
                  if (row in held) == (split == "heldout"))
        path = Path(task["out"]) / "documents" / f"{split}-{task['part']:05d}.parquet"
        path.parent.mkdir(exist_ok=True)
        counts[split] = write_documents(path, chosen)
    write_json(f"{task['stem']}.json", counts)
    return counts


def tokenize_part(task: dict[str, Any]) -> dict[str, Any]:
    """One file of documents as token shards."""
    entries = write_part(task["out"], task["part"], read_parquet(task["input"]), Tokenizer.load(task["tokenizer"]))
    result = {"domains": entries}
    write_json(f"{task['stem']}.json", result)
    return result
