"""form: what a form of the linear layers costs a trained decoder, and what it learns on new text.

A decoder trained on one domain gets the form where its paper puts it: most, into every linear layer but the head.
Forms that store the weight are judged by held-out bits per byte against the bytes of the whole model; those in
blocks are calibrated, sorted and cut to a size before (`_linear_stored`). Adapters are
then trained on another domain, for `adapt_tokens`, and judged by its held-out bits per byte against the parameters
that they train, counted in what they settle into; the baseline, full fine-tuning of the same layers, is trained beside
them. Every form that trains is trained at each of `rates` (factors of `rate`), and the best counts.

Forms that start afresh are pretrained for `tokens` beside dense pretraining, and judged by bits per byte
against bytes of parameters and optimizer (`_linear_scratch`).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

from torch import nn

from modicum.bench import fixtures, training
from modicum.bench.measurement import Axes, Axis, Measurement, Settings
from modicum.bench.ports import _linear_scratch, _linear_stored
from modicum.budget import Cost
from modicum.core import registry
from modicum.core.choice import Choice
from modicum.core.errors import UserError
from modicum.model import attach
from modicum.model.linear import unique_tensors

AXES = Axes(quality=Axis("bits_per_byte"), cost=Axis("stored_bytes", "lower", "bytes"))
ADAPT = Axes(quality=Axis("adapted_bits_per_byte"), cost=Axis("trained_parameters"))
LIMITS = training.LIMITS


@dataclass(frozen=True, kw_only=True)
class Scale(training.Scale):
    adapt_tokens: int = 100_000
    rates: tuple[float, ...] = (0.1, 0.5, 2.0, 8.0)  # forms that train few numbers want high ones
    pretrain: bool = True  # the baseline too, where nothing else asks for it


QUICK = Scale(**training.QUICK, adapt_tokens=4 * 4 * 64, rates=(0.5,))


def axes_of(choice: Choice) -> Axes:
    method: Any = registry.load("linear", choice.method).cls
    if _linear_scratch.applies(choice):
        return _linear_scratch.AXES
    return ADAPT if "adapter" in method.provides else AXES


def measure(choice: Choice, seed: int, settings: Settings) -> Measurement:
    if _linear_scratch.applies(choice):
        return _pretrained(choice, seed, settings)
    bench, model = training.pretrained(settings, seed)
    old, new = domains(bench.corpus)
    record = bench.model_record(model, "small decoder, trained")
    patterns = dict.fromkeys(attach.places(model, choice), choice)
    generator = fixtures.seeded(seed)
    best: dict[str, float] = {}
    result: Any = None
    if _linear_stored.applies(choice):
        formed = _linear_stored.formed(choice, seed, settings)
    else:
        formed = copy.deepcopy(model)
        attach.attach(formed, patterns, generator=generator)
    forms, trained = attach.forms(formed), _trained(formed)
    stored = sum(t.nbytes for t in unique_tensors(formed).values())
    bits = bench.bits(formed, bench.corpus.heldout_texts(old))
    untrained = bench.bits(formed, bench.corpus.heldout_texts(new))
    adapts = axes_of(choice) is ADAPT or choice.method == registry.port("linear").baseline
    seconds = flops = 0.0
    for factor in settings.scale.rates if adapts else ():
        adapted = copy.deepcopy(model)
        attach.attach(adapted, patterns, generator=fixtures.seeded(seed))
        attach.freeze(adapted)
        stream = bench.stream(seed, [d for d in bench.corpus.train if d.domain == new])
        result = bench.train(
            adapted, seed, stream, rate=factor * settings.scale.rate, tokens=settings.scale.adapt_tokens
        )
        attach.settle(adapted)
        found = bench.bits(adapted, bench.corpus.heldout_texts(new))
        if not best or found < best["adapted_bits_per_byte"]:
            best = {
                "adapted_bits_per_byte": found,
                "rate": factor * settings.scale.rate,
                "forgotten_bits_per_byte": bench.bits(adapted, bench.corpus.heldout_texts(old)) - bits,
            }
            seconds, flops, trained = result.seconds, result.flops, _trained(adapted)
    weights = sum(form.in_features * form.out_features for form in forms.values())
    if choice.method == registry.port("linear").baseline and settings.scale.pretrain:
        best |= _linear_scratch.measure(bench, choice, seed, settings.scale.rate)[0]
    metrics = {
        "bits_per_byte": bits,
        "bits_per_weight": 8 * sum(form.nbytes() for form in forms.values()) / weights,
        "stored_bytes": stored,
        "trained_parameters": trained,
        "new_domain_bits_per_byte": untrained,
        **best,
    }
    return Measurement(metrics=metrics, cost=Cost(seconds=seconds, flops=flops), model=record, data=bench.corpus.record)


def _trained(model: nn.Module) -> int:
    return sum(p.numel() for form in attach.forms(model).values() for p in form.trainable())


def _pretrained(choice: Choice, seed: int, settings: Settings) -> Measurement:
    bench = training.Bench.of(settings)
    metrics, result = _linear_scratch.measure(bench, choice, seed, settings.scale.rate)
    record = bench.model_record(bench.model(seed))
    cost = Cost(seconds=result.seconds, flops=result.flops, peak_bytes=result.peak_bytes)
    return Measurement(metrics=metrics, cost=cost, model=record, data=bench.corpus.record)


def domains(corpus: fixtures.Corpus) -> tuple[str, str]:
    """(the larger domain, which the decoder knows best, the one to adapt to)."""
    sizes = {d: sum(x.nbytes for x in corpus.train if x.domain == d) for d in corpus.domains}
    ranked = sorted(sizes, key=lambda d: -sizes[d])
    both = [d for d in ranked if corpus.heldout_texts(d)]
    if not both:
        raise UserError(f"{corpus.name} holds no text that is held out; give a larger corpus")
    return both[0], both[1] if len(both) > 1 else both[0]
