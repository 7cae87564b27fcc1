"""Bottleneck adapters inside the layers of a frozen encoder, and beside them: a path of trained modules to the loss.

Shape letters: N texts, T tokens, D width, R bottleneck.

    inside:  y <- y + U s(D y)            after attention and after the feed-forward network of every layer
    beside:  a_{l+1} = a_l + U'_l s(D'_l h_l),   layer l + 1 reads h_l + a_{l+1}

h_l is the output of frozen layer l. The state a passes from one layer's trained modules to the next without a frozen
layer between them. U and U' start at 0, so an encoder with fresh adapters gives what it gave.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from modicum.core.errors import UserError
from modicum.core.files import read_json, write_json

FILE, WEIGHTS, BASE = "connected.json", "connected.safetensors", "base"


class Bottleneck(nn.Module):
    """U s(D x), of the input's shape; 0 at first."""

    def __init__(self, width: int, rank: int):
        super().__init__()
        self.down, self.up = nn.Linear(width, rank), nn.Linear(rank, width)
        nn.init.normal_(self.down.weight, std=width**-0.5)
        nn.init.zeros_(self.down.bias)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x_NTD: Tensor) -> Tensor:
        out: Tensor = self.up(nn.functional.gelu(self.down(x_NTD)))
        return out


class ConnectedAdapters(nn.Module):
    """The adapters of an encoder of `layers` layers; a bottleneck of 0 leaves that path out."""

    def __init__(self, width: int, layers: int, inside: int, beside: int):
        super().__init__()
        self.shape = {"inside": inside, "beside": beside}
        self.after_attention = nn.ModuleList(Bottleneck(width, inside) for _ in range(layers if inside else 0))
        self.after_mlp = nn.ModuleList(Bottleneck(width, inside) for _ in range(layers if inside else 0))
        self.beside = nn.ModuleList(Bottleneck(width, beside) for _ in range(layers if beside else 0))
        self._hooks: list[Any] = []
        self._state: Tensor | None = None

    def attach(self, model: Any) -> None:
        """Watch the layers of a BERT-like model; `detach` ends it. Its own weights are neither changed nor frozen."""
        stack = getattr(getattr(model, "encoder", None), "layer", None)
        if stack is None or not all(hasattr(layer, "attention") and hasattr(layer, "output") for layer in stack):
            raise UserError("adapters are attached to encoders of the BERT family; this model has other layers")
        if self._hooks:
            raise UserError("these adapters are attached already; detach them first")
        for n, layer in enumerate(stack):
            if self.shape["inside"]:
                self._hooks.append(layer.attention.output.register_forward_hook(self._inside(self.after_attention[n])))
                self._hooks.append(layer.output.register_forward_hook(self._inside(self.after_mlp[n])))
            if self.shape["beside"]:
                self._hooks.append(layer.register_forward_hook(self._beside(n)))

    def detach(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._state = [], None

    @staticmethod
    def _inside(adapter: nn.Module) -> Any:
        return lambda _m, _i, y_NTD: y_NTD + adapter(y_NTD)

    def _beside(self, n: int) -> Any:
        def hook(_m: Any, _i: Any, output: Any) -> Any:
            h_NTD = output[0] if isinstance(output, tuple) else output
            step_NTD = self.beside[n](h_NTD)
            state_NTD = step_NTD if n == 0 or self._state is None else self._state + step_NTD
            self._state = state_NTD if n + 1 < len(self.beside) else None
            sum_NTD = h_NTD + state_NTD
            return (sum_NTD, *output[1:]) if isinstance(output, tuple) else sum_NTD

        return hook

    def save(self, folder: Path) -> None:
        """Beside a folder `base` of the encoder itself, which the caller writes."""
        from safetensors.torch import save_file

        save_file({n: p.detach().contiguous() for n, p in self.state_dict().items()}, folder / WEIGHTS)
        write_json(folder / FILE, self.shape)


def attached(folder: Path, model: Any) -> ConnectedAdapters:
    """The adapters of `folder`, attached to the model of its base."""
    from safetensors.torch import load_file

    shape = read_json(folder / FILE)
    made = ConnectedAdapters(model.config.hidden_size, len(model.encoder.layer), shape["inside"], shape["beside"])
    made.load_state_dict(load_file(folder / WEIGHTS))
    made.to(next(model.parameters()).device).eval().attach(model)
    return made


def fraction(adapters: nn.Module, model: nn.Module) -> float:
    """Trained parameters over those of the frozen encoder."""
    return sum(p.numel() for p in adapters.parameters()) / sum(p.numel() for p in model.parameters())
