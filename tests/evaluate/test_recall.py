"""Rows of recall: what is learnt can be known, lengths grow with the run, and a stopped run goes on."""

from __future__ import annotations

import itertools
import re
from random import Random

import pytest
import torch

from modicum.core.errors import UserError
from modicum.data.shards import MemoryDocuments
from modicum.data.stream import NO_LOSS
from modicum.data.tokenizer import Tokenizer
from modicum.evaluate.playground import NOUNS
from modicum.evaluate.recall import RecallConfig, RecallStream, document, facts_and_questions, sample


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(list(sample(0, 60_000)), vocab_size=1200)


def _stream(tokenizer: Tokenizer, text: float = 0.3, **more: object) -> RecallStream:
    words = tokenizer.encode("plain words of a corpus that recalls nothing at all", specials=False)
    corpus = MemoryDocuments({"text": [(words * 9, 1)] * 40})
    config = RecallConfig(lengths=(64, 128), fractions=(0.5, 0.5), text=text)
    return RecallStream(config, tokenizer, corpus, sequence_length=128, total=2048, seed=3, **more)  # type: ignore[arg-type]


def test_every_answer_stands_in_the_text_before_it() -> None:
    for i in range(50):
        parts = facts_and_questions(Random(i), 200)
        given = parts[0][0]
        for question, answer in parts:
            key = re.findall(r"The secrets? of (\w+) (?:is|:)$", question)[0]
            assert f"The secret of {key} is{answer}" in given
    given, copied = next(d[0] for d in (document(Random(i), 100, 0.99) for i in itertools.count()) if len(d) == 1)
    assert given.startswith("Copy: ") and copied[1:-1] in given


def test_only_answers_are_learnt(tokenizer: Tokenizer) -> None:
    batch = _stream(tokenizer, text=0.0).next_batch(8)
    assert batch.documents_BT is not None
    nouns, learnt = {f" {n}" for n in NOUNS}, 0
    for tokens, targets, documents, positions in zip(
        batch.tokens_BT, batch.targets_BT, batch.documents_BT, batch.positions_BT, strict=True
    ):
        for t in (targets != NO_LOSS).nonzero()[:, 0].tolist():
            if t + 1 < len(tokens) and documents[t + 1] == documents[t]:
                assert targets[t] == tokens[t + 1]
            said = tokenizer.decode([int(targets[t])])
            assert said in nouns | {"."} or int(targets[t]) == tokenizer.eos_id
            learnt += 1
        for number in set(documents.tolist()) - {-1}:
            assert positions[documents == number].tolist() == list(range(int((documents == number).sum())))
    assert learnt > 0.1 * batch.tokens_BT.numel()


def test_rows_grow_and_the_tokens_of_a_step_stay(tokenizer: Tokenizer) -> None:
    stream = _stream(tokenizer)
    shapes = [tuple(stream.next_batch(4).tokens_BT.shape) for _ in range(4)]
    assert shapes == [(8, 64), (8, 64), (4, 128), (4, 128)]


def test_a_stopped_run_goes_on(tokenizer: Tokenizer) -> None:
    whole, first = _stream(tokenizer), _stream(tokenizer)
    want = [whole.next_batch(4) for _ in range(4)]
    got = [first.next_batch(4)]
    second = _stream(tokenizer)
    second.load_state(first.state())
    got += [second.next_batch(4) for _ in range(3)]
    for a, b in zip(want, got, strict=True):
        assert torch.equal(a.tokens_BT, b.tokens_BT) and torch.equal(a.targets_BT, b.targets_BT)


def test_refusals(tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match="fractions"):
        RecallConfig(lengths=(64,), fractions=(0.5, 0.5))
    with pytest.raises(UserError, match="divide"):
        RecallStream(RecallConfig(), tokenizer, None, sequence_length=1000, total=1e4)
    with pytest.raises(UserError, match="corpus"):
        RecallStream(RecallConfig(), tokenizer, None, sequence_length=1024, total=1e4)
