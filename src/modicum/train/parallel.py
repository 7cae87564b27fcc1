"""Processes started by torchrun, and FSDP2: who am I, how is a tensor sharded, how is it gathered.

Parallel training shards every parameter by rows over all processes (fully_shard, ZeRO-3). Each process
draws the same global batch from its own stream and keeps rows rank::world, so the data position is the
same everywhere and does not know the number of processes.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from modicum.core.errors import UserError


@dataclass(frozen=True)
class Ranks:
    """This process among those of the run; a single process is rank 0 of 1."""

    rank: int = 0
    world: int = 1

    @property
    def first(self) -> bool:
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Sum over all processes, in place."""
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def agree(self, value: int) -> int:
        """Rank 0's value, on every process."""
        if self.world == 1:
            return value
        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        tensor = torch.tensor([value], dtype=torch.int64, device=device)
        dist.broadcast(tensor, 0)
        return int(tensor.item())

    def wait(self) -> None:
        if self.world > 1:
            dist.barrier()


def current(device: torch.device | None = None) -> Ranks:
    """This process's place; joins the group that torchrun announced in the environment, if there is one."""
    if not dist.is_initialized():
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return Ranks()
        cuda = device is not None and device.type == "cuda"
        if cuda:
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        dist.init_process_group("nccl" if cuda else "gloo")
    return Ranks(dist.get_rank(), dist.get_world_size())


def leave() -> None:
    """Close the process group, if one was joined."""
    if dist.is_initialized():
        dist.destroy_process_group()


def pick_device(name: str) -> torch.device:
    """`auto` means this process's CUDA device where there is one, else the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"device {name!r} is not known; write auto, cpu, cuda or cuda:0") from None
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise UserError(f"device {name!r}: this PyTorch sees no CUDA device; write device=cpu")
        if device.index is None:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return device


class Whole(nn.Module):
    """The model and its loss as one module, so that FSDP2's root sees everything an objective calls."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, objective: Any, batch: Any, step: Any) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        loss = objective.loss(self.model, batch, step)
        return loss.total, loss.count, loss.metrics


def blocks(model: nn.Module) -> list[nn.Module]:
    """The repeated layers of a model: members of its outermost lists of modules."""
    wrapped: list[nn.Module] = []
    for module in model.children():
        members = module if isinstance(module, nn.ModuleList) else blocks(module)
        wrapped += [b for b in members if any(True for _ in b.parameters())]
    return wrapped


def shard(whole: Whole, device: torch.device, dtype: torch.dtype) -> None:
    """Shard in place: each block of the model's layer lists by itself, the rest together.

    Parameters stay float32 and are gathered in `dtype`; gradients are reduced in float32.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(
        param_dtype=None if dtype == torch.float32 else dtype,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,
    )
    for block in blocks(whole.model):
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(whole, mesh=mesh, mp_policy=policy)


def is_sharded(tensor: Tensor) -> bool:
    if not (dist.is_available() and dist.is_initialized()):
        return False  # and DTensor need not be imported, which takes a second
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def local(tensor: Tensor) -> Tensor:
    """This process's shard of a DTensor (sharing its memory); any other tensor as it is."""
    if is_sharded(tensor):
        with torch.no_grad():
            return tensor.to_local()  # type: ignore[attr-defined]
    return tensor


def shard_like(full: Tensor, like: Tensor) -> Tensor:
    """A copy of the whole tensor `full`, placed as `like` is: on its device, sharded if it is a DTensor."""
    if is_sharded(like):
        from torch.distributed.tensor import DTensor, distribute_tensor

        assert isinstance(like, DTensor)
        return distribute_tensor(full.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
    return full.to(like.device, copy=True)


def rows_like(rows: Tensor, like: Tensor) -> Tensor:
    """A tensor with as many rows as `like`, placed as `like` is, of this process's `rows`; else those."""
    if is_sharded(like):
        from torch.distributed.tensor import DTensor

        assert isinstance(like, DTensor)
        shape = torch.Size((like.shape[0], *rows.shape[1:]))
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(rows, like.device_mesh, like.placements, run_check=False, shape=shape, stride=stride)
    return rows


def full(tensor: Tensor) -> Tensor:
    """The whole of a DTensor, on every process, which must all call; any other tensor as it is."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def agreed(value: Tensor, like: Tensor) -> Tensor:
    """Rank 0's `value` where `like` is sharded, so that no rounding sets processes apart; else as it is."""
    if is_sharded(like):
        value = value.contiguous()
        dist.broadcast(value, 0)
    return value


def gather(tensor: Tensor, keep: bool = True) -> Tensor:
    """The whole tensor on the CPU; every process must call. keep=False gives an empty one."""
    tensor = tensor.detach()
    if is_sharded(tensor):
        tensor = tensor.full_tensor()  # type: ignore[attr-defined]
    return tensor.cpu() if keep else tensor.new_empty(0)
