"""efficientllm: pretraining that prunes as it goes, whole MLP channels and key/value groups, in many small cuts.

Between `begin` and `until` of the run's steps, `rounds` times, the groups of least saliency over all layers are cut,

    saliency = | sum over the group's weights of g w - g^2 w^2 / 2 | / number of weights        g: the step's gradient
    channel c:  row c of up and gate, column c of down;    group j:  rows of k and v, of its queries, columns of o

and what is left of down and o takes over what can be taken over (least squares on the step's own inputs X):

    W_R <- W_R + W_P H_PR H_RR^-1,   H = X^T X + damping      P the columns that go, R those that stay

The rest of the run trains the smaller model: cut weights stay zero, and `modicum export RUN/model OUT --format hf
--shrink` takes them out, so that the products are saved wherever the result is served.

Xing et al. 2025, arXiv:2502.06663 (abstract and README; its code is not published, saliency as in LLM-Pruner,
correction as in SparseGPT, arXiv:2301.00774). Departs: channels of the residual stream are not cut; how many channels
and how many groups go is given, where the paper lets saliency choose between the kinds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from modicum.core.errors import UserError
from modicum.train.engine import TrainEngine
from modicum.train.surgery._masks import Masking

CLAIM = {
    "figure": "models of 100M to 1B parameters above MobileLLM, SmolLM, Qwen2.5-0.5B and OLMo-1B",
    "where": "abstract",
    "scale": "134M to 1.1B parameters",
}


@dataclass(frozen=True, kw_only=True)
class Config:
    mlp: float = 0.5  # MLP channels of all layers together that are cut, as a fraction
    groups: float = 0.0  # key/value groups, with their query heads
    begin: float = 0.05  # of the run's steps, before the first cut
    until: float = 0.6  # of the run's steps, at the last one
    rounds: int = 16
    correct: bool = True  # the least squares
    damping: float = 0.01  # of the mean of diag H

    def __post_init__(self) -> None:
        if not (0 <= self.mlp < 1 and 0 <= self.groups < 1 and self.mlp + self.groups > 0):
            raise ValueError(f"mlp={self.mlp} and groups={self.groups} must be at least 0, below 1, and not both 0")
        if not 0 <= self.begin < self.until < 1 or self.rounds < 1:
            raise ValueError(
                f"begin={self.begin}, until={self.until}: 0 <= begin < until < 1; rounds={self.rounds}: at least 1"
            )


TOY = Config(rounds=2, begin=0.2, until=0.7)


class EfficientLlm(Masking):
    config: Config
    conflicts = frozenset({"fsdp", "linear"})

    def prepare(self, model: nn.Module, state: dict[str, Any] | None) -> nn.Module:
        model = super().prepare(model, state)
        decoder: Any = model
        shapes: Any = getattr(getattr(decoder, "config", None), "per_layer", ())
        sizes = {(s.heads, s.kv_heads, s.head_dim, s.mlp_width, s.mixer, s.gated) for s in shapes}
        if len(sizes) != 1 or shapes[0].mixer != "softmax":
            raise UserError("efficientllm prunes a decoder of softmax attention whose layers have one shape")
        shape, self.width, self.layers = shapes[0], decoder.config.width, decoder.config.layers
        self.head_dim, self.kv_heads, self.queries = shape.head_dim, shape.kv_heads, shape.heads // shape.kv_heads
        self.channels, self.gated = shape.mlp_width, shape.gated
        self._taken: dict[str, Tensor] = {}  # X^T X of the layers that are corrected, while a step is watched
        self._handles: list[Any] = []
        self._saliency: dict[str, Tensor] = {}
        return model

    # the schedule -------------------------------------------------------------------------------------

    def counts(self, done: int) -> dict[str, int]:
        """Channels and groups of all layers that are cut after `done` steps."""
        rounds = sum(step <= done for step in self.steps)
        part = rounds / max(1, len(self.steps))
        most = {"mlp": self.channels - 1, "groups": self.kv_heads - 1}  # of a layer: one of each stays
        of = {"mlp": self.channels, "groups": self.kv_heads}
        wanted = {"mlp": self.config.mlp, "groups": self.config.groups}
        return {k: min(round(part * wanted[k] * of[k] * self.layers), most[k] * self.layers) for k in of}

    def start(self, trainer: TrainEngine) -> None:
        super().start(trainer)
        total, c = trainer.config.total_steps, self.config
        spread = [c.begin + (c.until - c.begin) * (r + 1) / c.rounds for r in range(c.rounds)]
        self.steps = sorted({min(max(1, round(total * part)), total - 1) for part in spread})
        self._watch(trainer)

    def marks(self, trainer: TrainEngine) -> list[int]:
        return [step for step in self.steps if 0 < step < trainer.config.total_steps]

    def removed(self, step: int) -> int:
        counts = self.counts(step)
        per_group = self.head_dim * self.width * (2 + 2 * self.queries)
        return counts["mlp"] * self.width * (3 if self.gated else 2) + counts["groups"] * per_group

    # a cut --------------------------------------------------------------------------------------------

    def before_step(self, trainer: TrainEngine) -> None:
        super().before_step(trainer)
        if trainer.steps_done + 1 in self.steps:
            self._saliency = {kind: self._scores(trainer, kind) for kind in ("mlp", "groups")}

    def after_step(self, trainer: TrainEngine) -> None:
        if self._saliency:
            self._cut(trainer)
            self._saliency = {}
        super().after_step(trainer)
        self._watch(trainer)

    def parts(self, layer: int, kind: str) -> list[tuple[str, int, int]]:
        """(name of a weight, its axis, rows or columns of one group) of what is cut together."""
        at, E = f"layers.{layer}", self.head_dim
        if kind == "mlp":
            made = [(f"{at}.mlp.up.weight", 0, 1), (f"{at}.mlp.down.weight", 1, 1)]
            return made + ([(f"{at}.mlp.gate.weight", 0, 1)] if self.gated else [])
        queries = E * self.queries
        made = [(f"{at}.attention.{p}.weight", 0, E) for p in "kv"]
        return [*made, (f"{at}.attention.q.weight", 0, queries), (f"{at}.attention.o.weight", 1, queries)]

    @torch.no_grad()
    def _scores(self, trainer: TrainEngine, kind: str) -> Tensor:
        """saliency (L, channels or groups); infinite where a group is cut already."""
        rows = []
        for layer in range(self.layers):
            total, count, gone = None, 0, None
            for name, axis, size in self.parts(layer, kind):
                p = trainer.named[name]
                change = taylor(p.detach().float(), p.grad.float()) if p.grad is not None else torch.zeros_like(p)
                each = change.sum(1 - axis).unflatten(0, (-1, size)).sum(1)
                total = each if total is None else total + each
                count += size * p.shape[1 - axis]
                if gone is None:
                    gone = (p == 0).all(1 - axis).unflatten(0, (-1, size)).all(1)
            assert total is not None and gone is not None
            rows.append((total.abs() / count).masked_fill(gone, float("inf")))
        return torch.stack(rows)

    @torch.no_grad()
    def _cut(self, trainer: TrainEngine) -> None:
        now, before = self.counts(trainer.steps_done), self.counts(trainer.steps_done - 1)
        for kind, score_LC in self._saliency.items():
            gone = choose(score_LC, now[kind] - before[kind])
            for layer in range(self.layers):
                index = gone[layer].nonzero()[:, 0]
                if len(index):
                    self._take_out(trainer, layer, kind, index)
        trainer.write_back()

    def _take_out(self, trainer: TrainEngine, layer: int, kind: str, index: Tensor) -> None:
        for name, axis, size in self.parts(layer, kind):
            p = trainer.named[name]
            rows = (index[:, None] * size + torch.arange(size, device=index.device)).flatten()
            if axis == 1 and name in self._taken:
                live = ~(p == 0).all(0)
                live[rows] = False
                correct(p.data, self._taken[name], rows, live.nonzero()[:, 0], self.config.damping)
            cut = self.cut.setdefault(name, torch.zeros(p.shape, dtype=torch.bool, device=p.device))
            cut.index_fill_(axis, rows, True)
            p.data.masked_fill_(cut, 0.0)

    def _watch(self, trainer: TrainEngine) -> None:
        """Gather the inputs of down and o in the coming step if it ends with a cut; else none."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._taken = [], {}
        if not self.config.correct or trainer.steps_done + 1 not in self.steps:
            return
        kinds = {"mlp": "mlp.down", "groups": "attention.o"}
        for layer in range(self.layers):
            for kind, name in kinds.items():
                if getattr(self.config, kind):
                    module = trainer.model.get_submodule(f"layers.{layer}.{name}")
                    hook = _gram(self._taken, f"layers.{layer}.{name}.weight")
                    self._handles.append(module.register_forward_pre_hook(hook))

    def finish(self, trainer: TrainEngine) -> None:
        super().finish(trainer)
        for handle in self._handles:
            handle.remove()
        self._handles = []


def _gram(into: dict[str, Tensor], name: str) -> Any:
    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        x_RC = args[0].detach().flatten(0, -2).float()
        into[name] = into[name] + x_RC.T @ x_RC if name in into else x_RC.T @ x_RC

    return hook


def taylor(weight: Tensor, gradient: Tensor) -> Tensor:
    """What the loss changes by without each weight, to second order, the Hessian being g^2 on its diagonal; negated."""
    step = gradient * weight
    return step - step.square() / 2


def choose(score_LC: Tensor, count: int) -> Tensor:
    """bool (L, C): the `count` least scores over all layers, never the last one of a layer."""
    gone = torch.zeros_like(score_LC, dtype=torch.bool)
    left = score_LC.isfinite().sum(1).tolist()
    for flat in score_LC.flatten().argsort(stable=True).tolist():
        if count <= 0:
            break
        layer, column = divmod(flat, score_LC.shape[1])
        if left[layer] > 1 and bool(score_LC[layer, column].isfinite()):
            gone[layer, column] = True
            left[layer] -= 1
            count -= 1
    return gone


def correct(weight_OI: Tensor, gram_II: Tensor, gone: Tensor, stay: Tensor, damping: float) -> None:
    """Let the columns `stay` take over what the columns `gone` did, in place, by least squares on the inputs."""
    H = gram_II.double()
    H = H + damping * H.diagonal().mean() * torch.eye(len(H), dtype=H.dtype, device=H.device)
    solved_SG = torch.linalg.solve(H[stay][:, stay], H[stay][:, gone])
    weight_OI[:, stay] += (weight_OI[:, gone].double() @ solved_SG.T).to(weight_OI.dtype)
