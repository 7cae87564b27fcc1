"""What must hold for any linear form, on toy matrices.

`check_*` functions take a method's key and are run for every method of the port.
"""

from __future__ import annotations

import copy
import dataclasses
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from modicum.core import registry
from modicum.core.callback import step_with_factors
from modicum.core.choice import Choice
from modicum.model import attach, form_state
from modicum.model.linear import LinearForm, unique_tensors
from modicum.model.linear._adapter import Adapter
from modicum.model.linear._elastic import Elastic

IN, OUT = 48, 40


def _choice(key: str) -> Choice:
    loaded = registry.load("linear", key, LinearForm)
    toy = getattr(loaded.module, "TOY", loaded.config())
    return Choice("linear", key, dataclasses.asdict(toy))


def _model(seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """Two linear layers, one with a bias; wide enough for every toy knob."""
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Linear(IN, OUT, bias=True), nn.Tanh(), nn.Linear(OUT, IN, bias=False))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.to(dtype)


def _attached(key: str, model: nn.Module) -> dict[str, LinearForm]:
    calibration = {"0": _inputs(64, IN), "2": _inputs(64, OUT)}
    generator = torch.Generator().manual_seed(1)
    return attach.attach(model, {"*": _choice(key)}, calibration=calibration, generator=generator)


def _inputs(*sizes: int) -> Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(2))


def _train(key: str, model: nn.Module, forms: dict[str, LinearForm], steps: int) -> None:
    optimizer = torch.optim.SGD([p for f in forms.values() for p in f.trainable()], lr=0.05)
    x, target = _inputs(32, IN), _inputs(32, IN).flip(0)
    callbacks = attach.callbacks(model).values()
    loop = SimpleNamespace(
        named=dict(model.named_parameters()), steps_done=0, config=SimpleNamespace(total_steps=steps)
    )
    for _ in range(steps):
        optimizer.zero_grad()
        ((model(x) - target) ** 2).mean().backward()
        for callback in callbacks:
            callback.before_step(loop)
        factors = {name: x for callback in callbacks for name, x in callback.step_factors(loop).items()}
        step_with_factors(optimizer.step, loop.named, factors)
        loop.steps_done += 1
        for callback in callbacks:
            callback.after_step(loop)


def _trained(key: str) -> tuple[nn.Module, dict[str, LinearForm]]:
    model = _model()
    forms = _attached(key, model)
    if any(form.trainable() for form in forms.values()):
        _train(key, model, forms, 3)
    return model.eval(), forms


def check_words_agree_with_the_protocol(key: str) -> None:
    """What `core.compose` reads as words is what the class is, and `fit` is exactly what has an error bound."""
    cls = registry.load("linear", key, LinearForm).cls
    for word, protocol in (("adapter", Adapter), ("elastic", Elastic)):
        assert (word in cls.provides) == issubclass(cls, protocol), f"{key}: {word} and {protocol.__name__} disagree"
    assert ("fit" in cls.provides) == (cls.fit_error is not None), f"{key}: fit_error=None means that it starts afresh"
    assert ("trainable" in cls.provides) == any(form.trainable() for form in _attached(key, _model()).values())


def check_any_number_of_blocks_is_a_weight(key: str) -> None:
    """Of an elastic form, each block brings the weight nearer, blocks have the bytes they say, and what is dropped
    can be put back."""
    for form in _attached(key, _model()).values():
        if not isinstance(form, Elastic):
            continue
        blocks, whole = form.loaded, form.dense().clone()
        assert form.available == blocks > 1
        stored = [getattr(form, f"block_{i}").clone() for i in range(blocks)]
        assert [block.nbytes for block in stored] == [form.block_nbytes(i) for i in range(blocks)]
        total, errors = torch.zeros_like(whole), []
        for n in range(1, blocks + 1):
            form.set_layout({"blocks": n})
            for i in range(n):
                getattr(form, f"block_{i}").copy_(stored[i])
            total = total + form.block_weight(n - 1).to(total.dtype)
            torch.testing.assert_close(form.dense(), total, atol=1e-5, rtol=1e-5)
            errors.append((whole - total).norm().item())
            form.set_layout({"blocks": n - 1 or 1})
        assert errors == sorted(errors, reverse=True), f"{key}: a further block takes the weight further away"
        assert form.available == blocks, f"{key}: dropping blocks forgot how many there are"


def check_dense_agrees_with_forward(key: str) -> None:
    """forward(x) = x dense()^T + b, before and after some training, in any leading shape."""
    _, forms = _trained(key)
    for form in forms.values():
        if "merge" not in form.provides:
            continue
        x = _inputs(2, 3, form.in_features)
        bias = form.bias_value()
        expected = x @ form.dense().detach().T + (0 if bias is None else bias.detach())
        with torch.no_grad():
            got = form(x)
        assert got.shape == (2, 3, form.out_features), f"{key}: forward gave shape {tuple(got.shape)}"
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
        index = torch.tensor([[0, 5], [OUT - 1, 5]])
        torch.testing.assert_close(form.rows(index).detach(), form.dense().detach()[index])


def check_starts_at_the_fitted_weight(key: str) -> None:
    """After attaching, the model computes what it did, up to the error the method declares."""
    model = _model()
    before = copy.deepcopy(model)
    forms = _attached(key, model)
    for name, form in forms.items():
        if form.fit_error is None:
            continue
        layer: Any = before.get_submodule(name)
        weight = layer.weight
        if "merge" in form.provides:
            error = ((form.dense() - weight).norm() / weight.norm()).item()
            assert error <= form.fit_error + 1e-6, f"{key}: fitted with error {error:.4f} > {form.fit_error}"
        x = _inputs(16, form.in_features)
        expected = layer(x).detach()
        error = ((form.eval()(x).detach() - expected).norm() / expected.norm()).item()
        assert error <= 2 * form.fit_error + 1e-6, f"{key}: the layer's output changed by {error:.4f}"


def check_only_trainable_requires_grad(key: str) -> None:
    """Gradients reach x and exactly the `trainable()` parameters; the rest of a form never changes."""
    model = _model()
    forms = _attached(key, model)
    wanted = {id(p) for form in forms.values() for p in form.trainable()}
    if any(isinstance(form, Adapter) for form in forms.values()):
        have = {id(p) for p in model.parameters() if p.requires_grad}
        assert have == wanted, f"{key}: an adapter must leave exactly its trainable() requiring gradients"
    x = _inputs(4, IN).requires_grad_()
    model(x).square().mean().backward()
    assert x.grad is not None and x.grad.abs().sum() > 0, f"{key}: no gradient reaches the input"
    frozen = {n: t.clone() for n, t in model.state_dict(keep_vars=True).items() if id(t) not in wanted}
    if wanted:
        _train(key, model, forms, 2)
    after = model.state_dict()
    for name, tensor in frozen.items():
        assert torch.equal(tensor, after[name]), f"{key}: frozen tensor {name} changed in training"


def check_gradient_of_input(key: str) -> None:
    """dL/dx is that of the dense layer with the same weight."""
    _, forms = _trained(key)
    for form in forms.values():
        if "merge" not in form.provides:
            continue
        x = _inputs(5, form.in_features).requires_grad_()
        upstream = _inputs(5, form.out_features)
        form(x).backward(upstream)
        assert x.grad is not None
        torch.testing.assert_close(x.grad, upstream @ form.dense().detach(), atol=1e-5, rtol=1e-5)


def check_state_round_trip(key: str) -> None:
    """describe + form_state, restored into a fresh model, compute bit for bit the same."""
    import json

    model, _ = _trained(key)
    description = json.loads(json.dumps(form_state.describe(model)))
    tensors = {name: tensor.clone() for name, tensor in form_state.form_state(model).items()}
    other = _model(seed=9)
    form_state.restore(other, description)
    form_state.load_form_state(other, tensors)
    other.eval()
    x = _inputs(7, IN)
    with torch.no_grad():
        assert torch.equal(model(x), other(x)), f"{key}: outputs differ after save and load"
    assert form_state.describe(other) == form_state.describe(model), f"{key}: description changed"


def check_nbytes_is_what_is_stored(key: str) -> None:
    """nbytes() equals the bytes of the tensors in a safetensors file, which holds nothing twice."""
    from safetensors.torch import load, save

    _, forms = _trained(key)
    for form in forms.values():
        written = load(save({n: t.contiguous() for n, t in unique_tensors(form).items()}))
        stored = sum(t.nbytes for t in written.values())
        assert form.nbytes() == stored, f"{key}: nbytes() says {form.nbytes()}, stored are {stored}"


def check_merge(key: str) -> None:
    """Merged into plain layers, the model computes the same; without `merge` it says so."""
    from modicum.core.errors import UserError

    model, forms = _trained(key)
    x = _inputs(6, IN)
    with torch.no_grad():
        expected = model(x)
        if not all("merge" in form.provides for form in forms.values()):
            try:
                attach.merge(model)
            except UserError:
                return
            raise AssertionError(f"{key}: merging a form without `merge` must be a UserError")
        attach.merge(model)
        assert all(type(model.get_submodule(name)) is nn.Linear for name in forms)
        torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-5)


def check_settles_into_the_same(key: str) -> None:
    """What is kept once training is over computes what was trained, with no more bytes."""
    model, forms = _trained(key)
    x, before = _inputs(6, IN), sum(form.nbytes() for form in forms.values())
    with torch.no_grad():
        expected = model(x)
        kept = attach.settle(model)
        torch.testing.assert_close(model(x), expected, atol=1e-6, rtol=1e-5)
    assert kept.keys() == forms.keys(), f"{key}: settling lost or gained forms"
    assert sum(form.nbytes() for form in kept.values()) <= before, f"{key}: what is kept is larger"
    ended = [form.settled() is form for form in kept.values() if isinstance(form, Adapter)]
    assert all(ended), f"{key}: settling does not end"
    form_state.restore(_model(seed=9), form_state.describe(model) or {})


def check_other_dtypes(key: str) -> None:
    """In bfloat16 the form answers in bfloat16, near its float32 answer, and stored formats survive `.to`."""
    model, forms = _trained(key)
    kept = {(n, s): getattr(f, s).clone() for n, f in forms.items() for s in f.stored}
    x = _inputs(4, IN)
    with torch.no_grad():
        expected = model(x)
        model.to(torch.bfloat16)
        got = model(x.bfloat16())
    assert got.dtype == torch.bfloat16, f"{key}: bfloat16 inputs gave {got.dtype}"
    error = ((got.float() - expected).norm() / expected.norm()).item()
    assert error < 0.03, f"{key}: bfloat16 output differs by {error:.3f}"
    for (name, stored), before in kept.items():
        after = getattr(forms[name], stored)
        assert after.dtype == before.dtype and torch.equal(after, before), f"{key}: .to() changed {stored}"
