"""The steps that studies need: an attribute's score, a window of time, clusters as domains."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from modicum.core import registry
from modicum.core.errors import UserError
from modicum.data.document import Document, Drop
from modicum.data.steps.cluster import merged

GOOD = "splendid wonderful charming delightful film with a graceful ending"
BAD = "dreadful boring clumsy tedious film with a wretched ending"


def reviews(count: int = 40) -> list[Document]:
    rng = np.random.default_rng(0)

    def one(i: int) -> Document:
        words = (GOOD if i % 2 else BAD).split()
        return Document(f"r{i}", " ".join(str(w) for w in rng.permutation(words)) + f" number {i}")

    return [one(i) for i in range(count)]


def examples(folder: Path) -> dict[str, list[str]]:
    for name, text in (("bad", BAD), ("good", GOOD)):
        rng = np.random.default_rng(1)
        rows = [{"text": " ".join(str(w) for w in rng.permutation(text.split()))} for _ in range(20)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return {"positive": [str(folder / "bad.jsonl")], "negative": [str(folder / "good.jsonl")]}


def run(choice: dict, documents: list[Document]) -> tuple[list[Document], list[Drop]]:
    out = list(registry.build("step", choice).run(documents))
    return [d for d in out if isinstance(d, Document)], [d for d in out if isinstance(d, Drop)]


def test_an_attribute_is_scored_and_none_dropped_by_default(tmp_path: Path) -> None:
    kept, dropped = run({"method": "attribute", "name": "negative", **examples(tmp_path)}, reviews())
    assert not dropped
    bad, good = ([d.meta["negative"] for d in kept if int(d.id[1:]) % 2 == k] for k in (0, 1))
    assert min(bad) > 0.5 > max(good)


def test_filter_and_inverse_filter_at_one_threshold_part_the_corpus(tmp_path: Path) -> None:
    both = {"method": "attribute", **examples(tmp_path)}
    low, _ = run(both | {"high": 0.5}, reviews())
    high, dropped = run(both | {"low": 0.5}, reviews())
    assert {d.id for d in low} | {d.id for d in high} == {d.id for d in reviews()}
    assert not {d.id for d in low} & {d.id for d in high}
    assert {int(d.id[1:]) % 2 for d in low} == {1} and {d.reason for d in dropped} == {"too-low"}


def test_an_attribute_without_examples_is_refused() -> None:
    with pytest.raises(UserError, match="needs texts"):
        run({"method": "attribute"}, reviews())


@pytest.mark.parametrize(
    ("date", "kept"),
    [("2012-12-31", False), ("2013", True), ("2013-01-01T00:00:00Z", True), ("2015-12-31", True), ("2016-01", False)],
)
def test_age_keeps_a_window(date: str, kept: bool) -> None:
    documents = [Document("a", "text", meta={"date": date})]
    out, dropped = run({"method": "age", "since": "2013", "before": "2016"}, documents)
    assert bool(out) == kept and (kept or dropped[0].reason in ("too-old", "too-new"))


def test_a_date_as_far_as_it_is_written_is_kept_where_it_may_be_in_the_window() -> None:
    out, _ = run({"method": "age", "since": "2013-05"}, [Document("a", "x", meta={"date": "2013"})])
    assert out


def test_undated_documents_are_dropped_unless_kept() -> None:
    assert run({"method": "age", "since": "2013"}, [Document("a", "x")])[1][0].reason == "undated"
    assert run({"method": "age", "since": "2013", "undated": "keep"}, [Document("a", "x")])[0]
    with pytest.raises(UserError, match="not a date"):
        run({"method": "age", "since": "May"}, [])


def topics(each: int = 60) -> list[Document]:
    words = {
        "sea": "tide harbour gull mast sail anchor salt wave",
        "law": "court clause judge motion appeal statute ruling plea",
        "kitchen": "flour butter oven whisk simmer pepper dough pan",
    }
    rng = np.random.default_rng(0)
    documents = []
    for topic, known in words.items():
        for i in range(each):
            text = " ".join(str(rng.choice(known.split())) for _ in range(40))
            quality = 0.1 if topic == "law" else 0.9
            documents.append(Document(f"{topic}{i}", text, meta={"quality": quality, "topic": topic}))
    return documents


def test_clusters_are_the_topics_whatever_their_domain() -> None:
    kept, dropped = run({"method": "cluster", "clusters": 3, "first": 12, "most": 0.5}, topics())
    assert not dropped
    by_cluster = {d.domain: {e.meta["topic"] for e in kept if e.domain == d.domain} for d in kept}
    assert len(by_cluster) == 3 and all(len(t) == 1 for t in by_cluster.values())


def test_clusters_of_low_quality_are_dropped_whole() -> None:
    choice = {"method": "cluster", "clusters": 2, "first": 12, "least_quality": 0.5}
    kept, dropped = run(choice, topics())
    assert {d.meta["topic"] for d in kept} == {"sea", "kitchen"}
    assert {d.document_id[:3] for d in dropped} == {"law"} and dropped[0].reason == "low-quality-cluster"


def test_merging_takes_the_nearest_pair_first_and_never_makes_a_chain_of_all() -> None:
    angles = np.array([0.0, 0.1, 0.9, 1.0, 2.2])
    centroids = np.stack([np.cos(angles), np.sin(angles)], 1)
    assert merged(centroids, np.array([5, 5, 5, 5, 1]), 3, 1.0).tolist() == [0, 0, 1, 1, 2]
    chain = np.stack([np.cos(angles * 0.01), np.sin(angles * 0.01)], 1)  # all near each other
    sizes = np.array([10, 10, 10, 10, 10])
    groups = merged(chain, sizes, 2, 0.6)
    assert np.bincount(groups).max() <= 3
    assert len(np.unique(merged(chain, sizes, 1, 0.2))) == 5  # nothing may be merged
