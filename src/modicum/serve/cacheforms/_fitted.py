"""Cache forms that are fitted on calibration data and code each layer in a way of its own.

`modicum fit MODEL FORM --calibration TEXT --out FILE` writes what `fit` gives; the knob `fit=FILE` reads it.
The heads of a layer are coded together, so that a layer, or a head in it, may take fewer numbers than another.

Shapes: L layers, G KV heads, N blocks, P entries of a block, E head dimension, C = G E, B sequences, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from modicum.core import registry
from modicum.core.choice import Choice
from modicum.core.errors import UserError
from modicum.model.attend import DenseAttend
from modicum.model.config import DecoderConfig
from modicum.model.decoder import Decoder
from modicum.model.rope import RopeTable, rotate
from modicum.model.safetensor import SafetensorsFile, write_safetensors
from modicum.serve.cacheforms import CacheForm
from modicum.serve.uneven import SHAPE

BATCH = 4  # sequences computed at a time
SIZES = "sizes_LGE"  # of the model that a file was fitted on


class FittedForm(CacheForm):
    """Its Config has a knob `fit`, the file; `load` takes the tensors that `fit` gave.

    `encode_layer` and `decode_layer` are each other's inverse but for what is lost; codes have shape (N, P, width), or
    (N, 1, width) where a block's entries share numbers. at_NP: positions of the entries in their sequences, for forms
    that code whole blocks (`rowwise` False), which may turn keys back by them.
    """

    conflicts: ClassVar[frozenset[str]] = frozenset({"eviction"})

    @classmethod
    def fit(cls, config: Any, model: Decoder, tokens_NT: Tensor) -> dict[str, Tensor]:
        """What is measured or trained on calibration data, by name."""
        raise NotImplementedError

    def load(self, fit: dict[str, Tensor], shape: DecoderConfig) -> None:
        """Take over what `fit` gave, for these knobs."""
        raise NotImplementedError

    def encode_layer(self, which: str, layer: int, x_GNPE: Tensor, at_NP: Tensor) -> tuple[Tensor, ...]:
        raise NotImplementedError

    def decode_layer(self, which: str, layer: int, codes: tuple[Tensor, ...], at_NP: Tensor) -> Tensor:
        """x_GNPE in `dtype`."""
        raise NotImplementedError

    def entries(self, codes: tuple[Tensor, ...]) -> int:
        """P of some codes."""
        return codes[0].shape[1]

    def begin(self, shape: DecoderConfig) -> None:
        key = type(self).__module__.rpartition(".")[2]
        check_shape(key, shape)
        self.heads = shape.kv_heads
        self.layers = shape.layers
        if not self.config.fit:
            raise UserError(
                f"{key} is fitted on text first: modicum fit MODEL {key} --calibration TEXT --out FILE, then "
                f"{key}:fit=FILE"
            )
        fit = read_fit(self.config.fit)
        sizes = (shape.layers, shape.kv_heads, shape.head_dim)
        if tuple(fit.pop(SIZES).tolist()) != sizes:
            raise UserError(
                f"{self.config.fit} was fitted on another model; this one has {sizes[0]} layers with {sizes[1]} KV "
                f"heads of {sizes[2]} dimensions: fit it on this one"
            )
        self.load(fit, shape)

    def bytes_of_layers(self, layers: int, heads: int, block_size: int) -> int:
        x_GNPE = torch.zeros(heads, 1, block_size, self.head_dim, dtype=self.dtype)
        at_NP = torch.arange(block_size)[None]
        return sum(
            part.nbytes for n in range(layers) for which in "kv" for part in self.encode_layer(which, n, x_GNPE, at_NP)
        )


def check_shape(key: str, shape: DecoderConfig) -> None:
    if SHAPE & shape.varying or any(layer.mixer != "softmax" for layer in shape.per_layer):
        raise UserError(f"{key} needs softmax attention with the same heads in every layer; this model's differ")


def fit_form(choice: Choice, model: Decoder, tokens_NT: Tensor) -> dict[str, Tensor]:
    """What a method fits on a model and calibration text. Raises `UserError` for one that fits nothing."""
    cls = registry.load("cacheform", choice.method).cls
    if not issubclass(cls, FittedForm):
        raise UserError(f"{choice.method} is not fitted; serve with it at once: --cache-form {choice}")
    return cls.fit(choice.config(), model.eval(), tokens_NT)


def write_fit(path: Path, fit: dict[str, Tensor], shape: DecoderConfig) -> None:
    sizes = torch.tensor([shape.layers, shape.kv_heads, shape.head_dim])
    tensors = fit | {SIZES: sizes}
    write_safetensors(path, [(n, tuple(t.shape), t.dtype, t.contiguous) for n, t in tensors.items()])


def read_fit(path: str) -> dict[str, Tensor]:
    if not Path(path).is_file():
        raise UserError(f"no file {path}; write it with: modicum fit MODEL FORM --calibration TEXT --out {path}")
    with SafetensorsFile(Path(path)) as file:
        if SIZES not in file.names:
            raise UserError(f"{path} is no fit of a cache form; write one with modicum fit")
        return {name: file.read(name).clone() for name in file.names}


class Rotations:
    """Keys with and without their rotary position embedding, layer by layer."""

    def __init__(self, key: str, shape: DecoderConfig):
        tables: dict[Any, RopeTable] = {}
        self.tables: list[RopeTable | None] = []
        for layer in shape.per_layer:
            name = repr(layer.rope)
            if layer.rope is not None and name not in tables:
                tables[name] = RopeTable(layer.rope, layer.head_dim, shape.context_length)
            self.tables.append(None if layer.rope is None else tables[name])
        if any(t is not None and (t.long is not None or t.scale != 1.0) for t in self.tables):
            raise UserError(f"{key} turns keys back, which needs plain rotary positions; this model's are scaled")

    def turn(self, layer: int, x_GNPE: Tensor, at_NP: Tensor, back: bool = False) -> Tensor:
        """Rotated to their positions; `back`: as they were before that."""
        table = self.tables[layer]
        if table is None:
            return x_GNPE
        cos, sin = table(at_NP, torch.float32)
        return rotate(x_GNPE.transpose(0, 1).float(), cos, -sin if back else sin).transpose(0, 1)


class Seen:
    """An `attend` that hands what goes into each layer's attention to `use(layer, q_BHTE, k_BGTE, v_BGTE)`."""

    def __init__(self, use: Any):
        self.use, self.attend = use, DenseAttend()

    def __call__(self, layer: int, q_BHTE: Tensor, k_BGTE: Tensor, v_BGTE: Tensor, **how: Any) -> Tensor:
        self.use(layer, q_BHTE, k_BGTE, v_BGTE)
        return self.attend(layer, q_BHTE, k_BGTE, v_BGTE, **how)


def batches(tokens_NT: Tensor) -> Iterator[Tensor]:
    yield from tokens_NT.split(BATCH)


def principal(moment_II: Tensor) -> Tensor:
    """Eigenvectors as columns, of the largest eigenvalue first, with determinant +1."""
    basis_II = torch.linalg.eigh(moment_II)[1].flip(-1)
    basis_II[..., :, -1] *= torch.linalg.det(basis_II).sign()[..., None]
    return basis_II
