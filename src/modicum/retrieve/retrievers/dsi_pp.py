"""dsi-pp: the model is the index: it learns to name a passage, and keeps what it knows while passages are added.

One encoder with an output row for each passage is trained on two tasks, passage -> row and query -> row. Passages that
are added bring no queries, so a generator makes pseudo-queries of them, and a few of earlier passages are replayed:

    L = CE(new passages) + CE(pseudo-queries of new passages) + CE(pseudo-queries of earlier passages)
    w <- w - step(gradient at w + rho g / |g|)          flat minima, which forget less (`rho`; 0: plain steps)

What is replayed is queries, `replay` for each new example. Rows are found by the largest output; those that were
removed have none. The price is in training: `epochs` passes over what is added, again with every `add`.

Mehta et al. 2023 (EMNLP), arXiv:2212.09744, sections 3 and 4, for atomic identifiers. Departs: the model is a small
raw encoder trained here instead of T5; the generator is a rule (runs of words of the passage) unless a callable is
given as `generate`, such as a language model's. `_continual.continual` computes their average, forgetting and learning.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from modicum.retrieve.indexes import Hits
from modicum.retrieve.retrievers import Retriever, read_texts, write_texts
from modicum.retrieve.retrievers._continual import sam_step, spans
from modicum.retrieve.student import Student

CLAIM = {"figure": "Hits@10 21.1% above baselines on average, 12% more documents kept by flat minima",
         "where": "abstract", "scale": "Natural Questions, T5-base"}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Config:
    width: Annotated[int, Field(ge=8)] = 128
    layers: Annotated[int, Field(ge=1)] = 2
    vocabulary: Annotated[int, Field(ge=300)] = 4000
    max_tokens: Annotated[int, Field(ge=4)] = 32  # of a passage
    epochs: Annotated[int, Field(ge=1)] = 30  # over the passages that are added
    batch: Annotated[int, Field(ge=1)] = 32  # new examples of a step
    queries: Annotated[int, Field(ge=0)] = 4  # pseudo-queries of a passage
    replay: Annotated[float, Field(ge=0)] = 0.5  # pseudo-queries of earlier passages for each new example
    rho: Annotated[float, Field(ge=0)] = 0.05  # radius of the sharpness-aware step
    lr: Annotated[float, Field(gt=0)] = 2e-3
    seed: int = 0


class DsiPP(Retriever):
    config: Config

    def __init__(self, config: Any, device: str = "cpu", generate: Callable[[str, int], list[str]] | None = None):
        super().__init__(config, device)
        self.generate = generate
        self.student: Student | None = None
        self.rows_ND = torch.empty(0, config.width)  # the output row of every passage
        self.pseudo: list[tuple[str, int]] = []  # (query, row), of all passages
        self.rounds = 0

    def _add(self, texts: list[str]) -> None:
        c = self.config
        first = len(self.alive_N)
        rng = np.random.default_rng([c.seed, self.rounds])
        if self.student is None:
            self.student = Student.new(
                texts, width=c.width, layers=c.layers, heads=max(1, c.width // 32), vocabulary=c.vocabulary,
                max_tokens=c.max_tokens, seed=c.seed,
            ).to(self.device)  # fmt: skip
        fresh = [(text, first + n) for n, text in enumerate(texts)]
        make = self.generate or (lambda text, count: spans(text, count, rng))
        queries = [
            (q, row) for text, row in fresh for q in (make(text, c.queries) if text.split() else []) if q.split()
        ]
        new_ND = torch.from_numpy(0.02 * rng.standard_normal((len(texts), c.width)).astype(np.float32))
        old = [pair for pair in self.pseudo if self.alive_N[pair[1]]]
        self.rows_ND = torch.cat([self.rows_ND, new_ND.to(self.rows_ND.device)])
        self.learn([*fresh, *queries], old, rng)
        self.pseudo += queries
        self.rounds += 1

    def learn(self, new: list[tuple[str, int]], old: list[tuple[str, int]], rng: np.random.Generator) -> None:
        """`epochs` passes over the new examples, each step with old ones beside them."""
        c, student = self.config, self.student
        assert student is not None
        rows = torch.nn.Parameter(self.rows_ND)
        parameters = [*student.parameters(), rows]
        optimizer = torch.optim.AdamW(parameters, lr=c.lr, weight_decay=0.01)
        per_epoch = -(-len(new) // c.batch)
        total = c.epochs * per_epoch
        student.train()
        for step in range(total):
            if step % per_epoch == 0:
                order = rng.permutation(len(new))
            part = step % per_epoch
            chosen = [new[i] for i in order[part * c.batch : (part + 1) * c.batch]]
            count = min(round(c.replay * len(chosen)), len(old))
            chosen += [old[i] for i in rng.choice(len(old), count, replace=False)] if count else []
            ids_NT, mask_NT = self.tokens([text for text, _ in chosen])
            target_N = torch.tensor([row for _, row in chosen], device=ids_NT.device)
            optimizer.param_groups[0]["lr"] = c.lr * min(1.0, 2 * (1 - step / total))

            def loss(ids_NT: Tensor = ids_NT, mask_NT: Tensor = mask_NT, target_N: Tensor = target_N) -> Tensor:
                return F.cross_entropy(self.vectors(ids_NT, mask_NT) @ rows.T, target_N)

            sam_step(parameters, loss, optimizer, c.rho)
        student.eval()
        self.rows_ND = rows.detach()

    def tokens(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        assert self.student is not None
        inputs = self.student.tokenizer(
            texts, padding=True, truncation=True, max_length=self.config.max_tokens, return_tensors="pt"
        )
        return inputs["input_ids"].to(self.device), inputs["attention_mask"].to(self.device)

    def vectors(self, ids_NT: Tensor, mask_NT: Tensor) -> Tensor:
        """The mean of the last states, (N, D)."""
        assert self.student is not None
        h_NTD = self.student.model(input_ids=ids_NT, attention_mask=mask_NT).last_hidden_state
        mask_NT1 = mask_NT[..., None].to(h_NTD.dtype)
        pooled: Tensor = (h_NTD * mask_NT1).sum(1) / mask_NT1.sum(1)
        return pooled

    def _rank(self, queries: list[str], k: int, rows_S: np.ndarray | None) -> Hits:
        rows_S = np.arange(len(self.alive_N)) if rows_S is None else rows_S
        hits = Hits.empty(len(queries), k)
        with torch.inference_mode():
            logits = [(self.vectors(*self.tokens([q])) @ self.rows_ND.T)[0].cpu().numpy() for q in queries]
        for q, logits_N in enumerate(logits):
            best = rows_S[np.argsort(-logits_N[rows_S], kind="stable")[:k]]
            hits.ids_QK[q, : len(best)], hits.scores_QK[q, : len(best)] = best, logits_N[best]
        return hits

    def nbytes(self) -> int:
        """The model's weights and the output rows: a search reads them all."""
        weights = 0 if self.student is None else sum(p.numel() * 4 for p in self.student.parameters())
        return weights + self.rows_ND.numel() * 4

    def _write(self, folder: Path) -> None:
        np.save(folder / "rows.npy", self.rows_ND.cpu().numpy())
        np.save(folder / "pseudo.npy", np.array([row for _, row in self.pseudo], np.int64))
        write_texts(folder / "pseudo.parquet", [query for query, _ in self.pseudo])
        if self.student is not None:
            self.student.save(folder / "model")

    def _read(self, folder: Path) -> None:
        self.rows_ND = torch.from_numpy(np.load(folder / "rows.npy", allow_pickle=False)).to(self.device)
        numbers = np.load(folder / "pseudo.npy", allow_pickle=False).tolist()
        self.pseudo = list(zip(read_texts(folder / "pseudo.parquet"), numbers, strict=True))
        self.rounds = 1 + len(self.pseudo)  # another draw than any before
        if (folder / "model").is_dir():
            self.student = Student.open(folder / "model").to(self.device).eval()
