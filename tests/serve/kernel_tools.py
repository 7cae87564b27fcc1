"""Small decoders for the compiled kernels, their logits through an engine, and the same in float64."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from serve_tools import lively
from torch import Tensor

from modicum.model.attach import attach
from modicum.model.config import Rope, by_layer, llama_like
from modicum.model.decoder import Decoder
from modicum.serve.backends.native import Native
from modicum.serve.config import EngineConfig
from modicum.serve.engine import Engine
from modicum.serve.request import SamplingParams

SHAPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "windows and caps": {
        "overrides": by_layer(window=(None, 9)),
        "attention_softcap": 5.0,
        "logit_softcap": 8.0,
        "norm_place": "sandwich",
    },
    "biases, half rotation": {
        "qkv_bias": True,
        "o_bias": True,
        "mlp_bias": True,
        "activation": "gelu_tanh",
        "rope": Rope(fraction=0.5),
    },
    "norms of heads": {"qk_norm": "head", "norm": "rms_plus_one", "embed_scale": 3.0, "activation": "gelu"},
    "norms of all heads": {"qk_norm": "full", "norm_place": "output", "activation": "relu"},
    "no gate, odd sizes": {"gated": False, "head_dim": 20},
    "long rows": {"mlp_width": 1700},
    "two widths of rotation": {"overrides": by_layer(window=(None, 9), rope=(Rope(), Rope(theta=100.0, fraction=0.5)))},
    "the wider rotation in windows": {
        "overrides": by_layer(window=(None, 9), rope=(Rope(fraction=0.25), Rope(theta=50.0))),
    },
}


def decoder(name: str = "plain", width: int = 128, **more: Any) -> Decoder:
    given = SHAPES[name] | more
    given = {"head_dim": 32, "context_length": 256, "tied": False, "mlp_width": 192} | given
    rope = given.pop("rope", Rope())
    shape = dataclasses.replace(llama_like(199, width, 2, 4, 2, **given), rope=rope)
    model = lively(Decoder(shape, torch.Generator().manual_seed(0)), 2.0)
    with torch.no_grad():
        for name_, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name_))) * 0.2)
    return model


def logits_of(
    model: Decoder, prompts: list[list[int]], steps: int = 3, dtype: str | None = None, **config: Any
) -> tuple[Tensor, Any]:
    """Logits of each step of all prompts at once, and the tokens that were fed; by the engine's own runner."""
    e = Engine(model, None, EngineConfig(block_size=8, cache="2ktok", prefix_cache=False, dtype=dtype, **config))
    caught: dict[int, list[Tensor]] = {}
    runner = e.runner

    def watched(plan: Any, rows: Any) -> Any:
        logits = runner(plan, rows)
        for w in plan.works:
            if w.at + w.n - 1 in rows:
                caught.setdefault(w.sample.request.id, []).append(logits[list(rows).index(w.at + w.n - 1)])
        return logits

    e.runner = watched  # type: ignore[assignment]
    params = SamplingParams(temperature=0, max_tokens=steps, ignore_eos=True)
    tokens = [o.tokens for o in e.generate(prompts, params)]
    assert isinstance(runner.backends[0], Native)
    return torch.stack([torch.stack(caught[i]).double() for i in sorted(caught)]), tokens  # (prompts, steps, V)


def to_eight_bits(module: torch.nn.Module, given: tuple[Tensor]) -> tuple[Tensor]:
    """What goes into a matrix, rounded as the kernels do it: a step for each 64 inputs, 127 of them the largest."""
    x = given[0].unflatten(-1, (-1, 64))
    step = x.abs().amax(-1, keepdim=True) / 127
    return (torch.where(step > 0, torch.round(x / step) * step, 0.0).flatten(-2),)


def exact(model: Decoder, prompts: list[list[int]], tokens: list[list[int]], eight: bool = False) -> Tensor:
    """The same logits by the decoder in float64, codes decoded, each sequence whole and alone."""
    from modicum.model.attach import forms

    wide = Decoder(model.config, init=False).double()
    state = {name: value for name, value in model.state_dict().items() if name in wide.state_dict()}
    for name, form in forms(model).items():
        state[f"{name}.weight"] = form.decode(torch.float64)  # type: ignore[operator]
    wide.load_state_dict({name: value.double() for name, value in state.items()})
    for name in (n for n in forms(model) if eight and n != "lm_head"):  # few rows want logits: exact as ever
        wide.get_submodule(name).register_forward_pre_hook(to_eight_bits)  # type: ignore[arg-type]
    rows = []
    for prompt, said in zip(prompts, tokens, strict=True):
        with torch.no_grad():
            rows.append(wide(torch.tensor([prompt + said[:-1]]))[0, len(prompt) - 1 :])
    return torch.stack(rows)


def distance(got: Tensor, want: Tensor) -> float:
    return float((got - want).norm() / want.norm())


PROMPTS = [[5, 6, 7], list(range(40)), [9] * 17, list(range(90, 160)), [3]]


def coded(form: str, width: int = 128) -> Decoder:
    model = decoder(width=width).to(torch.bfloat16)
    attach(model, {"layers.*": form, "lm_head": form})
    return model
