"""The cost of a PyTorch computation, by running it on fake tensors (no data).

`trace(work)` runs `work()` under fake tensors: every operation runs through autograd and dispatch as it
would for real, allocates nothing, and is counted. Bytes are counted storage by storage, from the
operation that allocates one until Python and autograd release it, so the peak is the peak of the
real program's live tensors, for any linear form, optimizer or memory saver. Not counted:
workspace inside a kernel, and the allocator's fragmentation.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode


@dataclass(frozen=True)
class Traced:
    """peak_bytes: most bytes alive at once; kept_bytes: alive at the end; flops: as PyTorch's counter counts."""

    peak_bytes: int
    kept_bytes: int
    flops: int
    result: Any = None


def has_data(tensor: torch.Tensor) -> bool:
    """False for a tensor without values (meta, or under `trace`), whose contents must not be read."""
    return not tensor.is_meta and not isinstance(tensor, FakeTensor) and not isinstance(tensor.data, FakeTensor)


class Live(TorchDispatchMode):
    """Counts the bytes of all storages made inside, until each is released."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()

    def add(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes()
        self._known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self.add(leaf)
        return out


class _Nowhere:
    """Replaces a counter's module tracker, whose hooks would keep graphs, and with them tensors, alive."""

    parents = frozenset({"Global"})

    def __enter__(self) -> _Nowhere:
        return self

    def __exit__(self, *error: object) -> None:
        pass


def flop_counter() -> FlopCounterMode:
    """PyTorch's counter, without its module tracker."""
    counter = FlopCounterMode(display=False)
    counter.mod_tracker = _Nowhere()  # type: ignore[assignment]
    return counter


def trace(work: Callable[[], Any], device: str = "cpu") -> Traced:
    """Run `work()` without data and report its cost.

    `work` builds everything it needs itself (model, batch, optimizer) so that all of it is counted, and
    must not read tensor values (`.item()`, boolean indexing): such work states its cost by hand.
    """
    with FakeTensorMode(allow_non_fake_inputs=True) as fake, torch.device(device):
        live = Live()
        counter = FlopCounterMode(display=False)
        counter.mod_tracker = _Nowhere()  # type: ignore[assignment]
        with live, counter:
            result = work()
        kept = live.live
        del fake
    return Traced(live.peak, kept, int(counter.get_total_flops()), result)
