"""A decoder that writes a thought about a query before it embeds it: data, loss and training of `o1-embedder`.

Shape letters: N texts, T tokens, D width, B queries of a batch, P passages, V vocabulary.

    query    <query>q</query><thought>t</thought><emb>        passage   d<emb>

The vector of a text is the last hidden state at its last token. One forward pass over query and thought gives both
losses, with the thought as it was written, not sampled:

    L = weight InfoNCE(queries, passages of the batch) + (1 - weight) cross-entropy of the thought's tokens
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from modicum.core.errors import UserError
from modicum.core.events import Events
from modicum.core.files import atomic_directory, write_json

FILE = "thinking.json"
END = "<emb>"
IGNORED = -100


@dataclass(frozen=True)
class Thought:
    """A query with its passage, a hard negative, and what may be thought of it."""

    query: str
    positive: str
    negative: str
    thought: str


def opened(query: str) -> str:
    """What a thought is written after."""
    return f"<query>{query.strip()}</query><thought>"


def closed(thought: str) -> str:
    return f"{thought.strip()}</thought>"


class Thinker:
    """A decoder with its tokenizer. `tokens` bounds a query with its thought, and a passage."""

    def __init__(self, model: Any, tokenizer: Any, tokens: int = 256):
        self.model, self.tokenizer = model, tokenizer
        self.most = min(tokens, model.config.context_length)

    @classmethod
    def open(cls, path: str | Path, device: str = "cpu", tokens: int = 256) -> Thinker:
        from modicum.data.tokenizer import Tokenizer
        from modicum.model.folder import find_folder, load_model

        folder = find_folder(path)
        dtype = torch.float32 if device == "cpu" else None
        return cls(load_model(folder, dtype=dtype, device=device).eval(), Tokenizer.load(folder), tokens)

    def save(self, folder: str | Path) -> None:
        """A model folder with a note of what it was trained for."""
        from modicum.model.folder import save_model

        with atomic_directory(folder) as target:
            save_model(self.model, target / "model")
            self.tokenizer.save(target / "model")
            write_json(target / FILE, {"tokens": self.most})

    def ids(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, specials=False))

    def row(self, query: str, thought: str | None) -> tuple[list[int], list[int]]:
        """(token ids, labels) of a query: labels are the thought's own tokens, all others `IGNORED`."""
        end = self.ids(END)
        head = [self.tokenizer.start_id, *self.ids(opened(query))]
        if thought is None:  # a bare query: nothing to learn to write
            head = [self.tokenizer.start_id, *self.ids(f"<query>{query.strip()}</query>")]
            head = head[: self.most - len(end)]
            return [*head, *end], [IGNORED] * (len(head) + len(end))
        head = head[: self.most - len(end) - 1]
        tail = self.ids(closed(thought))[: self.most - len(end) - len(head)]
        return [*head, *tail, *end], [IGNORED] * len(head) + tail + [IGNORED] * len(end)

    def passage(self, text: str) -> list[int]:
        end = self.ids(END)
        return [self.tokenizer.start_id, *self.ids(text)[: self.most - len(end) - 1], *end]

    def states(self, rows: Sequence[Sequence[int]]) -> tuple[Tensor, int]:
        """(h_NTD padded on the left, so that position -1 is the last token of every row; T)."""
        width = max(map(len, rows))
        tokens_NT = torch.full((len(rows), width), self.tokenizer.pad_id)
        mask_NT = torch.zeros((len(rows), width), dtype=torch.bool)
        for n, ids in enumerate(rows):
            tokens_NT[n, width - len(ids) :] = torch.tensor(list(ids))
            mask_NT[n, width - len(ids) :] = True
        device = self.model.device
        return self.model.hidden(tokens_NT.to(device), mask_BT=mask_NT.to(device)), width

    def embed(self, rows: Sequence[Sequence[int]], batch: int = 16) -> np.ndarray:
        """vectors_ND of length 1."""
        parts = [np.empty((0, self.model.config.width), np.float32)]
        with torch.inference_mode():
            for start in range(0, len(rows), batch):
                h_NTD, _ = self.states(rows[start : start + batch])
                parts.append(F.normalize(h_NTD[:, -1].float(), dim=-1).cpu().numpy())
        return np.concatenate(parts)

    def write(self, query: str, count: int, most: int, temperature: float = 0.7) -> list[str]:
        """`count` thoughts on a query, the first greedy; drawn by the query alone, whatever else is asked."""
        from modicum.model.cache import ContiguousCache

        head = [self.tokenizer.start_id, *self.ids(opened(query))][: self.model.config.context_length - most]
        noise = np.random.default_rng([*query.encode("utf-8", "surrogatepass")[:64], len(query)])
        stop = "</thought>"
        with torch.inference_mode():
            cache = ContiguousCache(
                self.model.config, count, len(head) + most, dtype=self.model.dtype, device=self.model.device
            )
            new_NT = torch.tensor([head] * count, device=self.model.device)
            written: list[list[int]] = [[] for _ in range(count)]
            done = [False] * count
            for _ in range(most):
                logits_NV = self.model.head(self.model.hidden(new_NT, attend=cache)[:, -1]).float().cpu()
                if count > 1:
                    gumbel = noise.gumbel(size=logits_NV[1:].shape)
                    logits_NV[1:] = logits_NV[1:] / temperature + torch.from_numpy(gumbel).float()
                chosen = logits_NV.argmax(-1).tolist()
                for n, token in enumerate(chosen):
                    if not done[n]:
                        done[n] = token in self.tokenizer.stop_ids
                        written[n] += [] if done[n] else [token]
                        done[n] = done[n] or stop in self.tokenizer.decode(written[n])
                if all(done):
                    break
                new_NT = torch.tensor(chosen, device=self.model.device)[:, None]
        return [self.tokenizer.decode(ids).partition(stop)[0].strip() for ids in written]


def vote(
    candidates: Sequence[str],
    positive: str,
    dense: Sequence[Callable[[Sequence[str]], np.ndarray]],
    lexical: bool = True,
) -> int:
    """The thought that a committee finds nearest to the passage: softmax over candidates per member, added up.

    dense: encoders, texts -> vectors of length 1; a member's scores are 100 cosines. lexical: BM25's raw scores, too.
    """
    if not candidates:
        raise UserError("there are no thoughts to vote on; write at least one")
    total = np.zeros(len(candidates))
    members = []
    for encode in dense:
        vectors_ND = encode([positive, *candidates]).astype(np.float64)
        members.append(100 * vectors_ND[1:] @ vectors_ND[0])
    if lexical:
        from modicum.retrieve.bm25 import BM25

        members.append(BM25.build(candidates).scores(positive).astype(np.float64))
    for scores_N in members:
        odds_N = np.exp(scores_N - scores_N.max())
        total += odds_N / odds_N.sum()
    return int(total.argmax())


def loss(
    thinker: Thinker, items: Sequence[Thought], rng: np.random.Generator, *, weight: float, keep: float, scale: float
) -> Tensor:
    """Of a batch; a thought is left out with probability 1 - `keep`, so that bare queries are embedded too."""
    rows = [thinker.row(i.query, i.thought if rng.random() < keep else None) for i in items]
    h_BTD, width = thinker.states([ids for ids, _ in rows])
    passages = [thinker.passage(text) for text in (*(i.positive for i in items), *(i.negative for i in items))]
    queries_BD = F.normalize(h_BTD[:, -1], dim=-1)
    keys_PD = F.normalize(thinker.states(passages)[0][:, -1], dim=-1)
    logits_BP = scale * queries_BD @ keys_PD.T
    contrast = F.cross_entropy(logits_BP, torch.arange(len(items), device=logits_BP.device))
    labels_BT = torch.full((len(rows), width), IGNORED)
    for b, (_, labels) in enumerate(rows):
        labels_BT[b, width - len(labels) :] = torch.tensor(labels)
    wanted_BT = labels_BT[:, 1:].to(h_BTD.device)  # the state before a token predicts it
    if weight == 1 or not (wanted_BT != IGNORED).any():
        return weight * contrast
    real_BT = wanted_BT != IGNORED
    written = F.cross_entropy(thinker.model.head(h_BTD[:, :-1][real_BT]).float(), wanted_BT[real_BT])
    return weight * contrast + (1 - weight) * written


def fit(
    thinker: Thinker,
    items: Sequence[Thought],
    *,
    steps: int = 150,
    batch: int = 8,
    lr: float = 1e-4,
    weight: float = 0.8,
    keep: float = 0.9,
    scale: float = 50.0,
    seed: int = 0,
    events: Events | None = None,
) -> list[float]:
    """Train every weight of the decoder; returns the losses."""
    if len(items) < 2:
        raise UserError(f"{len(items)} examples cannot be told apart; give at least two")
    parameters = list(thinker.model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.01)
    events, losses = events or Events(), list[float]()
    thinker.model.train()
    with events.progress("train thinker", steps, "steps") as progress:
        for step in range(steps):
            rng = np.random.default_rng([seed, step])
            chosen = [items[i] for i in rng.permutation(len(items))[:batch]]
            value = loss(thinker, chosen, rng, weight=weight, keep=keep, scale=scale)
            optimizer.zero_grad()
            value.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.param_groups[0]["lr"] = lr * min(1.0, 10 * (step + 1) / steps, 2 * (1 - step / steps))
            optimizer.step()
            losses.append(float(value.detach()))
            progress.update(1, loss=losses[-1])
    thinker.model.eval()
    return losses
