"""What a study of small trainings is about: its settings, its corpus, and its result as a table."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from modicum.budget.units import Bytes, Parameters
from modicum.core.choice import Choice
from modicum.core.errors import UserError
from modicum.core.spec import option
from modicum.laws.experiments import Conclusion, Run
from modicum.train.config import TrainConfig

if TYPE_CHECKING:
    from modicum.data.curate import Curation
    from modicum.data.document import Document
    from modicum.data.shards import Documents
    from modicum.data.tokenizer import Tokenizer

COMPARED = 64  # documents of each domain and of the target between which distances are measured


@dataclass(frozen=True, kw_only=True, init=False)
class StudySpec(TrainConfig):
    """The run of every trial, and what is measured. `tokens` is the length of a trial of length 1."""

    parameters: Parameters | None = option(None, "Size of the proxy, e.g. 500k (500k by default).")
    model: str | None = option(None, "Trials go on from this model folder, name or hub id instead.")
    target: tuple[str, ...] | None = option(None, "Domains whose mean loss counts (default: all).")
    pool: tuple[str, ...] | None = option(None, "Domains that are trained on (default: all).")
    heldout_bytes: Bytes = option(60_000.0, "Held-out text of each domain that is scored.")

    def check(self) -> None:
        super().check()
        if self.parameters is not None and self.model is not None:
            raise UserError("a given model has its own size: give parameters or model, not both")


@dataclass(frozen=True)
class Corpus:
    """What trials train and are scored on. columns: by name and domain, a number for each document, NaN where unknown;
    texts: of each domain, for distances."""

    documents: Documents
    tokenizer: Tokenizer
    heldout: Sequence[Document]
    bytes_per_token: float
    columns: Mapping[str, Mapping[str, np.ndarray]] = field(default_factory=dict)
    texts: Mapping[str, Sequence[str]] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        curation: Curation,
        columns: Sequence[str] = (),
        compares: bool = False,
        others: Mapping[str, Curation] | None = None,
    ) -> Corpus:
        """others: corpora by a name of their own, whose held-out text is scored as a group of that name."""
        shards = curation.shards("train")
        by_column: dict[str, dict[str, np.ndarray]] = {c: {} for c in columns}
        texts: dict[str, list[str]] = {}
        for domain in shards.domains if columns or compares else ():
            values: dict[str, list[float]] = {c: [] for c in columns}
            for document in curation.documents("train", domain):
                for c in columns:
                    values[c].append(number(document, c))
                if compares and len(texts.setdefault(domain, [])) < COMPARED:
                    texts[domain].append(document.text)
            for c in columns:
                by_column[c][domain] = np.array(values[c])
        return cls(
            shards,
            curation.tokenizer(),
            [
                *curation.documents("heldout"),
                *(replace(d, domain=name) for name, one in (others or {}).items() for d in one.documents("heldout")),
            ],
            curation.count("bytes") / max(curation.count("tokens"), 1),
            by_column,
            texts,
        )


def number(document: Document, column: str) -> float:
    """A number of the document's metadata; `year` is that of its date, with the month as a fraction. NaN: unknown."""
    value = document.meta.get(column)
    if column == "year" and value is None:
        match = re.match(r"(\d{4})(?:-(\d\d))?", str(document.meta.get("date", "")))
        return (
            int(match[1]) + (int(match[2]) - 1) / 12 if match and match[2] else float(match[1]) if match else math.nan
        )
    return float(value) if isinstance(value, int | float) else math.nan


def summary(choice: Choice, conclusion: Conclusion, runs: Sequence[Run]) -> dict[str, Any]:
    """The study as JSON: what `study.json` holds."""
    trained = [r for r in runs if not r.trial.merge]
    return {
        "experiment": choice.resolved(),
        **asdict(conclusion),
        "mixture": None if conclusion.weights is None else f"fixed:weights={_yaml(conclusion.weights)}",
        "trials": len(trained),
        "merges": len(runs) - len(trained),
        "tokens": sum(r.tokens for r in trained),
        "seconds": sum(r.seconds for r in runs),
    }


def _yaml(weights: Mapping[str, float]) -> str:
    return "{" + ", ".join(f"{d}: {w:.4g}" for d, w in weights.items()) + "}"


def table_text(made: Mapping[str, Any]) -> str:
    """The study's table, notes and mixture, to read."""
    rows: list[dict[str, Any]] = made["rows"]
    names = list(dict.fromkeys(n for r in rows for n in r if not n.endswith("_interval")))

    def cell(row: Mapping[str, Any], name: str) -> str:
        value = row.get(name)
        if not isinstance(value, float):
            return "–" if value is None else str(value)
        half = row.get(f"{name}_interval")
        return f"{value:.4f}" if half is None else f"{value:+.4f} ± {half:.4f}"

    cells = [names, *([cell(r, n) for n in names] for r in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(names))]
    lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in cells]
    if made["predicted"] is not None:
        between = f" ({made['low']:.4f} to {made['high']:.4f})" if made["low"] is not None else ""
        lines.append(f"predicted loss {made['predicted']:.4f}{between} bits per byte")
    lines += [f"mixture {made['mixture']}"] if made["mixture"] else []
    return "\n".join([*lines, *made["notes"]])
