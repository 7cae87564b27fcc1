"""Reference tests of the low-memory optimizers: the papers' equations in float64, and the package of one paper."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import zlib

import numpy as np
import pytest
import torch
from torch import nn

from modicum.core import registry
from modicum.core.errors import ModicumError, UserError
from modicum.train.optimizers import _lowrank, _quantised
from modicum.train.optimizers._moments import Adam

NAME = "layers.0.q.weight"


def _optimizer(choice: str, named: dict[str, nn.Parameter], lr: float = 0.05):
    return registry.build("optimizer", choice, list(named.items()), lr=lr)


def _matrix(*shape: int, seed: int = 0) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(seed)))


def _grads(steps: int, *shape: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=generator) for _ in range(steps)]


def _svd(g: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Singular vectors with the signs that float32 gives them: moments of an old basis meet those of a new one."""
    u, _, vh = torch.linalg.svd(torch.from_numpy(g).float(), full_matrices=False)
    return u.double().numpy(), vh.double().numpy()


def _walk(optimizer, p: nn.Parameter, grads, factor: float = 1.0) -> None:
    for g in grads:
        p.grad = g.clone()
        optimizer.step({"lr": factor})


class NaiveAdam:
    """The ratio of the moments, float64."""

    def __init__(self, b1: float, b2: float, eps: float):
        self.b1, self.b2, self.eps, self.m, self.v, self.t = b1, b2, eps, 0.0, 0.0, 0

    def __call__(self, g):
        self.t += 1
        self.m = self.b1 * self.m + (1 - self.b1) * g
        self.v = self.b2 * self.v + (1 - self.b2) * g * g
        return self.m / (1 - self.b1**self.t) / (np.sqrt(self.v / (1 - self.b2**self.t)) + self.eps)


# --- 8 bits -----------------------------------------------------------------------------------------------


def _decoded(byte: int, signed: bool) -> float:
    """What a byte of the dynamic tree type stands for, read bit by bit."""
    bits = f"{byte:08b}"
    sign, rest = (-1.0 if bits[0] == "1" else 1.0, bits[1:]) if signed else (1.0, bits)
    zeros = len(rest) - len(rest.lstrip("0"))
    if zeros == len(rest):
        return 0.0 if sign > 0 else 1.0  # the two patterns without an indicator bit
    if zeros == 7:
        return 1.0
    fraction = rest[zeros + 1 :]
    bins = 2 ** len(fraction)
    return sign * 10.0**-zeros * (0.1 + 0.9 * (int(fraction or "0", 2) + 0.5) / bins)


@pytest.mark.parametrize("signed", [True, False])
def test_code_points_are_those_of_the_dynamic_type(signed):
    expected = sorted(_decoded(byte, signed) for byte in range(256))
    assert _quantised.code_points(signed) == pytest.approx(expected, rel=1e-12)


def _nearest(x: np.ndarray, block: int, signed: bool) -> np.ndarray:
    """A matrix after encoding and decoding, value by value."""
    points = np.array(sorted(_decoded(byte, signed) for byte in range(256)))
    out = np.zeros_like(x)
    for r in range(x.shape[0]):
        for first in range(0, x.shape[1], block):
            part = x[r, first : first + block]
            top = np.abs(part).max() or 1.0
            out[r, first : first + block] = top * points[np.abs(part[:, None] / top - points).argmin(1)]
    return out


@pytest.mark.parametrize("signed", [True, False])
def test_quantising_takes_the_nearest_point(signed):
    x = torch.randn(5, 21, generator=torch.Generator().manual_seed(0)) ** 3
    x = x if signed else x.abs()
    x[2] = 0.0
    codes, scales = _quantised.quantise(x, 8, signed)
    assert codes.dtype == torch.uint8 and codes.shape == (5, 21) and scales.shape == (5, 3)
    back = _quantised.dequantise(codes, scales, 8, signed).numpy()
    np.testing.assert_allclose(back, _nearest(x.double().numpy(), 8, signed), rtol=1e-5, atol=1e-12)


def test_adamw_8bit_follows_its_equation():
    p, grads = _matrix(6, 20), _grads(5, 6, 20)
    w = p.detach().double().numpy()
    _walk(_optimizer("adamw-8bit:block=8,weight_decay=0.2", {NAME: p}), p, grads, 0.5)
    m = v = np.zeros((6, 20))
    for t, g in enumerate((g.double().numpy() for g in grads), 1):
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g
        w = w - 0.025 * 0.2 * w - 0.025 * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.95**t)) + 1e-8)
        m, v = _nearest(m, 8, True), _nearest(v, 8, False)
    np.testing.assert_allclose(p.detach().numpy(), w, atol=1e-5)


def test_adamw_8bit_holds_a_quarter_and_stays_near_adamw():
    low, high = _matrix(64, 256), _matrix(64, 256)
    small, large = _optimizer("adamw-8bit", {NAME: low}, 1e-2), _optimizer("adamw", {NAME: high}, 1e-2)
    target = torch.ones(64, 256)
    generator = torch.Generator().manual_seed(2)
    for _ in range(60):
        noise = torch.randn(64, 256, generator=generator)
        for p, optimizer in ((low, small), (high, large)):
            p.grad = p.detach() - target + noise
            optimizer.step({"lr": 1.0})
    assert small.state_bytes() < 0.26 * large.state_bytes()
    moved = float((high.detach() - _matrix(64, 256).detach()).norm())
    assert float((low - high).detach().norm()) < 0.1 * moved


def test_slices_do_not_change_the_result(monkeypatch):
    from modicum.train.optimizers import adamw_8bit

    one, many = _matrix(30, 8), _matrix(30, 8)
    _walk(_optimizer("adamw-8bit", {NAME: one}), one, _grads(3, 30, 8))
    monkeypatch.setattr(adamw_8bit, "SLICE", 7 * 8)
    _walk(_optimizer("adamw-8bit", {NAME: many}), many, _grads(3, 30, 8))
    assert torch.equal(one, many)


def test_embeddings_keep_float32_moments_unless_told():
    named = {"embed.weight": _matrix(8, 4), NAME: _matrix(4, 4), "norm.weight": _matrix(4)}
    for knobs, wide in (("", {"embed.weight", "norm.weight"}), (":embedding_bits=8", {"norm.weight"})):
        optimizer = _optimizer("adamw-8bit" + knobs, named)
        for p in named.values():
            p.grad = torch.ones_like(p)
        optimizer.step({"lr": 1.0})
        kept = {n for n in named if optimizer.state_dict()[f"{n}:exp_avg"].dtype == torch.float32}
        assert kept == wide


# --- galore -----------------------------------------------------------------------------------------------


def _galore_naive(w, grads, rank, gap, scale, lr, decay=0.0):
    """Algorithm 2 with a projector by shape, float64."""
    adam, right = NaiveAdam(0.9, 0.999, 1e-6), w.shape[0] >= w.shape[1]
    for t, g in enumerate(grads):
        if t % gap == 0:
            u, vh = _svd(g)
        basis = vh[:rank].T if right else u[:, :rank]
        ratio = adam(g @ basis if right else basis.T @ g)
        w = w * (1 - lr * decay) - lr * scale * (ratio @ basis.T if right else basis @ ratio)
    return w


@pytest.mark.parametrize("shape", [(12, 8), (8, 12), (8, 8)])
def test_galore_follows_its_algorithm(shape):
    p, grads = _matrix(*shape), _grads(7, *shape)
    expected = _galore_naive(p.detach().double().numpy(), [g.double().numpy() for g in grads], 3, 3, 0.25, 0.025, 0.1)
    optimizer = _optimizer("galore:rank=3,gap=3,weight_decay=0.1", {NAME: p})
    _walk(optimizer, p, grads, 0.5)
    np.testing.assert_allclose(p.detach().numpy(), expected, atol=2e-6)
    side = "right" if shape[0] >= shape[1] else "left"
    assert f"{NAME}:{side}" in optimizer.state_dict()
    assert optimizer.state_dict()[f"{NAME}:exp_avg"].numel() == 3 * max(shape)


def test_galore_with_an_identity_projector_is_adamw(monkeypatch):
    def identity(method, name, g, k, sides="one"):
        (side,) = _lowrank.one_side(tuple(g.shape))
        return {side: torch.eye(k)}

    monkeypatch.setattr(_lowrank, "bases", identity)
    for shape in ((12, 8), (8, 12)):
        named = [{NAME: _matrix(*shape), "embed.weight": _matrix(5, 4)} for _ in range(2)]
        knobs = "beta1=0.8,beta2=0.9,eps=1e-7,weight_decay=0.3"
        pair = (
            _optimizer(f"galore:rank=1.0,scale=1.0,gap=2,{knobs}", named[0]),
            _optimizer(f"adamw:{knobs}", named[1]),
        )
        for g, h in zip(_grads(6, *shape), _grads(6, 5, 4), strict=True):
            for optimizer, parameters in zip(pair, named, strict=True):
                parameters[NAME].grad, parameters["embed.weight"].grad = g.clone(), h.clone()
                optimizer.step({"lr": 1.0})
        for name in named[0]:
            torch.testing.assert_close(named[0][name], named[1][name], rtol=1e-5, atol=1e-6)


def _reference_package():
    """galore_torch.adamw, without the package's __init__, which needs bitsandbytes."""
    spec = importlib.util.find_spec("galore_torch")
    if spec is None:
        pytest.skip("galore-torch is not installed")
    try:
        return importlib.import_module("galore_torch.adamw")
    except ImportError:
        sys.modules["galore_torch"] = importlib.util.module_from_spec(spec)
        return importlib.import_module("galore_torch.adamw")


def test_galore_walks_as_its_authors_package():
    """A small network's own gradients: an error would feed back into them."""
    reference = _reference_package()

    def network() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(12, 24), nn.Tanh(), nn.Linear(24, 12), nn.LayerNorm(12))

    nets = [network(), network()]
    matrices = [p for p in nets[0].parameters() if p.ndim == 2]
    vectors = [p for p in nets[0].parameters() if p.ndim == 1]
    theirs = reference.AdamW(
        [
            {"params": vectors},
            {"params": matrices, "rank": 4, "update_proj_gap": 5, "scale": 0.25, "proj_type": "std"},
        ],
        lr=0.02,
        eps=1e-10,
        no_deprecation_warning=True,
    )
    ours = _optimizer("galore:rank=4,gap=5,eps=1e-10", dict(nets[1].named_parameters()), 0.02)
    generator, losses = torch.Generator().manual_seed(3), []
    for _ in range(16):
        x, y = torch.randn(32, 12, generator=generator), torch.randn(32, 12, generator=generator)
        row = []
        for net, step in zip(nets, (theirs.step, lambda: ours.step({"lr": 1.0})), strict=True):
            net.zero_grad()
            loss = (net(x) - y.roll(1, 1) * x).square().mean()
            loss.backward()
            step()
            row.append(float(loss.detach()))
        losses.append(row)
    assert all(a == pytest.approx(b, rel=1e-5) for a, b in losses) and losses[-1][0] != losses[0][0]
    for a, b in zip(*(net.parameters() for net in nets), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)


def test_galore_8bit_is_near_float32_with_less_state():
    wide, low = _matrix(64, 128), _matrix(64, 128)
    pair = [_optimizer(f"galore:gap=5,bits={bits}", {NAME: p}) for bits, p in ((32, wide), (8, low))]
    for optimizer, p in zip(pair, (wide, low), strict=True):
        _walk(optimizer, p, _grads(8, 64, 128))
    moved = float((wide - _matrix(64, 128)).detach().norm())
    assert float((wide - low).detach().norm()) < 0.05 * moved
    basis = 4 * 16 * 64
    assert pair[0].state_bytes() == basis + 2 * 4 * 16 * 128
    assert pair[1].state_bytes() == basis + 2 * 16 * 128 + 2 * 4 * 16


def test_head_and_embedding_are_not_projected():
    named = {n: _matrix(8, 8) for n in ("embed.weight", "lm_head.weight", NAME)}
    assert set(_optimizer("galore", named).ranks) == {NAME}


# --- gradnormlorp -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("sides", ["both", "one"])
def test_gradnormlorp_follows_autograd_through_its_parametrisation(sides):
    """W = M (W0 + I J) / |W0 + I J|, differentiated by PyTorch in float64, its factors' gradients projected."""
    rows, columns, r, k, gap, lr, scale = 10, 7, 4, 2, 3, 0.05, 0.5
    p, target = _matrix(rows, columns), _matrix(rows, columns, seed=5).detach()
    # Between two bases of one gradient what is off the diagonal is rounding, which a small eps would blow up.
    knobs = f"rank={r},projection={k},gap={gap},scale={scale},sides={sides},eps=0.01"
    optimizer = _optimizer(f"gradnormlorp:{knobs}", {NAME: p})
    w0 = p.detach().double()
    factors = None
    for t in range(8):
        p.grad = (p.detach() - target) * torch.linspace(0.5, 2, columns)
        optimizer.step({"lr": 1.0})
        if factors is None:  # only J's random start is taken over
            held = optimizer.buffers[NAME]
            generator = torch.Generator().manual_seed(zlib.crc32(NAME.encode()))
            j = torch.empty(r, columns).uniform_(-(columns**-0.5), columns**-0.5, generator=generator)
            torch.testing.assert_close(held["J"], j)  # it has no gradient in the first step
            factors = {
                "M": w0.norm(dim=1, keepdim=True),
                "I": torch.zeros(rows, r, dtype=torch.float64),
                "J": j.double(),
            }
            adams = {f: NaiveAdam(0.9, 0.999, 0.01) for f in factors}
            basis: dict[str, tuple] = {}
        leaves = {f: x.clone().requires_grad_() for f, x in factors.items()}
        v = w0 + leaves["I"] @ leaves["J"]
        w = leaves["M"] * v / v.norm(dim=1, keepdim=True)
        (0.5 * (w - target.double()).square() * torch.linspace(0.5, 2, columns).double()).sum().backward()
        for f, leaf in leaves.items():
            g = leaf.grad.numpy()
            if f == "M":
                factors[f] = factors[f] - lr * torch.from_numpy(adams[f](g))
                continue
            if t % gap == 0 or (f, t) == ("J", 1):
                u, vh = _svd(g)
                left = u[:, :k] if sides == "both" or g.shape[0] < g.shape[1] else np.eye(g.shape[0])
                right = vh[:k] if sides == "both" or g.shape[0] >= g.shape[1] else np.eye(g.shape[1])
                basis[f] = (left, right)
            left, right = basis[f]
            factors[f] = factors[f] - lr * scale * torch.from_numpy(left @ adams[f](left.T @ g @ right.T) @ right)
        v = w0 + factors["I"] @ factors["J"]
        expected = factors["M"] * v / v.norm(dim=1, keepdim=True)
        torch.testing.assert_close(p.detach().double(), expected, rtol=1e-4, atol=2e-5)


def test_gradnormlorp_moves_a_weight_of_zeros():
    p = nn.Parameter(torch.zeros(6, 5))
    optimizer = _optimizer("gradnormlorp:rank=1.0,scale=1.0,gap=5", {NAME: p})
    for _ in range(300):
        p.grad = p.detach() - 1
        optimizer.step({"lr": 1.0})
    assert bool(p.isfinite().all()) and float((p - 1).detach().square().mean()) < 0.1


# --- refactor-reset ---------------------------------------------------------------------------------------


def _pair() -> dict[str, nn.Parameter]:
    return {"layers.0.q.A": _matrix(3, 7), "layers.0.q.B": _matrix(9, 3, seed=1), "norm.weight": _matrix(4)}


def test_refactoring_keeps_the_product_and_balances_the_factors():
    named = _pair()
    a, b, _ = named.values()
    optimizer = _optimizer("refactor-reset:every=3,recovery=1", named, lr=0.0)
    before = (b @ a).detach()
    for _ in range(3):
        for p in named.values():
            p.grad = torch.ones_like(p)
        optimizer.step({"lr": 1.0})
    torch.testing.assert_close((b @ a).detach(), before, rtol=1e-5, atol=1e-5)
    values = torch.diag(torch.linalg.svdvals(before)[:3])
    torch.testing.assert_close(a @ a.T, values, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(b.T @ b, values, rtol=1e-4, atol=1e-4)
    assert optimizer.state_dict() == {"steps": 3}


def test_refactor_reset_walks_as_torch_restarted_by_hand():
    """The product, because singular vectors have no sign of their own; Adam does not see signs."""
    named, twin = _pair(), _pair()
    optimizer = _optimizer("refactor-reset:every=4,recovery=2,weight_decay=0", named)
    target, vector = torch.randn(9, 7, generator=torch.Generator().manual_seed(4)), torch.ones(4)

    def gradients(parameters):
        a, b, n = parameters.values()
        for p in parameters.values():
            p.grad = None
        ((b @ a - target).square().sum() + (n - vector).square().sum()).backward()

    adam = None
    for step in range(11):
        gradients(named)
        optimizer.step({"lr": 0.5})
        if adam is None:
            adam = torch.optim.AdamW(twin.values(), betas=(0.9, 0.95), eps=1e-8, weight_decay=0)
        adam.param_groups[0]["lr"] = 0.05 * 0.5 * (0.5 if step in (4, 8) else 1.0)
        gradients(twin)
        adam.step()
        if step in (3, 7):
            a, b, _ = twin.values()
            u, s, vh = torch.linalg.svd((b @ a).detach())
            with torch.no_grad():
                b.copy_(u[:, :3] * s[:3].sqrt())
                a.copy_(s[:3].sqrt()[:, None] * vh[:3])
            adam = None
    products = [parameters["layers.0.q.B"] @ parameters["layers.0.q.A"] for parameters in (named, twin)]
    torch.testing.assert_close(*products, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(named["norm.weight"], twin["norm.weight"], rtol=1e-5, atol=1e-6)


def test_every_zero_is_adamw_and_only_one_trick_can_be_asked_for():
    runs = {}
    for choice in ("adamw", "refactor-reset:every=0", "refactor-reset:every=2,recovery=1,refactor=false"):
        named = _pair()
        optimizer = _optimizer(choice, named)
        for _ in range(3):
            for p in named.values():
                p.grad = p.detach().sin()
            optimizer.step({"lr": 1.0})
        runs[choice] = torch.cat([p.detach().flatten() for p in named.values()])
    plain, none, reset = runs.values()
    assert torch.equal(plain, none) and not torch.allclose(plain, reset)


# --- errors -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("choice", "told"),
    [
        ("galore:rank=9", r"galore: rank=9 is larger than layers.0.q.weight \(8 x 12\); give rank<=8"),
        ("galore:rank=0", "rank=0 must be a whole number of at least 1"),
        ("galore:rank=1.5", "rank=1.5 must be a whole number"),
        ("galore:gap=0", "gap=0 must be at least 1 step"),
        ("galore:bits=4", "bits=4 must be 8 or 32"),
        ("galore:scale=0", "scale=0.0 must be positive"),
        ("galore:beta2=1", "must lie in"),
        ("gradnormlorp:rank=9", r"gradnormlorp: rank=9 is larger than layers.0.q.weight \(8 x 12\)"),
        ("gradnormlorp:rank=4,projection=5", r"projection=5 is larger than the factors of layers.0.q.weight"),
        ("gradnormlorp:sides=left", "sides='left' must be both or one"),
        ("adamw-8bit:block=0", "block=0 must be at least 1"),
        ("adamw-8bit:embedding_bits=16", "must be 8 or 32"),
        ("refactor-reset", "found no factors"),
        ("refactor-reset:every=5", "recovery=10 must be shorter than every=5"),
        ("refactor-reset:refactor=false,reset=false", "write every=0"),
        ("refactor-reset:factors=[A, A]", "two different endings"),
    ],
)
def test_what_cannot_be_is_refused(choice, told):
    with pytest.raises(UserError, match=told):
        _optimizer(choice, {NAME: _matrix(8, 12)})


def test_factors_larger_than_their_matrix_are_refused():
    with pytest.raises(UserError, match=r"layers.0.q.A has rank 5, larger than its matrix of 9 x 4"):
        _optimizer("refactor-reset", {"layers.0.q.A": _matrix(5, 4), "layers.0.q.B": _matrix(9, 5)})


@pytest.mark.parametrize("key", ["galore", "gradnormlorp"])
def test_a_gradient_that_is_not_finite_has_a_name(key):
    p = _matrix(6, 6)
    p.grad = torch.full((6, 6), float("nan"))
    with pytest.raises(ModicumError, match=f"the gradient of {NAME} has no singular vectors"):
        _optimizer(key, {NAME: p}).step({"lr": 1.0})


def test_moments_in_8_bits_start_at_zero():
    adam = Adam(beta1=0.9, beta2=0.99, eps=1e-8, bits=8, block=4)
    held = adam.fresh((2, 6), torch.device("cpu"))
    for name, signed in (("exp_avg", True), ("exp_avg_sq", False)):
        assert not _quantised.dequantise(held[name], held[f"{name}_scale"], 4, signed).any()
    assert sum(t.nbytes for t in held.values()) == adam.nbytes((2, 6))
