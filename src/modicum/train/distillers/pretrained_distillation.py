"""pretrained-distillation: a student that was pretrained first learns a teacher's full distribution on unlabelled text.

Three steps, of which this is the second: pretrain the small model on general text; on transfer text of the task's
domain, without its labels, minimise the cross-entropy with the distribution of a teacher that was fine-tuned there;
fine-tune on labels if there are some.

    loss = - sum over v of p_t[v] log p_s[v]       T = 1, the text's own next tokens play no part

    modicum pretrain general  --out A
    modicum pretrain transfer --out B --model A/model --distiller pretrained-distillation:teacher=TEACHER

A teacher with all probability on the next token makes it plain fine-tuning. Turc et al. 2019, arXiv:1908.08962,
section 3. Departs: next tokens instead of classes, so that a decoder is the student and any text has a teacher's
answer; a student of another pretraining or none is not refused, for comparison.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from modicum.train.distillers import Distiller
from modicum.train.distillers._teacher import Watched, predictions_sum

CLAIM = {"figure": "pretrained distillation above pretraining + fine-tuning, and above distillation alone",
         "where": "abstract", "scale": "24 BERT miniatures, 4M to 110M parameters"}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Config:
    teacher: str = ""  # model folder or name; "": the model as the run begins


class PretrainedDistillation(Distiller):
    config: Config

    @property
    def keep(self) -> float:
        return 0.0

    def terms(self, student: Any, seen: Watched, taught: Watched, mask_BT: Tensor) -> dict[str, Tensor]:
        def of(student_NV: Tensor, teacher_NV: Tensor) -> Tensor:
            return -(torch.softmax(teacher_NV.float(), -1) * torch.log_softmax(student_NV.float(), -1)).sum(-1)

        return {"distil": predictions_sum(student, self.teacher, seen.h_BTD, taught.h_BTD, mask_BT, of)}
