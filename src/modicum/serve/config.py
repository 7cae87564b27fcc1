"""What an engine is told: limits, methods, how much memory its cache may take; and what follows from it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from modicum.budget.machine import memory_available
from modicum.budget.units import bytes_text, kind_of
from modicum.core import compose, registry
from modicum.core.choice import Choice
from modicum.core.errors import BudgetError, UserError
from modicum.model.config import DecoderConfig
from modicum.model.folder import parse_dtype
from modicum.model.safetensor import mapped_bytes
from modicum.serve.cacheforms import CacheForm
from modicum.serve.kv import CacheShape, KVPolicy
from modicum.serve.pages import block_bytes
from modicum.serve.schedulers import Scheduler
from modicum.serve.uneven import SHAPE, largest

AUTO_SHARE = 0.3  # of the memory that is free at the start


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Limits count tokens and sequences; `cache` is `auto`, a size (`1GiB`), tokens (`50ktok`) or bytes.

    max_batch_tokens: tokens of one step (a longer prompt is computed alone, unless prefill is chunked).
    max_length: prompt and answer together; None: the model's context length. dtype: of the cache; None: the
    model's. chunked_prefill: turns the scheduler's knob `chunked`; None: leaves it. scheduler, kv,
    cache_form (how entries are stored), drafter and guide (which models' logits are combined) choose methods with their
    knobs, as `fcfs:reserve=0.05`.
    kv_probe: tokens that say themselves again, on which a policy measures heads; none: random ones.
    draft_tokens: drafted tokens of one step, shared among its sequences.
    draft_when: `pays` (by the clock, see `serve.payoff`) or `always`. cuda_graphs: on a GPU, replay decode steps
    instead of launching every kernel anew. activation_bits: 16, or 8: where matrices are int8 or
    int4, the kernels for the CPU round what they multiply with to eight bits, a step for each 64 inputs.
    fast_prefill: steps of many rows go through PyTorch's matrix library where it is measured to be faster than the
    kernels (`backends.measured`); it sums in another order, so a prompt's last bits depend on its batch. attention:
    a pattern for the model's layers, or several by turns, in place of its own (`model.patterns`); the model is changed.
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
    cache_form: Any = "plain"
    kv_probe: tuple[int, ...] = ()
    drafter: Any = "none"
    guide: Any = "none"
    draft_tokens: int = 96
    draft_when: str = "pays"
    cuda_graphs: bool = True
    activation_bits: int = 16
    fast_prefill: bool = False
    attention: Any = None

    def __post_init__(self) -> None:
        if self.draft_when not in ("pays", "always"):
            raise UserError(f"draft_when={self.draft_when} is neither pays nor always; write one of them")
        if self.activation_bits not in (8, 16):
            raise UserError(f"activation_bits={self.activation_bits} is neither 16 nor 8; write one of them")
        for name in ("block_size", "max_batch_tokens", "max_sequences", "max_length", "draft_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name}={value} must be at least 1")


def parse_cache_dtype(name: str | None, model: torch.dtype) -> torch.dtype:
    dtype = parse_dtype(name) or model
    if not dtype.is_floating_point or dtype.itemsize < 2:
        raise UserError(f"dtype={name} cannot hold keys and values; choose float32, bfloat16 or float16")
    return dtype


def make_form(config: EngineConfig, shape: DecoderConfig, dtype: torch.dtype, begin: bool = True) -> CacheForm:
    """How entries are stored; `dtype` is what they are computed with. Raises `UserError` for knobs that cannot be.

    begin=False: only the knobs are checked, and no fit is read."""
    form: CacheForm = registry.build("cacheform", config.cache_form, largest(shape)[1], dtype)
    if begin:
        form.begin(shape)
    return form


def cache_blocks(
    config: EngineConfig, shape: DecoderConfig, dtype: torch.dtype, device: torch.device, beside: int = 0
) -> int:
    """Blocks for `config.cache`. beside: bytes that other models keep of each block.

    Raises `UserError` if that is too small, `BudgetError` if too large."""
    form = make_form(config, shape, dtype)
    block = block_bytes(shape, config.block_size, form) + beside
    token = block / config.block_size
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    else:  # pages of mapped weights count as free for the system, but every step needs them
        free = max(0, memory_available() - mapped_bytes())
    most = config.max_sequences * -(
        -min(config.max_length or shape.context_length, shape.context_length) // config.block_size
    )
    if config.cache == "auto":
        return max(1, min(most, int(free * AUTO_SHARE) // block))
    quantity = kind_of(str(config.cache))
    if quantity is None or quantity[0] not in ("bytes", "tokens", "number"):
        raise UserError(
            f"cache={config.cache!r} is not a size; write auto, a size such as 512MiB, or tokens such as 20ktok"
        )
    size = quantity[1] * (token if quantity[0] == "tokens" else 1)
    if not form.rowwise and quantity[0] != "tokens":  # of that memory, what the latest tokens take
        entry = 2 * shape.layers * math.prod(largest(shape)) * dtype.itemsize
        size -= config.max_sequences * (form.residual + config.block_size) * entry
    if size < block:
        raise UserError(
            f"cache={config.cache} holds no block: {config.block_size} tokens of this model take "
            f"{bytes_text(block)}; ask for at least that"
        )
    if size > free:
        raise BudgetError(
            f"cache={config.cache} is {bytes_text(size)}, free on {device} are {bytes_text(free)}; "
            f"ask for less, or for auto ({AUTO_SHARE:.0%} of what is free)"
        )
    return int(size // block)


def make_scheduler(config: EngineConfig, n_blocks: int) -> Scheduler:
    choice = Choice.parse("scheduler", config.scheduler)
    wanted = config.chunked_prefill
    if wanted is not None and hasattr(choice.config(), "chunked"):
        choice = Choice(choice.port, choice.method, choice.knobs | {"chunked": wanted})
    scheduler: Scheduler = registry.build(
        "scheduler", choice, config.block_size, n_blocks, config.max_batch_tokens, config.max_sequences
    )
    if wanted is not None and scheduler.chunks != wanted:
        raise UserError(
            f"chunked_prefill={wanted}: the scheduler {choice.method!r} {'never' if wanted else 'always'} cuts "
            "prompts and has no knob 'chunked' to turn; leave chunked_prefill out, or choose scheduler=fcfs"
        )
    return scheduler


def make_policy(config: EngineConfig, shape: DecoderConfig, scheduler: Scheduler) -> KVPolicy:
    """Raises `UserError` for what the policy cannot be combined with."""
    windows = tuple(layer.window for layer in shape.per_layer)
    cache = CacheShape(
        layers=shape.layers,
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        block_size=config.block_size,
        windows=windows,
        scales=tuple(layer.attention_scale for layer in shape.per_layer),
        softcap=shape.attention_softcap,
    )
    policy: KVPolicy = registry.build("kv", config.kv, cache)
    drafts = registry.load("drafter", Choice.parse("drafter", config.drafter).method).cls.drafts
    used = {
        "prefix_cache": (config.prefix_cache, "the prefix cache", "set prefix_cache=false"),
        "chunked_prefill": (scheduler.chunks, "chunked prefill", "set chunked_prefill=false"),
        "sliding_window": (any(windows), "this model's sliding windows", "choose kv=full"),
        "eviction": (policy.drops or policy.observes or policy.attends, f"kv={config.kv}", "choose kv=full"),
        "speculative_decoding": (drafts, f"drafter={config.drafter}", "choose drafter=none"),
        "gqa": (shape.heads != shape.kv_heads, "this model's grouped-query attention", "choose kv=full"),
    }
    settings = [
        compose.setting(label, provides={word}, remedy=remedy) for word, (on, label, remedy) in used.items() if on
    ]
    if SHAPE & shape.varying:
        settings.append(compose.setting("layers of different shapes", requires={"uneven_layers"}))
    if any(layer.router for layer in shape.per_layer):  # rows of one sequence go through different layers
        words = {"prefix_cache", "eviction"} & {word for word, (on, _, _) in used.items() if on}
        if words or not registry.load("cacheform", Choice.parse("cacheform", config.cache_form).method).cls.rowwise:
            raise UserError(
                "a model with routers leaves layers out of its answers, so its cache has entries of some layers only; "
                "serve it with prefix_cache=false, kv=full and a cache form that codes entries one by one"
            )
    if any(layer.attention for layer in shape.per_layer):
        settings.append(compose.setting("this model's attention pattern", requires={"attention_pattern"}))
    guide = compose.member("guide", config.guide)
    compose.resolve([compose.member("kv", config.kv), compose.member("cacheform", config.cache_form), guide, *settings])
    return policy


def longest(config: EngineConfig, shape: DecoderConfig, policy: KVPolicy, capacity: int) -> int:
    """Prompt and answer together: what the config says, the model was made for, and the cache holds."""
    most = shape.context_length
    if shape.position == "rope" and shape.rope.kind == "longrope":
        # Past its original length such a model turns all positions of a call differently, and a call
        # here holds many sequences: those that are short would change with their neighbours.
        most = min(most, int(shape.rope.options.get("original_max_position_embeddings") or most))
    given = config.max_length or most
    if given > most and not (policy.unbounded and shape.position == "rope"):
        raise UserError(f"max_length={given} is beyond the {most} tokens this model can be served with; ask for less")
    return given if policy.drops else min(given, capacity)
