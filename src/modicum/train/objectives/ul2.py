"""ul2: fill in what was taken out of the text, in seven ways, each announced by a mode token.

Every row is denoised by one of seven denoisers, drawn at random. Span corruption takes out `rate` of the
tokens in spans of mean length `mu`, each replaced by a sentinel of its own; the targets are the sentinels in order,
each followed by what it stands for, and a last one as the end. The sequential denoiser takes out the end of the row.

    row    = mode, inputs, targets                             attention: inputs see all inputs, targets all before
    R      : mu 3, rate .15;  mu 8, rate .15                   regular, as T5
    X      : mu 3, rate .5;  mu 8, rate .5;  mu 64, rate .15;  mu 64, rate .5      extreme: long spans or many
    S      : one span to the row's end, of mean length L / 4   prefix language modelling
    loss   = - sum over the target tokens of log p(token | inputs, targets before it)

Span lengths are uniform over all ways to cut the tokens taken out into as many parts as there are spans, and
those left into one more, so that something known stands on both sides of each span. Sentinels are the last
`sentinels` ids of the vocabulary counted downwards, as in T5, and below them stand the mode tokens R, S, X. They
must be ids that no text uses: those that curation reserved (`--reserved 103`), or the unused end of a given model's
vocabulary. `take_last=true` takes the last words of the vocabulary all the same.

Tay et al. 2022, arXiv:2205.05131, section 3 and table 1; Raffel et al. 2020, arXiv:1910.10683, section 3.1.4, for
the spans. Departs from the papers: T5's code ends every row with a span, which would make a single long one a second
S; a row keeps its length, so that what sentinels take up is cut from the row (at a random end) and is not learnt
in that pass; targets end with a sentinel instead of an end-of-text; where a packing keeps documents apart, attention
does so too.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from modicum.core.errors import UserError
from modicum.data.stream import NO_LOSS
from modicum.train.objectives import Loss, Objective, Step

# Shapes: B sequences, T tokens, L tokens of the row that are used, N of them taken out, in n spans.
MODES = ("R", "S", "X")
DENOISERS: tuple[tuple[str, float, float], ...] = (  # mode, mean length of a span, share taken out; table 1
    ("R", 3.0, 0.15),
    ("R", 8.0, 0.15),
    ("S", 0.0, 0.25),
    ("X", 3.0, 0.5),
    ("X", 8.0, 0.5),
    ("X", 64.0, 0.15),
    ("X", 64.0, 0.5),
)
CLAIM = {
    "figure": "better than GPT- and T5-like objectives over nine tasks, as a decoder too",
    "where": "tables 2 to 5",
    "scale": "167M to 1B parameters, 32B tokens",
}


@dataclass(frozen=True, kw_only=True)
class Config:
    sentinels: int = 100  # T5's number; a row of length T needs about T / 8 of them
    rates: tuple[float, ...] = (1.0,) * 7  # how often each denoiser: R3, R8, S, X3, X8, X64 at 15%, X64 at 50%
    take_last: bool = False  # take the vocabulary's last ids although text may use them
    logits_bytes: int | None = None  # bound on the float32 logits that exist at once; None: what runs fast

    def __post_init__(self) -> None:
        if self.sentinels < 2:
            raise ValueError(f"sentinels={self.sentinels} must be at least 2: one for a span, one for the end")
        if len(self.rates) != len(DENOISERS) or min(self.rates) < 0 or not 0 < sum(self.rates) < float("inf"):
            raise ValueError(f"rates={list(self.rates)} must be seven numbers of at least 0, not all of them 0")
        if self.logits_bytes is not None and self.logits_bytes < 1:
            raise ValueError(f"logits_bytes={self.logits_bytes} must be positive")


TOY = Config(sentinels=8)


class Plan(NamedTuple):
    """Sizes of one denoiser in rows of length T: tokens used, taken out (S: at most), spans."""

    length: int
    noise: int
    spans: int


@functools.lru_cache(maxsize=64)
def plan(mu: float, rate: float, length: int) -> Plan:
    """The most tokens of which mode, inputs and targets with their sentinels fit into `length` + 1."""
    if mu == 0:
        return Plan(length, max(1, length // 2 - 1), 0)
    for used in range(length, 2, -1):
        noise = min(max(round(used * rate), 1), used - 2)
        spans = min(max(round(noise / mu), 1), noise, used - noise - 1)
        if spans > 0 and used + 2 * spans + 2 <= length + 1:
            return Plan(used, noise, spans)
    raise UserError(f"objective 'ul2' needs rows of at least 6 tokens, got {length}; ask for a longer sequence_length")


class PrefixAttend:
    """Keys among a row's first `prefix_B` are seen by all of its queries, later ones by none before them.

    `documents_BT`: nobody sees another number than its own, except for number `SHARED`. Sliding windows hold.
    """

    SHARED = -2

    def __init__(self, prefix_B: Tensor, documents_BT: Tensor | None):
        self.prefix_B, self.documents_BT = prefix_B, documents_BT
        self._masks: dict[int | None, Tensor] = {}

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
        pattern: Any = None,
    ) -> Tensor:
        from modicum.model.attend import attention

        if pattern is not None:
            raise UserError(
                "objective 'ul2' reads prefixes in both directions, and an attention pattern says only what is seen "
                "before a token; choose attention=causal or sliding:window=N, or another objective"
            )
        if window not in self._masks:
            self._masks[window] = self._mask(q_BHTE, window)
        return attention(q_BHTE, k_BGSE, v_BGSE, scale=scale, softcap=softcap, mask=self._masks[window])

    def _mask(self, like: Tensor, window: int | None) -> Tensor:
        at_T = torch.arange(like.shape[2], device=like.device)
        seen_BTT = (at_T[None, :] <= at_T[:, None]) | (at_T < self.prefix_B[:, None])[:, None, :]
        if window is not None:
            seen_BTT = seen_BTT & (at_T[:, None] - at_T[None, :] < window)
        if (documents := self.documents_BT) is not None:
            same = documents[:, :, None] == documents[:, None, :]
            seen_BTT = seen_BTT & (same | (documents == self.SHARED)[:, None, :])
        mask = torch.zeros(seen_BTT.shape, dtype=like.dtype, device=like.device)
        return mask.masked_fill_(~seen_BTT, float("-inf"))[:, None]


class Corrupted(NamedTuple):
    """What a decoder gets: targets_BT are NO_LOSS but for the target part; prefix_B: mode and inputs."""

    tokens_BT: Tensor
    targets_BT: Tensor
    documents_BT: Tensor | None
    prefix_B: Tensor


class UL2(Objective):
    requires = frozenset({"reserved_tokens"})
    config: Config
    random = True

    @property
    def marks(self) -> int:
        """Sentinels and mode tokens: so many ids at the vocabulary's end."""
        return self.config.sentinels + len(MODES)

    def reserved(self) -> int:
        return 0 if self.config.take_last else self.marks

    def start(self, trainer: Any) -> None:
        needed, shape = self.reserved(), getattr(trainer.model, "config", None)
        self.plans(trainer.config.sequence_length)
        stream = getattr(trainer, "stream", None)
        if stream is None:  # a forecast
            return
        free = getattr(stream, "reserved", 0)
        data = getattr(getattr(stream, "documents", None), "vocab_size", None)
        if data is not None and shape is not None:
            free += max(shape.vocab_size - data, 0)  # a model's vocabulary may be longer than its tokenizer's
        if free < needed:
            raise UserError(
                f"objective 'ul2' needs {needed} ids at the vocabulary's end that no text uses and finds {free}: "
                f"curate with --reserved {needed} (in a recipe curate.reserved: {needed}), or give "
                "ul2:take_last=true to take the last words themselves"
            )

    def plans(self, length: int) -> list[Plan]:
        """Sizes of the seven denoisers in rows of `length`. Raises `UserError` if the sentinels do not suffice."""
        made = [plan(mu, rate, length) for _, mu, rate in DENOISERS]
        used = max(p.spans for p, rate in zip(made, self.config.rates, strict=True) if rate > 0) + 1
        if used > self.config.sentinels:
            raise UserError(
                f"objective 'ul2' makes up to {used} sentinels in rows of {length} tokens and has "
                f"sentinels={self.config.sentinels}; give ul2:sentinels={used}, or a shorter sequence_length"
            )
        return made

    def loss(self, model: nn.Module, batch: Any, step: Step) -> Loss:
        from modicum.train.loss import cross_entropy

        decoder: Any = model
        if not (hasattr(model, "hidden") and hasattr(model, "head")):
            raise UserError("objective 'ul2' needs a decoder whose attention can be told; choose next-token")
        made = self.corrupt(batch, decoder.config.vocab_size, step)
        attend = PrefixAttend(made.prefix_B, made.documents_BT)
        T = made.tokens_BT.shape[1]
        positions_BT = torch.arange(T, device=made.tokens_BT.device)[None]
        h_BTD = decoder.hidden(made.tokens_BT, positions_BT=positions_BT.expand_as(made.tokens_BT), attend=attend)
        # Targets stand together, from the last of the inputs on: only they need logits. M places hold the longest.
        M = max(p.noise + p.spans + 1 for p, rate in zip(self.plans(T), self.config.rates, strict=True) if rate > 0)
        at_BM = (made.prefix_B[:, None] - 1 + torch.arange(M, device=h_BTD.device)).clamp_max(T)
        labels_BM = torch.cat([made.targets_BT, torch.full_like(made.targets_BT[:, :1], NO_LOSS)], 1).gather(1, at_BM)
        h_BMD = h_BTD.gather(1, at_BM.clamp_max(T - 1)[:, :, None].expand(-1, -1, h_BTD.shape[2]))
        total, count = cross_entropy(h_BMD, labels_BM, decoder.head, self.config.logits_bytes)
        return Loss(total, count)

    def corrupt(self, batch: Any, vocab_size: int, step: Step) -> Corrupted:
        """One denoiser's version of each row; all randomness from (seed, step, process, micro-batch)."""
        tokens_BT, device = batch.tokens_BT, batch.tokens_BT.device
        B, T = tokens_BT.shape
        if self.marks >= vocab_size:
            raise UserError(
                f"objective 'ul2' needs {self.marks} ids for its marks and the vocabulary has "
                f"{vocab_size}; give fewer sentinels (ul2:sentinels=...)"
            )
        entropy = np.random.SeedSequence((step.seed, step.index, step.rank, step.micro))
        draw = torch.Generator().manual_seed(int(entropy.generate_state(1, np.uint64)[0] >> np.uint64(1)))

        def uniform(*shape: int) -> Tensor:
            return torch.rand(shape, generator=draw).to(device)

        edges = torch.tensor(self.config.rates, device=device).cumsum(0)
        kind_B = torch.bucketize(uniform(B) * edges[-1], edges[:-1], right=True)
        sizes = torch.tensor(self.plans(T), device=device)[kind_B]
        used_B, noise_B, spans_B = sizes.unbind(1)
        sequential_B = spans_B == 0
        # The sequential denoiser's target has a uniform length of mean L / 4.
        noise_B = torch.where(sequential_B, 1 + (uniform(B) * noise_B).long(), noise_B)
        offset_B = (uniform(B) * (T - used_B + 1)).long()

        at_T = torch.arange(T, device=device)[None]
        inside_BT = at_T < used_B[:, None]
        kept_B = used_B - noise_B
        taken_BT = spread(noise_B, kept_B, spans_B, uniform(B, T), uniform(B, T))
        taken_BT = torch.where(sequential_B[:, None], at_T >= kept_B[:, None], taken_BT) & inside_BT
        opens_BT = taken_BT & ~shifted(taken_BT) & ~sequential_B[:, None]

        # Where each used token, and each span's two sentinels, stand in mode + inputs + targets (T + 1 places).
        span_BT = opens_BT.cumsum(1)  # spans begun up to here, this one included
        takens_BT = taken_BT.cumsum(1) - taken_BT.long()  # tokens taken out before here
        lefts_BT = at_T - takens_BT
        prefix_B = 1 + kept_B + spans_B
        target_BT = torch.where(taken_BT, prefix_B[:, None] + takens_BT + span_BT, 1 + lefts_BT + span_BT)
        off = T + 1  # a column for what is not there
        target_BT = torch.where(inside_BT, target_BT, off)
        question_BT = torch.where(opens_BT, 1 + lefts_BT + span_BT - 1, off)
        answer_BT = torch.where(opens_BT, prefix_B[:, None] + takens_BT + span_BT - 1, off)
        last_B = torch.where(sequential_B, off, prefix_B + noise_B + spans_B)

        source_BT = (offset_B[:, None] + at_T).clamp_max(T - 1)
        label_BT = shifted(batch.targets_BT, NO_LOSS).gather(1, source_BT)  # the token, where it is to be learnt
        learnt_BT = label_BT != NO_LOSS
        mark_BT = vocab_size - span_BT  # the first span's sentinel is the last id
        mode_B = torch.tensor([MODES.index(mode) for mode, _, _ in DENOISERS], device=device)[kind_B]
        mode_B = vocab_size - self.marks + mode_B
        end_B = vocab_size - 1 - spans_B

        def laid(fill: int, token: Tensor, question: Tensor, answer: Tensor, end: Tensor) -> Tensor:
            row = torch.full((B, T + 2), fill, dtype=torch.int64, device=device)
            row.scatter_(1, target_BT, token).scatter_(1, question_BT, question).scatter_(1, answer_BT, answer)
            return row.scatter_(1, last_B[:, None], end[:, None])[:, : T + 1]

        full = laid(0, tokens_BT.gather(1, source_BT), mark_BT, mark_BT, end_B)
        full[:, 0] = mode_B
        none_BT = torch.full_like(label_BT, NO_LOSS)
        labels = laid(
            NO_LOSS,
            torch.where(taken_BT, label_BT, NO_LOSS),
            none_BT,
            torch.where(learnt_BT, mark_BT, NO_LOSS),
            torch.where((learnt_BT & taken_BT).any(1), end_B, NO_LOSS),
        )
        documents = None
        if batch.documents_BT is not None:
            own_BT = batch.documents_BT.gather(1, source_BT)
            ends_B = own_BT.gather(1, (used_B - 1)[:, None])[:, 0]
            documents = laid(-1, own_BT, own_BT, own_BT, ends_B)[:, :-1]
            documents[:, 0] = PrefixAttend.SHARED
        return Corrupted(full[:, :-1], labels[:, 1:], documents, prefix_B)


def shifted(x_BT: Tensor, fill: int = 0) -> Tensor:
    """x one place later, `fill` first."""
    return torch.cat([torch.full_like(x_BT[:, :1], fill), x_BT[:, :-1]], 1)


def cut(items_B: Tensor, parts_B: Tensor, draw_BT: Tensor) -> Tensor:
    """Part number (from 0) of each of `items_B` items, cut into `parts_B` parts, all ways equally likely. BT."""
    at_T = torch.arange(draw_BT.shape[1], device=draw_BT.device)[None]
    gap_BT = (at_T >= 1) & (at_T < items_B[:, None])  # a part may begin at any item but the first
    order_BT = torch.where(gap_BT, draw_BT, 2.0).argsort(1).argsort(1)
    return (gap_BT & (order_BT < parts_B[:, None] - 1)).cumsum(1)


def spread(noise_B: Tensor, kept_B: Tensor, spans_B: Tensor, first_BT: Tensor, second_BT: Tensor) -> Tensor:
    """bool BT: `noise_B` places in `spans_B` spans among `noise_B + kept_B`, which begin and end with kept ones."""
    B, T = first_BT.shape
    at_T = torch.arange(T, device=first_BT.device)[None]
    part_BT = cut(noise_B, spans_B, first_BT)
    kept_part_BT = cut(kept_B, spans_B + 1, second_BT)
    sizes_BT = torch.zeros_like(part_BT).scatter_add_(1, kept_part_BT, (at_T < kept_B[:, None]).long())
    target_BT = at_T + sizes_BT.cumsum(1).gather(1, part_BT)  # after the kept parts up to its own
    target_BT = torch.where(at_T < noise_B[:, None], target_BT, T).clamp_max(T)
    mask = torch.zeros(B, T + 1, dtype=torch.bool, device=first_BT.device)
    return mask.scatter_(1, target_BT, True)[:, :T]
