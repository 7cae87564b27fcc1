"""port kv: which entries of a sequence's cache are kept, per layer and KV head.

A policy only says what to keep; the engine moves it to pages of its own and gives the rest back. Three rungs:

* `ScorePolicy`: a score for each entry of the prompt (one function; `knorm` is the smallest method).
* `SelectPolicy`: which entries stay, within a budget that the base class does the arithmetic of.
* `KVPolicy`: the full protocol, with budgets, merged entries and an attention of its own.

Shapes: H query heads, G KV heads, R = H / G, T tokens of this step, W last tokens of the prompt, S cached entries,
E head dimension.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from modicum.core.errors import UserError
from modicum.core.registry import Method

if TYPE_CHECKING:
    from modicum.model.decoder import Decoder

BASELINE = "full"


@dataclass(frozen=True, kw_only=True)
class CacheShape:
    """What a policy may know of the model and the cache when it is made."""

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    block_size: int
    windows: tuple[int | None, ...]  # per layer: keys a query sees, itself included; None: all
    scales: tuple[float, ...] = ()  # per layer: what multiplies q k; empty: head_dim ** -0.5
    softcap: float | None = None

    def scores(self, layer: int, q_XTE: Tensor, k_XSE: Tensor) -> Tensor:
        """Attention scores (X, T, S) in float32 before any mask, as the model computes them."""
        scale = self.scales[layer] if self.scales else self.head_dim**-0.5
        scores_XTS = q_XTE.float() @ k_XSE.float().transpose(-1, -2) * scale
        return scores_XTS if self.softcap is None else self.softcap * torch.tanh(scores_XTS / self.softcap)


def entries_of(budget: float, tokens: int) -> int:
    """A budget as a number of entries: up to 1 it is a share of `tokens`, above 1 it is that number."""
    return max(1, round(budget * tokens)) if budget <= 1 else int(budget)


def check_budget(method: str, budget: float) -> None:
    """Raise `UserError` for a budget that is neither a share nor a number of entries."""
    if budget <= 0 or (budget > 1 and budget != int(budget)):
        raise UserError(
            f"{method}: budget={budget:g} must be a fraction above 0 and at most 1 (0.3), or a whole number of "
            "entries above 1 (1024)"
        )


@dataclass(frozen=True, slots=True)
class Entries:
    """What one layer holds of a sequence. Heads may hold different numbers: the rest of S is padding."""

    k_GSE: Tensor
    v_GSE: Tensor
    position_GS: Tensor  # int64: place of each entry in the sequence
    counts: Sequence[int]  # entries per KV head
    weight_GS: Tensor | None = None  # float32: tokens that each entry stands for; None: one each


@dataclass(frozen=True, slots=True)
class Merged:
    """M entries in the place of dropped ones. One that stands for n tokens has log(n) added to its scores."""

    k_ME: Tensor
    v_ME: Tensor
    position_M: Tensor
    weight_M: Tensor


@dataclass(frozen=True, slots=True)
class Keep:
    """Per KV head the entries that stay: ascending indices (int64) into its S entries.

    `merged`, if given, holds for each head the new entries that are put before those, or None. `replaced` holds for
    each head (k_CE, v_CE) of its C kept entries, in their order, that are stored instead of what they were, or None;
    they go on standing for as many tokens as before.
    """

    heads: Sequence[Tensor]
    merged: Sequence[Merged | None] | None = None
    replaced: Sequence[tuple[Tensor, Tensor] | None] | None = None


class KVPolicy(Method):
    """Base of the methods, constructed once per engine as `cls(config, shape)`.

    A method that does not work with `prefix_cache`, `chunked_prefill`, `sliding_window` (layers that have one) or `gqa`
    names it in `conflicts`. `observes`: whether `observe` is to be called, with the tokens that `observed` names.
    `marks`: whether `mark` is to be called, with the attention weights of the queries that `marked` names: their "sum"
    or their "max". A step with such tokens stays with the backend that it would have without.
    `drops`: whether `keep` may leave anything out; False spares the question. `tail`: tokens at the end
    of a prompt that a sequence computes itself even where the prefix cache has them, to be observed.
    `attends`: whether sequences of more than `exact` tokens attend by the policy's own `attend`.
    `unbounded`: rotary positions may go past the model's context length (the policy sees to distances).
    """

    observes: ClassVar[bool] = False
    marks: ClassVar[str] = ""
    attends: ClassVar[bool] = False
    exact: int = 0
    drops: ClassVar[bool] = True
    unbounded: ClassVar[bool] = False
    tail: int = 1

    def __init__(self, config: Any, shape: CacheShape):
        self.config, self.shape = config, shape

    def begin(self, prompt: int) -> KVPolicy:
        """The policy of one sequence whose prompt has `prompt` tokens, with state of its own.

        One that `attends` and keeps no state of a sequence returns itself: sequences with the same object are
        attended together, others one by one.
        """
        return copy.copy(self)

    def prepare(self, model: Decoder, probe: Sequence[int] = ()) -> None:
        """Called once, before any sequence begins: look at the model, measure its heads, if wanted on these tokens."""

    def allow(self, layer: int, n_tokens: int) -> int | Sequence[int]:
        """Most entries each KV head of `layer` may hold when `n_tokens` have been computed (or one each).

        The engine asks for `keep` at the end of the prompt, and then whenever a block more than this
        is held. A policy that must see the whole prompt first allows everything before its end.
        """
        raise NotImplementedError

    def observed(self, start: int, n: int) -> range:
        """Which of the positions `start` .. `start + n - 1` that a step computes are to be observed; often none."""
        return range(start, start + n)

    def observe(self, layer: int, start: int, q_HTE: Tensor, k_GTE: Tensor, v_GTE: Tensor) -> None:
        """Queries, keys and values of the observed tokens from place `start` on, after position encoding."""

    def marked(self, start: int, n: int) -> range:
        """Which of the positions `start` .. `start + n - 1` that a step computes have queries whose weights count."""
        return range(start, start + n)

    def mark(self, layer: int, mass_GS: Tensor) -> None:
        """Attention that each entry received from this step's marked queries, float32: softmax weights, summed over the
        queries and averaged over the query heads of a KV head, or the largest of both. S entries in the order of
        `Entries`, the new tokens' last."""

    def keep(self, layer: int, entries: Entries) -> Keep:
        """What stays of `entries`; at most `allow` of them per head."""
        raise NotImplementedError

    def attend(
        self,
        layer: int,
        q_GBRTE: Tensor,
        k_GBSE: Tensor,
        v_GBSE: Tensor,
        at_BT: Tensor,
        position_GBS: Tensor,
        kept_GBS: Tensor,
        *,
        scale: float,
        softcap: float | None,
    ) -> Tensor:
        """out_GBRTE of B sequences that share this policy, with T queries each, at places `at_BT`, over what they hold.

        R query heads share a KV head; entries have their places and whether they are held (not padding).
        """
        raise NotImplementedError

    def allowed(self, layer: int, n_tokens: int) -> list[int]:
        """`allow` as one number for each KV head."""
        most = self.allow(layer, n_tokens)
        return [most] * self.shape.kv_heads if isinstance(most, int) else list(most)


class SelectPolicy(KVPolicy):
    """Second rung: a method says in `keep` which entries stay; how many follows from its knob `budget`.

    The prompt is compressed once, right after it has been computed, and all that is generated stays. Where `bounded`
    is set generated tokens count too: the cache never exceeds the budget.
    """

    bounded: ClassVar[bool] = False
    prompt: int = 0

    def begin(self, prompt: int) -> KVPolicy:
        policy = copy.copy(self)
        policy.prompt = prompt
        return policy

    def capacity(self, layer: int) -> int:
        """Entries of the prompt that each head of `layer` keeps."""
        return min(self.prompt, entries_of(self.config.budget, self.prompt))

    def allow(self, layer: int, n_tokens: int) -> int:
        if n_tokens < self.prompt:
            return n_tokens
        if self.bounded:
            return min(n_tokens, entries_of(self.config.budget, n_tokens))
        return self.capacity(layer) + n_tokens - self.prompt


class ScorePolicy(SelectPolicy):
    """Top rung: a method gives each entry of the prompt a score; each head keeps its `capacity` best.

    A method that sets `observes` has a knob `window`: `score` is given the queries of that many last prompt tokens.
    """

    window: int = 0
    queries: dict[int, Tensor]  # layer -> (H, up to window, E)

    def __init__(self, config: Any, shape: CacheShape):
        super().__init__(config, shape)
        if self.observes:
            self.window = self.tail = config.window

    def begin(self, prompt: int) -> KVPolicy:
        policy = super().begin(prompt)
        assert isinstance(policy, ScorePolicy)
        policy.window, policy.queries = min(self.window, prompt), {}
        return policy

    def score(self, layer: int, q_HWE: Tensor, k_GSE: Tensor, v_GSE: Tensor) -> Tensor:
        """scores_GS of the prompt's entries (inf: stays) from their keys and values and the window's queries (W = 0
        without one), all after position encoding. Scores may be given for the first entries only: the others stay."""
        raise NotImplementedError

    def observed(self, start: int, n: int) -> range:
        positions = range(max(start, self.prompt - self.window), min(start + n, self.prompt))
        drops = positions and any(self.capacity(layer) < self.prompt for layer in range(self.shape.layers))
        return positions if drops else range(0)

    def observe(self, layer: int, start: int, q_HTE: Tensor, k_GTE: Tensor, v_GTE: Tensor) -> None:
        if start > self.prompt - self.window:
            q_HTE = torch.cat([self.queries[layer], q_HTE], dim=1)
        self.queries[layer] = q_HTE.clone()  # not a view that would hold the whole step

    def keep(self, layer: int, entries: Entries) -> Keep:
        k_GSE, v_GSE = entries.k_GSE[:, : self.prompt], entries.v_GSE[:, : self.prompt]
        q_HWE = self.queries.pop(layer) if self.observes else k_GSE.new_empty(self.shape.heads, 0, k_GSE.shape[-1])
        scores_GS = self.score(layer, q_HWE, k_GSE, v_GSE)
        scored = scores_GS.shape[1]
        best = max(0, self.capacity(layer) - (self.prompt - scored))
        top_GC = scores_GS.topk(best).indices.sort(dim=-1).values
        rest_GS = torch.arange(scored, entries.counts[0], device=top_GC.device).expand(len(top_GC), -1)
        return Keep(list(torch.cat([top_GC, rest_GS], dim=1)))
