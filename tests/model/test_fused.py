"""The kernels of a training step against float64, and whole models with them against the modules as written."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modicum.core import compiled
from modicum.model import attach, fused, native, sublayers
from modicum.model.attend import DenseAttend
from modicum.model.config import DecoderConfig, llama_like
from modicum.model.decoder import Decoder
from modicum.model.native import products
from modicum.model.norms import RMSNorm
from modicum.model.rope import rotate
from modicum.train.loss import cross_entropy

pytestmark = pytest.mark.skipif(native.library() is None, reason=f"no kernels: {native.reason()}")
DTYPES = pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 5e-6), (torch.bfloat16, 6e-3)])


@pytest.fixture(autouse=True)
def kernels_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "DTYPES", {torch.float32, torch.bfloat16})


@pytest.fixture(params=["native", "haswell", "x86-64"])
def vectors(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: Any) -> None:
    """The kernels of this processor, and those of others that it also runs: vectors of 8 and of 4 floats."""
    if request.param == "native":
        return
    if platform.machine() != "x86_64" or (request.param == "haswell" and "avx2" not in compiled.abilities()):
        pytest.skip("another processor")
    flags = ("-O1", f"-march={request.param}", "-fopenmp", "-shared", "-fPIC")
    loaded, words = native.load(compiled.build(compiled.compiler() or "cc", native.SOURCE, (), flags))
    assert loaded is not None and loaded.modicum_vector() == {"haswell": 8, "x86-64": 4}[request.param], words
    monkeypatch.setattr(native, "library", lambda: loaded)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Numbers that `dtype` can hold."""
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def error(got: Tensor, want: Tensor) -> float:
    return float((got.detach().double() - want.detach()).norm() / want.detach().norm())


def wide(*tensors: Tensor) -> list[Tensor]:
    return [t.detach().double().requires_grad_() for t in tensors]


def gradients(made: Tensor, grad: Tensor, *inputs: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(made, inputs, grad.to(made.dtype)))


# Each kernel against float64 --------------------------------------------------------------------------

each_vector = pytest.mark.usefixtures("vectors")


@each_vector
@DTYPES
@pytest.mark.parametrize("eps", [1e-5, 0.3])
def test_norm(dtype: torch.dtype, tolerance: float, eps: float) -> None:
    """Rows of different lengths beside eps; more rows than one chunk of the weight's gradient."""
    x = normal(2, 170, 48, dtype=dtype) * torch.linspace(0.1, 2, 170)[:, None].to(dtype)
    w, grad = 1 + normal(48, dtype=dtype) / 4, normal(2, 170, 48, dtype=dtype, seed=1)
    X, Wt = wide(x, w)
    want = X * (X.square().mean(-1, keepdim=True) + eps).rsqrt() * Wt
    x, w = x.requires_grad_(), w.requires_grad_()
    made = fused.norm(x, w, eps)
    both = zip((made, *gradients(made, grad, x, w)), (want, *gradients(want, grad.double(), X, Wt)), strict=True)
    assert all(error(*pair) < tolerance for pair in both)


def test_norm_takes_what_passes_beside_it() -> None:
    x, beside, w, grad = normal(5, 32), normal(5, 32, seed=2), 1 + normal(32), normal(5, 32, seed=3)
    out, total = native.norm(x, w, 1e-5, add=beside)
    torch.testing.assert_close(total, x + beside)
    torch.testing.assert_close(out, F.rms_norm(x + beside, (32,), w, 1e-5))
    alone, _ = native.norm_backward(x, w, grad, 1e-5)
    with_add, _ = native.norm_backward(x, w, grad, 1e-5, add=beside)
    assert alone is not None
    torch.testing.assert_close(with_add, alone + beside)


@each_vector
@DTYPES
def test_swiglu(dtype: torch.dtype, tolerance: float) -> None:
    """Also of gate and up that lie side by side, as one projection gives them."""
    both, grad = 2 * normal(7, 96, dtype=dtype), normal(7, 48, dtype=dtype)
    gate, up = (t.requires_grad_() for t in both.chunk(2, -1))
    X, Y = wide(gate, up)
    want = F.silu(X) * Y
    made = fused.swiglu(gate, up)
    pairs = zip((made, *gradients(made, grad, gate, up)), (want, *gradients(want, grad.double(), X, Y)), strict=True)
    assert all(error(*pair) < tolerance for pair in pairs)


@each_vector
@DTYPES
@pytest.mark.parametrize("rotated", [32, 64])
def test_rotation(dtype: torch.dtype, tolerance: float, rotated: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the plain one, forward and back, of a part of each head too; rows with positions of their own."""
    x = normal(2, 9, 3, 64, dtype=dtype).transpose(1, 2).requires_grad_()
    angles = normal(2, 1, 9, rotated // 2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    grad = normal(2, 3, 9, 64, dtype=dtype)
    assert fused.can_rotate(x, cos)
    made = rotate(x, cos, sin)
    (back,) = gradients(made, grad, x)
    (X,) = wide(x)
    monkeypatch.setenv("MODICUM_NATIVE", "0")
    want = rotate(X, cos.double(), sin.double())
    assert error(made, want) < tolerance and error(back, gradients(want, grad.double(), X)[0]) < tolerance


def reference(q: Tensor, k: Tensor, v: Tensor, seen_BTS: Tensor, scale: float) -> Tensor:
    groups = q.shape[1] // k.shape[1]
    scores = (q @ k.repeat_interleave(groups, 1).mT * scale).masked_fill(~seen_BTS[:, None], -torch.inf)
    return scores.softmax(-1) @ v.repeat_interleave(groups, 1)


@each_vector
@DTYPES
@pytest.mark.parametrize(
    ("heads", "groups", "tokens", "size", "window", "documents"),
    [(4, 2, 70, 64, None, True), (3, 3, 33, 32, 5, False), (6, 2, 450, 48, None, True), (2, 1, 150, 16, 40, True)],
)
def test_attention(
    dtype: torch.dtype,
    tolerance: float,
    heads: int,
    groups: int,
    tokens: int,
    size: int,
    window: int | None,
    documents: bool,
) -> None:
    """Documents and windows that begin anywhere, shared heads, odd lengths, more keys than one pass of them."""
    q, k, v = (
        normal(2, tokens, n, size, dtype=dtype, seed=s).transpose(1, 2).requires_grad_()
        for s, n in enumerate((heads, groups, groups))
    )
    grad = normal(2, heads, tokens, size, dtype=dtype, seed=9)
    row = torch.arange(tokens)
    numbers = torch.stack([row // 23, torch.where(row > tokens - 4, -1, row // 41)]) if documents else None
    seen = (row[None, :] <= row[:, None])[None].repeat(2, 1, 1)
    if numbers is not None:
        seen &= numbers[:, :, None] == numbers[:, None, :]
    if window is not None:
        seen &= (row[:, None] - row[None, :] < window)[None]
    first = fused.first_keys(tokens, window, numbers)
    assert first is not None
    Q, K, V = wide(q, k, v)
    want = reference(Q, K, V, seen, 0.3)
    made = fused.attend(q, k, v, first, 0.3)
    pairs = zip((made, *gradients(made, grad, q, k, v)), (want, *gradients(want, grad.double(), Q, K, V)), strict=True)
    assert all(error(*pair) < tolerance for pair in pairs)


def test_documents_that_do_not_lie_one_after_another_are_no_span() -> None:
    assert fused.first_keys(4, None, torch.tensor([[0, 1, 0, 0]])) is None
    first = fused.first_keys(6, None, torch.tensor([[0, 0, 1, 2, 2, -1]]))
    assert first is not None and first.tolist() == [[0, 0, 2, 3, 3, 5]]


@each_vector
@DTYPES
@pytest.mark.parametrize("vocabulary", [16, 101, 3000])
def test_cross_entropy(dtype: torch.dtype, tolerance: float, vocabulary: int) -> None:
    """Targets anywhere, the last of a row that no vector ends with included; rows without loss."""
    logits = 3 * normal(20, vocabulary, dtype=dtype)
    targets = torch.randint(0, vocabulary, (20,), generator=torch.Generator().manual_seed(0))
    targets[3], targets[4], targets[5] = -100, vocabulary - 1, 0
    (L,) = wide(logits)
    want = F.cross_entropy(L, targets, reduction="none", ignore_index=-100)
    (delta,) = torch.autograd.grad(want.sum(), L)
    loss, made = native.cross_entropy(logits, targets)
    torch.testing.assert_close(loss, want.float(), rtol=1e-5, atol=1e-5)
    assert error(made, delta) < tolerance and made[3].abs().max() == 0


@pytest.mark.skipif(not products._may(torch.ones(2, 2).bfloat16()), reason="no products of pairs, or a matrix unit")
@pytest.mark.parametrize(
    ("rows", "outputs", "inputs"), [(128, 16, 16), (129, 48, 80), (331, 176, 64), (4301, 32, 96), (130, 2080, 2096)]
)
def test_products_of_a_layer(rows: int, outputs: int, inputs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that no block divides, an odd number of them, columns that are no multiple of a kernel's; longer sums than
    registers keep; matrices that are parts of wider ones."""
    wide_x, wide_w, wide_g = (
        normal(n, 2 * m, dtype=torch.bfloat16, seed=s)
        for s, (n, m) in enumerate(((rows, inputs), (outputs, inputs), (rows, outputs)))
    )
    x, w, grad = wide_x[:, inputs:], wide_w[:, :inputs], wide_g[:, outputs:]
    calls, kept = [], products._product
    monkeypatch.setattr(products, "_product", lambda kind, *given: calls.append(kind) or kept(kind, *given))
    x, w = x.requires_grad_(), w.requires_grad_()
    made = fused.linear(x, w)
    (X, Wt) = wide(x, w)
    want = X @ Wt.t()
    pairs = zip((made, *gradients(made, grad, x, w)), (want, *gradients(want, grad.double(), X, Wt)), strict=True)
    assert all(error(*pair) < 3e-3 for pair in pairs) and calls == [0, 1, 2]


def test_products_that_kernels_do_not_take_are_the_librarys() -> None:
    """Odd sizes, few rows, columns that are not contiguous."""
    for rows, outputs, inputs in ((200, 17, 33), (3, 32, 32), (200, 24, 30)):
        x, w, grad = (normal(*s, dtype=torch.bfloat16) for s in ((rows, inputs), (outputs, inputs), (rows, outputs)))
        assert torch.equal(products.forward(x, w), x @ w.t())
        assert torch.equal(products.backward(grad, w), grad @ w)
        assert torch.equal(products.weight_gradient(grad, x), grad.t() @ x)
    x = normal(64, 256, dtype=torch.bfloat16).t()
    assert torch.equal(products.forward(x, x[:64]), x @ x[:64].t())


def test_not_a_number_is_seen() -> None:
    logits = normal(2, 40)
    logits[0, 7] = torch.nan
    loss, _ = native.cross_entropy(logits, torch.tensor([1, 1]))
    assert loss.isnan().tolist() == [True, False]


def test_a_target_outside_of_the_vocabulary_is_refused() -> None:
    h, head = normal(1, 4, 16).requires_grad_(), nn.Linear(16, 32, bias=False)
    with pytest.raises(IndexError, match="target 32"):
        cross_entropy(h, torch.tensor([[1, 2, 32, 3]]), head)


def test_results_do_not_depend_on_the_number_of_threads(threads: None) -> None:
    x, w, grad = normal(700, 64).bfloat16(), normal(64), normal(700, 64, seed=1).bfloat16()
    q = normal(2, 4, 90, 32).bfloat16()
    first = torch.zeros(1, 90, dtype=torch.int32)

    def all_of_them() -> list[Tensor]:
        out, lse = native.attention(q, q[:, :2], q[:, 2:], first, 0.2)
        made = native.attention_backward(q, q[:, :2], q[:, 2:], out, lse, q, first, 0.2)
        multiplied = products.forward(x, grad[:96]), products.backward(x, grad[:64]), products.weight_gradient(grad, x)
        return [t for t in (*native.norm_backward(x, w, grad, 1e-5), out, *made, *multiplied) if t is not None]

    torch.set_num_threads(1)
    want = all_of_them()
    torch.set_num_threads(3)
    assert all(torch.equal(a, b) for a, b in zip(all_of_them(), want, strict=True))


# Whole models -----------------------------------------------------------------------------------------


def made(config: DecoderConfig, *forms: str, targets: str = "layers.*") -> Decoder:
    model = Decoder(config, torch.Generator().manual_seed(0)).train()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, RMSNorm):
                module.weight += normal(len(module.weight)) / 5
    for form in forms:
        attach.attach(model, {targets: form}, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            for name, p in model.named_parameters():
                if name.endswith(".B"):
                    p.copy_(normal(*p.shape) / 20)
    return model


def step(model: Decoder, documents: bool = False) -> tuple[float, dict[str, Tensor]]:
    tokens = torch.randint(0, 96, (2, 80), generator=torch.Generator().manual_seed(2))
    numbers = (torch.arange(80) // 17)[None].repeat(2, 1) if documents else None
    model.zero_grad()
    loss, count = cross_entropy(model.hidden(tokens, documents_BT=numbers), tokens.roll(-1, 1), model.head)
    (loss / count).backward()
    return float(loss.detach() / count), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def shape(**more: object) -> DecoderConfig:
    return llama_like(96, 64, 2, 2, 1, **more)  # type: ignore[arg-type]


MODELS = {
    "llama": (lambda: made(shape()), True),
    "window": (lambda: made(shape(window=9)), True),
    "norm of weight plus one": (lambda: made(shape(norm="rms_plus_one")), True),
    "lora": (lambda: made(shape(), "lora:rank=4,alpha=12"), True),
    "lora on some": (lambda: made(shape(), "lora:rank=3", targets="layers.*.[vud]*"), True),
    "recomputed": (lambda: _recomputed(made(shape())), True),
    "norms of heads": (lambda: made(shape(qk_norm="head")), False),
    "biases": (lambda: made(shape(qkv_bias=True)), False),
    "gelu": (lambda: made(shape(activation="gelu_tanh")), False),
    "softcap": (lambda: made(shape(attention_softcap=5.0)), False),
    "lora over int8": (lambda: made(shape(), "int8", "lora:rank=4"), False),
}


def _recomputed(model: Decoder) -> Decoder:
    model.checkpoint_layers = True
    return model


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_a_model_has_the_same_gradients(name: str, documents: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    make, whole = MODELS[name]
    model, halves = make(), []
    kept = sublayers._MlpHalf.apply
    monkeypatch.setattr(sublayers._MlpHalf, "apply", lambda *given: halves.append(1) or kept(*given))
    loss, grads = step(model, documents)
    assert bool(halves) == whole
    monkeypatch.setenv("MODICUM_NATIVE", "0")
    want, wanted = step(model, documents)
    assert loss == pytest.approx(want, rel=1e-6) and grads.keys() == wanted.keys()
    assert max(error(grads[n], wanted[n].double()) for n in wanted) < 2e-5


def test_bfloat16_is_as_near_to_float32_as_the_plain_path(monkeypatch: pytest.MonkeyPatch) -> None:
    model = made(shape()).bfloat16()
    loss, grads = step(model, True)
    monkeypatch.setenv("MODICUM_NATIVE", "0")
    plain, plain_grads = step(model, True)
    want, wanted = step(model.float(), True)
    assert abs(loss - want) < 5e-3
    ours, theirs = (sum(error(g[n], wanted[n].double()) for n in wanted) for g in (grads, plain_grads))
    assert ours < 1.1 * theirs and plain != loss


@pytest.mark.parametrize("watched", ["layers.0.mlp.up", "layers.0.attention", "layers.0.mlp_norm"])
def test_hooks_get_the_modules_as_written(watched: str) -> None:
    model, seen = made(shape()), []
    module = model.get_submodule(watched)
    handle = module.register_forward_hook(lambda *_: seen.append(1))
    step(model)
    handle.remove()
    assert seen == [1]


def test_operations_stay_visible_to_whoever_counts_them() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False):
        assert not fused.ready(torch.ones(2, 16))
    assert fused.ready(torch.ones(2, 16))


def test_float32_stays_as_written_and_nothing_changes_without_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "DTYPES", {torch.bfloat16})
    model = made(shape())
    assert not fused.ready(torch.ones(2, 16)) and fused.ready(torch.ones(2, 16).bfloat16())
    with torch.no_grad():
        assert not fused.ready(torch.ones(2, 16).bfloat16())
    loss, grads = step(model)
    monkeypatch.setenv("MODICUM_NATIVE", "0")
    want, wanted = step(model)
    assert loss == want and all(torch.equal(grads[n], wanted[n]) for n in wanted)


def test_padding_masks_leave_attention_as_written() -> None:
    real = torch.ones(1, 8, dtype=torch.bool)
    real[0, 0] = False
    assert DenseAttend(None, real).first_keys(8, None) is None
