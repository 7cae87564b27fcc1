"""The attention plan of one engine step: which query rows read which keys, under which visibility and bias.

The step's tokens lie in one row. The plan cuts it into segments: B neighbouring sequences with T rows each that one
call computes. A segment says where its keys are (`fresh`: the rows' own; `blocks`: a whole cache; `pages`: a cache that
a KV policy evicted from, other entries in each head) and who sees whom:

* causal: an entry at a position up to the query's, within the layer's window and pattern (`visible`);
* tree: that, and of the drafted rows a query's ancestors only;
* policy: as the sequence's KV policy computes it.

Entries of pages that stand for n tokens have log(n) added to their scores. A backend (`serve.backends`) says whether
it can carry out a plan, and does. Parts of a plan are made when they are first asked for.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from modicum.model.attention import AttentionPattern
from modicum.serve.drafters import layout
from modicum.serve.kv import KVPolicy
from modicum.serve.pages import Storage
from modicum.serve.recent import Recent
from modicum.serve.table import BlockTable
from modicum.serve.work import Work, arrange, by_policy

FRESH, BLOCKS, PAGES = "fresh", "blocks", "pages"


def visible(at: Tensor, position: Tensor, window: int | None, pattern: AttentionPattern | None = None) -> Tensor:
    """Whether a query at position `at` sees an entry at `position`; the two broadcast."""
    seen = position <= at
    if window is not None:
        seen = seen & (position > at - window)
    return seen if pattern is None else seen & pattern.allowed(at, position)


@dataclass(slots=True)
class Segment:
    """Rows first .. last - 1 of the step: B sequences with T rows each."""

    works: list[Work]
    source: str
    policy: KVPolicy | None = None  # that attends in its own way

    @property
    def first(self) -> int:
        return self.works[0].at

    @property
    def last(self) -> int:
        return self.works[-1].at + self.works[-1].n

    @property
    def rows(self) -> int:
        """T."""
        return self.works[0].n

    @property
    def tree(self) -> bool:
        return self.works[0].tree is not None

    @property
    def starts_B(self) -> np.ndarray:
        return np.array([w.start for w in self.works])

    @property
    def at_BT(self) -> np.ndarray:
        """Positions of the queries; those of drafted tokens are those of their depths."""
        if self.tree:
            return np.stack([w.start + layout(w.tree).depth_X for w in self.works if w.tree is not None])
        return self.starts_B[:, None] + np.arange(self.rows)


@dataclass(slots=True)
class Watched:
    """Tokens of a step that a sequence's policy looks at."""

    work: Work
    positions: range  # in the sequence

    @property
    def rows(self) -> slice:
        """In the step."""
        first = self.work.at + self.positions.start - self.work.start
        return slice(first, first + len(self.positions))


class AttentionPlan:
    """Of a step's `works` in row order (see `work.arrange`). `watch`: policies see queries and weights. `more_rows`:
    logits of other rows than the step's may be wanted after it."""

    def __init__(
        self,
        works: Sequence[Work],
        storage: Storage,
        table: BlockTable,
        watch: bool = False,
        recent: Recent | None = None,
        more_rows: bool = True,
    ):
        self.more_rows = more_rows
        self.works, self.storage, self.table, self.recent = works, storage, table, recent
        self.observed: list[Watched] = []
        self.marked: list[Watched] = []
        for w in works if watch else ():
            if w.sample.policy.observes and (positions := w.sample.policy.observed(w.start, w.n)):
                self.observed.append(Watched(w, positions))
            if w.sample.policy.marks and (positions := w.sample.policy.marked(w.start, w.n)):
                self.marked.append(Watched(w, positions))
        self.trees = [w for w in works if w.tree is not None]
        self.evicted = [w for w in works if w.sample.pages is not None]
        self.own = [w for w in works if by_policy(w)]
        self.faults: dict[int, Exception] = {}  # by sequence, of policies that failed while they observed

    def show(
        self, layer: int, tokens: Callable[[Watched], Sequence[Tensor]], mass: Callable[[Watched], Tensor]
    ) -> None:
        """Give policies what they look at in a layer: q, k, v (heads, T, E) of observed tokens by `tokens`, mass_GS of
        marked ones by `mass`. A policy that fails ends its own request."""
        for watched, marks in ((self.observed, False), (self.marked, True)):
            for one in watched:
                sample = one.work.sample
                if sample.id in self.faults:
                    continue
                try:
                    if marks:
                        sample.policy.mark(layer, mass(one))
                    else:
                        sample.policy.observe(layer, one.positions.start, *tokens(one))
                except Exception as error:
                    self.faults[sample.id] = error

    @property
    def watched(self) -> bool:
        return bool(self.observed or self.marked)

    def of_rows(self, rows: Sequence[int]) -> AttentionPlan | None:
        """The plan of these rows alone, the last ones of their sequences, once all keys are in the cache. None where
        more has to be computed (rows that are watched, adapted, drafted or evicted from), or where the cache loses
        something that a step's own rows do not."""
        if (
            not self.storage.plain
            or self.more_rows
            or self.watched
            or self.adapted
            or self.trees
            or self.evicted
            or self.own
        ):
            return None
        last = {w.at + w.n - 1: w for w in self.works}
        if len(rows) == sum(w.n for w in self.works) or not set(rows) <= set(last):
            return None
        some = [Work(last[row].sample, last[row].start + last[row].n - 1, 1) for row in rows]
        return AttentionPlan(arrange(some), self.storage, self.table)

    @property
    def depth(self) -> int:
        """Of the deepest drafted token."""
        return max((layout(w.tree).line_XD.shape[1] for w in self.trees if w.tree is not None), default=0)

    @functools.cached_property
    def adapted(self) -> bool:
        """Whether rows go through adapters."""
        return any(w.sample.request.adapter is not None for w in self.works)

    @functools.cached_property
    def segments(self) -> list[Segment]:
        plain = [w for w in self.works if not by_policy(w)]
        single = [w for w in plain if w.n == 1 and w.tree is None]
        result = [Segment(some, BLOCKS) for some in self._alike([w for w in single if w.sample.pages is None])]
        result += [
            Segment(list(some), PAGES) for some in _neighbours([w for w in single if w.sample.pages is not None])
        ]
        result += [Segment(some, BLOCKS) for some in self._alike([w for w in plain if w.tree is not None])]
        for w in plain:
            if w.n > 1 and w.tree is None:
                source = PAGES if w.sample.pages is not None else BLOCKS if w.start else FRESH
                result.append(Segment([w], source))
        for w in self.own:  # single tokens on whole caches are rare, and computed one by one
            if w.n > 1 or w.sample.pages is None:
                result.append(Segment([w], PAGES if w.sample.pages is not None else BLOCKS, w.sample.policy))
        shared = [w for w in self.own if w.n == 1 and w.sample.pages is not None]
        for _, group in itertools.groupby(shared, lambda w: id(w.sample.policy)):
            result += [Segment(some, PAGES, some[0].sample.policy) for some in _neighbours(list(group))]
        return result

    def _alike(self, works: Sequence[Work]) -> list[list[Work]]:
        """Neighbours of one number of rows, whose numbers of blocks are within a factor of two, or eight blocks."""
        groups: list[list[Work]] = []
        limit = -1
        for w in works:
            blocks = w.start // self.storage.block_size + 1
            if not groups or groups[-1][0].n != w.n or blocks > limit:
                groups.append([])
                limit = max(2 * blocks, blocks + 8)
            groups[-1].append(w)
        return groups

    @functools.cached_property
    def rows_T(self) -> np.ndarray:
        """Where each row's key goes in a layer's storage, blocks taken as one row; 0 for those that go to pages."""
        rows_T = np.zeros(sum(w.n for w in self.works), dtype=np.int64)
        for segment in self.segments:
            if segment.source != PAGES:
                slots_B1 = np.array([w.sample.slot for w in segment.works])[:, None]
                offsets_BT = segment.starts_B[:, None] + np.arange(segment.rows)
                rows_T[segment.first : segment.last] = self.table.rows(slots_B1, offsets_BT).ravel()
        return rows_T

    @functools.cached_property
    def rows_LGT(self) -> Tensor | None:
        """The same in the flat storage of all layers and heads, if a sequence of the step has pages; on the CPU."""
        if not self.evicted:
            return None
        s = self.storage
        part_LG1 = torch.arange(s.pages_per_block).view(s.layers, s.heads, 1)
        rows_LGT = part_LG1 * (s.n_blocks * s.block_size) + torch.from_numpy(self.rows_T)
        for w in self.evicted:
            assert w.sample.pages is not None
            rows_LGT[:, :, w.at : w.at + w.n] = s.rows_of_pages(w.sample.pages, w.n)
        return rows_LGT


def _neighbours(works: Sequence[Work]) -> list[list[Work]]:
    """Runs without a gap in the step's row."""
    groups: list[list[Work]] = []
    for w in works:
        if not groups or groups[-1][-1].at + groups[-1][-1].n != w.at:
            groups.append([])
        groups[-1].append(w)
    return groups
