"""Training the weights of one block through what will be stored of them: what efficientqat and edkm share.

    min ||block'(x_q) - block(x)||^2

over the weights of the block's linear layers, what else their rounding trains, and the norms' weights. x_q comes out
of the blocks compressed before, x out of the original ones. AdamW without decay, the rate falling by a cosine to a
twentieth. Sequences of validation pick the best epoch, the start included.

Shapes: B sequences, T tokens, D width; O outputs, I inputs of a layer.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from modicum.compress.compressors import BlockJob, Compressor, Stored
from modicum.model.attend import DenseAttend

FINAL_RATE = 0.05  # of the peak


@dataclass(frozen=True, kw_only=True)
class BlockTraining:
    """Knobs of every compressor that trains block by block."""

    epochs: Annotated[int, Field(ge=0)] = 2  # over the calibration text; 0: what is stored of the weights as they are
    batch: Annotated[int, Field(ge=1)] = 2  # sequences of a step
    heldout: Annotated[int, Field(ge=2)] = 8  # of so many sequences one is for validation


class TrainedWeight(nn.Module):
    """The trained `weight` of one layer; `forward` gives the weight_OI as it will be stored, with gradients while
    `training`; `codes()` is what is kept."""

    weight: nn.Parameter

    def codes(self) -> Stored:
        raise NotImplementedError


class BlockTrained(Compressor):
    """A compressor whose config has the knobs `BlockTraining` and `scale_rate`. A method gives `quantiser` and
    `weight_rate`."""

    requires = frozenset({"calibration_text"})
    streams: ClassVar[tuple[str, ...]] = ("compressed", "original")

    def quantiser(self, weight_OI: Tensor, config: Any) -> TrainedWeight:
        raise NotImplementedError

    def weight_rate(self) -> float:
        """Learning rate of weights; that of everything else a quantiser trains is `scale_rate`."""
        raise NotImplementedError

    def block(self, job: BlockJob) -> None:
        quantisers = {
            name: self.quantiser(layer.weight.detach(), self.of_matrix(job.full_name(name)).config)
            for name, layer in job.linears.items()
        }
        norms = {
            name: nn.Parameter(p.detach().clone())
            for name, p in job.block.named_parameters()
            if name.endswith("weight") and p.dim() == 1
        }
        if self.config.epochs:
            self._train(job, quantisers, norms)
        parameters = dict(job.block.named_parameters())
        for name, norm in norms.items():
            parameters[name].data.copy_(norm.detach())
        for name, quantiser in quantisers.items():
            job.keep(name, quantiser.codes())

    def _train(self, job: BlockJob, quantisers: dict[str, TrainedWeight], norms: dict[str, nn.Parameter]) -> None:
        c, made = self.config, nn.ModuleList([*quantisers.values(), nn.ParameterList(norms.values())])
        weights = [q.weight for q in quantisers.values()] + list(norms.values())
        others = [p for p in made.parameters() if not any(p is w for w in weights)]
        groups = [g for g in ((weights, self.weight_rate()), (others, c.scale_rate)) if g[0]]
        optimizer = torch.optim.AdamW([{"params": p, "lr": rate} for p, rate in groups], weight_decay=0.0)
        steps, step = c.epochs * sum(1 for _ in self._batches(job, training=True)), 0

        def loss(x_BTD: Tensor, rotation: Any, y_BTD: Tensor) -> Tensor:
            state = {f"{name}.weight": q() for name, q in quantisers.items()} | norms
            return F.mse_loss(torch.func.functional_call(job.block, state, (x_BTD, rotation, DenseAttend())), y_BTD)

        def validation() -> float:
            made.eval()
            return sum(float(loss(*batch)) for batch in self._batches(job, training=False))

        best, kept = validation(), _snapshot(made)
        for _ in range(c.epochs):
            made.train()
            for batch in self._batches(job, training=True):
                for group, (_, rate) in zip(optimizer.param_groups, groups, strict=True):
                    group["lr"] = rate * decay(step, steps)
                with torch.enable_grad():
                    value = loss(*batch)
                    optimizer.zero_grad()
                    value.backward()
                optimizer.step()
                step += 1
            if (reached := validation()) < best:
                best, kept = reached, _snapshot(made)
        made.load_state_dict(kept)

    def _batches(self, job: BlockJob, training: bool) -> Iterator[tuple[Tensor, Any, Tensor]]:
        """(x_BTD of the compressed model, rotation, y_BTD of the original one); every `heldout`-th sequence is for
        validation, and with fewer sequences all are for both."""
        count, number = len(self.tokens_NT) if self.tokens_NT is not None else 0, 0
        for (x_BTD, rotation), y_BTD in zip(job.inputs(), job.outputs(), strict=True):
            rows = torch.arange(number, number + len(x_BTD)) % self.config.heldout == self.config.heldout - 1
            number += len(x_BTD)
            wanted = (rows != training) if count >= self.config.heldout else torch.ones_like(rows)
            for part in wanted.nonzero()[:, 0].split(self.config.batch):
                yield x_BTD[part], rotation, y_BTD[part]


def decay(step: int, steps: int) -> float:
    """Of the learning rate: a cosine from 1 to `FINAL_RATE`."""
    return FINAL_RATE + (1 - FINAL_RATE) * (1 + math.cos(math.pi * step / steps)) / 2


def _snapshot(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}
