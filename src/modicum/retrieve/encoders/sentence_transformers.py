"""sentence-transformers: a published or trained sentence encoder, with its own prompts.

A folder that is a transformer and one pooling (mean or first token) is opened with `transformers` alone; any other
with the library `sentence-transformers` (the extra `encoders`). Encoders trained to be cut short (`2dmse`) take two
knobs: `layers` runs that many layers only, `dims` keeps that many leading dimensions, before the length is made 1:

    v = unit(pool(H_layers)[:dims])

Reimers and Gurevych 2019, arXiv:1908.10084; the cuts are those of Li et al. 2024, arXiv:2402.14776, section 3. With
`unit=false` vectors keep their length, as encoders trained on dot products want. `tokens` gives the states of the
last layer that runs, each of length 1 where `unit` is set; prompts, dense layers and cuts of folders that need the
library are left to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from modicum.core.errors import MissingExtra, UserError
from modicum.model import sources
from modicum.retrieve.encoders import Encoder, Side, unit
from modicum.retrieve.encoders._plain import PlainSentence


@dataclass(frozen=True, kw_only=True)
class Config:
    model: str  # a folder, a known name such as minilm, or a hub id
    batch: Annotated[int, Field(ge=1)] = 64  # texts of one forward pass
    layers: Annotated[int, Field(ge=1)] | None = None  # layers that run; None: all
    dims: Annotated[int, Field(ge=1)] | None = None  # leading dimensions kept; None: all
    unit: bool = True  # vectors of length 1


SWEEP = ("model=minilm",)


class SentenceTransformer(Encoder):
    config: Config

    def __init__(self, config: Any, device: str = "cpu"):
        super().__init__(config, device)
        self.unit = config.unit
        model_folder = sources.resolve(config.model)
        try:
            self._plain = PlainSentence.open(model_folder, device, config.layers)
            self._model = None if self._plain else self._library(model_folder, device)
        except (OSError, ValueError) as error:
            raise UserError(
                f"{config.model} does not open as an encoder ({str(error).splitlines()[0]}); give a folder, a known "
                "name or a hub id of a sentence-transformers model, or decoder:model=FOLDER for a language model"
            ) from None

    def _library(self, model_folder: str, device: str) -> Any:
        if self.config.layers is not None:
            raise UserError(f"{self.config.model} is more than a transformer and a pooling, so layers= cannot cut it")
        try:
            from sentence_transformers import SentenceTransformer as Library
        except ImportError:
            raise MissingExtra("sentence-transformers", "encoders", f"the encoder {self.config.model}") from None
        return Library(model_folder, device=device, trust_remote_code=False)

    def _vectors(self, side: Side, texts: Sequence[str]) -> np.ndarray:
        if self._plain is not None:
            vectors_ND = self._plain.encode(texts, self.config.batch)
        else:
            encode = getattr(self._model, f"encode_{side}")
            kind: Any = {"batch_size": self.config.batch, "show_progress_bar": False, "convert_to_numpy": True}
            vectors_ND = np.asarray(encode(list(texts), **kind), np.float32)
        vectors_ND = vectors_ND[:, : self.config.dims]
        return unit(vectors_ND) if self.config.unit else np.ascontiguousarray(vectors_ND)

    def pool(self, texts: Sequence[str]) -> np.ndarray:
        return self._vectors("document", texts)

    def encode_queries(self, texts: Sequence[str]) -> np.ndarray:
        return self._vectors("query", texts)

    def tokens(self, texts: Sequence[str], side: Side = "document") -> list[np.ndarray]:
        if self._plain is None:
            return super().tokens(texts, side)
        states = [h_TD[:, : self.config.dims] for h_TD in self._plain.tokens(texts, self.config.batch)]
        return [unit(h_TD) for h_TD in states] if self.config.unit else states
