"""An engine from a model folder."""

from __future__ import annotations

from pathlib import Path

import torch

from modicum.data.tokenizer import Tokenizer
from modicum.model.folder import find_folder, load_model
from modicum.serve.config import EngineConfig
from modicum.serve.engine import Engine


def load_engine(
    path_or_hub_id: str | Path,
    config: EngineConfig | None = None,
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str = "cpu",
    size: float | str | None = None,
) -> Engine:
    """Model (its attached forms included) and tokenizer of a folder or hub id, behind an engine.

    size: bytes of weights to load, of a model in blocks.
    """
    folder = find_folder(path_or_hub_id)
    tokenizer = Tokenizer.load(folder)
    return Engine(load_model(folder, dtype=dtype, device=device, size=size, keep_quantized=True), tokenizer, config)
