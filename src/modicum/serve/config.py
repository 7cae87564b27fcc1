"""What an engine is told: limits, methods, and how much memory its cache may take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import psutil
import torch

from modicum.budget.units import bytes_text, kind_of
from modicum.core.errors import BudgetError, UserError
from modicum.model.config import DecoderConfig
from modicum.model.folder import parse_dtype

AUTO_SHARE = 0.3   # of the memory that is free at the start


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Limits count tokens and sequences; `cache` is `auto`, a size (`1GiB`), tokens (`50ktok`) or bytes.

    max_batch_tokens: tokens of one step (a longer prompt is computed alone, unless prefill is chunked).
    max_length: prompt and answer together; None: the model's context length. dtype: of the cache; None: the
    model's. chunked_prefill: turns the scheduler's knob `chunked`; None: leaves it. scheduler and kv choose
    methods with their knobs, as `fcfs:reserve=0.05`.
    """

    block_size: int = 16
    cache: str | int = "auto"
    max_batch_tokens: int = 2048
    max_sequences: int = 64
    max_length: int | None = None
    prefix_cache: bool = True
    chunked_prefill: bool | None = None
    dtype: str | None = None
    scheduler: Any = "fcfs"
    kv: Any = "full"

    def __post_init__(self) -> None:
        for name in ("block_size", "max_batch_tokens", "max_sequences", "max_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name}={value} must be at least 1")


def parse_cache_dtype(name: str | None, model: torch.dtype) -> torch.dtype:
    dtype = parse_dtype(name) or model
    if not dtype.is_floating_point or dtype.itemsize < 2:
        raise UserError(f"dtype={name} cannot hold keys and values; choose float32, bfloat16 or float16")
    return dtype


def cache_blocks(config: EngineConfig, shape: DecoderConfig, dtype: torch.dtype, device: torch.device) -> int:
    """Number of blocks for `config.cache`. Raises `UserError` for one too small, `BudgetError` for one too large."""
    token = shape.kv_bytes_per_token(dtype)
    block = token * config.block_size
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    most = config.max_sequences * -(-min(config.max_length or shape.context_length, shape.context_length)
                                    // config.block_size)
    if config.cache == "auto":
        return max(1, min(most, int(free * AUTO_SHARE) // block))
    quantity = kind_of(str(config.cache))
    if quantity is None or quantity[0] not in ("bytes", "tokens", "number"):
        raise UserError(f"cache={config.cache!r} is not a size; write auto, a size such as 512MiB, or tokens such as "
                        "20ktok")
    size = quantity[1] * (token if quantity[0] == "tokens" else 1)
    if size < block:
        raise UserError(f"cache={config.cache} holds no block: {config.block_size} tokens of this model take "
                        f"{bytes_text(block)}; ask for at least that")
    if size > free:
        raise BudgetError(f"cache={config.cache} is {bytes_text(size)}, free on {device} are {bytes_text(free)}; "
                          f"ask for less, or for auto ({AUTO_SHARE:.0%} of what is free)")
    return int(size // block)
