"""Backend native: steps by own kernels (`serve/native`), on a CPU with AVX-512 or AVX2.

For decoders of the Llama kind (RMSNorm, rotary positions, a sequential block) of plain, int8, int4,
affine or ggml. It computes between the matrices in float32 and reads weights where the modules hold them.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from modicum.budget.machine import cores, memory_available
from modicum.model.config import DecoderConfig
from modicum.model.decoder import Decoder
from modicum.model.linear import LinearForm
from modicum.serve import native
from modicum.serve.drafters import layout
from modicum.serve.native.describe import Description
from modicum.serve.native.support import KINDS, stored
from modicum.serve.pages import Storage
from modicum.serve.plan import AttentionPlan, Watched
from modicum.serve.work import Work, places_of, positions_of, tokens_of

NO_WINDOW = 1 << 62
SETTLED = 16 << 20  # bytes of weights that one step moves out of their file's pages


class Native:
    """Whoever makes one asks `native.support.unserved` first."""

    name = "native"

    def __init__(self, model: Decoder, storage: Storage, library: ctypes.CDLL, eight: bool = False):
        self.model, self.storage, self.library = model, storage, library
        if eight:
            self.name = "native, activations in eight bits"
        self.threads, self._cores = 0, cores()  # threads that spin at barriers must each have a processor
        coded = [stored(module) for module in model.modules() if isinstance(module, LinearForm)]
        native.coalesce(
            [t for codes in coded if codes and codes[0] not in KINDS.values() for t in codes[1:] if t is not None]
        )
        described = Description(model, storage, eight)
        self._keep, self._mapped, self._shape = described.keep, described.mapped, described.shape
        native.use_large_pages((t.data_ptr(), t.nbytes) for t in self._keep if isinstance(t, Tensor))
        self._pages: native.LargePages | None = None
        self._window = min((layer.window for layer in model.config.per_layer if layer.window), default=NO_WINDOW)
        self._x_TD: Tensor | None = None  # of the last step, before the final norm
        self._state = 0
        self.tiles = bool(library.modicum_tiles())
        self._head_shape = native.Model.from_buffer_copy(self._shape)
        self._head_shape.layers = 0  # a step without layers: the final norm and the head
        self._head_state = 0
        self._finalizers: list[weakref.finalize] = []

    def cannot(self, plan: AttentionPlan) -> str | None:
        if plan.adapted:
            return "rows with adapters"
        if plan.own:
            return "a policy attends in its own way"
        if plan.depth >= self._window:
            return "a drafted branch reaches out of a window"
        if plan.evicted and self.storage.weight_AP is not None:
            if self._window != NO_WINDOW:
                return "merged entries in layers with windows"
            if self.model.config.attention_softcap is not None:
                return "merged entries under a softcap"
        if plan.marked and plan.trees:
            return "weights of drafted tokens"
        return None

    def use_tiles(self, rows: int) -> None:
        """From so many rows on bfloat16 products go by tiles, which add in another order (`tiles`); 0: never."""
        self._shape.tile_rows = self._head_shape.tile_rows = rows
        self.threads = 0  # states have copies of it

    def __call__(self, plan: AttentionPlan, rows: Sequence[int]) -> Tensor | None:
        works, depth, table = plan.works, plan.depth, plan.table.numbers
        self._x_TD = None
        self._settle()
        self._open()
        config = self.model.config
        position_T = np.array(positions_of(works), dtype=np.int64)
        slot_T = np.repeat(np.array([w.sample.slot for w in works], dtype=np.int64), [w.n for w in works])
        entry_T, root_T, ancestors_TD = _drafted(works, depth) if plan.trees else (position_T, None, None)
        evicted_T, weights = _evicted(works), self.storage.weight_AP
        x_TD = self.model.embed(torch.tensor(tokens_of(works)))
        if config.embed_scale is not None:
            x_TD = x_TD * torch.tensor(config.embed_scale, dtype=x_TD.dtype)
        x_TD = x_TD.float()
        seen = _Seen(plan, config, len(position_T)) if plan.watched else None
        logit_row_R = np.array(rows, dtype=np.int64)
        logits_RV = torch.empty(len(rows), config.vocab_size)
        step = native.Step(
            rows=len(position_T),
            n_logits=len(rows),
            table_stride=table.shape[1],
            ancestor_stride=depth,
            x=x_TD.data_ptr(),
            position=position_T.ctypes.data,
            entry=entry_T.ctypes.data,
            slot=slot_T.ctypes.data,
            root=None if root_T is None else root_T.ctypes.data,
            ancestors=None if ancestors_TD is None else ancestors_TD.ctypes.data,
            table=table.ctypes.data,
            evicted=None if evicted_T is None else ctypes.addressof(evicted_T),
            position_of=None if evicted_T is None else self.storage.position_AP.data_ptr(),
            weight_of=None if evicted_T is None or weights is None else weights.data_ptr(),
            logit_row=logit_row_R.ctypes.data,
            logits=logits_RV.data_ptr(),
            **({} if seen is None else seen.fields),
        )
        if self.library.modicum_step(self._state, ctypes.byref(step)):
            raise MemoryError("no memory for attention scores of a sequence this long")
        if seen is not None:
            seen.show(self.model.dtype)
        self._x_TD = x_TD
        if not len(rows):
            return None
        return self._capped(logits_RV)

    def logits(self, rows: Sequence[int]) -> Tensor:
        assert self._x_TD is not None
        self._open()
        x_RD = self._x_TD[torch.tensor(list(rows))]
        logits_RV = torch.empty(len(rows), self.model.config.vocab_size)
        logit_row_R, zero_R = np.arange(len(rows), dtype=np.int64), np.zeros(len(rows), dtype=np.int64)
        step = native.Step(
            rows=len(rows),
            n_logits=len(rows),
            x=x_RD.data_ptr(),
            position=zero_R.ctypes.data,
            entry=zero_R.ctypes.data,
            slot=zero_R.ctypes.data,
            logit_row=logit_row_R.ctypes.data,
            logits=logits_RV.data_ptr(),
        )
        if self.library.modicum_step(self._head_state, ctypes.byref(step)):
            raise MemoryError("no memory for the logits of a step")
        return self._capped(logits_RV)

    def _capped(self, logits_RV: Tensor) -> Tensor:
        cap = self.model.config.logit_softcap
        return logits_RV if cap is None else cap * torch.tanh(logits_RV / cap)

    @torch.inference_mode(False)  # modules keep the new memory, and may be trained
    @torch.no_grad()
    def _settle(self) -> None:
        """Before every step but the first, move some more of the weights that lie in a file's pages to large ones.

        A mapped model answers at once, and reading it in small pages makes every step 10 to 20 % slower. Where the
        weights are more than a quarter of the memory that is free they stay where they are: the system can drop
        such pages and read them again.
        """
        if not self._mapped or not self._state:
            return
        if self._pages is None:
            views = [view for _, _, view in self._mapped]
            if 4 * sum(view.nbytes for view in views) > memory_available():
                self._keep += views
                self._mapped = []
                return
            self._pages = native.LargePages(views)
        moved = 0
        while self._mapped and moved < SETTLED:
            matrix, weight, view = self._mapped.pop(0)
            new = self._pages.copy(view)
            if weight.data_ptr() == view.data_ptr():  # else somebody has given the module other memory
                weight.data = new
            matrix.weight = new.data_ptr()
            self._keep.append(new)
            moved += new.nbytes
        if not self._mapped:
            self._head_shape.head.weight = self._shape.head.weight
            self.threads = 0  # states have copies of the head

    def _open(self) -> None:
        """Working memory for as many threads as PyTorch uses now, within the processors granted to this process."""
        threads = min(torch.get_num_threads(), self._cores)
        if self.threads == threads:
            return
        for finalizer in self._finalizers:
            finalizer()
        self._finalizers = []
        self.threads = self._shape.threads = self._head_shape.threads = threads
        states = []
        for shape in (self._shape, self._head_shape):
            states.append(self.library.modicum_open(ctypes.byref(shape)))
            if not states[-1]:
                raise MemoryError("no memory for the working arrays of a step")
            self._finalizers.append(weakref.finalize(self, self.library.modicum_close, states[-1]))
            self._finalizers[-1].atexit = False  # a daemon thread may be in the middle of a step then
        self._state, self._head_state = states


def _drafted(works: Sequence[Work], depth: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The cache entry of each token in its sequence (T,), its tree's root or -1 (T,), its ancestors (T, depth)."""
    entry_T = places_of(works)
    root_T, ancestors_TD = np.full(len(entry_T), -1), np.zeros((len(entry_T), depth), dtype=np.int64)
    for w in works:
        if w.tree is not None:
            line_XD = layout(w.tree).line_XD
            root_T[w.at : w.at + w.n] = w.start
            ancestors_TD[w.at : w.at + w.n, : line_XD.shape[1]] = w.start + line_XD
    return entry_T, root_T, ancestors_TD


def _evicted(works: Sequence[Work]) -> Any:
    """The pages of each row's sequence, an array of `native.EvictedPages`; None if no sequence has evicted entries."""
    if all(w.sample.pages is None for w in works):
        return None
    evicted_T = (native.EvictedPages * sum(w.n for w in works))()
    for w in works:
        if (pages := w.sample.pages) is not None:
            table_LGN = pages.table_LGN
            given = table_LGN.data_ptr(), pages.count_LG.data_ptr(), table_LGN.shape[2]
            for i in range(w.n):
                evicted_T[w.at + i] = native.EvictedPages(*given, i)
    return evicted_T


class _Seen:
    """What policies look at in a step: memory that the kernels fill, as `fields` of `native.Step` say.

    Shapes: L layers, N observed tokens, G KV heads, S entries, padded; E head dimension.
    """

    def __init__(self, plan: AttentionPlan, config: DecoderConfig, rows: int):
        self.plan = plan
        self.heads, self.kv_heads, self.head_dim = config.heads, config.kv_heads, config.head_dim
        width = (self.heads + 2 * self.kv_heads) * self.head_dim
        self.slice_of: dict[int, slice] = {}  # by sequence: of its tokens among all observed ones
        row_T, n = np.full(rows, -1), 0
        for one in plan.observed:
            self.slice_of[one.work.sample.id] = slice(n, n + len(one.positions))
            row_T[one.rows] = range(n, n + len(one.positions))
            n += len(one.positions)
        self.qkv_LNX = torch.empty(config.layers, n, width)
        self.mass: dict[int, Tensor] = {}  # by sequence: (L, G, S)
        marks_T = (native.Marks * rows)()
        for one in plan.marked:
            w = one.work
            entries = w.start if w.sample.pages is None else int(w.sample.pages.count_LG.max())
            mass_LGS = torch.zeros(config.layers, self.kv_heads, -(-(entries + w.n) // 16) * 16)
            self.mass[w.sample.id] = mass_LGS
            for row in range(one.rows.start, one.rows.stop):
                marks_T[row] = native.Marks(mass_LGS.data_ptr(), mass_LGS.shape[2])
        self.largest = any(one.work.sample.policy.marks == "max" for one in plan.marked)
        self.keep = (row_T, marks_T)
        self.fields: dict[str, int] = {"n_observed": n, "mark_largest": self.largest}
        if plan.observed:
            self.fields |= {"observed_row": row_T.ctypes.data, "observed": self.qkv_LNX.data_ptr()}
        if plan.marked:
            self.fields["marks"] = ctypes.addressof(marks_T)

    def show(self, dtype: torch.dtype) -> None:
        """Give it to the policies; queries, keys and values in the model's `dtype`."""
        if not self.largest:
            for mass_LGS in self.mass.values():
                mass_LGS /= self.heads // self.kv_heads
        for layer in range(len(self.qkv_LNX)):

            def tokens(one: Watched, layer: int = layer) -> Sequence[Tensor]:
                x_NX = self.qkv_LNX[layer, self.slice_of[one.work.sample.id]].to(dtype)
                x_HNE = x_NX.unflatten(1, (-1, self.head_dim)).transpose(0, 1)
                return x_HNE.split([self.heads, self.kv_heads, self.kv_heads])

            def mass(one: Watched, layer: int = layer) -> Tensor:
                w = one.work
                pages = w.sample.pages
                entries = w.start if pages is None else int(pages.count_LG[layer].max())
                return self.mass[w.sample.id][layer, :, : entries + w.n]

            self.plan.show(layer, tokens, mass)
