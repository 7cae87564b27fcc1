"""What must hold for any optimizer, on a few small matrices."""

from __future__ import annotations

from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from modicum.core import registry
from modicum.train.callback import join_state, split_state
from modicum.train.optimizers import Optimizer


def _parameters(seed: int = 0) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "embed.weight": (24, 16),
        "layers.0.attention.q.weight": (16, 16),
        "layers.0.mlp.up.weight": (40, 16),
        "layers.0.mlp.down.weight": (16, 40),
        "layers.0.mlp.down.bias": (16,),
        "layers.0.mlp.gate.A": (4, 16),  # factors of one matrix
        "layers.0.mlp.gate.B": (40, 4),
        "norm.weight": (16,),
    }
    return {name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in shapes.items()}


def _make(key: str, named: dict[str, nn.Parameter], lr: float = 1e-2) -> Optimizer:
    loaded = registry.load("optimizer", key)
    return loaded.cls(getattr(loaded.module, "TOY", None) or loaded.config(), list(named.items()), lr=lr)


def _steps(optimizer: Optimizer, named: dict[str, nn.Parameter], first: int, last: int, lr: float = 1.0) -> None:
    """Gradients of half the squared distance to 1, with noise of the step's own."""
    for i in range(first, last):
        scales = {"lr": lr}
        optimizer.begin(scales)
        generator = torch.Generator().manual_seed(i)
        loss = sum(
            (((p - 1) ** 2) / 2 + 0.1 * p * torch.randn(p.shape, generator=generator)).sum() for p in named.values()
        )
        assert isinstance(loss, Tensor)
        loss.backward()
        optimizer.step(scales)
        for p in named.values():
            p.grad = None


def _stored(optimizer: Optimizer) -> dict[str, Any]:
    """The state after a trip through safetensors and JSON."""
    import json

    tensors, values = split_state(optimizer.state_dict())
    stored = save({name: tensor.contiguous() for name, tensor in tensors.items()})
    return join_state(load(stored), json.loads(json.dumps(values)))


def check_places_every_parameter_once(key: str) -> None:
    """Every parameter is in exactly one group; norms, biases and embeddings are without weight decay."""
    named = _parameters()
    groups = _make(key, named).groups(list(named.items()))
    placed = [name for group in groups for name in group.named]
    assert sorted(placed) == sorted(named), f"{key}: groups place {sorted(placed)} of {sorted(named)}"
    for group in groups:
        if group.weight_decay:
            small = [n for n, p in group.named.items() if p.ndim < 2 or n.startswith("embed")]
            assert not small, f"{key}: weight decay acts on {small}"


def check_descends(key: str) -> None:
    """Two hundred steps bring the parameters much nearer to the minimum."""
    named = _parameters()
    before = sum(float(((p.detach() - 1) ** 2).sum()) for p in named.values())
    _steps(_make(key, named, lr=3e-2), named, 0, 200)
    after = sum(float(((p.detach() - 1) ** 2).sum()) for p in named.values())
    assert after < 0.5 * before, f"{key}: squared distance went from {before:.1f} to {after:.1f}"


def check_resumes_bit_for_bit(key: str) -> None:
    """Eight steps equal three steps, a state stored and loaded into a new optimizer, and five more."""
    straight = _parameters()
    _steps(_make(key, straight), straight, 0, 8)
    named = _parameters()
    optimizer = _make(key, named)
    _steps(optimizer, named, 0, 3)
    state = _stored(optimizer)
    again = {name: nn.Parameter(p.detach().clone()) for name, p in named.items()}
    resumed = _make(key, again)
    resumed.load_state_dict(state)
    _steps(resumed, again, 3, 8)
    for name in straight:
        assert torch.equal(straight[name], again[name]), f"{key}: {name} differs after resuming"


def check_state_is_plain(key: str) -> None:
    """The state holds contiguous tensors and JSON values, and loading it gives the same state back."""
    named = _parameters()
    optimizer = _make(key, named)
    _steps(optimizer, named, 0, 2)
    state = _stored(optimizer)
    optimizer.load_state_dict(state)
    again = _stored(optimizer)
    assert state.keys() == again.keys(), f"{key}: loading changed the state's keys"
    for name, value in state.items():
        same = torch.equal(value, again[name]) if isinstance(value, Tensor) else value == again[name]
        assert same, f"{key}: {name} changed by loading"


def check_bytes(key: str) -> None:
    """`state_bytes()` is what the state tensors hold, and `cost` forecasts it to 2%."""
    named = _parameters()
    optimizer = _make(key, named)
    _steps(optimizer, named, 0, 2)
    actual = optimizer.state_bytes()
    predicted = type(optimizer).cost(optimizer.config, {n: tuple(p.shape) for n, p in named.items()}).peak_bytes
    tensors, _ = split_state(optimizer.state_dict())
    summed = sum(t.numel() * t.element_size() for t in tensors.values())
    assert actual == summed, f"{key}: state_bytes() is {actual}, the tensors hold {summed}"
    assert abs(predicted - actual) <= 0.02 * max(actual, 1), (
        f"{key}: cost() says {predicted} bytes, the state holds {actual}"
    )


def check_rate_zero(key: str) -> None:
    """At rate zero nothing moves, weight decay included."""
    named = _parameters()
    _steps(_make(key, named), named, 0, 2, lr=0.0)
    for name, fresh in _parameters().items():
        assert torch.equal(named[name], fresh), f"{key}: {name} moved at rate zero"


def check_leaves_out_what_has_no_gradient(key: str) -> None:
    """A parameter without gradient in a step keeps its value."""
    named = _parameters()
    optimizer = _make(key, named)
    part = {n: p for n, p in named.items() if n != "layers.0.mlp.up.weight"}
    _steps(optimizer, part, 0, 2)
    assert torch.equal(named["layers.0.mlp.up.weight"], _parameters()["layers.0.mlp.up.weight"]), (
        f"{key}: a parameter without gradient moved"
    )
