"""What a decoder is made of, independent of the family whose files it came from.

`DecoderConfig` describes the shape as a list of `LayerConfig`; `llama_like` and `sized` make one; the families under
`model/families` read and write it as a Hugging Face `config.json`. Nothing here imports torch, so a
planner can count parameters, FLOPs and bytes of a model that is never built.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from modicum.core import registry
from modicum.core.errors import UserError, unknown

ROPE_KINDS = ("default", "linear", "llama3", "yarn", "longrope")
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")
ITEM_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1, "float8_e5m2": 1, "int8": 1}


@dataclass(frozen=True, kw_only=True)
class Rope:
    """Rotary position embedding (Su et al. 2021, arXiv:2104.09864) and its stretched variants.

    `kind` is one of `ROPE_KINDS`; `options` holds what that kind needs under its Hugging Face names
    (factor, low_freq_factor, original_max_position_embeddings, beta_fast, short_factor, ...).
    """

    theta: float = 10000.0
    fraction: float = 1.0  # share of each head's dimensions that is rotated, from the front
    kind: str = "default"
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.kind not in ROPE_KINDS:
            raise unknown("RoPE scaling", self.kind, ROPE_KINDS)


@dataclass(frozen=True, kw_only=True)
class _LayerFields:
    """What may differ from layer to layer."""

    heads: int  # query heads
    kv_heads: int  # key/value heads; divides `heads`
    head_dim: int
    mlp_width: int
    mixer: str = "softmax"  # what mixes tokens: a file of model/mixers
    attention: str | None = None  # pattern of the port attention within the window; None: all that is causal
    window: int | None = None  # keys a query sees, itself included; None: all
    rope: Rope | None = field(default_factory=Rope)  # None: queries and keys are not rotated
    scale: float | None = None  # of attention scores; None: head_dim ** -0.5
    attention_softcap: float | None = None  # cap * tanh(score / cap)
    qk_norm: str | None = None  # None | head (over head_dim) | full (over all heads together)
    qkv_bias: bool = False
    o_bias: bool = False
    gated: bool = True  # MLP: down(act(gate(x)) * up(x)), else down(act(up(x)))
    activation: str = "silu"
    mlp_bias: bool = False
    norm_place: str = "pre"  # pre | output (of a branch) | sandwich (both) | after (the sum)
    parallel: bool = False  # attention and MLP read the same stream and are added together
    router: bool = False  # decides whether a sequence's answer needs the layer (`serve.backends.routed`)


@dataclass(frozen=True, kw_only=True)
class LayerConfig(_LayerFields):
    """One layer of a decoder. Raises `UserError` for a shape that cannot be built."""

    def __post_init__(self) -> None:
        for name in ("heads", "kv_heads", "head_dim", "mlp_width"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be at least 1")
        if self.heads % self.kv_heads:
            raise UserError(f"kv_heads={self.kv_heads} must divide heads={self.heads}")
        if self.window is not None and self.window < 1:
            raise UserError(f"window={self.window} must be at least 1 (None: all keys are seen)")
        for name, allowed in (
            ("activation", ACTIVATIONS),
            ("norm_place", ("pre", "output", "sandwich", "after")),
            ("qk_norm", (None, "head", "full")),
        ):
            if getattr(self, name) not in allowed:
                raise unknown(name, getattr(self, name), allowed)

    @property
    def attention_scale(self) -> float:
        """What multiplies q k."""
        return self.head_dim**-0.5 if self.scale is None else self.scale

    def matmul_weights(self, width: int) -> int:
        """Weights that take part in matrix products, for a residual stream of `width`."""
        mixer = softmax_weights if self.mixer == "softmax" else _mixer(self.mixer).matmul_weights
        return int(mixer(self, width)) + width * self.mlp_width * (3 if self.gated else 2)

    def parameters(self, width: int, norm_size: int) -> int:
        """`norm_size`: parameters of one norm over the residual stream."""
        mixer = softmax_others if self.mixer == "softmax" else _mixer(self.mixer).other_parameters
        total = self.matmul_weights(width) + norm_size * (4 if self.norm_place == "sandwich" else 2)
        total += (width + 1) * self.router
        return total + int(mixer(self, width)) + (self.mlp_width * (2 if self.gated else 1) + width) * self.mlp_bias

    def keys_per_query(self, length: int) -> float:
        """Keys that a query sees, averaged over a sequence of `length` tokens."""
        w = min(self.window or length, length)
        seen = (w * (w + 1) / 2 + (length - w) * w) / length
        if self.attention is None:
            return seen
        pattern: Any = registry.build("attention", self.attention)  # imports torch
        return min(seen, float(pattern.keys_per_query(length)))


def softmax_weights(layer: LayerConfig, width: int) -> int:
    """Weights of q, k, v and o."""
    return width * layer.head_dim * (2 * layer.heads + 2 * layer.kv_heads)


def softmax_others(layer: LayerConfig, width: int) -> int:
    """Biases and norms of softmax attention."""
    heads, kv = layer.heads * layer.head_dim, layer.kv_heads * layer.head_dim
    biases = (heads + 2 * kv) * layer.qkv_bias + width * layer.o_bias
    return biases + {None: 0, "head": 2 * layer.head_dim, "full": heads + kv}[layer.qk_norm]


def _mixer(name: str) -> Any:
    from modicum.model import mixers  # imports torch

    return mixers.load(name)


LAYER_FIELDS = tuple(f.name for f in fields(_LayerFields))


def by_layer(**columns: Sequence[Any]) -> tuple[dict[str, Any], ...]:
    """`DecoderConfig.overrides` from one sequence per field: `by_layer(window=(8, None), heads=(2, 4))`."""
    return tuple(dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True))


@dataclass(frozen=True, kw_only=True)
class DecoderConfig(_LayerFields):
    """A decoder-only transformer: a list of layers (`per_layer`) and what is around them.

    The fields of a layer given here hold for every layer; `overrides` has, layer by layer, those that differ. Whoever
    needs to know what a layer is reads `per_layer[i]`. Raises `UserError` for a shape that cannot be built.
    """

    family: str = "llama"  # whose file format `save_model` writes: a file of model/families
    vocab_size: int
    width: int  # residual stream
    layers: int
    context_length: int = 2048  # longest sequence it was made for; learned positions end there
    overrides: tuple[Mapping[str, Any], ...] = ()  # one mapping per layer, or none

    norm: str = "rms"  # rms | rms_plus_one (weight stored minus one) | layer
    norm_eps: float = 1e-6
    final_norm: bool = True

    position: str = "rope"  # rope | learned
    rope: Rope = field(default_factory=Rope)
    position_offset: int = 0  # rows skipped at the start of a learned table

    logit_softcap: float | None = None
    embed_scale: float | None = None  # multiplies token embeddings
    embed_width: int | None = None  # width of the embeddings if projected into and out of the stream
    tied: bool = False  # the head's weight is the embedding's

    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    pad_id: int | None = None
    source: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)  # config.json as read

    def __post_init__(self) -> None:
        for name in ("vocab_size", "width", "layers"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be at least 1")
        for name, allowed in (("norm", ("rms", "rms_plus_one", "layer")), ("position", ("rope", "learned"))):
            if getattr(self, name) not in allowed:
                raise unknown(name, getattr(self, name), allowed)
        if self.overrides and len(self.overrides) != self.layers:
            raise UserError(
                f"overrides has {len(self.overrides)} entries for {self.layers} layers; give one per layer, {{}} where "
                "nothing differs"
            )
        for name in {name for differing in self.overrides for name in differing}:
            if name not in LAYER_FIELDS:
                raise unknown("field of a layer", name, LAYER_FIELDS)
        flat, layers = self._flat(), self.per_layer
        # One spelling for one shape: what all layers share is said flatly, what one has like the rest is not repeated.
        for name in {name for differing in self.overrides for name in differing}:
            if name != "rope" and all(getattr(layer, name) == getattr(layers[0], name) for layer in layers):
                flat[name] = getattr(layers[0], name)
                object.__setattr__(self, name, flat[name])
        swift = [i for i, layer in enumerate(layers) if layer.mixer == "swiftkv"]
        if swift and (swift[0] == 0 or swift != list(range(swift[0], self.layers))):
            raise UserError(f"layers {swift} of {self.layers} have the mixer swiftkv; it is for the last ones, not all")
        if any(layers[i].norm_place != "pre" or layers[i].parallel for i in swift):
            raise UserError("the mixer swiftkv needs pre-norm layers, attention before MLP")
        differ = tuple({n: getattr(layer, n) for n in LAYER_FIELDS if getattr(layer, n) != flat[n]} for layer in layers)
        object.__setattr__(self, "overrides", differ if any(differ) else ())

    def _flat(self) -> dict[str, Any]:
        flat = {name: getattr(self, name) for name in LAYER_FIELDS}
        return flat if self.position == "rope" else flat | {"rope": None}

    @functools.cached_property
    def per_layer(self) -> tuple[LayerConfig, ...]:
        """The layers, one by one."""
        flat = self._flat()
        return tuple(LayerConfig(**flat | dict(differing)) for differing in self.overrides or ({},) * self.layers)

    @property
    def varying(self) -> frozenset[str]:
        """Fields of `LayerConfig` in which the layers differ."""
        return frozenset(name for differing in self.overrides for name in differing)

    @functools.cached_property
    def source_layer(self) -> int | None:
        """The layer of whose output those behind it make their keys and values (mixer swiftkv); None without any."""
        own = sum(layer.mixer != "swiftkv" for layer in self.per_layer)
        return own - 1 if own < self.layers else None

    # counts ---------------------------------------------------------------------------------------

    def parameters(self) -> int:
        """Number of parameters, a tied head counted once; equals what `Decoder(config)` would hold."""
        norm_size = self.width * (2 if self.norm == "layer" else 1)
        embed = self.embed_width or self.width
        total = sum(layer.parameters(self.width, norm_size) for layer in self.per_layer)
        total += self.vocab_size * embed * (1 if self.tied else 2) + norm_size * self.final_norm
        total += norm_size * (self.source_layer is not None)
        if self.position == "learned":
            total += (self.context_length + self.position_offset) * self.width
        if embed != self.width:
            total += 2 * embed * self.width
        return total

    def flops_per_token(self, context_length: int) -> float:
        """Forward matrix-product FLOPs per token, averaged over a sequence of `context_length` tokens.

        Two per weight (the head included, the embedding lookup not), and per layer 4 * heads * head_dim for
        each key a query sees: (context_length + 1) / 2 of them on average if causal, fewer under a window or pattern.
        A backward pass costs twice as much again, so a training step is three times this.
        """
        embed = self.embed_width or self.width
        weights = sum(layer.matmul_weights(self.width) for layer in self.per_layer) + self.vocab_size * embed
        if embed != self.width:
            weights += 2 * embed * self.width
        length = max(context_length, 1)
        scores = sum(layer.heads * layer.head_dim * layer.keys_per_query(length) for layer in self.per_layer)
        return 2.0 * weights + 4.0 * scores

    def kv_bytes_per_token(self, dtype: Any = "bfloat16") -> int:
        """Bytes of keys and values that one token leaves in a full cache; `dtype` is torch's or its name."""
        return 2 * sum(layer.kv_heads * layer.head_dim for layer in self.per_layer) * item_bytes(dtype)

    def weight_bytes(self, dtype: Any = "bfloat16") -> int:
        return self.parameters() * item_bytes(dtype)


def item_bytes(dtype: Any) -> int:
    name = str(dtype).removeprefix("torch.")
    if name not in ITEM_BYTES:
        raise unknown("dtype", name, ITEM_BYTES)
    return ITEM_BYTES[name]


def _round_up(value: float, multiple: int) -> int:
    return math.ceil(value / multiple) * multiple


def llama_like(
    vocab_size: int,
    width: int,
    layers: int,
    heads: int | None = None,
    kv_heads: int | None = None,
    mlp_width: int | None = None,
    *,
    head_dim: int | None = None,
    context_length: int = 2048,
    rope_theta: float = 10000.0,
    tied: bool = True,
    attention: Any = None,
    **more: Any,
) -> DecoderConfig:
    """A Llama-style decoder: pre-norm RMSNorm, RoPE, SwiGLU, no biases. `attention`: see `patterns.with_attention`.

    Heads default to 64 dimensions each (32 below width 256), key/value heads to the query heads, the MLP to
    8/3 of the width rounded up to a multiple of 64. `more` are further fields of `DecoderConfig`.
    """
    if head_dim is None:
        if heads is None:
            head_dim = 64 if width >= 256 and width % 64 == 0 else 32
            if width % head_dim:
                raise UserError(f"width={width} is not a multiple of {head_dim}; give heads= or head_dim=")
        else:
            head_dim = width // heads
    heads = heads or max(width // head_dim, 1)
    if head_dim < 2 or head_dim % 2:
        raise UserError(f"width={width} with heads={heads} gives head_dim={head_dim}; RoPE needs an even one")
    config = DecoderConfig(
        family="llama",
        vocab_size=vocab_size,
        width=width,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads or heads,
        head_dim=head_dim,
        mlp_width=mlp_width or _round_up(width * 8 / 3, 64),
        context_length=context_length,
        norm_eps=1e-5,
        rope=Rope(theta=rope_theta),
        tied=tied,
        **more,
    )
    if attention is None:
        return config
    from modicum.model.patterns import with_attention  # imports torch

    return with_attention(config, attention)


def sized(
    parameters: float,
    vocab_size: int,
    *,
    context_length: int = 2048,
    tied: bool | None = None,
    aspect: float | None = None,
    **more: Any,
) -> DecoderConfig:
    """The Llama-style shape nearest to `parameters`, embeddings included.

    width / layers is near `aspect`, which defaults to 40 at ten million parameters and grows with their
    eighth root, as in open models. Widths are multiples of 64; models under a billion parameters tie the head
    to the embedding. From four heads on, two or three query heads share a key/value head. Raises `UserError`
    if the embedding alone leaves no room for a layer.
    """
    tied = parameters < 1e9 if tied is None else tied
    aspect = 40 * (parameters / 1e7) ** 0.125 if aspect is None else aspect
    best: tuple[float, DecoderConfig] | None = None
    for width in range(64, 16385, 64):
        if vocab_size * width * (1 if tied else 2) > 1.5 * parameters:
            break
        heads = width // (64 if width >= 256 else 32)
        group = next((s for s in (2, 3) if heads >= 4 and heads % s == 0), 1)
        one, two = (
            llama_like(vocab_size, width, n, heads, heads // group, context_length=context_length, tied=tied, **more)
            for n in (1, 2)
        )
        per_layer = two.parameters() - one.parameters()
        guess = (parameters - one.parameters()) / per_layer + 1
        for layers in {max(1, math.floor(guess)), max(1, math.ceil(guess))}:
            count = one.parameters() + (layers - 1) * per_layer
            badness = 8 * abs(math.log(count / parameters)) + abs(math.log(width / layers / aspect))
            badness += 0.3 * (heads >= 4 and group == 1)
            if best is None or badness < best[0]:
                best = (
                    badness,
                    llama_like(
                        vocab_size,
                        width,
                        layers,
                        heads,
                        heads // group,
                        context_length=context_length,
                        tied=tied,
                        **more,
                    ),
                )
    if best is None or not 0.5 < best[1].parameters() / parameters < 2:
        smallest = llama_like(vocab_size, 64, 1, 2, tied=tied).parameters()
        raise UserError(
            f"no decoder with a vocabulary of {vocab_size} has about {parameters:.3g} "
            f"parameters; "
            f"the smallest has {smallest:,}: ask for more parameters or train a smaller "
            f"vocabulary"
        )
    return best[1]
