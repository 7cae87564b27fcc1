"""What a decoder makes of sentences whose grammar is known: its loss above the best possible one, and what it knows.

A sentence is a dict with `words`, `labels` (the hidden meaning, one integer per level) and `front` (text before it,
such as metadata or masks). `read` runs the decoder once over each; the rest is arithmetic on what it gives.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from modicum.data.tokenizer import Tokenizer

Sentence = dict[str, Any]


def sentence(doc: dict[str, Any], depth: int) -> Sentence:
    """That of a document of task `metadata-cfg` for a grammar of `depth` levels."""
    given = doc["prompt"].split()
    return {"front": " ".join(given[:depth]), "words": given[depth:] + doc["answer"].split(), "labels": doc["labels"]}


@dataclass(frozen=True)
class Reading:
    """Per sentence: the last hidden state behind every word (words x width), and nats of every word and of the end."""

    sentences: list[Sentence]
    states: list[np.ndarray]
    nats: list[np.ndarray]


@torch.no_grad()
def read(model: Any, tokenizer: Tokenizer, sentences: Sequence[Sentence], end: str = ".") -> Reading:
    """Run `front word word ... word.`; a word of several tokens counts as their sum, its state is the last's."""
    states, nats = [], []
    for sentence in sentences:
        parts = [sentence["front"], *(f" {word}" for word in sentence["words"]), end]
        tokens = [tokenizer.encode(part, add_special=False) for part in parts]
        ids = torch.tensor([[tokenizer.start_id, *(i for own in tokens for i in own)]])
        h_TD = model.hidden(ids)[0]
        nats_T = -model.head(h_TD[:-1]).float().log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        ends = np.cumsum([len(own) for own in tokens])  # ids begin with the start token: a part's last one is ids[end]
        states.append(h_TD[ends[1:-1]].float().numpy())
        nats.append(np.add.reduceat(nats_T.numpy(), ends[:-1]))
    return Reading(list(sentences), states, nats)


def gaps(reading: Reading, best: Sequence[np.ndarray], where: slice) -> float:
    """Mean nats per word above `best` (the grammar's own loss, `Grammar.nats`), over the words of `where`."""
    over = [(nats - own)[where] for nats, own in zip(reading.nats, best, strict=False)]
    return mean(over)


def label_accuracy(reading: Reading, where: slice, tested: int, ridge: float = 1.0) -> float:
    """How well a linear classifier reads the labels off the states of `where`: mean over levels.

    It is fitted on the sentences after the first `tested`, and scored on those.
    """
    right = []
    for level in range(len(reading.sentences[0]["labels"])):
        train_x, train_y = _rows(reading, where, level, slice(tested, None))
        test_x, test_y = _rows(reading, where, level, slice(0, tested))
        if len(train_y) and len(test_y):
            right.append(float((classify(train_x, train_y, test_x, ridge) == test_y).mean()))
    return float(np.mean(right)) if right else float("nan")


def _rows(reading: Reading, where: slice, level: int, part: slice) -> tuple[np.ndarray, np.ndarray]:
    states = [s[where] for s in reading.states[part]]
    labels = [sentence["labels"][level] for sentence in reading.sentences[part]]
    return np.concatenate(states), np.repeat(labels, [len(s) for s in states])


def classify(train_x: np.ndarray, train_y: np.ndarray, test_x: np.ndarray, ridge: float = 1.0) -> np.ndarray:
    """Labels of `test_x` by least squares on one-hot labels, inputs standardised, with an intercept."""
    centre, scale = train_x.mean(0), train_x.std(0) + 1e-6
    fit, test = (np.c_[(x - centre) / scale, np.ones(len(x))] for x in (train_x, test_x))
    kinds = np.unique(train_y)
    target = (train_y[:, None] == kinds).astype(float)
    weights = np.linalg.solve(fit.T @ fit + ridge * np.eye(fit.shape[1]), fit.T @ target)
    chosen: np.ndarray = kinds[(test @ weights).argmax(1)]
    return chosen


def mean(parts: Sequence[np.ndarray]) -> float:
    """Over all values of all parts; NaN where there are none."""
    values = np.concatenate(parts)
    return float(values.mean()) if len(values) else float("nan")
