"""fireq: keys and values in four bits, a scale for each entry and head, keys smoothed so that few channels do not rule.

    k' = k / f,   scale = max |k'| / 7,   code = round(k' / scale),   k ~ f scale code        values alike with f = 1
    f_i = f_i+E/2 = (m / mean m)^alpha        m the largest |k| on calibration text of the channels that rotate together
    f_c *= (m'_c / median m')^(1/2)           for the 2 `worst` channels of a head, m' what is left of k after that

One factor for a rotated pair commutes with the rotary embedding, so the first could be folded into W_k and W_q; the
second, after the rotation, could not, and is applied where keys are coded (queries stay as they are: f comes back when
keys are decoded). alpha, of 0, 0.1 ... 1, is what loses least of q . k on the text, for each layer and head. An entry
is coded when it is written.

FireQ, 2025, arXiv:2505.20839 (attention half; from the repository's settings and a review). Departs: the factors after
the rotation come from calibration text, theirs from the running prompt; queries are not FP8, and the linear half (INT4
weights with FP8 scales, multiplied as FP8) has no counterpart on a CPU: a 16-entry FP8 table is not an affine code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from modicum.core.errors import UserError
from modicum.model.config import DecoderConfig
from modicum.model.decoder import Decoder
from modicum.serve.cacheforms._fitted import FittedForm, Seen, batches, check_shape

LEVELS = 7
ALPHAS = tuple(i / 10 for i in range(11))


@dataclass(frozen=True, kw_only=True)
class Config:
    fit: str = ""  # file that `modicum fit` wrote
    pairs: bool = True  # when fitted: factors of rotated pairs
    worst: Annotated[int, Field(ge=0)] = 2  # when fitted: half of the channels of a head with factors of their own


CLAIM = {
    "figure": "negligible loss with INT4 keys and values; 1.26 times the prefill throughput",
    "where": "abstract",
    "scale": "Llama-2-7B, Llama-3-8B on an H100",
}


class FireQ(FittedForm):
    config: Config

    @classmethod
    @torch.no_grad()
    def fit(cls, config: Config, model: Decoder, tokens_NT: Tensor) -> dict[str, Tensor]:
        check_shape("fireq", model.config)
        shape = model.config
        if shape.head_dim % 2 or any(layer.rope and layer.rope.fraction != 1.0 for layer in shape.per_layer):
            raise UserError("fireq needs keys that are rotated in all of their dimensions; this model's are in part")
        seen: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(shape.layers)]

        def keep(layer: int, q_BHTE: Tensor, k_BGTE: Tensor, v_BGTE: Tensor) -> None:
            G = k_BGTE.shape[1]
            queries = q_BHTE.unflatten(1, (G, -1)).permute(1, 0, 2, 3, 4).flatten(1, 3)
            seen[layer].append((queries.float(), k_BGTE.transpose(0, 1).flatten(1, 2).float()))

        for tokens_BT in batches(tokens_NT):
            model.hidden(tokens_BT.to(model.device), attend=Seen(keep))
        rows = []
        for pairs in seen:
            q_GXE, k_GRE = (torch.cat([pair[i] for pair in pairs], 1) for i in (0, 1))
            moment_GEE = q_GXE.mT @ q_GXE / q_GXE.shape[1]
            rows.append(torch.stack([factors(k, m, config) for k, m in zip(k_GRE, moment_GEE, strict=True)]))
        return {"factor_LGE": torch.stack(rows).cpu()}

    def load(self, fit: dict[str, Tensor], shape: DecoderConfig) -> None:
        self.factor_LGE = fit["factor_LGE"].float()

    def _factor(self, which: str, layer: int, x: Tensor) -> Tensor:
        """(G, 1, 1, E)."""
        factor_GE = self.factor_LGE[layer] if which == "k" else torch.ones_like(self.factor_LGE[layer])
        return factor_GE[:, None, None].to(x.device)

    def encode_layer(self, which: str, layer: int, x_GNPE: Tensor, at_NP: Tensor) -> tuple[Tensor, ...]:
        codes_GNPE, scale_GNP1 = rounded(x_GNPE.float() / self._factor(which, layer, x_GNPE))
        codes = (codes_GNPE + 8).to(torch.uint8)
        packed_GNPe = codes[..., 0::2] | codes[..., 1::2] << 4
        return _beside(packed_GNPe), _beside(scale_GNP1)

    def decode_layer(self, which: str, layer: int, codes: tuple[Tensor, ...], at_NP: Tensor) -> Tensor:
        packed, scale = (part.unflatten(-1, (self.heads, -1)).permute(2, 0, 1, 3) for part in codes)
        x_GNPE = torch.stack([packed & 15, packed >> 4], -1).flatten(-2).float() - 8
        return (x_GNPE * scale.float() * self._factor(which, layer, x_GNPE)).to(self.dtype)


def rounded(x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes in -7 .. 7, and a bfloat16 scale for each row."""
    scale = (x.abs().amax(-1, keepdim=True) / LEVELS).to(torch.bfloat16)
    step = torch.where(scale > 0, scale, 1).float()
    return (x / step).round().clamp(-LEVELS, LEVELS), scale


def _beside(x_GNPX: Tensor) -> Tensor:
    """The heads of each entry side by side, (N, P, G X)."""
    return x_GNPX.permute(1, 2, 0, 3).flatten(2)


def factors(k_RE: Tensor, moment_EE: Tensor, config: Config) -> Tensor:
    """f_E of one head. moment_EE: mean of q q^T of its queries, by which lost scores are weighed."""
    E = k_RE.shape[1]
    best = torch.ones(E)
    if config.pairs:
        largest_E = k_RE.abs().amax(0)
        pair = torch.maximum(largest_E[: E // 2], largest_E[E // 2 :]).clamp(min=1e-6).repeat(2)
        choices = [(pair / pair.mean()) ** alpha for alpha in ALPHAS]
        best = min(choices, key=lambda f: scores_lost(k_RE, f, moment_EE))
    if config.worst:
        left_E = (k_RE / best).abs().amax(0).clamp(min=1e-6)
        top = left_E.topk(min(2 * config.worst, E)).indices
        tuned = best.clone()
        tuned[top] *= (left_E[top] / left_E.median()).clamp(min=1).sqrt()
        if scores_lost(k_RE, tuned, moment_EE) < scores_lost(k_RE, best, moment_EE):
            best = tuned
    return best


def scores_lost(k_RE: Tensor, factor_E: Tensor, moment_EE: Tensor) -> float:
    """Mean of (q . (k - k'))^2, k' coded with these factors."""
    codes, scale = rounded(k_RE / factor_E)
    away_RE = k_RE - codes * scale.float() * factor_E
    return float(((away_RE @ moment_EE) * away_RE).sum(1).mean())
