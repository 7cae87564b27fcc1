"""What the tables of adaptations share: SmolLM2-135M-Instruct with an adapter trained on examples, and its replies."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from modicum.adapt.examples import Example
from modicum.adapt.load import load_adapted
from modicum.adapt.run import adapt
from modicum.adapt.spec import AdaptSpec
from modicum.core.events import Events
from modicum.data.tokenizer import Tokenizer
from modicum.evaluate.answer import Answerer
from modicum.evaluate.tasks import Generate
from modicum.model import attach
from modicum.model.folder import find_folder, load_model

MODEL, FORM, BATCH_TOKENS, RATE = "smollm2", "lora:rank=16", 512, 1e-3


def tuned(examples: Sequence[Example], seed: int, *, epochs: float, least: int, model: str | None = None) -> Any:
    """The model adapted to the examples for `epochs`, or for `least` steps where that is more; as it is for none."""
    folder = find_folder(model or MODEL)
    if not examples:
        return load_model(folder, "bfloat16").eval()
    tokens = sum(len(m["content"]) for example in examples for m in example.messages) / 4
    enough = epochs * tokens >= least * BATCH_TOKENS
    length: dict[str, Any] = {"epochs": epochs} if enough else {"steps": least}
    spec = AdaptSpec(
        form=FORM,
        lr=RATE,
        sequence_length=192,
        batch_tokens=BATCH_TOKENS,
        heldout=0.0,
        checkpoint_every=0,
        seed=seed,
        **length,
    )
    with tempfile.TemporaryDirectory() as temporary:
        result = adapt(folder, list(examples), spec, temporary, events=Events(None))
        adapted = load_adapted(folder, adapter=result.adapter, dtype="bfloat16")
    attach.merge(adapted)
    return adapted.eval()


def replies(model: Any, questions: Sequence[str], tokens: int, name: str | None = None) -> list[str]:
    """Greedy replies behind the model's chat template, to the end of the line."""
    answerer = Answerer(model, tokenizer_of(name), template="auto")
    return list(answerer.answers([Generate(question, tokens) for question in questions]))


def tokenizer_of(name: str | None) -> Tokenizer:
    return Tokenizer.load(Path(find_folder(name or MODEL)))
