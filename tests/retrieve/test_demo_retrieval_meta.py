"""demo-retrieval-meta: the marginal likelihood by enumeration, what is frozen, demonstrations without leaks."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from modicum.core.errors import UserError
from modicum.core.registry import build
from modicum.retrieve.bm25 import BM25
from modicum.retrieve.student import Student
from modicum.retrieve.trainers._conformance import toy_pairs
from modicum.retrieve.trainers.demo_retrieval_meta import Labelled, demonstrations
from modicum.retrieve.training import Training, train


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape)).requires_grad_()


def test_the_loss_is_the_marginal_likelihood_by_enumeration():
    trainer = build("trainer", "demo-retrieval-meta:scale=3", toy_pairs())
    q, k = rand(2, 5), rand(2, 3, 5, seed=1)
    r = torch.tensor([[-2.0, -0.5, -7.0], [-1.0, -1.5, -0.2]], dtype=torch.float64)
    total = 0.0
    for b in range(2):
        s = [3 * float(F.cosine_similarity(q[b], k[b, z], dim=0).detach()) for z in range(3)]
        prior = np.exp(s) / np.exp(s).sum()
        total -= math.log(sum(prior[z] * math.exp(float(r[b, z])) for z in range(3))) / 2
    assert trainer.on_candidates(q, k, r).item() == pytest.approx(total, abs=1e-12)
    mean_of_losses = -(torch.from_numpy(prior) * r[1]).sum().item()
    assert trainer.on_candidates(q[1:], k[1:], r[1:]).item() < mean_of_losses, "probabilities are added, not losses"
    padded = torch.cat([r, torch.full((2, 1), -torch.inf, dtype=torch.float64)], 1)
    more = torch.cat([k, torch.zeros(2, 1, 5, dtype=torch.float64)], 1)
    loss = trainer.on_candidates(q, more, padded)
    assert loss.item() == pytest.approx(total, abs=1e-12)
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(loss, (q, k)))


def test_identical_demonstrations_with_one_likelihood_give_the_plain_loss():
    trainer = build("trainer", "demo-retrieval-meta", toy_pairs())
    k = rand(1, 1, 5, seed=1).expand(1, 4, 5)
    r = torch.full((1, 4), -1.7, dtype=torch.float64)
    assert trainer.on_candidates(rand(1, 5), k, r).item() == pytest.approx(1.7, abs=1e-12)


def test_the_question_moves_to_demonstrations_that_help_and_the_bank_stays(tmp_path):
    pairs = toy_pairs()
    student = Student.new([*pairs.queries, *pairs.passages], width=16, layers=1, heads=2, vocabulary=330)
    start = student.encode(pairs.passages)
    trainer = build("trainer", "demo-retrieval-meta:candidates=4", pairs)
    train(student, trainer, Training(steps=30, batch=12, lr=2e-3), out=tmp_path / "e")
    assert np.array_equal(trainer.bank.encode(pairs.passages), start)
    assert not np.allclose(student.encode(pairs.passages), start, atol=1e-2)
    assert np.allclose(Student.open(tmp_path / "e" / "bank").encode(pairs.passages), start, atol=1e-6)
    q, k = rand(1, 5), rand(1, 2, 5, seed=1)
    r = torch.tensor([[0.0, -9.0]], dtype=torch.float64)
    g = torch.autograd.grad(trainer.on_candidates(q, k, r), q)[0][0]
    better = F.cosine_similarity(q - 0.01 * g, k[:, 0]) - F.cosine_similarity(q - 0.01 * g, k[:, 1])
    assert better > F.cosine_similarity(q, k[:, 0]) - F.cosine_similarity(q, k[:, 1])


BANK = [Labelled("colour", f"the {n} is {c}", c) for n in ("fox", "sea", "sun", "oak") for c in ("red", "blue")]


def test_demonstrations_stand_with_their_answers_most_similar_last_and_without_the_item_itself():
    rank = BM25.build([b.text for b in BANK]).search
    items = [Labelled("colour", "The  fox is red", "red"), Labelled("animal", "which sea", "none")]
    chats = demonstrations(items, BANK, rank, 2)
    assert BANK[0].text not in chats[0]["messages"][0]["content"].split("\n\n")[:2], "it equals the item"
    first = chats[0]["demonstrations"]
    assert 0 not in first and len(first) == 2
    content = chats[0]["messages"][0]["content"]
    assert content == f"{BANK[first[1]].shown()}\n\n{BANK[first[0]].shown()}\n\nThe  fox is red\nAnswer:"
    assert chats[0]["messages"][1] == {"role": "assistant", "content": "red"}
    assert "Answer: " in content and chats[1]["demonstrations"][0] in (2, 3)


def test_a_bank_that_holds_a_test_item_is_refused():
    rank = BM25.build([b.text for b in BANK]).search
    with pytest.raises(UserError, match="holds 1 test items"):
        demonstrations([Labelled("x", "THE fox  is red", "red")], BANK, rank, testing=True)
    chats = demonstrations([Labelled("x", "a green fox", "green")], BANK, rank, 2, testing=True)
    assert len(chats[0]["messages"]) == 1, "the answer is not shown"
