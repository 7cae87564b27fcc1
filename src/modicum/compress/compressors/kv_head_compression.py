"""kv-head-compression: several key/value heads become one, in the directions that their activations take most.

The G key/value heads of a layer are split into `keep` groups of n, and one head of E dimensions replaces each group.

    values:  U = top E eigenvectors of the covariance of [v_1 ... v_n] (n E),   W_v' = U^T [W_v1; ...; W_vn],
             W_o,h' = W_o,h U_j for the query heads h of head j
    keys:    at each frequency a of the rotation the pair (a, a + E/2) is one complex number, z_j = k_j,a + i k_j,a+E/2;
             u = top eigenvector of the covariance of [z_1 ... z_n];  y = u^H z,   q' = conj(u_j) q

Mixing heads at one frequency commutes with the rotation, so both fold into the weights: what is written is a plain
decoder with `keep` key/value heads, whose cache is n times smaller in any program. Covariances are of the text's
activations in the model compressed so far; `by=weights` takes those of the weights, `pool=mean` the mean of the heads
(Ainslie et al. 2023, arXiv:2305.13245), with no text behind it.

Yu et al. 2024, arXiv:2406.07056 (section 3 not read: values follow the summary of it). Departs: keys are merged for
good, one complex direction for each frequency, where the paper projects rotated keys at run time with a matrix of its
own, which loses less and saves no compute. Nothing is trained after it; `modicum pretrain --model` heals.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from modicum.compress.compressors import BlockJob, Compressor
from modicum.core.errors import UserError
from modicum.model.config import DecoderConfig
from modicum.model.decoder import Decoder


@dataclass(frozen=True, kw_only=True)
class Config:
    keep: Annotated[int, Field(ge=1)] = 1  # key/value heads that are left in each layer
    pool: Literal["pca", "mean"] = "pca"
    by: Literal["activations", "weights"] = "activations"  # whose directions


CLAIM = {"figure": "half to three quarters of the KV heads removed at comparable accuracy", "where": "abstract",
         "scale": "BLOOMZ-7B1, LLaMA2-7B and 13B"}  # fmt: skip
SWEEP = ("keep=1", "keep=1,by=weights", "keep=1,pool=mean")


class KvHeadCompression(Compressor):
    requires = frozenset({"calibration_text"})
    leaves = "shape"
    needs: ClassVar[frozenset[str]] = frozenset({"gram"})
    config: Config

    def check(self, shape: DecoderConfig) -> None:
        keep, layers = self.config.keep, shape.per_layer
        if any((a.heads, a.kv_heads, a.head_dim) != (shape.heads, shape.kv_heads, shape.head_dim) for a in layers):
            raise UserError("kv-head-compression: the layers of this model differ in their heads; it needs equal ones")
        if keep >= shape.kv_heads or shape.kv_heads % keep:
            allowed = [k for k in range(1, shape.kv_heads) if shape.kv_heads % k == 0]
            raise UserError(
                f"kv-head-compression: keep={keep} of {shape.kv_heads} key/value heads; it must be a smaller divisor"
                + (f": {', '.join(map(str, allowed))}" if allowed else ", and this model has a single head already")
            )
        for layer in layers:
            whole = layer.rope is not None and layer.rope.fraction == 1.0
            if layer.mixer != "softmax" or not whole or layer.qk_norm or layer.qkv_bias:
                raise UserError(
                    "kv-head-compression needs softmax attention whose keys are rotated in all dimensions, without "
                    "norms or biases on queries and keys; this model has another"
                )

    def block(self, job: BlockJob) -> None:
        """Project keys and values onto what one head of each group can hold; `finish` folds that into fewer heads."""
        attention: Any = job.block.get_submodule("attention")
        if "attention.k" not in job.linears:
            raise UserError("kv-head-compression compresses attention: give --targets 'layers.*'")
        width, dim = attention.k.weight.shape[1], attention.head_dim
        gram_II = torch.eye(width, dtype=torch.float64, device=attention.k.weight.device)
        if self.config.by == "activations":
            gram_II = job.statistics["attention.k"].gram
        pool = self.config.pool
        with torch.no_grad():
            groups_k, groups_v = (m.weight.double().chunk(self.config.keep) for m in (attention.k, attention.v))
            keys = [_projected_keys(k, key_directions(k, gram_II, dim, pool), dim) for k in groups_k]
            values = [u @ (u.T @ v) for v in groups_v for u in (value_directions(v, gram_II, dim, pool),)]
            attention.k.weight.copy_(torch.cat(keys))
            attention.v.weight.copy_(torch.cat(values))

    def finish(self, model: Decoder) -> Decoder:
        return folded(model, self.config.keep)


def as_complex(weight_OI: Tensor, dim: int) -> Tensor:
    """Rows (heads, dim) as (heads, dim / 2, I), each pair that is rotated together one complex row."""
    first, second = weight_OI.unflatten(0, (-1, 2, dim // 2)).unbind(1)
    return torch.complex(first, second)


def as_real(rows_HAI: Tensor) -> Tensor:
    """The inverse: (heads dim, I)."""
    return torch.stack([rows_HAI.real, rows_HAI.imag], 1).flatten(0, 2)


def key_directions(weight_OI: Tensor, gram_II: Tensor, dim: int, pool: str = "pca") -> Tensor:
    """u_NA, complex: for each frequency a unit vector over the group's heads."""
    z_NAI = as_complex(weight_OI, dim)
    if pool == "mean":
        return torch.full(z_NAI.shape[:2], z_NAI.shape[0] ** -0.5, dtype=z_NAI.dtype, device=z_NAI.device)
    covariance_ANN = torch.einsum("nai,ij,maj->anm", z_NAI, gram_II.to(z_NAI.dtype), z_NAI.conj())
    return torch.linalg.eigh(covariance_ANN)[1][..., -1].T


def value_directions(weight_OI: Tensor, gram_II: Tensor, dim: int, pool: str = "pca") -> Tensor:
    """U (n dim, dim) with orthonormal columns."""
    if pool == "mean":
        n = len(weight_OI) // dim
        return torch.eye(dim, dtype=weight_OI.dtype, device=weight_OI.device).repeat(n, 1) / n**0.5
    return torch.linalg.eigh(weight_OI @ gram_II @ weight_OI.T)[1][:, -dim:]


def _projected_keys(weight_OI: Tensor, u_NA: Tensor, dim: int) -> Tensor:
    y_AI = merged_keys(weight_OI, u_NA, dim)
    return as_real(u_NA[..., None] * y_AI)


def merged_keys(weight_OI: Tensor, u_NA: Tensor, dim: int) -> Tensor:
    """y_AI = u^H z: the complex rows of the one head."""
    return (u_NA.conj()[..., None] * as_complex(weight_OI, dim)).sum(0)


def turned_queries(weight_OI: Tensor, u_A: Tensor, dim: int) -> Tensor:
    """Rows of the query heads of one key head: q' = conj(u_j) q at each frequency."""
    return as_real(u_A.conj()[:, None] * as_complex(weight_OI, dim))


@torch.no_grad()
def folded(model: Decoder, keep: int) -> Decoder:
    """A decoder of `keep` key/value heads that computes what `model` does, whose groups span one head each."""
    config = dataclasses.replace(model.config, kv_heads=keep)
    with torch.device("meta"):
        made = Decoder(config, init=False)
    for name, module in model.named_children():
        if name != "layers":
            setattr(made, name, module)
    for index, layer in enumerate(model.layers):
        attention: Any = layer.get_submodule("attention")
        _fold(attention, keep)
        made.layers[index] = layer
    return made.train(model.training)


def _fold(attention: Any, keep: int) -> None:
    dim, dtype = attention.head_dim, attention.k.weight.dtype
    eye_II = torch.eye(attention.k.weight.shape[1], dtype=torch.float64, device=attention.k.weight.device)
    groups_k, groups_v, groups_q = (m.weight.double().chunk(keep) for m in (attention.k, attention.v, attention.q))
    groups_o = attention.o.weight.double().chunk(keep, 1)
    new: dict[str, list[Tensor]] = {"q": [], "k": [], "v": [], "o": []}
    for k, v, q, o in zip(groups_k, groups_v, groups_q, groups_o, strict=True):
        u_NA, u_VE = key_directions(k, eye_II, dim), value_directions(v, eye_II, dim)
        n = u_NA.shape[0]
        new["k"].append(as_real(merged_keys(k, u_NA, dim)[None]))
        new["v"].append(u_VE.T @ v)
        new["q"] += [turned_queries(part, u_NA[j], dim) for j, part in enumerate(q.chunk(n))]
        for part, u_EE in zip(o.chunk(n, 1), u_VE.chunk(n), strict=True):
            new["o"] += [head @ u_EE for head in part.split(dim, 1)]
    for name, parts in new.items():
        old = getattr(attention, name)
        weight = torch.cat(parts, 1 if name == "o" else 0).to(dtype)
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        linear.weight, linear.bias = nn.Parameter(weight), old.bias
        setattr(attention, name, linear.train(old.training))
