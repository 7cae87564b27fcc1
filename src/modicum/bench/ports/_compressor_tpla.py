"""tpla on small decoders with latent attention, trained here: what splitting loses, against a device's cache.

`split_kl` is the divergence from the unsplit model in nats a token; `whole_bits_per_byte` is that model's own figure. A
device's cache is what one of the n slices takes of a token in all layers, in bfloat16, the latent counted once.
"""

from __future__ import annotations

import dataclasses
import functools
import tempfile
import time
from pathlib import Path

from modicum.bench import fixtures, training
from modicum.bench.measurement import Axes, Axis, Measurement, Settings
from modicum.bench.ports import _linear_score
from modicum.budget import Cost
from modicum.compress import calibration
from modicum.compress.method import compress_model
from modicum.core.choice import Choice
from modicum.model.config import llama_like
from modicum.model.decoder import Decoder
from modicum.model.mixers import mla

AXES = Axes(quality=Axis("split_kl"), cost=Axis("cache_bytes_per_device", "lower", "bytes", against=""))
HEADS, LATENT, ROTATED, TOKENS = 4, 32, 8, 500_000


def measure(choice: Choice, seed: int, settings: Settings) -> Measurement:
    settings = dataclasses.replace(settings, model=None)
    bench, model, taken = trained(settings, seed)
    record = bench.model_record(model, "small decoder with latent attention, trained")
    scale = settings.scale
    texts = [d.text for d in bench.corpus.train]
    length = min(scale.calibration_length, model.config.context_length)
    tokens_NT = calibration.sequences(texts, bench.tokenizer, scale.calibration_sequences, length)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as work:
        made = compress_model(model, choice, tokens_NT, Path(work), fixtures.Quiet()).float()
    seconds = time.perf_counter() - start
    heldout = [d.text for d in bench.corpus.heldout]
    rows_BT = _linear_score.sequences(heldout, bench.tokenizer, 8 * scale.score_sequences, scale.score_length, seed)
    before, against = _linear_score.score(trained(settings, seed)[1], rows_BT, bench.tokenizer)
    after = _linear_score.score(made, rows_BT, bench.tokenizer, against)[0]
    entry = made.config.head_dim * made.config.layers * 2
    metrics = {
        "split_kl": after["kl"],
        "top1": after["top1"],
        "bits_per_byte": after["bits_per_byte"],
        "whole_bits_per_byte": before["bits_per_byte"],
        "cache_bytes_per_device": float(entry),
        "whole_cache_bytes": float((LATENT + ROTATED) * made.config.layers * 2),
        "split_seconds": seconds,
    }
    cost = Cost(seconds=taken + seconds)
    return Measurement(metrics=metrics, cost=cost, model=record, data=bench.corpus.record, axes=AXES)


@functools.lru_cache(maxsize=2)
def _trained(scale: training.Scale, data: str | None, device: str, seed: int, tokens: int) -> tuple[Decoder, float]:
    bench = training.Bench.of(Settings(scale=scale, data=data, device=device))
    plain = llama_like(
        bench.tokenizer.vocab_size, scale.width, scale.layers, HEADS, context_length=scale.sequence_length
    )
    config = dataclasses.replace(plain, family="modicum", **mla.shape(HEADS, LATENT, ROTATED))
    model = Decoder(config, fixtures.seeded(seed)).to(device)
    result = bench.train(model, seed, bench.stream(seed, tokens=tokens), tokens=tokens)
    return model, result.seconds


def trained(settings: Settings, seed: int) -> tuple[training.Bench, Decoder, float]:
    """A copy of the decoder, trained once per seed and process, with the seconds that took."""
    import copy

    bench = training.Bench.of(settings)
    tokens = settings.scale.tokens if settings.quick else TOKENS
    model, seconds = _trained(settings.scale, settings.data, settings.device, seed, tokens)
    return bench, copy.deepcopy(model), seconds
