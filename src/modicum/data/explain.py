"""Why a document was kept or dropped: what every step of a curation decided, from its folder alone."""

from __future__ import annotations

import difflib
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from modicum.core.errors import UserError
from modicum.data.curate import Curation, dropped
from modicum.data.document import Document, document_files, read_parquet
from modicum.data.pipeline import ready
from modicum.data.steps import Context

NEAR = 3  # ids that an unknown one is answered with


@dataclass(frozen=True)
class Decision:
    """What one step did with a document: passed, kept with a score, or dropped."""

    step: str
    decision: str
    reason: str = ""
    detail: str = ""


@dataclass(frozen=True)
class Verdict:
    """The way of one document through all steps. split: train or heldout, "" for one that was dropped."""

    id: str
    split: str
    domain: str = ""
    source: str = ""
    meta: dict[str, Any] = field(default_factory=dict)
    decisions: list[Decision] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def explain(folder: str | Path, document_id: str) -> list[Verdict]:
    """Verdicts on a document and on the parts that were made of it (`ID#...`).

    Raises `UserError` for an id that the curation has not seen, with the nearest ones.
    """
    curation = Curation.load(folder)
    verdicts = [_dropped(curation, line) for line in dropped(folder) if _is_of(line["id"], document_id)]
    for split in ("train", "heldout"):
        for document in _kept(curation.folder, split, document_id):
            verdicts.append(_passed(curation, document, split))
    if not verdicts:
        near = difflib.get_close_matches(document_id, _ids(curation.folder), n=NEAR, cutoff=0.3)
        raise UserError(
            f"{folder} has no document {document_id!r}; ids stand in documents/*.parquet and drops.jsonl"
            + (f", such as {', '.join(near)}" if near else "")
        )
    return verdicts


def _is_of(name: str, document_id: str) -> bool:
    return name == document_id or name.startswith(f"{document_id}#")


def _steps(curation: Curation) -> list[str]:
    return [step["step"] for step in curation.stats["steps"]]


def _dropped(curation: Curation, line: dict[str, str]) -> Verdict:
    decisions = []
    for step in _steps(curation):
        if step == line["step"]:
            decisions.append(Decision(step, "dropped", line["reason"], line["detail"]))
            break
        decisions.append(Decision(step, "passed"))
    return Verdict(line["id"], "", decisions=decisions)


def _passed(curation: Curation, document: Document, split: str) -> Verdict:
    scores = _scores(curation, document)
    decisions = [Decision(step, "passed", detail=scores.get(step, "")) for step in _steps(curation)]
    return Verdict(document.id, split, document.domain, document.source, document.meta, decisions)


def _scores(curation: Curation, document: Document) -> dict[str, str]:
    """Scores of steps that select by one, of the text as it is kept; of those that need no model beside it."""
    scores = {}
    for given in curation.stats.get("choices", ()):
        choice = {name: value for name, value in given.items() if name != "fitted"}
        if "fitted" in given:
            try:
                step: Any = ready(choice, Context(), curation.folder / given["fitted"])
                if hasattr(step, "scores"):
                    scores[choice["method"]] = f"score {float(step.scores([document.text])[0]):.4g}"
            except UserError:  # the score takes an encoder that is not here
                continue
    return scores


def _kept(folder: Path, split: str, document_id: str) -> list[Document]:
    """Documents with this id, or cut from it; only the ids of other files are read."""
    import pyarrow.parquet as pq

    kept: list[Document] = []
    for path in document_files(folder, split):
        ids = pq.read_table(path, columns=["id"])["id"].to_pylist()
        if any(_is_of(name, document_id) for name in ids):
            kept += [d for d in read_parquet(path) if _is_of(d.id, document_id)]
    return kept


def _ids(folder: Path) -> list[str]:
    import pyarrow.parquet as pq

    ids = [line["id"] for line in dropped(folder)]
    for split in ("train", "heldout"):
        for path in document_files(folder, split):
            ids += pq.read_table(path, columns=["id"])["id"].to_pylist()
    return ids
