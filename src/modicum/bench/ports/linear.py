"""linear: what a form of the linear layers costs a trained model, and what it learns on new text.

The model is SmolLM2-135M-Instruct, or the one given with --model, or (--model proxy) a small decoder trained here. It
gets the form where its paper puts it: most, into every linear layer but the head. Three questions, by what it is for:

Stored: forms that store a trained weight are judged by bits per byte of held-out text against the bytes of the whole
model; `kl` is the mean divergence of the model's next-token distribution from the dense one's, `top1` how often the
likeliest token is the same. Forms in blocks are calibrated, sorted and cut to a size before (`_linear_stored`).

Adapted: adapters are trained on another domain for `adapt_tokens`, and judged by its held-out bits per byte against the
parameters that they train, counted in what they settle into; the baseline, full fine-tuning of the same layers, beside
them. Each is trained at the best of `rates`, found once on a seed that no measurement uses.
`forgotten_bits_per_byte` is what the old domain lost.

Pretrained: forms that start afresh are trained in a proxy for `tokens` beside dense pretraining, and judged by bits per
byte against bytes of parameters and optimizer (`_linear_scratch`).
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from modicum.bench import fixtures, training
from modicum.bench.measurement import Axes, Axis, Measurement, Settings
from modicum.bench.ports import _linear_score, _linear_scratch, _linear_stored
from modicum.budget import Cost
from modicum.core import registry
from modicum.core.choice import Choice
from modicum.core.errors import ModicumError, UserError
from modicum.model import attach
from modicum.model.decoder import Decoder
from modicum.model.linear import unique_tensors
from modicum.train.loop import TrainResult

AXES = Axes(quality=Axis("bits_per_byte"), cost=Axis("stored_bytes", "lower", "bytes"))
ADAPT = Axes(quality=Axis("adapted_bits_per_byte"), cost=Axis("trained_parameters"))
LIMITS = training.LIMITS
MODEL = "smollm2"
TIER = "laptop"
TUNING_SEED = _linear_scratch.SEARCH_SEED


@dataclass(frozen=True, kw_only=True)
class Scale(training.Scale):
    tokens: int = 400_000
    heldout_bytes: int = 300_000
    score_sequences: int = 8  # of held-out text, of each domain
    score_length: int = 256
    old: str = "news"  # the domain that the model is scored on, and the one that it is adapted to; where the corpus has
    new: str = "howto"  # no such domain, the one with most text and the next
    adapt_tokens: int = 4096
    adapt_length: int = 128
    adapt_sequences: int = 2
    adapt_rate: float = 1e-3
    rates: tuple[float, ...] = (0.1, 1.0, 10.0)  # of adapt_rate: forms that train few numbers want high ones
    pretrain: bool = True  # the baseline too, where nothing else asks for it


QUICK = Scale(
    **training.QUICK, score_sequences=2, score_length=64, adapt_tokens=4 * 4 * 64, adapt_length=64, adapt_sequences=4,
    rates=(1.0,),
)  # fmt: skip


def axes_of(choice: Choice) -> Axes:
    method: Any = registry.load("linear", choice.method).cls
    if _linear_scratch.applies(choice):
        return _linear_scratch.AXES
    return ADAPT if "adapter" in method.provides else AXES


def measure(choice: Choice, seed: int, settings: Settings) -> Measurement:
    if _linear_scratch.applies(choice):
        return _pretrained(choice, seed, settings)
    scale: Scale = settings.scale
    bench, model = training.pretrained(settings, 0 if settings.model else seed)
    old, new = domains(bench.corpus, scale)
    record = bench.model_record(model, "small decoder, trained")
    if _linear_stored.applies(choice):
        formed = _linear_stored.formed(choice, seed, settings)
    else:
        formed = copy.deepcopy(model)
        attach.attach(
            formed, dict.fromkeys(attach.target_modules(model, choice), choice), generator=fixtures.seeded(seed)
        )
    forms = attach.forms(formed)
    weights = sum(form.in_features * form.out_features for form in forms.values())
    metrics = {
        "bits_per_weight": 8 * sum(form.nbytes() for form in forms.values()) / weights,
        "stored_bytes": float(sum(t.nbytes for t in unique_tensors(formed).values())),
    }
    rows_BT, dense = _dense(settings, seed)
    plain = choice.method == registry.port("linear").baseline
    if axes_of(choice) is AXES and not plain:
        metrics |= _linear_score.score(formed, rows_BT, bench.tokenizer, dense[1])[0]
    else:  # an adapter that has not been trained changes nothing
        metrics |= dense[0] | {"kl": 0.0, "top1": 1.0}
    cost = Cost()
    if plain or axes_of(choice) is ADAPT:
        factor = _best_rate(str(choice), settings)
        adapted, result = _adapted(str(choice), seed, settings, factor)
        metrics |= {
            "trained_parameters": float(_trained(adapted)),
            "rate": factor * scale.adapt_rate,
            "new_domain_bits_per_byte": _bits(settings, seed, model, new),
            "adapted_bits_per_byte": _bits(settings, seed, adapted, new),
            "forgotten_bits_per_byte": _bits(settings, seed, adapted, old) - dense[0]["bits_per_byte"],
        }
        cost = Cost(seconds=result.seconds, flops=result.flops)
    if plain and scale.pretrain:
        metrics |= _linear_scratch.measure(_proxy(settings), choice, seed, scale.rate)[0]
    return Measurement(metrics=metrics, cost=cost, model=record, data=bench.corpus.record)


@functools.lru_cache(maxsize=4)
def _dense(settings: Settings, seed: int) -> tuple[torch.Tensor, tuple[dict[str, float], list[torch.Tensor]]]:
    """The seed's sequences of the old domain, and how the dense model scores on them."""
    bench, model = training.pretrained(settings, 0 if settings.model else seed)
    rows_BT = _rows(bench, settings.scale, domains(bench.corpus, settings.scale)[0], seed)
    return rows_BT, _linear_score.score(model, rows_BT, bench.tokenizer)


def _rows(bench: training.Bench, scale: Scale, domain: str, seed: int) -> torch.Tensor:
    texts = bench.corpus.heldout_texts(domain)
    return _linear_score.sequences(texts, bench.tokenizer, scale.score_sequences, scale.score_length, seed)


def _bits(settings: Settings, seed: int, model: Decoder, domain: str) -> float:
    bench = training.Bench.of(settings)
    return _linear_score.score(model, _rows(bench, settings.scale, domain, seed), bench.tokenizer)[0]["bits_per_byte"]


def _adapted(choice: str, seed: int, settings: Settings, factor: float) -> tuple[Decoder, TrainResult]:
    """The model with the form trained on the new domain, and settled."""
    scale: Scale = settings.scale
    short = dataclasses.replace(
        scale, sequence_length=scale.adapt_length, batch_sequences=scale.adapt_sequences, tokens=scale.adapt_tokens
    )
    _, model = training.pretrained(settings, 0 if settings.model else seed)
    bench = training.Bench.of(dataclasses.replace(settings, scale=short))
    _, new = domains(bench.corpus, scale)
    targets = dict.fromkeys(attach.target_modules(model, Choice.parse("linear", choice)), choice)
    attach.attach(model, targets, generator=fixtures.seeded(seed))
    attach.freeze(model)
    stream = bench.stream(seed, [d for d in bench.corpus.train if d.domain == new])
    result = bench.train(model, seed, stream, rate=factor * scale.adapt_rate, tokens=scale.adapt_tokens)
    attach.settle(model)
    return model, result


@functools.lru_cache(maxsize=64)
def _best_rate(choice: str, settings: Settings) -> float:
    """Of the rates, the one that gives the new domain the fewest bits on the tuning seed."""
    rates = settings.scale.rates
    if len(rates) == 1:
        return rates[0]
    bench = training.Bench.of(settings)
    _, new = domains(bench.corpus, settings.scale)

    def bits(factor: float) -> float:
        try:
            model, _ = _adapted(choice, TUNING_SEED, settings, factor)
        except UserError:
            raise
        except ModicumError:  # it diverged
            return math.inf
        return _bits(settings, TUNING_SEED, model, new)

    return min(rates, key=bits)


def _trained(model: nn.Module) -> int:
    return sum(p.numel() for form in attach.forms(model).values() for p in form.trainable())


def _proxy(settings: Settings) -> training.Bench:
    """A bench whose models are fresh proxies, whatever model the others are measured on."""
    return training.Bench.of(dataclasses.replace(settings, model=None))


def _pretrained(choice: Choice, seed: int, settings: Settings) -> Measurement:
    bench = _proxy(settings)
    metrics, result = _linear_scratch.measure(bench, choice, seed, settings.scale.rate)
    record = bench.model_record(bench.model(seed))
    cost = Cost(seconds=result.seconds, flops=result.flops, peak_bytes=result.peak_bytes)
    return Measurement(metrics=metrics, cost=cost, model=record, data=bench.corpus.record)


def domains(corpus: fixtures.Corpus, scale: Scale) -> tuple[str, str]:
    """(domain that the model is scored on, domain to adapt to): those asked for, or else the two with most text."""
    sizes = {d: sum(x.nbytes for x in corpus.train if x.domain == d) for d in corpus.domains if corpus.heldout_texts(d)}
    if not sizes:
        raise UserError(f"{corpus.name} holds no text that is held out; give a larger corpus")
    if scale.old in sizes and scale.new in sizes:
        return scale.old, scale.new
    ranked = sorted(sizes, key=lambda d: -sizes[d])
    return ranked[0], ranked[min(1, len(ranked) - 1)]
