"""mllm-npu: weights and inputs in eight bits with a static step for each layer, outliers beside in few layers.

Each matrix becomes the form `w8a8`: y = s s_w (clip(round(x / s)) W_int8) + (x - s clip)_C W_C, s from the `percentile`
of |x| on calibration text. Matrices are ranked by what the second term, the shadow, is worth,

    importance = E ||r_C W_C||^2 / E ||x W||^2

and all but the part `shadows` of them drop it. Xu et al. 2024, arXiv:2407.05858 (ASPLOS 2025 as llm.npu), sections 3.2
and 3.3 (formulae partly from memory). Departs: no NPU here, so this says what the arithmetic costs in quality and
nothing of speed; prompts are cut into chunks by the engine (`chunked_prefill`), and the order of subgraphs on two
processors is not here; the rank is of matrices, theirs of layers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from modicum.compress.compressors import BlockJob, Compressor
from modicum.core.choice import Choice
from modicum.core.registry import load
from modicum.model import attach
from modicum.model.attach import is_conv1d
from modicum.model.attend import DenseAttend
from modicum.model.decoder import Decoder
from modicum.model.linear import LinearForm, LinearShape
from modicum.model.linear.w8a8 import W8A8, split, step_of, weight_codes

SAMPLE = 1 << 20  # numbers of a layer's inputs that its step is taken from


@dataclass(frozen=True, kw_only=True)
class Config:
    percentile: Annotated[float, Field(gt=0, le=1)] = 0.999  # of |x| that the step does not cut off
    shadows: Annotated[float, Field(ge=0, le=1)] = 0.15  # matrices that keep the second product, as a fraction


CLAIM = {"figure": "22.4 times faster prefill, below 1% of accuracy lost", "where": "abstract and section 4",
         "scale": "Qwen1.5-1.8B to Llama-2-7B on a phone"}  # fmt: skip
SWEEP = ("shadows=0.15", "shadows=1.0", "shadows=0.0")


@dataclass(frozen=True)
class Eight:
    """A matrix in eight bits with its inputs' step."""

    weight_OI: Tensor
    step: float
    percentile: float

    def form(self, layer: nn.Linear, dtype: torch.dtype) -> LinearForm:
        choice = Choice("linear", "w8a8", {"percentile": self.percentile})
        shape = LinearShape.of(layer.weight.to("meta", dtype), layer.bias, device=str(layer.weight.device))
        form: W8A8 = load("linear", "w8a8", W8A8).cls(choice.config(), shape)
        form.choice, form.transposed = choice, is_conv1d(layer)
        form.take(self.weight_OI, None, None)
        form.step.fill_(self.step)
        if form.bias is not None:
            form.bias.data.copy_(layer.bias)
        return form


class MllmNpu(Compressor):
    requires = frozenset({"calibration_text"})
    config: Config

    def __init__(self, config: Config):
        super().__init__(config)
        self._importance: dict[str, float] = {}  # by full name

    def block(self, job: BlockJob) -> None:
        rows: dict[str, list[Tensor]] = {name: [] for name in job.linears}
        limit = {name: SAMPLE // layer.weight.shape[1] for name, layer in job.linears.items()}
        handles = [m.register_forward_pre_hook(_keep(rows[n], limit[n])) for n, m in job.linears.items()]
        try:
            for x_BTD, rotation in job.inputs():
                job.block(x_BTD, rotation, DenseAttend())
        finally:
            for handle in handles:
                handle.remove()
        for name, layer in job.linears.items():
            weight_OI, x_NI = layer.weight.detach(), torch.cat(rows[name])
            step = step_of(x_NI, self.config.percentile)
            codes_OI, scale_O1 = weight_codes(weight_OI)
            decoded_OI = codes_OI.float() * scale_O1
            _, residual_NI = split(x_NI, step)
            whole = float((x_NI @ weight_OI.T).square().sum())
            lost = float((residual_NI @ decoded_OI.T).square().sum())
            self._importance[job.full_name(name)] = lost / whole if whole else 0.0
            job.keep(name, Eight(weight_OI, step, self.config.percentile))

    def finish(self, model: Decoder) -> Decoder:
        forms = {n: f for n, f in attach.forms(model).items() if isinstance(f, W8A8) and n in self._importance}
        ranked = sorted(forms, key=lambda name: -self._importance[name])
        for name in ranked[round(self.config.shadows * len(ranked)) :]:
            forms[name].shadow.zero_()
        return model

    def state(self) -> dict[str, Any]:
        return {"importance": self._importance}

    def set_state(self, state: dict[str, Any]) -> None:
        self._importance = dict(state["importance"])


def _keep(rows: list[Tensor], limit: int) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    """Keep the first `limit` rows that go into a layer."""

    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        kept = sum(len(r) for r in rows)
        if kept < limit:
            rows.append(args[0].detach().flatten(0, -2)[: limit - kept].float())

    return hook
