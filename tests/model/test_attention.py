"""Attention: blocks against a naive float64 computation, gradients included; norms and rotation likewise."""

import pytest
import torch

from modicum.core import registry
from modicum.model import attend
from modicum.model.attend import BlockAttend, DenseAttend, attention, default_positions, pattern_attend
from modicum.model.attention.sliding import Config, Sliding
from modicum.model.config import Rope, llama_like
from modicum.model.decoder import Decoder
from modicum.model.flex import FlexAttend
from modicum.model.layers import RMSNorm
from modicum.model.patterns import set_attention
from modicum.model.rope import RopeTable, frequencies, rotate
from modicum.model.tiled import tiled_attention


def qkv(T=37, S=37, H=4, G=2, E=8, dtype=torch.float64, grad=False):
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, H, T, E, generator=generator, dtype=torch.float64).to(dtype)
    k, v = (torch.randn(2, G, S, E, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))
    return tuple(x.requires_grad_(grad) for x in (q, k, v))


def naive(q, k, v, scale, seen, softcap=None):
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = torch.einsum("bhte,bhse->bhts", q, k) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    return scores.masked_fill(~seen, float("-inf")).softmax(-1) @ v


@pytest.mark.parametrize("softcap", [None, 0.7])
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("T", [37, 9])
def test_tiled_equals_naive_with_gradients(softcap, window, masked, T):
    tensors = qkv(T=T, grad=True)
    q_pos, k_pos = torch.arange(37 - T, 37)[:, None], torch.arange(37)[None]
    seen = (k_pos <= q_pos) & (q_pos - k_pos < (window or 99))
    mask = None
    if masked:
        documents = torch.arange(37)[None] // torch.tensor([[7], [20]])
        seen = (seen & (documents[:, 37 - T :, None] == documents[:, None, :]))[:, None]
        mask = seen
    out = tiled_attention(*tensors, scale=0.4, mask=mask, causal=True, window=window, softcap=softcap, block=8)
    reference = naive(*tensors, 0.4, seen, softcap)
    assert (out - reference).abs().max() < 1e-12
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ours = torch.autograd.grad(out, tensors, upstream)
    theirs = torch.autograd.grad(reference, tensors, upstream)
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).abs().max() < 1e-11


@pytest.mark.parametrize("amx", [False, True])
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("T", [37, 150])
@pytest.mark.parametrize("masked", [False, True])
def test_half_precision_takes_the_fused_kernel_forward_only(amx, grad, T, masked, monkeypatch):
    """And both give what float64 gives, within bfloat16."""
    tiled = []
    monkeypatch.setattr(attend, "_has_amx", lambda: amx)
    monkeypatch.setattr(attend, "tiled_attention", lambda *x, **more: tiled.append(T) or tiled_attention(*x, **more))
    tensors = qkv(T, T, dtype=torch.bfloat16, grad=grad)
    seen = torch.ones(T, T, dtype=torch.bool).tril()
    out = attention(*tensors, scale=0.4, causal=True, mask=seen[None, None] if masked else None)
    assert (tiled == []) == (not grad and (amx or T <= attend.FEW))
    assert (out.double() - naive(*(x.detach().double() for x in tensors), 0.4, seen)).abs().max() < 0.03
    with torch.no_grad():
        tiled.clear()
        attention(*tensors, scale=0.4, causal=True)
    assert (tiled == []) == (amx or T <= attend.FEW)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("T, S, window", [(37, 37, None), (37, 37, 6), (1, 37, None), (5, 37, None)])
def test_attention_chooses_a_path_that_is_right(dtype, T, S, window):
    q, k, v = qkv(T, S, dtype=dtype)
    q_pos, k_pos = torch.arange(S - T, S)[:, None], torch.arange(S)[None]
    seen = (k_pos <= q_pos) & (q_pos - k_pos < (window or 99))
    mask = None if T == S and window is None else seen[None, None]
    out = attention(q, k, v, scale=0.3, mask=mask, causal=True, window=window)
    error = (out.double() - naive(q.double(), k.double(), v.double(), 0.3, seen)).abs().max()
    assert error < (1e-5 if dtype == torch.float32 else 0.03)


def test_dense_attend_with_documents_and_pattern_equals_naive():
    q, k, v = qkv()
    documents = (torch.arange(37) // 15).expand(2, -1)
    out = DenseAttend(documents)(0, q, k, v, window=20, scale=0.3, softcap=None, pattern=Sliding(Config(window=9)))
    position = torch.arange(37)
    distance = position[:, None] - position[None]
    seen = (distance >= 0) & (distance < 9) & (documents[0][:, None] == documents[0][None])
    assert (out - naive(q, k, v, 0.3, seen)).abs().max() < 1e-12


def test_block_attend_intersects_the_layers_window():
    q, k, v = qkv(T=21)
    out = BlockAttend(Sliding(Config(window=9)), size=4)(0, q, k, v, window=6, scale=0.3, softcap=None)
    distance = torch.arange(16, 37)[:, None] - torch.arange(37)[None]
    assert (out - naive(q, k, v, 0.3, (distance >= 0) & (distance < 6))).abs().max() < 1e-12


def test_block_attend_touches_only_the_window():
    """Keys outside all windows may hold anything, even NaN."""
    q, k, v = qkv(T=8, S=64)
    k[:, :, :40], v[:, :, :40] = float("nan"), float("nan")
    out = BlockAttend(Sliding(Config(window=6)), size=8)(0, q, k, v, window=None, scale=0.3, softcap=None)
    assert out.isfinite().all()


def test_a_decoder_runs_under_a_pattern():
    model = Decoder(llama_like(50, 64, 2, 4), torch.Generator().manual_seed(0)).eval()
    tokens = torch.randint(0, 50, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        whole, blocked = model(tokens), model(tokens, attend=BlockAttend(Sliding(Config(window=8)), size=16))
        set_attention(model, "sliding:window=8")
        dense = model(tokens)
    assert (blocked - dense).abs().max() < 1e-5
    assert (blocked[:, :8] - whole[:, :8]).abs().max() < 1e-5
    assert (blocked[:, 20:] - whole[:, 20:]).abs().max() > 1e-3


def test_window_must_be_positive():
    with pytest.raises(Exception, match="window=0 must be at least 1"):
        registry.build("attention", "sliding:window=0")


@pytest.mark.parametrize("plus_one", [False, True])
def test_rms_norm_gradients_equal_autograds(plus_one):
    norm = RMSNorm(12, 1e-5, plus_one).double()
    torch.nn.init.normal_(norm.weight, generator=torch.Generator().manual_seed(0))
    x = torch.randn(3, 5, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_(True)
    weight = norm.weight.detach().clone().requires_grad_(True)
    reference = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * (weight + plus_one)
    upstream = torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    out = norm(x)
    tolerance = 1e-6 if plus_one else 1e-12  # 1 + weight is a float32 sum
    assert (out - reference).abs().max() < tolerance
    for a, b in zip(
        torch.autograd.grad(out, (x, norm.weight), upstream),
        torch.autograd.grad(reference, (x, weight), upstream),
        strict=True,
    ):
        assert (a - b).abs().max() < 10 * tolerance


def test_rotation_is_a_rotation_by_position():
    rope = Rope(theta=100.0, fraction=0.5)
    table = RopeTable(rope, 16, 64)
    positions = torch.tensor([[0, 3, 11]])
    cos, sin = table(positions, torch.float64)
    x = torch.randn(1, 2, 3, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
    out = rotate(x, cos, sin)
    angles, _ = frequencies(rope, 16, 64)
    for t, position in enumerate((0, 3, 11)):
        pairs = torch.complex(x[0, :, t, :4], x[0, :, t, 4:8]) * torch.polar(
            torch.ones(4).double(), position * angles.double()
        )
        expected = torch.cat([pairs.real, pairs.imag, x[0, :, t, 8:]], dim=-1)
        assert (out[0, :, t] - expected).abs().max() < 1e-6
    upstream = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    (grad,) = torch.autograd.grad(out, x, upstream)
    assert (grad - rotate(upstream, cos, -sin)).abs().max() < 1e-12


def test_default_positions():
    tokens = torch.zeros(2, 6, dtype=torch.long)
    assert default_positions(tokens).tolist() == [[0, 1, 2, 3, 4, 5]]
    documents = torch.tensor([[0, 0, 1, 1, 1, 2], [4, 4, 4, 4, 4, 4]])
    assert default_positions(tokens, documents).tolist() == [[0, 1, 0, 1, 2, 0], [0, 1, 2, 3, 4, 5]]
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]]).bool()
    assert default_positions(tokens, None, mask).tolist() == [[0, 0, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5]]


def test_a_compiled_decoder_computes_the_same():
    """The hand-written backward passes survive tracing (bfloat16 takes all of them on the CPU)."""
    model = Decoder(llama_like(50, 32, 1, 2, 1), torch.Generator().manual_seed(0)).to(torch.bfloat16)
    tokens = torch.randint(0, 50, (2, 12), generator=torch.Generator().manual_seed(1))
    results = []
    for run in (model, torch.compile(model, backend="aot_eager")):
        model.zero_grad()
        logits = run(tokens)
        logits.float().square().mean().backward()
        results.append([logits.detach(), *(p.grad for p in model.parameters())])
    for plain, traced in zip(*results, strict=True):
        assert (plain - traced).norm() < 0.02 * plain.norm()


def test_autocast_trains():
    model = Decoder(llama_like(50, 32, 1, 2, 1), torch.Generator().manual_seed(0))
    tokens = torch.randint(0, 50, (2, 12), generator=torch.Generator().manual_seed(1))
    grads = []
    for enabled in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = model(tokens).float().square().mean()
        loss.backward()
        grads.append([p.grad for p in model.parameters()])
    for exact, cast in zip(*grads, strict=True):
        assert (exact - cast).norm() < 0.05 * exact.norm()


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("choice", ["causal", "sliding:window=9", "lambda:sinks=3,window=8"])
@pytest.mark.parametrize("T, window, softcap", [(37, None, None), (11, 6, None), (37, 12, 0.7)])
def test_flexattention_sees_what_the_pattern_allows(choice, T, window, softcap):
    q, k, v = qkv(T=T, dtype=torch.float32)
    pattern = registry.build("attention", choice)
    out = FlexAttend(pattern, size=8, compiled=False)(0, q, k, v, window=window, scale=0.3, softcap=softcap)
    q_pos, k_pos = torch.arange(37 - T, 37)[:, None], torch.arange(37)[None]
    seen = pattern.allowed(q_pos, k_pos) & (q_pos - k_pos < (window or 99))
    torch.testing.assert_close(
        out.double(), naive(q.double(), k.double(), v.double(), 0.3, seen, softcap), rtol=1e-4, atol=1e-5
    )


def test_each_device_gets_its_faster_way():
    pattern = registry.build("attention", "causal")
    assert isinstance(pattern_attend(pattern, "cpu"), BlockAttend)
    assert isinstance(pattern_attend(pattern, "cuda:0"), FlexAttend)
