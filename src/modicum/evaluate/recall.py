"""Training a small decoder to recall: the playground's tasks as dense text, growing longer as training goes on.

One document of a task asks one question. To learn from as few tokens as possible, a document here asks about
all of its facts, in the words of `needle` and `multikey`, or is a list and its copy; only what can be known is
learnt (the answers), never the random text around them. Rows begin short and end at
the run's sequence length, with the tokens of a step unchanged: recall is found in minutes on short rows and
then stretched. Everything is drawn from (seed, step, row), by generators that no graded document uses.

Induction from repeated text: Olsson et al. 2022, arXiv:2209.11895; growing lengths: Li et al. 2022,
arXiv:2108.06084.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random
from typing import Any

import numpy as np
import torch

from modicum.core.errors import UserError
from modicum.data.batch import NO_LOSS, Batch, Tokens, assemble, joined
from modicum.data.shards import Documents
from modicum.data.stream import Stream
from modicum.data.tokenizer import Tokenizer
from modicum.evaluate.playground import NOUNS, scatter

WORDS = 0.8  # words per token of the playground's text, for guessing lengths
FACTS = 40  # most facts of a document
COPIED = 200  # most words of a list to copy
TEXT_TARGETS = 1 / 16  # share of the corpus's tokens that are learnt: about what an answer is of its document


Document = list[tuple[str, str]]  # (given, learnt), one after another


@dataclass(frozen=True, kw_only=True)
class RecallConfig:
    """lengths: tokens of a row, one after another over the run, for `fractions` of it (the last ends it).
    text: share of the rows that hold the corpus instead, from the second length on. copies: share of the
    documents that are lists."""

    lengths: tuple[int, ...] = (64, 256, 1024)
    fractions: tuple[float, ...] = (0.5, 0.25, 0.25)
    text: float = 0.15
    copies: float = 0.25

    def __post_init__(self) -> None:
        if len(self.lengths) != len(self.fractions) or not self.lengths or abs(sum(self.fractions) - 1) > 1e-6:
            raise UserError(
                f"recall: lengths={list(self.lengths)} and fractions={list(self.fractions)} must be lists of one size, "
                "and the fractions must add up to 1"
            )
        if min(self.lengths) < 32:
            raise UserError(f"recall: lengths={list(self.lengths)} must each be at least 32 tokens")
        for name in ("text", "copies"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"recall: {name}={getattr(self, name)} must be a fraction, at least 0 and below 1")


def facts_and_questions(rng: Random, tokens: int) -> Document:
    """Facts scattered in a text, then all of them asked; about `tokens` tokens together."""
    n = max(1, min(rng.randint(1, FACTS), tokens // 16))
    words = rng.choice((1, 1, 2))
    drawn = rng.sample(NOUNS, n * (1 + words))
    pairs = [(drawn[i], " ".join(drawn[n + i * words : n + (i + 1) * words])) for i in range(n)]
    questions = [
        (f" The secret of {key} is" if rng.random() < 0.6 else f" The secrets of {key} :", f" {value}.")
        for key, value in rng.sample(pairs, n)
    ]
    left = int(WORDS * tokens) - sum(len((q + a).split()) for q, a in questions)
    text = scatter(rng, [f"The secret of {key} is {value}." for key, value in pairs], max(left, 1))
    return [(text + questions[0][0], questions[0][1]), *questions[1:]]


def list_and_copy(rng: Random, tokens: int) -> Document:
    n = max(4, min(rng.randint(8, COPIED), tokens // 2 - 3))
    words = " ".join(rng.choices(NOUNS, k=n))
    return [(f"Copy: {words}. Again:", f" {words}.")]


def document(rng: Random, tokens: int, copies: float) -> Document:
    return (list_and_copy if rng.random() < copies else facts_and_questions)(rng, tokens)


def sample(seed: int | str, n_bytes: int) -> Iterator[str]:
    """Documents as plain text, about `n_bytes` in all: what a tokenizer must have seen."""
    rng, size = Random(f"recall/sample/{seed}"), 0
    while size < n_bytes:
        text = "".join(given + learnt for given, learnt in document(rng, 256, 0.5))
        size += len(text) + 1
        yield text


class RecallStream:
    """Batches for `train.loop.train`: as many tokens as a `Stream` gives, in shorter rows at first.

    `text` gives the rows of the corpus. A row is filled with whole documents, each with positions and
    attention of its own; one that does not fit is cut at the row's end.
    """

    def __init__(
        self,
        config: RecallConfig,
        tokenizer: Tokenizer,
        text: Documents | None,
        *,
        sequence_length: int,
        total: float,
        seed: int = 0,
    ):
        wrong = [n for n in config.lengths if n > sequence_length or sequence_length % n]
        if wrong:
            raise UserError(f"recall: lengths={wrong} must divide sequence_length={sequence_length}")
        if text is None and config.text > 0:
            raise UserError(f"recall: text={config.text} needs a corpus; give one, or set text=0")
        self.config, self.tokenizer, self.sequence_length = config, tokenizer, sequence_length
        self.total, self.seed, self.done = total, seed, 0
        self.streams = {
            n: Stream(text, "natural", "concat:mask=true", sequence_length=n, seed=seed, total=total)
            for n in dict.fromkeys(config.lengths)
            if text is not None and config.text > 0
        }

    @property
    def length(self) -> int:
        """Tokens of a row now."""
        ends = np.cumsum(self.config.fractions)
        phase = int(np.searchsorted(ends, self.done / self.total, side="right"))
        return self.config.lengths[min(phase, len(ends) - 1)]

    def next_batch(self, n: int) -> Batch:
        """As many tokens as `n` sequences of `sequence_length`."""
        T = self.length
        rows = n * self.sequence_length // T
        rng = Random(f"recall/{self.seed}/{self.done}")
        # Recall is found sooner without the corpus: all of its tokens learnt would drown the few answers.
        early = self.config.lengths[0] == T and len(self.config.lengths) > 1
        corpus = 0 if early or not self.streams else sum(rng.random() < self.config.text for _ in range(rows))
        made = [self._rows(rng, rows - corpus, T)] if corpus < rows else []
        if corpus:
            made.append(_thinned(self.streams[T].next_batch(corpus), rng))
        self.done += n * self.sequence_length
        return joined(made)

    def _rows(self, rng: Random, rows: int, T: int) -> Batch:
        texts: list[Document] = []
        of_row: list[int] = []
        for row in range(rows):
            left = T
            while left > 16:  # guessed sizes; a row may end up a little over or under
                size = max(32, int(min(0.97 * left, T * rng.uniform(0.4, 0.97))))  # the last one fills the row
                texts.append(document(rng, size, self.config.copies))
                of_row.append(row)
                left -= size
        flat = [part for text in texts for pair in text for part in pair]
        ids_of = iter(self.tokenizer.encode_batch(flat, specials=False))
        spans: list[list[Tokens]] = [[] for _ in range(rows)]
        used = [0] * rows
        for row, text in zip(of_row, texts, strict=True):
            # A prompt may come with or without a start token, so both are seen.
            ids = [self.tokenizer.start_id] if rng.random() < 0.5 else []
            learns = [False] * len(ids)
            for _ in text:
                for learnt in (False, True):
                    part = next(ids_of)
                    ids += part
                    learns += [learnt] * len(part)
            ids.append(self.tokenizer.eos_id)
            learns.append(True)
            n = min(len(ids) - 1, T - used[row])
            if n > 0:
                targets_N = np.where(learns[1 : n + 1], ids[1 : n + 1], NO_LOSS)
                spans[row].append(Tokens(np.array(ids[:n]), targets_N))
                used[row] += n
        return assemble(spans, T, masked=True, padding=self.tokenizer.pad_id)

    def state(self) -> dict[str, Any]:
        return {"done": self.done, "text": {str(n): s.state() for n, s in self.streams.items()}}

    def load_state(self, state: dict[str, Any]) -> None:
        self.done = state["done"]
        for n, stream in self.streams.items():
            stream.load_state(state["text"][str(n)])


def _thinned(batch: Batch, rng: Random) -> Batch:
    """The batch with a loss on some of its tokens only."""
    drawn = torch.rand(batch.targets_BT.shape, generator=torch.Generator().manual_seed(rng.getrandbits(62)))
    return dataclasses.replace(batch, targets_BT=torch.where(drawn < TEXT_TARGETS, batch.targets_BT, NO_LOSS))
