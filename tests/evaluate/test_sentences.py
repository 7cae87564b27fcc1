"""Sentences of a known grammar through a decoder: positions of states and nats, the gap, the classifier of labels."""

import numpy as np
import pytest
import torch

from modicum.data.tokenizer import Tokenizer
from modicum.evaluate import sentences
from modicum.model.config import llama_like
from modicum.model.decoder import Decoder

TEXTS = ["none none apple bear cake.", "none none bear bear apple bottle."]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(TEXTS * 4, 290)  # words of several tokens


@pytest.fixture(scope="module")
def model(tokenizer):
    torch.manual_seed(0)
    return Decoder(llama_like(tokenizer.vocab_size, 32, 1, context_length=64)).eval()


def given(text, labels=(0, 1)):
    front, words = text[:-1].split()[:2], text[:-1].split()[2:]
    return {"front": " ".join(front), "words": words, "labels": list(labels)}


def test_nats_and_states_are_those_of_the_words(model, tokenizer):
    reading = sentences.read(model, tokenizer, [given(text) for text in TEXTS])
    for text, nats, states in zip(TEXTS, reading.nats, reading.states, strict=True):
        ids = [tokenizer.start_id, *tokenizer.encode(text, add_special=False)]
        with torch.no_grad():
            h_TD = model.hidden(torch.tensor([ids]))[0]
            logs = torch.log_softmax(model.head(h_TD).double(), -1)
        every = [-float(logs[i - 1, ids[i]]) for i in range(1, len(ids))]
        words = text[:-1].split()[2:]
        assert len(nats) == len(words) + 1 and len(states) == len(words)
        front = len(tokenizer.encode("none none", add_special=False))
        assert nats.sum() == pytest.approx(sum(every[front:]), rel=1e-5)  # metadata has no part in it
        assert nats[-1] == pytest.approx(every[-1], rel=1e-5)
        assert states[-1] == pytest.approx(h_TD[-2].numpy(), abs=1e-6)  # behind the last word, before the stop


def test_gap_is_of_the_words_asked_for(model, tokenizer):
    reading = sentences.read(model, tokenizer, [given(text) for text in TEXTS])
    best = [nats - np.arange(len(nats)) for nats in reading.nats]
    assert sentences.gaps(reading, best, slice(0, 2)) == pytest.approx(0.5)
    assert sentences.gaps(reading, best, slice(3, None)) == pytest.approx(np.mean([3, 3, 4]))
    assert np.isnan(sentences.gaps(reading, best, slice(9, None)))


def test_labels_are_read_from_states_of_other_sentences():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, size=(60, 2)).tolist()
    states = [np.eye(3)[[a, a]] + 0.01 * rng.normal(size=(2, 3)) for a, _ in labels]  # the first label alone shows
    reading = sentences.Reading([{"labels": pair} for pair in labels], states, [])
    both = sentences.label_accuracy(reading, slice(None), tested=30)
    second = [pair[1] for pair in labels[:30]]
    assert 0.5 + 0.1 < both < 0.5 + 0.5 * (max(np.bincount(second)) / 30 + 0.25)
    fitted = sentences.label_accuracy(
        sentences.Reading([{"labels": p[:1]} for p in labels], states, []), slice(None), 30
    )
    assert fitted == 1.0
