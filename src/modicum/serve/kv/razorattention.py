"""razorattention: full cache for the heads that retrieve; first and latest entries and one mean for the others.

Which heads retrieve is measured once per model, on random tokens said several times over (or on `kv_probe`, tokens the
engine is given, for models that repeat only what they are asked to): an echo head looks back at the same
token said before, an induction head at the token that followed it then. These heads
keep everything. Every other head keeps the first `sinks` entries and a buffer of the latest ones; what it
drops is averaged into one compensation token, which counts as often as tokens went into it.

    echo[h]      = mean over t said before of sum over earlier s with x[s] = x[t] of a[h, t, s]
    induction[h] = the same with x[s - 1] = x[t]
    k^ = mean of dropped k,   v^ = mean of dropped v,   score of k^ = q k^ + log(number of dropped)
    buffer = max(least, tokens / ratio)

Tang et al. 2024, arXiv:2407.15891, sections 3.2 and 3.3, equations 4 and 5, algorithm 1. Departs: a KV head
scores as its best query head, and the shares are of KV heads; the compensation token goes on taking in what
leaves the buffer while tokens are generated; `budget` sets the buffer from what the whole cache may hold
(retrieval heads then take at most 85 % of it). Layers with a sliding window are not served.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from modicum.core.errors import UserError
from modicum.serve.kv import CacheShape, Entries, Keep, KVPolicy, Merged, check_budget, entries_of

if TYPE_CHECKING:
    from modicum.model.attention import AttentionPattern
    from modicum.model.decoder import Decoder

RETRIEVAL = 0.85  # of a budget: what the heads that retrieve may take
ROWS = 128  # queries whose scores exist at once while heads are measured


@dataclass(frozen=True, kw_only=True)
class Config:
    budget: float = 0  # mean entries of a head, up to 1 a share of the tokens; 0: as `least` and `ratio` say
    induction: float = 0.14  # share of KV heads taken for their induction score
    echo: float = 0.01  # share taken for their echo score
    sinks: int = 4  # first entries that stay
    least: int = 4000  # smallest buffer of latest entries
    ratio: float = 5  # tokens per entry of the buffer, beyond `least`
    probe: int = 2500  # random tokens, said `times` times; at most what the model's context holds
    times: int = 4

    def __post_init__(self) -> None:
        if self.budget:
            check_budget("razorattention", self.budget)
        for name in ("induction", "echo"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"razorattention: {name}={getattr(self, name):g} must be a fraction, from 0 to 1")
        for name, low in (("sinks", 0), ("least", 1), ("ratio", 1), ("probe", 2), ("times", 2)):
            if getattr(self, name) < low:
                raise UserError(f"razorattention: {name}={getattr(self, name):g} must be at least {low}")


TOY = Config(induction=0.25, echo=0.0, sinks=2, least=6, probe=12)
CLAIM = {
    "figure": "over 70% less cache without noticeable loss",
    "where": "abstract",
    "scale": "several families of language models, long-context tasks",
}
SWEEP = {"budget": (0.2,)}


class RazorAttention(KVPolicy):
    config: Config
    conflicts = frozenset({"sliding_window"})
    ranked: Sequence[tuple[int, int]] = ()  # (layer, KV head), those that retrieve most first
    prompt: int = 0

    def prepare(self, model: Decoder, probe: Sequence[int] = ()) -> None:
        echo_LG, induction_LG = scores(model, self.config, probe)
        self.ranked = ranking(echo_LG, induction_LG, self.config)

    def begin(self, prompt: int) -> KVPolicy:
        policy = RazorAttention(self.config, self.shape)
        policy.prompt, heads = prompt, self.shape.layers * self.shape.kv_heads
        full = len(self.ranked)
        if self.config.budget:
            fraction = entries_of(self.config.budget, prompt) / prompt
            full = heads if fraction >= 1 else min(full, int(fraction * heads * RETRIEVAL))
        policy.ranked = self.ranked[:full]
        if full == heads and self.config.budget:
            policy.ranked = [(i, g) for i in range(self.shape.layers) for g in range(self.shape.kv_heads)]
        return policy

    def buffer(self, n_tokens: int) -> int:
        """Latest entries of a head that does not retrieve."""
        c = self.config
        if not c.budget:
            return max(c.least, int(n_tokens / c.ratio))
        heads = self.shape.layers * self.shape.kv_heads
        full, most = len(self.ranked), entries_of(c.budget, n_tokens)
        return max(1, (most * heads - full * n_tokens) // max(heads - full, 1) - c.sinks - 1)

    def allow(self, layer: int, n_tokens: int) -> int | Sequence[int]:
        if n_tokens < self.prompt:
            return n_tokens
        short = min(n_tokens, self.config.sinks + self.buffer(n_tokens) + 1)
        return [n_tokens if (layer, g) in self.ranked else short for g in range(self.shape.kv_heads)]

    def keep(self, layer: int, entries: Entries) -> Keep:
        tokens = int(max(entries.position_GS[g, n - 1] for g, n in enumerate(entries.counts))) + 1
        latest = self.buffer(tokens)
        heads, merged = [], list[Merged | None]()
        for g, n in enumerate(entries.counts):
            position_S = entries.position_GS[g, :n]
            index = torch.arange(n, device=position_S.device)
            weight_S = index.new_ones(n).float() if entries.weight_GS is None else entries.weight_GS[g, :n]
            # Sinks are known by their places: a compensation token lies before them.
            real_S = weight_S == 1
            stays_S = ((position_S < self.config.sinks) & real_S) | (index >= n - latest)
            drop = index[~stays_S]
            if (layer, g) in self.ranked or len(drop) < 2:  # one for one saves nothing
                heads.append(index)
                merged.append(None)
                continue
            w_M1 = weight_S[drop, None]
            k_E, v_E = ((x[g, drop].float() * w_M1).sum(0) / w_M1.sum() for x in (entries.k_GSE, entries.v_GSE))
            heads.append(index[stays_S])
            merged.append(Merged(k_E[None], v_E[None], position_S[drop].max()[None], w_M1.sum()[None]))
        return Keep(heads, merged)


@torch.inference_mode()
def scores(model: Decoder, config: Config, probe_tokens: Sequence[int] = ()) -> tuple[Tensor, Tensor]:
    """(echo, induction) of every KV head, (L, G): its best query head's mean attention. `said`: tokens to use."""
    c = model.config
    if len(probe_tokens):
        probe_T = torch.tensor(probe_tokens[: c.context_length])
    else:
        length = max(2, min(config.probe, c.context_length // config.times))
        generator = torch.Generator().manual_seed(0)
        probe_T = torch.randint(c.vocab_size, (length,), generator=generator).repeat(config.times)
    probe = _Probe(
        CacheShape(
            layers=c.layers,
            heads=c.heads,
            kv_heads=c.kv_heads,
            head_dim=c.head_dim,
            block_size=1,
            windows=tuple(layer.window for layer in c.per_layer),
            scales=tuple(layer.attention_scale for layer in c.per_layer),
            softcap=c.attention_softcap,
        ),
        probe_T.to(model.device),
    )
    model.hidden(probe_T[None].to(model.device), attend=probe)
    both_LHG = torch.stack(probe.head_scores)  # (L, 2, G)
    return both_LHG[:, 0], both_LHG[:, 1]


def ranking(echo_LG: Tensor, induction_LG: Tensor, config: Config) -> list[tuple[int, int]]:
    """The KV heads with the best induction scores, then those with the best echo scores, none twice."""
    heads, G = induction_LG.numel(), induction_LG.shape[1]
    chosen: list[int] = []
    for score_LG, fraction in ((induction_LG, config.induction), (echo_LG, config.echo)):
        n = -int(-fraction * heads // 1)  # rounded up: a share above 0 is a head at least
        order = score_LG.flatten().argsort(descending=True).tolist()
        chosen += [h for h in order if h not in chosen][: max(0, min(n, heads - len(chosen)))]
    return [(h // G, h % G) for h in chosen]


class _Probe:
    """An `attend` that is causal attention, and notes each head's echo and induction on the way."""

    def __init__(self, shape: CacheShape, probe_T: Tensor):
        self.shape, self.probe_T = shape, probe_T
        before_TT = (probe_T[:, None] == probe_T).tril(-1)
        self.again = max(1, int(before_TT.any(1).sum()))  # tokens that were said before
        self.head_scores: list[Tensor] = []

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
        q_HTE, k_GSE, v_GSE = q_BHTE[0], k_BGSE[0], v_BGSE[0]
        H, T, _ = q_HTE.shape
        G = k_GSE.shape[0]
        position_T = torch.arange(T, device=q_HTE.device)
        out, sums = [], torch.zeros(2, H, device=q_HTE.device)
        for start in range(0, T, ROWS):
            at_T1 = position_T[start : start + ROWS, None]
            q_GXE = q_HTE[:, start : start + ROWS].unflatten(0, (G, H // G)).flatten(1, 2)
            end = start + len(at_T1)
            scores_GRTS = self.shape.scores(layer, q_GXE, k_GSE[:, :end]).unflatten(1, (H // G, -1))
            hidden_TS = position_T[:end] > at_T1
            if window is not None:
                hidden_TS |= position_T[:end] <= at_T1 - window
            a_GRTS = scores_GRTS.masked_fill_(hidden_TS, float("-inf")).softmax(-1)
            out.append((a_GRTS.to(v_GSE.dtype) @ v_GSE[:, None, :end]).flatten(0, 1))
            same_TS = (self.probe_T[at_T1] == self.probe_T[:end]) & (position_T[:end] < at_T1)
            after_TS = torch.zeros_like(same_TS)  # what followed it then
            after_TS[:, 1:] = same_TS[:, :-1] & (position_T[1:end] < at_T1)
            for i, hit_TS in enumerate((same_TS, after_TS)):
                sums[i] += (a_GRTS * hit_TS).sum((-1, -2)).flatten()
        self.head_scores.append((sums / self.again).unflatten(1, (G, H // G)).amax(2).cpu())
        return torch.cat(out, dim=1)[None]
