"""scalekd: a large teacher's features for a small student of another shape, seen through attention and twice.

Three parts beside the objective; x_s and x_t are residual streams, n(x) = (x - mean) / std over the width:

- a cross-attention projector: learnable queries, one for each position of the teacher's, attend to the student's
  features (linear map, norm, ReLU, + position); norm and MLP follow. Student features in the teacher's width;
- dual view: ||n(P x_s) - n(x_t)||^2, and with a second projector the same without the zero frequency of a cosine
  transform along the positions, which is their mean: ||n(c(P' x_s)) - n(c(x_t))||^2, c(x) = x - mean over positions;
- the teacher's parameters: what the first projector makes of the student's late layer goes through the teacher's frozen
  last two layers and is compared with the teacher's final features; these outputs are the queries of the projector at
  the student's last layer.

    loss = objective + weight (late view 1 + 0.75 late view 2 + last layers + final view 1)

Fan et al. 2024, arXiv:2411.06786, section 3 (NeurIPS 2024). Departs: text in place of images: positions are tokens, a
query sees the student's positions up to its own within its document (else it would copy from the future), the cosine
transform runs over the whole row, in the loss alone; squares are divided by the width and the weights are relative to
`weight` (the paper: sums, 0.08 and 0.06).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from modicum.core.errors import UserError
from modicum.model.attend import DenseAttend, default_positions
from modicum.train.distillers import Distiller
from modicum.train.distillers._teacher import Watched, square_sum

LAST = 2  # layers of the teacher that the student's late features go through
FREQUENCY = 0.75  # weight of the second view beside the first
CLAIM = {"figure": "ResNet-50 +3.39, Mixer-S/16 +4.61, ViT-S/16 +4.03 points on ImageNet", "where": "abstract",
         "scale": "Swin-L as teacher"}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Config:
    teacher: str = ""  # model folder or name; "": the model as the run begins
    weight: Annotated[float, Field(ge=0)] = 0.5
    heads: Annotated[int, Field(ge=1)] = 4  # of the projectors' attention


class Projector(nn.Module):
    """Student features x_BTD to the teacher's width, (B, T, wide); `queries` in place of the learnable ones."""

    def __init__(self, width: int, wide: int, positions: int, heads: int, generator: torch.Generator):
        super().__init__()
        self.heads = next(h for h in range(min(heads, wide), 0, -1) if wide % h == 0)
        self.inner, self.norm = nn.Linear(width, wide), nn.LayerNorm(wide)
        self.position_TD = nn.Parameter(torch.zeros(positions, wide))
        self.query_TD = nn.Parameter(torch.zeros(positions, wide))
        self.q, self.k, self.v, self.o = (nn.Linear(wide, wide, bias=False) for _ in range(4))
        self.mlp_norm, self.up, self.down = nn.LayerNorm(wide), nn.Linear(wide, 2 * wide), nn.Linear(2 * wide, wide)
        with torch.no_grad():
            for name, p in self.named_parameters():
                if p.dim() == 2:
                    p.normal_(std=0.02 if name.endswith("_TD") else p.shape[1] ** -0.5, generator=generator)
                elif name.endswith("bias"):
                    p.zero_()

    def forward(self, x_BTD: Tensor, sees_BTT: Tensor, queries_BTD: Tensor | None = None) -> Tensor:
        T = x_BTD.shape[1]
        if len(self.query_TD) < T:
            raise UserError(f"scalekd: rows of {T} tokens, and the model's context is {len(self.query_TD)}")
        x_BTD = F.relu(self.norm(self.inner(x_BTD.float()))) + self.position_TD[:T]
        start = self.query_TD[:T].expand_as(x_BTD) if queries_BTD is None else queries_BTD.float()
        q, k, v = (m(y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for m, y in
                   ((self.q, start), (self.k, x_BTD), (self.v, x_BTD)))  # fmt: skip
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=sees_BTT[:, None])
        y_BTD = start + self.o(mixed.transpose(1, 2).flatten(2))
        return y_BTD + self.down(F.relu(self.up(self.mlp_norm(y_BTD))))


class ScaleKd(Distiller):
    config: Config

    def _late(self, student: Any) -> int:
        """The student's layer at the depth where the teacher's last stage begins."""
        begin = self.teacher.config.layers - LAST
        return max(round(begin * student.config.layers / self.teacher.config.layers), 1) - 1

    def student_layers(self, student: Any) -> tuple[int, ...]:
        return tuple(sorted({self._late(student), student.config.layers - 1}))

    def teacher_layers(self, student: Any) -> tuple[int, ...]:
        last = self.teacher.config.layers - 1
        if last < LAST:
            raise UserError(f"scalekd needs a teacher of more than {LAST} layers; {self.config.teacher} has {last + 1}")
        return last - LAST, last

    def make_extra(self, student: Any) -> nn.Module | None:
        generator = torch.Generator().manual_seed(0)
        sizes = student.config.width, self.teacher.config.width, student.config.context_length, self.config.heads
        return nn.ModuleDict({name: Projector(*sizes, generator) for name in ("late", "frequency", "final")})

    def terms(self, student: Any, seen: Watched, taught: Watched, mask_BT: Tensor) -> dict[str, Tensor]:
        extra: Any = self.extra
        late, final = self._late(student), student.config.layers - 1
        begin, end = self.teacher_layers(student)
        documents_BT = seen.options.get("documents_BT")
        sees_BTT = visible(mask_BT, documents_BT)
        first_BTD = extra["late"](seen.layers[late], sees_BTT)
        second_BTD = extra["frequency"](seen.layers[late], sees_BTT)
        through_BTD = self._last_layers(first_BTD, seen)
        final_BTD = extra["final"](seen.layers[final], sees_BTT, through_BTD)
        views = {
            "view": square_sum(over_width(first_BTD), over_width(taught.layers[begin]), mask_BT),
            "frequency": FREQUENCY
            * square_sum(over_width(no_mean(second_BTD)), over_width(no_mean(taught.layers[begin])), mask_BT),
            "last_layers": square_sum(over_width(through_BTD), over_width(taught.layers[end]), mask_BT),
            "final": square_sum(over_width(final_BTD), over_width(taught.layers[end]), mask_BT),
        }
        return {name: self.config.weight * value for name, value in views.items()}

    def _last_layers(self, x_BTD: Tensor, seen: Watched) -> Tensor:
        """Through the teacher's last layers, whose weights get no gradient and pass it on."""
        teacher, documents_BT = self.teacher, seen.options.get("documents_BT")
        positions_BT = seen.options.get("positions_BT")
        if positions_BT is None:
            positions_BT = default_positions(seen.tokens_BT, documents_BT)
        attend, x_BTD = DenseAttend(documents_BT), x_BTD.to(teacher.dtype)
        tables, which = teacher.ropes()
        for layer, index in list(zip(teacher.layers, which, strict=True))[-LAST:]:
            x_BTD = layer(x_BTD, None if index is None else tables[index](positions_BT, x_BTD.dtype), attend)
        return x_BTD


def visible(like_BT: Tensor, documents_BT: Tensor | None) -> Tensor:
    """sees_BTT: each position sees those up to itself in its document."""
    B, T = like_BT.shape
    sees_TT = torch.ones(T, T, dtype=torch.bool, device=like_BT.device).tril()
    if documents_BT is None:
        return sees_TT.expand(B, T, T)
    return sees_TT & (documents_BT[:, :, None] == documents_BT[:, None, :])


def no_mean(x_BTD: Tensor) -> Tensor:
    """Without the zero frequency of a cosine transform along the positions."""
    return x_BTD - x_BTD.mean(1, keepdim=True)


def over_width(x_BTD: Tensor) -> Tensor:
    """Mean 0 and variance 1 over the width, at each position by itself."""
    return F.layer_norm(x_BTD.float(), x_BTD.shape[-1:])
