"""The stages of a curation, one after another; each skips what an earlier run of the same curation finished."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from modicum.core import registry
from modicum.core.choice import Choice
from modicum.core.errors import UserError
from modicum.core.events import Events
from modicum.core.files import atomic_file, read_json, write_json
from modicum.data import engines, pipeline
from modicum.data.document import Document, document_files, read_parquet, write_documents
from modicum.data.readers import Unit
from modicum.data.shards import write_manifest, write_part
from modicum.data.signals import Signals
from modicum.data.split import heldout_rows
from modicum.data.steps import Context
from modicum.data.tokenizer import Tokenizer

if TYPE_CHECKING:
    from modicum.data.curate import CurateConfig

SPLITS = ("train", "heldout")
MIN_GROUP_BYTES, MAX_GROUP_BYTES = 4 << 20, 256 << 20  # bytes; about 1024 groups in between


def group_bytes(total: int, wanted: int | float | None = None) -> int:
    """Bytes of text per task, for a corpus of `total` bytes."""
    return int(wanted or min(max(total // 1024, MIN_GROUP_BYTES), MAX_GROUP_BYTES))


class Run:
    """One curation of `units` into `folder`, with its markers in `work`. given_tokenizer: None to train one."""

    def __init__(
        self,
        units: list[Unit],
        folder: Path,
        work: Path,
        config: CurateConfig,
        *,
        choices: list[Choice],
        given_tokenizer: Tokenizer | None,
        events: Events,
        machine: engines.Engine,
        sources: Sequence[str],
    ):
        self.units, self.folder, self.work, self.config = units, folder, work, config
        self.choices, self.given_tokenizer, self.events = choices, given_tokenizer, events
        self.machine, self.sources = machine, sources
        self.signals = Signals(config.signals, folder / "signals")
        self.stats: list[pipeline.StepStats] = []
        self.drop_files: list[Path] = []
        self.split_bytes: list[dict[str, int]] = []  # text bytes of each part by split
        self.fitted: dict[int, str] = {}  # by the identity of a choice: where what it learnt is
        self.start = time.monotonic()

    def all(self) -> dict[str, Any]:
        """Run every stage; returns the statistics."""
        total = sum(u.nbytes for u in self.units)
        stems = self._clean(pipeline.group_units(self.units, group_bytes(total, self.config.group_bytes)))
        heldout = self._split(stems)
        tokenizer = self._tokenizer(stems, heldout)
        manifests = self._tokenize(tokenizer)
        return self._stats(tokenizer, manifests)

    def _tasks(
        self, label: str, function: str, tasks: list[dict[str, Any]], weights: Sequence[float]
    ) -> list[dict[str, Any]]:
        """Results of tasks, those with a marker (`stem`.json) read from it."""
        results: list[dict[str, Any] | None] = [pipeline.finished(Path(t["stem"])) for t in tasks]
        todo = [i for i, result in enumerate(results) if result is None]
        with self.events.progress(label, sum(weights) or None, "B") as progress:
            progress.resume_at(sum(w for w, r in zip(weights, results, strict=True) if r is not None))
            for k, result in self.machine.run(function, [tasks[i] for i in todo]):
                results[todo[k]] = result
                progress.update(weights[todo[k]])
        return [r for r in results if r is not None]

    def _clean(self, groups: list[list[Unit]]) -> list[Path]:
        """Every pass over every group. Gives the last pass's parts."""
        plan = pipeline.passes(self.choices)
        before: list[Path] = []
        decisions: list[Path | None] = []
        weights = [float(sum(u.nbytes for u in g)) for g in groups]
        for number, one in enumerate(plan):
            if one.fitted:
                self._fit(number, one, before, decisions)
            line, corpus = one.line, one.corpus
            work_folder = self.work / f"pass-{number}"
            work_folder.mkdir(exist_ok=True)
            stems = [work_folder / f"part-{g:05d}" for g in range(len(groups))]
            tasks = []
            for g, stem in enumerate(stems):
                task = one.part(stem) | {"seed": self.config.seed, "signals": self.signals.as_task()}
                task["replies"] = str((self.folder / "replies" / f"{number}-{g:05d}.jsonl").resolve())
                if number == 0:
                    task |= {"units": [u.as_dict() for u in groups[g]], "read": asdict(self.config.read)}
                else:
                    decided = decisions[g]
                    task |= {
                        "input": f"{before[g].resolve()}.parquet",
                        "decisions": str(decided.resolve()) if decided else None,
                    }
                tasks.append(task)
            what = ", ".join(
                ["read"] * (number == 0)
                + [c.method for c in line]
                + ([f"{corpus.method} signatures"] if corpus else ["decisions"] * (not line))
            )
            results = self._tasks(f"curate: {what}", "modicum.data.pipeline:run_group", tasks, weights)
            stats: dict[int, pipeline.StepStats] = {}
            for result in results:
                for k, step_stats in enumerate(result["books"]):
                    stats.setdefault(k, pipeline.StepStats(step_stats["step"])).add(step_stats)
            self.stats += stats.values()
            self.drop_files += [s.with_suffix(".drops.jsonl") for s in stems]
            decisions = [None] * len(groups)
            if corpus:
                seconds = sum(r["signature_seconds"] for r in results)
                decisions = [*self._decide(one, stems, work_folder, seconds)]
            before = stems
        return before

    def _fit(self, number: int, one: pipeline.Pass, before: list[Path], decisions: list[Path | None]) -> None:
        """What the steps of a pass learn from a sample of the documents that reach it: fitted/PASS-KEY.npz."""
        for k in one.fitted:
            choice = one.steps[k]
            path = self.folder / "fitted" / f"{number}-{choice.method}.npz"
            one.arrays[k] = path
            self.fitted[id(choice)] = path.relative_to(self.folder).as_posix()
            if path.is_file():
                continue
            step = registry.build("step", choice)
            step.open(Context(seed=self.config.seed, signals=self.signals))
            with self.events.progress(f"curate: {choice.method} is fitted", None, "documents") as progress:
                sample = pipeline.sample_of(before, decisions, step.sample)
                if not sample:
                    raise UserError(f"no document is left to fit {choice.method} on; give fewer steps before it")
                arrays = step.fit(sample)
                progress.update(len(sample))
            with atomic_file(path) as file:
                np.savez(file, **arrays)

    def _decide(self, one: pipeline.Pass, stems: list[Path], work_folder: Path, seconds: float) -> list[Path]:
        """The corpus step's decision over all parts, as one JSON file for each: {row: [reason, detail]}."""
        choice = one.corpus
        assert choice
        start = time.perf_counter()
        sizes = pipeline.load_columns(stems, "sizes")
        paths = [work_folder / f"decisions-{g:05d}.json" for g in range(len(stems))]
        rows = [len(pipeline.load_columns([s], "sizes")) for s in stems]
        first = np.cumsum([0, *rows])
        step_stats = pipeline.StepStats(choice.method, len(sizes), int(sizes.sum()))
        if not all(p.exists() for p in paths):
            context = Context(seed=self.config.seed, signals=self.signals)
            step: Any = pipeline.ready(choice, context, one.arrays.get(len(one.line)))
            drops: dict[int, tuple[str, str]] = {}
            if len(sizes):
                signatures = pipeline.load_columns(stems, "signatures", work_folder / "signatures.bin")
                label = f"curate: {choice.method} decides"
                with self.events.progress(label, float(len(sizes)), "documents") as progress:
                    drops = step.decide(signatures, pipeline.Ids(stems))
                    progress.done = len(sizes)
                del signatures
                (work_folder / "signatures.bin").unlink()
            for g, path in enumerate(paths):
                write_json(
                    path,
                    {str(i - int(first[g])): list(drops[i]) for i in sorted(drops) if first[g] <= i < first[g + 1]},
                )
        for g, path in enumerate(paths):
            ids = None
            lines = []
            for row, (reason, detail) in read_json(path).items():
                ids = ids or pipeline.Ids([stems[g]])
                step_stats.drops[reason] += 1
                step_stats.bytes_out -= int(sizes[int(first[g]) + int(row)])
                lines.append(pipeline.drop_line(ids[int(row)], choice.method, reason, detail))
            with atomic_file(path.with_suffix(".drops.jsonl"), "w") as file:
                file.writelines(lines)
            self.drop_files.append(path.with_suffix(".drops.jsonl"))
        step_stats.documents_out = len(sizes) - sum(step_stats.drops.values())
        step_stats.bytes_out += step_stats.bytes_in
        step_stats.seconds = seconds + time.perf_counter() - start
        self.stats.append(step_stats)
        return [p.resolve() for p in paths]

    def _split(self, stems: list[Path]) -> np.ndarray:
        """Write documents/{train,heldout}-*.parquet. Gives which documents are held out."""
        keys, sizes = pipeline.load_columns(stems, "keys"), pipeline.load_columns(stems, "sizes")
        if len(keys) == 0:
            reasons = sum((step_stats.drops for step_stats in self.stats), Counter[str]())
            why = ", ".join(f"{reason} {n}" for reason, n in reasons.most_common())
            shutil.rmtree(self.work, ignore_errors=True)
            with contextlib.suppress(OSError):
                self.folder.rmdir()
            raise UserError(
                f"no document of {', '.join(self.sources)} is left to train on (dropped: {why}); "
                "give other files, or fewer --steps"
            )
        heldout_N = heldout_rows(keys, sizes, self.config.heldout, self.config.heldout_bytes)
        work_folder = self.work / "split"
        work_folder.mkdir(exist_ok=True)
        at, tasks, weights = 0, [], []
        for g, stem in enumerate(stems):
            n = len(pipeline.load_columns([stem], "sizes"))
            tasks.append(
                {
                    "input": f"{stem.resolve()}.parquet",
                    "part": g,
                    "out": str(self.folder.resolve()),
                    "heldout": np.flatnonzero(heldout_N[at : at + n]).tolist(),
                    "stem": str((work_folder / f"part-{g:05d}").resolve()),
                }
            )
            weights.append(float(sizes[at : at + n].sum()))
            at += n
        results = self._tasks("curate: held-out split", "modicum.data.stages:write_split", tasks, weights)
        self.split_bytes = [result["bytes"] for result in results]
        return heldout_N

    def _tokenizer(self, stems: list[Path], heldout_N: np.ndarray) -> Tokenizer:
        if self.given_tokenizer is not None:
            self.given_tokenizer.save(self.folder)
            return self.given_tokenizer
        if (self.folder / "tokenizer_config.json").is_file():  # written second
            return Tokenizer.load(self.folder)
        keys, sizes = pipeline.load_columns(stems, "keys"), pipeline.load_columns(stems, "sizes")
        chosen = np.zeros(len(keys), bool)
        order = np.argsort(keys, kind="stable")[::-1]  # from the other end than the held-out documents
        order = order[~heldout_N[order]]
        chosen[order[: 1 + int(np.searchsorted(np.cumsum(sizes[order]), self.config.tokenizer_bytes))]] = True

        remaining = self.config.tokenizer_bytes
        total = float(min(remaining, int(sizes[chosen].sum())))
        with self.events.progress("curate: tokenizer", total, "B") as progress:

            def texts(remaining: int) -> Iterator[str]:
                documents = (d for s in stems for d in pipeline.undecided(f"{s}.parquet", None))
                for document, wanted in zip(documents, chosen, strict=True):
                    if wanted and remaining > 0:
                        text = document.text[:remaining]
                        remaining -= len(text)
                        yield text
                        progress.update(len(text))

            tokenizer = Tokenizer.train(texts(remaining), self.config.vocab_size, self.config.reserved)
        tokenizer.save(self.folder)
        return tokenizer

    def _tokenize(self, tokenizer: Tokenizer) -> dict[str, dict[str, Any]]:
        manifests = {}
        for split in SPLITS:
            work_folder = self.work / f"tokens-{split}"
            work_folder.mkdir(exist_ok=True)
            files = document_files(self.folder, split)
            sizes = [float(self.split_bytes[int(f.stem.split("-")[1])][split]) for f in files]
            tasks = [
                {
                    "input": str(f.resolve()),
                    "part": int(f.stem.split("-")[1]),
                    "out": str((self.folder / "tokens" / split).resolve()),
                    "tokenizer": str(self.folder.resolve()),
                    "stem": str((work_folder / f.stem).resolve()),
                }
                for f in files
            ]
            label = f"curate: tokens, {split}"
            entries = self._tasks(label, "modicum.data.stages:tokenize_part", tasks, sizes)
            manifests[split] = write_manifest(
                self.folder / "tokens" / split, [e["domains"] for e in entries], tokenizer
            )
        return manifests

    def _stats(self, tokenizer: Tokenizer, manifests: dict[str, dict[str, Any]]) -> dict[str, Any]:
        """Gather drops.jsonl; returns the content of curation.json."""
        with atomic_file(self.folder / "drops.jsonl") as out:
            for path in self.drop_files:
                if path.exists():
                    with open(path, "rb") as file:
                        shutil.copyfileobj(file, out)
        splits: dict[str, dict[str, Any]] = {}
        for split, manifest in manifests.items():
            domains = {
                name: {k: v for k, v in entry.items() if k != "shards"} for name, entry in manifest["domains"].items()
            }
            splits[split] = {k: sum(d[k] for d in domains.values()) for k in ("documents", "bytes", "tokens")}
            splits[split]["domains"] = domains
        return {
            "sources": list(self.sources),
            "choices": [
                c.resolved() | ({"fitted": self.fitted[id(c)]} if id(c) in self.fitted else {}) for c in self.choices
            ],
            "steps": [b.as_dict() for b in self.stats],
            "splits": splits,
            "heldout": {
                "by": "hash of document id",
                "share": self.config.heldout,
                "most_bytes": self.config.heldout_bytes,
            },
            "tokenizer": {
                "fingerprint": tokenizer.fingerprint,
                "vocab_size": tokenizer.vocab_size,
                "trained": self.given_tokenizer is None,
            },
            "seconds": round(time.monotonic() - self.start, 3),
        }


def write_split(task: dict[str, Any]) -> dict[str, Any]:
    """One part's documents, by split. A file is absent where a split has none of them."""
    heldout_N = set(task["heldout"])
    sizes = dict.fromkeys(SPLITS, 0)

    def chosen(split: str) -> Iterator[Document]:
        for row, document in enumerate(pipeline.undecided(task["input"], None)):
            if (row in heldout_N) == (split == "heldout"):
                sizes[split] += document.nbytes
                yield document

    for split in SPLITS:
        path = Path(task["out"]) / "documents" / f"{split}-{task['part']:05d}.parquet"
        path.parent.mkdir(exist_ok=True)
        write_documents(path, chosen(split))
    result = {"bytes": sizes}
    write_json(f"{task['stem']}.json", result)
    return result


def tokenize_part(task: dict[str, Any]) -> dict[str, Any]:
    """One file of documents as token shards."""
    tokenizer = Tokenizer.load(task["tokenizer"])
    entries = write_part(task["out"], task["part"], read_parquet(task["input"]), tokenizer)
    result = {"domains": entries}
    write_json(f"{task['stem']}.json", result)
    return result
