"""spann and the inverted files: the closure by brute force, cuts, pages, pruning, damage, additions on disk."""

import os

import numpy as np
import pytest

from modicum.core.errors import CorruptError
from modicum.core.registry import build
from modicum.retrieve import measure
from modicum.retrieve.encoders import unit
from modicum.retrieve.indexes import open_index
from modicum.retrieve.indexes._clusters import distances, leaves
from modicum.retrieve.indexes.spann import GAP, PAGE, best_unique, closure, page_starts, runs_of, within_pages


def clustered(n: int, dim: int = 16, seed: int = 0, spread: float = 0.3) -> np.ndarray:
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).standard_normal((max(n // 50, 2), dim))
    return unit(centres[rng.integers(0, len(centres), n)] + spread * rng.standard_normal((n, dim)))


def filled(choice: str, x: np.ndarray):
    index = build("index", choice)
    index.build([(np.arange(len(x)) + 7, x)])
    return index


def lists_of(index) -> dict[int, set[int]]:
    """Rows in each head's list, as read from the disk."""
    result = {}
    for h in range(len(index.head_H)):
        lists = index._read_lists(np.array([h]), index.dim + 1)
        result[h] = {row for words in lists for row in words[:, 0].view(np.int32).tolist()}
    return result


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_the_closure_is_the_rule_by_brute_force_in_float64(scale):
    """1,000 vectors, of one length and of several; the same lists as two plain loops make."""
    x = clustered(1000)
    if scale != 1:
        x = (x * np.random.default_rng(1).uniform(0.3, scale, (len(x), 1))).astype(np.float32)
    index = filled("spann:candidates=100000,replicas=8,pages=1000", x)
    longest = np.linalg.norm(x.astype(np.float64), axis=1).max()
    rest = np.sqrt(np.maximum(longest**2 - (x.astype(np.float64) ** 2).sum(1), 0)) if scale != 1 else np.zeros(len(x))
    lifted = np.hstack([x.astype(np.float64), rest[:, None]])
    heads = index.head_H
    between_HH = ((lifted[heads][:, None] - lifted[heads][None]) ** 2).sum(-1)
    want: dict[int, set[int]] = {h: set() for h in range(len(heads))}
    close = 0
    for row in sorted(set(range(len(x))) - set(heads.tolist())):
        d = ((lifted[heads] - lifted[row]) ** 2).sum(1)
        accepted: list[int] = []
        for h in np.argsort(d, kind="stable"):
            between = between_HH[h, accepted]
            close += bool((np.abs(between - d[h]) < 1e-4).any())
            if (between > d[h]).all():
                accepted.append(int(h))
            if len(accepted) == 8:
                break
        for h in accepted:
            want[h].add(row)
    got = lists_of(index)
    wrong = sum(len(got[h] ^ want[h]) for h in got)
    assert wrong <= 2 * close + 4, f"{wrong} replicas differ, {close} comparisons are too close to call in float32"
    replicas = sum(map(len, got.values())) / (len(x) - len(heads))
    assert 1.5 < replicas < 7, "some vectors have several lists, and not simply the eight nearest"


def test_the_rule_spares_heads_behind_a_nearer_one():
    """Three heads on a line, the vector at 0: the second on the same side is covered, the one on the other side not."""
    heads = np.array([[1.0, 0.0], [1.6, 0.0], [-1.7, 0.0]], np.float32)
    d = np.array([[1.0, 2.56, 2.89]], np.float32)
    near = np.array([[0, 1, 2]])
    assert closure(near, d, heads, 1.0, 8).tolist() == [[True, False, True]]
    assert closure(near, d, heads, 0.0, 8).tolist() == [[True, False, False]]  # 0 <= d always: one list alone
    assert closure(near, d, heads, 1e9, 8).tolist() == [[True, True, True]]
    assert closure(near, d, heads, 1e9, 2).tolist() == [[True, True, False]]
    equal = np.array([[1.0, 0.36, 2.89]], np.float32)  # d(h, h') = d(h, x) to the bit counts as covered
    assert closure(near, equal, np.array([[1, 0], [1.6, 0], [-1.7, 0]]), 1.0, 8)[0, 1] == (equal[0, 1] > 0.36)


def test_every_vector_keeps_its_last_replica_when_lists_are_cut():
    rows = np.array([0, 0, 1, 2, 3])
    heads = np.array([0, 1, 0, 0, 0])
    far = np.array([0.3, 0.4, 0.1, 0.2, 0.5])
    kept = within_pages(rows, heads, far, 2)
    assert kept.tolist() == [False, True, True, True, True]  # 0 lives in list 1; 3 would be lost and stays
    x = clustered(1500)
    index = filled("spann:heads=0.02,pages=1,branch=8", x)
    listed = set().union(*lists_of(index).values())
    assert listed | set(index.head_H.tolist()) == set(range(1500)) and not listed & set(index.head_H.tolist())
    counts = index.count_H
    assert (counts > PAGE // (4 * 17)).any() and np.median(counts) <= PAGE // (4 * 17)


def test_small_lists_lie_together_in_a_page():
    sizes = np.array([1000, 3000, 200, 0, 9000, 100])
    starts = page_starts(sizes)
    assert starts.tolist() == [0, 1000, PAGE, PAGE + 200, 2 * PAGE, 2 * PAGE + 9000]
    touched = [(s + n - 1) // PAGE - s // PAGE + 1 for s, n in zip(starts, sizes, strict=True) if n]
    assert touched == [-(-n // PAGE) for n in sizes if n], "no list touches more pages than it has to"


def test_near_lists_come_with_one_read():
    starts = [0, 1000, 5000 + GAP, 6000 + GAP + 4000 + GAP + 1]
    assert runs_of(starts, [1000, 4000, 5000, 7]) == [(0, 10_000 + GAP), (starts[3], starts[3] + 7)]
    x = clustered(4000, spread=0.1)
    index = filled("spann:search_heads=16,ratio=1e9", x)
    near_QM, _ = index._nearest_heads(index._lifted(clustered(30, seed=3, spread=0.1)), 16)
    reads = []
    for heads in near_QM:
        heads = heads[index.count_H[heads] > 0]
        order = np.argsort(index.start_H[heads])
        lists = index._read_lists(heads, 17)
        assert [len(words) for words in lists] == index.count_H[heads][order].tolist()
        reads.append(len(runs_of(index.start_H[heads][order].tolist(), (68 * index.count_H[heads][order]).tolist())))
    assert np.mean(reads) < 8, "lists of near heads are neighbours in the file"


def test_a_search_of_a_saved_index_without_its_pages_gives_the_same(tmp_path):
    x, q = clustered(2000), clustered(10, seed=4)
    for choice in ("spann:ratio=1e9", "ivf-disk:lists=16,probes=4", "ivf-pq:lists=16,bytes=8"):
        filled(choice, x).save(tmp_path / choice)
        index = open_index(tmp_path / choice)
        before = index.search(q, 10)
        assert measure.cold_seconds(index, q, 10, tmp_path / choice) > 0
        after = index.search(q, 10)
        assert np.array_equal(before.ids_QK, after.ids_QK) and np.array_equal(before.scores_QK, after.scores_QK)
    assert measure.recall(np.array([[1, 2], [3, 4]]), np.array([[2, 9], [-1, -1]])) == 0.5


def test_the_bench_sets_the_least_effort_that_reaches_a_recall():
    from modicum.bench.ports import index as bench

    data = bench.material(None, bench.Scale(vectors=4000, queries=100, dimensions=16, clusters=40))
    assert data.vectors_ND.shape == (4000, 16) and len(data.pool_PD) == 800
    assert np.allclose(np.linalg.norm(data.vectors_ND, axis=1), 1, atol=1e-5)
    queries = data.pool_PD[:100]
    truth = bench.truth(data, queries)
    scores = np.take_along_axis(queries @ data.vectors_ND.T, truth, 1)
    assert np.allclose(scores, -np.sort(-(queries @ data.vectors_ND.T), axis=1)[:, :10], atol=1e-5)
    index = filled("ivf-disk:lists=64", data.vectors_ND)
    index.ids_N = index.ids_N - 7
    effort = bench.fit_effort(index, "probes", queries, truth, 0.9)
    assert 1 < effort < 64 and measure.recall(index.search(queries, 10).ids_QK, truth) >= 0.9
    less = bench.EFFORTS[bench.EFFORTS.index(int(effort)) - 1]
    index.config = type(index.config)(lists=64, probes=less)
    assert measure.recall(index.search(queries, 10).ids_QK, truth) < 0.9


def test_far_lists_are_not_read_and_all_lists_give_the_truth():
    x, q = clustered(3000, spread=0.2), clustered(40, seed=5, spread=0.2)
    truth = np.argsort(-(q @ x.T), axis=1, kind="stable")[:, :10] + 7
    recall, pages = {}, {}
    for ratio in (1.0, 2.0, 1e9):
        index = filled(f"spann:ratio={ratio},search_heads=48", x)
        ids = index.search(q, 10).ids_QK
        recall[ratio] = np.mean([np.isin(t, i).mean() for t, i in zip(truth, ids, strict=True)])
        pages[ratio] = index.pages_read / len(q)
    assert pages[1.0] <= 2 and pages[1.0] < pages[2.0] < pages[1e9]  # the nearest list alone, then more
    assert recall[1.0] < recall[1e9] and recall[2.0] > 0.9
    everything = filled("spann:ratio=1e9,search_heads=100000", x).search(q, 10)
    assert np.array_equal(everything.ids_QK, truth)


def test_replicas_beat_one_list_at_equal_lists_read():
    """The closure is what plain inverted lists lack: a border vector is found from either side."""
    x, q = clustered(4000, spread=0.5), clustered(60, seed=5, spread=0.5)
    truth = np.argsort(-(q @ x.T), axis=1, kind="stable")[:, :10] + 7
    recall = {}
    for replicas in (1, 8):
        ids = filled(f"spann:replicas={replicas},ratio=1e9,search_heads=4", x).search(q, 10).ids_QK
        recall[replicas] = np.mean([np.isin(t, i).mean() for t, i in zip(truth, ids, strict=True)])
    assert recall[8] > recall[1] + 0.1


def test_rows_come_once():
    rows, scores = best_unique(np.array([3, 5, 3, 9, 5]), np.array([2.0, 1.0, 2.0, 3.0, 1.0]), 3, 8)
    assert rows.tolist() == [9, 3, 5] and scores.tolist() == [3, 2, 1]
    index = filled("spann:ratio=1e9", clustered(1000))
    for ids in index.search(clustered(20, seed=2), 30).ids_QK:
        assert len(set(ids[ids >= 0].tolist())) == (ids >= 0).sum()


def test_vectors_of_any_length_are_ranked_by_inner_product():
    rng = np.random.default_rng(0)
    x = (clustered(1500) * rng.uniform(0.2, 5, (1500, 1))).astype(np.float32)
    q = (3 * clustered(30, seed=3)).astype(np.float32)
    truth = np.argsort(-(q @ x.T), axis=1, kind="stable")[:, :10] + 7
    ids = filled("spann:ratio=50,search_heads=64", x).search(q, 10).ids_QK
    assert np.mean([np.isin(t, i).mean() for t, i in zip(truth, ids, strict=True)]) > 0.9


def test_what_stays_in_memory_is_a_fraction(tmp_path):
    x = clustered(6000, dim=96)
    index = filled("spann", x)
    flat = x.nbytes
    assert index.resident_bytes() < 0.5 * flat < index.nbytes()
    cost = index.cost(*x.shape)
    assert 0.7 < index.resident_bytes() / (cost.peak_bytes - 8 * 20 * len(x)) < 1.3
    index.save(tmp_path / "i")
    lists = tmp_path / "i" / "lists.bin"
    opened = open_index(tmp_path / "i")
    q = clustered(5, dim=96, seed=4)
    assert np.array_equal(opened.search(q, 10).ids_QK, index.search(q, 10).ids_QK)
    os.truncate(lists, lists.stat().st_size // 2)
    with pytest.raises(CorruptError, match="bytes"):
        open_index(tmp_path / "i")
    for _ in range(2):  # a file that shrinks while it is open
        with pytest.raises(CorruptError, match="too early"):
            opened.search(x[::50], 10)


def test_groups_are_small_near_and_balanced():
    x = clustered(3000, spread=0.1)
    groups = leaves(x, 8, 32, 1.0, 0)
    sizes = np.array([len(g) for g in groups])
    assert sorted(np.concatenate(groups).tolist()) == list(range(3000)) and sizes.max() <= 12
    inside = np.mean([distances(x[g], x[g].mean(0, keepdims=True)).mean() for g in groups])
    assert inside < 0.5 * distances(x, x.mean(0, keepdims=True)).mean()
    same = leaves(np.ones((100, 4), np.float32), 8, 32, 1.0, 0)
    assert sorted(np.concatenate(same).tolist()) == list(range(100)) and max(map(len, same)) <= 12


@pytest.mark.parametrize("choice", ["spann:ratio=1e9", "ivf-disk:lists=16", "ivf-pq:lists=16,bytes=8"])
def test_additions_and_removals_are_built_in(choice):
    """Beyond a quarter the structure is made anew, from what is on disk and in memory."""
    x, q = clustered(2000), clustered(20, seed=8)
    index = filled(choice, x[:1200])
    index.add(np.arange(1200, 1300) + 7, x[1200:1300])
    assert len(index.tail_TD) == 100
    index.add(np.arange(1300, 2000) + 7, x[1300:])
    assert len(index.tail_TD) == 0 and len(index.flat_ND) == 2000
    index.remove(range(7, 707))
    assert len(index.flat_ND) == 1300
    truth = np.argsort(-(q @ x[700:].T), axis=1, kind="stable")[:, :10] + 707
    ids = index.search(q, 10).ids_QK
    assert np.mean([np.isin(t, i).mean() for t, i in zip(truth, ids, strict=True)]) > 0.85


def test_an_inverted_file_reads_more_lists_for_more_recall():
    x, q = clustered(3000), clustered(40, seed=5)
    truth = np.argsort(-(q @ x.T), axis=1, kind="stable")[:, :10] + 7
    for method in ("ivf-disk", "ivf-pq"):
        recall = [
            np.mean([np.isin(t, i).mean() for t, i in zip(truth, filled(c, x).search(q, 10).ids_QK, strict=True)])
            for c in (f"{method}:lists=64,probes=1", f"{method}:lists=64,probes=32")
        ]
        assert recall[0] < recall[1] and recall[1] > 0.9, (method, recall)
    codes = filled("ivf-pq:lists=64,probes=64,bytes=4,rescore=0", x)
    rough = np.mean([np.isin(t, i).mean() for t, i in zip(truth, codes.search(q, 10).ids_QK, strict=True)])
    assert rough < 0.8 and codes.resident_bytes() < 0.9 * x.nbytes, "codes alone rank roughly"
