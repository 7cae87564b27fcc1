"""efficientqat: its gradients in float64, its start, its two streams, and what is stored."""

from pathlib import Path
from typing import Any

import pytest
import torch

from modicum.compress.blocks import Walk
from modicum.compress.compressors import BlockJob, efficientqat
from modicum.compress.compressors.efficientqat import Config, EfficientQat, Quantiser, tune_scales
from modicum.core.events import Events
from modicum.model import attach
from modicum.model.attend import DenseAttend
from modicum.model.config import llama_like
from modicum.model.decoder import Decoder

FINE: dict[str, Any] = {"bits": 2, "group": 8, "scale_dtype": "float32"}


def weights(rows: int = 3, inputs: int = 16) -> torch.Tensor:
    return torch.randn(rows, inputs, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_gradients_are_the_published_ones_inside_and_outside_the_range() -> None:
    quantiser = Quantiser(weights(), Config(**FINE)).double()
    with torch.no_grad():
        quantiser.scale.mul_(0.6)  # so that some codes are clamped, at both ends
        quantiser.zero.add_(0.3)
    grad = torch.randn(3, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    quantiser().backward(grad)
    assert quantiser.weight.grad is not None and quantiser.scale.grad is not None and quantiser.zero.grad is not None
    outside = 0
    for row in range(3):
        for group in range(2):
            s, z = float(quantiser.scale[row, group]), round(float(quantiser.zero[row, group]))
            by_scale = by_zero = 0.0
            for i in range(group * 8, group * 8 + 8):
                ratio, g = float(quantiser.weight[row, i]) / s, float(grad[row, i])
                code = round(ratio) + z
                if 0 <= code <= 3:
                    assert float(quantiser.weight.grad[row, i]) == pytest.approx(g)
                    by_scale += g * (round(ratio) - ratio)
                else:
                    outside += 1
                    clamped = min(3, max(0, code))
                    assert float(quantiser.weight.grad[row, i]) == 0
                    by_scale, by_zero = by_scale + g * (clamped - z), by_zero - g * s
            assert float(quantiser.scale.grad[row, group]) == pytest.approx(by_scale)
            assert float(quantiser.zero.grad[row, group]) == pytest.approx(by_zero)
    assert 4 < outside < 40


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_without_epochs_it_is_round_to_nearest_with_integer_zero_points(bits: int) -> None:
    weight = weights(8, 20).float()
    codes = Quantiser(weight, Config(bits=bits, group=8, scale_dtype="float32")).codes()  # type: ignore[arg-type]
    padded = torch.cat([weight, weight[:, -1:].expand(-1, 4)], 1)
    for group in range(3):
        part, own = padded[:, group * 8 : group * 8 + 8], weight[:, group * 8 : group * 8 + 8]
        low, high = part.amin(1, keepdim=True), part.amax(1, keepdim=True)
        s = (high - low) / (2**bits - 1)
        z = torch.round(-low / s).clamp(0, 2**bits - 1)
        want = s * ((own / s).round() + z).clamp(0, 2**bits - 1) - s * z
        torch.testing.assert_close(codes.weight()[:, group * 8 : group * 8 + 8], want, atol=1e-6, rtol=1e-6)
        assert torch.equal(
            codes.codes_OI[:, group * 8 : group * 8 + 8].float(), ((own / s).round() + z).clamp(0, 2**bits - 1)
        )


def test_what_is_stored_is_what_was_trained() -> None:
    quantiser = Quantiser(weights(8, 16).float(), Config(**FINE))
    with torch.no_grad():
        quantiser.scale.mul_(0.9)
        quantiser.zero.add_(0.7)
        quantiser.weight.add_(0.05)
    torch.testing.assert_close(quantiser.codes().weight(), quantiser().detach(), atol=1e-6, rtol=1e-5)


def _model() -> Decoder:
    return Decoder(
        llama_like(60, 32, 2, 4, kv_heads=2, mlp_width=48, context_length=32), torch.Generator().manual_seed(0)
    )


def _tokens(count: int = 8) -> torch.Tensor:
    return torch.randint(3, 60, (count, 12), generator=torch.Generator().manual_seed(2))


def test_a_block_learns_from_the_quantised_prefix_what_the_original_gives(tmp_path: Path) -> None:
    """Inputs of block 1 are outputs of the stored block 0; targets are the original's on its own inputs."""
    model, original, tokens = _model(), _model(), _tokens()
    seen: dict[int, tuple[torch.Tensor, torch.Tensor, float, float]] = {}
    config = Config(bits=2, group=16, epochs=6, weight_rate=3e-3, scale_rate=3e-3, heldout=4, tuning_epochs=0)

    class Watched(EfficientQat):
        def block(self, job: BlockJob) -> None:
            x, rotation = next(job.inputs())
            y = next(job.outputs())
            start = {f"{n}.weight": Quantiser(m.weight, self.config)() for n, m in job.linears.items()}
            before = torch.func.functional_call(job.block, start, (x, rotation, DenseAttend()))
            super().block(job)
            after = {f"{n}.weight": c.weight() for n, c in job.codes.items()}
            reached = torch.func.functional_call(job.block, after, (x, rotation, DenseAttend()))
            seen[job.index] = (x, y, float((before - y).square().mean()), float((reached - y).square().mean()))

    names = [n for n in attach.linears(model) if n.startswith("layers.")]
    Walk(model, Watched(config), names, tokens, tmp_path).run(Events())
    quantised, targets = [], []
    with torch.no_grad():
        for stack, kept in ((model, quantised), (original, targets)):
            hooks = [b.register_forward_hook(lambda m, a, y, kept=kept: kept.append((a[0], y))) for b in stack.layers]
            stack.hidden(tokens)
            for hook in hooks:
                hook.remove()
    torch.testing.assert_close(seen[1][0], quantised[1][0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(seen[1][1], targets[1][1], atol=1e-5, rtol=1e-4)
    for _, _, before, reached in seen.values():
        assert reached < 0.9 * before


def test_tuning_moves_scales_alone_and_lowers_the_loss(tmp_path: Path) -> None:
    model, tokens = _model(), _tokens(16)
    names = [n for n in attach.linears(model) if n.startswith("layers.")]
    config = Config(bits=3, group=16, epochs=0, tuning_epochs=6, tuning_rate=1e-3, scale_dtype="float32", clip=10.0)
    method = EfficientQat(config)
    Walk(model, method, names, tokens, tmp_path).run(Events())
    before = {n: (f.packed.clone(), f.scale.clone(), f.zero / f.scale) for n, f in attach.forms(model).items()}  # type: ignore[operator,union-attr]

    def loss() -> float:
        with torch.no_grad():
            logits = model(tokens[:, :-1])
        return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()))

    start, plain = loss(), {n: p.clone() for n, p in model.named_parameters()}
    tune_scales(model, tokens, config)
    assert loss() < start
    for name, form in attach.forms(model).items():
        codes, scale, ratio = before[name]
        assert torch.equal(form.packed, codes) and not torch.equal(form.scale, scale)  # type: ignore[arg-type]
        torch.testing.assert_close(form.zero / form.scale, ratio, atol=1e-3, rtol=1e-3)  # type: ignore[operator]
    assert all(torch.equal(p, plain[n]) for n, p in model.named_parameters())
    assert efficientqat.rate_for(2) == 2e-5 and efficientqat.rate_for(3) == 1e-5
