"""What holds for any index: exhaustive settings are exact, updates and subsets behave, saving changes nothing."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from modicum.budget.budget import Budget
from modicum.core import registry
from modicum.core.errors import BudgetError, CorruptError, UserError
from modicum.retrieve.indexes import Block, Hits, Index, open_index

N, D, Q = 300, 24, 17


def _vectors(n: int = N, seed: int = 0) -> np.ndarray:
    x_ND = np.random.default_rng(seed).standard_normal((n, D)).astype(np.float32)
    return x_ND / np.linalg.norm(x_ND, axis=1, keepdims=True)


def _ids(n: int = N) -> np.ndarray:
    return np.random.default_rng(1).permutation(10 * n)[:n].astype(np.int64)  # neither dense nor sorted


def _make(key: str) -> Index:
    loaded = registry.load("index", key)
    return loaded.cls(getattr(loaded.module, "TOY", None) or loaded.config())


def _built(key: str) -> tuple[Index, np.ndarray, np.ndarray]:
    ids_N, vectors_ND, index = _ids(), _vectors(), _make(key)
    index.build((ids_N[i : i + 70], vectors_ND[i : i + 70]) for i in range(0, N, 70))
    return index, ids_N, vectors_ND


def _truth(ids_N: np.ndarray, vectors_ND: np.ndarray, queries_QD: np.ndarray, k: int) -> Hits:
    """Brute force in float64."""
    scores_QN = queries_QD.astype(np.float64) @ vectors_ND.astype(np.float64).T
    order_QN = np.argsort(-scores_QN, axis=1, kind="stable")
    hits, n = Hits.empty(len(queries_QD), k), min(k, len(ids_N))
    hits.ids_QK[:, :n] = ids_N[order_QN[:, :n]]
    hits.scores_QK[:, :n] = np.take_along_axis(scores_QN, order_QN[:, :n], 1)
    return hits


def _same(actual: Hits, true: Hits, what: str) -> None:
    assert actual.ids_QK.dtype == np.int64 and actual.scores_QK.dtype == np.float32, f"{what}: wrong types"
    assert actual.ids_QK.shape == true.ids_QK.shape, f"{what}: shape {actual.ids_QK.shape}, not {true.ids_QK.shape}"
    assert np.array_equal(actual.ids_QK, true.ids_QK), f"{what}: not the true neighbours in their order"
    assert np.array_equal(np.isneginf(actual.scores_QK), true.ids_QK < 0), f"{what}: -inf must mark what is missing"
    real = true.ids_QK >= 0
    assert np.allclose(actual.scores_QK[real], true.scores_QK[real], atol=1e-5), f"{what}: scores are off"


def check_exhaustive_is_exact(key: str) -> None:
    index, ids_N, vectors_ND = _built(key)
    queries_QD = _vectors(Q, 2)
    for k in (1, 10, N):
        _same(index.search(queries_QD, k), _truth(ids_N, vectors_ND, queries_QD, k), f"k={k}")
    assert len(index) == N and index.nbytes() > 0


def check_scores_are_ordered(key: str) -> None:
    index, *_ = _built(key)
    scores_QK = index.search(_vectors(Q, 3), 25).scores_QK
    assert (np.diff(scores_QK, axis=1) <= 0).all(), "scores must not rise along a row"


def check_k_larger_than_n(key: str) -> None:
    index, ids_N, vectors_ND = _built(key)
    queries_QD = _vectors(3, 4)
    _same(index.search(queries_QD, N + 9), _truth(ids_N, vectors_ND, queries_QD, N + 9), "k > n")
    empty = _make(key)
    empty.build(iter(()))
    assert len(empty) == 0 and (empty.search(queries_QD, 4).ids_QK == -1).all(), "an empty index finds nothing"


def check_add(key: str) -> None:
    ids_N, vectors_ND, queries_QD = _ids(), _vectors(), _vectors(Q, 5)
    index = _make(key)
    index.build([(ids_N[:200], vectors_ND[:200])])
    index.add(ids_N[200:], vectors_ND[200:])
    _same(index.search(queries_QD, 10), _truth(ids_N, vectors_ND, queries_QD, 10), "after add")
    for bad_ids, bad_vectors in (
        (ids_N[:1], vectors_ND[:1]),
        (np.array([99999, 99999]), vectors_ND[:2]),
        (np.array([-4]), vectors_ND[:1]),
        (np.array([99999]), vectors_ND[:1, :-1]),
        (np.array([99999]), np.full((1, D), np.nan, np.float32)),
    ):
        try:
            index.add(bad_ids, bad_vectors)
        except UserError:
            continue
        raise AssertionError(f"ids {bad_ids} with vectors {bad_vectors.shape} must be refused")
    _same(index.search(queries_QD, 10), _truth(ids_N, vectors_ND, queries_QD, 10), "after refused adds")
    fresh = _make(key)
    fresh.add(ids_N[:5], vectors_ND[:5])
    assert set(fresh.search(queries_QD[:1], 5).ids_QK[0]) == set(ids_N[:5]), "adding to an index never built"


def check_remove(key: str) -> None:
    index, ids_N, vectors_ND = _built(key)
    queries_QD = _vectors(Q, 6)
    for first, last in ((0, 20), (20, 150), (150, 290)):  # few, then many: whatever rebuilds itself does so
        assert index.remove([*ids_N[first:last].tolist(), 123456]) == last - first, "remove counts what it removed"
        _same(index.search(queries_QD, 12), _truth(ids_N[last:], vectors_ND[last:], queries_QD, 12), "after remove")
        assert len(index) == N - last
    index.add(ids_N[:20], vectors_ND[:20])
    keep = np.r_[290:N, 0:20]
    _same(index.search(queries_QD, 12), _truth(ids_N[keep], vectors_ND[keep], queries_QD, 12), "added again")
    index.remove(ids_N.tolist())
    assert len(index) == 0 and (index.search(queries_QD, 3).ids_QK == -1).all(), "everything removed"


def check_subset(key: str) -> None:
    index, ids_N, vectors_ND = _built(key)
    queries_QD = _vectors(Q, 7)
    for n in (1, 5, 100, 299):
        chosen = np.random.default_rng(n).permutation(N)[:n]
        true = _truth(ids_N[chosen], vectors_ND[chosen], queries_QD, 8)
        _same(index.search(queries_QD, 8, subset=[*ids_N[chosen].tolist(), 77777]), true, f"subset of {n}")
    assert (index.search(queries_QD, 3, subset=[]).ids_QK == -1).all(), "an empty subset finds nothing"
    index.remove(ids_N[:50].tolist())
    true = _truth(ids_N[50:200], vectors_ND[50:200], queries_QD, 8)
    _same(index.search(queries_QD, 8, subset=ids_N[:200].tolist()), true, "subset with removed ids")


def check_save_and_load(key: str) -> None:
    index, ids_N, vectors_ND = _built(key)
    index.remove(ids_N[:30].tolist())
    queries_QD = _vectors(Q, 8)
    before = index.search(queries_QD, 9)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "index"
        index.save(path)
        index.save(path)  # replaces what is there
        assert [p.name for p in Path(folder).iterdir()] == ["index"], "saving leaves nothing beside the index"
        loaded = open_index(path)
        assert type(loaded) is type(index) and loaded.config == index.config
        _same(loaded.search(queries_QD, 9), before, "after load")
        loaded.add(ids_N[:30], vectors_ND[:30])
        _same(loaded.search(queries_QD, 9), _truth(ids_N, vectors_ND, queries_QD, 9), "add after load")
        loaded.remove(ids_N[100:].tolist())
        loaded.save(path)  # over the files it was opened from
        true = _truth(ids_N[:100], vectors_ND[:100], queries_QD, 9)
        _same(open_index(path).search(queries_QD, 9), true, "saved again")
        victim = max((p for p in path.iterdir() if p.name != "index.json"), key=lambda p: p.stat().st_size)
        data = victim.read_bytes()
        for damaged in (data[:-1], data[:-1] + bytes([data[-1] ^ 1])):
            victim.write_bytes(damaged)
            try:
                open_index(path)
            except CorruptError:
                continue
            raise AssertionError("a truncated or altered file must be noticed")
        empty = _make(key)
        empty.save(path)
        assert len(open_index(path)) == 0, "an empty index can be saved and opened"


def check_budget(key: str) -> None:
    index, vectors_ND = _make(key), _vectors()
    need = index.cost(N, D)
    assert need.peak_bytes >= 4 * N and need.disk_bytes > 0
    taken = 0

    def stream() -> Iterator[Block]:
        nonlocal taken
        for i in range(0, N, 50):
            taken += 1
            yield np.arange(i, i + 50), vectors_ND[i : i + 50]

    try:
        index.build(stream(), Budget(memory_bytes=index.cost(120, D).peak_bytes))
    except BudgetError:
        assert taken == 3, f"refused at block {taken}; the third was the first that did not fit"
    else:
        raise AssertionError("an index larger than its budget must be refused")
