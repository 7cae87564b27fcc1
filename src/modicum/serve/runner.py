"""Runs a step's tokens through the model: by own kernels where they serve, else by the decoder as it is written.

All give the logits of the wanted rows. `Eager` is the truth and runs everywhere; `Native` covers decoders of
the Llama kind (RMSNorm, rotary positions, a sequential block) on a CPU with AVX-512 whose linear layers are
plain, int8, int4 or ggml, and hands steps it has no kernels for to `Eager`: policies that observe or attend in their
own way, several tokens of a thinned sequence, thinned layers with windows. It computes between the matrices in float32
and reads weights where the modules hold them: nothing is stored twice. On a GPU, `graphs.Graphs` replays decode
steps of the decoder as written and hands the others to `Eager`.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from modicum.budget.machine import cores, memory_available
from modicum.core.errors import UserError
from modicum.model.config import DecoderConfig
from modicum.model.decoder import Decoder
from modicum.model.layers import Block, RMSNorm
from modicum.model.linear import LinearForm
from modicum.model.safetensor import is_mapped
from modicum.serve import native
from modicum.serve.attend import StepAttend
from modicum.serve.drafters import layout
from modicum.serve.graphs import Graphs, unfit
from modicum.serve.uneven import attend_for
from modicum.serve.work import Work, by_policy, places_of, positions_of, tokens_of

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")  # in the order of native/step.c
NO_WINDOW = 1 << 62
SETTLED = 16 << 20  # bytes of weights that one step moves out of their file's pages
KINDS = {torch.float32: native.FLOAT32, torch.bfloat16: native.BFLOAT16}
SCALE_KINDS = KINDS | {torch.float16: native.FLOAT16}


class Eager:
    """The decoder's own forward pass with the step's attention."""

    name = "eager"

    def __init__(self, model: Decoder, attend: StepAttend):
        self.model, self.attend = model, attend

    def __call__(self, works: Sequence[Work], rows: Sequence[int], observe: bool = False) -> Tensor | None:
        """Logits (len(rows), V) of the given places of the step's row of tokens; None for no rows."""
        device = self.model.device
        tokens_1T, positions_1T = torch.tensor([tokens_of(works), positions_of(works)], device=device).split(1)
        self.attend.begin(works, observe)
        attend = attend_for(self.attend, self.model.config)
        self._h_TD = self.model.hidden(tokens_1T, positions_BT=positions_1T, attend=attend)[0]
        if not len(rows):
            return None
        if len(rows) == len(self._h_TD):
            return self.model.head(self._h_TD)
        return self.model.head(self._h_TD[torch.tensor(list(rows), device=device)])

    def logits(self, rows: Sequence[int]) -> Tensor:
        """Logits (len(rows), V) of more rows of the step that ran last."""
        return self.model.head(self._h_TD[torch.tensor(list(rows), device=self._h_TD.device)])


class Native:
    """The same by `serve/native`. Made by `make_runner`, which asks `unserved` first."""

    name = "native"

    def __init__(self, model: Decoder, attend: StepAttend, library: ctypes.CDLL, eight: bool = False):
        self._mapped: list[tuple[native.Matrix, Tensor, Tensor]] = []  # (read by the kernels, a module's, its memory)
        self.model, self.attend, self.library, self.eight = model, attend, library, eight
        if eight:
            self.name = "native, activations in eight bits"
        self.eager = Eager(model, attend)
        self.threads, self._cores = 0, cores()  # threads that spin at barriers must each have a processor
        self._keep: list[Any] = []
        coded = [_stored(module) for module in model.modules() if isinstance(module, LinearForm)]
        native.lay_together(
            [
                t
                for found in coded
                if found and found[0] in (native.INT8, native.INT4)
                for t in found[1:]
                if t is not None
            ]
        )
        self._shape = self._describe(model, attend)
        native.use_large_pages((t.data_ptr(), t.nbytes) for t in self._keep if isinstance(t, Tensor))
        self._pages: native.LargePages | None = None
        self._window = min((layer.window for layer in model.config.per_layer if layer.window), default=NO_WINDOW)
        self._x_TD: Tensor | None = None  # of the last step, before the final norm
        self._state = 0
        self._head_shape = native.Model.from_buffer_copy(self._shape)
        self._head_shape.layers = 0  # a step without layers: the final norm and the head
        self._head_state = 0
        self._finalizers: list[weakref.finalize] = []

    def __call__(self, works: Sequence[Work], rows: Sequence[int], observe: bool = False) -> Tensor | None:
        self._x_TD = None
        if (observe and any(w.sample.policy.watches(w.start, w.n) for w in works)) or not self._serves(works):
            return self.eager(works, rows, observe)
        trees = [w for w in works if w.tree is not None]
        depth = max((layout(w.tree).line_XD.shape[1] for w in trees if w.tree is not None), default=0)
        if depth >= self._window:  # a branch that reaches out of a window: only `serve.trees` looks at that
            return self.eager(works, rows, observe)
        self._settle()
        self._open()
        config, table = self.model.config, self.attend.table
        position_T = np.array(positions_of(works), dtype=np.int64)
        slot_T = np.repeat(np.array([w.sample.slot for w in works], dtype=np.int64), [w.n for w in works])
        place_T, root_T, line_TD = _drafted(works, depth) if trees else (position_T, None, None)
        thin_T, weights = _thinned(works), self.attend.storage.weight_AP
        x_TD = self.model.embed(torch.tensor(tokens_of(works)))
        if config.embed_scale is not None:
            x_TD = x_TD * torch.tensor(config.embed_scale, dtype=x_TD.dtype)
        x_TD = x_TD.float()
        ready_R = np.array(rows, dtype=np.int64)
        logits_RV = torch.empty(len(rows), config.vocab_size)
        step = native.Step(
            rows=len(position_T),
            ready=len(rows),
            table_stride=table.shape[1],
            line_stride=depth,
            x=x_TD.data_ptr(),
            position=position_T.ctypes.data,
            place=place_T.ctypes.data,
            slot=slot_T.ctypes.data,
            root=None if root_T is None else root_T.ctypes.data,
            line=None if line_TD is None else line_TD.ctypes.data,
            table=table.ctypes.data,
            thin=None if thin_T is None else ctypes.addressof(thin_T),
            position_of=None if thin_T is None else self.attend.storage.position_AP.data_ptr(),
            weight_of=None if thin_T is None or weights is None else weights.data_ptr(),
            ready_row=ready_R.ctypes.data,
            logits=logits_RV.data_ptr(),
        )
        if self.library.modicum_step(self._state, ctypes.byref(step)):
            raise MemoryError("no memory for attention scores of a sequence this long")
        self._x_TD = x_TD
        if not len(rows):
            return None
        return self._capped(logits_RV)

    def _serves(self, works: Sequence[Work]) -> bool:
        """Not a policy's own attention; of thinned sequences single tokens, where no window asks for positions."""
        if any(by_policy(w) for w in works):
            return False
        thinned = [w for w in works if w.sample.pages is not None]
        if not thinned:
            return True
        capped = self.model.config.attention_softcap is not None and self.attend.storage.weight_AP is not None
        return self._window == NO_WINDOW and not capped and all(w.n == 1 for w in thinned)

    def logits(self, rows: Sequence[int]) -> Tensor:
        if self._x_TD is None:
            return self.eager.logits(rows)
        self._open()
        x_RD = self._x_TD[torch.tensor(list(rows))]
        logits_RV = torch.empty(len(rows), self.model.config.vocab_size)
        ready_R, zero_R = np.arange(len(rows), dtype=np.int64), np.zeros(len(rows), dtype=np.int64)
        step = native.Step(
            rows=len(rows),
            ready=len(rows),
            x=x_RD.data_ptr(),
            position=zero_R.ctypes.data,
            place=zero_R.ctypes.data,
            slot=zero_R.ctypes.data,
            ready_row=ready_R.ctypes.data,
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

    def _describe(self, model: Decoder, attend: StepAttend) -> native.Model:
        c, storage = model.config, attend.storage
        layers = (native.Layer * c.layers)()
        tables, table_of = model.ropes()
        for i, block in enumerate(model.layers):
            assert isinstance(block, Block)
            layer, a, m = layers[i], block.attention, block.mlp
            for name, module in zip(
                native.MATRICES, (a.q, a.k, a.v, a.o, getattr(m, "gate", None), m.up, m.down), strict=True
            ):
                setattr(layer, name, self._matrix(module))
                self._note(getattr(layer, name), module)
            for name in native.NORMS:
                norm = getattr(block if "out" in name or name.endswith("p_norm") or "att" in name else a, name, None)
                setattr(layer, name, self._norm(norm))
            index = table_of[i]
            layer.rope = -1 if index is None else index
            layer.window, layer.scale = c.per_layer[i].window or 0, c.per_layer[i].attention_scale
        ropes = (native.Rope * max(1, len(tables)))()
        for rope, table in zip(ropes, tables, strict=False):
            rope.angles, rope.rotated, rope.scale = self._floats(table.angles), 2 * len(table.angles), table.scale
        self._keep += [layers, ropes, storage]
        shape = native.Model(
            layers=c.layers,
            width=c.width,
            heads=c.heads,
            kv_heads=c.kv_heads,
            head_dim=c.head_dim,
            mlp_width=c.mlp_width,
            rotated=2 * max((len(t.angles) for t in tables), default=0),
            activation=ACTIVATIONS.index(c.activation),
            qk_norm_full=c.qk_norm == "full",
            half=model.dtype == torch.bfloat16,
            eight=self.eight,
            ropes=len(tables),
            cache_kind=KINDS[storage.k_LGNPE.dtype],
            block_size=storage.block_size,
            n_blocks=storage.n_blocks,
            eps=c.norm_eps,
            softcap=c.attention_softcap or 0.0,
            layer=layers,
            rope=ropes,
            final_norm=self._norm(model.norm if c.final_norm else None),
            head=self._matrix(model.lm_head),
            k_cache=storage.k_LGNPE.data_ptr(),
            v_cache=storage.v_LGNPE.data_ptr(),
        )
        self._note(shape.head, model.lm_head)
        return shape

    def _note(self, matrix: native.Matrix, module: Any) -> None:
        """Remember a matrix whose weight lies in a file's pages."""
        found = None if module is None else _stored(module)
        if found and is_mapped(found[1]):
            self._mapped.append((matrix, found[1], found[1].detach()))

    def _floats(self, tensor: Tensor) -> int:
        kept = tensor.detach().float().contiguous()
        self._keep.append(kept)
        return kept.data_ptr()

    def _norm(self, norm: nn.Module | None) -> int | None:
        if norm is None:
            return None
        assert isinstance(norm, RMSNorm)
        return self._floats(norm.weight.float() + 1 if norm.plus_one else norm.weight)

    def _matrix(self, module: Any) -> native.Matrix:
        if module is None:
            return native.Matrix()
        found = _stored(module)
        assert found is not None
        kind, weight, scale, zero = found
        out, group, groups = module.out_features, 0, 0
        if scale is not None:
            group, groups = module.group, module.n_groups
            if scale.dtype not in SCALE_KINDS:
                scale, zero = scale.float(), None if zero is None else zero.float()
        # Views of their own: this memory must stay, even if somebody gives the module's tensors another.
        kept = (None if is_mapped(weight) else weight, scale, zero)
        self._keep += [t.detach() for t in kept if t is not None]
        bias = module.bias
        return native.Matrix(
            kind,
            out,
            module.in_features,
            group,
            groups,
            0 if scale is None else SCALE_KINDS[scale.dtype],
            # The code, as an unsigned number, that stands for the zero point.
            128 if kind == native.INT8 else 0 if getattr(getattr(module, "config", None), "type", "") == "q4_1" else 8,
            weight.data_ptr(),
            None if scale is None else scale.data_ptr(),
            None if zero is None else zero.data_ptr(),
            None if bias is None else self._floats(bias),
        )


def _drafted(works: Sequence[Work], depth: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where each token goes in its sequence's cache (T,), its tree's root or -1 (T,), its ancestors (T, depth)."""
    place_T = places_of(works)
    root_T, line_TD = np.full(len(place_T), -1), np.zeros((len(place_T), depth), dtype=np.int64)
    for w in works:
        if w.tree is not None:
            line_XD = layout(w.tree).line_XD
            root_T[w.at : w.at + w.n] = w.start
            line_TD[w.at : w.at + w.n, : line_XD.shape[1]] = w.start + line_XD
    return place_T, root_T, line_TD


def _thinned(works: Sequence[Work]) -> Any:
    """The pages of each row's sequence, an array of `native.Thin`; None if all sequences are whole."""
    if all(w.sample.pages is None for w in works):
        return None
    thin_T = (native.Thin * sum(w.n for w in works))()
    for w in works:
        if (pages := w.sample.pages) is not None:
            table_LGN = pages.table_LGN
            thin_T[w.at] = native.Thin(table_LGN.data_ptr(), pages.count_LG.data_ptr(), table_LGN.shape[2])
    return thin_T


def _stored(module: Any) -> tuple[int, Tensor, Tensor | None, Tensor | None] | None:
    """Kind, weight, scale and zero of a linear layer the kernels can read; None for any other."""
    from modicum.model.linear.dense import Dense
    from modicum.model.linear.ggml import Ggml
    from modicum.model.linear.int4 import Int4
    from modicum.model.linear.int8 import Int8

    if type(module) in (nn.Linear, Dense):
        weight = module.weight
        ok = weight.dtype in KINDS and weight.is_contiguous() and weight.device.type == "cpu"
        return (KINDS[weight.dtype], weight, None, None) if ok else None
    if type(module) is Int8 and (module.n_groups == 1 or module.group == 32 or module.group % 64 == 0):
        return native.INT8, module.codes, module.scale, None
    if type(module) is Int4 and (module.group in (32, 64) or module.group % 128 == 0) and module.in_features % 16 == 0:
        return native.INT4, module.packed, module.scale, module.zero
    if type(module) is Ggml and module.in_features % module.group == 0:
        kind = native.INT8 if module.config.type == "q8_0" else native.INT4
        return kind, module.codes, module.scale, module.minimum if module.config.type == "q4_1" else None
    return None


def unserved(model: Decoder, cache: torch.dtype) -> str | None:
    """Why the kernels cannot run this model, in a few words; None if they can."""
    c: DecoderConfig = model.config
    odd = {
        "not on the CPU": model.device.type != "cpu",
        f"{model.dtype} weights": model.dtype not in KINDS,
        f"a {cache} cache": cache not in KINDS,
        f"norm {c.norm!r}": c.norm == "layer",
        f"{c.norm_place!r} norms": c.norm_place == "after",
        "parallel blocks": c.parallel,
        "learned positions": c.position != "rope",
        "longrope positions": any(table.long is not None for table in model.ropes()[0]),
        "projected embeddings": c.embed_width not in (None, c.width),
    }
    if differ := c.varying - {"window", "rope", "scale"}:
        return f"layers that differ in {', '.join(sorted(differ))}"
    for words, wrong in odd.items():
        if wrong:
            return words
    for name, module in model.named_modules():
        held = isinstance(module, nn.Linear | LinearForm)
        if held and name.endswith((".q", ".k", ".v", ".o", ".gate", ".up", ".down", "lm_head")) and not _stored(module):
            return f"{name} is {type(module).__name__}"
    for i, block in enumerate(model.layers):
        if c.gated and isinstance(block, Block):
            gate, up = block.mlp.gate, block.mlp.up
            kinds = {(type(m), getattr(m, "group", 0), found[0] if (found := _stored(m)) else None) for m in (gate, up)}
            if len(kinds) > 1:
                return f"gate and up of layer {i} are held differently"
    return None


def make_runner(
    model: Decoder, attend: StepAttend, cuda_graphs: bool = True, activation_bits: int = 16
) -> Eager | Native | Graphs:
    """Raises `UserError` if `activation_bits` asks for kernels that cannot be had."""
    library = native.library()
    lacking = native.reason() if library is None else unserved(model, attend.storage.k_LGNPE.dtype)
    eight = activation_bits == 8
    if eight and (lacking := lacking or _unserved_in_eight(model)):
        raise UserError(
            f"activation_bits=8 works with the kernels for the CPU and int8 or int4 matrices; here: {lacking}; "
            "mend that (see `modicum doctor`), or leave activation_bits out"
        )
    if model.device.type == "cuda":
        eager = Eager(model, attend)
        return Graphs(eager) if cuda_graphs and unfit(model) is None else eager
    if library is None or lacking is not None:
        return Eager(model, attend)
    return Native(model, attend, library, eight)


def _unserved_in_eight(model: Decoder) -> str | None:
    if not native.multiplies_in_eight_bits():
        return "a processor without VNNI and bfloat16 products"
    if model.dtype != torch.bfloat16:
        return f"a model in {str(model.dtype).removeprefix('torch.')}, not in bfloat16 (--dtype bfloat16)"
    if not any((found := _stored(m)) and found[0] in (native.INT8, native.INT4) for m in model.modules()):
        return "no int8 or int4 matrix (--form int8)"
    return None
