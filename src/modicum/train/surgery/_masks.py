"""What sparse methods share: which weights may be cut, masks that keep them at zero, a global threshold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from modicum.budget.trace import has_data
from modicum.core.errors import UserError
from modicum.model import attach
from modicum.train.engine import TrainEngine
from modicum.train.parallel import Ranks, blocks, local, shard_like
from modicum.train.surgery import Surgery


def prunable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Weights of the trainable linear layers inside the repeated blocks, by parameter name.

    Embeddings, output head, norms and biases stay dense. Raises `UserError` if nothing is left.
    """
    inside = {id(module) for block in blocks(model) for module in block.modules()}
    weights = {id(m.weight) for m in attach.linears(model).values() if id(m) in inside and hasattr(m, "weight")}
    parameters = {name: p for name, p in model.named_parameters() if id(p) in weights and p.requires_grad}
    if not parameters:
        raise UserError(
            f"{type(model).__name__} has no trainable linear layer inside repeated blocks, so no weight can be "
            "cut; train a model with layers, or write surgery=none"
        )
    return parameters


def check_sparsity(sparsity: float) -> None:
    if not 0 < sparsity < 1:
        raise ValueError(
            f"sparsity={sparsity} must lie between 0 and 1, both excluded: 0 cuts nothing (write surgery=none), "
            "1 leaves no weight"
        )


class Masking(Surgery):
    """Keeps the weights marked in `cut` (by name, bool, True: removed) at exactly zero.

    Their gradients are dropped before the norm is taken, so that moments get nothing either, and the weights
    are set to zero after the update, whatever an optimizer or its decay did to them. One byte per prunable
    weight.
    """

    requires = frozenset({"step_gradients"})
    conflicts = frozenset({"linear"})

    def __init__(self, config: Any):
        super().__init__(config)
        self.cut: dict[str, Tensor] = {}
        self.sizes: dict[str, int] = {}  # of the prunable weights, by name

    def prepare(self, model: nn.Module, state: dict[str, Any] | None) -> nn.Module:
        self.sizes = {name: p.numel() for name, p in prunable(model).items()}
        return model

    def start(self, trainer: TrainEngine) -> None:
        self.cut = {name: shard_like(cut, trainer.named[name]) for name, cut in self.cut.items()}

    def before_step(self, trainer: TrainEngine) -> None:
        for name, cut in self.cut.items():
            gradient = trainer.named[name].grad
            if gradient is not None:
                local(gradient).masked_fill_(local(cut), 0.0)

    def after_step(self, trainer: TrainEngine) -> None:
        self.apply(trainer)

    @torch.no_grad()
    def apply(self, trainer: TrainEngine) -> None:
        """Set what is cut to zero, in the model too."""
        for name, cut in self.cut.items():
            local(trainer.named[name]).masked_fill_(local(cut), 0.0)
        if self.cut:
            trainer.write_back()

    def state_dict(self) -> dict[str, Any]:
        return {f"cut:{name}": cut for name, cut in self.cut.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        cut = {key.removeprefix("cut:"): value for key, value in state.items() if key.startswith("cut:")}
        for name, value in cut.items():
            if value.numel() != self.sizes[name]:
                raise RuntimeError(f"the mask of {name} has {value.numel()} entries for {self.sizes[name]} weights")
        self.cut = cut


def bits(weight: Tensor) -> Tensor:
    """|weight| in float32 read as int32: the same order, and integers can be halved exactly."""
    return weight.detach().float().abs().view(torch.int32)


@torch.no_grad()
def smallest(weights: Mapping[str, Tensor], count: int, ranks: Ranks) -> dict[str, Tensor]:
    """Masks (bool, shaped and sharded as `weights`) of the `count` smallest magnitudes over all of them.

    The threshold is the count-th magnitude itself, found by halving the range of its 31 bits: exact, the same
    on any number of processes, without a copy or a sort of the weights. Equal magnitudes go together.
    """
    first = local(next(iter(weights.values())))
    low = torch.zeros((), dtype=torch.int64, device=first.device)
    high = torch.full((), 2**31 - 1, dtype=torch.int64, device=first.device)
    for _ in range(31 if has_data(first) else 1):
        middle = (low + high) // 2
        below = torch.zeros((), dtype=torch.int64, device=first.device)
        for weight in weights.values():
            below += (bits(local(weight)) <= middle).sum()
        enough = ranks.sum(below) >= count
        low, high = torch.where(enough, low, middle + 1), torch.where(enough, middle, high)
    return {name: _like(bits(local(weight)) <= high, weight) for name, weight in weights.items()}


def _like(part: Tensor, weight: Tensor) -> Tensor:
    """This process's part of a mask as a tensor placed as `weight` is."""
    if local(weight) is weight:
        return part
    from torch.distributed.tensor import DTensor

    assert isinstance(weight, DTensor)
    return DTensor.from_local(
        part, weight.device_mesh, weight.placements, run_check=False, shape=weight.shape, stride=weight.stride()
    )
