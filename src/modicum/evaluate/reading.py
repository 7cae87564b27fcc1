"""Questions over a folder in the layout of BEIR, with short answers: what `modicum qa` asks.

FOLDER/corpus.parquet    id, text, perhaps title
       queries.parquet   id, text, answers (a list of accepted ones)
       qrels.parquet     query_id, doc_id, relevance: which passages hold the answer
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from pathlib import Path

from modicum.core.errors import UserError
from modicum.core.events import Events
from modicum.core.files import fingerprint, sha256
from modicum.evaluate.grounded import Item
from modicum.evaluate.rows import pick, read_rows
from modicum.retrieve.known_item import read_collection
from modicum.retrieve.search import Searcher, build_index

FILES = ("corpus.parquet", "queries.parquet", "qrels.parquet")
SPLITS = ("dev", "test")
DEV = 0.1  # of the questions: for choosing a prompt, never reported


def read_items(folder: str | Path, limit: int | None = None, *, split: str = "test", seed: int = 0) -> list[Item]:
    """Questions that have an answer and a relevant passage; `limit` of them in an order that seed and id decide.

    A hash of a question's id decides its split.
    """
    folder = Path(folder)
    if missing := [name for name in FILES if not (folder / name).is_file()]:
        raise UserError(f"{folder} lacks {', '.join(missing)}; give a folder with {', '.join(FILES)}")
    if split not in SPLITS:
        raise UserError(f"split {split!r} is not one of {', '.join(SPLITS)}")
    relevant: dict[str, list[str]] = defaultdict(list)
    for row in read_rows(folder / "qrels.parquet"):
        if pick(row, "relevance", "qrels.parquet") > 0:
            relevant[pick(row, "query_id", "qrels.parquet")].append(pick(row, "doc_id", "qrels.parquet"))
    rows = []
    for row in read_rows(folder / "queries.parquet"):
        answers = tuple(dict.fromkeys(str(a) for a in pick(row, "answers", "queries.parquet")))
        gold = tuple(relevant.get(row["id"], ()))
        if answers and gold and split == SPLITS[_number(f"dev{row['id']}") / 2**64 >= DEV]:
            rows.append(Item(str(row["id"]), pick(row, "text", "queries.parquet"), answers, gold))
    if not rows:
        raise UserError(
            f"{folder} has no question with an answer and a relevant passage; its answers may be empty lists"
        )
    rows.sort(key=lambda item: _number(f"{seed}/{item.id}"))
    return rows[:limit]


def open_index(folder: str | Path, cache: str | Path, encoder: str | None, events: Events | None = None) -> Searcher:
    """An index of the folder's passages under `cache`, built where there is none of these passages and this encoder."""
    corpus = Path(folder) / "corpus.parquet"
    index_folder = Path(cache) / f"index-{fingerprint([sha256(corpus), encoder])}"
    if not (index_folder / "manifest.json").is_file():
        build_index(read_collection(corpus), index_folder, encoder=encoder, events=events)
    return Searcher(index_folder)


def checksums(folder: str | Path) -> dict[str, str]:
    """SHA-256 of each file."""
    return {name: sha256(Path(folder) / name) for name in FILES}


def _number(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass")).digest()[:8], "big")
