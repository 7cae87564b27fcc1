"""Mesa's bytes against the paper's equations by hand: rounding, running estimates, heads, gradients, resume."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from train_toys import config, decoder, stream
from train_toys import losses as curve

from modicum.core.errors import UserError
from modicum.core.events import Events
from modicum.model import attach
from modicum.train import loss as losses
from modicum.train.loop import Trainer, train
from modicum.train.memory import mesa
from modicum.train.memory.mesa import Config, Mesa, Packed, by_channel, by_head

NEAREST = Config(stochastic=False)


def _by_hand(x: Tensor, low: Tensor, spread: Tensor, noise: Tensor | float = 0.5) -> Tensor:
    """Equations of the card in float64; `low`, `spread` and `noise` broadcast to x."""
    bytes_ = torch.floor((x.double() - low) * 255 / spread + noise).clamp(0, 255)
    return bytes_ * spread / 255 + low


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class OneLayer(nn.Module):
    """`layer` where the repeated layers of a model stand."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layers = nn.ModuleList([layer])

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[0](x)


def test_a_linear_layers_weight_learns_from_bytes_and_its_input_from_nothing_less() -> None:
    x = torch.randn(3, 5, 12, generator=_generator()) * torch.arange(1, 13)
    model = OneLayer(nn.Linear(12, 7))
    saver, leaf, g = (
        Mesa(Config(stochastic=False, groups=4)),
        x.clone().requires_grad_(),
        torch.randn(3, 5, 7),
    )
    with saver.keeping(model):
        y = model(leaf)
        y.backward(g)
    layer = model.layers[0]
    assert torch.equal(y, F.linear(x, layer.weight, layer.bias))  # the forward pass is exact
    grouped = x.view(15, 4, 3).double()
    low, high = grouped.amin((0, 2))[None, :, None], grouped.amax((0, 2))[None, :, None]
    kept = _by_hand(grouped, low, high - low).view(15, 12)
    assert not torch.allclose(kept, x.view(15, 12).double(), atol=1e-3)
    wanted = g.view(15, 7).double().T @ kept
    assert torch.allclose(layer.weight.grad.double(), wanted, rtol=1e-4, atol=1e-4)
    assert torch.allclose(leaf.grad, g @ layer.weight)
    assert "forward" not in vars(layer)


def test_estimates_run_and_values_beyond_them_are_clipped() -> None:
    saver, model = Mesa(Config(stochastic=False, decay=0.9, groups=2)), OneLayer(nn.Linear(4, 3))
    first, second = (
        torch.randn(2, 6, 4, generator=_generator()),
        3 * torch.randn(2, 6, 4, generator=_generator(1)),
    )
    for x in (first, second):
        with saver.keeping(model):
            y = model(x)
            model.zero_grad()
            y.sum().backward()
    spans = []
    for x in (first, second):
        grouped = x.double().view(12, 2, 2)
        spans.append(torch.stack([grouped.amax((0, 2)) - grouped.amin((0, 2)), grouped.amin((0, 2))]))
    running = 0.9 * spans[0] + 0.1 * spans[1]
    assert torch.allclose(saver.estimates["layers.0.0"].double(), running, atol=1e-5)
    kept = _by_hand(second.view(12, 2, 2), running[1][:, None], running[0][:, None]).view(12, 4)
    assert (kept - second.view(12, 4)).abs().max() > 0.5  # the second batch is wider than the estimate
    assert torch.allclose(model.layers[0].weight.grad.double(), kept.sum(0).expand(3, 4), atol=1e-4)


def test_rounding_is_stochastic_and_keeps_the_mean() -> None:
    x = torch.linspace(0, 1, 1001).repeat(400, 1)
    scale = torch.tensor([1.0, 0.0]).view(2, 1, 1)
    packed = Packed(x, x, scale, _generator())
    assert packed.bytes.dtype == torch.uint8 and packed.bytes.nbytes == x.numel()
    numbers = packed.numbers()
    assert (numbers - x).abs().max() <= 1 / 255 + 1e-6
    assert (numbers.mean(0) - x[0]).abs().max() < 4 * 0.5 / 255 / 400**0.5 + 1 / 255 / 512  # 8-bit noise: half a step
    assert (Packed(x, x, scale, None).numbers() - x).abs().max() <= 0.5 / 255 + 1e-6


def test_a_constant_group_is_kept_exactly() -> None:
    x = torch.full((2, 3, 4), 1.25)
    assert torch.equal(Packed(x, x, torch.tensor([0.0, 1.25]).view(2, 1, 1, 1), _generator()).numbers(), x)


def test_heads_have_ranges_of_their_own() -> None:
    heads = torch.tensor([0.01, 1.0, 100.0]).view(1, 3, 1, 1)
    x = heads * torch.randn(2, 3, 8, 4, generator=_generator())
    saver = Mesa(NEAREST)
    kept = saver._pack("a.0", x, by_head(x)).numbers()
    low, high = x.double().amin((0, 2, 3), keepdim=True), x.double().amax((0, 2, 3), keepdim=True)
    assert torch.allclose(kept.double(), _by_hand(x, low, high - low), atol=1e-4)
    assert ((kept - x).abs().amax((0, 2, 3)) < 0.03 * heads.flatten()).all()
    together = saver._pack("b.0", x, by_channel(x, 1)).numbers()  # one range for all: the small head is lost
    assert (together - x)[:, 0].abs().max() > 0.1


def _attention_by_hand(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> list[Tensor]:
    """Gradients of causal attention, at 8-bit q, k and v, in float64."""
    leaves = []
    for x in (q, k, v):
        low, high = x.double().amin((0, 2, 3), keepdim=True), x.double().amax((0, 2, 3), keepdim=True)
        leaves.append(_by_hand(x, low, high - low).requires_grad_())
    out = F.scaled_dot_product_attention(*leaves, is_causal=True)
    return list(torch.autograd.grad(out, leaves, g.double()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_is_differentiated_at_its_bytes(dtype) -> None:
    from modicum.model.attend import DenseAttend

    attention = decoder(layers=1).layers[0].attention
    H, E = attention.q.out_features // attention.head_dim, attention.head_dim
    q, k, v, g = (torch.randn(2, H, 24, E, generator=_generator(i)).to(dtype) for i in range(4))
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]

    def forward(x: Tensor, rotation: object, attend: object) -> Tensor:
        return attend(0, *leaves, window=None, scale=E**-0.5, softcap=None)  # type: ignore[operator]

    attention.forward = forward
    saver = Mesa(NEAREST)
    saver._attention("a", attention)(q, None, DenseAttend()).backward(g)
    for ours, wanted in zip((x.grad.double() for x in leaves), _attention_by_hand(q, k, v, g), strict=True):
        assert (ours - wanted).norm() < 0.03 * wanted.norm()  # a fused kernel (float32) also keeps its output as bytes
    assert list(saver.estimates)[:3] == ["a.0", "a.1", "a.2"] and saver.estimates["a.0"].shape == (2, H)


def _kept_bytes(model: nn.Module, saver: Mesa | None, batch: object) -> dict[torch.dtype, int]:
    """Bytes that autograd holds between forward and backward, by dtype, each storage once."""
    from torch.autograd.graph import saved_tensors_hooks

    held: dict[int, Tensor] = {}

    def look(kept: object) -> None:
        t = kept.bytes if isinstance(kept, Packed) else kept
        if isinstance(t, Tensor) and not isinstance(t, nn.Parameter):
            held[t.untyped_storage()._cdata] = t

    weights = {p.untyped_storage()._cdata for p in model.parameters()}
    inner = mesa.saved_tensors_hooks
    try:

        def spying(pack, unpack):  # type: ignore[no-untyped-def]
            def seen(t: Tensor) -> object:
                kept = pack(t)
                look(kept)
                return kept

            return inner(seen, unpack)

        mesa.saved_tensors_hooks = spying  # type: ignore[assignment]
        with saved_tensors_hooks(lambda t: look(t) or t, lambda t: t):
            if saver is None:
                total = losses.token_loss(model, batch)[0]
            else:
                with saver.keeping(model):
                    total = losses.token_loss(model, batch)[0]
    finally:
        mesa.saved_tensors_hooks = inner  # type: ignore[assignment]
    assert total.requires_grad
    sizes: dict[torch.dtype, int] = {}
    for key, t in held.items():
        if key not in weights:
            sizes[t.dtype] = sizes.get(t.dtype, 0) + t.untyped_storage().nbytes()
    return sizes


FAMILIES = [
    {},
    {"norm": "layer", "gated": False, "activation": "gelu"},
    {"parallel": True, "activation": "relu"},
    {"qk_norm": "head", "norm_place": "sandwich", "norm": "rms_plus_one"},
    {"attention_softcap": 5.0, "logit_softcap": 10.0, "activation": "gelu_tanh"},
]


@pytest.mark.parametrize(
    "shape, form",
    [
        *((shape, None) for shape in FAMILIES),
        (FAMILIES[0], "lora:rank=4"),
        (FAMILIES[1], "lora:rank=4"),
        (FAMILIES[0], "int8"),
    ],
)
def test_every_familys_layers_keep_a_quarter_and_learn_nearly_the_same(shape, form) -> None:
    batch, grads, kept = stream().next_batch(4), [], []
    for saver in (None, Mesa(Config())):
        model = decoder(width=64, **{"heads": 4} | shape)
        if form:
            attach.attach(model, {"layers.*": form}, generator=_generator(1))
            for name, p in model.named_parameters():
                if name.endswith(".B"):
                    p.data.normal_(0, 0.1, generator=_generator(2))
        if saver:
            saver._generator = _generator(3)
            with saver.keeping(model):
                total = losses.token_loss(model, batch)[0]
                total.backward()
        else:
            total = losses.token_loss(model, batch)[0]
            total.backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
        kept.append((_kept_bytes(model, saver, batch), float(total.detach())))
    assert kept[0][1] == kept[1][1]  # not one bit of the forward pass changes
    error = (grads[1] - grads[0]).norm() / grads[0].norm()
    assert 0 < error < 0.05
    plain, bytes_ = sum(kept[0][0].values()), kept[1][0]
    floats = sum(n for dtype, n in bytes_.items() if dtype != torch.uint8)
    assert bytes_[torch.uint8] < 0.25 * plain and floats < 0.35 * plain


def test_resume_is_bit_for_bit_with_the_estimates(tmp_path) -> None:
    knobs = {"memory": ["mesa"], "dtype": "bfloat16", "micro_batch": 4, "schedule": "constant"}
    for place, runs in (("straight", (5,)), ("resumed", (3, 5))):
        for steps in runs:
            told = Events(tmp_path / place / "events.jsonl")
            train(decoder(), stream(), config(steps=steps, **knobs), tmp_path / place, label="", events=told)
    straight, resumed = (tmp_path / place for place in ("straight", "resumed"))
    assert curve(straight / "events.jsonl") == curve(resumed / "events.jsonl")
    states = []
    for folder in (straight, resumed):
        trainer = Trainer(decoder(), stream(), config(steps=6, **knobs), folder, label="")
        trainer.open()
        states.append(trainer.parts["memory.mesa"].state_dict())
    assert len(states[0]) > 10 and all(torch.equal(states[1][name], value) for name, value in states[0].items())


def test_what_it_cannot_act_on_is_refused() -> None:
    with pytest.raises(UserError, match="'mesa' cannot be combined with Sequential"):
        Mesa(Config()).prepare(nn.Sequential(nn.Embedding(4, 4), nn.Conv1d(4, 4, 1)), None)
    with pytest.raises(ValueError, match="decay="):
        Config(decay=1.0)
    with pytest.raises(ValueError, match="groups=-1"):
        Config(groups=-1)


def test_a_step_that_overflowed_is_forgotten() -> None:
    saver, model, x = Mesa(Config(groups=1)), OneLayer(nn.Linear(4, 3)), torch.randn(2, 3, 4)
    saver._generator = _generator()
    for value in (x, torch.full_like(x, torch.nan), x):
        with saver.keeping(model):
            model(value).sum().backward()
    assert torch.isfinite(saver.estimates["layers.0.0"]).all()


def test_a_forward_pass_that_raises_leaves_nothing_behind() -> None:
    saver, model = Mesa(NEAREST), OneLayer(nn.Linear(4, 3))
    with pytest.raises(RuntimeError), saver.keeping(model):
        model(torch.randn(2, 5))
    assert "forward" not in vars(model.layers[0])
    x = torch.randn(2, 3, 4)
    model(x).sum().backward()  # and keeps numbers again
    assert torch.allclose(model.layers[0].weight.grad, x.sum((0, 1)).expand(3, 4))
