"""dsi-pp: sharpness-aware steps by hand, what is replayed, forgetting, rows that cannot be reached."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from modicum.core.registry import build
from modicum.retrieve.retrievers._continual import continual, sam_step, spans

WORDS = [a + b + c for a in "bdgkmp" for b in "aeiou" for c in "nrs"]
TEXTS = [" ".join(np.random.default_rng(n).choice(WORDS, 10, replace=False)) for n in range(32)]
FIRST, SECOND = TEXTS[:16], TEXTS[16:]


def test_a_sharpness_aware_step_is_two_explicit_gradients():
    A = torch.tensor([[3.0, 1.0], [1.0, 2.0]], dtype=torch.float64)
    b, lr, rho = torch.tensor([1.0, -2.0], dtype=torch.float64), 0.1, 0.3
    x = torch.nn.Parameter(torch.tensor([0.7, 0.4], dtype=torch.float64))
    y = torch.nn.Parameter(torch.tensor([-1.5], dtype=torch.float64))
    start = torch.cat([x, y]).detach()

    def loss() -> torch.Tensor:
        return 0.5 * x @ A @ x + b @ x + (y**4).sum() * x[0]

    def gradient(w: torch.Tensor) -> torch.Tensor:
        gx = A @ w[:2] + b + torch.stack([w[2] ** 4, torch.zeros((), dtype=torch.float64)])
        return torch.cat([gx, (4 * w[2] ** 3 * w[0])[None]])

    g = gradient(start)
    expected = start - lr * gradient(start + rho * g / g.norm())  # one norm for both parameters
    value = sam_step([x, y], loss, torch.optim.SGD([x, y], lr=lr), rho)
    assert torch.allclose(torch.cat([x, y]).detach(), expected, atol=1e-12)
    assert value == pytest.approx((0.5 * start[:2] @ A @ start[:2] + b @ start[:2] + start[2] ** 4 * start[0]).item())
    plain = torch.cat([x, y]).detach()
    sam_step([x, y], loss, torch.optim.SGD([x, y], lr=lr), 0.0)
    assert torch.allclose(torch.cat([x, y]).detach(), plain - lr * gradient(plain), atol=1e-12)


def test_average_forgetting_and_learning_by_hand():
    table = [[0.9], [0.5, 0.8], [0.6, 0.4, 0.7]]
    assert continual(table) == {
        "average": pytest.approx((0.6 + 0.4 + 0.7) / 3),
        "forgot": pytest.approx(((0.9 - 0.6) + (0.8 - 0.4)) / 2),
        "learnt": pytest.approx((0.9 + 0.8 + 0.7) / 3),
    }
    assert continual([[0.4]]) == {"average": 0.4, "forgot": 0.0, "learnt": 0.4}


def test_pseudo_queries_are_runs_of_words():
    rng = np.random.default_rng(0)
    text = "one two three four five six seven eight nine ten"
    drawn = spans(text, 50, rng)
    assert all(q in text and 3 <= len(q.split()) <= 8 for q in drawn) and len(set(drawn)) > 10
    assert spans("only two", 2, rng) == ["only two"] * 2


def made(**knobs):
    return build("retriever", {"method": "dsi-pp", "width": 32, "layers": 1, "vocabulary": 330, **knobs})


def hits(retriever, texts, first: int) -> float:
    return float(np.mean(retriever.rank(texts, 1).ids_QK[:, 0] == np.arange(first, first + len(texts))))


def test_replayed_queries_keep_what_was_learnt():
    figures = {}
    for replay in (0.0, 1.0):
        retriever = made(replay=replay, rho=0.0, epochs=25, batch=16, lr=5e-3)
        retriever.build(FIRST)
        before = hits(retriever, FIRST, 0)
        retriever.add(SECOND)
        figures[replay] = (before, hits(retriever, FIRST, 0), hits(retriever, SECOND, 16))
    assert figures[0.0][0] == figures[1.0][0] >= 0.9, "nothing earlier to replay"
    assert figures[1.0][1] >= figures[0.0][1] + 0.2 and figures[1.0][1] >= 0.6 and figures[1.0][2] >= 0.8


def test_queries_are_replayed_and_not_passages_and_only_those_of_living_ones():
    retriever = made(epochs=1, queries=2)
    retriever.build(FIRST)
    retriever.remove([2])
    seen = {}

    def learn(new, old, rng):
        seen["new"], seen["old"] = new, old

    retriever.learn = learn
    retriever.add(SECOND[:3])
    assert seen["old"] == [p for p in retriever.pseudo[:32] if p[1] != 2] and len(seen["old"]) == 30
    assert [p for p in seen["new"] if p[0] in SECOND] == [(t, 16 + n) for n, t in enumerate(SECOND[:3])]
    assert len(seen["new"]) == 3 + 6 and {row for _, row in seen["new"]} == {16, 17, 18}
    given = build("retriever", "dsi-pp:width=32,layers=1,vocabulary=330,epochs=1")
    given.generate = lambda text, count: [f"what is {text.split()[1]}"]
    given.build(FIRST[:3])
    assert given.pseudo == [(f"what is {FIRST[n].split()[1]}", n) for n in range(3)]


def test_a_step_has_a_bounded_number_of_replays(monkeypatch):
    counts = []
    retriever = made(epochs=2, batch=8, replay=0.5, queries=1)
    retriever.build(FIRST)
    plain = retriever.tokens
    monkeypatch.setattr(retriever, "tokens", lambda texts: counts.append(len(texts)) or plain(texts))
    retriever.add(SECOND)
    assert set(counts) == {8 + 4}


def test_a_removed_passage_cannot_be_named():
    retriever = made(epochs=20, rho=0.0)
    retriever.build(FIRST)
    best = int(retriever.rank([FIRST[5]], 1).ids_QK[0, 0])
    retriever.remove([best])
    ids = retriever.rank([FIRST[5]], 20).ids_QK[0]
    assert best not in ids and (ids >= 0).sum() == 15
    assert retriever.rank([FIRST[5]], 3, subset=[1, 2]).ids_QK[0, 2] == -1
