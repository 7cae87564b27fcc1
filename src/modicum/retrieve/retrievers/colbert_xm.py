"""colbert-xm: late interaction over languages: each text is read with its own language's adapters.

    score(q, d) = sum over query tokens i of max over passage tokens j of <q_i, d_j>        vectors of length 1

Query and passage may be of different languages; `detect` decides by script and frequent words, among the languages that
the model has adapters of, unless `language` says it for all. The model comes from trainer `colbert-xm`; a language
that it lacks is added by `languages.learn_language`, which changes no other language's vectors. Louis et al. 2024,
arXiv:2402.15059. Departs: vectors are float16, all compared, as in `late`; the authors' index keeps 2 bits of each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from modicum.core.errors import UserError
from modicum.core.files import read_json
from modicum.retrieve.retrievers import Retriever
from modicum.retrieve.retrievers.late import LateInteraction as _Late

NOT_MEASURABLE = "it needs a model that was trained; bench trainer colbert-xm measures both"


@dataclass(frozen=True, kw_only=True)
class Config:
    model: str  # a folder that trainer colbert-xm left
    language: str = ""  # of all texts; "": detected, text by text
    depth: Annotated[int, Field(ge=1)] = 200  # passages that are compared token by token


class ColbertXMStore(_Late):
    config: Any

    def __init__(self, config: Any, device: str = "cpu"):
        Retriever.__init__(self, config, device)
        self.states_TD = np.empty((0, 0), np.float16)
        self.start_N = np.zeros(1, np.int64)
        self.mean_ND = np.empty((0, 0), np.float32)
        if config.model:
            self.encoder: Any = _TokenEncoder.open(Path(config.model), config.language)

    @classmethod
    def of(cls, student: Any, adapters: Any, head: Any, language: str = "") -> ColbertXMStore:
        """From a model in memory; it cannot be saved."""
        made = cls(Config(model="", language=language))
        made.encoder = _TokenEncoder(student, adapters, head, language)
        return made

    def _write(self, folder: Path) -> None:
        if not self.config.model:
            raise UserError("this model is in memory alone; save it with its trainer and open the folder as model=")
        super()._write(folder)


class _TokenEncoder:
    """What `late` asks of an encoder."""

    def __init__(self, student: Any, adapters: Any, head: Any, language: str):
        self.student, self.adapters, self.head, self.language = student, adapters, head, language

    @classmethod
    def open(cls, folder: Path, language: str) -> _TokenEncoder:
        from safetensors.torch import load_file

        from modicum.retrieve import languages
        from modicum.retrieve.student import Student

        if not (folder / "colbert-xm.json").is_file():
            raise UserError(f"{folder} has no colbert-xm.json; train it with the trainer colbert-xm")
        shape = read_json(folder / "colbert-xm.json")
        student, adapters = Student.open(folder / languages.BASE).eval(), languages.adapters_of(folder).eval()
        adapters.attach(student.model)
        head = languages.LateHead(student.width, shape["dims"], shape["query_tokens"])
        head.load_state_dict(load_file(folder / "late.safetensors"))
        return cls(student, adapters, head.eval(), language)

    def tokens(self, texts: Sequence[str], side: str = "document") -> list[np.ndarray]:
        """Vectors of every text's tokens; a text of punctuation alone keeps its first."""
        import torch

        from modicum.retrieve.languages import detect

        result: list[np.ndarray] = []
        with torch.inference_mode():
            for start in range(0, len(texts), 32):
                part = list(texts[start : start + 32])
                spoken = [self.language or detect(t, self.adapters.languages) for t in part]
                with self.adapters.speaking(spoken):
                    vectors_NTE, mask_NT = self.head(self.student, part, query=side == "query")
                for vectors_TE, mask_T in zip(vectors_NTE, mask_NT, strict=True):
                    kept_T = mask_T if bool(mask_T.any()) else torch.arange(len(mask_T)) == 0
                    result.append(vectors_TE[kept_T].float().cpu().numpy())
        return result
