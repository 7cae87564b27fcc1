"""Feedback of a language model: how much better it predicts a target after a passage, as a reward for retrieving it.

Shape letters: N texts, B batch, T tokens, V vocabulary, K candidates of a query.

    reward(q, d) = ln p(target | prompt(q, d))        of a frozen decoder; its sum or its mean over the target's tokens

With the answer as target this is the reward of `llm-embedder`; with demonstrations as passages and the label as target
that of `udr`; with the query as target and the passage as prompt it is the query's likelihood, a teacher for any
trainer. Rewards are scores of `pairs.Pairs` and are kept by `pairs.write_scores`. `oracle` says whether they can teach
anything: the candidate of the best reward must beat a random one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from modicum.core.errors import UserError
from modicum.retrieve.pairs import Pairs

BATCH_TOKENS = 4096  # padded tokens of one forward pass


def answering(passage: str, query: str) -> str:
    """The prompt whose continuation is an answer."""
    return f"{passage}\n\nQuestion: {query}\nAnswer: "


class Feedback:
    """A frozen decoder with its tokenizer. `open` takes a folder or a known name."""

    def __init__(self, model: Any, tokenizer: Any):
        self.model, self.tokenizer = model.eval(), tokenizer
        self.tokens = 0  # read so far

    @classmethod
    def open(cls, path: str, device: str = "cpu") -> Feedback:
        from modicum.data.tokenizer import Tokenizer
        from modicum.model.folder import find_folder, load_model

        folder = find_folder(path)
        dtype = torch.float32 if device == "cpu" else None
        return cls(load_model(folder, dtype=dtype, device=device), Tokenizer.load(folder))

    def log_likelihoods(self, prompts: Sequence[str], targets: Sequence[str], *, mean: bool = False) -> np.ndarray:
        """ln p(target | prompt) of each pair, float64; with `mean` divided by the number of the target's tokens.

        Prompts too long for the model lose their beginning. Raises `UserError` for an empty target.
        """
        if len(prompts) != len(targets):
            raise UserError(f"{len(prompts)} prompts and {len(targets)} targets; give one target for each prompt")
        empty = [n for n, target in enumerate(targets) if not target.strip()]
        if empty:
            raise UserError(f"target {empty[0]} is empty, so nothing of it can be predicted; leave it out")
        heads = self.tokenizer.encode_batch(list(prompts), specials=False)
        tails = self.tokenizer.encode_batch(list(targets), specials=False)
        most = self.model.config.context_length - 1
        rows = []
        for head, tail in zip(heads, tails, strict=True):
            tail = tail[:most]
            start = max(0, len(head) + len(tail) - most)
            rows.append(([self.tokenizer.start_id, *head[start:], *tail], len(tail)))
        values = np.empty(len(rows))
        for batch in _batches([len(ids) for ids, _ in rows]):
            values[batch] = self._score([rows[n] for n in batch], mean)
        return values

    def _score(self, rows: list[tuple[list[int], int]], mean: bool) -> np.ndarray:
        width = max(len(ids) for ids, _ in rows)
        tokens_BT = torch.full((len(rows), width), self.tokenizer.pad_id)
        target_BT = torch.zeros((len(rows), width), dtype=torch.bool)
        for b, (ids, count) in enumerate(rows):  # padding is on the right, where causal states do not attend to it
            tokens_BT[b, : len(ids)] = torch.tensor(ids)
            target_BT[b, len(ids) - count : len(ids)] = True
        self.tokens += int(sum(len(ids) for ids, _ in rows))
        with torch.inference_mode():
            h_BTD = self.model.hidden(tokens_BT.to(self.model.device))
            before_BT = target_BT[:, 1:].to(h_BTD.device)  # the state before a target token predicts it
            logits_NV = self.model.head(h_BTD[:, :-1][before_BT]).float()
            wanted_N = tokens_BT[:, 1:][target_BT[:, 1:]].to(h_BTD.device)
            logs_N = -torch.nn.functional.cross_entropy(logits_NV, wanted_N, reduction="none").double().cpu()
        sums_B = np.array([part.sum() for part in torch.split(logs_N, [count for _, count in rows])])
        return sums_B / np.array([count for _, count in rows]) if mean else sums_B

    def label_probabilities(self, prompts: Sequence[str], labels: Sequence[str]) -> np.ndarray:
        """p_NC, float64: the likelihood of every label after each prompt, normalised over the labels."""
        pairs = [(prompt, label) for prompt in prompts for label in labels]
        logs_NC = self.log_likelihoods([p for p, _ in pairs], [c for _, c in pairs]).reshape(-1, len(labels))
        odds_NC = np.exp(logs_NC - logs_NC.max(1, keepdims=True))
        return odds_NC / odds_NC.sum(1, keepdims=True)


def _batches(lengths: Sequence[int]) -> list[list[int]]:
    """Numbers of rows alike in length, at most `BATCH_TOKENS` with padding."""
    batches: list[list[int]] = []
    for n in sorted(range(len(lengths)), key=lambda n: lengths[n]):
        if not batches or (len(batches[-1]) + 1) * lengths[n] > BATCH_TOKENS:
            batches.append([])
        batches[-1].append(n)
    return batches


def with_feedback(
    pairs: Pairs,
    feedback: Feedback,
    targets: Sequence[str],
    prompt: Callable[[str, str], str] = answering,
    *,
    mean: bool = False,
) -> Pairs:
    """Rewards as scores of every query's positive and negatives; targets: what each query's reader should write."""
    if len(targets) != len(pairs.queries):
        raise UserError(f"{len(targets)} targets for {len(pairs.queries)} queries; give one for each")
    owners, rows = [], []
    for q, (positive, negatives) in enumerate(zip(pairs.positive_Q, pairs.negatives_Q, strict=True)):
        candidates = [int(positive), *map(int, negatives)]
        owners += [q] * len(candidates)
        rows += candidates
    prompts = [prompt(pairs.passages[r], pairs.queries[q]) for q, r in zip(owners, rows, strict=True)]
    values = feedback.log_likelihoods(prompts, [targets[q] for q in owners], mean=mean)
    scores: list[dict[int, float]] = [{} for _ in pairs.queries]
    for q, r, value in zip(owners, rows, values, strict=True):
        scores[q][r] = float(value)
    return replace(pairs, scores_Q=scores)


@dataclass(frozen=True)
class Oracle:
    """Mean reward of the best candidate, of a random one and of the labelled one. above: queries whose label is the
    best, as a fraction."""

    best: float
    random: float
    labelled: float
    above: float


def oracle(pairs: Pairs) -> Oracle:
    """What a perfect retriever of these rewards reaches. If `best` is hardly above `random`, nothing can be learnt."""
    rewards = [np.array(list(scores.values())) for scores in pairs.scores_Q]
    if not rewards or min(map(len, rewards)) < 2:
        raise UserError("an oracle compares candidates; score at least two for each query with with_feedback")
    own = [scores[int(p)] for p, scores in zip(pairs.positive_Q, pairs.scores_Q, strict=True)]
    best = [r.max() for r in rewards]
    return Oracle(
        float(np.mean(best)),
        float(np.mean([r.mean() for r in rewards])),
        float(np.mean(own)),
        float(np.mean([o >= b for o, b in zip(own, best, strict=True)])),
    )


@dataclass(frozen=True)
class TaskPairs(Pairs):
    """Pairs of several tasks; tasks_Q names the task of each query."""

    tasks_Q: Sequence[str] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.tasks_Q) != len(self.queries):
            raise UserError(f"{len(self.queries)} queries with {len(self.tasks_Q)} tasks; name the task of each")
