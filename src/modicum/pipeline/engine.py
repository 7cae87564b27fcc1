"""The serving engine as a recipe names it: `engine: {kv: h2o, prefix_cache: false, cache_form: int8}`.

Its keys are the fields of `serve.config.EngineConfig`. What does not go together is refused when a recipe is read, as
far as it depends on no model.
"""

from __future__ import annotations

from typing import Annotated, Any

import torch
from pydantic import BeforeValidator

from modicum.budget import units
from modicum.core.choice import make_config
from modicum.core.errors import UserError
from modicum.model.config import DecoderConfig, llama_like
from modicum.serve.config import EngineConfig, make_form, make_policy, make_scheduler
from modicum.serve.pages import block_bytes

BLOCKS = 64  # of the cache of a scheduler that is only asked what it does
STAND_IN = llama_like(512, 1024, 8, 16, 16, context_length=1 << 20)  # a model that asks nothing of an engine


def engine_config(knobs: dict[str, Any], where: str = "engine", **defaults: Any) -> EngineConfig:
    """The configuration that a recipe's keys say, over a stage's own defaults."""
    try:
        made: EngineConfig = make_config(EngineConfig, defaults | knobs, where)
    except UserError as error:
        raise UserError(str(error).partition(" Type: modicum show")[0]) from None
    return made


def _checked(knobs: Any) -> Any:
    if not isinstance(knobs, dict):
        raise UserError(f"engine={knobs!r} must be keys and values, for example {{kv: h2o, prefix_cache: false}}")
    config = engine_config(knobs)
    try:
        make_form(config, STAND_IN, torch.bfloat16, begin=False)
        make_policy(config, STAND_IN, make_scheduler(config, BLOCKS))
    except UserError as error:
        raise UserError(f"engine: {error}") from None
    return knobs


EngineKnobs = Annotated[dict[str, Any], BeforeValidator(_checked)]


def cache_bytes(config: EngineConfig, shape: DecoderConfig, dtype: torch.dtype) -> float:
    """Bytes of the cache, for a plan; `auto`: as many as one sequence of full length takes."""
    token = block_bytes(shape, config.block_size, make_form(config, shape, dtype)) / config.block_size
    if config.cache == "auto":
        return float(token * min(config.max_length or shape.context_length, shape.context_length))
    kind, value = units.kind_of(str(config.cache)) or ("bytes", 0.0)
    return value * token if kind == "tokens" else value
