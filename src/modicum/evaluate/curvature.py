"""Curvature of a model's loss: traces of the Hessian and of the Fisher matrix, by sequence.

    Tr H  =  E_v  v' H v                                v of independent signs (Hutchinson 1990), two backward passes
    Tr F  =  E_x E_{y ~ p(. | x)} |grad log p(y | x)|^2     labels drawn from the model, one at every position

Both are of the loss per token. Labels are drawn independently at every position of a real text, so the cross terms of
different positions vanish in expectation and one backward pass of the summed loss gives the sum over positions. Where
the model is the optimum of its text's distribution, Tr H = Tr F. Needs float32 (or more) and attention that can be
differentiated twice: fused kernels are switched off.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from modicum.core.files import fingerprint

if TYPE_CHECKING:
    from modicum.data.tokenizer import Tokenizer
    from modicum.evaluate.kept import Kept
    from modicum.evaluate.probes import Asked, Graded, Grader

LENGTH = 256  # tokens of a text that are read


@dataclass(frozen=True)
class Curvature:
    """Of one sequence, per token: loss (nats), traces of H and F, and of F with every tensor's part times its squared
    norm (`scaled`), which no rescaling of weights followed by a norm changes.

    parameters: how many the traces sum over.
    """

    loss: float
    hessian: float
    fisher: float
    scaled: float
    parameters: int


def curvature(model: nn.Module, tokens_1T: Tensor, generator: torch.Generator, *, probes: int = 1) -> Curvature:
    """Curvature at one sequence of T + 1 tokens, T of them predicted. probes: sign vectors of Hutchinson's estimate."""
    weights = [p for p in model.parameters() if p.requires_grad]
    inputs_1T, targets_1T = tokens_1T[:, :-1], tokens_1T[:, 1:]
    count = targets_1T.numel()
    with sdpa_kernel(SDPBackend.MATH), torch.enable_grad():
        logits_TV = model(inputs_1T)[0]
        loss = nn.functional.cross_entropy(logits_TV, targets_1T[0])
        labels_T = torch.multinomial(logits_TV.detach().softmax(-1), 1, generator=generator)[:, 0]
        drawn = nn.functional.cross_entropy(logits_TV, labels_T, reduction="sum")
        slopes = torch.autograd.grad(drawn, weights, retain_graph=True, allow_unused=True)
        squares = [0.0 if g is None else float(g.double().square().sum()) / count for g in slopes]
        gradient = torch.autograd.grad(loss, weights, create_graph=True, allow_unused=True)
        used = [(w, g) for w, g in zip(weights, gradient, strict=True) if g is not None]
        quadratic = 0.0
        for number in range(probes):
            signs = [_signs(w, generator) for w, _ in used]
            along = sum(((g * v).sum() for (_, g), v in zip(used, signs, strict=True)), torch.zeros(()))
            products = torch.autograd.grad(
                along, [w for w, _ in used], retain_graph=number + 1 < probes, allow_unused=True
            )
            quadratic += sum(float((h * v).sum()) for h, v in zip(products, signs, strict=True) if h is not None)
    norms = [float(w.detach().double().square().sum()) for w in weights]
    return Curvature(
        loss=float(loss.detach()),
        hessian=quadratic / probes,
        fisher=sum(squares),
        scaled=sum(n * s for n, s in zip(norms, squares, strict=True)),
        parameters=sum(w.numel() for w in weights),
    )


def _signs(weight: Tensor, generator: torch.Generator) -> Tensor:
    drawn = torch.randint(0, 2, weight.shape, generator=generator)
    return (2 * drawn - 1).to(weight.dtype)


class SymbolNet(nn.Module):
    """Next symbol from the present one by one hidden layer: its Hessian can be known, for tests and simulations."""

    def __init__(self, symbols: int, size: int, generator: torch.Generator):
        super().__init__()
        self.inner = nn.Parameter(torch.randn(symbols, size, generator=generator))
        self.outer = nn.Parameter(torch.randn(size, symbols, generator=generator))

    def forward(self, tokens_BT: Tensor) -> Tensor:
        return torch.tanh(self.inner[tokens_BT]) @ self.outer

    def next_probabilities(self, sharpness: float = 1.0) -> np.ndarray:
        """P(next | symbol), symbols x symbols; of the logits times `sharpness`."""
        with torch.no_grad():
            return (sharpness * self(torch.arange(len(self.inner)))).double().softmax(-1).numpy()


def text_curvature(
    model: nn.Module, encode: Callable[[str], Sequence[int]], text: str, *, probes: int, seed: int
) -> Curvature | None:
    """Of a text's first tokens; None where it has fewer than two."""
    ids = list(encode(text))[: LENGTH + 1]
    if len(ids) < 2:
        return None
    key = int(fingerprint([text, seed])[:12], 16)
    return curvature(model, torch.tensor([ids]), torch.Generator().manual_seed(key), probes=probes)


def grader(model: Any, tokenizer: Tokenizer, kept: Kept, common: Sequence[Any], *, probes: int = 1) -> Grader:
    """Gradings for probes that need gradients: `nats` of a prompt with its right choice are loss, hessian, fisher,
    scaled and parameters (see `Curvature`). The model is taken to float32; what is in `kept` is not computed again."""
    from modicum.evaluate.probes import Graded

    def encode(text: str) -> list[int]:
        (ids,) = tokenizer.encode_batch([text], specials=False)
        return [tokenizer.start_id, *ids]

    def grade(prompts: Sequence[Asked]) -> list[Graded]:
        results = []
        for one in prompts:
            text = one.prompt + one.choices[one.item.right]
            key = fingerprint(["curvature", *common, text, probes])
            if key not in kept:
                model.float()
                at = text_curvature(model, encode, text, probes=probes, seed=0)
                values = [] if at is None else [at.loss, at.hessian, at.fisher, at.scaled, at.parameters]
                kept.add(key, {"right": True, "nats": values}, id=one.item.id)
            results.append(Graded(True, tuple(kept[key]["nats"])))
        return results

    return grade
