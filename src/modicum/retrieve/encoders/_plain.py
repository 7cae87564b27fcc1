"""The common sentence encoder without the library `sentence-transformers`: a transformer, a pooling, unit length.

Most published encoders (all-MiniLM, bge, e5, gte) are a transformer whose last hidden states are averaged over the
tokens or taken at the first one. Their folders declare that in modules.json; for such a folder `transformers` is
enough, and no optional package needs to be installed. Folders that declare more (prompts, dense layers, several
poolings) are not opened here.

Shape letters: N texts, B batch, T tokens, D width of the model.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from modicum.core.errors import UserError
from modicum.retrieve import connected

LANGUAGES = "languages.json"  # of a folder with adapters of several languages
_MODES = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}


class PlainSentence:
    """`PlainSentence.open(folder)` is None for a folder that declares more than a transformer and one pooling."""

    def __init__(self, folder: Path, pooling: str, max_tokens: int | None, device: str, layers: int | None = None):
        from transformers import AutoModel, AutoTokenizer
        from transformers.utils import logging

        self._tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
        shown = logging.is_progress_bar_enabled()
        logging.disable_progress_bar()  # of reading weights, which takes a moment
        try:
            self._model = AutoModel.from_pretrained(str(folder), trust_remote_code=False).to(device).eval()
        finally:
            if shown:
                logging.enable_progress_bar()
        if layers is not None:
            stack = getattr(getattr(self._model, "encoder", None), "layer", None)
            if stack is None or layers > len(stack):
                depth = "an unknown number of" if stack is None else len(stack)
                raise UserError(f"layers={layers} does not cut {folder}, which has {depth} layers; leave layers out")
            del stack[layers:]
        self._pooling, self._device = pooling, device
        self._spoken: Any = None  # adapters chosen by the language of each text
        most = (max_tokens, getattr(self._model.config, "max_position_embeddings", None))
        self._max_tokens = min([n for n in most if n] or [512])

    @classmethod
    def open(cls, folder: str | Path, device: str, layers: int | None = None) -> PlainSentence | None:
        folder = Path(folder)
        if (folder / connected.FILE).is_file():
            made = cls.open(folder / connected.BASE, device)
            if made is None or layers is not None:
                raise UserError(f"{folder} is an encoder with adapters, which layers= cannot cut; leave it out")
            connected.attached(folder, made._model)
            return made
        if (folder / LANGUAGES).is_file():
            from modicum.retrieve import languages

            made = cls.open(folder / languages.BASE, device)
            if made is None or layers is not None:
                raise UserError(f"{folder} is an encoder with adapters, which layers= cannot cut; leave it out")
            made._spoken = languages.adapters_of(folder).to(device).eval()
            made._spoken.attach(made._model)
            return made
        shape = plain_shape(folder) if (folder / "modules.json").is_file() else None
        return None if shape is None else cls(folder, *shape, device, layers)

    def encode(self, texts: Sequence[str], batch: int) -> np.ndarray:
        """vectors_ND, float32, as pooled: not of length 1."""
        vectors_ND = np.empty((len(texts), self._model.config.hidden_size), np.float32)
        for rows, h_BTD, mask_BT in self._states(texts, batch):
            if self._pooling == "cls":
                pooled_BD = h_BTD[:, 0]
            else:
                mask_BT1 = mask_BT[..., None].float()
                pooled_BD = (h_BTD * mask_BT1).sum(1) / mask_BT1.sum(1).clamp(min=1e-9)
            vectors_ND[rows] = pooled_BD.cpu().numpy()
        return vectors_ND

    def tokens(self, texts: Sequence[str], batch: int) -> list[np.ndarray]:
        """states_TD of every text, float32, special tokens included."""
        states: list[np.ndarray] = [np.empty((0, 0), np.float32)] * len(texts)
        for rows, h_BTD, mask_BT in self._states(texts, batch):
            for row, h_TD, mask_T in zip(rows, h_BTD, mask_BT, strict=True):
                states[row] = h_TD[mask_T.bool()].cpu().numpy()
        return states

    def _states(self, texts: Sequence[str], batch: int) -> Iterator[tuple[list[int], Any, Any]]:
        """(rows, h_BTD, mask_BT), texts alike in length together: little padding."""
        import torch

        order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
        with torch.inference_mode():
            for start in range(0, len(order), batch):
                rows = order[start : start + batch]
                inputs = self._tokenizer(
                    [texts[i].strip() for i in rows],
                    padding=True,
                    truncation=True,
                    max_length=self._max_tokens,
                    return_tensors="pt",
                ).to(self._device)
                with self._speaking([texts[i] for i in rows]):
                    h_BTD = self._model(**inputs).last_hidden_state.float()
                yield rows, h_BTD, inputs["attention_mask"]

    def _speaking(self, texts: Sequence[str]) -> Any:
        if self._spoken is None:
            return contextlib.nullcontext()
        from modicum.retrieve.languages import detect

        return self._spoken.speaking([detect(t, self._spoken.languages) for t in texts])


def plain_shape(folder: Path) -> tuple[str, int | None] | None:
    """(pooling, most tokens) of a folder that is a transformer, one pooling and at most a normalisation."""
    modules = _read(folder / "modules.json")
    kinds = [str(m.get("type", "")).rpartition(".")[2] for m in modules] if isinstance(modules, list) else []
    if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]) or modules[0].get("path"):
        return None
    pooling = _read(folder / str(modules[1].get("path", "")) / "config.json") or {}
    modes = [key for key, value in pooling.items() if key.startswith("pooling_mode_") and value]
    mode = pooling.get("pooling_mode") or (_MODES.get(modes[0]) if len(modes) == 1 else None)
    settings: Any = _read(folder / "sentence_bert_config.json") or {}
    prompts = (_read(folder / "config_sentence_transformers.json") or {}).get("prompts") or {}
    if mode not in _MODES.values() or any(prompts.values()) or settings.keys() - {"max_seq_length", "do_lower_case"}:
        return None
    return None if settings.get("do_lower_case") else (str(mode), settings.get("max_seq_length"))


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
