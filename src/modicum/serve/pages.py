"""The cache's memory: keys and values in blocks, and pages for sequences that a KV policy thinned.

Shapes: L layers, G KV heads, N blocks (or pages of a sequence), P block_size, E head dimension, S entries.

Storage is one tensor for keys and one for values, (L, G, N, P, E): a block is a column through all
layers and heads, and the cell (layer, head, block) is a page of P entries. Within a layer and head a run
of consecutive blocks is plain contiguous memory, so one sequence's keys are often a view and never need
to be turned for attention. Memory comes zeroed from the system and is only touched when used.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from modicum.budget.units import bytes_text
from modicum.core.errors import UserError
from modicum.model.config import DecoderConfig
from modicum.serve.blocks import PagePool
from modicum.serve.kv import Entries, Keep


def block_bytes(config: DecoderConfig, block_size: int, dtype: torch.dtype) -> int:
    """Bytes of one block: keys and values of `block_size` tokens in all layers."""
    return config.kv_bytes_per_token(dtype) * block_size


@dataclass(slots=True)
class Pages:
    """What a thinned sequence holds. Heads may hold different numbers of entries."""

    table_LGN: Tensor  # int64 page numbers; places past a head's pages are 0
    count_LG: Tensor  # int64 entries
    pages_LG: Tensor  # int64 pages held

    def numbers(self) -> list[int]:
        """All pages held."""
        held_LGN = torch.arange(self.table_LGN.shape[2]) < self.pages_LG[:, :, None]
        return [int(p) for p in self.table_LGN[held_LGN].tolist()]

    def slack(self, block_size: int) -> int:
        """Tokens that can be appended without a new page."""
        return int((self.pages_LG * block_size - self.count_LG).min())


class Storage:
    """Raises `UserError` when the memory cannot be had."""

    def __init__(self, config: DecoderConfig, n_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device):
        self.layers, self.heads = config.layers, config.kv_heads
        self.n_blocks, self.block_size = n_blocks, block_size
        self.block_bytes = block_bytes(config, block_size, dtype)
        shape = (self.layers, self.heads, n_blocks, block_size, config.head_dim)
        try:
            self.k_LGNPE = torch.zeros(shape, dtype=dtype, device=device)
            self.v_LGNPE = torch.zeros(shape, dtype=dtype, device=device)
        except RuntimeError as error:
            raise UserError(
                f"a cache of {bytes_text(n_blocks * self.block_bytes)} does not fit the memory of "
                f"{device} ({str(error).splitlines()[0]}); ask for less with cache=SIZE"
            ) from None
        self._position_AP: Tensor | None = None
        self.device = device

    @property
    def pages_per_block(self) -> int:
        return self.layers * self.heads

    @property
    def position_AP(self) -> Tensor:
        """Place in its sequence of every entry of every page (A of them); made when first needed."""
        if self._position_AP is None:
            self._position_AP = torch.zeros(
                (self.pages_per_block * self.n_blocks, self.block_size), dtype=torch.int32, device=self.device
            )
        return self._position_AP

    def wipe(self, blocks: Sequence[int]) -> None:
        """Zero blocks that may hold something that is not a number: masked values are still multiplied."""
        index = torch.tensor(list(blocks), dtype=torch.int64, device=self.device)
        self.k_LGNPE.index_fill_(2, index, 0)
        self.v_LGNPE.index_fill_(2, index, 0)

    def wipe_pages(self, pages: Sequence[int]) -> None:
        index = torch.tensor(list(pages), dtype=torch.int64, device=self.device)
        self.k_LGNPE.flatten(0, 2).index_fill_(0, index, 0)
        self.v_LGNPE.flatten(0, 2).index_fill_(0, index, 0)

    # thinned sequences ----------------------------------------------------------------------------

    def entries_of_blocks(self, layer: int, blocks: Sequence[int], count: int) -> Entries:
        index = torch.tensor(list(blocks[: -(-count // self.block_size)]), device=self.device)
        k_GSE, v_GSE = (x[layer].index_select(1, index).flatten(1, 2)[:, :count] for x in (self.k_LGNPE, self.v_LGNPE))
        position_GS = torch.arange(count, device=self.device).expand(self.heads, count)
        return Entries(k_GSE, v_GSE, position_GS, [count] * self.heads)

    def entries_of_pages(self, layer: int, pages: Pages) -> Entries:
        counts = pages.count_LG[layer].tolist()
        most = max(counts)
        index = pages.table_LGN[layer, :, : -(-most // self.block_size)].to(self.device)
        k_GSE, v_GSE, position_GS = (
            x[index].flatten(1, 2)[:, :most]
            for x in (self.k_LGNPE.flatten(0, 2), self.v_LGNPE.flatten(0, 2), self.position_AP)
        )
        return Entries(k_GSE, v_GSE, position_GS.long(), counts)

    def lift(self, entries: Entries, keep: Keep) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Copies of what is kept, per head (k, v, position); the cache may then be given back."""
        lifted = []
        for g, index in enumerate(keep.heads):
            index = index.to(self.device)
            lifted.append((entries.k_GSE[g, index], entries.v_GSE[g, index], entries.position_GS[g, index]))
        return lifted

    def lay(self, lifted: Sequence[Sequence[tuple[Tensor, Tensor, Tensor]]], pool: PagePool) -> Pages:
        """Put lifted entries (per layer, per head) into fresh pages. Raises `OutOfBlocks`, taking nothing."""
        count_LG = torch.tensor([[len(k) for k, _, _ in heads] for heads in lifted])
        pages_LG = (-(-count_LG // self.block_size)).clamp_(min=1)
        numbers = torch.tensor(pool.take(int(pages_LG.sum())))
        table_LGN = torch.zeros((self.layers, self.heads, int(pages_LG.max())), dtype=torch.int64)
        table_LGN[torch.arange(table_LGN.shape[2]) < pages_LG[:, :, None]] = numbers
        flat_k, flat_v = (
            self.k_LGNPE.view(-1, self.k_LGNPE.shape[-1]),
            self.v_LGNPE.view(-1, self.v_LGNPE.shape[-1]),
        )
        for layer, heads in enumerate(lifted):
            rows = torch.cat(
                [self._rows(table_LGN[layer, g], torch.arange(len(k))) for g, (k, _, _) in enumerate(heads)]
            ).to(self.device)
            flat_k[rows] = torch.cat([k for k, _, _ in heads])
            flat_v[rows] = torch.cat([v for _, v, _ in heads])
            self.position_AP.view(-1)[rows] = torch.cat([p for _, _, p in heads]).int()
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
        place = torch.arange(pages.table_LGN.shape[2])
        new = (place >= pages.pages_LG[:, :, None]) & (place < (pages.pages_LG + more_LG)[:, :, None])
        pages.table_LGN[new] = numbers
        pages.pages_LG = pages.pages_LG + more_LG

    def rows_of_pages(self, pages: Pages, n_tokens: int) -> Tensor:
        """Rows (L, G, n_tokens) of the flat storage where the next entries of every head belong."""
        at_LGT = pages.count_LG[:, :, None] + torch.arange(n_tokens)
        page_LGT = pages.table_LGN.gather(2, at_LGT // self.block_size)
        return page_LGT * self.block_size + at_LGT % self.block_size

    def _rows(self, table_N: Tensor, at: Tensor) -> Tensor:
        return table_N[at // self.block_size] * self.block_size + at % self.block_size
