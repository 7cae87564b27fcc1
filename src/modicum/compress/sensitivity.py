"""How far the predictions of a model move when one matrix is rounded, estimated for many settings at once.

To second order the divergence KL(original || changed) of a model that predicts the labels itself is 1/2 d^T F d with
the Fisher information F. For a matrix W with inputs x_t and gradients g_t at its outputs, F as a Kronecker product
(Martens and Grosse 2015, arXiv:1503.05671) with the output's part by its diagonal gives, per token,

    KL ~ 1/2 sum_o E[g_o^2] (dW E[x x^T] dW^T)_oo,   dW = Q(W) - W

with labels drawn from the model's own predictions. The gradients take one backward pass, the inputs one walk over the
blocks, which can be resumed; in memory are the model and one block. An embedding is measured itself: the divergence
with its rows rounded. Errors add up while they are small; at two bits a model leaves that range.

Shapes: N sequences, T tokens, V vocabulary, O outputs, I inputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from modicum.compress.blocks import Walk
from modicum.compress.compressors import BlockJob, Compressor
from modicum.compress.compressors._affine import AffineConfig, grid, groups, width
from modicum.compress.divergence import original, scores
from modicum.core.choice import Choice
from modicum.core.events import Events
from modicum.model import attach
from modicum.model.decoder import Decoder

SHRINKS = (1.0, 0.9, 0.8, 0.7, 0.6)  # of a group's range, tried below four bits


def output_gradients(model: Decoder, names: Sequence[str], tokens_NT: Tensor, seed: int = 0) -> dict[str, Tensor]:
    """E[g_o^2] of each layer's outputs (O,), for the loss of a sequence on labels that the model draws."""
    generator = torch.Generator().manual_seed(seed)
    sums: dict[str, Tensor] = {}
    layers = attach.linears(model)

    def watch(name: str) -> Any:
        def note(grad: Tensor) -> None:
            part = grad.flatten(0, -2).double().square().sum(0)
            sums[name] = sums[name] + part if name in sums else part

        return lambda module, args, output: output.register_hook(note) and None

    trained = {n: p.requires_grad for n, p in model.named_parameters()}
    model.requires_grad_(False)
    hooks = [layers[name].register_forward_hook(watch(name)) for name in names]
    hooks.append(model.embed.register_forward_hook(lambda module, args, output: output.detach().requires_grad_()))
    try:
        with torch.enable_grad():
            for tokens_T in tokens_NT:
                logits_TV = model(tokens_T[None].to(model.device))[0].float()
                labels = torch.multinomial(logits_TV.detach().softmax(-1), 1, generator=generator)[:, 0]
                nn.functional.cross_entropy(logits_TV, labels, reduction="sum").backward()
    finally:
        for hook in hooks:
            hook.remove()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trained[name])
    return {name: total / tokens_NT.numel() for name, total in sums.items()}


class _Probe(Compressor):
    """Leaves every block as it is, and notes the estimate of each matrix in each setting."""

    needs: ClassVar[frozenset[str]] = frozenset({"gram"})
    streams: ClassVar[tuple[str, ...]] = ("original",)

    def __init__(self, settings: Sequence[AffineConfig], gradients: Mapping[str, Tensor]):
        super().__init__(None)
        self.settings, self.gradients = settings, gradients
        self.errors: dict[str, list[float]] = {}

    def block(self, job: BlockJob) -> None:
        for name, layer in job.linears.items():
            statistics = job.statistics[name]
            second_II = (statistics.gram / statistics.count).to(layer.weight.dtype)
            full = job.full_name(name)
            self.errors[full] = [
                estimate(layer.weight.detach(), second_II, self.gradients[full], setting) for setting in self.settings
            ]

    def state(self) -> dict[str, Any]:
        return {"errors": self.errors}

    def set_state(self, state: dict[str, Any]) -> None:
        self.errors = dict(state["errors"])


def estimate(weight_OI: Tensor, second_II: Tensor, gradient_O: Tensor, setting: AffineConfig) -> float:
    """1/2 sum_o E[g_o^2] (dW E[x x^T] dW^T)_oo of a matrix rounded in a setting, in nats per token."""
    left_OI = clipped(weight_OI, second_II.diagonal(), setting) - weight_OI
    return 0.5 * float(((left_OI @ second_II * left_OI).sum(-1).double() * gradient_O).sum())


def clipped(weight_OI: Tensor, mean_square_I: Tensor, setting: AffineConfig) -> Tensor:
    """The weight rounded to nearest; below four bits on ranges shrunk to the least error by inputs."""
    inputs, group = weight_OI.shape[1], width(setting, weight_OI.shape[1])
    weight_OGi = groups(weight_OI, group)
    weigh_Gi = nn.functional.pad(mean_square_I, (0, -inputs % group)).view(-1, group)
    best_OGi, least_OG1 = weight_OGi, None
    for shrink in SHRINKS if setting.bits < 4 else SHRINKS[:1]:
        near_OGi = grid(weight_OGi, setting, shrink).nearest(weight_OGi)
        error_OG1 = ((near_OGi - weight_OGi).square() * weigh_Gi).sum(-1, keepdim=True)
        if least_OG1 is None:
            best_OGi, least_OG1 = near_OGi, error_OG1
        else:
            best_OGi = torch.where(error_OG1 < least_OG1, near_OGi, best_OGi)
            least_OG1 = torch.minimum(error_OG1, least_OG1)
    return best_OGi.flatten(1)[:, :inputs]


def matrix_errors(
    model: Decoder,
    names: list[str],
    tokens_NT: Tensor,
    settings: Sequence[AffineConfig],
    work: Path,
    events: Events,
) -> dict[str, list[float]]:
    """The estimate of each matrix in each setting, in nats per token. work: a folder to go on from."""
    probe = _Probe(settings, output_gradients(model, names, tokens_NT))
    Walk(model, probe, names, tokens_NT, work).run(events)
    return probe.errors


def embedding_errors(model: Decoder, choices: Sequence[str], tokens_NT: Tensor) -> list[float]:
    """The divergence, in nats per token, with the token embedding (and a head tied to it) in each of the forms."""
    before, table, head = original(model, tokens_NT)[0], model.embed, model.lm_head
    errors = []
    for choice in choices:
        attach.attach_embedding(model, "embed", Choice.parse("linear", choice))
        try:
            errors.append(max(0.0, sum(s.kl for s in scores(model, tokens_NT, before)) / len(tokens_NT)))
        finally:
            model.embed, model.lm_head = table, head
    return errors
