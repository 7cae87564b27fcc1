"""Callbacks (`core.callback`) in training: what they ask of the data, and their state in checkpoints."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from modicum.core.callback import Callback
from modicum.core.errors import UserError

__all__ = ["Callback", "check_stream", "join_state", "split_state"]


def check_stream(name: str, part: Callback, stream: Any) -> None:
    """Raise `UserError` if `stream` was not built as `part`, called `name`, asks."""
    for knob, wanted in part.stream_knobs().items():
        given = getattr(stream, knob, None)
        if given != wanted:
            raise UserError(
                f"{name} needs training data in a stream with {knob}={wanted!r}, and this one has {knob}={given!r}: "
                f"build it with Stream(..., {knob}={wanted!r}), as pretraining does, or choose another method"
            )


def split_state(state: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, JSON values) of a flat state dict."""
    tensors = {k: v for k, v in state.items() if isinstance(v, Tensor)}
    return tensors, {k: v for k, v in state.items() if k not in tensors}


def join_state(tensors: dict[str, Tensor], values: dict[str, Any]) -> dict[str, Any]:
    return {**tensors, **values}
