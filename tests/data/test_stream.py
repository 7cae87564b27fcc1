"""Shards and stream: what is stored, the order it comes in, and going on from any place."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from modicum.core.errors import CorruptError, UserError
from modicum.data.document import Document
from modicum.data.shards import MemoryDocuments, TokenShards, write_manifest, write_part, write_shards
from modicum.data.stream import NO_LOSS, EndOfData, Stream
from modicum.data.tokenizer import Tokenizer

WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa"]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train([" ".join(WORDS)] * 4, vocab_size=300)


@pytest.fixture(scope="module")
def documents() -> list[Document]:
    rng = np.random.default_rng(0)
    return [
        Document(
            f"d{i}",
            " ".join(rng.choice(WORDS, int(rng.integers(1, 60)))),
            ("prose", "code", "wiki/en")[i % 3 if i % 2 else 0],
        )
        for i in range(90)
    ]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer, documents: list[Document]) -> TokenShards:
    folder = tmp_path_factory.mktemp("shards")
    cuts = [(0, 40), (40, 41), (41, 90)]
    parts = [write_part(folder, k, documents[a:b], tokenizer) for k, (a, b) in enumerate(cuts)]
    write_manifest(folder, parts, tokenizer)
    return TokenShards(folder)


def toy(sizes: dict[str, int] | None = None, seed: int = 0) -> MemoryDocuments:
    """Documents whose tokens are all different, so that each prediction can be told from every other."""
    rng = np.random.default_rng(seed)
    number, examples = 0, {}
    for domain, count in (sizes or {"a": 30, "b": 11, "c": 4}).items():
        rows = []
        for _ in range(count):
            n = int(rng.integers(2, 70))
            rows.append((range(number, number + n), 1))
            number += n
        examples[domain] = rows
    return MemoryDocuments(examples)


def everything(data: MemoryDocuments) -> Counter[tuple[int, int]]:
    """Every (input, target) pair of one epoch."""
    return Counter(
        (int(a), int(b))
        for d in data.domains
        for i in range(data.documents(d))
        for a, b in zip(data.tokens(d, i)[:-1], data.tokens(d, i)[1:], strict=True)
    )


def seen(batch) -> Counter[tuple[int, int]]:
    keep = batch.targets_BT != NO_LOSS
    return Counter(zip(batch.tokens_BT[keep].tolist(), batch.targets_BT[keep].tolist(), strict=True))


def equal(one, two) -> bool:
    return all(
        torch.equal(a, b) if a is not None else b is None
        for a, b in zip(
            (one.tokens_BT, one.targets_BT, one.documents_BT, one.positions_BT),
            (two.tokens_BT, two.targets_BT, two.documents_BT, two.positions_BT),
            strict=True,
        )
    )


def test_shards_hold_the_documents(shards: TokenShards, tokenizer: Tokenizer, documents: list[Document]) -> None:
    assert shards.domains == ["code", "prose", "wiki/en"]
    for domain in shards.domains:
        mine = [d for d in documents if d.domain == domain]
        assert shards.documents(domain) == len(mine)
        for i, document in enumerate(mine):
            stored = shards.tokens(domain, i)
            assert stored[0] == tokenizer.start_id and stored[-1] == tokenizer.eos_id
            assert tokenizer.decode(stored[1:-1]) == document.text
            assert shards.text_bytes(domain, i) == document.nbytes
        assert shards.lengths(domain).tolist() == [len(shards.tokens(domain, i)) for i in range(len(mine))]
        assert shards.total("tokens", domain) == shards.lengths(domain).sum()
    assert shards.dtype == np.uint16
    shards.verify()
    with pytest.raises(IndexError):
        shards.tokens("code", 10_000)


def test_large_vocabulary_takes_four_bytes(tmp_path: Path, tokenizer: Tokenizer) -> None:
    backend = tokenizer.backend.from_str(tokenizer.backend.to_str())
    backend.add_tokens([f"<extra{i}>" for i in range(70_000 - tokenizer.vocab_size)])
    wide = Tokenizer(backend, eos=tokenizer.eos_token)
    got = write_shards(tmp_path, [Document("x", "alpha <extra69000> beta")], wide)
    assert got.dtype == np.uint32 and wide.decode(got.tokens("prose", 0)[1:-1]) == "alpha <extra69000> beta"


def test_damage_is_noticed(tmp_path: Path, tokenizer: Tokenizer, documents: list[Document]) -> None:
    write_shards(tmp_path, documents, tokenizer)
    path = tmp_path / "prose" / "00000.bin"
    data = path.read_bytes()
    path.write_bytes(data[:-2])
    with pytest.raises(CorruptError, match="should have"):
        TokenShards(tmp_path)
    flipped = bytearray(data)
    flipped[10] ^= 1
    path.write_bytes(flipped)
    opened = TokenShards(tmp_path)  # same length: only the checksum tells
    with pytest.raises(CorruptError, match="checksum"):
        opened.verify()
    path.unlink()
    with pytest.raises(CorruptError, match="missing"):
        TokenShards(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(CorruptError, match="damaged"):
        TokenShards(tmp_path)
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(UserError, match="unfinished"):
        TokenShards(tmp_path)


@pytest.mark.parametrize("packing", ["concat", "concat:mask=true"])
def test_each_prediction_once_per_epoch(packing: str) -> None:
    data = toy()
    stream = Stream(data, packing=packing, sequence_length=32, epochs=2)
    total: Counter[tuple[int, int]] = Counter()
    for batch in stream.batches(4):
        total += seen(batch)
    assert total == Counter({k: 2 * v for k, v in everything(data).items()})
    assert stream.done == 2 * stream.epoch_tokens
    with pytest.raises(EndOfData, match="2 epochs"):
        stream.next_batch(1)


def test_batches_are_well_formed() -> None:
    stream = Stream(toy(), packing="concat:mask=true", sequence_length=48, epochs=1)
    batches = list(stream.batches(3))
    assert [len(b) for b in batches[:-1]] == [3] * (len(batches) - 1)
    for batch in batches:
        for row in range(len(batch)):
            ids, positions = batch.documents_BT[row], batch.positions_BT[row]
            for k in range(int(ids.max()) + 1):
                places = torch.nonzero(ids == k).flatten()
                assert torch.equal(positions[places], torch.arange(len(places)))
                inside = batch.targets_BT[row, places][:-1]
                assert torch.equal(inside, batch.tokens_BT[row, places][1:]), "targets are the next tokens"
            padding = ids == -1
            assert (batch.targets_BT[row, padding] == NO_LOSS).all()
    assert not (torch.cat([b.documents_BT for b in batches[:-1]]) == -1).any(), "padding at the very end only"
    plain = Stream(toy(), sequence_length=48).next_batch(3)
    assert plain.documents_BT is None and torch.equal(plain.positions_BT[1], torch.arange(48))


def test_ranks_share_a_global_batch() -> None:
    batch = Stream(toy(), packing="concat:mask=true", sequence_length=16).next_batch(6)
    two, three = [batch.rows(r, 2) for r in range(2)], [batch.rows(r, 3) for r in range(3)]
    assert torch.equal(two[1].tokens_BT, batch.tokens_BT[1::2])
    assert sum((seen(b) for b in two), Counter()) == sum((seen(b) for b in three), Counter()) == seen(batch)
    assert torch.equal(batch.slice(2, 4).targets_BT, batch.targets_BT[2:4])


def test_order_does_not_depend_on_batch_size() -> None:
    one, many = Stream(toy(), sequence_length=16, seed=3), Stream(toy(), sequence_length=16, seed=3)
    large = many.next_batch(12)
    small = [one.next_batch(n) for n in (1, 4, 7)]
    assert torch.equal(torch.cat([b.tokens_BT for b in small]), large.tokens_BT)
    assert one.state() == many.state()


@pytest.mark.parametrize("packing", ["concat", "concat:mask=true"])
def test_resume_is_exact(packing: str) -> None:
    def make() -> Stream:
        return Stream(toy(), "fixed:weights={a: 1, b: 2, c: 0.5}", packing, sequence_length=24, seed=5)

    whole = make()
    batches, states = [], []
    for _ in range(40):
        states.append(json.dumps(whole.state()))
        batches.append(whole.next_batch(2))
    assert whole.sampler.domains["c"].epoch >= 1, "the test runs over an epoch's end"
    for k in (0, 1, 7, 23, 39):
        again = make()
        again.load_state(json.loads(states[k]))
        assert all(equal(again.next_batch(2), batch) for batch in batches[k:])
    rewound = make()
    rewound.next_batch(5)
    rewound.load_state(json.loads(states[3]))
    assert equal(rewound.next_batch(2), batches[3])


def test_seed_of_the_state_holds() -> None:
    first = Stream(toy(), sequence_length=24, seed=1)
    first.next_batch(3)
    second = Stream(toy(), sequence_length=24, seed=2)
    second.load_state(first.state())
    assert equal(first.next_batch(8), second.next_batch(8))
    assert not equal(
        Stream(toy(), sequence_length=24, seed=1).next_batch(4), Stream(toy(), sequence_length=24, seed=2).next_batch(4)
    )


def test_change_of_mixture_loses_and_repeats_nothing() -> None:
    """Weights, sequence length, packing and batch size change mid-run: one epoch is still exact."""
    data = toy()
    total: Counter[tuple[int, int]] = Counter()
    state = None
    plans = [
        ("natural", "concat", 16, 2, 9),
        ("fixed:weights={a: 1, b: 5, c: 1}", "concat", 24, 3, 6),
        ("fixed:weights={c: 1, a: 0.1}", "concat:mask=true", 40, 1, 7),
        ("natural", "concat", 16, 4, None),
    ]
    for mixture, packing, length, n, steps in plans:
        stream = Stream(data, mixture, packing, sequence_length=length, epochs=1)
        if state is not None:
            stream.load_state(json.loads(json.dumps(state)))
        for step, batch in enumerate(stream.batches(n)):
            total += seen(batch)
            if step + 1 == steps:
                break
        state = stream.state()
    assert total == everything(data)


def test_shares_follow_the_weights_at_every_moment() -> None:
    data = toy({"a": 200, "b": 200, "c": 200})
    stream = Stream(data, "fixed:weights={a: 6, b: 3, c: 1}", sequence_length=64)
    longest = max(int(data.lengths(d).max()) for d in data.domains)
    for _ in range(60):
        stream.next_batch(2)
        for name, share in (("a", 0.6), ("b", 0.3), ("c", 0.1)):
            assert abs(stream.sampler.domains[name].consumed - share * stream.done) <= 2 * longest


def test_natural_ends_all_domains_together() -> None:
    data = toy({"a": 300, "b": 100, "c": 50})
    stream = Stream(data, sequence_length=64)
    while stream.done < stream.epoch_tokens * 0.98:
        stream.next_batch(1)
    assert all(d.epoch + d.drawn / int(d.ends[-1]) > 0.93 for d in stream.sampler.domains.values())
    assert all(d.epoch == 0 or d.drawn < 0.05 * int(d.ends[-1]) for d in stream.sampler.domains.values())


def test_epochs_differ_in_order() -> None:
    data = toy({"a": 50})
    stream = Stream(data, sequence_length=int(data.lengths("a").sum()) - 50)
    first, second = (stream.next_batch(1).tokens_BT[0].tolist() for _ in range(2))
    assert sorted(first) == sorted(second) and first != second
    still = Stream(data, sequence_length=10, order="stored").next_batch(2).tokens_BT.flatten().tolist()
    assert still[:5] == list(range(5)), "the stored order"


def test_a_long_document_is_spread_over_the_epoch() -> None:
    """One document of half of all tokens: no batch is filled by it, and every token comes exactly once."""
    long = list(range(1000, 5001))
    data = MemoryDocuments({"a": [(long, 1), *[([i] * 41, 1) for i in range(100)]]})
    stream = Stream(data, sequence_length=50, epochs=1)
    shares, total = [], Counter()
    for batch in stream.batches(8):
        shares.append((batch.tokens_BT >= 1000).float().mean().item())
        total += seen(batch)
    assert total == everything(data)
    assert max(shares[:-1]) < 0.95 and min(shares[:-1]) > 0.1, shares
    whole = [batch.tokens_BT for batch in Stream(data, sequence_length=50, epochs=1, chunk=5000).batches(8)]
    assert max((tokens >= 1000).float().mean().item() for tokens in whole) == 1, "one chunk: as one document"


def test_chunks_hold_when_the_sequence_length_changes() -> None:
    data = MemoryDocuments({"a": [(list(range(n, n + 700)), 1) for n in range(0, 20_000, 1000)]})
    total: Counter[tuple[int, int]] = Counter()
    first = Stream(data, sequence_length=64, epochs=1)
    for _ in range(9):
        total += seen(first.next_batch(3))
    second = Stream(data, sequence_length=200, epochs=1)
    second.load_state(json.loads(json.dumps(first.state())))
    for batch in second.batches(2):
        total += seen(batch)
    assert total == everything(data)


def test_loss_only_on_answers() -> None:
    data = MemoryDocuments({"pairs": [([10, 11, 12, 13, 14, 15], 3), ([20, 21, 22], 2)]})
    total: Counter[tuple[int, int]] = Counter()
    for batch in Stream(data, packing="concat:mask=true", sequence_length=2, epochs=1).batches(2):
        total += seen(batch)
    assert total == Counter({(12, 13): 1, (13, 14): 1, (14, 15): 1, (21, 22): 1})


def test_other_data_is_refused() -> None:
    state = Stream(toy(), sequence_length=8).state()
    with pytest.raises(UserError, match="'a' had 30 documents"):
        Stream(toy({"a": 29, "b": 11, "c": 4}), sequence_length=8).load_state(state)
    with pytest.raises(UserError, match="is gone"):
        Stream(toy({"a": 30}), sequence_length=8).load_state(state)
    grown = Stream(
        MemoryDocuments(
            {d: [(toy().tokens(d, i), 1) for i in range(toy().documents(d))] for d in toy().domains}
            | {"new": [(range(9), 1)]}
        ),
        sequence_length=8,
    )
    grown.load_state(state)
    assert grown.sampler.domains["new"].drawn == 0


def test_user_mistakes() -> None:
    with pytest.raises(UserError, match="no tokens"):
        Stream(MemoryDocuments({"a": []}), sequence_length=8)
    with pytest.raises(UserError, match="unknown domain"):
        Stream(toy({"a": 3}), "fixed:weights={aa: 1}", sequence_length=8)
    with pytest.raises(UserError, match="all mixture weights are 0"):
        Stream(toy({"a": 3}), "fixed:weights={a: 0}", sequence_length=8)
    with pytest.raises(UserError, match="concat"):
        Stream(toy({"a": 3}), packing="concatt", sequence_length=8)


def test_fast_enough(shards: TokenShards) -> None:
    """Packing is a copy, not a loop over tokens: a million tokens in well under a second."""
    import time

    stream = Stream(toy({"a": 2000}), sequence_length=1024)
    start = time.process_time()
    for _ in range(60):
        stream.next_batch(16)
    assert 60 * 16 * 1024 / (time.process_time() - start) > 500_000
