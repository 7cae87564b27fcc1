"""What a stream does beyond shuffling: ascending by quality, metadata before documents; and what shards keep for it."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest

from modicum.core import registry
from modicum.core.errors import CorruptError, UserError
from modicum.data.curate import CurateConfig, curate
from modicum.data.document import Document
from modicum.data.shards import METADATA, MemoryDocuments, TokenShards, write_shards
from modicum.data.stream import NO_LOSS, Stream
from modicum.data.tokenizer import Tokenizer

MASKED = "concat:mask=true"


def data(documents: int = 40, seed: int = 0) -> MemoryDocuments:
    """Document i of a domain is `0 v v ... v 1` with a v of its own; odd documents of "a" have no score."""
    rng = np.random.default_rng(seed)
    examples, metadata, quality = {}, {}, {}
    for k, domain in enumerate("ab"):
        examples[domain] = [([0, *[100 * (k + 1) + i] * int(rng.integers(3, 30)), 1], 1) for i in range(documents)]
        metadata[domain] = [[2, 3 + i % 4, 7] for i in range(documents)]
        scores = rng.random(documents)
        quality[domain] = [math.nan if k == 0 and i % 2 else scores[i] for i in range(documents)]
    return MemoryDocuments(examples, metadata=metadata, quality=quality, reserved=5)


def drawn(stream: Stream, domain: str) -> list[int]:
    """Documents of a domain in the order their first prediction comes in."""
    found: list[int] = []
    base = 100 * (1 + "ab".index(domain))
    for batch in stream.batches(1):
        found += [v - base for v in batch.targets_BT.flatten().tolist() if base <= v < base + 100]
    return list(dict.fromkeys(found))


def test_quality_ascends_within_each_domain() -> None:
    held = data()
    stream = Stream(held, sequence_length=64, order="quality-ascending", epochs=1)
    for domain in "ab":
        scores = np.nan_to_num(
            held.quality(domain)[drawn(Stream(held, sequence_length=64, order="quality-ascending", epochs=1), domain)],
            nan=-1,
        )
        assert len(scores) == 40
        grades = [scores[np.arange(40) * 16 // 40 == g] for g in range(16)]
        assert all(a.max() <= b.min() for a, b in itertools.pairwise(grades)), "ascending by grades"
        assert (scores[:19] == -1).all() == (domain == "a"), "documents without a score come first"
        assert (np.diff(scores) < 0).any(), "shuffled within a grade"
    shuffled = Stream(held, sequence_length=64, epochs=1)
    assert stream.epoch_tokens == shuffled.epoch_tokens
    assert {stream.next_batch(1).tokens_BT.shape for _ in range(3)} == {(1, 64)}


def test_a_run_shorter_than_an_epoch_ascends_over_a_sample_of_it() -> None:
    held = data()
    total = Stream(held, sequence_length=16).epoch_tokens // 3
    stream = Stream(held, sequence_length=16, order="quality-ascending", total=total, seed=1)
    seen = []
    while stream.done < total:
        seen += [v - 200 for v in stream.next_batch(1).targets_BT.flatten().tolist() if v >= 200]
    scores = held.quality("b")[list(dict.fromkeys(seen))]
    everything = np.sort(held.quality("b"))
    assert scores[-3:].mean() > everything[-8:].min(), "it comes to the best"
    assert scores[:3].mean() < everything[8:].max() and len(scores) < 25
    third = len(scores) // 3
    assert scores[:third].max() < scores[-third:].min()


@pytest.mark.parametrize(
    "knobs",
    [
        {"order": "quality-ascending"},
        {"transforms": ["meco:cooldown=0.4"]},
        {"order": "quality-ascending", "transforms": ["meco"]},
    ],
)
def test_resume_is_exact(knobs: dict[str, object]) -> None:
    def make() -> Stream:
        return Stream(data(), packing=MASKED, sequence_length=24, total=900, seed=3, **knobs)  # type: ignore[arg-type]

    whole = make()
    batches = [whole.next_batch(2) for _ in range(20)]
    first = make()
    for _ in range(7):
        first.next_batch(2)
    later = make()
    later.load_state(json.loads(json.dumps(first.state())))
    for batch in batches[7:]:
        again = later.next_batch(2)
        assert (again.tokens_BT == batch.tokens_BT).all() and (again.targets_BT == batch.targets_BT).all()
    assert later.state() == whole.state()


def test_a_longer_run_goes_on_in_the_order_it_began_with() -> None:
    short = Stream(data(), sequence_length=24, order="quality-ascending", total=300)
    short.next_batch(4)
    longer = Stream(data(), sequence_length=24, order="quality-ascending", total=900)
    longer.load_state(short.state())
    assert (longer.next_batch(6).tokens_BT == short.next_batch(6).tokens_BT).all()


def test_other_states_and_orders_are_refused() -> None:
    stream = Stream(data(), sequence_length=24)
    stream.next_batch(3)
    state = stream.state()
    with pytest.raises(UserError, match="was in shuffled order and is now asked for quality-ascending"):
        Stream(data(), sequence_length=24, order="quality-ascending").load_state(state)
    with pytest.raises(UserError, match="data position has version 2, this modicum reads 3"):
        Stream(data(), sequence_length=24).load_state(state | {"version": 2})


def test_metadata_is_read_and_never_learnt() -> None:
    held = data()
    stream = Stream(held, packing=MASKED, sequence_length=32, transforms=["meco:cooldown=0"], total=10_000, seed=2)
    batch = stream.next_batch(12)
    for tokens, targets, documents, positions in zip(
        batch.tokens_BT,
        batch.targets_BT,
        batch.documents_BT,  # type: ignore[arg-type]
        batch.positions_BT,
        strict=True,
    ):
        for k in range(int(documents.max()) + 1):
            mine = documents == k
            row, aim = tokens[mine].tolist(), targets[mine].tolist()
            assert positions[mine].tolist() == list(range(len(row)))
            opening = int(row[0] == 0)  # begins here: the start token stays first
            assert 0 not in row[1:]
            value = max(row)
            i = value % 100
            assert row[opening : opening + 3] == [2, 3 + i % 4, 7]
            assert aim[:3] == [NO_LOSS] * 3, "as many predictions are lost as there is metadata"
            assert all(a in (value, 1) for a in aim[3:]), "the text's, the first included, are all there"
            if opening:
                assert aim[3] == value, "the last of the metadata predicts the first of the text"


def test_metadata_displaces_text_and_loses_none() -> None:
    held = data()
    wanted = [t for d in "ab" for i in range(40) for t in held.tokens(d, i)[1:].tolist()]
    stream = Stream(held, packing=MASKED, sequence_length=16, transforms=["meco:cooldown=0.5"], total=1400, epochs=1)
    seen = [v for batch in stream.batches(3) for v in batch.targets_BT.flatten().tolist() if v != NO_LOSS]
    assert sorted(seen) == sorted(wanted)


def test_metadata_ends_with_its_share_of_the_run() -> None:
    stream = Stream(data(), packing=MASKED, sequence_length=20, transforms=["meco"], total=2000)
    told = [bool((row == 2).any()) for row in stream.next_batch(100).tokens_BT]
    assert all(told[:90]) and not any(told[90:])


def test_metadata_longer_than_a_row_is_cut() -> None:
    held = MemoryDocuments({"a": [([0, 5, 6, 1], 1)] * 4}, metadata={"a": [range(10, 60)] * 4})
    tokens = (
        Stream(held, packing=MASKED, sequence_length=8, transforms=["meco:cooldown=0"], total=64)
        .next_batch(2)
        .tokens_BT
    )
    assert tokens[0].tolist()[:6] == [0, 10, 11, 12, 13, 5]


@pytest.mark.parametrize(
    ("knobs", "told"),
    [
        ({"order": "best"}, "unknown order method 'best'"),
        ({"order": "quality-ascending:chunks_per_grade=0"}, "chunks_per_grade=0 must be at least 1"),
        ({"transforms": ["meco:cooldown=1"]}, "cooldown=1.0 must be a fraction"),
        ({"transforms": ["meco"], "packing": "concat", "total": 99}, "choose packing concat:mask=true"),
        ({"transforms": ["meco"]}, "the run's length"),
    ],
)
def test_user_mistakes(knobs: dict[str, object], told: str) -> None:
    with pytest.raises(UserError, match=told):
        Stream(data(), sequence_length=8, **{"packing": MASKED} | knobs)  # type: ignore[arg-type]


def test_data_without_scores_or_metadata_is_refused_at_once() -> None:
    plain = MemoryDocuments({"a": [([0, 5, 1], 1)]})
    with pytest.raises(UserError, match="'a' have no quality scores"):
        Stream(plain, sequence_length=8, order="quality-ascending")
    with pytest.raises(UserError, match="have no metadata"):
        Stream(plain, packing=MASKED, sequence_length=8, transforms=["meco"], total=80)


DOCUMENTS = [
    Document("web#1", "words of the first page", "prose", "https://en.wikipedia.org/wiki/A", {"quality": 0.25}),
    Document("web#2", "words of the second page", "prose", "http://example.com:8080/x"),
    Document("python/json/decoder.py#prose", "words on decoding", "code", "", {"quality": 3}),
    Document("note.txt", "words of a note", "code"),
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train([d.text for d in DOCUMENTS] * 5, 300, reserved=8)


def test_shards_keep_scores_and_sites_beside_the_tokens(tmp_path: Path, tokenizer: Tokenizer) -> None:
    assert [d.site for d in DOCUMENTS] == ["en.wikipedia.org", "example.com", "python/json", "note.txt"]
    shards = write_shards(tmp_path, DOCUMENTS, tokenizer)
    assert shards.reserved == tokenizer.reserved == 8
    assert shards.quality("prose")[0] == 0.25 and np.isnan(shards.quality("prose")[1])
    told = [tokenizer.decode(shards.metadata(d, i)) for d, i in (("prose", 0), ("prose", 1), ("code", 0), ("code", 1))]
    assert told == [METADATA.format(d.site) for d in DOCUMENTS]
    shards.verify()
    path = tmp_path / "prose" / "00000.quality"
    path.write_bytes(path.read_bytes()[::-1])
    with pytest.raises(CorruptError, match=r"00000\.quality does not match"):
        shards.verify()


def test_older_shards_can_be_read_and_say_what_they_lack(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write_shards(tmp_path, DOCUMENTS, tokenizer)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    manifest.pop("reserved")
    for entry in manifest["domains"].values():
        for part in entry["shards"]:
            for name in ("quality", "site", "sites"):
                part.pop(f"{name}_sha256", None)
    for extra in (*tmp_path.rglob("*.site"), *tmp_path.rglob("*.sites.json"), *tmp_path.rglob("*.quality")):
        extra.unlink()
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    old = TokenShards(tmp_path)
    old.verify()
    assert old.reserved == 0 and len(Stream(old, sequence_length=8).next_batch(2)) == 2
    with pytest.raises(UserError, match="no quality scores"):
        old.quality("prose")
    with pytest.raises(UserError, match="keeps no site of its documents: it was curated before"):
        old.metadata("prose", 0)


def test_reserved_tokens_are_the_last_and_no_text_is_encoded_to_them(tokenizer: Tokenizer, tmp_path: Path) -> None:
    assert tokenizer.vocab_size == 300
    assert tokenizer.backend.id_to_token(299) == "<|reserved_0|>"
    assert tokenizer.backend.id_to_token(292) == "<|reserved_7|>"
    assert max(tokenizer.encode("<|reserved_0|> words", specials=False)) < 292
    tokenizer.save(tmp_path)
    again = Tokenizer.load(tmp_path)
    assert again.reserved == 8 and again.fingerprint == tokenizer.fingerprint
    plain = Tokenizer.train([d.text for d in DOCUMENTS] * 5, 292)
    text = "words of a page on decoding"
    assert plain.reserved == 0 and plain.encode(text) == tokenizer.encode(text), "the words are the same"
    with pytest.raises(UserError, match="at least 269"):
        Tokenizer.train(["a"], 262, reserved=8)


def test_score_is_the_mean_of_its_four_shares() -> None:
    step = registry.build("step", "score:words=4")
    text = "The cat sat.\nThe cat sat.\n42 !"
    told = next(iter(step.each(Document("a", text))))
    letters, fresh, variety, ends = 6 / 8, (12 + 4) / (12 + 12 + 4), 3 / 4, 3 / 3
    assert told.quality == pytest.approx((letters + fresh + variety + ends) / 4, abs=1e-4) and told.text == text
    code = Document("b.py", "x = 1\n" + "y" * 101, "code")
    assert next(iter(step.each(code))).quality == pytest.approx((103 / 104 + 1 + 1 + 0.5) / 4, abs=1e-4)
    given = Document("c", text, meta={"quality": 7})
    assert next(iter(step.each(given))).quality == 7
    again = registry.build("step", "score:overwrite=true")
    assert 0 < next(iter(again.each(given))).quality < 1
    with pytest.raises(UserError, match="words=0 and line=100 must be at least 1"):
        registry.build("step", "score:words=0")


def test_curation_keeps_what_records_say(tmp_path: Path) -> None:
    rows = [
        {
            "text": f"Here is a page with the number {i} and some words.",
            "url": f"https://site{i % 3}.org/{i}",
            "quality": i / 40,
        }
        for i in range(40)
    ]
    rows[3]["quality"] = "high"  # not a number: unknown
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = CurateConfig(steps=["keep"], vocab_size=400, reserved=11, heldout=0.1)
    made = curate(str(tmp_path / "in.jsonl"), tmp_path / "out", config, processes=1)
    shards, tokenizer = made.shards(), made.tokenizer()
    assert shards.reserved == tokenizer.reserved == 11 and tokenizer.vocab_size <= 400
    for i, document in enumerate(made.documents("train", "prose")):
        score = shards.quality("prose")[i]
        number = int(document.text.split("number ")[1].split()[0])
        assert tokenizer.decode(shards.metadata("prose", i)) == f"URL: site{number % 3}.org\n\n"
        assert np.isnan(score) if number == 3 else score == pytest.approx(number / 40)
    with pytest.raises(UserError, match="leave out one of the two"):
        curate(str(tmp_path / "in.jsonl"), tmp_path / "b", CurateConfig(tokenizer=str(made.folder), reserved=3))
