"""Curation: sources -> documents -> steps -> held-out split -> tokenizer -> token shards, in one folder.

    FOLDER/documents/{train,heldout}-00000.parquet     the remaining documents, with ids and sources
    FOLDER/tokens/{train,heldout}/                     token shards (data.shards)
    FOLDER/tokenizer.json, tokenizer_config.json
    FOLDER/fitted/                                     what steps learnt from a sample
    FOLDER/signals/                                    embeddings and losses of samples, by fingerprint
    FOLDER/replies/                                    a generator's replies, by request: none is asked for twice
    FOLDER/drops.jsonl                                 every dropped document, the step, the reason
    FOLDER/curation.json                               the statistics; written last: unfinished without it

A run that was stopped resumes: each finished task has left a marker in FOLDER/.work.
"""

from __future__ import annotations

import contextlib
import errno
import json
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from modicum.budget.machine import cores
from modicum.core import registry
from modicum.core.choice import Choice
from modicum.core.errors import CorruptError, UserError
from modicum.core.events import Events
from modicum.core.files import atomic_file, fingerprint, read_json, write_json
from modicum.data import engines, pipeline
from modicum.data.document import Document, read_documents
from modicum.data.engines.worker import no_space
from modicum.data.readers import DAMAGE, ReadConfig, Unit, default_label, find
from modicum.data.rewriting import NO_REPLY
from modicum.data.shards import TokenShards
from modicum.data.signals import Maker
from modicum.data.stages import Run, group_bytes
from modicum.data.tokenizer import Tokenizer

STEPS = ("normalise", "python-split", "quality", "exact-dedup", "minhash")
KEPT = ("signals", "replies")  # by what was asked: another curation of the same texts uses them again
OURS = (
    "documents",
    "tokens",
    "fitted",
    "tokenizer.json",
    "tokenizer_config.json",
    "drops.jsonl",
    "curation.json",
)
VERSION = 1  # of the output format; a new one makes old folders be curated again


@dataclass(frozen=True, kw_only=True)
class CurateConfig:
    """steps: choices of the port `step`. tokenizer: a folder whose tokenizer is used unchanged (continued
    pretraining); else one of vocab_size is trained on about tokenizer_bytes of text, whose last `reserved`
    tokens stay free for objectives that need special tokens. heldout: fraction of the bytes held out from
    training, at most heldout_bytes. signals: who makes embeddings, losses and text, for steps that need them."""

    steps: Sequence[Any] = STEPS
    vocab_size: int = 8192
    reserved: int = 0
    tokenizer: str | None = None
    tokenizer_bytes: int = 8 << 20
    heldout: float = 0.02
    heldout_bytes: int = 8 << 20
    read: ReadConfig = field(default_factory=ReadConfig)
    signals: Mapping[str, Maker] = field(default_factory=dict)
    seed: int = 0
    group_bytes: int | None = None  # text per task; None: by the size of the corpus


@dataclass(frozen=True)
class Curation:
    """A finished curated folder and its statistics."""

    folder: Path
    stats: dict[str, Any]

    @classmethod
    def load(cls, folder: str | Path) -> Curation:
        """Raises UserError if the folder is not a curated one, or is unfinished."""
        path = Path(folder) / "curation.json"
        if not path.is_file():
            state = "is unfinished" if (Path(folder) / ".work").is_dir() else "is not a curated folder"
            raise UserError(f"{folder} {state} (it has no curation.json); type: modicum curate SOURCE --out {folder}")
        try:
            return cls(Path(folder), read_json(path))
        except ValueError as error:
            raise CorruptError(f"{path} is damaged ({error}); delete it and curate again") from None

    @property
    def domains(self) -> list[str]:
        return sorted(self.stats["splits"]["train"]["domains"])

    @property
    def drops(self) -> dict[str, dict[str, int]]:
        """step -> reason -> documents."""
        return {b["step"]: b["drops"] for b in self.stats["steps"] if b["drops"]}

    @property
    def damaged(self) -> list[str]:
        """A line for each file or record that could not be read, naming it and why; the rest was curated."""
        return [
            f"{line['id']}: {line['reason']}" + (f" ({line['detail']})" if line["detail"] else "")
            for line in dropped(self.folder)
            if line["step"] == "read" and line["reason"] in DAMAGE
        ]

    @property
    def unanswered(self) -> list[str]:
        """A line for each document that the generator failed on, naming it and why; the rest was rewritten."""
        if not any(NO_REPLY in reasons for reasons in self.drops.values()):
            return []
        return [f"{line['id']}: {line['detail']}" for line in dropped(self.folder) if line["reason"] == NO_REPLY]

    def examples(self, most: int = 10) -> dict[str, list[dict[str, str]]]:
        """The first `most` dropped documents of each step and reason, by "step: reason"."""
        chosen: dict[str, list[dict[str, str]]] = {}
        for line in dropped(self.folder):
            lines = chosen.setdefault(f"{line['step']}: {line['reason']}", [])
            if len(lines) < most:
                lines.append({"id": line["id"], "detail": line["detail"]})
        return chosen

    def count(self, what: str, split: str = "train") -> int:
        """ "documents", "bytes" of text, or "tokens" (stored) of a split."""
        return int(self.stats["splits"][split][what])

    def shards(self, split: str = "train") -> TokenShards:
        return TokenShards(self.folder / "tokens" / split)

    def tokenizer(self) -> Tokenizer:
        return Tokenizer.load(self.folder)

    def documents(self, split: str = "train", domain: str | None = None) -> Iterator[Document]:
        return read_documents(self.folder, split, domain)


def dropped(folder: str | Path) -> Iterator[dict[str, str]]:
    """The lines of drops.jsonl: id, step, reason, detail."""
    with open(Path(folder) / "drops.jsonl", encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)


def curate(
    sources: str | Sequence[str],
    folder: str | Path,
    config: CurateConfig | None = None,
    *,
    events: Events | None = None,
    engine: str = "local",
    processes: int | None = None,
) -> Curation:
    """Curate `sources` (a folder, a file, `python`, `hub:NAME`, or several) into `folder`.

    The output depends on sources and config alone, not on engine or processes. A folder that contains the
    same curation already is returned at once; one with another is replaced. Raises UserError for sources
    that cannot be read or leave no document, and for a folder with files of another origin.
    """
    config, events, folder = config or CurateConfig(), events or Events(), Path(folder)
    sources = [sources] if isinstance(sources, str) else list(sources)
    choices = [Choice.parse("step", step) for step in config.steps]
    given_tokenizer = None if config.tokenizer is None else Tokenizer.load(config.tokenizer)
    if given_tokenizer is not None and config.reserved:
        raise UserError(
            f"reserved={config.reserved} is for a tokenizer that is trained; {config.tokenizer} is taken "
            "unchanged: leave out one of the two"
        )
    if not 0 <= config.heldout < 1:
        raise UserError(f"heldout={config.heldout} must be a fraction, at least 0 and below 1")
    units = _find_all(sources, config.read, folder)
    name = fingerprint(
        {
            "version": VERSION,
            "steps": [choice.resolved() for choice in choices],
            "units": [[u.id, u.kind, u.stamp] for u in units],
            "read": asdict(config.read),
            "heldout": [config.heldout, config.heldout_bytes],
            "tokenizer": given_tokenizer.fingerprint
            if given_tokenizer
            else [config.vocab_size, config.tokenizer_bytes],
            "seed": config.seed,
        }
        | ({"reserved": config.reserved} if config.reserved else {})
        | ({"signals": {n: asdict(maker) for n, maker in config.signals.items()}} if config.signals else {})
        | ({"fitted_on": files} if (files := beside(choices, config.read)) else {})
    )
    if (folder / "curation.json").is_file():
        done = Curation.load(folder)
        if done.stats.get("fingerprint") == name and not done.unanswered:
            shutil.rmtree(folder / ".work", ignore_errors=True)
            return done
    # A missing engine is refused before anything is touched.
    with engines.make(engine, cores() if processes is None else processes) as machine:
        try:
            with _claim(folder, name) as work:
                run = Run(
                    units,
                    folder,
                    work,
                    config,
                    choices=choices,
                    given_tokenizer=given_tokenizer,
                    events=events,
                    machine=machine,
                    sources=sources,
                )
                stats = run.all() | {"version": VERSION, "fingerprint": name}
                write_json(folder / "curation.json", stats)
                shutil.rmtree(work, ignore_errors=True)
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise UserError(no_space(error)) from None
            if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
                raise UserError(f"cannot write to {folder}: {error.strerror}; give another folder") from None
            raise
    for step_stats in stats["steps"]:
        events.emit("step", **step_stats)
    events.emit("curated", **stats["splits"]["train"] | {"seconds": stats["seconds"]})
    return Curation(folder, stats)


def drawing(sources: Sequence[str], config: CurateConfig) -> str:
    """Sources and steps as a drawing, with the files, bytes and passes there would be; no document is read."""
    from modicum.budget.units import bytes_text

    choices = [Choice.parse("step", step) for step in config.steps]
    units = _find_all(list(sources), config.read, Path("/nonexistent"))
    lines = []
    for source in sources:
        label = default_label(source)
        own = [u for u in units if u.id == label or u.id.startswith((f"{label}/", f"{label}#"))]
        kinds = Counter(u.kind for u in own)
        what = ", ".join(f"{n} {kind}" for kind, n in kinds.most_common())
        lines.append(f"{source}: {len(own)} files ({what}), {bytes_text(sum(u.nbytes for u in own))}")
    groups = len(pipeline.group_units(units, group_bytes(sum(u.nbytes for u in units), config.group_bytes)))
    lines.append(f"  | {groups} groups of files")
    for number, one in enumerate(pipeline.passes(choices)):
        steps = (["read"] if number == 0 else []) + [str(c) for c in one.line]
        for k in one.fitted:
            step = registry.build("step", one.steps[k])
            what = f"{step.sample} documents" if step.sample > 1 else "its targets"
            lines.append(f"  | {one.steps[k].method} is fitted on {what}")
        if steps:
            lines.append(f"  v {' -> '.join(steps)}")
        if one.corpus:
            lines.append(f"  v {one.corpus}, over all documents at once")
    end = "given tokenizer" if config.tokenizer else f"tokenizer of {config.vocab_size}"
    return "\n".join([*lines, f"  v {config.heldout:.0%} held out -> {end} -> token shards"])


def _find_all(sources: Sequence[str], config: ReadConfig, folder: Path) -> list[Unit]:
    if not sources:
        raise UserError("no source given; give a folder, a file, `python` or hub:NAME")
    units: list[Unit] = []
    taken: set[str] = set()
    for source in sources:
        is_path = source != "python" and not source.startswith("hub:")
        if is_path and Path(source).resolve() == folder.resolve():
            raise UserError(f"--out {folder} is the source itself; give another folder")
        label, n = default_label(source), 1
        while label in taken:
            n += 1
            label = f"{default_label(source)}-{n}"
        taken.add(label)
        units += find(source, config, label=label, exclude=[folder])
    return units


def beside(choices: Sequence[Choice], config: ReadConfig) -> list[list[str]]:
    """Names and stamps of the files that steps are fitted on beside the corpus. Raises `UserError` if one is
    missing."""
    sources = [source for choice in choices for source in registry.build("step", choice).sources()]
    return [[u.id, u.kind, u.stamp] for source in sources for u in find(source, replace(config, limit_bytes=None))]


@contextlib.contextmanager
def _claim(folder: Path, name: str) -> Iterator[Path]:
    """The work folder: that of a stopped run of the same curation, or an empty one."""
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
            raise UserError(f"another process is curating into {folder}; wait for it, or give another folder") from None
        marker = work / "fingerprint"
        if not marker.is_file() or marker.read_text() != name:
            for path in [folder / n for n in OURS] + [p for p in work.iterdir() if p.name != "lock"]:
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
            with atomic_file(marker, "w") as file:
                file.write(name)
        (folder / "curation.json").unlink(missing_ok=True)
        for subfolder in (work, *(folder / n for n in (*OURS[:3], *KEPT))):
            for stale in subfolder.rglob(".*.part"):  # of a run that was killed while it wrote
                stale.unlink()
        yield work
