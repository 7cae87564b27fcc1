"""What holds for any trainer: batches by (seed, step), gradients, a falling loss, exact resume, a folder that opens."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch

from modicum.core import registry
from modicum.core.errors import UserError
from modicum.retrieve.bm25 import BM25
from modicum.retrieve.encoders import make_encoder
from modicum.retrieve.pairs import Pairs, max_sim, with_negatives, with_scores
from modicum.retrieve.student import Student
from modicum.retrieve.trainers import RetrieverTrainer
from modicum.retrieve.training import Training, named, train

NOUNS = ("socket", "thread", "file", "queue", "parser", "matrix")
VERBS = ("open", "close", "read", "write", "lock", "merge")
SMALL = Training(steps=8, batch=6, lr=1e-3, checkpoint_every=3)


def toy_pairs(teachers: bool = True) -> Pairs:
    """36 queries about 36 passages, negatives by BM25, BM25 as teacher, its token vectors by MaxSim as late one."""
    queries = [f"how to {verb} one {noun}" for noun in NOUNS for verb in VERBS]
    passages = [f"To {verb} a {noun} call {verb}_{noun} with the {noun}." for noun in NOUNS for verb in VERBS]
    bm25 = BM25.build(passages)
    pairs = Pairs(queries, passages, np.arange(36), articles_Q=[n for n in NOUNS for _ in VERBS])
    pairs = with_negatives(pairs, bm25.search, 6)
    if not teachers:
        return pairs
    row = {text: i for i, text in enumerate(passages)}
    pairs = with_scores(pairs, lambda q, texts: bm25.scores(q)[[row[t] for t in texts]].tolist())
    words = sorted({w for t in (*queries, *passages) for w in t.lower().split()})
    table = dict(zip(words, 0.35 * np.random.default_rng(0).standard_normal((len(words), 8)), strict=True))
    states = [[np.stack([table[w] for w in t.lower().split()]) for t in texts] for texts in (queries, passages)]

    def late(query_B: np.ndarray, rows_P: np.ndarray) -> np.ndarray:
        return np.stack([max_sim(states[0][q], [states[1][r] for r in rows_P]) for q in query_B])

    return Pairs(**{**vars(pairs), "late": late})


def _student(seed: int = 0) -> Student:
    pairs = toy_pairs(False)
    return Student.new([*pairs.queries, *pairs.passages], width=16, layers=2, heads=2, vocabulary=330, seed=seed)


def _trainer(key: str, pairs: Pairs | None = None) -> RetrieverTrainer:
    loaded = registry.load("trainer", key)
    return loaded.cls(getattr(loaded.module, "TOY", None) or loaded.config(), pairs or toy_pairs())


def check_batches_depend_on_seed_and_step_alone(key: str) -> None:
    one, two = _trainer(key), _trainer(key)
    for trainer in (one, two):
        trainer.prepare(_student())
    seen = []
    for step in (5, 0, 5, 1):
        a, b = one.batch(step, 6, 3), two.batch(step, 6, 3)
        assert all(np.array_equal(x, y) for x, y in zip(vars(a).values(), vars(b).values(), strict=True))
        assert len(set(a.query_B.tolist())) == len(a.query_B) <= 6, "a query stands in a batch once"
        assert (a.positive_B == one.pairs.positive_Q[a.query_B]).all()
        assert all(n in one.pairs.negatives_Q[q] for q, n in zip(a.query_B, a.negative_B, strict=True))
        seen.append(a.query_B.tolist())
    assert seen[0] == seen[2] and seen[0] != seen[1] != seen[3], "steps differ"
    assert one.batch(0, 6, 4).query_B.tolist() != seen[1], "seeds differ"


def check_every_parameter_that_is_used_gets_a_gradient(key: str) -> None:
    student, trainer = _student(), _trainer(key)
    trainer.prepare(student)
    loss = sum((trainer.loss(student, trainer.batch(s, 6, 0)) for s in range(6)), torch.zeros(()))
    assert loss.ndim == 0 and torch.isfinite(loss)
    loss.backward()
    parameters = dict(named(student, trainer))
    trained = {n: p for n, p in parameters.items() if p.requires_grad}
    without = [n for n, p in trained.items() if p.grad is None or not torch.isfinite(p.grad).all()]
    assert trained and not without, f"no finite gradient for {without}"
    assert all(p.grad is None for p in parameters.values() if not p.requires_grad), "what is frozen gets none"


def check_the_loss_falls(key: str) -> None:
    student, trainer = _student(), _trainer(key)
    trainer.prepare(student)

    def mean() -> float:
        with torch.no_grad():
            return float(np.mean([float(trainer.loss(student, trainer.batch(s, 12, 9))) for s in range(6)]))

    before = mean()
    train(student, trainer, Training(steps=40, batch=12, lr=2e-3))
    assert mean() < 0.9 * before, f"{before} before, {mean()} after 40 steps"


def check_an_interrupted_run_goes_on_to_equal_weights(key: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        whole = _student()
        train(whole, _trainer(key), SMALL, out=Path(folder) / "whole")
        train(_student(), _trainer(key), SMALL, out=Path(folder) / "cut", stop_after=4)
        assert not (Path(folder) / "cut").exists(), "what is not finished has no folder"
        again = _student()
        result = train(again, _trainer(key), SMALL, out=Path(folder) / "cut")
        assert result.resumed_from == 3 and result.steps == 8
        pairs = zip(whole.parameters(), again.parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs), "the resumed run has other weights"


def check_the_folder_opens_as_an_encoder(key: str) -> None:
    student, trainer = _student(), _trainer(key)
    with tempfile.TemporaryDirectory() as folder:
        train(student, trainer, SMALL, out=Path(folder) / "encoder")
        encoder = make_encoder(f"sentence-transformers:model={folder}/encoder,unit=false")
        texts = list(trainer.pairs.queries[:5])
        assert np.allclose(encoder.encode(texts), student.encode(texts), atol=1e-5)


def check_what_is_needed_is_asked_for(key: str) -> None:
    needs = registry.load("trainer", key).cls.needs
    try:
        _trainer(key, toy_pairs(teachers=False))
    except UserError as error:
        assert needs, f"declares no needs, but refuses pairs without teachers: {error}"
    else:
        assert not needs, f"declares {set(needs)} and takes pairs without them"
