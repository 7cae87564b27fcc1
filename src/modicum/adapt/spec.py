"""What an adaptation is told: a training run's settings, with those of the form that is attached."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from modicum.core import compose
from modicum.core.choice import Choice
from modicum.core.errors import UserError
from modicum.core.spec import MethodOf, option
from modicum.train.config import TrainConfig
from modicum.train.config import members as run_members


@dataclass(frozen=True, kw_only=True, init=False)
class AdaptSpec(TrainConfig):
    """Settings of `adapt.run.adapt`. `dense` as form trains the layers whole."""

    NAME = "setting of an adaptation"
    METHODS = {"optimizer": "adamw:weight_decay=0", "packing": "whole"}
    BATCH_TOKENS = 4096

    form: Annotated[Any, MethodOf("linear")] = option(
        "lora:rank=8", "What is trained: lora:rank=8,alpha=16, dense, ... (modicum ls linear)."
    )
    targets: tuple[str, ...] | None = option(
        None, "Layers, as globs with commas between, e.g. 'layers.*.attention.*' (where the form's paper puts it)."
    )
    base: Annotated[Any, MethodOf("linear")] = option(None, "Form of the frozen weights below it, e.g. int4:group=64.")
    adapter: str | None = option(
        None,
        "A LoRA adapter in PEFT's format to train further, with a new optimizer and schedule, instead of a new one.",
    )
    epochs: float | None = option(None, "Length of the run instead: passes over the pairs (3 by default).", above=0)
    lr: float | None = option(5e-4, "Peak learning rate.", above=0)
    sequence_length: int = option(512, "Tokens per row; longer answers are cut.", least=1)
    eval_every: int = option(0, "Steps between held-out losses, 0 for only at the end.", least=0, resumable=True)
    heldout: float = option(0.1, "Share of the questions kept for the loss before and after.", least=0, most=0.99)
    limit: int | None = option(None, "Pairs to train on at most.", least=1)
    merge: bool = option(False, "Also write the model with the update merged in.")

    LENGTHS = TrainConfig.LENGTHS | {"epochs": "3"}

    def check(self) -> None:
        if all(getattr(self, name) is None for name in self.LENGTHS):
            object.__setattr__(self, "epochs", 3.0)
        if self.targets is not None and not self.targets:
            raise UserError("targets is empty; name the layers to adapt, for instance 'layers.*.attention.*'")
        if self.adapter is not None and self.form is not None and Choice.parse("linear", self.form).method != "lora":
            raise UserError(f"adapter={self.adapter} is trained further as LoRA, not as {self.form}; leave form out")
        if self.adapter is not None and self.targets is not None:
            raise UserError(f"adapter={self.adapter} says itself which layers it adapts; leave targets out")
        super().check()


def members(spec: AdaptSpec) -> list[compose.Member]:
    """The adaptation's methods and settings, for `core.compose.resolve`."""
    form = compose.member("linear", spec.form)
    chosen = [*run_members(spec, form=False), form]
    chosen.append(compose.setting(f"adapting with form={spec.form}", requires={"trainable", "fit"}))
    chosen.append(compose.setting("question/answer pairs", requires={"document_mask"}, remedy="set packing=whole"))
    if spec.merge:
        chosen.append(compose.setting("merge=true", requires={"merge"}, remedy="leave merge out"))
    if spec.base is not None and "adapter" in form.provides:
        base = compose.member("linear", spec.base)
        compose.resolve([base, compose.setting(f"base={spec.base}", requires={"adapter_base"})])
    return chosen
