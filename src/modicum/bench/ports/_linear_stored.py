"""Forms in blocks, as `modicum compress` makes them: calibrated and sorted on training text, then cut."""

from __future__ import annotations

import copy
import functools
from typing import Any

from modicum.bench import training
from modicum.bench.measurement import Settings
from modicum.compress import calibration
from modicum.compress.stacking import sort_blocks
from modicum.core import registry
from modicum.core.choice import Choice
from modicum.model import attach, elastic
from modicum.model.decoder import Decoder
from modicum.model.linear._elastic import bits_of

SEQUENCES = 16  # of training text for the layers' inputs, and as many for the order


def applies(choice: Choice) -> bool:
    method: Any = registry.load("linear", choice.method).cls
    return "elastic" in method.provides


def formed(choice: Choice, seed: int, settings: Settings) -> Decoder:
    """The bench's trained decoder, the form in all layers but the head, cut to the `bits` asked for."""
    knobs = {k: v for k, v in choice.knobs.items() if k != "bits"}
    model = copy.deepcopy(_sorted(str(Choice("linear", choice.method, knobs)), seed, settings))
    elastic.trim(elastic.elastic_forms(model), dict.fromkeys(elastic.elastic_forms(model), bits_of(choice.config())))
    return model


@functools.lru_cache(maxsize=2)
def _sorted(choice: str, seed: int, settings: Settings) -> Decoder:
    """With all blocks in measured order, once for all sizes."""
    bench, model = training.pretrained(settings, seed)
    tokens_NT = calibration.sequences(
        (d.text for d in bench.corpus.train), bench.tokenizer, 2 * SEQUENCES, bench.scale.sequence_length
    )
    names = [name for name in attach.linears(model) if name != "lm_head"]
    inputs = calibration.activations(model, tokens_NT[SEQUENCES:], names)
    attach.attach(model, dict.fromkeys(names, choice), calibration=inputs)
    sort_blocks(model, elastic.elastic_forms(model), tokens_NT[:SEQUENCES], events=training.fixtures.Quiet())
    return model
