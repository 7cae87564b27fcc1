"""Probabilistic grammars of fixed depth, with their exact next-token probabilities: what the best model scores.

A grammar has D levels. A symbol of level d is rewritten by one of its rules as a few symbols of level d + 1, those of
the last level are the vocabulary. Which rules a level uses may depend on a label: each level has several sets of
rules, the labels are drawn independently, and the tuple of labels is the document's hidden meaning.

For a sentence w the inside algorithm gives I_A[i, j] = P(A yields w_i .. w_{j-1}), and for prefixes

    N_A[i, t, a] = P(A yields something that begins with w_i .. w_{t-1} a)
                 = sum over rules A -> B C ..  p (N_B[i, t, a] + sum_j I_B[i, j] N_C[j, t, a] + ...)

whence P(a | w_0 .. w_{t-1}) at every t at once, and the end of the sentence as one more token. Everything is float64.
(Lari & Young 1990 for inside; Jelinek & Lafferty 1991 for prefixes.)
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Rule = tuple[float, tuple[int, ...]]
Rules = dict[int, list[Rule]]  # by symbol


@dataclass(frozen=True)
class Grammar:
    """levels[d][k]: the rules of level d under label k. vocabulary: symbols of the last level."""

    levels: tuple[tuple[Rules, ...], ...]
    vocabulary: int
    label_counts: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "label_counts", tuple(len(sets) for sets in self.levels))

    def labels(self) -> list[tuple[int, ...]]:
        """Every tuple of labels, equally probable."""
        return list(itertools.product(*map(range, self.label_counts)))

    def sample(
        self, rng: np.random.Generator, labels: tuple[int, ...] | None = None
    ) -> tuple[list[int], tuple[int, ...]]:
        """A sentence and its labels."""
        labels = tuple(int(rng.integers(n)) for n in self.label_counts) if labels is None else labels
        symbols = [0]
        for sets, label in zip(self.levels, labels, strict=True):
            grown: list[int] = []
            for symbol in symbols:
                rules = sets[label][symbol]
                grown += rules[int(rng.choice(len(rules), p=[p for p, _ in rules]))][1]
            symbols = grown
        return symbols, labels

    def joint(self, sentence: list[int], labels: tuple[int, ...]) -> np.ndarray:
        """P(w_0 .. w_{t-1} a) for every t from 0 to n and every a, the end as the last column; (n + 1) x (V + 1)."""
        n, v = len(sentence), self.vocabulary
        inside: dict[int, np.ndarray] = {}
        ahead: dict[int, np.ndarray] = {}
        for a in range(v):
            own = np.zeros((n + 1, n + 1))
            own[np.arange(n), np.arange(n) + 1] = np.array(sentence) == a
            starts = np.zeros((n + 1, n + 1, v))
            starts[np.arange(n + 1), np.arange(n + 1), a] = 1
            inside[a], ahead[a] = own, starts
        for sets, label in zip(reversed(self.levels), reversed(labels), strict=True):
            new_inside, new_ahead = {}, {}
            for symbol, rules in sets[label].items():
                total, first = np.zeros((n + 1, n + 1)), np.zeros((n + 1, n + 1, v))
                for p, children in rules:
                    done = p * np.eye(n + 1)
                    for child in children:
                        first += np.einsum("ij,jta->ita", done, ahead[child])
                        done = done @ inside[child]
                    total += done
                new_inside[symbol], new_ahead[symbol] = total, first
            inside, ahead = new_inside, new_ahead
        return np.concatenate([ahead[0][0], inside[0][0][:, None]], axis=1)

    def probability(self, sentence: list[int], labels: tuple[int, ...]) -> float:
        """P(the whole sentence | labels), by the inside algorithm alone."""
        n = len(sentence)
        inside = {a: np.diag(np.array(sentence) == a, 1).astype(float) for a in range(self.vocabulary)}
        for sets, label in zip(reversed(self.levels), reversed(labels), strict=True):
            above = {}
            for symbol, rules in sets[label].items():
                above[symbol] = np.zeros((n + 1, n + 1))
                for p, children in rules:
                    above[symbol] += p * functools.reduce(np.matmul, (inside[child] for child in children))
            inside = above
        return float(inside[0][0, n])

    def next_token(self, sentence: list[int], labels: tuple[int, ...] | None = None) -> np.ndarray:
        """P(next | what stands before) at every place, (n + 1) x (V + 1): given the labels, or over all of them."""
        every = [labels] if labels is not None else self.labels()
        total = sum((self.joint(sentence, one) for one in every), np.zeros((len(sentence) + 1, self.vocabulary + 1)))
        total = total / len(every)
        mass = total.sum(1, keepdims=True)
        if (mass[: len(sentence)] <= 0).any():
            raise ValueError(f"the grammar cannot yield {sentence[: int(np.argmax(mass[:, 0] <= 0))]}")
        fraction: np.ndarray = total / np.where(mass > 0, mass, 1)
        return fraction

    def nats(self, sentence: list[int], labels: tuple[int, ...] | None = None) -> np.ndarray:
        """-log P of every token and of the end: the loss of the best possible model, n + 1 values."""
        fraction = self.next_token(sentence, labels)
        loss: np.ndarray = -np.log(fraction[np.arange(len(sentence) + 1), [*sentence, self.vocabulary]])
        return loss

    def posterior(self, prefix: list[int]) -> dict[tuple[int, ...], float]:
        """P(labels | the sentence begins so)."""
        weights = {one: float(self.joint(prefix, one)[len(prefix)].sum()) for one in self.labels()}
        whole = sum(weights.values())
        if whole <= 0:
            raise ValueError(f"the grammar cannot yield a sentence that begins with {prefix}")
        return {one: w / whole for one, w in weights.items()}


def random_grammar(
    seed: int,
    *,
    depth: int = 3,
    symbols: int = 4,
    vocabulary: int = 10,
    rules: int = 2,
    labels: int = 2,
    lengths: tuple[int, ...] = (2, 3),
) -> Grammar:
    """A grammar drawn from a seed: each symbol has `rules` rules of the given lengths in every one of `labels` sets."""
    rng = np.random.default_rng(seed)
    levels = []
    for level in range(depth):
        above, below = 1 if level == 0 else symbols, vocabulary if level == depth - 1 else symbols
        sets: list[Rules] = []
        for _ in range(labels):
            chosen: Rules = {}
            for symbol in range(above):
                weights = rng.dirichlet([3.0] * rules)
                shapes: set[tuple[int, ...]] = set()
                while len(shapes) < rules:
                    shapes.add(tuple(int(v) for v in rng.integers(below, size=int(rng.choice(lengths)))))
                chosen[symbol] = list(zip(weights.tolist(), sorted(shapes), strict=True))
            sets.append(chosen)
        levels.append(tuple(sets))
    return Grammar(tuple(levels), vocabulary)


def sentences(grammar: Grammar, labels: tuple[int, ...]) -> dict[tuple[int, ...], float]:
    """Every sentence and its probability, by enumeration: for small grammars, and tests."""
    distribution: dict[tuple[int, ...], float] = {(0,): 1.0}
    for sets, label in zip(grammar.levels, labels, strict=True):
        grown: dict[tuple[int, ...], float] = {}
        for symbols, p in distribution.items():
            for picked in itertools.product(*(sets[label][s] for s in symbols)):
                text = tuple(c for _, children in picked for c in children)
                grown[text] = grown.get(text, 0.0) + p * float(np.prod([q for q, _ in picked]))
        distribution = grown
    return distribution


def describe(grammar: Grammar) -> dict[str, Any]:
    """Counts, for records."""
    return {"depth": len(grammar.levels), "labels": grammar.label_counts, "vocabulary": grammar.vocabulary}
