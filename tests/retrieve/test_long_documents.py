"""Long documents: evidence beyond what a short encoder reads, taken out of the text, and of one document alone."""

from __future__ import annotations

import numpy as np
import pytest

from modicum.core.errors import UserError
from modicum.retrieve.collection import Collection
from modicum.retrieve.long_documents import first_words, headroom, long_collection

WORDS = [a + b + c + d for a in "bdgkm" for b in "aeiou" for c in "nrst" for d in "aeo"]


def documents(count: int = 25) -> list[tuple[str, str]]:
    """Each begins with words of all, and has words of its own further on."""
    made = []
    for n in range(count):
        rng = np.random.default_rng(n)
        own = [f"{w}{n % 7}" for w in rng.choice(WORDS, 12, replace=False)]
        common = [" ".join(rng.choice(WORDS[:40], 10)).capitalize() + "." for _ in range(60)]
        deep = [" ".join(rng.choice([*own, *WORDS[:20]], 10)).capitalize() + "." for _ in range(60)]
        made.append((f"d{n}", " ".join([*common, "All documents say this one thing here.", *deep])))
    return made


def test_queries_are_sentences_from_beyond_that_are_taken_out():
    source = documents()
    made = long_collection(source, beyond=512, least=1000, parts=2)
    assert len(made.texts) == len(made.queries) == 25
    for query, grades in zip(made.queries, made.relevant, strict=True):
        (row,) = grades
        text = source[row][1]
        first, second = (s.strip() + "." for s in query.split(".")[:2])
        at = [len(text[: text.index(s)].split()) for s in (first, second)]
        middle = 512 + (len(text.split()) - 512) / 2
        assert 512 <= at[0] < middle <= at[1], "one of each section"
        assert first not in made.texts[row] and second not in made.texts[row]
        assert "one thing" not in query, "sentences of several documents ask about none"
        assert sum(first in t for _, t in source) == 1
    assert len(made.texts[0].split()) == len(source[0][1].split()) - 20


def test_what_a_short_encoder_reads_is_not_enough():
    head, whole = headroom(long_collection(documents(), beyond=512, least=1000))
    assert whole > 0.8 and head < whole - 0.3
    assert first_words(["a b  c\nd"], 3) == ["a b c"]


def test_the_same_seed_gives_the_same_queries_and_short_texts_are_left_out(tmp_path):
    source = [*documents(), ("short", "Too short for this.")]
    one, two, other = (long_collection(source, least=1000, seed=s) for s in (3, 3, 4))
    assert one == two and one.queries != other.queries and "short" not in one.ids
    assert len(long_collection(source, least=1000, limit=5).texts) == 5
    with pytest.raises(UserError, match="0 documents"):
        long_collection(source, least=5000)
    with pytest.raises(UserError, match="'d3' appears twice"):
        long_collection([*source, source[3]], least=1000)
    one.write(tmp_path / "c")
    read = Collection.open(tmp_path / "c")
    assert list(read.texts) == one.texts and list(read.queries) == one.queries and read.relevant == one.relevant
