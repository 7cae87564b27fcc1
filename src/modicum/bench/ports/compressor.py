"""compressor: what a trained model's predictions lose, against the bytes that are left.

The model is SmolLM2-135M-Instruct, or the one given with --model, or (--model proxy) a small decoder trained here. All
layers of its blocks are compressed, embedding and head stay; text of the training side shows the layers their inputs.
Judged by `kl`, the mean divergence in nats of the next-token distribution from the original's on held-out text of two
domains, against the bytes of the whole model as stored. Beside it: `kl_stderr` over sequences, bits per byte and
agreement of the likeliest token in each domain, the zeros of pruned matrices and what those would take as a bitmap and
the values that are left (`sparse_bytes`), seconds and peak bytes of compressing.

Methods are compared at equal bytes: `rtn` is measured at the same bits and groups. SmolLM2's weights come from a file
in Q4_1 (groups of 32 with scale and minimum), so four bits in groups of 32 are nearly free and say nothing:
two and three bits in groups of 64 are what to look at.
"""

from __future__ import annotations

import functools
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from modicum.bench import fixtures, training
from modicum.bench.measurement import Axes, Axis, Measurement, Settings
from modicum.bench.ports import _linear_score
from modicum.budget import Cost
from modicum.compress import calibration
from modicum.compress.method import compress_model
from modicum.core.choice import Choice
from modicum.model import attach
from modicum.model.decoder import Decoder
from modicum.model.linear import unique_tensors

AXES = Axes(quality=Axis("kl"), cost=Axis("stored_bytes", "lower", "bytes"))
LIMITS = training.LIMITS
MODEL = "smollm2"
TIER = "laptop"


@dataclass(frozen=True, kw_only=True)
class Scale(training.Scale):
    heldout_bytes: int = 300_000
    calibration_sequences: int = 8  # of training text
    calibration_length: int = 256
    score_sequences: int = 4  # of held-out text, of each domain
    score_length: int = 256
    old: str = "news"  # the two domains that are scored, where the corpus has them; else the two with most text
    new: str = "howto"


QUICK = Scale(**training.QUICK, calibration_sequences=4, calibration_length=64, score_sequences=2, score_length=64)


def measure(choice: Choice, seed: int, settings: Settings) -> Measurement:
    scale: Scale = settings.scale
    bench, model = training.pretrained(settings, 0 if settings.model else seed, "bfloat16")
    model = model.to(torch.bfloat16)
    record = bench.model_record(model, "small decoder, trained")
    length = min(scale.calibration_length, model.config.context_length)
    start = int(torch.randint(len(bench.corpus.train), (1,), generator=fixtures.seeded(seed)))
    texts = [d.text for d in (*bench.corpus.train[start:], *bench.corpus.train[:start])]
    tokens_NT = calibration.sequences(texts, bench.tokenizer, scale.calibration_sequences, length)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as work:
        made = compress_model(model, choice, tokens_NT, Path(work), fixtures.Quiet())
    seconds = time.perf_counter() - began
    metrics = _stored(made) | {"calibration_tokens": float(tokens_NT.numel())}
    made.float()
    kls: list[float] = []
    for name, domain in zip(("old", "new"), _domains(bench.corpus, scale), strict=True):
        rows_BT, sizes, before, against = _original(settings, domain, seed)
        each = [
            _linear_score.score(made, row[None], bench.tokenizer, against[i : i + 1])[0]
            for i, row in enumerate(rows_BT)
        ]
        kls += [row["kl"] for row in each]
        after = sum(row["bits_per_byte"] * size for row, size in zip(each, sizes, strict=True)) / sum(sizes)
        metrics |= {
            f"{name}_kl": statistics.fmean(row["kl"] for row in each),
            f"{name}_top1": statistics.fmean(row["top1"] for row in each),
            f"{name}_bits_per_byte": after,
            f"{name}_original_bits_per_byte": before,
        }
    metrics |= {"kl": statistics.fmean(kls), "kl_stderr": statistics.stdev(kls) / len(kls) ** 0.5}
    cost = Cost(seconds=seconds)
    return Measurement(metrics=metrics, cost=cost, model=record, data=bench.corpus.record)


def _stored(model: Decoder) -> dict[str, float]:
    """Bytes of the model, with and without zeros; bits per weight and zeros of its compressed matrices."""
    tensors = unique_tensors(model)
    forms = attach.forms(model)
    whole = float(sum(t.nbytes for t in tensors.values()))
    if forms:
        weights = sum(f.in_features * f.out_features for f in forms.values())
        return {"stored_bytes": whole, "bits_per_weight": 8 * sum(f.nbytes() for f in forms.values()) / weights}
    matrices = [t for n, t in tensors.items() if n.startswith("layers.") and t.dim() == 2]
    weights, zeros = sum(t.numel() for t in matrices), sum(int((t == 0).sum()) for t in matrices)
    item = matrices[0].element_size()
    return {
        "stored_bytes": whole,
        "bits_per_weight": 8.0 * item,
        "zeros": zeros / weights,
        "sparse_bytes": whole - zeros * item + (weights / 8 if zeros else 0),
    }


def _domains(corpus: fixtures.Corpus, scale: Scale) -> tuple[str, str]:
    """Two domains with text that is held out."""
    sizes = {d: sum(len(t) for t in corpus.heldout_texts(d)) for d in corpus.domains}
    if sizes.get(scale.old) and sizes.get(scale.new):
        return scale.old, scale.new
    ranked = sorted((d for d in sizes if sizes[d]), key=lambda d: -sizes[d])
    return ranked[0], ranked[min(1, len(ranked) - 1)]


@functools.lru_cache(maxsize=4)
def _original(settings: Settings, domain: str, seed: int) -> tuple[Tensor, list[int], float, list[Tensor]]:
    """Sequences of a domain, bytes of each, the original's bits per byte and its log-probabilities."""
    bench, model = training.pretrained(settings, 0 if settings.model else seed, "bfloat16")
    scale: Scale = settings.scale
    texts = bench.corpus.heldout_texts(domain)
    rows_BT = _linear_score.sequences(texts, bench.tokenizer, scale.score_sequences, scale.score_length, seed)
    decoded = (bench.tokenizer.decode(row[1:].tolist()) for row in rows_BT)
    sizes = [max(1, len(text.encode("utf-8", "surrogatepass"))) for text in decoded]
    scores, against = _linear_score.score(model.to(torch.bfloat16).float(), rows_BT, bench.tokenizer)
    return rows_BT, sizes, scores["bits_per_byte"], against
