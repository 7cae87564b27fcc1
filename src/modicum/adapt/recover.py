"""An adapter that was trained on a model with channels and heads cut out, enlarged for the model as it was.

    B (gate, up, q, k, v): rows return to where they were cut from      A (down, o): columns do      zeros between

The positions are read off the weights: each row of the cut model is a row of the original, in the same order. So the
cut model must be the one that was written by cutting, before anything was trained into it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modicum.adapt.peft_format import load_peft, save_peft
from modicum.core.choice import Choice
from modicum.core.errors import UserError
from modicum.model import attach
from modicum.model.folder import load_model

COLUMNS = ("mlp.down", "attention.o")  # whose inputs were cut; of the others it is outputs


def recover(adapter: str | Path, cut: str | Path, original: str | Path, folder: str | Path) -> Path:
    """Write a PEFT folder for `original` out of `adapter`, which was trained on `cut` or on a continuation of it.

    Raises `UserError` where a row of the cut model is none of the original.
    """
    small, large = load_model(cut), load_model(original)
    before = attach.linears(small)  # plain layers; the adapter's forms take their positions
    weights = {name: attach.plain(layer)[0].detach() for name, layer in before.items()}
    forms: dict[str, Any] = load_peft(small, adapter)
    whole = {name: attach.plain(layer)[0].detach() for name, layer in attach.linears(large).items()}
    made = attach.attach(large, {name: Choice("linear", "lora", dict(vars(f.config))) for name, f in forms.items()})
    with torch.no_grad():
        for name, form in forms.items():
            a_RI, b_OR, _ = form.low_rank()
            target: Any = made[name]
            target.A.zero_()
            target.B.zero_()
            if name.endswith(COLUMNS):
                target.B.copy_(b_OR)
                target.A[:, positions(weights[name].T, whole[name].T, name)] = a_RI.to(target.A.dtype)
            else:
                target.A.copy_(a_RI)
                target.B[positions(weights[name], whole[name], name)] = b_OR.to(target.B.dtype)
    return save_peft(large, folder, str(original))


def positions(few: Tensor, many: Tensor, name: str = "") -> Tensor:
    """Where each row of `few` stands in `many`, ascending; rows alike are taken from the front."""
    if few.shape == many.shape:
        return torch.arange(len(few))
    made, at = [], 0
    for row in few if few.shape[1] == many.shape[1] else ():
        while at < len(many) and not torch.equal(row, many[at]):
            at += 1
        if at == len(many):
            break
        made.append(at)
        at += 1
    if len(made) < len(few):
        raise UserError(
            f"{name}: row {len(made)} of the cut model is none of the original, so nothing says where it was; give the "
            "model as `modicum compress --with loram` wrote it, before it was trained"
        )
    return torch.tensor(made)
