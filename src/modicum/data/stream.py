"""The order in which documents are trained on, and the batches made of them.

    per domain and epoch    a seeded permutation of its documents; of those longer than a stretch, of their
                            stretches, so that one long document does not fill batch after batch;
                            or (order="quality") ascending by the documents' scores
    between domains         always the domain furthest behind its share of the mixture
    within a row            the packing; where `metadata` asks for it, each piece after its document's metadata

The state is what was consumed, not who consumed it: next_batch gives the global batch and each process
takes its rows, so a run goes on in the same order on any number of processes. A new mixture changes
which domain comes next and nothing within a domain, so nothing is lost or repeated.

Shapes: B sequences, T = sequence_length.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from modicum.core import registry
from modicum.core.errors import UserError, unknown
from modicum.data.packings import Packing, Piece
from modicum.data.shards import Documents

NO_LOSS = -100
ORDERS = ("shuffled", "quality", "stored")
NOTHING = np.zeros(0, np.int64)
GRADE = 256  # stretches of one grade of quality


class EndOfData(UserError):
    """A stream with a number of epochs has given everything it has."""


@dataclass(frozen=True)
class Batch:
    """tokens_BT int64; targets_BT int64, NO_LOSS where nothing is learnt; positions_BT int64.

    documents_BT int64: attention stays among equal numbers, -1 is padding. None where attention may
    cross documents (plain causal attention is then right and faster; padding stands last in its row).
    """

    tokens_BT: torch.Tensor
    targets_BT: torch.Tensor
    documents_BT: torch.Tensor | None
    positions_BT: torch.Tensor

    def __len__(self) -> int:
        return self.tokens_BT.shape[0]

    @property
    def n_targets(self) -> int:
        return int((self.targets_BT != NO_LOSS).sum())

    def _map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        documents_BT = None if self.documents_BT is None else change(self.documents_BT)
        return Batch(change(self.tokens_BT), change(self.targets_BT), documents_BT, change(self.positions_BT))

    def rows(self, rank: int, world: int) -> Batch:
        """Rows rank, rank + world, ...: one process's part."""
        return self._map(lambda x: x[rank::world])

    def slice(self, start: int, stop: int) -> Batch:
        """Rows start ... stop-1: one micro-batch."""
        return self._map(lambda x: x[start:stop])

    def to(self, device: Any, non_blocking: bool = False) -> Batch:
        return self._map(lambda x: x.to(device, non_blocking=non_blocking))


@dataclass
class _Domain:
    """One domain's place: `drawn` stretches of epoch `epoch`; `served` predictions put into batches.

    lengths: predictions of each document; ends: how many stretches it and those before it have.
    """

    name: str
    lengths: np.ndarray
    ends: np.ndarray
    epoch: int = 0
    drawn: int = 0
    served: int = 0
    credit: float = 0.0
    order: np.ndarray | None = None
    scores: np.ndarray | None = None  # of its documents

    @property
    def stretches(self) -> int:
        return int(self.ends[-1])

    def piece(self, number: int, stretch: int) -> Piece:
        document = int(np.searchsorted(self.ends, number, side="right"))
        start = (number - (int(self.ends[document - 1]) if document else 0)) * stretch
        return Piece(self.name, document, start, min(stretch, int(self.lengths[document]) - start))


class Stream:
    """Deterministic batches of `sequence_length` tokens from shards.

    mixture, packing: choices (`"fixed:weights={prose: 3}"`). epochs: None to go on for ever.
    total: predictions the run will make, for what changes over the run.
    stretch: most predictions of one document in a row of the order (default: sequence_length).
    order: "shuffled", "stored" (as is; also shuffle=False), or "quality": within each domain ascending by the
    documents' scores, those without one first, in grades of some hundred stretches (16 at least) and shuffled
    within each, so that one document does not fill batch after batch. An epoch that the run will not finish (by
    `total` and the mixture's first weights) ascends over a random part of it as long as what will be read.
    metadata: for this share of the run's tokens (`total`), each piece of a document in a row comes after the
    document's metadata, which carries no loss and takes places in the row; what it displaces comes in the
    next row. At most half a row's worth of it.
    """

    def __init__(
        self,
        shards: Documents,
        mixture: Any = "natural",
        packing: Any = "concat",
        *,
        sequence_length: int,
        seed: int = 0,
        epochs: int | None = None,
        total: float | None = None,
        shuffle: bool = True,
        stretch: int | None = None,
        order: str = "shuffled",
        metadata: float = 0.0,
    ):
        if sequence_length < 1:
            raise UserError(f"sequence_length={sequence_length} must be at least 1")
        if order not in ORDERS:
            raise unknown("order of a stream", order, ORDERS)
        if not 0 <= metadata <= 1:
            raise UserError(f"metadata={metadata} must be a share of the run, from 0 (never) to 1 (always)")
        self.shards, self.sequence_length, self.seed = shards, sequence_length, seed
        self.epochs, self.total, self.metadata = epochs, total, metadata
        self.order = order if shuffle else "stored"
        self.horizon = total  # of the order by quality: a longer run goes on in the order it began with
        self.places = 0  # given in rows so far, padding and metadata included
        self.stretch = stretch or sequence_length
        self.domains: dict[str, _Domain] = {}
        for name in shards.domains:
            lengths = shards.lengths(name) - 1
            if len(lengths) and int(lengths.sum()) > 0:
                self.domains[name] = _Domain(name, lengths, _ends(lengths, self.stretch))
        if not self.domains:
            raise UserError("the data has no tokens to train on; curate more text, or with fewer steps")
        self.sizes = {name: int(d.lengths.sum()) for name, d in self.domains.items()}
        self.mixture = registry.build("mixture", mixture, self.sizes)
        self.packing: Packing = registry.build("packing", packing)
        self.pending: list[Piece] = []
        if metadata > 0 and (total is None or not self.packing.masks_documents or sequence_length < 2):
            raise UserError(
                "metadata before each document needs the run's length (total), rows of two tokens or more, "
                "and documents that do not see each other; choose packing concat:mask=true"
            )
        for name, domain in self.domains.items():  # what is missing is told before the run, not in it
            if self.order == "quality":
                domain.scores = np.nan_to_num(shards.quality(name), nan=-np.inf)
            if metadata > 0:
                shards.metadata(name, 0)

    @property
    def reserved(self) -> int:
        """Ids at the vocabulary's end that no text uses."""
        return self.shards.reserved

    @property
    def epoch_tokens(self) -> int:
        """Predictions in one pass over everything."""
        return sum(self.sizes.values())

    @property
    def done(self) -> int:
        """Predictions put into batches so far."""
        return sum(d.served for d in self.domains.values())

    def _order(self, domain: _Domain) -> np.ndarray:
        """Permutation of the domain's stretches in its present epoch, the same on every machine."""
        if domain.order is None:
            numbers = np.arange(domain.stretches, dtype=np.uint64)
            if self.order != "stored":
                name = f"{self.seed}/{domain.epoch}/{domain.name}".encode()
                key = np.frombuffer(hashlib.blake2b(name, digest_size=8).digest(), "<u8")
                numbers = np.argsort(_mix(numbers ^ key), kind="stable").astype(np.uint64)
            if self.order == "quality":
                numbers = self._ascending(domain, numbers)
            domain.order = numbers.astype(np.uint32) if domain.stretches < 1 << 32 else numbers
        return domain.order

    def _ascending(self, domain: _Domain, numbers: np.ndarray) -> np.ndarray:
        """`numbers` (shuffled) ascending by score; first those that the run will come to, then the others."""
        assert domain.scores is not None
        document = np.searchsorted(domain.ends, numbers, side="right")
        first = domain.ends[document] - -(-np.maximum(domain.lengths[document], 0) // self.stretch)
        length = np.minimum(domain.lengths[document] - (numbers.astype(np.int64) - first) * self.stretch, self.stretch)
        read = len(numbers)
        if self.horizon is not None:
            weights = self.mixture.weights(0, self.horizon)
            share = weights.get(domain.name, 0) / sum(weights.values())
            left = share * self.horizon - domain.epoch * self.sizes[domain.name]
            read = int(np.searchsorted(np.cumsum(length), left)) + 1
        parts = (slice(0, read), slice(read, None))
        return np.concatenate([numbers[p][_graded(domain.scores[document[p]])] for p in parts])

    def _draw(self) -> Piece | None:
        """The next stretch: of the domain with the most credit."""
        weights = self.mixture.weights(sum(d.served for d in self.domains.values()), self.total)
        open_ = [
            d
            for d in self.domains.values()
            if weights.get(d.name, 0) > 0 and (self.epochs is None or d.epoch < self.epochs)
        ]
        if not open_:
            return None
        chosen = max(open_, key=lambda d: d.credit)
        piece = chosen.piece(int(self._order(chosen)[chosen.drawn]), self.stretch)
        chosen.drawn += 1
        if chosen.drawn == chosen.stretches:
            chosen.epoch, chosen.drawn, chosen.order = chosen.epoch + 1, 0, None
        whole = sum(weights[d.name] for d in open_)
        for d in open_:
            d.credit += piece.length * weights[d.name] / whole
        chosen.credit -= piece.length
        return piece

    def next_batch(self, n: int) -> Batch:
        """The next `n` sequences of the global order; fewer at the end, then EndOfData."""
        T = self.sequence_length
        tokens, targets = np.zeros((n, T), np.int64), np.full((n, T), NO_LOSS, np.int64)
        documents, positions = np.full((n, T), -1, np.int64), np.zeros((n, T), np.int64)
        ramp = np.arange(T)
        count = 0
        while count < n:
            row = self.packing.row(self._draw, self.pending, T)
            if not row:
                break
            at = 0
            for k, (lead, piece) in enumerate(self._fitted(row)):
                stored = self.shards.tokens(piece.domain, piece.document)
                begin = at + len(lead)
                stop, end = piece.start + piece.length, begin + piece.length
                tokens[count, begin:end] = stored[piece.start : stop]
                if len(lead):  # where the document begins, its start token stays in front of all
                    opening = int(piece.start == 0)
                    tokens[count, at] = stored[0]
                    tokens[count, at + opening : begin + opening] = lead
                targets[count, begin:end] = stored[piece.start + 1 : stop + 1]
                given = self.shards.loss_start(piece.domain, piece.document) - 1 - piece.start
                if given > 0:
                    targets[count, begin : min(begin + given, end)] = NO_LOSS
                documents[count, at:end] = k
                positions[count, at:end] = ramp[: end - at]
                self.domains[piece.domain].served += piece.length
                at = end
            self.places += T
            count += 1
        if count == 0:
            raise EndOfData(
                f"the data ended after {self.done} tokens ({self.epochs} epochs of "
                f"{self.epoch_tokens}); ask for more epochs, or for fewer tokens"
            )
        masks = self.packing.masks_documents
        if not masks:
            positions[:] = ramp
        made = [torch.from_numpy(x[:count]) for x in (tokens, targets, documents, positions)]
        return Batch(made[0], made[1], made[2] if masks else None, made[3])

    def _fitted(self, row: list[Piece]) -> list[tuple[np.ndarray, Piece]]:
        """Each piece with the metadata that comes before it (none, once that share of the run is over).

        What the row then has no room for goes back to the front of `pending`, and comes next.
        """
        if not self.metadata or self.places >= self.metadata * float(self.total or 0):
            return [(NOTHING, piece) for piece in row]
        room, fitted = self.sequence_length, []
        for k, piece in enumerate(row):
            lead = self.shards.metadata(piece.domain, piece.document)[: self.sequence_length // 2]
            room -= len(lead)
            late = row[k + 1 :]
            if room < piece.length:
                if room > 0:
                    piece, rest = piece.split(room)
                    fitted.append((lead, piece))
                    late = [rest, *late]
                else:
                    late = [piece, *late]
                self.pending[:0] = late
                break
            fitted.append((lead, piece))
            room -= piece.length
        return fitted

    def batches(self, n: int) -> Iterator[Batch]:
        """Batches until the data ends (never, if epochs is None)."""
        while True:
            try:
                batch = self.next_batch(n)
            except EndOfData:
                return
            yield batch

    def state(self) -> dict[str, Any]:
        """JSON-able place: per domain its epoch, stretches drawn in it and tokens consumed in all, and the
        pieces of documents that were drawn and not consumed yet ([domain, document, start, length])."""
        domains = {
            d.name: {
                "epoch": d.epoch,
                "drawn": d.drawn,
                "tokens": d.served,
                "credit": d.credit,
                "of": [len(d.lengths), self.sizes[d.name]],
            }
            for d in self.domains.values()
        }
        return {
            "version": 2,
            "stretch": self.stretch,
            "seed": self.seed,
            "shuffle": self.order != "stored",
            "order": self.order,
            "horizon": self.horizon,
            "places": self.places,
            "domains": domains,
            "pending": [list(p) for p in self.pending],
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from `state`, whose seed and stretch hold. Mixture, packing, sequence length may have changed.

        Raises UserError if the data has: a domain may be new, but none gone or of another size.
        """
        for name, saved in state["domains"].items():
            domain = self.domains.get(name)
            if domain is None or [len(domain.lengths), self.sizes[name]] != list(saved["of"]):
                had = "{} documents, {} tokens".format(*saved["of"])
                have = "is gone" if domain is None else f"has {len(domain.lengths)}, {self.sizes[name]}"
                raise UserError(
                    f"cannot go on: domain {name!r} had {had} and now {have}; "
                    "give the same data, or start a new run folder"
                )
        order = state.get("order", "shuffled" if state["shuffle"] else "stored")
        if (order == "quality") != (self.order == "quality"):
            raise UserError(
                f"cannot go on: the stream was in {order} order and is now asked for {self.order}; "
                "give the same schedule, or start a new run folder"
            )
        self.seed, self.order, self.stretch = state["seed"], order, state["stretch"]
        self.horizon = state.get("horizon", self.horizon)
        self.places = state.get("places", sum(d["tokens"] for d in state["domains"].values()))
        for domain in self.domains.values():
            domain.ends, domain.order = _ends(domain.lengths, self.stretch), None
        for name, saved in state["domains"].items():
            domain = self.domains[name]
            domain.epoch, domain.drawn = saved["epoch"], saved["drawn"]
            domain.served, domain.credit = saved["tokens"], saved["credit"]
        self.pending = [Piece(*p) for p in state["pending"]]


def _ends(lengths: np.ndarray, stretch: int) -> np.ndarray:
    return np.cumsum(-(-np.maximum(lengths, 0) // stretch))


def _graded(scores: np.ndarray) -> np.ndarray:
    """Order by grades of ascending score, each of equal size; within a grade as given."""
    n = len(scores)
    grade = np.empty(n, np.int64)
    grade[np.argsort(scores, kind="stable")] = np.arange(n) * min(max(n // GRADE, 16), n) // max(n, 1)
    return np.argsort(grade, kind="stable")


def _mix(x: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser (Steele et al. 2014): a fixed, fast shuffle key for each number."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
