"""Indices into a table of values: what kmeans and edkm store.

Shapes: O outputs, I inputs, R groups of rows, K entries of a table.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from modicum.core.choice import Choice
from modicum.core.registry import load
from modicum.model.attach import is_conv1d
from modicum.model.linear import LinearForm, LinearShape
from modicum.model.linear._quantised import SCALE_DTYPES
from modicum.model.linear.palette import Palette


@dataclass(frozen=True, kw_only=True)
class PaletteConfig:
    """Knobs of every compressor to tables of values."""

    bits: Literal[2, 3, 4] = 3  # of an index
    rows: Annotated[int, Field(ge=0)] = 0  # outputs that share a table; 0: all of a matrix
    scale_dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"  # of the tables

    @property
    def dtype(self) -> torch.dtype:
        return SCALE_DTYPES[self.scale_dtype]


@dataclass(frozen=True)
class Indices:
    """A matrix as indices codes_OI (uint8) into tables_RK of the stored dtype."""

    codes_OI: Tensor
    tables_RK: Tensor
    config: PaletteConfig

    def weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight_OI that they stand for."""
        tables = self.tables_RK.to(dtype)
        parts = self.codes_OI.long().split(self.config.rows or len(self.codes_OI))
        return torch.cat([table[part] for table, part in zip(tables, parts, strict=True)])

    def form(self, layer: nn.Linear, dtype: torch.dtype) -> LinearForm:
        """A form `palette` with the bias of `layer`, to stand in its position."""
        knobs = {
            name: value for name, value in asdict(self.config).items() if name in PaletteConfig.__dataclass_fields__
        }
        choice = Choice("linear", "palette", knobs)
        shape = LinearShape.of(layer.weight.to("meta", dtype), layer.bias, device=str(layer.weight.device))
        form: Palette = load("linear", "palette", Palette).cls(choice.config(), shape)
        form.choice, form.transposed = choice, is_conv1d(layer)
        form.put(self.codes_OI, self.tables_RK)
        if form.bias is not None:
            form.bias.data.copy_(layer.bias)
        return form
