"""meco: tell the model where each document comes from before it reads it, and stop telling it near the end.

A corpus mixes sites that write very differently; a model that is told the site needs not guess it from the text, and
learns more from as much of it. Metadata is read, never predicted. The last tenth of the run is on plain text,
so that the model does without; given some when it is used, it is steered by it.

    until (1 - cooldown) of the run    start, "URL: en.wikipedia.org\\n\\n", t_1 ... t_n, eos
    after that                         start, t_1 ... t_n, eos
    loss = - sum over t_1 ... t_n, eos of log p(token | all before it in its document)

The stream lays the metadata into the rows (`data.stream`, metadata=0.9), from what curation kept beside the
tokens: the host of a document's URL, or else its folder. It takes places in the row, and the text it displaces comes
in the next, so a step costs what it did. Documents must not see each other: packing concat:mask=true.

Gao et al. 2025, arXiv:2501.01956, section 2. Departs from the paper: the part of a document that goes on in another row
gets the metadata again, as it would otherwise be told nothing; the optimizer and the rate go on through the
cool-down as they do there, and so does the order of the data.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from modicum.core.errors import UserError
from modicum.train.loss import token_loss
from modicum.train.objectives import Loss, Objective, Step

CLAIM = {
    "figure": "the same task scores with 33% fewer tokens",
    "where": "table 1",
    "scale": "1.6B parameters, 160B tokens of DCLM",
}


@dataclass(frozen=True, kw_only=True)
class Config:
    cooldown: float = 0.1  # share of the run, at its end, on plain text
    logits_bytes: int | None = None  # bound on the float32 logits that exist at once; None: what runs fast

    def __post_init__(self) -> None:
        if not 0 <= self.cooldown < 1:
            raise ValueError(f"cooldown={self.cooldown} must be a share of the run, at least 0 and below 1")
        if self.logits_bytes is not None and self.logits_bytes < 1:
            raise ValueError(f"logits_bytes={self.logits_bytes} must be positive")


class MeCo(Objective):
    config: Config
    requires = frozenset({"document_mask"})

    def stream_knobs(self) -> dict[str, Any]:
        return {"metadata": 1 - self.config.cooldown}

    def loss(self, model: nn.Module, batch: Any, step: Step) -> Loss:
        if batch.documents_BT is None:
            raise UserError(
                "objective 'meco' needs documents that do not see each other, and the batch says nothing of "
                "documents; choose packing concat:mask=true"
            )
        total, count = token_loss(model, batch, logits_bytes=self.config.logits_bytes)
        return Loss(total, count)
