"""Callbacks (`core.callback`) in training: their state in checkpoints."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from modicum.core.callback import Callback

__all__ = ["Callback", "join_state", "split_state"]


def split_state(state: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, JSON values) of a flat state dict."""
    tensors = {k: v for k, v in state.items() if isinstance(v, Tensor)}
    return tensors, {k: v for k, v in state.items() if k not in tensors}


def join_state(tensors: dict[str, Tensor], values: dict[str, Any]) -> dict[str, Any]:
    return {**tensors, **values}
