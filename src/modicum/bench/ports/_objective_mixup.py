"""mixup on few labelled texts, in the training of a LoRA adapter, with and without augmented copies (`labelled`)."""

from modicum.bench.labelled import measure

__all__ = ["measure"]
