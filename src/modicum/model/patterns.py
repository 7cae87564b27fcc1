"""Attention patterns (port attention) as part of a model: one for all layers, or a cycle of them over the layers.

    with_attention(config, "sliding:window=256")                  # every layer
    with_attention(config, ["sliding:window=256", "causal"])      # by turns, from the first layer on
    with_attention(config, "sliding:window=256+causal")           # the same in a word

A sliding pattern is a layer's `window`, which kernels, caches and other programs know; any other is its `attention`,
which the decoder hands to whoever attends. What a pattern hides stays hidden in training, tasks and serving.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from modicum.core import registry
from modicum.core.choice import Choice
from modicum.core.errors import UserError
from modicum.model.attention import AttentionPattern
from modicum.model.attention.causal import Causal
from modicum.model.attention.sliding import Sliding
from modicum.model.config import DecoderConfig, by_layer
from modicum.model.families import write_config


@functools.cache
def pattern(choice: str) -> AttentionPattern:
    """The pattern of a `LayerConfig.attention`; equal texts give one object, so that masks can be shared."""
    built: AttentionPattern = registry.build("attention", choice)
    return built


def fields_of(choice: Any) -> dict[str, Any]:
    """The fields of `LayerConfig` that say a pattern."""
    parsed = Choice.parse("attention", choice)
    made = pattern(str(parsed))
    if isinstance(made, Causal):
        return {"window": None, "attention": None}
    if isinstance(made, Sliding):
        return {"window": made.config.window, "attention": None}
    return {"window": None, "attention": str(parsed)}


def with_attention(config: DecoderConfig, choices: Any) -> DecoderConfig:
    """`config` with the pattern `choices`, or with several by turns, instead of what its layers had.

    The model stays in its family if that can say it, else it becomes one of `mistral` (a window in every layer) or
    `modicum`. Raises `UserError` for more patterns than layers and for what the port does not know.
    """
    if isinstance(choices, str):
        choices = choices.split("+")
    several = list(choices) if isinstance(choices, Sequence) else [choices]
    if not 1 <= len(several) <= config.layers:
        raise UserError(f"{len(several)} attention patterns for {config.layers} layers; give one, or a cycle of a few")
    chosen = [fields_of(choice) for choice in several]
    rows = [chosen[i % len(chosen)] for i in range(config.layers)]
    old = config.overrides or ({},) * config.layers
    kept = [{k: v for k, v in layer.items() if k not in ("window", "attention")} for layer in old]
    columns = by_layer(window=[row["window"] for row in rows], attention=[row["attention"] for row in rows])
    overrides = tuple(before | new for before, new in zip(kept, columns, strict=True))
    changed = replace(config, window=None, attention=None, overrides=overrides)
    if changed == config:
        return config
    for family in (config.family, "mistral"):
        candidate = replace(changed, family=family, source=config.source if family == config.family else {})
        try:
            write_config(candidate, "float32")
            return candidate
        except UserError:
            continue
    return replace(changed, family="modicum", source={})


def set_attention(model: Any, choices: Any) -> None:
    """Give a decoder other patterns, in place."""
    model.config = with_attention(model.config, choices)
    for block, layer in zip(model.layers, model.config.per_layer, strict=True):
        if not hasattr(block.attention, "pattern"):
            raise UserError(f"the mixer {layer.mixer} has no attention pattern")
        block.attention.window = layer.window
        block.attention.pattern = None if layer.attention is None else pattern(layer.attention)
