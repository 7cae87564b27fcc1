"""A model with what trains it: placement, gradients of a batch, an update. No data, no files.

`TrainEngine` is the part of a run that touches tensors alone. The loop drives it; a planner traces it on
tensors without data (`train.forecast`) to learn what it will need.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from modicum.core import registry
from modicum.core.callback import step_with_factors
from modicum.core.errors import UserError
from modicum.data.stream import Batch
from modicum.model import attach
from modicum.train import parallel
from modicum.train.callback import Callback
from modicum.train.config import TrainConfig, check_combination, training_ports
from modicum.train.forms import Forms, with_form
from modicum.train.objectives import Objective, Step
from modicum.train.optimizers import Optimizer
from modicum.train.precision import Masters
from modicum.train.schedules import Schedule
from modicum.train.surgery import Surgery


class TrainEngine:
    """`named` are the weights that the optimizer works on: float32 masters, shards, or the parameters."""

    optimizer: Optimizer
    whole: parallel.Whole
    named: dict[str, Tensor]

    def __init__(self, model: nn.Module, config: TrainConfig, parts: Mapping[str, Callback] | None = None):
        shape = getattr(model, "config", None)
        config = config.for_width(getattr(shape, "width", 1000))
        self.model, self.config, self.lr = with_form(model, config), config, float(config.lr or 0)
        self.device = parallel.pick_device(config.device)
        self.ranks = parallel.current(self.device)
        self.extra = dict(parts or {})
        if taken := {"model", "forms", *training_ports()} & self.extra.keys():
            raise UserError(f"a part cannot be named {sorted(taken)[0]!r}; choose another name")
        self.extra |= {"forms": Forms(self.model)} | attach.callbacks(self.model) if attach.forms(self.model) else {}
        check_combination(config, self.ranks.world, self.extra)
        self.objective: Objective = config.build("objective")
        self.schedule: Schedule = config.build("schedule")
        self.surgery: Surgery = config.build("surgery")
        self.others: dict[str, Callback] = {}  # methods of the ports that the loop asks for nothing but their hooks
        for name, info in training_ports().items():
            if info.several:
                self.others |= {f"{name}.{c.method}": registry.build(name, c) for c in config.choices(name)}
            elif name not in ("optimizer", "objective", "schedule", "surgery"):
                self.others[name] = config.build(name)
        self.masters: Masters | None = None
        self.steps_done = 0
        self.row_flops = 0.0  # forward and backward of one sequence, every weight multiplied
        self.parameters = 0

    @property
    def parts(self) -> dict[str, Callback]:
        """Everything with hooks and state, by the name its state is saved under."""
        own: dict[str, Callback] = {
            "optimizer": self.optimizer,
            "objective": self.objective,
            "schedule": self.schedule,
            "surgery": self.surgery,
        }
        return own | self.others | self.extra

    def build(self, saved: Callable[[str], dict[str, Any]] | None = None) -> None:
        """Let the parts prepare the model (`saved(name)`: their states, when resumed), then `bind` it."""
        for name, part in {**self.extra, **self.others, "surgery": self.surgery}.items():
            self.model = part.prepare(self.model, saved(name) if saved else None)
        self.bind(self.model)

    def bind(self, model: nn.Module) -> None:
        """Place `model` (device, dtype, shards) and build an optimizer over what it trains."""
        dtype = getattr(torch, self.config.dtype)
        sharded = self.ranks.world > 1
        if self.masters:
            self.masters.release()
        self.masters, self.model, self.whole = None, model, parallel.Whole(model)
        for p in model.parameters():
            if p.is_floating_point():
                p.data = p.data.to(torch.float32 if sharded else dtype)
        if any(t.device.type != self.device.type for t in (*model.parameters(), *model.buffers())):
            model.to(self.device)
        if self.config.compile:
            for block in parallel.blocks(model):
                block.compile()
        if sharded:
            parallel.shard(self.whole, self.device, dtype)
        trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if dtype != torch.float32 and self.config.masters and not sharded:
            self.masters = Masters(trainable)
        self.named = dict(self.masters.named if self.masters else trainable)
        self._names = {id(p): name for name, p in trainable.items()}
        self.optimizer = self.config.build("optimizer", self.named.items(), lr=self.lr)
        self.row_flops = 3 * flops_per_token(model, self.config.sequence_length) * self.config.sequence_length
        self.parameters = sum(p.numel() for p in model.parameters())
        self.whole.train()

    @torch.no_grad()
    def replace(
        self,
        model: nn.Module,
        optimizer_state: dict[str, Any] | None = None,
        weights: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Go on with another model (grown, pruned); `optimizer_state` is for its parameters.

        `weights`: whole tensors for its trainable parameters by name, in the precision of `named` (float32
        masters would otherwise begin from what the model holds in its own dtype).
        """
        self.bind(model)
        if weights is not None:
            for name, target in self.named.items():
                target.copy_(parallel.shard_like(weights[name].to(target.dtype), target))
            self.write_back()
        if optimizer_state is not None:
            self.optimizer.load_state_dict(optimizer_state)

    def release(self) -> None:
        """Take off the model what collects its gradients."""
        if self.masters:
            self.masters.release()

    def write_back(self) -> None:
        """Put changed `named` weights into the model (bf16 follows its masters)."""
        if self.masters:
            self.masters.write_back()

    def saved_tensors(self) -> dict[str, Tensor]:
        """What a checkpoint keeps of the model: trainable weights, and buffers of the modules that hold some.

        A frozen base under an adapter is not written again: it comes from its own folder.
        """
        kept = self.model.state_dict().keys()
        buffers = {
            f"{path}.{name}" if path else name: b
            for path, module in self.model.named_modules()
            if any(p.requires_grad for p in module.parameters())
            for name, b in module.named_buffers(recurse=False)
        }
        return self.named | {name: b for name, b in buffers.items() if name in kept}

    @torch.no_grad()
    def load_tensors(self, saved: Iterable[tuple[str, Tensor]], where: object) -> None:
        """Read (name, whole tensor) pairs of `saved_tensors`. Raises `UserError` if they do not fit."""
        targets = self.saved_tensors()
        missing = set(targets)
        for name, value in saved:
            target = targets.get(name)
            if target is None or target.shape != value.shape:
                have = "absent" if target is None else tuple(target.shape)
                raise UserError(
                    f"{where} is of another model: {name} is {tuple(value.shape)} there and {have} "
                    "here; give the same model, or another folder"
                )
            target.copy_(parallel.shard_like(value.to(target.dtype), target))
            missing.discard(name)
        if missing:
            raise UserError(
                f"{where} is of another model: it lacks {min(missing)}; give the same model, or another folder"
            )
        self.write_back()

    def gradients(self, batch: Batch, targets: int, at: Step) -> tuple[Tensor, dict[str, Tensor]]:
        """Gradients of (summed loss / `targets`) into `.grad`, over this process's rows of the global batch.

        Returns this process's [loss sum, count], float64, and the sums of the objective's metrics. Reads no
        tensor's value, so that it can be traced without data.
        """
        mine = batch.rows(self.ranks.rank, self.ranks.world)
        rows = len(mine)
        if self.config.micro_batch:  # as many tokens, in rows of any length
            rows = max(self.config.micro_batch * self.config.sequence_length // mine.tokens_BT.shape[1], 1)
        sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        metrics: dict[str, Tensor] = {}
        for micro, start in enumerate(range(0, len(mine), rows)):
            part = mine.slice(start, start + rows).to(self.device, non_blocking=True)
            step = Step(at.index, at.done, at.total, at.seed, self.ranks.rank, micro)
            with contextlib.ExitStack() as around:
                for hook in self.parts.values():
                    around.enter_context(hook.around(self))
                total, count, more = self.whole(self.objective, part, step)
                # FSDP2 averages gradients over processes; the sum is wanted.
                (total * (self.ranks.world / targets)).backward()
            sums += torch.stack([total.detach().double(), count.double()])
            for name, value in more.items():
                metrics[name] = metrics.get(name, 0.0) + value.detach().double()
        return sums, metrics

    def gradient(self, parameter: nn.Parameter) -> Tensor | None:
        """The summed gradient of one of the model's parameters: its master's, under bf16 training."""
        name = self._names.get(id(parameter))
        return None if name is None else self.named[name].grad

    def before_step(self) -> None:
        """Let the parts see and change the summed gradients."""
        for part in self.parts.values():
            part.before_step(self)

    def norm(self) -> Tensor:
        """Global 2-norm of the gradients, float32, over all processes."""
        grads = [g for g in (parallel.local(p.grad) for p in self.named.values() if p.grad is not None) if g.numel()]
        square = torch.zeros((), device=self.device)
        if grads:
            square = torch.stack(list(torch._foreach_norm(grads, 2, dtype=torch.float32))).square().sum()
        return self.ranks.sum(square + self.optimizer.spent()).sqrt()

    def update(self, scales: Mapping[str, float], factor: float = 1.0) -> None:
        """Multiply the gradients by `factor`, let the optimizer step, and drop the gradients."""
        if factor != 1.0:
            grads = [parallel.local(p.grad) for p in self.named.values() if p.grad is not None]
            if grads:
                torch._foreach_mul_(grads, factor)
        factors: dict[str, Tensor] = {}
        for part in self.parts.values():
            factors |= part.step_factors(self)
        step_with_factors(lambda: self.optimizer.step(scales), self.named, factors)
        self.write_back()
        self.drop_gradients()

    def drop_gradients(self) -> None:
        for p in self.named.values():
            p.grad = None


def flops_per_token(model: nn.Module, length: int) -> float:
    """Forward FLOPs per token: the decoder's own count, else two per parameter outside embedding tables."""
    count = getattr(getattr(model, "config", None), "flops_per_token", None)
    if callable(count):
        return float(count(length))
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    return 2.0 * sum(p.numel() for p in model.parameters() if id(p) not in tables)
