"""Backend graphs: decode steps on a GPU, all launches of a step recorded once as a CUDA graph, replayed with one call.

Shapes: B sequences, padded; N blocks of each, padded; W blocks that a layer with a window reads of them; P block_size;
S = N P or W P keys; G KV heads, R query heads of each; E head dimension; D width.

A token of a small batch takes a GPU less time than Python needs to launch some 25 kernels in each layer. A step in
which every sequence computes one known token on a whole cache is therefore padded up to a bucket (B, N), its numbers
are put into memory that stays where it is, and the bucket's graph is replayed: recorded at its first use, since which
ones will be needed is not known before. Rows of padding repeat the first row, so they write its keys and values once
more where it writes them, and nowhere else. Everything else, prompts above all, is for `Torch`.

A graph ends with the hidden states in memory of its own. Logits are made from them anew in every step, outside of the
graph, by the same call as in `Torch`: nobody ever holds a tensor that a later replay overwrites.
"""

from __future__ import annotations

import functools
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from modicum.model.attend import attention
from modicum.model.attention import AttentionPattern
from modicum.model.decoder import Decoder
from modicum.serve.backends import CannotRun
from modicum.serve.pages import Storage
from modicum.serve.plan import AttentionPlan, visible
from modicum.serve.table import BlockTable
from modicum.serve.uneven import SHAPE
from modicum.serve.work import Work, tokens_of

log = logging.getLogger("modicum.serve")
Bucket = tuple[int, int]  # B, N
MOST_GRAPHS = 96  # each holds megabytes of the GPU's memory; buckets beyond run eagerly
FEWEST = 64  # keys of each row: reading a few too many costs less than recording more graphs
UNEVEN = 4  # padding makes attention read at most so many times what is held; `Torch` has groups of similar lengths
SMALL = 16384  # keys, of all rows together, that are read however few are held
WARM_UP = 2  # steps before recording, in which libraries choose kernels and take their working memory


def reason() -> str:
    """One line: whether graphs can be used here."""
    if not torch.cuda.is_available():
        return "not in use: there is no GPU"
    return "used for decode steps of models on the GPU (serve --no-cuda-graphs turns them off)"


def unfit(model: Decoder) -> str | None:
    """Why the steps of this model cannot be replayed, in a few words; None if they can."""
    if any(table.long is not None for table in model.ropes()[0]):
        return "longrope positions, which turn by the longest sequence of a step"
    if SHAPE & model.config.varying:
        return "layers of different shapes"
    if any(layer.attention for layer in model.config.per_layer):
        return "attention patterns"
    if len({p.device for p in (*model.parameters(), *model.buffers())}) != 1:
        return "weights on several devices"
    return None


def bucket_of(count: int, keys: int, block_size: int, most: int) -> Bucket:
    """B, N for `count` sequences of up to `keys` keys: B of 1, 2, 4, 8, 16, 24, ... `most`, N a power of two."""
    rows = 1 << (count - 1).bit_length() if count <= 8 else -(-count // 8) * 8
    blocks = -(-max(keys, FEWEST) // block_size)
    return min(rows, most), 1 << (blocks - 1).bit_length()


class StaticAttend:
    """An `attend` for one token of each of B sequences, fit to be recorded: all shapes follow from the inputs' shapes,
    and nothing asks a tensor for its values.

    positions_B: place of the token in its sequence; rows_B: where that lies in a layer's storage; table_BN: blocks.
    """

    def __init__(self, storage: Storage, positions_B: Tensor, rows_B: Tensor, table_BN: Tensor):
        self.storage, self.positions_B, self.rows_B, self.table_BN = storage, positions_B, rows_B, table_BN
        self._reaches: dict[int | None, tuple[Tensor, Tensor]] = {}

    def __call__(
        self,
        layer: int,
        q_BHTE: Tensor,
        k_BGSE: Tensor,
        v_BGSE: Tensor,
        *,
        window: int | None,
        scale: float,
        softcap: float | None,
        pattern: AttentionPattern | None = None,
    ) -> Tensor:
        """The B tokens are one row, as in `PlannedAttend`: (1, H, B, E) in, (1, H, B, E) out."""
        q_HBE, k_GBE, v_GBE = q_BHTE[0], k_BGSE[0], v_BGSE[0]
        B, G = q_HBE.shape[1], k_GBE.shape[0]
        if window not in self._reaches:  # made by the first layer that has this window, shared by the others
            self._reaches[window] = self._reach(window, q_HBE)
        blocks, mask = self._reaches[window]
        read = []
        for x_LGNPE, new_GBE in ((self.storage.k_LGNPE, k_GBE), (self.storage.v_LGNPE, v_GBE)):
            x_GNPE = x_LGNPE[layer]
            x_GNPE.flatten(1, 2).index_copy_(1, self.rows_B, new_GBE.to(x_GNPE.dtype))
            read.append(x_GNPE.index_select(1, blocks).view(G, B, -1, x_GNPE.shape[-1]).to(q_HBE.dtype))
        q_GBRE = q_HBE.unflatten(0, (G, -1)).transpose(1, 2)
        out_GBRE = attention(q_GBRE, read[0], read[1], scale=scale, softcap=softcap, mask=mask)
        return out_GBRE.transpose(1, 2).flatten(0, 1)[None]

    def _reach(self, window: int | None, like: Tensor) -> tuple[Tensor, Tensor]:
        """Blocks to read, (B * W), and the additive mask (1, B, 1, S) of the keys in them."""
        P, position_B1 = self.storage.block_size, self.positions_B[:, None]
        B, N = self.table_BN.shape
        width = N if window is None else min(N, (window + P - 2) // P + 1)  # so many blocks a window can touch
        column_BW = torch.arange(width, device=like.device).expand(B, width)
        if window is not None and width < N:
            column_BW = column_BW + (position_B1 + 1 - window).clamp(min=0) // P
        blocks = self.table_BN.gather(1, column_BW.clamp(max=N - 1)).flatten()
        slot_BS = (column_BW[:, :, None] * P + torch.arange(P, device=like.device)).flatten(1)
        seen_BS = visible(position_B1, slot_BS, window)
        mask_BS = torch.zeros(seen_BS.shape, dtype=like.dtype, device=like.device)
        return blocks, mask_BS.masked_fill_(~seen_BS, float("-inf"))[None, :, None]


class Graphs:
    """Decode steps by graphs. Whoever makes one asks `unfit` first.

    Weights must not be replaced or moved afterwards: graphs read the memory that held them when they were recorded.
    With `capture=False` the same static steps run unrecorded, on any device: for tests.
    """

    def __init__(self, model: Decoder, storage: Storage, table: BlockTable, capture: bool = True):
        self.model, self.storage, self.table, self.capture = model, storage, table, capture
        self.name = "cuda graphs"
        P, count = storage.block_size, len(table.numbers)
        self.most: Bucket = bucket_of(count, min(storage.n_blocks * P, model.config.context_length), P, count)
        # One piece of memory for all buckets, filled by one copy: tokens, positions, rows of the storage, table.
        self._inputs = torch.zeros(self.most[0] * (3 + self.most[1]), dtype=torch.int64, device=model.device)
        width = model.config.embed_width or model.config.width
        self._h_BD = torch.zeros((self.most[0], width), dtype=model.dtype, device=model.device)
        self.steps: dict[Bucket, Callable[[], None]] = {}
        self.used: Counter[Bucket] = Counter()
        self.failed = ""
        self._rows = 0  # of the last step
        self._stream: torch.cuda.Stream | None = None
        self._pool: Any = None

    def cannot(self, plan: AttentionPlan) -> str | None:
        if self.failed:
            return self.failed
        if plan.adapted:
            return "rows with adapters"
        if plan.watched or plan.own:
            return "a policy that looks at the step, or attends in its own way"
        if plan.trees or plan.evicted or any(w.n > 1 for w in plan.works):
            return "other than single tokens on whole caches"
        B, N = bucket = self._bucket(plan.works)
        entries = sum(w.start + 1 for w in plan.works)
        if self.most[1] < N or max(UNEVEN * entries, SMALL) < B * N * self.storage.block_size:
            return "sequences of very different lengths"
        return None if bucket in self.steps or len(self.steps) < MOST_GRAPHS else "too many graphs"

    def __call__(self, plan: AttentionPlan, rows: Sequence[int]) -> Tensor | None:
        bucket = self._bucket(plan.works)
        self._fill(plan.works, bucket)
        step = self.steps.get(bucket) or self._new(bucket)
        step()
        self.used[bucket] += 1
        self._rows = len(plan.works)
        if not len(rows):
            return None
        return self.model.head(self._h_BD[: self._rows]) if len(rows) == self._rows else self.logits(rows)

    def logits(self, rows: Sequence[int]) -> Tensor:
        return self.model.head(self._h_BD[: self._rows][torch.tensor(list(rows), device=self._h_BD.device)])

    def _bucket(self, works: Sequence[Work]) -> Bucket:
        return bucket_of(len(works), max(w.start for w in works) + 1, self.storage.block_size, self.most[0])

    def _fill(self, works: Sequence[Work], bucket: Bucket) -> None:
        (B, N), P, table = bucket, self.storage.block_size, self.table.numbers
        row_B = np.arange(B)
        row_B[len(works) :] = 0
        slot_B = np.array([w.sample.slot for w in works], dtype=np.int64)[row_B]
        position_B = np.array([w.start for w in works], dtype=np.int64)[row_B]
        last_B = position_B // P
        host = np.empty(B * (3 + N), dtype=np.int64)
        host[:B] = np.array(tokens_of(works), dtype=np.int64)[row_B]
        host[B : 2 * B] = position_B
        host[2 * B : 3 * B] = table[slot_B, last_B] * P + position_B % P
        # Past a sequence's last block comes that block again, masked: what is not its own, a NaN say, is not even read.
        host[3 * B :] = table[slot_B[:, None], np.minimum(np.arange(N), last_B[:, None])].ravel()
        source = torch.from_numpy(host)
        if self._inputs.is_cuda:  # pinned memory of PyTorch's: it is not given out again before the copy is done
            source = source.pin_memory()
        self._inputs[: len(host)].copy_(source, non_blocking=True)

    def _static(self, bucket: Bucket) -> None:
        """The step that is recorded: from `_inputs` to `_h_BD` and the cache."""
        (B, N), given = bucket, self._inputs
        attend = StaticAttend(
            self.storage, given[B : 2 * B], given[2 * B : 3 * B], given[3 * B : (3 + N) * B].view(B, N)
        )
        h_BD = self.model.hidden(given[:B][None], positions_BT=given[B : 2 * B][None], attend=attend)[0]
        self._h_BD[:B].copy_(h_BD)

    def _new(self, bucket: Bucket) -> Callable[[], None]:
        """What runs a bucket from now on. If that fails nothing is recorded any more, and others run the steps."""
        try:
            self.steps[bucket] = self._record(bucket)
        except Exception as error:  # whatever it is: the decoder as written can still do the step, and all others
            what = f"{type(error).__name__}: {error}"
            log.warning("no CUDA graphs, all steps run eagerly: recording one of %d rows failed (%s)", bucket[0], what)
            self.steps.clear()
            self.failed, self.name = "a graph could not be recorded", "eager, as no graph could be recorded"
            raise CannotRun(self.failed) from error
        return self.steps[bucket]

    def _record(self, bucket: Bucket) -> Callable[[], None]:
        step = functools.partial(self._static, bucket)
        if not self.capture:
            return step
        with torch.cuda.device(self.model.device):
            if self._stream is None:
                self._stream, self._pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()
            here, graph = torch.cuda.current_stream(), torch.cuda.CUDAGraph()
            self._stream.wait_stream(here)
            with torch.cuda.stream(self._stream):
                for _ in range(WARM_UP):
                    step()
            here.wait_stream(self._stream)
            # The outer context gives the stream back even if the recording cannot be ended. Other threads may go on
            # using the GPU. One pool serves all graphs: they never run at once, and none reads what another left.
            with (
                torch.cuda.stream(self._stream),
                torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"),
            ):
                step()
        return graph.replay
