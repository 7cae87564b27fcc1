"""Duplicates beyond one corpus' documents: against an indexed corpus, and passages within documents."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest

from modicum.core import registry
from modicum.data.curate import CurateConfig, curate
from modicum.data.document import Document, Drop
from modicum.data.steps import sample_key

WORDS = [
    f"{a}{b}" for a in ("ba", "ke", "lo", "mi", "ru", "sa", "to", "vi") for b in ("ran", "del", "mos", "pit", "gun")
]


def prose(seed: int, count: int) -> str:
    rng = random.Random(seed)
    return " ".join(rng.choice(WORDS) for _ in range(count))


def write(path: Path, texts: dict[str, str]) -> Path:
    path.write_text("".join(json.dumps({"id": i, "text": t}) + "\n" for i, t in texts.items()))
    return path


def test_documents_of_an_indexed_corpus_are_known_by_name_and_none_of_them_is_dropped(tmp_path: Path) -> None:
    old = {f"old{i}": prose(i, 120) for i in range(12)} | {"twin": prose(3, 120) + " more"}  # near itself already
    config = CurateConfig(steps=["normalise"], vocab_size=300, heldout=0.2)
    indexed = curate(str(write(tmp_path / "old.jsonl", old)), tmp_path / "indexed", config)
    near = prose(5, 120).replace(" ", "  ") + " and"
    new = {"same": old["old2"], "near": near, "own": prose(77, 120), "again": prose(77, 120)}
    steps = [
        {"method": "exact-dedup", "against": [str(indexed.folder)]},
        {"method": "minhash", "against": [str(indexed.folder)]},
    ]
    source = str(write(tmp_path / "new.jsonl", new))
    config = CurateConfig(steps=["normalise", *steps], vocab_size=300, heldout=0)
    made = curate(source, tmp_path / "out", config)
    lines = [json.loads(line) for line in (made.folder / "drops.jsonl").read_text().splitlines()]
    reasons = {line["detail"].split(" like ")[-1].split("same as ")[-1]: line["step"] for line in lines}
    originals = {d.id.split("#")[-1]: d.id for split in ("train", "heldout") for d in indexed.documents(split)}
    names = {d.meta.get("record_id"): d.id for split in ("train", "heldout") for d in indexed.documents(split)}
    assert len(names) == 13 and originals
    assert reasons[names["old2"]] == "exact-dedup"
    assert reasons[names["old5"]] == "minhash"
    kept = [d.meta["record_id"] for d in made.documents("train")]
    assert kept == ["own"] and made.count("documents") == 1
    # the same command again is done; with a grown index it is not
    assert curate(source, tmp_path / "out", config).stats == made.stats
    curate(
        str(write(tmp_path / "old.jsonl", old | {"own": prose(77, 120)})),
        tmp_path / "indexed",
        CurateConfig(steps=["normalise"], vocab_size=300, heldout=0.2),
    )
    from modicum.core.errors import UserError

    with pytest.raises(UserError, match="no document"):
        curate(source, tmp_path / "out", config)


@pytest.mark.parametrize("key", ["minhash", "exact-dedup"])
def test_an_index_changes_nothing_where_it_is_like_nothing(key: str, tmp_path: Path) -> None:
    documents = [Document(str(i), prose(i % 15, 80)) for i in range(30)]
    source = str(write(tmp_path / "other.jsonl", {f"o{i}": prose(1000 + i, 80) for i in range(9)}))
    plain = list(registry.build("step", key).run(documents))
    with_index = list(registry.build("step", {"method": key, "against": [source]}).run(documents))
    assert plain == with_index and sum(isinstance(d, Drop) for d in plain) == 15


def test_an_indexed_document_is_known_even_if_it_is_like_another_indexed_one(tmp_path: Path) -> None:
    words = prose(4, 200).split()

    def changed(*positions: int) -> str:
        return " ".join(f"odd{k}" if k in positions else w for k, w in enumerate(words))

    source = str(write(tmp_path / "index.jsonl", {"a": changed(), "b": changed(30, 90)}))
    new = [Document("c", changed(30, 60, 90, 120))]  # like b, and hardly like a
    alone = registry.build(
        "step", {"method": "minhash", "against": [str(write(tmp_path / "a.jsonl", {"a": changed()}))]}
    )
    assert list(alone.run(new)) == new
    (drop,) = registry.build("step", {"method": "minhash", "against": [source]}).run(new)
    assert isinstance(drop, Drop) and drop.detail.endswith("like b")


# Passages


def run(choice: str, documents: list[Document]) -> dict[str, str | Drop]:
    out = registry.build("step", choice).run(documents)
    return {d.document_id if isinstance(d, Drop) else d.id: d if isinstance(d, Drop) else d.text for d in out}


def naive(documents: list[Document], n: int) -> dict[str, list[str]]:
    """Words left of each document: a word goes if a window of n around it stands in a document with a lesser key, or
    earlier in the same one."""
    texts = {d.id: d.text.lower().split() for d in sorted(documents, key=lambda d: sample_key(d.id))}
    seen: set[tuple[str, ...]] = set()
    left = {}
    for name, words in texts.items():
        gone, own = set(), set()
        for at in range(len(words) - n + 1):
            window = tuple(words[at : at + n])
            if window in seen or window in own:
                gone |= set(range(at, at + n))
            own.add(window)
        seen |= own
        left[name] = [w for k, w in enumerate(words) if k not in gone]
    return left


def test_what_is_cut_is_what_a_search_of_all_substrings_cuts() -> None:
    shared = [prose(500 + k, 20) for k in range(4)]
    rng = random.Random(3)
    documents = []
    for i in range(25):
        parts = [
            prose(i, 30),
            shared[rng.randrange(4)],
            prose(100 + i, 15),
            shared[rng.randrange(4)][: rng.randrange(60)],
        ]
        parts += [parts[0]] if i % 7 == 0 else []  # a document that repeats itself
        documents.append(Document(f"d{i}", " ".join(parts)))
    out = run("substring-dedup:n=12,most=1.0", documents)
    right = naive(documents, 12)
    assert {k: v.split() for k, v in out.items() if isinstance(v, str)} == right
    assert sum(len(d.text.split()) for d in documents) > sum(map(len, right.values()))


def test_a_passage_below_n_words_stays_and_one_of_n_goes() -> None:
    for length, gone in ((9, False), (10, True)):
        passage = prose(1, length)
        documents = [Document(f"d{i}", f"{prose(10 + i, 40)} {passage} {prose(20 + i, 40)}") for i in range(2)]
        texts = [str(t) for t in run("substring-dedup:n=10", documents).values()]
        assert sum(passage in t for t in texts) == (1 if gone else 2)


def test_cases_and_stops_do_not_hide_a_copy_and_the_rest_keeps_its_own() -> None:
    passage = prose(1, 12)
    documents = [
        Document("a", f"First, {prose(10, 30)}. {passage}! Alpha ends."),
        Document("b", f"Second; {prose(11, 30)}. {passage.upper().replace(' ', ', ')} Beta ends."),
    ]
    out = run("substring-dedup:n=12", documents)
    owner = min("ab", key=sample_key)
    other = "b" if owner == "a" else "a"
    assert out[owner] == next(d.text for d in documents if d.id == owner)
    assert str(out[other]).startswith(("First, ", "Second; ")) and str(out[other]).endswith(
        ("Alpha ends.", "Beta ends.")
    )
    assert passage not in str(out[other]).lower().replace(",", "")


def test_a_document_that_is_mostly_a_copy_is_dropped() -> None:
    body = prose(1, 100)
    out = run("substring-dedup:n=20", [Document("a", body), Document("b", f"{body} and a word")])
    dropped = [d for d in out.values() if isinstance(d, Drop)]
    assert len(dropped) == 1 and dropped[0].reason == "all-duplicate"


def test_the_order_of_documents_does_not_decide() -> None:
    documents = [Document(f"d{i}", f"{prose(i, 30)} {prose(7, 25)}") for i in range(10)]
    first = run("substring-dedup:n=12", documents)
    assert first == run("substring-dedup:n=12", documents[::-1])
    assert sum(prose(7, 25) in str(t) for t in first.values()) == 1


# What was computed once


def test_signals_and_replies_stay_when_a_curation_changes(tmp_path: Path) -> None:
    source = str(write(tmp_path / "a.jsonl", {f"d{i}": prose(i, 60) for i in range(30)}))
    out = tmp_path / "out"
    curate(source, out, CurateConfig(steps=["normalise"], vocab_size=300))
    for name in ("signals", "replies"):
        (out / name).mkdir(exist_ok=True)
        np.save(out / name / "kept.npy", np.arange(3))
    (out / "fitted").mkdir(exist_ok=True)
    (out / "fitted" / "0-old.npz").write_bytes(b"of another curation")
    curate(source, out, CurateConfig(steps=["normalise", "exact-dedup"], vocab_size=300))
    assert (out / "signals" / "kept.npy").is_file() and (out / "replies" / "kept.npy").is_file()
    assert not (out / "fitted" / "0-old.npz").exists()
