"""seta: over many epochs, read a window of documents that slides from easy to hard, and prune the rest for now.

    score(d)   its mean loss when it was last read; all equal at first
    epoch e    1. a random fraction 1 - prune of the documents
               2. their scores in G groups, ascending, by 1-D k-means (equal chunks where scores are equal)
               3. e = 0: all groups;  else round(G w) groups from number  e mod (G - round(G w) + 1)  on
               4. e >= delta E: the random fraction, without groups

What was not read keeps its old score. An epoch gives fewer tokens than the corpus has, so a run of as many tokens
makes more epochs; below one epoch there is nothing for it to do. Scores come from `objective/document-losses`, which
it brings along, and are kept in checkpoints.

Zhou et al. 2025, arXiv:2503.13385 (CVPR 2025), and the authors' `seta.py`. Departs: per domain, as the mixture decides
between domains; a long document's score is that of the chunk read last; k-means starts from quantiles instead of at
random.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from modicum.data.orders import Epoch, Order
from modicum.data.shards import Documents
from modicum.data.transforms.document_number import first_numbers

BRINGS = ("transform/document-number", "objective/document-losses")
CLAIM = {"figure": "up to 50% of the cost saved without loss", "where": "abstract", "scale": "over 3M samples"}
NOT_MEASURABLE = "it prunes over many epochs, and the port's bench reads less than one"


@dataclass(frozen=True, kw_only=True)
class Config:
    prune: float = 0.1  # of the documents, at random, before they are grouped
    groups: int = 10  # G
    window: float = 0.5  # w, of the groups
    annealing: float = 0.875  # delta, of the epochs, from which on all groups are read
    epochs: int = 10  # E, passes that the run makes

    def __post_init__(self) -> None:
        if not 0 <= self.prune < 1 or self.groups < 1 or not 0 < self.window <= 1:
            raise ValueError("prune lies in [0, 1), groups is at least 1, window lies in (0, 1]")
        if not 0 <= self.annealing <= 1 or self.epochs < 1:
            raise ValueError("annealing lies in [0, 1], epochs is at least 1")


class Seta(Order):
    config: Config

    def __init__(self, config: Config, documents: Documents):
        super().__init__(config, documents)
        self.first = first_numbers(documents)
        self.scores_N = np.zeros(sum(documents.documents(d) for d in documents.domains))
        self.fixed: dict[str, tuple[int, np.ndarray]] = {}  # by domain: the epoch that began last, and its scores

    def observe(self, numbers_M: np.ndarray, losses_M: np.ndarray) -> None:
        """Mean losses of documents, by their number over all domains, as they were read just now."""
        self.scores_N[numbers_M] = losses_M

    def arrange(self, epoch: Epoch) -> np.ndarray:
        config, number = self.config, epoch.number
        count = len(epoch.lengths)
        scores_N = self._scores(epoch.domain, number, count)
        chosen = epoch.permutation(count)[: max(1, round((1 - config.prune) * count))].astype(np.int64)
        if 0 < number < config.annealing * config.epochs:
            wide = max(1, round(config.groups * config.window))
            start = number % (config.groups - wide + 1)
            groups = grouped(scores_N[chosen], config.groups)
            window = [chosen[g] for g in groups[start : start + wide]]
            chosen = np.concatenate(window) if any(map(len, window)) else chosen
        read_N = np.zeros(count, bool)
        read_N[chosen] = True
        numbers = epoch.shuffled()
        order = numbers[read_N[epoch.documents(numbers)]]
        return order if len(order) else numbers  # a document may have nothing to predict

    def _scores(self, domain: str, number: int, count: int) -> np.ndarray:
        """The scores as they were when the epoch began: what is read within it does not change its order."""
        if domain not in self.fixed or self.fixed[domain][0] != number:
            at = self.first[domain]
            self.fixed[domain] = number, self.scores_N[at : at + count].copy()
        return self.fixed[domain][1]

    def state(self) -> dict[str, np.ndarray]:
        """float64 scores, and those with which each domain's epoch began, with its number in front."""
        begun = {f"epoch/{d}": np.concatenate([[number], scores]) for d, (number, scores) in self.fixed.items()}
        return {"scores": self.scores_N.copy()} | begun

    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        self.scores_N = np.array(state["scores"], float)
        self.fixed = {
            name.removeprefix("epoch/"): (int(values[0]), np.array(values[1:], float))
            for name, values in state.items()
            if name.startswith("epoch/")
        }


def grouped(scores_N: np.ndarray, groups: int, rounds: int = 50) -> list[np.ndarray]:
    """Positions in `groups` groups of ascending score: 1-D k-means from quantiles, or equal chunks of equal scores."""
    order = np.argsort(scores_N, kind="stable")
    ordered = scores_N[order]
    if len(ordered) < groups or ordered[0] == ordered[-1]:
        return np.array_split(order, groups)
    centres = np.quantile(ordered, (np.arange(groups) + 0.5) / groups)
    for _ in range(rounds):
        cuts = np.searchsorted(ordered, (centres[1:] + centres[:-1]) / 2)
        parts = np.split(ordered, cuts)
        moved = np.array([p.mean() if len(p) else c for p, c in zip(parts, centres, strict=True)])
        if np.array_equal(moved, centres):
            break
        centres = moved
    return np.split(order, np.searchsorted(ordered, (centres[1:] + centres[:-1]) / 2))
