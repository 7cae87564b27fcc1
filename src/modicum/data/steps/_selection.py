"""What selecting steps have in common: targets, embeddings, and the cut by a share of the text.

A selection scores documents (`scores`), the higher the better, by something that it fitted on a sample, and keeps the
best until `keep` of the text is reached. The share is one of UTF-8 bytes: the tokenizer is trained on what is kept, so
there are no tokens yet to count. With `keep=1` it drops none and writes the score into each document as its `quality`.
"""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from modicum.core.errors import UserError
from modicum.data.document import Document, Drop
from modicum.data.latent import Latent
from modicum.data.steps import Context, Step

TARGET_BYTES = 64 << 20  # read of each target at most


class Selection(Step):
    """Base of selections by score; `Config` has `keep`, the share of the text that stays."""

    relative = True

    def __init__(self, config: Any):
        super().__init__(config)
        self.scope = "document" if config.keep == 1 else "corpus"

    @abstractmethod
    def scores(self, texts: Sequence[str]) -> np.ndarray:
        """float [N], higher is kept first; after `load`."""

    def signatures(self, documents: Sequence[Document]) -> np.ndarray:
        """float64 [N, 2]: score and bytes."""
        scores_N = self.scores([d.text for d in documents])
        return np.stack([scores_N, [d.nbytes for d in documents]], axis=1).astype(np.float64)

    def decide(self, signatures_NK: np.ndarray, ids: Sequence[str]) -> dict[int, tuple[str, str]]:
        scores_N, sizes_N = np.asarray(signatures_NK[:, 0]), np.asarray(signatures_NK[:, 1])
        kept_N = best(scores_N, sizes_N, self.config.keep)
        least = float(scores_N[kept_N].min()) if kept_N.any() else np.inf
        return {
            int(row): ("not-selected", f"score {scores_N[row]:.4g}, kept from {least:.4g} on")
            for row in np.flatnonzero(~kept_N)
        }

    def each(self, document: Document) -> Iterable[Document | Drop]:
        score = float(self.scores([document.text])[0])
        yield dataclasses.replace(document, meta=document.meta | {"quality": round(score, 6)})


def best(scores_N: np.ndarray, sizes_N: np.ndarray, keep: float) -> np.ndarray:
    """bool [N]: the highest scores until their sizes reach `keep` of all sizes; of equal ones the first."""
    order = np.argsort(-scores_N, kind="stable")
    before = np.cumsum(sizes_N[order]) - sizes_N[order]
    kept_N = np.zeros(len(scores_N), bool)
    kept_N[order] = before < keep * sizes_N.sum()
    return kept_N


def check_keep(keep: float) -> None:
    if not 0 < keep <= 1:
        raise ValueError(f"keep={keep} must be a fraction of the text above 0, at most 1 (1: score and drop none)")


def target_texts(step: str, targets: Sequence[str], context: Context, text_field: str = "text") -> dict[str, list[str]]:
    """Texts of each target: those that the knob names (files, folders, `hub:NAME`), else those of the context.

    Raises `UserError` where there are none.
    """
    from modicum.data.readers import ReadConfig, find, read

    if not targets and not context.targets:
        raise UserError(
            f"{step} needs texts to select for; write {step}:targets=[FILE], files of examples of the tasks (of their "
            "training side, never of their tests)"
        )
    if not targets:
        return {name: list(texts) for name, texts in context.targets.items()}
    config = ReadConfig(text_field=text_field, limit_bytes=TARGET_BYTES)
    texts_by_target = {}
    for source in targets:
        items = [item for unit in find(source, config) for item in read(unit, config)]
        texts = [item.text for item in items if isinstance(item, Document)]
        if not texts:
            why = next((f"{i.document_id}: {i.reason} ({i.detail})" for i in items if isinstance(i, Drop)), "empty")
            raise UserError(f"target {source} of {step} has no text: {why}")
        texts_by_target[source] = texts
    return texts_by_target


def level(texts_by_target: Mapping[str, Sequence[str]], seed: int, most: int) -> list[str]:
    """The same number of examples of each target, drawn by `seed`, at most `most` of each."""
    count = min(most, *(len(texts) for texts in texts_by_target.values()))
    rng = np.random.default_rng([seed, 3])
    chosen = []
    for name in sorted(texts_by_target):
        texts = texts_by_target[name]
        chosen += [texts[int(i)] for i in np.sort(rng.permutation(len(texts))[:count])]
    return chosen


class Space:
    """Embeddings of texts, unit rows: by the run's encoder, or by LSA fitted on the sample where it has none."""

    def __init__(self, context: Context, characters: int):
        self.context, self.characters = context, characters
        self.latent: Latent | None = None

    def fit(self, texts: Sequence[str], dims: int) -> Space:
        if "embedding" not in self.context.signals:
            self.latent = Latent(dims, self.context.seed).fit([t[: self.characters] for t in texts])
        return self

    def state(self) -> dict[str, np.ndarray]:
        return self.latent.state() if self.latent else {}

    def set_state(self, arrays: Mapping[str, np.ndarray]) -> Space:
        if "latent_map" in arrays:
            self.latent = Latent(0)
            self.latent.set_state(dict(arrays))
        return self

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """float32 [N, D] of the texts' beginnings."""
        heads = [t[: self.characters] for t in texts]
        if self.latent:
            x_ND = np.concatenate([self.latent(heads[at : at + 256]) for at in range(0, len(heads), 256)])
        else:
            x_ND = self.context.signals.column("embedding", heads)
        return np.asarray(x_ND / np.maximum(np.linalg.norm(x_ND, axis=1, keepdims=True), 1e-12), np.float32)
