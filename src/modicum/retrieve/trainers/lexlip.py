"""lexlip: a text as few weighted words of the vocabulary, pretrained through a bottleneck of exactly that.

From the masked-word logits x of an encoder, padding at -10^6, two read-outs:

    pretraining:  p = softmax(max over positions of x)     b = p sg(E)     E: word embeddings, without gradient
    retrieval:    v = ln(1 + max over positions of relu(x)), of length 1

A weak decoder (one layer) must fill a copy of the text with more words hidden, with b in the place of its first state:
what it cannot see must pass through the words of p. Retrieval is trained by

    L = symmetric InfoNCE of v at temperature T + flops (F(queries) + F(passages))
    F(v) = sum over words of (mean |v|)^2

`mode=both` adds up all losses in every step, with a second pass over the unmasked texts; `steps=n` makes the first n
steps pretraining alone and the others retrieval alone. Retriever `lexlip` searches what is trained.

Luo et al. 2023 (ICCV), arXiv:2302.02908, section 3, with the authors' code. Departs: both sides are texts, where the
paper has images; negatives are those of the batch instead of queues by momentum encoders; the decoder hides 50%.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from modicum.core.files import write_json
from modicum.retrieve.indexes import Hits
from modicum.retrieve.lexical import LexicalHeads, flops
from modicum.retrieve.student import Student
from modicum.retrieve.trainers import Batch, RetrieverTrainer
from modicum.retrieve.trainers._masking import drawn_mask, predicted


@dataclass(frozen=True, kw_only=True)
class Config:
    mode: Literal["both", "bottle", "con"] = "both"  # both losses, pretraining alone, retrieval alone
    steps: Annotated[int, Field(ge=0)] = 0  # of pretraining alone, before retrieval alone; 0: as `mode` has it
    temperature: Annotated[float, Field(gt=0)] = 0.05
    flops: Annotated[float, Field(ge=0)] = 0.002  # weight of the sparsity term
    mask: Annotated[float, Field(gt=0, lt=1)] = 0.3  # tokens hidden from the encoder
    decoder_mask: Annotated[float, Field(gt=0, lt=1)] = 0.5  # tokens hidden from the decoder
    decoder_heads: Annotated[int, Field(ge=1)] = 2


class LexLip(RetrieverTrainer):
    config: Config
    kind = "sparse"
    unit = True

    def prepare(self, student: Student) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.heads = LexicalHeads(student, self.config.decoder_heads)

    def parts(self, step: int) -> tuple[bool, bool]:
        """(pretraining, retrieval) of a step."""
        if self.config.steps:
            return step < self.config.steps, step >= self.config.steps
        return self.config.mode != "con", self.config.mode != "bottle"

    def loss(self, student: Student, batch: Batch) -> Tensor:
        bottle, contrast = self.parts(batch.step)
        total = torch.zeros((), device=next(student.parameters()).device)
        if bottle:
            total = total + self.pretraining(student, self.texts(batch), batch.rng)
        if contrast:
            states = student(self.texts(batch))
            count = len(batch.query_B)
            v_NV = self.lexical.weights(student, states.layers[-1], states.mask_NT)
            total = total + self.on_vectors(v_NV[:count], v_NV[count : 2 * count], v_NV[2 * count :], batch)
        return total

    @property
    def lexical(self) -> LexicalHeads:
        assert isinstance(self.heads, LexicalHeads)
        return self.heads

    def pretraining(self, student: Student, texts: Sequence[str], rng: np.random.Generator) -> Tensor:
        """Masked words of the encoder, and the decoder's through the bottleneck."""
        inputs = student.tokenizer(
            [t.strip() for t in texts],
            padding=True,
            truncation=True,
            max_length=student.max_tokens,
            return_tensors="pt",
        )
        device = next(student.parameters()).device
        ids_NT, real_NT = inputs["input_ids"], inputs["attention_mask"].bool()
        special = torch.tensor(student.tokenizer.all_special_ids)
        words_NT = (real_NT & ~torch.isin(ids_NT, special)).numpy()
        light_NT, heavy_NT = (
            torch.from_numpy(drawn_mask(words_NT, f, rng)).to(device)
            for f in (self.config.mask, self.config.decoder_mask)
        )
        ids_NT, real_NT = ids_NT.to(device), real_NT.to(device)
        seen_NT = ids_NT.masked_fill(light_NT, student.tokenizer.mask_token_id)
        h_NTD = student.model(input_ids=seen_NT, attention_mask=real_NT.long()).last_hidden_state
        own = predicted(self.lexical.masked, student, h_NTD, ids_NT, light_NT)
        b_ND = self.lexical.bottleneck(student, h_NTD, real_NT)
        return own + self.lexical.rebuilt(student, b_ND, ids_NT, real_NT, heavy_NT)

    def on_vectors(self, queries_BD: Tensor, positives_BD: Tensor, negatives_BD: Tensor, batch: Batch) -> Tensor:
        """From weights over the vocabulary: both directions of the pairs, the negatives as further passages."""
        passages_PV = torch.cat([positives_BD, negatives_BD])
        logits_BP = queries_BD @ passages_PV.T / self.config.temperature
        rows_P = np.concatenate([batch.positive_B, batch.negative_B])
        again_BP = rows_P[None] == batch.positive_B[:, None]  # the passage itself is no negative of its query
        np.fill_diagonal(again_BP, False)
        logits_BP = logits_BP.masked_fill(torch.from_numpy(again_BP).to(logits_BP.device), -torch.inf)
        own_B = torch.arange(len(queries_BD), device=logits_BP.device)
        back_BB = logits_BP[:, : len(queries_BD)].T
        contrast = (F.cross_entropy(logits_BP, own_B) + F.cross_entropy(back_BB, own_B)) / 2
        return contrast + self.config.flops * (flops(queries_BD) + flops(passages_PV))

    def ranking(self, student: Student, passages: Sequence[str], queries: Sequence[str], k: int) -> tuple[Hits, float]:
        from modicum.retrieve.retrievers.lexlip import LexLipStore

        store = LexLipStore.of(student, self.lexical)
        store.build(passages)
        return store.rank(queries, k), store.nbytes() / max(len(passages), 1)

    def settle(self, student: Student, folder: Path) -> None:
        from safetensors.torch import save_file

        student.save(folder)
        save_file(
            {n: p.detach().contiguous() for n, p in self.lexical.state_dict().items()}, folder / "heads.safetensors"
        )
        write_json(folder / "lexlip.json", {"decoder_heads": self.config.decoder_heads})
