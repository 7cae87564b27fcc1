"""Walking a decoder block by block: two streams of block inputs on disk, statistics, finished blocks to go on from.

A work folder holds `plan.json` (a fingerprint of model, text and settings), `block-007.safetensors` and `.json` for
each finished block, and the inputs of the next block in `original-008.safetensors` (of the model as it was) and
`compressed-008.safetensors` (of the model compressed so far), those that the method reads. `block-007.json` is written
last. A walk that was killed begins at the first block without one and gives the same model, bit for bit. In memory are
the model, one block in float32 and one batch; the streams are read as the file's pages.

Shapes: N sequences, B of a batch, T tokens, D width.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from modicum.compress.calibration import BATCH
from modicum.compress.compressors import BlockJob, Compressor
from modicum.compress.statistics import Statistics
from modicum.core.events import Events
from modicum.core.files import write_json
from modicum.model import attach, form_state
from modicum.model.attend import DenseAttend
from modicum.model.decoder import Decoder, default_positions
from modicum.model.linear import LinearForm
from modicum.model.safetensor import SafetensorsFile, write_safetensors

ORIGINAL, COMPRESSED = "original", "compressed"


class _Reached(Exception):
    """The first block was about to be computed."""


class Walk:
    """One compressor over the blocks of one model. targets: names of the layers to compress, within the model.

    tokens_NT: calibration text, None for a method that reads none.
    """

    def __init__(
        self, model: Decoder, method: Compressor, targets: list[str], tokens_NT: Tensor | None, work: Path
    ) -> None:
        self.model, self.method, self.work = model, method, work
        method.tokens_NT = tokens_NT
        self.batches = [] if tokens_NT is None else list(tokens_NT.to(model.device).split(BATCH))
        self.targets: dict[int, list[str]] = {}
        for name in targets:
            _, index, inner = name.split(".", 2)
            self.targets.setdefault(int(index), []).append(inner)
        self._tables, self._which = model.ropes()
        self._first = method.streams[0]  # whose block inputs the statistics are of

    @torch.no_grad()
    def run(self, events: Events) -> list[dict[str, Any]]:
        """Compress every block in place; a row for each compressed matrix (see `_row`)."""
        self.method.begin(self._weights)
        rows: list[dict[str, Any]] = []
        first = 0
        while (note := self._note(first)) is not None:  # finished before
            self._restore(first, note)
            rows += note["rows"]
            self.method.set_state(note["state"])
            first += 1
        total = len(self.model.layers)
        if first == 0 and self.batches:
            for stream in self.method.streams:
                write_safetensors(self._stream(stream, 0), self._items(self._embedded))
        with events.progress("compress", total, "blocks") as progress:
            progress.resume_at(first)
            for index in range(first, total):
                made = self._block(index, last=index == total - 1)
                rows += made
                worst = max((r["lost"] / r["norm"] for r in made if r["norm"]), default=0.0)
                progress.update(1, error=worst**0.5)
                events.emit("block", index=index, worst_error=worst**0.5)
        return rows

    def _block(self, index: int, last: bool) -> list[dict[str, Any]]:
        layer = self.model.layers[index]
        dtypes = {name: p.dtype for name, p in layer.named_parameters()}
        block = copy.deepcopy(layer).float()
        linears: dict[str, nn.Linear] = {n: block.get_submodule(n) for n in self.targets.get(index, [])}  # type: ignore[misc]
        statistics = {name: Statistics(self.method.needs) for name in linears}
        original = ORIGINAL in self.method.streams
        if self.batches:
            hooks = [module.register_forward_pre_hook(_adder(statistics[n])) for n, module in linears.items()]
            try:
                if self._first == ORIGINAL:
                    self._push(ORIGINAL, index, block)
                elif self.method.needs:
                    for x_BTD, rotation in self._inputs(index):
                        block(x_BTD, rotation, DenseAttend())
            finally:
                for hook in hooks:
                    hook.remove()
            if original and self._first != ORIGINAL:
                self._push(ORIGINAL, index, block)
        job = BlockJob(index, block, linears, statistics, partial(self._inputs, index), partial(self._outputs, index))
        before = {name: module.weight.detach().clone() for name, module in linears.items()}
        self.method.block(job)
        for name, codes in job.codes.items():
            form = codes.form(linears[name], dtypes[f"{name}.weight"])
            parent, _, key = name.rpartition(".")
            setattr(block.get_submodule(parent), key, form)
        for name, parameter in block.named_parameters():
            if name in dtypes:
                parameter.data = parameter.data.to(dtypes[name])
        self.model.layers[index] = block
        rows = [_row(f"layers.{index}.{name}", before[name], block.get_submodule(name)) for name in linears]
        if self.batches and COMPRESSED in self.method.streams and not last:
            self._push(COMPRESSED, index, copy.deepcopy(block).float())
        self._finish(index, block, rows)
        for stream in self.method.streams:  # a kill from here on finds the next block's
            self._stream(stream, index).unlink(missing_ok=True)
        return rows

    # streams --------------------------------------------------------------------------------------

    def _stream(self, stream: str, index: int) -> Path:
        return self.work / f"{stream}-{index:03d}.safetensors"

    def _items(self, make: Callable[[int], Tensor]) -> list[Any]:
        width = self.model.config.width
        return [
            (f"{i:05d}", (*batch.shape, width), torch.float32, partial(make, i)) for i, batch in enumerate(self.batches)
        ]

    def _embedded(self, batch: int) -> Tensor:
        """What the first block is given."""
        caught: list[Tensor] = []

        def catch(module: nn.Module, args: tuple[Any, ...]) -> None:
            caught.append(args[0])
            raise _Reached

        handle = self.model.layers[0].register_forward_pre_hook(catch)
        try:
            self.model.hidden(self.batches[batch])
        except _Reached:
            pass
        finally:
            handle.remove()
        return caught[0].float()

    def _inputs(self, index: int, stream: str | None = None) -> Iterator[tuple[Tensor, Any]]:
        """(x_BTD, rotation) batch by batch, of the method's first stream unless another is named."""
        with SafetensorsFile(self._stream(stream or self._first, index)) as file:
            for number in range(len(self.batches)):
                yield file.read(f"{number:05d}").to(self.model.device), self._rotation(index, number)

    def _outputs(self, index: int) -> Iterator[Tensor]:
        """y_BTD of the original block, batch by batch."""
        return (y_BTD for y_BTD, _ in self._inputs(index + 1, ORIGINAL))

    def _rotation(self, index: int, batch: int) -> Any:
        table = self._which[min(index, len(self._which) - 1)]
        positions_1T = default_positions(self.batches[batch])
        return None if table is None else self._tables[table](positions_1T, torch.float32)

    def _push(self, stream: str, index: int, block: nn.Module) -> None:
        """The stream's inputs of the next block, out of `block`."""
        with SafetensorsFile(self._stream(stream, index)) as file:

            def computed(batch: int) -> Tensor:
                x_BTD = file.read(f"{batch:05d}").to(self.model.device)
                y_BTD = block(x_BTD, self._rotation(index, batch), DenseAttend())
                if stream == self._first:
                    self.method.observe(index, x_BTD, y_BTD)
                return y_BTD

            write_safetensors(self._stream(stream, index + 1), self._items(computed))

    def _weights(self) -> Iterator[tuple[str, Tensor]]:
        for index, names in self.targets.items():
            for name in names:
                layer: Any = self.model.layers[index].get_submodule(name)
                yield f"layers.{index}.{name}", layer.weight.detach().float()

    # finished blocks ------------------------------------------------------------------------------

    def _path(self, index: int) -> Path:
        return self.work / f"block-{index:03d}.safetensors"

    def _note(self, index: int) -> dict[str, Any] | None:
        path = self._path(index).with_suffix(".json")
        if not path.exists():
            return None
        note: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return note

    def _finish(self, index: int, block: nn.Module, rows: list[dict[str, Any]]) -> None:
        state = block.state_dict()
        write_safetensors(
            self._path(index), [(n, tuple(t.shape), t.dtype, partial(_itself, t)) for n, t in state.items()]
        )
        note = {"rows": rows, "forms": form_state.describe(block), "state": self.method.state()}
        write_json(self._path(index).with_suffix(".json"), note)

    def _restore(self, index: int, note: dict[str, Any]) -> None:
        block = self.model.layers[index]
        if note["forms"] is not None:
            form_state.restore(block, note["forms"], device=self.model.device)
        with SafetensorsFile(self._path(index)) as file:
            inside = form_state.form_state(block)
            form_state.load_form_state(block, file.mapping(n for n in file.names if n in inside))
            for name, parameter in block.named_parameters():
                if name not in inside:
                    parameter.data = file.read(name).to(parameter.device).clone()


def _adder(statistics: Statistics) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        statistics.add(args[0])

    return hook


def _row(name: str, before_OI: Tensor, layer: nn.Module) -> dict[str, Any]:
    """Of one matrix: entries, bytes stored, squared Frobenius norms of the weight and of what was lost, zeros kept."""
    form = layer if isinstance(layer, LinearForm) else None
    after_OI = attach.plain(layer)[0].detach() if form is None else form.dense()
    stored = after_OI.nbytes if form is None else form.nbytes()
    lost = (after_OI.float() - before_OI).square().sum(dtype=torch.float64).item()
    norm = before_OI.square().sum(dtype=torch.float64).item()
    zeros = int((after_OI == 0).sum())
    return {"name": name, "weights": before_OI.numel(), "bytes": stored, "lost": lost, "norm": norm, "zeros": zeros}


def _itself(tensor: Tensor) -> Tensor:
    return tensor
