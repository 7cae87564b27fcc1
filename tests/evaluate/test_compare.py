"""Paired statistics against sums written out and known tables, and the difference that only a paired test finds."""

import math
from types import SimpleNamespace

import numpy as np
import pytest

from modicum.core.errors import UserError
from modicum.evaluate import compare


def test_mcnemar_is_the_binomial_sum():
    a = [1] * 5 + [0] * 15 + [1] * 30 + [0] * 10
    b = [0] * 5 + [1] * 15 + [1] * 30 + [0] * 10
    expected = 2 * sum(math.comb(20, k) for k in range(6)) / 2**20
    found = compare.mcnemar(a, b)
    assert found == {"only_a": 5, "only_b": 15, "p": pytest.approx(expected, rel=1e-12)}
    assert found["p"] == pytest.approx(0.0414, abs=1e-4)  # the same as R's binom.test(5, 20)
    assert compare.sign_test(0, 0) == 1 and compare.sign_test(7, 7) == 1
    assert compare.sign_test(2000, 2400) == pytest.approx(1.76e-9, rel=0.05)  # large counts do not overflow
    with pytest.raises(UserError, match="one 0 or 1"):
        compare.mcnemar([0.5], [1])


def test_two_points_of_a_thousand_items_are_found_by_the_paired_test_alone():
    """A planted difference: B loses 30 of A's right items and wins 10 of its wrong ones."""
    rng = np.random.default_rng(0)
    a = np.zeros(1000)
    a[rng.permutation(1000)[:550]] = 1
    b = a.copy()
    b[rng.choice(np.flatnonzero(a == 1), 30, replace=False)] = 0
    b[rng.choice(np.flatnonzero(a == 0), 10, replace=False)] = 1
    said = compare.paired(a, b)
    assert said["difference"] == pytest.approx(0.02)
    assert said["p"] < 0.01 and said["low"] > 0
    apart = compare.unpaired(a, b)
    assert apart["difference"] == pytest.approx(0.02) and apart["p"] > 0.3
    # what could have been found: about 1.8 points paired, more than 6 unpaired
    assert said["detectable"] == pytest.approx(2.8 * math.sqrt(0.04 / 1000), rel=0.02)
    assert compare.detectable(apart["stderr"]) > 0.06


def test_power_of_the_detectable_difference():
    """Of many experiments with exactly that difference, four fifths are found."""
    rng, n, found = np.random.default_rng(1), 400, []
    for _ in range(400):
        differ = rng.random(n) < 0.2
        stderr = math.sqrt(0.2 / n)
        tilt = compare.detectable(stderr) / 0.2
        wins = np.where(rng.random(n) < (1 + tilt) / 2, 1.0, -1.0) * differ
        found.append(abs(wins.mean()) > 1.96 * compare.clustered_error(wins))
    assert 0.74 < np.mean(found) < 0.88


def test_holm():
    # R: p.adjust(c(0.01, 0.04, 0.03, 0.005), "holm")
    assert compare.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert compare.holm([]) == [] and compare.holm([0.7, 0.9]) == [1.0, 1.0]


def test_clustered_errors():
    rng = np.random.default_rng(0)
    values = rng.random(60)
    plain = values.std(ddof=1) / math.sqrt(60)
    assert compare.clustered_error(values) == pytest.approx(plain)
    assert compare.clustered_error(values, range(60)) == pytest.approx(plain)
    # every item thrice: three times the items say no more
    thrice, labels = np.repeat(values, 3), np.repeat(np.arange(60), 3)
    assert compare.clustered_error(thrice, labels) == pytest.approx(plain)
    assert compare.clustered_error(thrice) < 0.6 * plain
    mean = thrice.mean()
    naive = math.sqrt(sum((thrice[labels == c] - mean).sum() ** 2 for c in range(60)) * 60 / 59) / 180
    assert compare.clustered_error(thrice, labels) == pytest.approx(naive)
    assert math.isnan(compare.clustered_error([1, 0], ["a", "a"]))


def test_clusters_in_the_bootstrap_of_bits():
    rng = np.random.default_rng(0)
    a, size = rng.random(40) * 100, np.full(40, 50.0)
    b = a - rng.normal(size=40)
    once = compare.paired_ratio(a, b, size)
    twice = compare.paired_ratio(*(np.repeat(v, 2) for v in (a, b, size)), clusters_N=list(np.repeat(np.arange(40), 2)))
    assert twice["difference"] == pytest.approx(once["difference"])
    assert twice["stderr"] == pytest.approx(once["stderr"], rel=0.15)


def result(task, values, ids=None, asked="a", cluster=None):
    ids = ids or [str(i) for i in range(len(values))]
    rows = [
        {"id": i, "accuracy": v, "asked": asked} | ({"cluster": cluster(i)} if cluster else {})
        for i, v in zip(ids, values, strict=True)
    ]
    return SimpleNamespace(
        task=task, metric="accuracy", rows=rows, figures={"accuracy": {"value": float(np.mean(values))}}
    )


def test_compare_pairs_by_id_and_corrects_over_tasks():
    a = [result("x", [1, 1, 1, 0] * 20), result("y", [1, 0] * 40)]
    b = [result("y", [0, 1] * 40), result("x", [0, 0, 1, 0] * 20)]
    rows = compare.compare(a, b)
    assert [r["task"] for r in rows] == ["x", "y"]
    assert rows[0]["difference"] == pytest.approx(0.5) and rows[1]["difference"] == 0
    assert rows[0]["p_holm"] == pytest.approx(2 * rows[0]["p"]) and rows[1]["p"] == 1
    clustered = compare.compare(
        [result("x", [1, 1, 0, 0] * 20, cluster=lambda i: int(i) // 40)],
        [result("x", [0] * 80, cluster=lambda i: int(i) // 40)],
    )
    assert clustered[0]["stderr"] != pytest.approx(compare.paired([1, 1, 0, 0] * 20, [0] * 80)["stderr"])


def test_what_cannot_be_paired_is_refused():
    with pytest.raises(UserError, match=r"second model has no result for 2 items \(2, 3\)"):
        compare.compare([result("x", [1, 0, 1, 0])], [result("x", [1, 0])])
    with pytest.raises(UserError, match=r"first model has no result for 1 items \(9\)"):
        compare.compare([result("x", [1])], [result("x", [1, 0], ids=["0", "9"])])
    with pytest.raises(UserError, match="asked in other words"):
        compare.compare([result("x", [1, 0])], [result("x", [1, 0], asked="b")])
