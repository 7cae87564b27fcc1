"""Finished items on disk: an evaluation that was stopped goes on where it was.

An item is one document (or one lm-eval request) under everything its outcome depends on: the model's and the
tokenizer's fingerprints, the task with all its knobs and its version, and the text that was asked. Its key
is a hash of these, so a file may hold items of any number of models and tasks.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modicum.core.events import Events, read_events
from modicum.core.files import fingerprint

if TYPE_CHECKING:
    from modicum.data.tokenizer import Tokenizer

SAMPLED = 1024  # values of each tensor that enter a model's fingerprint


class Kept:
    """Items by key, read once and appended to; without a path they live in memory only."""

    def __init__(self, path: str | Path | None = None):
        self._events = Events(path, stage="eval")
        self._items: dict[str, Any] = {}
        if path is not None:
            self._items = {e["key"]: e["value"] for e in read_events(path, "item") if "key" in e and "value" in e}

    def __contains__(self, key: str) -> bool:
        return key in self._items

    def __getitem__(self, key: str) -> Any:
        return self._items[key]

    def add(self, key: str, value: Any, **about: Any) -> None:
        """Keep `value`; `about` is written beside it for people who read the file."""
        self._items[key] = value
        self._events.emit("item", key=key, value=value, **about)


def model_fingerprint(model: Any, tokenizer: Tokenizer) -> str:
    """16 hex digits for weights and vocabulary: shapes, types and some values of each tensor.

    SAMPLED of them, evenly spaced: cheap for a model of any size. Two trained models differ nearly
    everywhere, so a sample tells them apart; an edit of single weights may go unseen.
    """
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if not isinstance(tensor, torch.Tensor):
            continue
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype};".encode())
        flat = tensor.detach().reshape(-1)
        sample = flat[:: max(1, len(flat) // SAMPLED)][: 2 * SAMPLED].cpu()
        digest.update(sample.to(torch.float64).numpy().tobytes())
    return fingerprint([digest.hexdigest(), tokenizer.fingerprint])
