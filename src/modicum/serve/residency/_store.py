"""Weights on disk for residency methods: what is always in memory, bundles of MLP neurons, and a table of those loaded.

A bundle is all that one MLP neuron (channel) has: its row of up, its row of gate if there is one, its column of down,
side by side, so that one read brings it. Shapes: D width, F neurons of a layer, K rows of a table, P parts of a bundle.
"""

from __future__ import annotations

import dataclasses
import os
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from modicum.core.errors import CorruptError
from modicum.core.files import read_json, write_json
from modicum.model.decoder import Decoder
from modicum.model.families import read_config, write_config
from modicum.model.safetensor import SafetensorsFile, write_safetensors

DENSE, BUNDLES = "dense.safetensors", "bundles.bin"


def write_dense(model: Decoder, folder: Path, kept: Callable[[str], bool]) -> None:
    """The shape, and the parameters whose names are `kept`, a tied head once."""
    config = dataclasses.replace(model.config, family="modicum")
    write_json(folder / "config.json", write_config(config, str(model.dtype).removeprefix("torch.")))
    named = {n: p for n, p in model.named_parameters() if kept(n)}
    write_safetensors(folder / DENSE, [(n, tuple(p.shape), p.dtype, p.detach) for n, p in named.items()])


def blank(folder: Path) -> Decoder:
    """The folder's decoder without weights."""
    config = read_config(read_json(folder / "config.json"), str(folder / "config.json"))
    with torch.device("meta"):
        return Decoder(config, init=False)


def load_dense(model: Decoder, folder: Path) -> None:
    """Read what `write_dense` wrote, into memory of the process."""
    with SafetensorsFile(folder / DENSE) as file:
        for name in file.names:
            owner, _, attribute = name.rpartition(".")
            value = nn.Parameter(file.read(name).clone(), requires_grad=False)
            setattr(model.get_submodule(owner), attribute, value)
    if model.config.tied:
        model.lm_head.weight = model.embed.weight
    if missing := [n for n, p in model.named_parameters() if p.is_meta]:
        raise CorruptError(f"{folder / DENSE} lacks {missing[0]}; write the folder again with modicum flash")


def bundles(mlp: Any) -> Tensor:
    """(F, P, D): up, gate if there is one, down."""
    parts = [mlp.up.weight, *([mlp.gate.weight] if mlp.gated else []), mlp.down.weight.T]
    return torch.stack([p.detach() for p in parts], 1)


class BundleFile:
    """One layer's bundles, `first` bytes into the file. What was read is dropped from the system's page cache, as far
    as it lets us, so that memory that is not counted does not serve."""

    def __init__(self, path: Path, first: int, neurons: int, parts: int, width: int, dtype: torch.dtype):
        self.file = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self.file)
        self.first, self.neurons, self.shape, self.dtype = first, neurons, (parts, width), dtype
        self.size = parts * width * dtype.itemsize
        self.read_bytes = self.reads = 0

    def read(self, index: np.ndarray) -> Tensor:
        """Bundles (len(index), P, D) of ascending neurons; those side by side come in one read."""
        out = np.empty((len(index), self.size), dtype=np.uint8)
        starts = np.flatnonzero(np.diff(index, prepend=-2) != 1)
        for start, stop in zip(starts, [*starts[1:], len(index)], strict=True):
            offset, length = self.first + int(index[start]) * self.size, int(stop - start) * self.size
            taken = os.preadv(self.file, [out[start:stop].data.cast("B")], offset)
            if taken != length:
                raise CorruptError(
                    f"{BUNDLES} ends at byte {offset + taken}; write the folder again with modicum flash"
                )
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(self.file, offset, length, os.POSIX_FADV_DONTNEED)
            self.reads += 1
            self.read_bytes += length
        return torch.from_numpy(out).view(self.dtype).view(len(index), *self.shape)


class Table:
    """Bundles in memory: `rows_KPD`, of which the first `used` are taken. Removing moves the last rows into the holes,
    so nothing is ever allocated anew (section 3.3 of the paper)."""

    def __init__(self, neurons: int, capacity: int, parts: int, width: int, dtype: torch.dtype):
        self.rows_KPD = torch.zeros(capacity, parts, width, dtype=dtype)
        self.neuron_K = np.full(capacity, -1, dtype=np.int64)
        self.slot_F = np.full(neurons, -1, dtype=np.int64)
        self.used = 0

    def insert(self, neurons: np.ndarray, bundles_XPD: Tensor) -> None:
        end = self.used + len(neurons)
        self.rows_KPD[self.used : end] = bundles_XPD
        self.neuron_K[self.used : end] = neurons
        self.slot_F[neurons] = np.arange(self.used, end)
        self.used = end

    def remove(self, neurons: np.ndarray) -> None:
        slots = np.sort(self.slot_F[neurons])
        last = self.used - len(slots)
        holes = slots[slots < last]
        tail = np.arange(last, self.used)
        movers = tail[~np.isin(tail, slots)]
        self.slot_F[neurons] = -1
        if len(holes):
            self.rows_KPD[torch.from_numpy(holes)] = self.rows_KPD[torch.from_numpy(movers)]
            self.neuron_K[holes] = self.neuron_K[movers]
            self.slot_F[self.neuron_K[holes]] = holes
        self.neuron_K[last : self.used] = -1
        self.used = last
