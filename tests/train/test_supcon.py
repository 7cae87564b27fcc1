"""supcon and mixup against loops in float64, and at the ends where they are the plain loss."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from modicum.data.stream import Batch
from modicum.model.config import llama_like
from modicum.model.decoder import Decoder
from modicum.train.loss import token_loss
from modicum.train.objectives import Step, mixup, supcon
from modicum.train.objectives._answers import answers

IGNORE = -100


def batch() -> Batch:
    """Two rows of examples of four tokens: question of three, an answer of one or two; the classes are the answers."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(20, 60, (2, 25), generator=generator)
    targets = torch.full((2, 24), IGNORE)
    documents = torch.arange(24).expand(2, 24) // 4
    kinds = [[(5, 6), (5, 7), (5, 6), (8,), (8,), (5, 6)], [(5, 6), (8,), (5, 7), (9,), (9,), (8, 6)]]
    for b, row in enumerate(kinds):
        for k, answer in enumerate(row):
            at = 4 * k + (2 if len(answer) == 2 else 3)
            targets[b, at : at + len(answer)] = torch.tensor(answer)
    positions = (torch.arange(24) % 4).expand(2, 24)
    return Batch(tokens[:, :-1].contiguous(), targets, documents.contiguous(), positions.contiguous())


def decoder() -> Decoder:
    return Decoder(llama_like(61, 32, 2), torch.Generator().manual_seed(0)).double()


def examples(b: Batch) -> list[list[tuple[int, tuple[int, ...]]]]:
    """Of each row, (place of the answer's first prediction, answer)."""
    rows = []
    assert b.documents_BT is not None
    for targets, documents in zip(b.targets_BT.tolist(), b.documents_BT.tolist(), strict=True):
        row = []
        for d in sorted(set(documents)):
            at = [i for i, t in enumerate(targets) if documents[i] == d and t != IGNORE]
            row.append((at[0], tuple(targets[i] for i in at)))
        rows.append(row)
    return rows


def test_answers_are_where_questions_end() -> None:
    b = batch()
    of, expected = answers(b), examples(b)
    assert of.first_A.tolist() == [24 * r + at for r, row in enumerate(expected) for at, _ in row]
    assert of.row_A.tolist() == [r for r, row in enumerate(expected) for _ in row]
    texts = [answer for row in expected for _, answer in row]
    for i, a in enumerate(texts):
        assert [texts[j] == a for j in range(len(texts))] == (of.label_A == of.label_A[i]).tolist()


def test_the_contrastive_term_is_the_papers() -> None:
    b, model = batch(), decoder()
    h = model.hidden(b.tokens_BT, positions_BT=b.positions_BT, documents_BT=b.documents_BT).detach()
    total = 0.0
    for r, row in enumerate(examples(b)):
        z = [(h[r, at] / h[r, at].norm()).tolist() for at, _ in row]
        s = [[sum(x * y for x, y in zip(u, v, strict=True)) / 0.1 for v in z] for u in z]
        for i, (_, answer) in enumerate(row):
            alike = [p for p, (_, other) in enumerate(row) if p != i and other == answer]
            below = math.log(sum(math.exp(s[i][a]) for a in range(len(row)) if a != i))
            if alike:
                total -= sum(s[i][p] - below for p in alike) / len(alike)
    objective = supcon.SupCon(supcon.Config(weight=0.5, temperature=0.1))
    loss, plain = objective.loss(model, b, Step()), token_loss(model, b)
    assert float(loss.metrics["contrast"]) == pytest.approx(total, rel=1e-4)
    assert float(loss.total.detach()) == pytest.approx(float(plain[0]) + 0.5 * total, rel=1e-4)
    assert int(loss.count) == int(plain[1]) and int(loss.metrics["anchors"]) == 3 + 2 + 2


def test_alike_questions_come_together() -> None:
    def spread(weight: float) -> float:
        b, model = batch(), decoder().float()
        objective = supcon.SupCon(supcon.Config(weight=weight))
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        for index in range(15):
            loss = objective.loss(model, b, Step(index=index))
            (loss.total / loss.count).backward()
            optimizer.step()
            optimizer.zero_grad()
        return float(supcon.SupCon(supcon.Config()).loss(model, b, Step()).metrics["contrast"])

    assert spread(1.0) < 0.8 * spread(0.0)


def mix(model: Any, b: Batch, partner: torch.Tensor, fraction: float) -> tuple[float, int]:
    h = model.hidden(b.tokens_BT, positions_BT=b.positions_BT, documents_BT=b.documents_BT)
    total, count = mixup.mixed(h, b.targets_BT, model.head, answers(b).first_A, partner, fraction)
    return float(total), int(count)


def test_mixing_nothing_is_the_plain_loss_and_a_third_is_a_third() -> None:
    b, model = batch(), decoder()
    of = answers(b)
    partner = mixup.partners(of.row_A, np.random.default_rng(3))
    assert torch.equal(of.row_A[partner], of.row_A) and sorted(partner.tolist()) == list(range(len(partner)))
    assert not torch.equal(partner, torch.arange(len(partner)))
    plain = token_loss(model, b)
    for fraction in (0.0, 1.0):  # of all examples together either end is every example once
        assert mix(model, b, partner, fraction) == (pytest.approx(float(plain[0]), rel=1e-6), int(plain[1]))

    h = model.hidden(b.tokens_BT, positions_BT=b.positions_BT, documents_BT=b.documents_BT).detach().flatten(0, 1)
    targets, firsts, total = b.targets_BT.flatten(), of.first_A.tolist(), 0.0
    for i, p in zip(firsts, [firsts[j] for j in partner.tolist()], strict=True):
        logp = torch.log_softmax(model.head((h[i] + 2 * h[p]) / 3), -1)
        total -= float(logp[targets[i]] + 2 * logp[targets[p]]) / 3
    for i in (k for k, t in enumerate(targets.tolist()) if t != IGNORE and k not in firsts):
        total -= float(torch.log_softmax(model.head(h[i]), -1)[targets[i]])
    assert mix(model, b, partner, 1 / 3) == (pytest.approx(total, rel=1e-5), int(plain[1]))


def test_partners_change_from_step_to_step_and_repeat() -> None:
    b, model, objective = batch(), decoder(), mixup.Mixup(mixup.Config())
    losses = [float(objective.loss(model, b, Step(index=i, seed=1)).total.detach()) for i in (0, 1, 0)]
    assert losses[0] == losses[2] != losses[1]
