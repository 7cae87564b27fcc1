"""The serving engine as a recipe names it: `engine: {kv: snapkv, drafter: prompt-lookup, activation_bits: 8}`.

Its keys are the fields of `serve.config.EngineConfig`. What does not go together is refused when a recipe is read, as
far as it depends on no model.
"""

from __future__ import annotations

from typing import Annotated, Any

import torch
from pydantic import BeforeValidator

from modicum.budget import units
from modicum.core import compose
from modicum.core.choice import make_config
from modicum.core.errors import UserError
from modicum.model.config import DecoderConfig
from modicum.serve.config import EngineConfig, make_scheduler

BLOCKS = 64  # of the cache of a scheduler that is only asked what it does


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
    scheduler = make_scheduler(config, BLOCKS)
    members = [compose.member(port, getattr(config, port)) for port in ("kv", "scheduler", "drafter")]
    if config.prefix_cache:
        members.append(
            compose.setting("the prefix cache", provides={"prefix_cache"}, remedy="set engine.prefix_cache=false")
        )
    if scheduler.chunks:
        members.append(
            compose.setting("chunked prefill", provides={"chunked_prefill"}, remedy="set engine.chunked_prefill=false")
        )
    compose.resolve(members, where="engine")
    return knobs


EngineKnobs = Annotated[dict[str, Any], BeforeValidator(_checked)]


def cache_bytes(config: EngineConfig, shape: DecoderConfig, dtype: torch.dtype) -> float:
    """Bytes of the cache, for a plan; `auto`: as many as one sequence of full length takes."""
    token = shape.kv_bytes_per_token(dtype)
    if config.cache == "auto":
        return float(token * min(config.max_length or shape.context_length, shape.context_length))
    kind, value = units.kind_of(str(config.cache)) or ("bytes", 0.0)
    return value * token if kind == "tokens" else value
