"""Compress a model to a size: bits for each matrix by measured error, the method by measured divergence.

1. The error of each matrix in each setting is estimated, that of the token embedding measured (`compress.sensitivity`).
2. `compress.allocate` gives the settings of least error whose bytes fit.
3. Each method compresses the model in these settings, and the best of them once more in the best uniform setting that
   fits. The one of least KL per token on validation text, of those that fit, is the result.
4. That result and the uniform one are measured on held-out text of two domains, paired.

Calibration, validation and held-out text have no document in common. Everything that is finished lies in `.NAME.sizing`
beside the output until that is written: a killed run goes on from there.
"""

from __future__ import annotations

import dataclasses
import math
import shutil
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modicum.budget.units import bytes_text
from modicum.compress import allocate, sensitivity
from modicum.compress import calibration as calibrate
from modicum.compress.compressors._affine import AffineConfig
from modicum.compress.divergence import original, scores
from modicum.compress.method import compress_with, model_files, prepare, setting_up, tokens_hash
from modicum.compress.run import weight_bytes
from modicum.compress.settings import EMBEDDINGS, PLAIN, SETTINGS, best_uniform, counts, kept_tensors, named, units_of
from modicum.core import compose
from modicum.core.choice import Choice
from modicum.core.errors import UserError
from modicum.core.events import Events
from modicum.core.files import fingerprint, read_json, write_json
from modicum.data.tokenizer import Tokenizer
from modicum.model import attach
from modicum.model.decoder import Decoder
from modicum.model.folder import find_folder, load_config, load_model

METHODS = ("awq:steps=10,inspect=256", "gptq", "rtn:clip=true")
ENTRY, HEADER = 700, 1 << 13  # bytes of a matrix's and of the folder's descriptions, at most
VALIDATION, HELDOUT, LENGTH = 8, 12, 128  # sequences of validation text and of each held-out domain, their tokens
TOLERATED = 0.02  # relative rise of bits per byte without a warning


@dataclass(frozen=True)
class Domain:
    """Held-out text of one domain: bits per byte before and after, KL per token of the result and of uniform bits.

    `gain`: KL of uniform bits minus that of the result, with the standard error of the paired difference.
    """

    name: str
    before: float
    after: float
    kl: float
    kl_stderr: float
    uniform_kl: float
    gain: float
    gain_stderr: float


@dataclass(frozen=True)
class Sized:
    """bits: number of matrices by setting ("3 bits, group 64"; "plain"); kl_by_method: on validation text.

    uniform, uniform_bytes: the best uniform setting that fits, and its bytes.
    """

    folder: str
    method: str
    bytes: int
    original_bytes: int
    budget: float
    bits: dict[str, int]
    embedding: str
    expected_kl: float
    kl_by_method: dict[str, float]
    uniform: str
    uniform_bytes: int
    domains: list[Domain]
    warnings: list[str]
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def compress_to(
    model_folder: str | Path,
    size: float,
    folder: str | Path,
    *,
    methods: Sequence[Any] = METHODS,
    calibration: str | Path | None = None,
    sequences: int = 16,
    length: int = 256,
    events: Events | None = None,
) -> Sized:
    """Compress a model so that its weight files take at most `size` bytes, and save what `load_model` reads.

    calibration: see `calibration.halves`; of it `sequences` sequences of `length` tokens are read. Raises `UserError`
    with the least possible size where `size` is below it; nothing is written then.
    """
    began, events = time.perf_counter(), events or Events()
    source, out = find_folder(model_folder), Path(folder)
    if out.resolve() == source.resolve():
        raise UserError(f"{folder} is the model itself; write the compressed one to another folder")
    choices = _fitting(methods, source)
    model = load_model(source)
    if attach.forms(model):
        raise UserError(f"{source} holds linear forms already; compress the model it came from")
    names = [name for name in attach.linears(model) if name.startswith("layers.")]
    fixed = sum(t.nbytes for n, t in kept_tensors(model).items()) + HEADER + ENTRY * (len(names) + 1)
    budget = size - fixed
    _check_size(model, names, size, budget)
    length = min(length, model.config.context_length)
    texts, heldout = calibrate.halves(calibration)
    tokenizer = Tokenizer.load(source)
    tokens_NT = calibrate.sequences(texts[::2], tokenizer, sequences, length)
    short = min(LENGTH, length)
    validation_NT = calibrate.sequences(texts[1::2], tokenizer, VALIDATION, short)
    work = out.with_name(f".{out.name}.sizing")
    prepare(work, _plan(source, tokens_NT, validation_NT))
    units = units_of(model, names, _errors(model, names, tokens_NT, work, events))
    del model
    chosen = allocate.allocate(units, budget)
    trial = _Trial(source, work, tokens_NT, validation_NT, events)
    allocated = {str(c): trial.kl(c, units, chosen, "allocated") for c in choices}
    best = min(choices, key=lambda c: allocated[str(c)])
    uniform = best_uniform(units, budget)
    kls = dict(allocated)
    if uniform is not None:
        kls[f"{best}, uniform"] = trial.kl(best, units, uniform, "uniform")
    made, picked = trial.folder(best, chosen, "allocated"), chosen
    if uniform is not None and kls[f"{best}, uniform"] < allocated[str(best)]:
        made, picked = trial.folder(best, uniform, "uniform"), uniform
    nbytes = weight_bytes(made)
    if nbytes > size:
        raise RuntimeError(f"the weight files took {nbytes} bytes, more than the {size:.0f} of the budget")
    beside = trial.folder(best, uniform, "uniform") if uniform is not None else made
    domains = [
        _measured(name, texts, tokenizer, short, source, made, beside, events) for name, texts in heldout.items()
    ]
    result = Sized(
        folder=str(folder),
        method=str(best),
        bytes=nbytes,
        original_bytes=weight_bytes(source),
        budget=size,
        bits=counts(units, picked),
        embedding=str(units[-1].settings[picked[-1]] or "plain"),
        expected_kl=allocate.total(units, picked)[1],
        kl_by_method=kls,
        uniform="none fits" if uniform is None else named(units[0].settings[uniform[0]]),
        uniform_bytes=weight_bytes(beside),
        domains=domains,
        warnings=_warnings(domains, units, fixed, size),
        seconds=time.perf_counter() - began,
    )
    if out.exists():
        shutil.rmtree(out)
    made.rename(out)
    write_json(out / "compress.json", result.as_dict())
    shutil.rmtree(work)
    events.emit("compressed", **result.as_dict())
    return result


class _Trial:
    """Models compressed by the candidates, in folders that a killed run finds again."""

    def __init__(self, source: Path, work: Path, tokens_NT: Tensor, validation_NT: Tensor, events: Events):
        self.source, self.work, self.tokens_NT, self.events = source, work, tokens_NT, events
        self.validation_NT = validation_NT
        self._before: Tensor | None = None

    def folder(self, choice: Choice, chosen: Sequence[int], kind: str) -> Path:
        return self.work / fingerprint({"method": choice.resolved(), "chosen": list(chosen), "kind": kind})[:16]

    def kl(self, choice: Choice, units: Sequence[allocate.Unit], chosen: Sequence[int], kind: str) -> float:
        """KL per token on validation text of the model that a method makes in these settings."""
        folder = self.folder(choice, chosen, kind)
        noted = folder.with_suffix(".json")
        if noted.exists():
            return float(read_json(noted)["kl"])
        if not (folder / "compress.json").exists():  # what is written last
            per_matrix: dict[str, dict[str, Any]] = {}
            for unit, setting in zip(units[:-1], chosen[:-1], strict=True):
                if unit.settings[setting] is not PLAIN:
                    per_matrix.update(dict.fromkeys(unit.names, dataclasses.asdict(unit.settings[setting])))
            embedding = units[-1].settings[chosen[-1]]
            compress_with(
                self.source,
                choice,
                folder,
                targets=sorted(per_matrix),
                embeddings=embedding,
                per_matrix=per_matrix,
                calibration=self.tokens_NT,
                events=self.events,
            )
        if self._before is None:
            self._before = original(load_model(self.source), self.validation_NT)[0]
        made = scores(load_model(folder), self.validation_NT, self._before)
        kl = statistics.fmean(s.kl for s in made)
        write_json(noted, {"kl": kl})
        return kl


def _fitting(methods: Sequence[Any], source: Path) -> list[Choice]:
    """The methods that this model allows; one that is given alone must."""
    shape = load_config(source)
    choices = []
    for given in methods:
        choice = Choice.parse("compressor", given)
        if not issubclass(type(choice.config()), AffineConfig):
            raise UserError(f"--to chooses bits, and {choice.method} has none; give awq, gptq, hqq or rtn")
        try:
            compose.resolve(setting_up(choice, shape, text=True))
        except UserError:
            if len(methods) == 1:
                raise
            continue
        choices.append(choice)
    return choices


def _check_size(model: Decoder, names: list[str], size: float, budget: float) -> None:
    units = units_of(model, names, None)
    most, least = sum(max(u.nbytes) for u in units), allocate.least_bytes(units)
    if least > budget:
        smallest = math.ceil((size - budget + least) / 2**20 * 100) / 100
        raise UserError(
            f"{bytes_text(size)} is too small: with every matrix at {SETTINGS[0].bits} bits the files take "
            f"{smallest:.2f} MiB; give --to {smallest:.2f}MiB or more, or a smaller model"
        )
    if most <= budget:
        raise UserError(f"the model fits {bytes_text(size)} as it is; give a smaller size")


def _errors(model: Decoder, names: list[str], tokens_NT: Tensor, work: Path, events: Events) -> dict[str, list[float]]:
    """The table of errors, made once: it does not depend on the size."""
    path = work / "errors.json"
    if not path.exists():
        few = tokens_NT[: max(1, len(tokens_NT) // 4)]
        table = sensitivity.matrix_errors(model, names, few, SETTINGS, work / "probe", events)
        table["embed"] = sensitivity.embedding_errors(model, EMBEDDINGS, few)
        write_json(path, table)
        shutil.rmtree(work / "probe")
    errors: dict[str, list[float]] = read_json(path)
    return errors


def _measured(
    name: str,
    texts: Sequence[str],
    tokenizer: Tokenizer,
    length: int,
    source: Path,
    made: Path,
    beside: Path,
    events: Events,
) -> Domain:
    tokens_NT = calibrate.sequences(texts, tokenizer, HELDOUT, length)
    decoded = [tokenizer.decode(row[1:].tolist()) for row in tokens_NT]
    nbytes = sum(len(text.encode("utf-8", "surrogatepass")) for text in decoded)
    against, before = original(load_model(source), tokens_NT)
    after = scores(load_model(made), tokens_NT, against)
    uniform = after if beside == made else scores(load_model(beside), tokens_NT, against)
    gains = [u.kl - a.kl for u, a in zip(uniform, after, strict=True)]
    return Domain(
        name,
        sum(before) / math.log(2) / nbytes,
        sum(s.nats for s in after) / math.log(2) / nbytes,
        statistics.fmean(s.kl for s in after),
        _stderr([s.kl for s in after]),
        statistics.fmean(s.kl for s in uniform),
        statistics.fmean(gains),
        _stderr(gains),
    )


def _stderr(values: Sequence[float]) -> float:
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else math.inf


def _warnings(domains: Sequence[Domain], units: Sequence[allocate.Unit], fixed: int, size: float) -> list[str]:
    """Where the result is worse than what takes fewer bytes, or much worse than the original."""
    lines = [
        f"uniform bits are better on {d.name}, by {-d.gain:.4f} ± {2 * d.gain_stderr:.4f} nats per token"
        for d in domains
        if d.gain < -2 * d.gain_stderr
    ]
    worst = max(domains, key=lambda d: d.after / d.before)
    if worst.after > (1 + TOLERATED) * worst.before:
        rise = worst.after / worst.before - 1
        lines.append(f"bits per byte rise by {rise:.1%} on {worst.name}; text it writes may repeat itself")
        if advice := _larger(units, fixed, size):
            lines.append(advice)
    return lines


def _larger(units: Sequence[allocate.Unit], fixed: int, size: float) -> str | None:
    """The size at which the expected divergence is a quarter of what it is now."""
    now = allocate.total(units, allocate.allocate(units, size - fixed))[1]
    most = fixed + sum(max(u.nbytes) for u in units)
    for step in range(1, 40):
        larger = size * 1.05**step
        if larger >= most:
            return None
        if allocate.total(units, allocate.allocate(units, larger - fixed))[1] < now / 4:
            return f"--to {larger / 2**20:.0f}MiB would have a quarter of the expected KL"
    return None


def _plan(source: Path, tokens_NT: Tensor, validation_NT: Tensor) -> str:
    return fingerprint(
        {
            "files": model_files(source),
            "settings": [dataclasses.asdict(s) for s in SETTINGS],
            "embeddings": EMBEDDINGS,
            "tokens": [tokens_hash(tokens_NT), tokens_hash(validation_NT)],
            "torch": torch.__version__,
        }
    )
