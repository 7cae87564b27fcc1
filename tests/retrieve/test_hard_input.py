"""Hard input: files cut anywhere, wrong widths, NaN, ids twice, odd queries: one line each, and nothing half-done."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from modicum.core import registry
from modicum.core.errors import ModicumError, UserError
from modicum.core.registry import build
from modicum.retrieve.indexes import open_index
from modicum.retrieve.retrievers import open_retriever

X = np.random.default_rng(0).standard_normal((300, 16)).astype(np.float32)
INDEXES = sorted(registry.methods("index"))
# Of another language, script or none: what a user may type.
ODD_QUERIES = [
    "où est la bibliothèque",
    "図書館はどこですか",
    "где библиотека",
    "🙂",
    "?!",
    "\x00",
    "é" * 5000,
    "der die das",
]


def filled(key: str):
    loaded = registry.load("index", key)
    index = loaded.cls(getattr(loaded.module, "TOY", None) or loaded.config())
    index.build([(np.arange(200), X[:200])])
    return index


def one_line(error: BaseException) -> bool:
    return "\n" not in str(error).strip() and len(str(error)) > 20


@pytest.mark.parametrize("key", INDEXES)
def test_every_file_of_an_index_may_be_cut(key, tmp_path):
    filled(key).save(tmp_path / "i")
    files = sorted(p for p in (tmp_path / "i").rglob("*") if p.is_file())
    assert len(files) >= 2
    for path in files:
        whole = path.read_bytes()
        for size in {0, len(whole) // 2, len(whole) - 2}:  # the last byte of a JSON file is a line end
            path.write_bytes(whole[:size])
            with pytest.raises(ModicumError) as caught:
                open_index(tmp_path / "i")
            assert one_line(caught.value), path.name
        path.write_bytes(whole)
    assert len(open_index(tmp_path / "i")) == 200


@pytest.mark.parametrize("key", INDEXES)
def test_wrong_vectors_are_refused_and_change_nothing(key):
    index = filled(key)
    before = index.search(X[:5], 7)
    nan, infinite = X[200:203].copy(), X[200:203].copy()
    nan[1, 3], infinite[2, 0] = np.nan, np.inf
    new = np.arange(900, 903)
    for ids, vectors, message in (
        (new, X[200:203, :15], "15 dimensions, the index has 16"),
        (new, np.hstack([X[200:203]] * 2), "32 dimensions, the index has 16"),
        (new, nan, "NaN or infinity"),
        (new, infinite, "NaN or infinity"),
        (np.array([900, 901, 900]), X[200:203], "id 900 is given twice"),
        (np.array([900, 17, 901]), X[200:203], "id 17 is already stored"),
        (new[:2], X[200:203], "do not belong together"),
        (np.array([900, -1, 901]), X[200:203], "negative"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            index.add(ids, vectors)
        assert one_line(caught.value)
    with pytest.raises(UserError, match="do not fit an index of width 16"):
        index.search(X[:5, :8], 7)
    after = index.search(X[:5], 7)
    assert len(index) == 200 and np.array_equal(before.ids_QK, after.ids_QK)


@pytest.mark.parametrize("key", INDEXES)
def test_a_query_of_nan_ends_and_harms_no_other(key):
    index = filled(key)
    queries = X[:3].copy()
    queries[1] = np.nan
    hits, clean = index.search(queries, 5), index.search(X[:3], 5)
    for q in (0, 2):
        assert np.array_equal(hits.ids_QK[q], clean.ids_QK[q])


@pytest.mark.parametrize(
    "choice", ["bm25", "dense:encoder=lsa", "massiveds:encoder=lsa", "dsi-pp:epochs=1,width=32,layers=1"]
)
def test_odd_queries_give_a_ranking_or_nothing_and_empty_ones_one_line(choice):
    retriever = build("retriever", choice)
    texts = [f"The library number {n} opens at {n % 12} o'clock." for n in range(30)]
    retriever.build([*texts, "", "\n", "図書館は九時に開きます"])
    hits = retriever.rank(ODD_QUERIES, 4)
    assert hits.ids_QK.shape == (len(ODD_QUERIES), 4) and not np.isnan(hits.scores_QK).any()
    for query in ("", "  ", "\n\t"):
        with pytest.raises(UserError, match="query 1 is empty") as caught:
            retriever.rank(["library", query], 4)
        assert one_line(caught.value)
    if choice == "bm25":
        assert hits.ids_QK[1, 0] == 32, "scripts without spaces match by pairs of characters"


@pytest.mark.parametrize("choice", ["bm25", "dense:encoder=lsa", "massiveds:encoder=lsa,shards=2"])
def test_every_file_of_a_retriever_may_be_cut(choice, tmp_path):
    retriever = build("retriever", choice)
    retriever.build([f"The library number {n} opens at {n % 12}." for n in range(30)])
    retriever.save(tmp_path / "r")
    for path in sorted(p for p in (tmp_path / "r").rglob("*") if p.is_file()):
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(ModicumError) as caught:
            open_retriever(tmp_path / "r")
        assert one_line(caught.value), path.name
        path.write_bytes(whole)
    open_retriever(tmp_path / "r")


LARGER_THAN_MEMORY = """
import resource, sys
import numpy as np
from modicum.core.registry import build
from modicum.retrieve.indexes import open_index
key, folder = sys.argv[1:]
N, D, BLOCK = 240_000, 256, 4_000  # 234 MiB of vectors


def block(n):
    return np.random.default_rng(n).standard_normal((BLOCK, D)).astype(np.float32)


index = build("index", key)
index.build([(np.arange(BLOCK), block(0))])
index.search(block(0)[:2], 3)  # libraries load what they need
index = build("index", key)
used = next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("VmData")) << 10
limit = used + (120 << 20)
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
try:
    np.ones(N * D, np.float32)
except MemoryError:
    print("the collection itself does not fit")
index.build((np.arange(n * BLOCK, (n + 1) * BLOCK), block(n)) for n in range(N // BLOCK))
index.save(folder)
del index
again = open_index(folder)
queries = np.stack([block(n)[7] for n in (0, 31, 59)])
print(again.search(queries, 3).ids_QK[:, 0].tolist())
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("key", ["exact", "ivf-disk:lists=256,probes=8"])
def test_a_collection_larger_than_memory_is_indexed_and_searched(key, tmp_path):
    """234 MiB of vectors with 120 MiB of memory to take."""
    command = [sys.executable, "-c", LARGER_THAN_MEMORY, key, str(tmp_path / "i")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-600:]
    assert "the collection itself does not fit" in done.stdout and "[7, 124007, 236007]" in done.stdout
