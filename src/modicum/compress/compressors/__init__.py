"""port compressor: how the weights of a trained model are changed so that it takes fewer bytes.

A model is compressed decoder block by decoder block (`compress.blocks`). Two rungs:

* `fit(weight_OI, statistics) -> Stored | weight_OI`: one matrix and what its inputs are like (one function; `rtn` is
  the smallest method). `Codes` (or another `Stored`) go into a linear form, a weight stays a plain layer.
* `block(job)`: a whole block with its inputs, for what moves weights between layers (`awq`).

Around them: `begin` sees the whole model before the first block, `observe` what goes into and comes out of each,
`finish` may leave a model of another shape (`shortgpt`).

Shapes: O outputs, I inputs, G groups of inputs, B sequences, T tokens, D width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, Self

import torch
from torch import Tensor, nn

from modicum.compress.compressors._affine import Codes
from modicum.compress.statistics import Statistics
from modicum.core.registry import Method
from modicum.model.config import DecoderConfig
from modicum.model.decoder import Decoder
from modicum.model.linear import LinearForm

__all__ = ["BASELINE", "BlockJob", "Codes", "Compressor", "Statistics"]
BASELINE = "rtn"


class Stored(Protocol):
    """What is kept of a matrix where it is no plain weight: `Codes`, or another method's own."""

    def form(self, layer: nn.Linear, dtype: torch.dtype) -> LinearForm:
        """A linear form with the bias of `layer`, to stand in its position."""
        ...


@dataclass
class BlockJob:
    """One decoder block as a compressor sees it: a working copy in float32. Names are those within the block.

    `block` may be changed in place: what its plain parameters hold afterwards is kept, in the model's dtype.
    """

    index: int
    block: nn.Module
    linears: Mapping[str, nn.Linear]  # those that are to be compressed
    statistics: Mapping[str, Statistics]  # of their inputs, as far as the method `needs` them
    inputs: Callable[
        ..., Iterator[tuple[Tensor, Any]]
    ]  # inputs(stream): batches (x_BTD, rotation), by default of the first
    outputs: Callable[[], Iterator[Tensor]] = lambda: iter(())  # y_BTD of the original block on the stream "original"
    codes: dict[str, Stored] = field(default_factory=dict)  # by name: what goes into a form

    def full_name(self, name: str) -> str:
        """The name of a layer within the model."""
        return f"layers.{self.index}.{name}"

    def keep(self, name: str, result: Stored | Tensor) -> None:
        """Let a layer be what `fit` gave."""
        if isinstance(result, Tensor):
            self.linears[name].weight.data.copy_(result)
        else:
            self.codes[name] = result


class Compressor(Method):
    """Made as `cls(config)`. A method that looks at text requires `calibration_text`.

    leaves: "forms" (codes in linear forms), "weights" (plain weights with zeros) or "shape" (another architecture).
    needs: sums over each layer's inputs (`statistics.KINDS`). streams: whose block inputs the method reads, of the
    model "compressed" so far or of the "original" one; the sums are of the first. per_matrix: knobs that replace the
    config's for single matrices, by full name (the bits that `compress.allocate` has chosen).
    """

    leaves: ClassVar[str] = "forms"
    needs: ClassVar[frozenset[str]] = frozenset()
    streams: ClassVar[tuple[str, ...]] = ("compressed",)

    def __init__(self, config: Any):
        self.config = config
        self.per_matrix: Mapping[str, Mapping[str, Any]] = {}
        self.tokens_NT: Tensor | None = None  # the calibration text, once a walk has begun

    def of_matrix(self, name: str) -> Self:
        """The method with the knobs of one matrix (its full name); itself where `per_matrix` has none for it."""
        knobs = self.per_matrix.get(name)
        return self if not knobs else type(self)(dataclasses.replace(self.config, **knobs))

    def check(self, shape: DecoderConfig) -> None:
        """Raise `UserError` for a model that these knobs do not fit."""

    def fit(self, weight_OI: Tensor, statistics: Statistics) -> Stored | Tensor:
        """One matrix in float32: what is kept of it."""
        raise NotImplementedError

    def block(self, job: BlockJob) -> None:
        """One block; by default each matrix by itself."""
        for name, layer in job.linears.items():
            method = self.of_matrix(job.full_name(name))
            job.keep(name, method.fit(layer.weight.detach(), job.statistics[name]))

    def begin(self, weights: Callable[[], Iterator[tuple[str, Tensor]]]) -> None:
        """Before the first block. weights(): (name, weight_OI) of every matrix that will be compressed."""

    def observe(self, index: int, x_BTD: Tensor, y_BTD: Tensor) -> None:
        """Inputs and outputs of block `index` in the method's first stream, batch by batch."""

    def finish(self, model: Decoder) -> Decoder:
        """After the last block: the model to write."""
        return model

    def state(self) -> dict[str, Any]:
        """JSON of what `observe` and `block` have gathered, from which a killed run goes on."""
        return {}

    def set_state(self, state: dict[str, Any]) -> None:
        """Take over a `state`."""
