"""The interface of encoders, and what they have in common.

Shape letters: N texts, E dimensions of pooled vectors, D of the final ones.

An encoder works in two steps so that a long encoding can be resumed: `pool` is the expensive one and needs only the
statistics of `count`; `fit` and `finish` turn pooled vectors into final ones and cost two passes over an array.
"""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from modicum.core.files import sha256, write_json
from modicum.model import sources

SAMPLE_BYTES = 1 << 20  # read from each end of a weight file to recognise it


class Encoder(ABC):
    """Texts to vectors. `model` is a folder, a known name or a hub id."""

    kind: ClassVar[str]
    model: str

    def count(self, texts: Iterable[str]) -> None:  # noqa: B027 - most encoders need no statistics
        """See every text once before any is pooled."""

    @abstractmethod
    def pool(self, texts: Sequence[str]) -> np.ndarray:
        """pooled_NE, float32."""

    def fit(self, blocks: Iterable[np.ndarray]) -> None:  # noqa: B027
        """See every pooled_NE once before any is finished."""

    @abstractmethod
    def finish(self, pooled_NE: np.ndarray) -> np.ndarray:
        """vectors_ND, float32 of length 1 (0 for a text without content)."""

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """vectors_ND of passages."""
        return self.finish(self.pool(texts))

    def encode_queries(self, texts: Sequence[str]) -> np.ndarray:
        """vectors_ND of queries."""
        return self.encode(texts)

    def settings(self) -> dict[str, Any]:
        """JSON-able; two encoders with equal settings pool alike once they have counted the same texts."""
        return {"kind": self.kind, "model": self.model, "model_fingerprint": fingerprint(self.model)}

    def state(self) -> dict[str, np.ndarray]:
        """Arrays made by `count` and `fit`."""
        return {}

    def set_state(self, state: dict[str, np.ndarray]) -> None:  # noqa: B027
        """Restore what `state` gave."""

    def save(self, folder: str | Path) -> None:
        """Settings and state; not the model itself."""
        from safetensors.numpy import save_file

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        here = self.settings()
        if Path(self.model).is_dir() and not sources.is_name(
            self.model
        ):  # found again when index and model move together
            here["relative"] = os.path.relpath(Path(self.model).resolve(), folder.resolve())
        write_json(folder / "encoder.json", here)
        save_file({k: np.ascontiguousarray(v) for k, v in self.state().items()}, str(folder / "encoder.safetensors"))


def unit(x_ND: np.ndarray) -> np.ndarray:
    """Rows divided by their length; rows of zeros stay."""
    length_N1 = np.linalg.norm(x_ND, axis=1, keepdims=True)
    return (x_ND / np.where(length_N1 > 0, length_N1, 1)).astype(np.float32)


def fingerprint(model: str) -> str | None:
    """16 hex digits of a model folder or known name: small files whole, weights by length and both ends.

    None for a hub id.
    """
    folder = Path(sources.resolve(model))
    if not folder.is_dir():
        return None
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.suffix in (".json", ".safetensors", ".gguf") and p.is_file()):
        digest.update(f"{path.relative_to(folder).as_posix()} {path.stat().st_size} ".encode())
        if path.stat().st_size <= 2 * SAMPLE_BYTES:
            digest.update(sha256(path).encode())
            continue
        with open(path, "rb") as file:
            digest.update(file.read(SAMPLE_BYTES))
            file.seek(-SAMPLE_BYTES, os.SEEK_END)
            digest.update(file.read())
    return digest.hexdigest()[:16]
