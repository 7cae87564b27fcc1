"""Models beside the served one (port guide): a cache of each in the same blocks, and one distribution of all.

A block number means the same tokens in every model's cache, so whatever the engine does with blocks (prefix hits,
preemption, moves of accepted drafts) holds for all of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from modicum.core import registry
from modicum.core.errors import UserError
from modicum.model.config import DecoderConfig
from modicum.model.decoder import Decoder
from modicum.model.folder import load_config, load_model
from modicum.serve.backends import Runner
from modicum.serve.backends.choose import make_runner
from modicum.serve.cacheforms import CacheForm
from modicum.serve.config import EngineConfig
from modicum.serve.guides import Guide
from modicum.serve.pages import Storage
from modicum.serve.plan import AttentionPlan
from modicum.serve.table import BlockTable
from modicum.serve.uneven import largest


def plain_form(shape: DecoderConfig, dtype: torch.dtype) -> CacheForm:
    form: CacheForm = registry.build("cacheform", "plain", largest(shape)[1], dtype)
    return form


class Beside:
    """The models that a guide names, loaded, and their caches once `attach` has made them."""

    def __init__(self, config: EngineConfig, main: Decoder, dtype: torch.dtype):
        self.guide: Guide = registry.build("guide", config.guide)
        self.config, self.dtype = config, dtype
        self.models: list[Decoder] = []
        for name in self.guide.models():
            shape = load_config(name)
            if shape.vocab_size != main.config.vocab_size:
                raise UserError(
                    f"guide: {name} has {shape.vocab_size} tokens and the served model {main.config.vocab_size}; "
                    "models that are combined need one tokenizer"
                )
            self.models.append(load_model(name, main.dtype, main.device).eval())
        self.storages: list[Storage] = []

    @property
    def shapes(self) -> list[DecoderConfig]:
        return [model.config for model in self.models]

    def block_bytes(self) -> int:
        """Bytes of one block in the caches of all models beside."""
        P = self.config.block_size
        return sum(plain_form(s, self.dtype).bytes_of_layers(s.layers, largest(s)[0], P) for s in self.shapes)

    def runner(self, main: Runner, n_blocks: int, table: BlockTable) -> Runner:
        """Make the caches; what runs all models in a step."""
        runners = []
        for model in self.models:
            form = plain_form(model.config, self.dtype)
            storage = Storage(model.config, n_blocks, self.config.block_size, form, model.device)
            self.storages.append(storage)
            runners.append(make_runner(model, storage, table, self.config.cuda_graphs))
        return main if not self.models else Guided(main, self.guide, runners, self.storages)


class Guided(Runner):
    """Runs the main model's step, then the others', on plans that differ in the memory alone."""

    def __init__(self, main: Runner, guide: Guide, beside: Sequence[Runner], storages: Sequence[Storage]):
        super().__init__(*main.backends)
        self.guide, self.beside, self.storages = guide, beside, storages

    def __call__(self, plan: AttentionPlan, rows: Sequence[int]) -> Tensor | None:
        main_RV = super().__call__(plan, rows)
        others = [
            runner(AttentionPlan(plan.works, storage, plan.table, more_rows=plan.more_rows), rows)
            for runner, storage in zip(self.beside, self.storages, strict=True)
        ]
        return None if main_RV is None else self.guide.combine(main_RV, [x for x in others if x is not None])

    def logits(self, rows: Sequence[int]) -> Tensor:
        return self.guide.combine(super().logits(rows), [runner.logits(rows) for runner in self.beside])
