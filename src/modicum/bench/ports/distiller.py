"""distiller: held-out bits per byte of a small student that goes on with a teacher, against the seconds they took.

A student is pretrained on all domains but one, without a teacher, the same for every method (`base_tokens`). Then it
goes on for `tokens` on the other domain, of which there is little text, read several times over, with the method's
teacher. Judged by the bits per byte of held-out text of that domain; beside it those of the old domains, of the student
before (`base_bits_per_byte`), and of the teacher.

Teachers: a wider decoder trained on everything (`teacher_tokens`), once for all seeds; for self-distill-further the
student itself after the same run without a teacher, whose seconds count. `equal_seconds_bits_per_byte` is plain
training for as long as the method took, the teacher's forward passes included: a gain at equal tokens that is gone
there is paid for. `scratch_bits_per_byte` is, for pretrained-distillation, the same run without the pretraining.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modicum.bench import fixtures, training
from modicum.bench.measurement import Axes, Axis, Measurement, Settings
from modicum.budget import Cost
from modicum.core.choice import Choice
from modicum.core.files import cache_home, fingerprint
from modicum.model.config import llama_like
from modicum.model.decoder import Decoder
from modicum.model.folder import load_model, save_model
from modicum.train.loop import TrainResult

AXES = Axes(quality=Axis("bits_per_byte"), cost=Axis("train_seconds", "lower", "s"))
TIER = "laptop"
SELF, PRETRAINED = "self-distill-further", "pretrained-distillation"


@dataclass(frozen=True, kw_only=True)
class Scale(training.Scale):
    tokens: int = 60_000
    base_tokens: int = 200_000
    target_bytes: int = 60_000  # of the new domain
    teacher_width: int = 96
    teacher_layers: int = 4
    teacher_tokens: int = 700_000
    teacher_rate: float = 3e-3
    target: str = "howto"  # the new domain, where the corpus has it; else the last by name


QUICK = Scale(**training.QUICK, base_tokens=1024, target_bytes=20_000, teacher_width=64, teacher_layers=3,
              teacher_tokens=1024)  # fmt: skip


@dataclass(frozen=True)
class Lab:
    """What all methods begin from."""

    bench: training.Bench
    new: list[Any]
    new_texts: list[str]
    old_texts: list[str]
    base: Decoder
    teacher: str  # its folder
    teacher_bits: float


def measure(choice: Choice, seed: int, settings: Settings) -> Measurement:
    scale: Scale = settings.scale
    lab = _lab(scale, settings.data, settings.device, seed)
    model = copy.deepcopy(lab.base)
    record = lab.bench.model_record(model, "small decoder, trained")
    extra: dict[str, float] = {}
    before = 0.0
    picked = choice
    if choice.method == SELF and not choice.knobs.get("teacher"):
        once, spent = _plain(scale, settings.data, settings.device, seed, scale.tokens)
        before = spent.seconds
        picked = Choice("distiller", choice.method, choice.knobs | {"teacher": _stored(once)})
    elif choice.method != "none" and not choice.knobs.get("teacher"):
        picked = Choice("distiller", choice.method, choice.knobs | {"teacher": lab.teacher})
    result = _train(lab, model, seed, scale.tokens, picked)
    seconds = before + result.seconds
    if choice.method != "none":
        _, plain = _plain(scale, settings.data, settings.device, seed, scale.tokens)
        tokens = int(scale.tokens * max(seconds / plain.seconds, 1.0))
        tokens = min(round(tokens / 20_000) * 20_000 or tokens, 8 * scale.tokens)
        longer, _ = _plain(scale, settings.data, settings.device, seed, max(tokens, scale.tokens))
        extra["equal_seconds_bits_per_byte"] = lab.bench.bits(longer, lab.new_texts)
        extra["equal_seconds_old_bits_per_byte"] = lab.bench.bits(longer, lab.old_texts)
    if choice.method == PRETRAINED:
        fresh = lab.bench.model(seed)
        _train(lab, fresh, seed, scale.tokens, picked)
        extra["scratch_bits_per_byte"] = lab.bench.bits(fresh, lab.new_texts)
    metrics = {
        "bits_per_byte": lab.bench.bits(model, lab.new_texts),
        "old_bits_per_byte": lab.bench.bits(model, lab.old_texts),
        "base_bits_per_byte": lab.bench.bits(lab.base, lab.new_texts),
        "teacher_bits_per_byte": lab.teacher_bits,
        "train_seconds": seconds,
        "train_loss": result.loss,
        "tokens": float(result.tokens),
    }
    cost = Cost(seconds=seconds, flops=result.flops, tokens=result.tokens)
    return Measurement(metrics=metrics | extra, cost=cost, model=record, data=lab.bench.corpus.record)


def _train(lab: Lab, model: Decoder, seed: int, tokens: int, choice: Choice) -> TrainResult:
    stream = lab.bench.stream(seed, lab.new, tokens=tokens)
    rate = lab.bench.scale.rate / 2  # going on, not beginning
    return lab.bench.train(model, seed, stream, tokens=tokens, rate=rate, distiller=choice)


@functools.lru_cache(maxsize=4)
def _plain(scale: Scale, data: str | None, device: str, seed: int, tokens: int) -> tuple[Decoder, TrainResult]:
    """The student after the run without a teacher."""
    lab = _lab(scale, data, device, seed)
    model = copy.deepcopy(lab.base)
    return model, _train(lab, model, seed, tokens, Choice("distiller", "none"))


@functools.lru_cache(maxsize=2)
def _lab(scale: Scale, data: str | None, device: str, seed: int) -> Lab:
    bench = training.Bench.of(Settings(scale=scale, data=data, device=device))
    domains = sorted(d for d in bench.corpus.domains if bench.corpus.heldout_texts(d))
    name = scale.target if scale.target in domains else domains[-1]
    new, size = [], 0
    for document in (d for d in bench.corpus.train if d.domain == name):
        new.append(document)
        size += len(document.text.encode())
        if size >= scale.target_bytes:
            break
    old = [d for d in bench.corpus.train if d.domain != name] or bench.corpus.train
    base = bench.model(seed)
    bench.train(base, seed, bench.stream(seed, old, tokens=scale.base_tokens), tokens=scale.base_tokens)
    old_texts = [t for d in domains if d != name for t in bench.corpus.heldout_texts(d)] or bench.corpus.heldout_texts()
    new_texts = bench.corpus.heldout_texts(name)
    teacher, bits = _teacher(scale, data, device, tuple(new_texts))
    return Lab(bench, new, new_texts, old_texts, base, teacher, bits)


@functools.lru_cache(maxsize=1)
def _teacher(scale: Scale, data: str | None, device: str, texts: tuple[str, ...]) -> tuple[str, float]:
    """The wider decoder, trained on all text, in a folder of the cache: methods and seeds may be separate processes.
    And its bits per byte of the texts."""
    wide = dataclasses.replace(scale, width=scale.teacher_width, layers=scale.teacher_layers, rate=scale.teacher_rate)
    bench = training.Bench.of(Settings(scale=wide, data=data, device=device))
    name = fingerprint([dataclasses.asdict(wide), bench.corpus.checksum, bench.tokenizer.fingerprint])
    folder = cache_home() / "bench" / f"teacher-{name}"
    if not folder.is_dir():
        shape = llama_like(bench.tokenizer.vocab_size, wide.width, wide.layers, context_length=wide.sequence_length)
        model = Decoder(shape, fixtures.seeded(1000)).to(device)
        bench.train(model, 1000, tokens=scale.teacher_tokens)
        save_model(model, folder)
    return str(folder), bench.bits(load_model(folder, "float32"), list(texts))


_KEPT: list[Any] = []  # temporary folders that live as long as the process


def _stored(model: Decoder) -> str:
    folder = tempfile.TemporaryDirectory()
    _KEPT.append(folder)
    save_model(model, Path(folder.name) / "teacher")
    return str(Path(folder.name) / "teacher")
