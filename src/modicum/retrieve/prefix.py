"""Keys and values in front of a frozen decoder: what a memory of documents gives it to read.

Shape letters: L layers, B batch, T tokens, H query heads, G key/value heads, P entries of the prefix, E head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from modicum.core.errors import UserError
from modicum.model.attend import attention, pattern_of


@dataclass(frozen=True)
class Prefix:
    """k and v of every layer, each (B, G, P, E), as they are after rotation."""

    k: Sequence[Tensor]
    v: Sequence[Tensor]

    @property
    def length(self) -> int:
        return int(self.k[0].shape[2])

    def rows(self, rows: Sequence[int] | Tensor) -> Prefix:
        """That of some rows of the batch."""
        index = torch.as_tensor(rows, device=self.k[0].device)
        return Prefix([k[index] for k in self.k], [v[index] for v in self.v])


class PrefixAttend:
    """Causal attention in which every token also sees the whole prefix; tokens take the positions after it."""

    def __init__(self, prefix: Prefix):
        self.prefix = prefix

    def next_positions(self, tokens_BT: Tensor) -> Tensor:
        first = self.prefix.length
        return torch.arange(first, first + tokens_BT.shape[1], device=tokens_BT.device)[None]

    def __call__(
        self,
        layer: int,
        q_BHTE: Tensor,
        k_BGSE: Tensor,
        v_BGSE: Tensor,
        *,
        window: int | None,
        scale: float,
        softcap: float | None,
        pattern: Any = None,
    ) -> Tensor:
        if pattern is not None:
            raise UserError("a memory needs a model whose layers have no attention pattern of their own; give another")
        T, P = q_BHTE.shape[2], self.prefix.length
        k_BGSE = torch.cat([self.prefix.k[layer].to(k_BGSE), k_BGSE], 2)
        v_BGSE = torch.cat([self.prefix.v[layer].to(v_BGSE), v_BGSE], 2)
        at_T = torch.arange(T, device=q_BHTE.device)
        seen_TT = pattern_of(window).allowed(at_T[:, None], at_T[None])
        seen_TS = torch.cat([seen_TT.new_ones(T, P), seen_TT], 1)
        return attention(q_BHTE, k_BGSE, v_BGSE, scale=scale, softcap=softcap, mask=seen_TS[None, None])


class FrozenReader:
    """A decoder that nothing trains, with its tokenizer. `open` takes a folder or a known name."""

    def __init__(self, model: Any, tokenizer: Any):
        self.model, self.tokenizer = model.eval().requires_grad_(False), tokenizer

    @classmethod
    def open(cls, path: str, device: str = "cpu") -> FrozenReader:
        from modicum.data.tokenizer import Tokenizer
        from modicum.model.folder import find_folder, load_model

        folder = find_folder(path)
        dtype = torch.float32 if device == "cpu" else None
        return cls(load_model(folder, dtype=dtype, device=device), Tokenizer.load(folder))

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """(G, E) of every layer."""
        return [(layer.kv_heads, layer.head_dim) for layer in self.model.config.per_layer]

    def losses(self, prefix: Prefix | None, prompts: Sequence[str], targets: Sequence[str], most: int = 256) -> Tensor:
        """Mean cross-entropy of each target's tokens after its prompt, (B,); targets are cut to `most` tokens."""
        t = self.tokenizer
        heads = t.encode_batch(list(prompts), specials=False)
        tails = [ids[:most] for ids in t.encode_batch(list(targets), specials=False)]
        if any(not ids for ids in tails):
            raise UserError(f"target {[bool(i) for i in tails].index(False)} is empty; write what is to be predicted")
        rows = [[t.start_id, *h[-most:], *tail] for h, tail in zip(heads, tails, strict=True)]
        width = max(map(len, rows))
        tokens_BT = torch.full((len(rows), width), t.pad_id)
        target_BT = torch.zeros((len(rows), width), dtype=torch.bool)
        for b, (ids, tail) in enumerate(zip(rows, tails, strict=True)):
            tokens_BT[b, : len(ids)] = torch.tensor(ids)
            target_BT[b, len(ids) - len(tail) : len(ids)] = True
        tokens_BT, target_BT = tokens_BT.to(self.model.device), target_BT.to(self.model.device)
        h_BTD = self.model.hidden(tokens_BT, attend=None if prefix is None else PrefixAttend(prefix))
        logits_NV = self.model.head(h_BTD[:, :-1][target_BT[:, 1:]])
        loss_N = torch.nn.functional.cross_entropy(logits_NV, tokens_BT[:, 1:][target_BT[:, 1:]], reduction="none")
        return torch.stack([part.mean() for part in torch.split(loss_N, [len(tail) for tail in tails])])

    @torch.inference_mode()
    def answer(self, prefix: Prefix | None, prompt: str, most: int = 32) -> str:
        """The greedy continuation of a prompt, one row of a prefix in front of it."""
        t = self.tokenizer
        ids = [t.start_id, *t.encode(prompt, specials=False)]
        first = len(ids)
        for _ in range(most):
            attend = None if prefix is None else PrefixAttend(prefix)
            h_BTD = self.model.hidden(torch.tensor([ids], device=self.model.device), attend=attend)
            new = int(self.model.head(h_BTD[:, -1])[0].argmax())
            if new in t.stop_ids:
                break
            ids.append(new)
        return str(t.decode(ids[first:])).strip()
