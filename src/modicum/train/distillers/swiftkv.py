"""swiftkv: the later layers learn to make keys and values of one earlier layer's output.

At the run's start the layers from `own` on get the mixer `swiftkv` (k_j, v_j = W_j N(x_l)), and only their W_q,
W_k, W_v and the norm N are trained; the model as it was is the teacher:

    loss = T^2 KL(p_t || p_s) + hidden * ||x_s - x_t||^2 / D,      x what the last layer is given

The saved model computes a prompt's tokens up to layer l alone, in this engine: `model.mixers.swiftkv`.
Qiao et al. 2024, arXiv:2410.03960, section 3.3. Departs: the teacher is a copy, where the paper switches its layers
off; the divergence counts wherever the objective does, theirs on answers, and rows are not packed with chat alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field
from torch import Tensor, nn

from modicum.core.errors import UserError
from modicum.model.mixers.swiftkv import convert
from modicum.train.distillers import Distiller
from modicum.train.distillers._teacher import Watched, divergence_N, predictions_sum, square_sum

CLAIM = {"figure": "half of the prompt's computation, up to twice the throughput", "where": "abstract",
         "scale": "Llama-3.1-8B and 70B"}  # fmt: skip
NOT_MEASURABLE = (
    "the bench compares students of one shape beside a wider teacher; this method changes how the student attends and "
    "is taught by what it was"
)


@dataclass(frozen=True, kw_only=True)
class Config:
    teacher: str = ""  # the model before; "": the one that is given
    own: Annotated[float, Field(gt=0, lt=1)] = 0.5  # layers that keep keys and values of their own, as a fraction
    temperature: Annotated[float, Field(gt=0)] = 2.0
    hidden: Annotated[float, Field(ge=0)] = 1.0


class SwiftKv(Distiller):
    config: Config
    conflicts = frozenset({"fsdp", "objective/ul2", "linear"})
    trains_part = True

    @property
    def keep(self) -> float:
        return 0.0

    def prepare(self, model: nn.Module, state: dict[str, Any] | None) -> nn.Module:
        model = super().prepare(model, state)
        decoder: Any = model
        if decoder.config.source_layer is None:
            convert(decoder, min(max(1, round(self.config.own * decoder.config.layers)), decoder.config.layers - 1))
        for p in model.parameters():
            p.requires_grad_(False)
        for p in trained(decoder):
            p.requires_grad_(True)
        return model

    def finish(self, trainer: Any) -> None:
        super().finish(trainer)
        for p in trainer.model.parameters():
            p.requires_grad_(True)

    def student_layers(self, student: Any) -> tuple[int, ...]:
        return (student.config.layers - 2,) if student.config.layers > 1 and self.config.hidden else ()

    def teacher_layers(self, student: Any) -> tuple[int, ...]:
        have, wanted = ((m.config.layers, m.config.width) for m in (self.teacher, student))
        if have != wanted:
            raise UserError(
                f"swiftkv compares a model with what it was before: the teacher has {have[0]} layers of width "
                f"{have[1]}, the student {wanted[0]} of {wanted[1]}; leave out teacher="
            )
        return self.student_layers(student)

    def terms(self, student: Any, seen: Watched, taught: Watched, mask_BT: Tensor) -> dict[str, Tensor]:
        def of(student_NV: Tensor, teacher_NV: Tensor) -> Tensor:
            return divergence_N(student_NV, teacher_NV, self.config.temperature)

        terms = {"distil": predictions_sum(student, self.teacher, seen.h_BTD, taught.h_BTD, mask_BT, of)}
        for i in self.student_layers(student):
            terms["hidden"] = self.config.hidden * square_sum(seen.layers[i], taught.layers[i], mask_BT)
        return terms


def trained(model: Any) -> list[nn.Parameter]:
    """Queries, keys and values of the later layers, and the norm that their keys share."""
    late = [layer.attention for layer in model.layers[model.config.source_layer + 1 :]]
    parts = [part for a in late for part in (a.q, a.k, a.v)] + [model.kv_norm]
    return [p for part in parts for p in part.parameters()]
