"""Several adapters on one base model, mixed in one batch: each row goes through the adapter of its sequence.

Every form that adapts a frozen base can be served so (LoRA, Compacter, SVFit, ...): each layer that an adapter changes
becomes a `Routed` layer, which gives every adapter its rows of the step. Rows without an adapter go through the base.
Steps in which no sequence has an adapter run on the fastest backend, as if there were none; the others run on `torch`.

Adapters may be added and removed between steps. A prefix that one adapter computed is never used for another.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from modicum.core.errors import UserError
from modicum.model import attach
from modicum.model.decoder import Decoder
from modicum.model.linear import LinearForm
from modicum.model.linear._adapter import Adapter
from modicum.serve.work import Work

Attach = Callable[[Decoder, str], Mapping[str, LinearForm]]  # puts the adapter of a folder onto a model: its forms


@dataclass(slots=True)
class Routes:
    """Which rows of the step each adapter has: (name or None for the base, rows); empty for none but the base."""

    groups: list[tuple[str | None, Tensor]] = field(default_factory=list)

    def set(self, works: Sequence[Work], device: torch.device) -> None:
        rows: dict[str | None, list[int]] = {}
        for w in works:
            rows.setdefault(w.sample.request.adapter, []).extend(range(w.at, w.at + w.n))
        alone = rows.keys() <= {None}
        self.groups = [] if alone else [(name, torch.tensor(some, device=device)) for name, some in rows.items()]


class Routed(nn.Module):
    """A linear layer with an adapter for some of the rows."""

    def __init__(self, base: nn.Module, routes: Routes):
        super().__init__()
        self.base, self.routes = base, routes
        self.adapters = nn.ModuleDict()  # by position: names may hold any character
        self.names: list[str] = []

    def add(self, name: str, form: LinearForm) -> None:
        self.names.append(name)
        self.adapters[str(len(self.names) - 1)] = form

    def _layer(self, name: str | None) -> nn.Module:
        return self.adapters[str(self.names.index(name))] if name in self.names else self.base

    def forward(self, x_BTI: Tensor) -> Tensor:
        groups = self.routes.groups
        if not groups:
            return self.base(x_BTI)
        if len(groups) == 1:
            return self._layer(groups[0][0])(x_BTI)
        out_BTO: Tensor | None = None
        for name, rows in groups:
            y_BRO = self._layer(name)(x_BTI[:, rows])
            if out_BTO is None:
                out_BTO = y_BRO.new_empty(*x_BTI.shape[:2], y_BRO.shape[-1])
            out_BTO[:, rows] = y_BRO.to(out_BTO.dtype)
        assert out_BTO is not None
        return out_BTO


@dataclass(frozen=True)
class Served:
    """An adapter that is served; salt: what its cached prefixes are named by, another one after each load."""

    name: str
    folder: str
    forms: Mapping[str, LinearForm]
    salt: bytes


class Adapters:
    """The adapters of one engine. The engine's thread owns it."""

    def __init__(self, model: Decoder):
        self.model, self.routes = model, Routes()
        self.served: dict[str, Served] = {}

    def __contains__(self, name: object) -> bool:
        return name in self.served

    def salt(self, name: str | None) -> bytes:
        return b"" if name is None else self.served[name].salt

    def add(self, name: str, folder: str, put_on: Attach) -> None:
        """Load an adapter. Raises `UserError` for a name that is taken, and for one that changes the vocabulary."""
        if name in self.served:
            raise UserError(f"there is an adapter {name!r} already; remove it first, or choose another name")
        self._uninstall()
        if any(isinstance(form, Adapter) for form in attach.forms(self.model).values()):
            raise UserError("the model has an adapter attached already; load it without, or merge it first")
        norms = [(p, p.detach().clone()) for p in self.model.parameters() if p.dim() < 2]
        try:
            forms = dict(put_on(self.model, folder))
            outside = [n for n in forms if not n.startswith("layers.")]
            if outside:
                raise UserError(f"the adapter {folder} changes {outside[0]}; only layers' adapters are served together")
            own = {id(p) for form in forms.values() for p in form.parameters()}
            if any(id(p) not in own for form in forms.values() for p in form.trainable()):
                for parameter, before in norms:
                    parameter.data.copy_(before)
                raise UserError(
                    f"the adapter {folder} changes norms of the model itself, so nothing can share its batch"
                )
            self.served[name] = Served(name, folder, forms, secrets.token_bytes(16))
        finally:
            attach.detach(self.model)  # the base as it was, and `forms` on it
            self.model.requires_grad_(False).eval()
            self._install()

    def remove(self, name: str) -> None:
        """Raises `UserError` for an unknown one."""
        if name not in self.served:
            raise UserError(f"there is no adapter {name!r}; here: {', '.join(self.served) or 'none'}")
        self._uninstall()
        del self.served[name]
        self._install()

    def route(self, works: Sequence[Work]) -> None:
        """Say of a step which rows are whose."""
        if self.served:
            self.routes.set(works, self.model.device)

    def _install(self) -> None:
        for served in self.served.values():
            for name, form in served.forms.items():
                layer = self.model.get_submodule(name)
                if not isinstance(layer, Routed):
                    routed = Routed(layer, self.routes)
                    _set(self.model, name, routed)
                    layer = routed
                layer.add(served.name, form.eval())

    def _uninstall(self) -> None:
        for name, module in list(self.model.named_modules()):
            if isinstance(module, Routed):
                _set(self.model, name, module.base)


def _set(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)
