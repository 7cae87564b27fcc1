"""A model as it is used: its adapter attached, its weights in the linear form asked for."""

from __future__ import annotations

from pathlib import Path

import torch

from modicum.adapt.peft_format import load_peft
from modicum.core.choice import Choice
from modicum.model import attach
from modicum.model.decoder import Decoder
from modicum.model.folder import load_model


def load_adapted(
    folder: str | Path,
    *,
    adapter: str | Path | None = None,
    form: str | Choice | None = None,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str = "cpu",
    size: float | str | None = None,
) -> Decoder:
    """The decoder of `folder` with a PEFT `adapter` on it and its layers in `form`, which holds the adapted weights.

    Arguments otherwise as in `model.folder.load_model`. Raises `UserError` for a form that cannot take over weights,
    before anything is read.
    """
    if form is not None:
        attach.require_fit(form)
    as_stored = adapter is None and form is None
    decoder = load_model(folder, dtype=dtype, device=device, size=size, keep_quantized=as_stored)
    if adapter is not None:
        load_peft(decoder, adapter)
    if form is not None:
        if adapter is not None:
            attach.merge(decoder)
        attach.attach(decoder, {"layers.*": form})
    return decoder
