"""bpe: byte pairs merged from the most frequent on, as the pipeline's own tokenizer does it.

    merge argmax over pairs (a, b) of count(a b), until the vocabulary has `vocabulary` tokens

Sennrich et al. 2016 (arXiv:1508.07909), section 3.2; on bytes, Radford et al. 2019. Departs from nothing: it is
`data.tokenizer`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from modicum.core.errors import UserError
from modicum.data.codecs import Codec
from modicum.data.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class Config:
    vocabulary: int = 4096

    def __post_init__(self) -> None:
        if self.vocabulary < 258:
            raise ValueError(f"vocabulary={self.vocabulary} must be at least 258: 256 bytes and two marks")


TOY = Config(vocabulary=300)


class Bpe(Codec):
    config: Config
    tokenizer: Tokenizer | None = None

    def fit(self, texts: Iterable[str]) -> Bpe:
        self.tokenizer = Tokenizer.train(texts, self.config.vocabulary)
        return self

    @property
    def fitted(self) -> Tokenizer:
        if self.tokenizer is None:
            raise UserError("the codec bpe was not fitted; call fit with some texts")
        return self.tokenizer

    @property
    def vocab_size(self) -> int:
        return self.fitted.vocab_size

    def encode(self, text: str) -> list[int]:
        return list(self.fitted.encode(text, specials=False))

    def decode(self, ids: Iterable[int]) -> str:
        return self.fitted.decode(ids, skip_special=False)

    def state(self) -> dict[str, np.ndarray]:
        with TemporaryDirectory() as folder:
            self.fitted.save(folder)
            files = {p.name: p.read_bytes() for p in sorted(Path(folder).iterdir())}
        return {name: np.frombuffer(data, np.uint8) for name, data in files.items()}

    def set_state(self, state: Mapping[str, np.ndarray]) -> Bpe:
        with TemporaryDirectory() as folder:
            for name, data in state.items():
                (Path(folder) / Path(name).name).write_bytes(data.tobytes())
            self.tokenizer = Tokenizer.load(folder)
        return self
