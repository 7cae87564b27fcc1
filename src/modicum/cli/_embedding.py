"""An encoder for the server: joins retrieve's encoders to the server's `Embedder`."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modicum.core.errors import UserError

if TYPE_CHECKING:
    import numpy as np


class EncoderEmbedder:
    """A sentence-transformers model by folder, known name or hub id. Raises `UserError` for one that needs a corpus."""

    def __init__(self, model: str, *, device: str = "cpu"):
        import tokenizers

        from modicum.model import sources
        from modicum.retrieve.encoders import make_encoder

        if model.split(":")[0] in ("lsa", "decoder"):
            raise UserError(
                f"--encoder {model} is fitted on a corpus and embeds nothing by itself; give a sentence-transformers "
                "model, such as minilm"
            )
        self.name = Path(model).name
        self._encoder: Any = make_encoder(model, device=device)
        folder = Path(sources.resolve(model))
        self._tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._lock = threading.Lock()  # encoders are not made for several threads

    def embed(self, texts: list[str]) -> np.ndarray:
        with self._lock:
            vectors_ND: np.ndarray = self._encoder.encode(texts)
        return vectors_ND

    def tokens(self, texts: list[str]) -> int:
        return sum(sum(e.attention_mask) for e in self._tokenizer.encode_batch(texts))
