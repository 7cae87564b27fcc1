"""The cache's memory: keys and values in blocks, and pages for sequences that a KV policy thinned.

Shapes: L layers, G KV heads, N blocks (or pages of a sequence), P block_size, E head dimension, S entries.

Storage is, in the plain form, one tensor for keys and one for values, (L, G, N, P, E), and in others some tensors of
codes (`serve.coded`): a block is a column through all layers and heads, and the cell (layer, head, block) is a page of
P entries. Within a layer and head a run
of consecutive blocks is plain contiguous memory, so one sequence's keys are often a view and never need
to be turned for attention. On the CPU memory comes zeroed from the system, page by page as it is first used.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from modicum.budget.units import bytes_text
from modicum.core.errors import ModicumError, UserError
from modicum.model.config import DecoderConfig
from modicum.serve.blocks import PagePool
from modicum.serve.cacheforms import CacheForm
from modicum.serve.coded import coded, lazy_zeros
from modicum.serve.kv import Entries, Keep
from modicum.serve.uneven import largest

Lifted = tuple[Tensor, Tensor, Tensor, "Tensor | None"]  # k, v, position, weight of one head's entries


def block_bytes(config: DecoderConfig, block_size: int, form: CacheForm) -> int:
    """Bytes of one block: keys and values of `block_size` tokens in all layers, each as large as the largest."""
    return form.bytes_of_layers(config.layers, largest(config)[0], block_size)


@dataclass(slots=True)
class Pages:
    """What a thinned sequence holds. Heads may hold different numbers of entries."""

    table_LGN: Tensor  # int64 page numbers; places past a head's pages are 0
    count_LG: Tensor  # int64 entries
    pages_LG: Tensor  # int64 pages held

    def numbers(self) -> list[int]:
        """All pages held."""
        used_LGN = torch.arange(self.table_LGN.shape[2]) < self.pages_LG[:, :, None]
        return [int(p) for p in self.table_LGN[used_LGN].tolist()]

    def slack(self, block_size: int) -> int:
        """Tokens that can be appended without a new page."""
        return int((self.pages_LG * block_size - self.count_LG).min())


class Storage:
    """Raises `UserError` when the memory cannot be had."""

    def __init__(self, config: DecoderConfig, n_blocks: int, block_size: int, form: CacheForm, device: torch.device):
        self.layers, (self.heads, dim) = config.layers, largest(config)
        self.n_blocks, self.block_size, self.form = n_blocks, block_size, form
        self.block_bytes = block_bytes(config, block_size, form)
        shape = (self.layers, self.heads, n_blocks, block_size, dim)
        try:
            self.k, self.v = coded(form, "k", shape, device), coded(form, "v", shape, device)
        except (RuntimeError, OSError, OverflowError) as error:
            raise UserError(
                f"a cache of {bytes_text(n_blocks * self.block_bytes)} does not fit the memory of "
                f"{device} ({str(error).splitlines()[0]}); ask for less with cache=SIZE"
            ) from None
        self._position_AP: Tensor | None = None
        self.weight_AP: Tensor | None = None  # tokens each entry stands for; made with the first merged entry
        self.device = device

    @property
    def plain(self) -> bool:
        """Whether entries lie there as they are: `k_LGNPE` and `v_LGNPE` are the memory then."""
        return self.form.native == "plain"

    @property
    def k_LGNPE(self) -> Tensor:
        assert self.plain
        return self.k.codes[0]

    @property
    def v_LGNPE(self) -> Tensor:
        assert self.plain
        return self.v.codes[0]

    @property
    def pages_per_block(self) -> int:
        return self.layers * self.heads

    @property
    def position_AP(self) -> Tensor:
        """Place in its sequence of every entry of every page (A of them); made when first needed."""
        if self._position_AP is None:
            shape = (self.pages_per_block * self.n_blocks, self.block_size)
            self._position_AP = lazy_zeros(shape, torch.int32, self.device)
        return self._position_AP

    def wipe(self, blocks: Sequence[int]) -> None:
        """Zero blocks that may hold something that is not a number: masked values are still multiplied."""
        index = torch.tensor(list(blocks), dtype=torch.int64, device=self.device)
        for x in (self.k, self.v):
            x.wipe(index)

    def wipe_pages(self, pages: Sequence[int]) -> None:
        index = torch.tensor(list(pages), dtype=torch.int64, device=self.device)
        for x in (self.k, self.v):
            x.wipe_pages(index)

    # thinned sequences ----------------------------------------------------------------------------

    def entries_of_blocks(self, layer: int, blocks: Sequence[int], count: int) -> Entries:
        index = torch.tensor(list(blocks[: -(-count // self.block_size)]), device=self.device)
        k_GSE, v_GSE = (x.blocks(layer, index).flatten(1, 2)[:, :count] for x in (self.k, self.v))
        position_GS = torch.arange(count, device=self.device).expand(self.heads, count)
        return Entries(k_GSE, v_GSE, position_GS, [count] * self.heads)

    def entries_of_pages(self, layer: int, pages: Pages, more: int = 0) -> Entries:
        """What a thinned sequence holds; `more`: entries of the running step, not counted yet."""
        counts = (pages.count_LG[layer] + more).tolist()
        most = max(counts)
        index = pages.table_LGN[layer, :, : -(-most // self.block_size)].to(self.device)
        k_GSE, v_GSE = (x.pages(index).flatten(1, 2)[:, :most] for x in (self.k, self.v))
        position_GS = self.position_AP[index].flatten(1, 2)[:, :most]
        weight_GS = None if self.weight_AP is None else self.weight_AP[index].flatten(1, 2)[:, :most]
        return Entries(k_GSE, v_GSE, position_GS.long(), counts, weight_GS)

    def lift(self, entries: Entries, keep: Keep) -> list[Lifted]:
        """Copies of what is kept, per head (k, v, position, weight); the cache may then be given back."""
        lifted: list[Lifted] = []
        for g, index in enumerate(keep.heads):
            index = index.to(self.device)
            weight = None if entries.weight_GS is None else entries.weight_GS[g, index]
            k_CE, v_CE = entries.k_GSE[g, index], entries.v_GSE[g, index]
            if keep.replaced is not None and (instead := keep.replaced[g]) is not None:
                if any(x.shape != k_CE.shape for x in instead):
                    raise ModicumError(f"{len(index)} entries are replaced by {[tuple(x.shape) for x in instead]}")
                k_CE, v_CE = (x.to(k_CE.dtype) for x in instead)
            head: Lifted = (k_CE, v_CE, entries.position_GS[g, index], weight)
            new = keep.merged[g] if keep.merged is not None else None
            if new is not None:
                ones = torch.ones(len(index), device=self.device) if weight is None else weight
                head = (
                    torch.cat([new.k_ME.to(head[0].dtype), head[0]]),
                    torch.cat([new.v_ME.to(head[1].dtype), head[1]]),
                    torch.cat([new.position_M.to(head[2].dtype), head[2]]),
                    torch.cat([new.weight_M.float(), ones]),
                )
            lifted.append(head)
        return lifted

    def lay(self, lifted: Sequence[Sequence[Lifted]], pool: PagePool) -> Pages:
        """Put lifted entries (per layer, per head) into fresh pages. Raises `OutOfBlocks`, taking nothing."""
        count_LG = torch.tensor([[len(head[0]) for head in heads] for heads in lifted])
        pages_LG = (-(-count_LG // self.block_size)).clamp_(min=1)
        numbers = torch.tensor(pool.take(int(pages_LG.sum())))
        table_LGN = torch.zeros((self.layers, self.heads, int(pages_LG.max())), dtype=torch.int64)
        table_LGN[torch.arange(table_LGN.shape[2]) < pages_LG[:, :, None]] = numbers
        if self.weight_AP is None and any(head[3] is not None for heads in lifted for head in heads):
            self.weight_AP = torch.ones(self.position_AP.shape, device=self.device)
        for layer, heads in enumerate(lifted):
            rows = torch.cat(
                [self._rows(table_LGN[layer, g], torch.arange(len(head[0]))) for g, head in enumerate(heads)]
            ).to(self.device)
            for i, x in enumerate((self.k, self.v)):
                x.write_flat(rows, torch.cat([(head[0], head[1])[i] for head in heads]))
            self.position_AP.view(-1)[rows] = torch.cat([head[2] for head in heads]).int()
            if self.weight_AP is not None:
                self.weight_AP.view(-1)[rows] = torch.cat(
                    [head[0].new_ones(len(head[0])).float() if head[3] is None else head[3] for head in heads]
                )
        return Pages(table_LGN, count_LG, pages_LG)

    def grow(self, pages: Pages, n_tokens: int, pool: PagePool) -> None:
        """Room for `n_tokens` more entries in every head. Raises `OutOfBlocks`, taking nothing."""
        need_LG = -(-(pages.count_LG + n_tokens) // self.block_size)
        more_LG = (need_LG - pages.pages_LG).clamp_(min=0)
        total = int(more_LG.sum())
        if not total:
            return
        numbers = torch.tensor(pool.take(total))
        width = int(torch.maximum(need_LG, pages.pages_LG).max())
        if width > pages.table_LGN.shape[2]:
            wider = torch.zeros((*pages.table_LGN.shape[:2], width), dtype=torch.int64)
            wider[:, :, : pages.table_LGN.shape[2]] = pages.table_LGN
            pages.table_LGN = wider
        slot = torch.arange(pages.table_LGN.shape[2])
        new = (slot >= pages.pages_LG[:, :, None]) & (slot < (pages.pages_LG + more_LG)[:, :, None])
        pages.table_LGN[new] = numbers
        pages.pages_LG = pages.pages_LG + more_LG

    def rows_of_pages(self, pages: Pages, n_tokens: int) -> Tensor:
        """Rows (L, G, n_tokens) of the flat storage where the next entries of every head belong."""
        at_LGT = pages.count_LG[:, :, None] + torch.arange(n_tokens)
        page_LGT = pages.table_LGN.gather(2, at_LGT // self.block_size)
        return page_LGT * self.block_size + at_LGT % self.block_size

    def _rows(self, table_N: Tensor, at: Tensor) -> Tensor:
        return table_N[at // self.block_size] * self.block_size + at % self.block_size
