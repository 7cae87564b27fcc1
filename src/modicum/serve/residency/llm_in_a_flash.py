"""llm-in-a-flash: MLP neurons stay on disk until a predictor says that they will be active.

    active(x) = act(gate x) != 0            most neurons of a ReLU are not
    predicted = (U V x) > threshold         of each layer: low rank, on what the MLP is given
    in memory = neurons predicted for one of the last `window` tokens
    read      = those predicted now and not in memory, a bundle (rows of up and gate, column of down) at once

y is then the sum over what is in memory: a neuron that was predicted wrongly adds 0, one that was missed is lost
(`recall`). Attention, norms, biases and embedding are always in memory. The table of bundles has room for `resident` of
a layer's neurons; what a token needs beyond that is read, used and dropped, and prompts stream through the layer.
Predictors are trained when the folder is written, by logistic regression on calibration text, the active neurons
weighing more, so that few are missed.

Alizadeh et al. 2023, arXiv:2312.11514, section 3. Departs: the predictor reads the normed input of the MLP; reads are
one at a time. A model whose activation is not ReLU is refused: with SiLU no neuron is inactive, and a threshold on its
gate is another method.
"""

from __future__ import annotations

import os
from collections import deque
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from modicum.core.errors import UserError
from modicum.model.decoder import Decoder
from modicum.model.elastic import nbytes
from modicum.model.safetensor import SafetensorsFile, write_safetensors
from modicum.serve.residency import Residency
from modicum.serve.residency._store import BUNDLES, BundleFile, Table, blank, bundles, load_dense, write_dense

PREDICTORS = "predictors.safetensors"
ROWS = 8  # tokens up to which neurons are predicted; more of them stream through the layer
STREAM = 1024  # neurons read at a time then


@dataclass(frozen=True, kw_only=True)
class Config:
    window: Annotated[int, Field(ge=1)] = 4  # tokens whose neurons stay
    resident: Annotated[float, Field(gt=0, le=1)] = 0.33  # room for neurons of a layer, as a fraction
    rank: Annotated[int, Field(ge=1)] = 64  # of the predictors
    threshold: float = 0.0  # logit above which a neuron is read
    steps: Annotated[int, Field(ge=0)] = 300  # of training the predictors of a layer
    positive: Annotated[float, Field(gt=0)] = 4.0  # weight of active neurons in that training


SWEEP = ("window=4", "window=1", "window=16,resident=0.5")
TOY = Config(threshold=-1e9, resident=0.5, rank=4, steps=2)
CLAIM = {
    "figure": "models of twice the memory, 4 to 5 times as fast as loading on demand on a CPU",
    "where": "abstract",
    "scale": "OPT-6.7B and relufied Falcon-7B",
}


class LlmInAFlash(Residency):
    config: Config
    reads_text = True

    def prepare(self, model: Decoder, folder: Path, tokens_NT: Tensor | None) -> None:
        if any(layer.activation != "relu" for layer in model.config.per_layer):
            kinds = ", ".join(sorted({layer.activation for layer in model.config.per_layer}))
            raise UserError(
                f"llm-in-a-flash needs ReLU, whose neurons are mostly inactive; this model has {kinds}: train one with "
                "activation relu, or serve it with --form int4"
            )
        if tokens_NT is None:
            raise UserError("llm-in-a-flash fits predictors on text; give --calibration TEXT")
        write_dense(model, folder, lambda name: ".mlp." not in name or name.endswith("bias"))
        with open(folder / BUNDLES, "wb") as file:
            for layer in model.layers:
                file.write(bundles(layer.mlp).contiguous().view(torch.uint8).numpy().tobytes())
        predictors: dict[str, Tensor] = {}
        for index, (x_RD, active_RF) in enumerate(seen(model, tokens_NT)):
            down, up, recall = fit(x_RD, active_RF, self.config)
            predictors |= {f"{index}.down": down, f"{index}.up": up, f"{index}.recall": recall}
        write_safetensors(folder / PREDICTORS, [(n, tuple(t.shape), t.dtype, t.clone) for n, t in predictors.items()])

    def load(self, folder: Path) -> Decoder:
        model = blank(folder)
        first = 0
        with SafetensorsFile(folder / PREDICTORS) as file:
            for index, layer in enumerate(model.layers):
                pair = (file.read(f"{index}.down").clone(), file.read(f"{index}.up").clone())
                module = FlashMlp(layer.mlp, self.config, folder / BUNDLES, first, pair)
                layer.mlp = module
                first += module.file.size * module.file.neurons
        if first != os.path.getsize(folder / BUNDLES):
            raise UserError(f"{folder / BUNDLES} is not as long as config.json says; write the folder again")
        load_dense(model, folder)
        return model.eval()

    def stats(self, model: Decoder) -> dict[str, float]:
        flash: list[Any] = [layer.mlp for layer in model.layers]
        return {
            "resident_bytes": nbytes(model) + sum(m.table.rows_KPD.nbytes for m in flash),
            "read_bytes": sum(m.file.read_bytes for m in flash),
            "reads": sum(m.file.reads for m in flash),
        }


class FlashMlp(nn.Module):
    """Stands where a decoder's MLP of ReLU neurons was. `predictor`: V (r, D) and U (F, r)."""

    gated, act = False, staticmethod(F.relu)
    v_RD: Tensor
    u_FR: Tensor

    def __init__(self, mlp: Any, config: Config, path: Path, first: int, predictor: tuple[Tensor, Tensor]):
        super().__init__()
        neurons, width = mlp.up.weight.shape
        self.has_gate, self.config = mlp.gated, config
        self.dtype = predictor[0].dtype
        parts = 3 if mlp.gated else 2
        self.file = BundleFile(path, first, neurons, parts, width, self.dtype)
        capacity = max(1, round(config.resident * neurons))
        self.table = Table(neurons, capacity, parts, width, self.dtype)
        self.recent: deque[np.ndarray] = deque(maxlen=config.window)
        self.register_buffer("v_RD", predictor[0])
        self.register_buffer("u_FR", predictor[1])
        for name in ("up", "gate", "down"):  # biases alone, under the names that they had
            bias = getattr(getattr(mlp, name, None), "bias", None)
            if bias is not None:
                holder = nn.Module()
                holder.register_parameter("bias", bias)
                setattr(self, name, holder)

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_ND = x_BTD.flatten(0, -2)
        y_ND = self._few(x_ND) if len(x_ND) <= ROWS else self._stream(x_ND, np.arange(self.file.neurons))
        if (bias := self._bias("down")) is not None:
            y_ND = y_ND + bias
        return y_ND.view(x_BTD.shape)

    def predicted(self, x_ND: Tensor) -> np.ndarray:
        """Neurons that are expected to be active for one of the rows, ascending."""
        logits_NF = (x_ND @ self.v_RD.T @ self.u_FR.T).float()
        return (logits_NF > self.config.threshold).any(0).nonzero()[:, 0].cpu().numpy()

    def _bias(self, name: str) -> Tensor | None:
        bias: Tensor | None = getattr(getattr(self, name, None), "bias", None)
        return bias

    def _few(self, x_ND: Tensor) -> Tensor:
        table, needed = self.table, self.predicted(x_ND)
        self.recent.append(needed)
        missing = needed[table.slot_F[needed] < 0]
        # Out go, first, neurons of no token in the window, then of the oldest ones, as far as room is needed.
        kept = list(self.recent)
        while True:
            stay = np.zeros(self.file.neurons, dtype=bool)
            stay[np.concatenate(kept)] = True
            loaded = table.neuron_K[: table.used]
            if stay[loaded].sum() + len(missing) <= len(table.neuron_K) or len(kept) == 1:
                break
            kept.pop(0)
        table.remove(loaded[~stay[loaded]])
        fits = missing[: len(table.neuron_K) - table.used]
        if len(fits):
            table.insert(fits, self.file.read(fits))
        y_ND = self._sum(x_ND, table.rows_KPD[: table.used], table.neuron_K[: table.used])
        beyond = missing[len(fits) :]
        return y_ND if not len(beyond) else y_ND + self._stream(x_ND, beyond)

    def _stream(self, x_ND: Tensor, neurons: np.ndarray) -> Tensor:
        """The part of these neurons, read from disk and dropped."""
        y_ND = torch.zeros_like(x_ND)
        for start in range(0, len(neurons), STREAM):
            some = neurons[start : start + STREAM]
            y_ND += self._sum(x_ND, self.file.read(some), some)
        return y_ND

    def _sum(self, x_ND: Tensor, rows_KPD: Tensor, neuron_K: np.ndarray) -> Tensor:
        index = torch.from_numpy(neuron_K.copy())

        def product(part: int, name: str) -> Tensor:
            made = x_ND @ rows_KPD[:, part].T
            bias = self._bias(name)
            return made if bias is None else made + bias[index]

        up_NK = product(0, "up")
        inner_NK = F.relu(product(1, "gate")) * up_NK if self.has_gate else F.relu(up_NK)
        return inner_NK @ rows_KPD[:, -1]


@torch.no_grad()
def seen(model: Decoder, tokens_NT: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Of each layer: what the MLP is given (R, D), and which neurons are active then (R, F)."""
    inputs: list[list[Tensor]] = [[] for _ in model.layers]

    def keep(index: int, module: Any, args: tuple[Tensor, ...]) -> None:
        inputs[index].append(args[0].flatten(0, -2))

    handles = [m.mlp.register_forward_pre_hook(partial(keep, i)) for i, m in enumerate(model.layers)]  # type: ignore[union-attr]
    try:
        for tokens_BT in tokens_NT.split(4):
            model.hidden(tokens_BT)
    finally:
        for handle in handles:
            handle.remove()
    made = []
    for layer, xs in zip(model.layers, inputs, strict=True):
        mlp: Any = layer.get_submodule("mlp")
        x_RD = torch.cat(xs)
        made.append((x_RD, (mlp.gate if mlp.gated else mlp.up)(x_RD) > 0))
    return made


def fit(x_RD: Tensor, active_RF: Tensor, config: Config) -> tuple[Tensor, Tensor, Tensor]:
    """V (r, D), U (F, r) in the model's dtype, and the part of active neurons that they predict on this text."""
    D, neurons = x_RD.shape[1], active_RF.shape[1]
    rank = min(config.rank, D)
    random = torch.Generator().manual_seed(0)
    down = (torch.randn(rank, D, generator=random) * D**-0.5).requires_grad_()
    up = torch.zeros(neurons, rank).requires_grad_()
    optimizer = torch.optim.Adam([down, up], lr=1e-2)
    weight = torch.tensor(config.positive)
    for step in range(config.steps):
        rows = torch.randint(len(x_RD), (min(256, len(x_RD)),), generator=random)
        with torch.enable_grad():
            logits_RF = x_RD[rows].float() @ down.T @ up.T
            loss = F.binary_cross_entropy_with_logits(logits_RF, active_RF[rows].float(), pos_weight=weight)
            optimizer.zero_grad()
            loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * (1 - step / config.steps)
        optimizer.step()
    v, u = down.detach().to(x_RD.dtype), up.detach().to(x_RD.dtype)
    hit = ((x_RD.float() @ v.float().T @ u.float().T) > config.threshold)[active_RF]
    return v, u, hit.float().mean().reshape(1) if hit.numel() else torch.ones(1)
