"""o1-embedder: labels by hand, both losses, padding, the vote of a committee, thoughts that depend on their query."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from modicum.core.errors import UserError
from modicum.core.registry import build
from modicum.data.tokenizer import Tokenizer
from modicum.model.config import DecoderConfig
from modicum.model.decoder import Decoder
from modicum.retrieve.encoders import make_encoder, unit
from modicum.retrieve.thinking import END, IGNORED, Thinker, Thought, closed, fit, loss, opened, vote

TOWNS = ("oslo", "vienna", "lima", "cairo", "tokyo", "delhi")
ITEMS = [
    Thought(f"capital {n}", f"the town of {t} is a capital", f"the town of {TOWNS[n - 1]} is a capital", f"it is {t}")
    for n, t in enumerate(TOWNS)
]


def made(seed: int = 0) -> Thinker:
    texts = [f"{opened(i.query)}{closed(i.thought)}{END} {i.positive}" for i in ITEMS]
    tokenizer = Tokenizer.train(texts * 3, 320)
    shape = {"width": 32, "layers": 2, "heads": 2, "kv_heads": 1, "head_dim": 16, "mlp_width": 64}
    config = DecoderConfig(vocab_size=tokenizer.vocab_size, context_length=128, **shape)
    return Thinker(Decoder(config, torch.Generator().manual_seed(seed)), tokenizer, 64)


def test_labels_are_the_thoughts_tokens_alone():
    t = made()
    ids, labels = t.row("capital 1", "it is vienna")
    head = [t.tokenizer.start_id, *t.ids("<query>capital 1</query><thought>")]
    tail, end = t.ids("it is vienna</thought>"), t.ids("<emb>")
    assert ids == head + tail + end and labels == [IGNORED] * len(head) + tail + [IGNORED] * len(end)
    ids, labels = t.row("capital 1", None)
    assert ids == [t.tokenizer.start_id, *t.ids("<query>capital 1</query>"), *end] and set(labels) == {IGNORED}
    long, labels = t.row("capital 1", "it is vienna " * 60)
    assert len(long) == 64 == len(labels) and long[-len(end) :] == end, "the marker is never cut"
    assert len(t.passage("town " * 90)) == 64 and t.passage("town " * 90)[-len(end) :] == end


def test_vectors_are_last_states_whatever_padding():
    t = made()
    rows = [t.passage(i.positive) for i in ITEMS] + [t.passage("town")]
    together = t.embed(rows, batch=7)
    for n, ids in enumerate(rows):
        with torch.no_grad():
            h = t.model.hidden(torch.tensor([ids]))[0, -1]
        assert np.allclose(together[n], F.normalize(h, dim=0).numpy(), atol=1e-5)


def test_the_loss_is_both_terms_of_one_sequence():
    t = made()
    items, rng = ITEMS[:3], lambda: np.random.default_rng(0)
    rows = [t.row(i.query, i.thought) for i in items]
    states = [t.model.hidden(torch.tensor([ids]))[0] for ids, _ in rows]
    q = F.normalize(torch.stack([h[-1] for h in states]), dim=-1)
    keys = [t.model.hidden(torch.tensor([t.passage(x)]))[0, -1] for i in (0, 1) for x in
            ([j.positive for j in items], [j.negative for j in items])[i]]  # fmt: skip
    contrast = F.cross_entropy(20 * q @ F.normalize(torch.stack(keys), dim=-1).T, torch.arange(3))
    logs = []
    for h, (_, labels) in zip(states, rows, strict=True):
        logits = t.model.head(h).log_softmax(-1)
        logs += [-logits[n - 1, label] for n, label in enumerate(labels) if label != IGNORED]
    written = torch.stack(logs).mean()
    for weight in (0.8, 1.0, 0.0):
        got = loss(t, items, rng(), weight=weight, keep=1.0, scale=20.0)
        assert torch.allclose(got, weight * contrast + (1 - weight) * written, atol=1e-4), weight
    bare = loss(t, items, rng(), weight=0.8, keep=0.0, scale=20.0)
    q = torch.from_numpy(t.embed([t.row(i.query, None)[0] for i in items]))
    plain = F.cross_entropy(20 * q @ F.normalize(torch.stack(keys), dim=-1).T, torch.arange(3))
    assert torch.allclose(bare, 0.8 * plain, atol=1e-4)


def test_thoughts_are_left_out_as_often_as_said():
    t, kept = made(), []
    plain = t.row
    t.row = lambda query, thought: kept.append(thought is not None) or plain(query, thought)
    for seed in range(40):
        loss(t, ITEMS, np.random.default_rng(seed), weight=1.0, keep=0.7, scale=20.0)
    assert np.mean(kept) == pytest.approx(0.7, abs=0.09)


def test_the_committee_votes_by_softmax_of_each_member():
    vectors = unit(np.random.default_rng(0).standard_normal((4, 6)).astype(np.float32))
    encode = lambda texts: vectors[: len(texts)]  # noqa: E731
    scores = 100 * (vectors[1:].astype(np.float64) @ vectors[0].astype(np.float64))
    odds = np.exp(scores - scores.max())
    assert vote(["a", "b", "c"], "p", [encode], lexical=False) == int((odds / odds.sum()).argmax())
    # Two lukewarm members outvote none: their distributions are added, not their scores.
    one = lambda texts: np.array([[1.0, 0], [0.3, 0.9], [0.28, 0.9], [0.0, 1.0]])  # noqa: E731
    two = lambda texts: np.array([[1.0, 0], [0.0, 1], [0.5, 0.8], [0.499, 0.8]])  # noqa: E731
    total = sum(np.exp(100 * v[1:, 0]) / np.exp(100 * v[1:, 0]).sum() for v in (one(0), two(0)))
    assert vote(["a", "b", "c"], "p", [one, two], lexical=False) == int(total.argmax())
    assert vote(["nothing", "the red fox"], "a red fox runs", []) == 1, "BM25 alone"
    with pytest.raises(UserError, match="no thoughts"):
        vote([], "p", [])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    t = made()
    losses = fit(t, ITEMS, steps=150, batch=6, lr=4e-3)
    assert np.mean(losses[-10:]) < 0.4 * np.mean(losses[:10])
    folder = tmp_path_factory.mktemp("thinker") / "t"
    t.save(folder)
    return folder


def test_a_trained_model_thinks_and_finds(trained):
    encoder = make_encoder(f"o1-embedder:model={trained},most=12")
    assert encoder.thinker.write("capital 3", 1, 12) == ["it is cairo"]
    passages = encoder.encode([i.positive for i in ITEMS])
    queries = encoder.encode_queries([i.query for i in ITEMS])
    assert ((queries @ passages.T).argmax(1) == np.arange(6)).mean() >= 5 / 6
    t = encoder.thinker
    rows = [t.row(i.query, t.write(i.query, 1, 12)[0])[0] for i in ITEMS]
    assert np.allclose(queries, t.embed(rows), atol=1e-5)
    bare = make_encoder(f"o1-embedder:model={trained},thoughts=0")
    assert np.allclose(bare.encode_queries(["capital 3"]), t.embed([t.row("capital 3", None)[0]]), atol=1e-5)


def test_several_thoughts_are_averaged_and_depend_on_their_query_alone(trained):
    encoder = make_encoder(f"o1-embedder:model={trained},thoughts=3,most=6,temperature=3")
    t = encoder.thinker
    one, again = t.write("capital 2", 3, 6, 3.0), t.write("capital 2", 3, 6, 3.0)
    assert one == again and one[0] == t.write("capital 2", 1, 6)[0] and len(set(one)) > 1
    expected = unit(t.embed([t.row("capital 2", thought)[0] for thought in one]).mean(0, keepdims=True))
    both = encoder.encode_queries(["capital 5", "capital 2"])
    assert np.allclose(both[1], expected[0], atol=1e-5)
    with pytest.raises(UserError, match=r"no thinking\.json"):
        build("encoder", f"o1-embedder:model={trained}/model")
