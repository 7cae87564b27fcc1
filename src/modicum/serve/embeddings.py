"""`/v1/embeddings`: texts to vectors by the encoder that the server was started with.

The server knows nothing of encoders: whoever starts it passes an object with these members in (`modicum serve
--encoder minilm`, or the encoder of `--index`).
"""

from __future__ import annotations

import base64
from typing import Any, Literal, Protocol

import numpy as np

from modicum.serve.request import InvalidRequest
from modicum.serve.schema import Body

MOST_TEXTS = 2048


class Embedder(Protocol):
    name: str

    def embed(self, texts: list[str]) -> np.ndarray[Any, np.dtype[np.float32]]:
        """Vectors (texts, dimension) of unit length. Called from several threads."""
        ...

    def tokens(self, texts: list[str]) -> int:
        """How many tokens these texts are to the encoder, after truncation."""
        ...


class EmbeddingsBody(Body):
    model: str
    input: str | list[str]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = None

    def texts(self) -> list[str]:
        texts = [self.input] if isinstance(self.input, str) else self.input
        if not texts or len(texts) > MOST_TEXTS or any(not text for text in texts):
            raise InvalidRequest(f"input must be 1 to {MOST_TEXTS} texts, none of them empty", "input")
        return texts


def embeddings(embedder: Embedder | None, body: EmbeddingsBody) -> dict[str, Any]:
    """OpenAI's answer. Raises `InvalidRequest` without an encoder, and for dimensions it does not have."""
    if embedder is None:
        raise InvalidRequest(
            "this server has no encoder; start it with: modicum serve MODEL --encoder minilm", "model", "no_encoder"
        )
    texts = body.texts()
    vectors_ND = np.asarray(embedder.embed(texts), np.float32)
    size = vectors_ND.shape[1]
    if body.dimensions is not None and body.dimensions != size:
        raise InvalidRequest(f"dimensions={body.dimensions}: {embedder.name} gives vectors of {size}", "dimensions")
    coded: list[Any] = vectors_ND.tolist()
    if body.encoding_format == "base64":
        coded = [base64.b64encode(vector.astype("<f4").tobytes()).decode() for vector in vectors_ND]
    tokens = embedder.tokens(texts)
    return {
        "object": "list",
        "data": [{"object": "embedding", "index": i, "embedding": vector} for i, vector in enumerate(coded)],
        "model": embedder.name,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }
