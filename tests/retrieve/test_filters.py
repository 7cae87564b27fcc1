"""Searches by metadata, and passages that overlap."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from modicum.core.errors import UserError
from modicum.data.document import Document
from modicum.data.passages import Passage, passages
from modicum.retrieve.filters import matching, parse_where
from modicum.retrieve.live import Live
from modicum.retrieve.search import Searcher, build_index

ROWS = [
    Passage("a", "apples in the cellar", "fruit/a.md", "A", meta={"year": 2019, "lang": "en", "open": True}),
    Passage("b", "apples in the attic", "fruit/b.md", "B", meta={"year": 2021, "lang": "de"}),
    Passage("c", "apples on the table", "notes/c.txt", "C", meta={"year": 2024, "lang": "fr", "open": False}),
    Passage("d", "apples under the bed", "notes/d.txt", "D"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("filters") / "index"
    build_index(ROWS, out, encoder="lsa:dims=3")
    return out


@pytest.mark.parametrize(
    ("where", "ids"),
    [
        ({"source": "fruit/*"}, "ab"),
        ({"source": "fruit/?.md", "year": {"gt": 2019}}, "b"),
        ({"lang": ["en", "fr"]}, "ac"),
        ({"year": {"gte": 2019, "lt": 2024}}, "ab"),
        ({"year": {"ne": 2021}}, "ac"),  # a passage without the name does not match
        ({"year": 2021}, "b"),
        ({"open": True}, "a"),
        ({"open": 1}, ""),  # a truth value is no number
        ({"year": {"gt": "x"}}, ""),
        ({"id": "[cd]"}, "cd"),
        ({"lang": "EN"}, ""),
    ],
)
@pytest.mark.parametrize("mode", ["bm25", "dense", "fused"])
def test_only_what_matches_comes_back(folder, tmp_path, where, ids, mode):
    plain = Searcher(folder)
    assert "".join(sorted(h.passage.id for h in plain.search("apples", 10, mode, where=where))) == ids
    rows = matching([plain.passages], where)
    assert "".join(p.id for p, ok in zip(ROWS, rows, strict=True) if ok) == ids


def test_a_live_index_filters_over_all_its_segments(tmp_path):
    live = Live.create(tmp_path / "live", encoder="lsa:dims=3")
    live.add(ROWS[:2])
    live.add(ROWS[3:])  # a segment without any metadata
    live.add(ROWS[2:3])
    live.remove(["a"])
    for mode in ("bm25", "dense", "fused"):
        hits = live.search("apples", 10, mode, where={"year": {"gte": 2000}})
        assert sorted(h.passage.id for h in hits) == ["b", "c"]
        assert {h.passage.id: h.passage.meta for h in hits}["c"] == ROWS[2].meta
    assert len(live.search("apples", 10)) == 3


def test_the_filter_leaves_room_for_every_match(folder, tmp_path):
    """It is applied before the k best are taken: what matches is not lost behind what does not."""
    many = [Passage(f"x{i}", "apples apples apples", f"x/{i}", "") for i in range(300)]
    build_index([*many, *ROWS], tmp_path / "many")
    (hit,) = Searcher(tmp_path / "many").search("apples", 1, "bm25", where={"lang": "de"})
    assert hit.passage.id == "b"


def test_conditions_of_the_command_line():
    given = ["source=docs/*", "lang=en,de", "year>=2020", "year < 2026", "open=true", "name!=x"]
    assert parse_where(given) == {
        "source": "docs/*",
        "lang": ["en", "de"],
        "year": {"gte": 2020, "lt": 2026},
        "open": True,
        "name": {"ne": "x"},
    }
    for wrong, word in ((["year"], "NAME=VALUE"), (["a=1", "a=2"], "twice"), (["a=1", "a>0"], "twice")):
        with pytest.raises(UserError, match=word):
            parse_where(wrong)


@pytest.mark.parametrize(
    ("where", "word"),
    [({"yaer": 2020}, "year"), ({"year": {"above": 3}}, "gte"), ({"year": {}}, "gte"), ({"year": None}, "no text")],
)
def test_a_wrong_filter_says_what_is_allowed(folder, where, word):
    with pytest.raises(UserError, match=word):
        Searcher(folder).search("apples", where=where)


def test_an_index_without_metadata_is_read_and_filtered_by_source(folder, tmp_path):
    import pyarrow.parquet as pq

    from modicum.retrieve.passages import Passages

    table = pq.read_table(folder / "passages.parquet").drop_columns(["meta"])
    pq.write_table(table, tmp_path / "old.parquet")
    old = Passages(tmp_path / "old.parquet")
    assert [p.id for p in old] == list("abcd") and old[2].meta == {}
    assert np.flatnonzero(matching([old], {"source": "notes/*"})).tolist() == [2, 3]


def test_passages_know_their_document_and_overlap():
    text = "# Fruit\n\n" + "\n\n".join(" ".join(f"p{p}w{w}" for w in range(30)) for p in range(6))
    document = Document("f.md", text, "prose", "f.md", {"format": "markdown", "lang": "en", "parts": [1]})
    plain, lapped = list(passages(document, 60)), list(passages(document, 60, 10))
    assert all(p.meta == {"domain": "prose", "format": "markdown", "lang": "en"} for p in plain + lapped)
    assert all(p.title == "Fruit" for p in lapped)
    assert " ".join(p.text for p in plain).split() == document.text.split()[2:]
    words = [p.text.split() for p in lapped]
    assert all(after[:10] == before[-10:] for before, after in itertools.pairwise(words))
    kept = [*words[0], *(w for part in words[1:] for w in part[10:])]
    assert kept == document.text.split()[2:] and all(len(part) <= 70 for part in words)
    one = Document("long.txt", " ".join(f"w{i}" for i in range(500)), "prose", "long.txt")
    cut = [p.text.split() for p in passages(one, 100, 20)]
    assert all(after[:20] == before[-20:] for before, after in itertools.pairwise(cut))
    assert [*cut[0], *(w for part in cut[1:] for w in part[20:])] == one.text.split()
    with pytest.raises(UserError, match="half of words=60"):
        list(passages(document, 60, 31))
