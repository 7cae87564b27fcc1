"""Evaluating a search: known items of one's own passages, and collections with judged queries.

Known-item search: the query is the first sentence of a docstring, the wanted document its passage. With the sentence
in the passage ("as_is") an exact match exists; with the sentence removed before indexing ("without_query_text") the
search has to match other words, so the figure is free of leakage.
"""

from __future__ import annotations

import re
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from modicum.core.errors import UserError
from modicum.core.events import Events
from modicum.data.passages import SCALARS
from modicum.retrieve import metrics
from modicum.retrieve.encoders import Encoder
from modicum.retrieve.passages import Passage, Passages
from modicum.retrieve.search import MODES, Searcher, build_index

MIN_WORDS = 3  # a shorter sentence ("Return it.") names no item


def known_item(
    passages: Sequence[Passage] | Passages,
    *,
    encoder: Encoder | str | None = None,
    index: Any = "exact",
    k: int = 10,
    limit: int | None = 1000,
    seed: int = 0,
    folder: str | Path | None = None,
    device: str = "cpu",
    variants: Sequence[str] = ("as_is", "without_query_text"),
    as_is: Searcher | None = None,
    examples: int = 5,
    events: Events | None = None,
) -> dict[str, Any]:
    """{variant: {mode: {"mrr@10": {"mean", "error"}, "recall@1", ...}}} with "queries", "passages", "examples".

    At most `limit` queries, drawn with `seed`; "ambiguous" counts the sentences that `known_items` leaves out. The
    indexes are built under `folder` (kept there: a second call with the same input is then quick to resume)
    or a temporary one. `as_is`: an index of the same passages that exists already, to save building it.
    """
    for name in variants:
        if name not in ("as_is", "without_query_text"):
            raise UserError(f"variant {name!r} is not as_is or without_query_text")
    queries, wanted, left_out = known_items(passages, limit, seed)
    relevant = [{row: 1.0} for row in wanted]
    result: dict[str, Any] = {"passages": len(passages), "queries": len(queries), "ambiguous": left_out, "k": k}
    with tempfile.TemporaryDirectory() as temporary:
        for variant in variants:
            if variant == "as_is" and as_is is not None:
                searcher = as_is
                if len(as_is) != len(passages) or as_is.manifest["without_query_text"]:
                    raise UserError(f"{as_is.folder} does not index these {len(passages)} passages as they are")
            else:
                index_folder = Path(folder or temporary) / variant
                build_index(
                    passages,
                    index_folder,
                    encoder=encoder,
                    index=index,
                    without_query_text=variant == "without_query_text",
                    device=device,
                    events=events,
                )
                searcher = Searcher(index_folder, device=device)
            result[variant] = compare_modes(searcher, queries, relevant, k=k, seed=seed)
            result.setdefault("examples", {})[variant] = [
                _example(searcher, queries[i], passages[wanted[i]].id, k) for i in range(min(examples, len(queries)))
            ]
    return result


def known_items(
    passages: Iterable[Passage], limit: int | None = None, seed: int = 0
) -> tuple[list[str], list[int], int]:
    """(queries, the row each was taken from, sentences left out): at most `limit`, drawn with `seed`.

    A sentence that several passages share names no one of them and is left out.
    """
    row_of: dict[str, int] = {}
    sentence_of: dict[str, str] = {}
    ambiguous: set[str] = set()
    for row, passage in enumerate(passages):
        sentence = " ".join((passage.summary or "").split())
        key = sentence.casefold()
        if len(re.findall(r"\w+", sentence)) < MIN_WORDS or not (passage.body or "").strip():
            continue
        if key in row_of:
            ambiguous.add(key)
        else:
            row_of[key], sentence_of[key] = row, sentence
    keys = [key for key in row_of if key not in ambiguous]
    if not keys:
        raise UserError(
            "no passage has a summary sentence of its own and a body, so there is no known item to search "
            "for; index source code with docstrings, or evaluate with judged queries"
        )
    if limit is not None and len(keys) > limit:
        keys = [keys[i] for i in sorted(np.random.default_rng(seed).choice(len(keys), limit, replace=False))]
    return [sentence_of[key] for key in keys], [row_of[key] for key in keys], len(ambiguous)


def compare_modes(
    searcher: Searcher,
    queries: Sequence[str],
    relevant: metrics.Relevant,
    *,
    k: int = 10,
    seed: int = 0,
    batch: int = 256,
) -> dict[str, Any]:
    """{mode: metrics with standard errors, and "queries_per_second"} for every mode the index has."""
    ids_by_mode: dict[str, list[np.ndarray]] = defaultdict(list)
    seconds: dict[str, float] = defaultdict(float)
    for mode in [m for m in MODES if m in searcher.modes]:
        for start in range(0, len(queries), batch):
            began = time.perf_counter()
            ids_by_mode[mode].append(searcher.rank(queries[start : start + batch], max(k, 10), mode).ids_QK)
            seconds[mode] += time.perf_counter() - began
    cuts: dict[str, Any] = {"mrr": (k,), "ndcg": (k,), "recall": sorted({1, 5, k})}
    return {
        mode: metrics.summarize(np.concatenate(batches), relevant, **cuts, seed=seed)
        | {"queries_per_second": len(queries) / max(seconds[mode], 1e-9)}
        for mode, batches in ids_by_mode.items()
    }


def _example(searcher: Searcher, query: str, wanted: str, k: int) -> dict[str, Any]:
    hits = searcher.search(query, k)
    return {
        "query": query,
        "wanted": wanted,
        "rank": next((i for i, h in enumerate(hits, 1) if h.passage.id == wanted), None),
        "hits": [
            {
                "id": h.passage.id,
                "title": h.passage.title,
                "source": h.passage.source,
                "score": h.score,
                "ranks": h.ranks,
            }
            for h in hits[:3]
        ],
    }


# judged collections -------------------------------------------------------------------------------------------


def read_collection(path: str | Path) -> Iterator[Passage]:
    """The passages of `corpus.parquet`: id, text, title if there is one, other plain columns as metadata."""
    for row in _table(path, ("id", "text"), None):
        meta = {k: v for k, v in row.items() if k not in ("id", "text", "title") and isinstance(v, SCALARS)}
        yield Passage(
            id=row["id"],
            text=row["text"] or "",
            source=f"{Path(path).parent.name}/{row['id']}",
            title=row.get("title") or "",
            summary="",
            body=row["text"] or "",
            meta=meta,
        )


def read_judgements(queries: str | Path, qrels: str | Path) -> tuple[list[str], list[str], list[dict[str, float]]]:
    """(query ids, texts, {document id: grade} of each) of the queries that have a judgement above 0."""
    grades: dict[str, dict[str, float]] = defaultdict(dict)
    for row in _table(qrels, ("query_id", "doc_id", "relevance")):
        grades[row["query_id"]][row["doc_id"]] = float(row["relevance"])
    judged = [row for row in _table(queries, ("id", "text")) if any(g > 0 for g in grades.get(row["id"], {}).values())]
    if not judged:
        raise UserError(f"no query of {queries} has a relevant document in {qrels}; check that their ids agree")
    return [r["id"] for r in judged], [r["text"] for r in judged], [grades[r["id"]] for r in judged]


def evaluate_qrels(
    searcher: Searcher, queries: str | Path, qrels: str | Path, *, k: int = 10, limit: int | None = None, seed: int = 0
) -> dict[str, Any]:
    """Metrics by mode on judged queries; a relevant document that is not in the index counts as missed.

    queries: Parquet with id and text. qrels: Parquet with query_id, doc_id, relevance.
    """
    _, texts, grades = read_judgements(queries, qrels)
    if limit is not None and len(texts) > limit:
        chosen = sorted(np.random.default_rng(seed).choice(len(texts), limit, replace=False))
        texts, grades = [texts[i] for i in chosen], [grades[i] for i in chosen]
    row_of = {id: row for row, id in enumerate(searcher.passages.ids())}
    absent = -2  # counts towards recall's denominator and is never returned; each absent one needs its own number
    relevant: list[dict[int, float]] = []
    for judged in grades:
        relevant.append({row_of.get(id, absent - n): grade for n, (id, grade) in enumerate(judged.items())})
    return {"queries": len(texts), "k": k} | compare_modes(searcher, texts, relevant, k=k, seed=seed)


def _table(path: str | Path, needed: Sequence[str], wanted: Sequence[str] | None = ()) -> Iterator[dict[str, Any]]:
    """Rows with the columns that are needed, and of those wanted what there is; None: with all."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
    except FileNotFoundError:
        raise UserError(f"there is no file {path}; give a Parquet file with the columns {', '.join(needed)}") from None
    except pa.ArrowInvalid as error:
        raise UserError(f"{path} is not a Parquet file ({str(error).splitlines()[0]})") from None
    names = file.schema_arrow.names
    missing = [n for n in needed if n not in names]
    if missing:
        raise UserError(f"{path} has the columns {', '.join(names)}; it needs {', '.join(needed)}")
    columns = None if wanted is None else [*needed, *(n for n in wanted if n in names)]
    for batch in file.iter_batches(batch_size=1024, columns=columns):
        yield from batch.to_pylist()
