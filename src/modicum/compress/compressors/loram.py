"""loram: MLP channels and key/value groups cut out, for a small model on which an adapter for the large one is trained.

    channel c:   gate and up row c, down column c         of least ||down_c|| sqrt(E h_c^2)
    KV group j:  k and v rows of head j, q rows and o columns of its H / G query heads    of least sum ||o_i||^2 E x_i^2

The first and last layers stay whole. The result is a plain decoder whose layers differ in width. A LoRA trained on it
goes into the uncut model through `adapt.recover.recover`: rows of B (gate, up, q, k, v) and columns of A (down, o)
return to where they were cut from, with zeros between. Trained on little, used on much:

    modicum compress BIG --with loram:mlp=0.5 --calibration CURATED --out SMALL
    modicum adapt SMALL PAIRS --out RUN          then   recover("RUN/adapter", "SMALL", "BIG", "ADAPTER")

A little pretraining of SMALL in between (alignment) closes the gap between the two. Zhang et al. 2025,
arXiv:2502.13533, section 3 (ICLR 2025). Departs: importance from activations and weights, where the paper takes
LLM-Pruner's gradients; the unstructured variants, in which no size changes, are magnitude, wanda and sparsegpt.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from modicum.compress.compressors import BlockJob, Compressor
from modicum.core.errors import UserError
from modicum.model.config import DecoderConfig
from modicum.model.decoder import Decoder


@dataclass(frozen=True, kw_only=True)
class Config:
    mlp: Annotated[float, Field(ge=0, lt=1)] = 0.5  # part of a layer's MLP channels to cut
    groups: Annotated[int, Field(ge=0)] = 0  # key/value heads to cut in a layer, with their query heads
    first: Annotated[int, Field(ge=0)] = 3  # layers at the beginning that stay whole
    last: Annotated[int, Field(ge=0)] = 2  # and at the end


TOY = Config(first=1, last=0)
CLAIM = {"figure": "16.95 times fewer parameter bytes in training, better than LoRA on a 13B model",
         "where": "abstract", "scale": "Llama-2-70B"}  # fmt: skip
SWEEP = ("mlp=0.3", "mlp=0.5")


class LoRam(Compressor):
    requires = frozenset({"calibration_text"})
    leaves = "shape"
    needs: ClassVar[frozenset[str]] = frozenset({"squares"})
    config: Config

    def __init__(self, config: Config):
        super().__init__(config)
        self._cut: dict[int, dict[str, list[int]]] = {}  # by layer: channels and groups that go
        self._layers = 0

    def check(self, shape: DecoderConfig) -> None:
        c = self.config
        if c.first + c.last >= shape.layers:
            raise UserError(f"loram: first={c.first} and last={c.last} leave none of {shape.layers} layers to cut")
        for layer in shape.per_layer[c.first : shape.layers - c.last]:
            if layer.mixer != "softmax":
                raise UserError(f"loram cuts softmax attention; this model has {layer.mixer}")
            if c.groups >= layer.kv_heads:
                raise UserError(f"loram: groups={c.groups} leaves none of {layer.kv_heads} key/value heads; cut fewer")
        self._layers = shape.layers

    def begin(self, weights: Any) -> None:
        names = [name for name, _ in weights()]
        self._layers = max(int(name.split(".")[1]) for name in names) + 1

    def block(self, job: BlockJob) -> None:
        """Weights of what is cut become zero; `finish` takes them out."""
        c, block = self.config, job.block
        if not c.first <= job.index < self._layers - c.last:
            return
        if not {"mlp.down", "attention.o"} <= set(job.linears):
            raise UserError("loram cuts whole layers: give --targets 'layers.*'")
        down, o = job.linears["mlp.down"].weight.detach(), job.linears["attention.o"].weight.detach()
        channels = (down.norm(dim=0) * job.statistics["mlp.down"].mean_square.to(down).sqrt()).argsort(stable=True)
        attention: Any = block.get_submodule("attention")
        columns = o.square().sum(0) * job.statistics["attention.o"].mean_square.to(o)
        groups = columns.view(len(attention.k.weight) // attention.head_dim, -1).sum(1).argsort(stable=True)
        cut = {
            "channels": sorted(channels[: round(c.mlp * down.shape[1])].tolist()),
            "groups": sorted(groups[: c.groups].tolist()),
        }
        self._cut[job.index] = cut
        with torch.no_grad():
            for layer, axis, index in parts(block, cut):
                layer.weight.index_fill_(axis, index, 0.0)
                if axis == 0 and layer.bias is not None:
                    layer.bias.index_fill_(0, index, 0.0)

    def finish(self, model: Decoder) -> Decoder:
        return without(model, self._cut)

    def state(self) -> dict[str, Any]:
        return {"cut": self._cut}

    def set_state(self, state: dict[str, Any]) -> None:
        self._cut = {int(index): cut for index, cut in state["cut"].items()}


def head_rows(groups: list[int], width: int) -> Tensor:
    """Rows of the heads `groups`, each of `width` rows."""
    return torch.tensor([g * width + i for g in groups for i in range(width)], dtype=torch.int64)


def parts(block: nn.Module, cut: dict[str, list[int]]) -> list[tuple[Any, int, Tensor]]:
    """(linear layer, axis of its weight, index) of all that goes with the cut channels and groups."""
    attention: Any = block.get_submodule("attention")
    mlp: Any = block.get_submodule("mlp")
    dim, kv_heads = attention.head_dim, len(attention.k.weight) // attention.head_dim
    channels = torch.tensor(cut["channels"], dtype=torch.int64)
    keys, queries = (head_rows(cut["groups"], n) for n in (dim, len(attention.q.weight) // kv_heads))
    made = [(mlp.up, 0, channels), (mlp.down, 1, channels)]
    made += [(mlp.gate, 0, channels)] if mlp.gated else []
    made += [(attention.k, 0, keys), (attention.v, 0, keys), (attention.q, 0, queries), (attention.o, 1, queries)]
    return made


@torch.no_grad()
def without(model: Decoder, cut: dict[int, dict[str, list[int]]]) -> Decoder:
    """A decoder of the same modules without the channels and groups that are cut, by layer."""
    overrides = []
    for index, shape in enumerate(model.config.per_layer):
        gone = cut.get(index, {"channels": [], "groups": []})
        fewer = {
            "mlp_width": shape.mlp_width - len(gone["channels"]),
            "kv_heads": shape.kv_heads - len(gone["groups"]),
            "heads": shape.heads - len(gone["groups"]) * (shape.heads // shape.kv_heads),
        }
        overrides.append(dict(model.config.overrides[index] if model.config.overrides else {}) | fewer)
    config = dataclasses.replace(model.config, overrides=tuple(overrides))
    if config.overrides and not model.config.overrides:  # which a family's own config.json cannot describe
        config = dataclasses.replace(config, family="modicum")
    with torch.device("meta"):
        made = Decoder(config, init=False)
    for name, module in model.named_children():
        if name != "layers":
            setattr(made, name, module)
    for index, layer in enumerate(model.layers):
        for linear, axis, gone_index in parts(layer, cut[index]) if index in cut else ():
            keep = torch.ones(linear.weight.shape[axis], dtype=torch.bool)
            keep[gone_index] = False
            linear.weight = nn.Parameter(linear.weight.detach()[keep] if axis == 0 else linear.weight.detach()[:, keep])
            if axis == 0:
                linear.out_features = len(linear.weight)
                if linear.bias is not None:
                    linear.bias = nn.Parameter(linear.bias.detach()[keep])
            else:
                linear.in_features = linear.weight.shape[1]
        made.layers[index] = layer
    return made.train(model.training)
