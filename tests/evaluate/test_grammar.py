"""Exact next-token probabilities of grammars against enumeration of every sentence."""

import numpy as np
import pytest

from modicum.evaluate import grammar


@pytest.fixture(scope="module")
def small():
    return grammar.random_grammar(3, depth=2, symbols=2, vocabulary=3, rules=2, labels=2, lengths=(1, 2))


def test_sentences_sum_to_one_and_inside_gives_each(small):
    for labels in small.labels():
        every = grammar.sentences(small, labels)
        assert sum(every.values()) == pytest.approx(1) and len(every) < 200
        for text, p in every.items():
            assert small.joint(list(text), labels)[len(text), -1] == pytest.approx(p, rel=1e-12)
            assert small.probability(list(text), labels) == pytest.approx(p, rel=1e-12)
        assert small.probability([0] * 9, labels) == 0


@pytest.mark.parametrize("known", [True, False])
def test_next_token_against_enumeration(small, known):
    """Given the labels, and marginalised over all of them: not the mean of the conditionals, but of the joints."""
    labels = small.labels()[1]
    worlds = [labels] if known else small.labels()
    every = [grammar.sentences(small, one) for one in worlds]
    text = list(max(every[0], key=lambda t: (len(t), t)))
    given = small.next_token(text, labels if known else None)
    for t in range(len(text) + 1):
        prefix = tuple(text[:t])
        weight = np.zeros(4)
        for world in every:
            for other, p in world.items():
                if other[:t] == prefix:
                    weight[other[t] if len(other) > t else 3] += p
        assert np.allclose(given[t], weight / weight.sum(), atol=1e-12), t
    nats = small.nats(text, labels if known else None)
    whole = np.mean([world.get(tuple(text), 0.0) for world in every])
    assert nats.sum() == pytest.approx(-np.log(whole))


def test_posterior_of_labels(small):
    text = small.sample(np.random.default_rng(0))[0][:1]
    given = small.posterior(text)
    weights = {
        one: sum(p for t, p in grammar.sentences(small, one).items() if list(t[:1]) == text) for one in small.labels()
    }
    whole = sum(weights.values())
    assert given == pytest.approx({k: v / whole for k, v in weights.items()})


def test_samples_follow_the_rules(small):
    rng = np.random.default_rng(0)
    labels = small.labels()[0]
    every = grammar.sentences(small, labels)
    drawn = [tuple(small.sample(rng, labels)[0]) for _ in range(4000)]
    for text, p in sorted(every.items(), key=lambda kv: -kv[1])[:5]:
        assert drawn.count(text) / 4000 == pytest.approx(p, abs=4 * np.sqrt(p / 4000))
    pairs = [small.sample(rng)[1] for _ in range(2000)]
    assert {p: pairs.count(p) for p in set(pairs)} == pytest.approx(dict.fromkeys(small.labels(), 500), abs=90)
    assert grammar.random_grammar(5) == grammar.random_grammar(5) != grammar.random_grammar(6)


def test_the_best_model_beats_others(small):
    """The mean of the exact loss is the entropy: no other next-token distribution scores lower."""
    rng = np.random.default_rng(1)
    exact, other = [], []
    wrong = grammar.random_grammar(3, depth=2, symbols=2, vocabulary=3, rules=2, labels=2, lengths=(1, 2))
    for _ in range(60):
        text, _ = small.sample(rng)
        exact.append(small.nats(text).sum())
        flattened = 0.9 * wrong.next_token(text) + 0.1 / 4
        other.append(-np.log(flattened[np.arange(len(text) + 1), [*text, 3]]).sum())
    assert np.mean(exact) < np.mean(other)
    with pytest.raises(ValueError, match="cannot yield"):
        small.posterior([0] * 40)
