"""prop: pretraining by telling which of two sets of words represents a document better.

From a document's smoothed unigram model

    p(w|D) = (tf(w, D) + mu p(w|C)) / (|D| + mu)        mu = mean document length, p(w|C) = df(w) / sum of df

two sets S of one length, drawn from Poisson(lambda) without 0, are made of words drawn by it; the one with the
higher sum of ln p(w|D) is S+. The encoder reads [CLS] S [SEP] D [SEP]; a network on the state of [CLS] gives P:

    L = max(0, 1 - P(S+, D) + P(S-, D)) + cross-entropy of masked tokens of D

Words are drawn from those of the document and random others, `support` in all; frequent words are kept with
probability sqrt(t/f) + t/f, f their frequency in the collection. It needs documents alone. With `steps` the loss
turns to in-batch training on the queries after so many steps, which is what a pretraining is for.

Ma et al. 2021 (WSDM), arXiv:2010.10137, sections 3 and 4, with the authors' generator of word sets. Departs: words are
lower-case without stemming; a word that is thinned is drawn again, so that both sets keep their length; P reads a
small raw encoder, not BERT; the hinge's form is by the abstract.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from modicum.core.registry import build
from modicum.retrieve.pairs import Pairs
from modicum.retrieve.student import Student
from modicum.retrieve.trainers import Batch, RetrieverTrainer
from modicum.retrieve.trainers._masking import MaskedHead, drawn_mask, predicted

_WORD = re.compile(r"[^\W\d_]{2,}")


@dataclass(frozen=True, kw_only=True)
class Config:
    length: Annotated[float, Field(gt=0)] = 3.0  # lambda: mean number of words of a set, before zeros are left out
    support: Annotated[int, Field(ge=2)] = 500  # words that are drawn from: the document's, then random others
    least: Annotated[int, Field(ge=1)] = 10  # occurrences in the collection; rarer words are never drawn
    thin: Annotated[float, Field(gt=0)] = 1e-4  # t: words of a higher frequency in the collection are thinned
    mask: Annotated[float, Field(gt=0, lt=1)] = 0.15  # tokens of the document that are predicted
    steps: Annotated[int, Field(ge=0)] = 0  # of pretraining, before in-batch training; 0: all


TOY = Config(least=1, thin=1.0)
SWEEP = ("steps=50",)


class DocumentModels:
    """The unigram models of a collection. V words, those of at least `least` occurrences."""

    def __init__(self, texts: Sequence[str], least: int = 10):
        counts = [Counter(_WORD.findall(text.lower())) for text in texts]
        total: Counter[str] = Counter()
        documents: Counter[str] = Counter()
        for count in counts:
            total.update(count)
            documents.update(count.keys())
        self.words = sorted(w for w, n in total.items() if n >= least)
        self.number = {w: i for i, w in enumerate(self.words)}
        df_V = np.array([documents[w] for w in self.words], np.float64)
        self.background_V = df_V / max(df_V.sum(), 1)
        tf_V = np.array([total[w] for w in self.words], np.float64)
        self.frequency_V = tf_V / max(tf_V.sum(), 1)
        self.counts_N = [{self.number[w]: n for w, n in c.items() if w in self.number} for c in counts]
        self.length_N = np.array([sum(c.values()) for c in self.counts_N], np.float64)
        self.mu = float(self.length_N.mean()) if len(texts) else 0.0

    def probability(self, row: int, words: np.ndarray | None = None) -> np.ndarray:
        """p(w|D) of these words, or of all V, in float64."""
        words = np.arange(len(self.words)) if words is None else words
        tf = np.array([self.counts_N[row].get(int(w), 0) for w in words], np.float64)
        smoothed: np.ndarray = (tf + self.mu * self.background_V[words]) / (self.length_N[row] + self.mu)
        return smoothed

    def kept(self, t: float) -> np.ndarray:
        """keep_V: the probability that a drawn word stays; 1 up to a frequency of about 2.6 t."""
        ratio_V = t / np.maximum(self.frequency_V, 1e-12)
        return np.minimum(1.0, np.sqrt(ratio_V) + ratio_V)

    def two_sets(self, row: int, config: Config, rng: np.random.Generator) -> tuple[list[str], list[str]] | None:
        """(S+, S-), or None for a document that decides nothing."""
        length = 0
        while not length:
            length = int(rng.poisson(config.length))
        words = self.support(row, config.support, rng)
        if len(words) < 2:
            return None
        p_S = self.probability(row, words)
        draw_S = p_S * self.kept(config.thin)[words]
        sets = [rng.choice(len(words), length, p=draw_S / draw_S.sum()) for _ in range(2)]
        scores = [float(np.log(p_S[s]).sum()) for s in sets]  # of p itself: not thinned, not of the support
        if scores[0] == scores[1]:
            return None
        better, worse = sets if scores[0] > scores[1] else sets[::-1]
        return [self.words[words[i]] for i in better], [self.words[words[i]] for i in worse]

    def support(self, row: int, size: int, rng: np.random.Generator) -> np.ndarray:
        own = np.array(sorted(self.counts_N[row]), np.int64)
        others = np.setdiff1d(np.arange(len(self.words)), own, assume_unique=True)
        more = max(0, min(size - len(own), len(others)))
        return np.concatenate([own, rng.choice(others, more, replace=False)]) if more else own


class Prop(RetrieverTrainer):
    config: Config
    unit = True

    def __init__(self, config: Any, pairs: Pairs):
        super().__init__(config, pairs)
        self.then: RetrieverTrainer = build("trainer", "in-batch", pairs)
        self.models = DocumentModels(pairs.passages, config.least)

    def prepare(self, student: Student) -> None:
        D = student.width
        with torch.random.fork_rng():
            torch.manual_seed(0)
            preference = nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, 1))
            self.heads = nn.ModuleDict({"masked": MaskedHead(student), "preference": preference})

    def loss(self, student: Student, batch: Batch) -> Tensor:
        if self.config.steps and batch.step >= self.config.steps:
            return self.then.loss(student, batch)
        rng = batch.rng
        sets, documents = [], []
        for row in np.unique(np.concatenate([batch.positive_B, batch.negative_B])):
            if (both := self.models.two_sets(int(row), self.config, rng)) is not None:
                sets.append(both)
                documents.append(self.pairs.passages[row])
        if not sets:
            return self.then.loss(student, batch)  # documents of one word each
        first = [" ".join(words) for k in (0, 1) for words in (pair[k] for pair in sets)]
        preference_2N, masked = self.read(student, first, documents * 2, rng)
        above_N, below_N = preference_2N.chunk(2)
        return torch.relu(1 - above_N + below_N).mean() + masked

    def read(
        self, student: Student, sets: Sequence[str], documents: Sequence[str], rng: np.random.Generator
    ) -> tuple[Tensor, Tensor]:
        """(P of every set with its document, the loss of masked document tokens) in one forward pass."""
        tokenizer, limit = student.tokenizer, student.max_tokens
        inputs = tokenizer(
            list(sets), list(documents), padding=True, truncation="only_second", max_length=limit, return_tensors="pt"
        )
        ids_NT = inputs["input_ids"]
        document_NT = np.array([[s == 1 for s in inputs.sequence_ids(n)] for n in range(len(sets))])
        document_NT &= (ids_NT != tokenizer.sep_token_id).numpy()
        mask_NT = torch.from_numpy(drawn_mask(document_NT, self.config.mask, rng))
        device = next(student.parameters()).device
        seen_NT = ids_NT.masked_fill(mask_NT, tokenizer.mask_token_id).to(device)
        h_NTD = student.model(input_ids=seen_NT, attention_mask=inputs["attention_mask"].to(device)).last_hidden_state
        assert self.heads is not None
        heads: Any = self.heads
        masked = predicted(heads["masked"], student, h_NTD, ids_NT.to(device), mask_NT.to(device))
        return heads["preference"](h_NTD[:, 0])[:, 0], masked

    def on_vectors(self, queries_BD: Tensor, positives_BD: Tensor, negatives_BD: Tensor, batch: Batch) -> Tensor:
        return self.then.on_vectors(queries_BD, positives_BD, negatives_BD, batch)
