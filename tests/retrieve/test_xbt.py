"""xbt: a rotated world is recovered, the projection begins as Procrustes, the criterion is against the old encoder."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from modicum.core.errors import UserError
from modicum.core.registry import build
from modicum.retrieve.compatible import Projection, negative_flips, procrustes
from modicum.retrieve.encoders import make_encoder, unit
from modicum.retrieve.student import Student
from modicum.retrieve.trainers._conformance import toy_pairs
from modicum.retrieve.training import Training, train

RNG = np.random.default_rng(0)


def student() -> Student:
    pairs = toy_pairs(False)
    return Student.new([*pairs.queries, *pairs.passages], width=16, layers=1, heads=2, vocabulary=330)


def test_a_rotation_is_recovered_exactly():
    q, _ = np.linalg.qr(RNG.standard_normal((8, 8)))
    old = unit(RNG.standard_normal((60, 8)).astype(np.float32)).astype(np.float64)
    new = old @ q
    w = procrustes(new, old)
    assert np.allclose(w, q, atol=1e-9) and np.allclose(new @ w.T, old, atol=1e-9)
    noisy = procrustes(new + 0.01 * RNG.standard_normal(new.shape), old)
    assert np.abs(noisy - q).max() < 0.05
    wide = procrustes(np.hstack([new, np.zeros((60, 3))]), old)
    assert wide.shape == (8, 11) and np.allclose(wide @ wide.T, np.eye(8), atol=1e-9)


def test_the_projection_is_its_formula_and_begins_linear():
    phi = Projection(6, 4, 5)
    x = torch.from_numpy(RNG.standard_normal((3, 6)).astype(np.float32))
    w = RNG.standard_normal((4, 6)).astype(np.float32)
    phi.begin(w)
    assert torch.allclose(phi(x), F.normalize(F.normalize(x, dim=-1) @ torch.from_numpy(w).T, dim=-1), atol=1e-6)
    with torch.no_grad():
        phi.up.weight.normal_()
        y = F.normalize(x, dim=-1)
        expected = y @ phi.linear.weight.T + torch.tanh(y @ phi.down.weight.T + phi.down.bias) @ phi.up.weight.T
        assert torch.allclose(phi(x), F.normalize(expected, dim=-1), atol=1e-6)
        assert torch.allclose(phi(7 * x), phi(x), atol=1e-6)


def test_the_first_stage_sees_no_passage_and_the_second_old_vectors_of_them():
    pairs = toy_pairs()
    made = student()
    trainer = build("trainer", "xbt:old=lsa:dims=12,hidden=8,steps=2,temperature=0.3", pairs)
    trainer.prepare(made)
    passages = trainer.old_passages_PE.copy()
    first, later = trainer.batch(1, 5, 0), trainer.batch(2, 5, 0)
    before = trainer.loss(made, first).item(), trainer.loss(made, later).item()
    trainer.old_passages_PE = np.zeros_like(passages)
    assert trainer.loss(made, first).item() == before[0] and trainer.loss(made, later).item() != before[1]
    trainer.old_passages_PE = passages
    q = trainer.project(made, [pairs.queries[i] for i in first.query_B])
    old = trainer.old_queries_QE[first.query_B]
    assert before[0] == pytest.approx(np.mean([1 - a @ b for a, b in zip(q, old, strict=True)]), abs=1e-5)
    q = trainer.project(made, [pairs.queries[i] for i in later.query_B])
    keys = passages[[*later.positive_B, *later.negative_B]]
    total = [np.log(np.exp(q[i] @ keys.T / 0.3).sum()) - q[i] @ keys[i] / 0.3 for i in range(5)]
    assert before[1] == pytest.approx(np.mean(total), abs=1e-4)


def test_new_queries_search_the_old_index(tmp_path):
    """The same words through another encoder: after training they reach the old vectors nearly as old queries do."""
    pairs = toy_pairs()
    made = student()
    train(made, build("trainer", "in-batch", pairs), Training(steps=80, batch=12, lr=2e-3))  # a good new encoder
    weights = {n: p.clone() for n, p in made.named_parameters()}
    trainer = build("trainer", "xbt:old=lsa:dims=12,hidden=32", pairs)
    trainer.prepare(made)
    start = float(np.mean([trainer.loss(made, trainer.batch(s, 12, 1)).item() for s in range(3)]))
    train(made, trainer, Training(steps=150, batch=12, lr=5e-3), out=tmp_path / "x")
    assert all(torch.equal(p, weights[n]) for n, p in made.named_parameters()), "the new encoder is not changed"
    end = float(np.mean([trainer.loss(made, trainer.batch(s, 12, 1)).item() for s in range(3)]))
    assert end < 0.7 * start
    index = build("index", "exact")
    index.add(np.arange(36), trainer.old_passages_PE)
    encoder = make_encoder(f"xbt:model={tmp_path}/x")
    new = index.search(encoder.encode_queries(pairs.queries), 3).ids_QK
    assert np.array_equal(new, trainer.ranking(made, pairs.passages, pairs.queries, 3)[0].ids_QK)
    right = np.mean([q in rows for q, rows in enumerate(new)])
    old = np.mean([q in rows for q, rows in enumerate(index.search(trainer.old_queries_QE, 3).ids_QK)])
    assert right >= 0.8 * old > 0.5
    made.save(tmp_path / "plain")
    with pytest.raises(UserError, match=r"no xbt\.json"):
        make_encoder(f"xbt:model={tmp_path}/plain")


def test_flips_are_queries_that_were_right():
    assert negative_flips([True, True, False, False], [True, False, True, False]) == 0.25
