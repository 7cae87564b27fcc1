"""prop: the document's model in float64, the frequencies of what is drawn, the preferred set, what is learnt."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

from modicum.core.registry import build
from modicum.retrieve.pairs import Pairs
from modicum.retrieve.student import Student
from modicum.retrieve.trainers._conformance import toy_pairs
from modicum.retrieve.trainers._masking import drawn_mask
from modicum.retrieve.trainers.prop import TOY, Config, DocumentModels
from modicum.retrieve.training import Training, train

TEXTS = ["red red red fox in the snow", "the blue whale in the sea", "the green frog and the fox", "a snow fox"]


def test_the_documents_model_is_the_formula_and_sums_to_one():
    models = DocumentModels(TEXTS, least=1)
    tokens = [t.split() for t in TEXTS]
    tokens = [[w for w in t if len(w) > 1] for t in tokens]
    df = Counter(w for t in tokens for w in set(t))
    mu = np.mean([len(t) for t in tokens])
    for row, t in enumerate(tokens):
        for w, i in models.number.items():
            background = df[w] / sum(df.values())  # of documents, not of occurrences
            expected = (t.count(w) + mu * background) / (len(t) + mu)
            assert models.probability(row)[i] == pytest.approx(expected, abs=1e-15)
        assert models.probability(row).sum() == pytest.approx(1, abs=1e-12)
    assert DocumentModels(TEXTS, least=2).words == ["fox", "in", "red", "snow", "the"]


def test_draws_have_the_models_frequencies_and_both_sets_one_length():
    models = DocumentModels(TEXTS, least=1)
    rng = np.random.default_rng(0)
    drawn: Counter[str] = Counter()
    lengths = Counter()
    config = Config(least=1, thin=0.05, support=500)
    for _ in range(8000):
        if (both := models.two_sets(0, config, rng)) is not None:
            assert len(both[0]) == len(both[1]) > 0
            lengths[len(both[0])] += 1
    # All sets, those that tie included, so that the draw itself is judged.
    p = models.probability(0) * models.kept(0.05)
    p /= p.sum()
    for _ in range(20000):
        words = models.support(0, 500, rng)
        keep = models.probability(0, words) * models.kept(0.05)[words]
        drawn[models.words[words[rng.choice(len(words), p=keep / keep.sum())]]] += 1
    for w, i in models.number.items():
        assert drawn[w] / 20000 == pytest.approx(p[i], abs=0.015)
    assert lengths[3] / lengths[5] == pytest.approx((3**3 / 6) / (3**5 / 120), rel=0.3)
    assert models.kept(0.05)[models.number["the"]] < 1 == models.kept(0.05)[models.number["whale"]]


def test_the_preferred_set_is_the_more_likely_one_by_the_whole_model():
    models = DocumentModels(TEXTS, least=1)
    rng = np.random.default_rng(1)
    for _ in range(200):
        both = models.two_sets(1, Config(least=1, thin=0.02, support=6), rng)
        if both is not None:
            p = models.probability(1)
            score = [sum(np.log(p[models.number[w]]) for w in words) for words in both]
            assert score[0] > score[1]


def test_the_support_is_the_documents_words_and_random_others():
    models = DocumentModels(TEXTS, least=1)
    rng = np.random.default_rng(0)
    own = set(models.counts_N[3])
    seen = {tuple(sorted(set(models.support(3, 5, rng).tolist()) - own)) for _ in range(40)}
    assert all(len(others) == 5 - len(own) for others in seen) and len(seen) > 5
    assert set(models.support(3, 2, rng).tolist()) == own


def test_masks_hide_words_alone_and_always_one():
    rng = np.random.default_rng(0)
    words = rng.random((40, 12)) < 0.5
    words[0] = False
    mask = drawn_mask(words, 0.15, rng)
    assert not (mask & ~words).any() and (mask.any(1) == words.any(1)).all()
    many = drawn_mask(np.ones((200, 200), bool), 0.15, rng)
    assert many.mean() == pytest.approx(0.15, abs=0.01)


def planted() -> Pairs:
    """Documents of one topic's words each: word sets of the topic represent them."""
    rng = np.random.default_rng(0)
    topics = [[f"{c}{v}{d}" for v in "aeiou" for d in "mnr"] for c in "bdgkp"]
    texts = [" ".join(rng.choice(topics[i % 5], 14)) for i in range(60)]
    return Pairs(texts[:30], texts, np.arange(30), [np.array([i + 30]) for i in range(30)])


def test_preferences_of_planted_documents_are_learnt():
    pairs = planted()
    student = Student.new(pairs.passages, width=32, layers=2, heads=2, vocabulary=360, max_tokens=48)
    trainer = build("trainer", {"method": "prop", "least": 1, "thin": 1.0}, pairs)
    train(student, trainer, Training(steps=200, batch=12, lr=2e-3))
    rng, right, count = np.random.default_rng(5), 0, 0
    with torch.no_grad():
        while count < 150:
            row = int(rng.integers(60))
            both = trainer.models.two_sets(row, trainer.config, rng)
            likely = trainer.models.probability(row)
            score = [np.log(likely[[trainer.models.number[w] for w in s]]).sum() for s in both or ()]
            if both is not None and score[0] - score[1] > 2:  # where the two clearly differ
                p, _ = trainer.read(student, [" ".join(s) for s in both], [pairs.passages[row]] * 2, rng)
                right, count = right + int(p[0] > p[1]), count + 1
    assert right / count > 0.8


def test_the_loss_is_the_hinge_of_preferences_and_the_masked_words():
    pairs = toy_pairs()
    trainer = build("trainer", {"method": "prop", "least": 1, "thin": 1.0}, pairs)
    student = Student.new([*pairs.queries, *pairs.passages], width=16, layers=1, heads=2, vocabulary=330)
    trainer.prepare(student)
    seen = {}

    def read(student, sets, documents, rng):
        seen["sets"], seen["documents"] = list(sets), list(documents)
        n = len(sets) // 2
        return torch.tensor([0.4] * n + [0.1] * n), torch.tensor(2.0)

    trainer.read = read
    loss = trainer.loss(student, trainer.batch(0, 6, 0))
    assert loss.item() == pytest.approx(1 - 0.4 + 0.1 + 2.0)
    n = len(seen["sets"]) // 2
    assert seen["documents"][:n] == seen["documents"][n:]
    p = trainer.models
    for better, worse, text in zip(seen["sets"][:n], seen["sets"][n:], seen["documents"], strict=False):
        row = pairs.passages.index(text)
        score = [sum(np.log(p.probability(row)[p.number[w]]) for w in s.split()) for s in (better, worse)]
        assert score[0] > score[1], "the preferred sets come first"


def test_after_its_steps_it_is_in_batch_training():
    pairs = toy_pairs()
    trainer = build("trainer", {"method": "prop", "least": 1, "thin": 1.0, "steps": 2}, pairs)
    student = Student.new([*pairs.queries, *pairs.passages], width=16, layers=1, heads=2, vocabulary=330)
    trainer.prepare(student)
    plain = build("trainer", "in-batch", pairs)
    batch = trainer.batch(2, 6, 0)
    assert torch.equal(trainer.loss(student, batch), plain.loss(student, batch))
    assert not torch.equal(trainer.loss(student, trainer.batch(1, 6, 0)), plain.loss(student, plain.batch(1, 6, 0)))
    assert TOY.steps == 0
