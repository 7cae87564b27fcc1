"""experiment: bits per byte of the target when a fresh proxy is trained on the mixture that the study chose.

The study sees a corpus of several domains and trains its own small proxies; the judge is a larger one of `judge_tokens`
tokens on the chosen mixture, the same for every method. The cost is the tokens that the study trained on. Searches have
as many runs as the baseline's. Studies that choose no mixture have a table instead: it is their figure.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass

from modicum.bench import training
from modicum.bench.measurement import Axes, Axis, Measurement, Settings
from modicum.budget import Cost
from modicum.core.choice import Choice
from modicum.core.errors import UserError
from modicum.evaluate.experiments import Study
from modicum.evaluate.study import COMPARED, Corpus, StudySpec

AXES = Axes(quality=Axis("target_bits_per_byte"), cost=Axis("study_tokens", "lower", "tok"))
LIMITS = training.LIMITS
TIER = "laptop"
NOT_MEASURABLE = {
    "projektor": "its law has three terms a domain: the bench's 13 need more pilots than a search has runs",
    "cmr": "it asks how much of one domain general text can bear, not what a target needs; bench law: protocol mixed",
    "pretrainers-guide": "it chooses no mixture: its table of effects is what it gives (recipe pretrainers-guide)",
    "train-once": "it chooses no mixture: its matrix of effects is what it gives",
}


@dataclass(frozen=True, kw_only=True)
class Scale(training.Scale):
    tokens: int = 200_000  # of the judge's run
    study_tokens: int = 40_000  # of a study's trial of length 1
    study_parameters: int = 150_000
    study_heldout_bytes: int = 40_000  # that a trial is scored on, of all domains
    target: str = "specs_python,docs_technical"  # domains; where the corpus lacks them, its first one


QUICK = Scale(**training.QUICK, study_tokens=512, study_parameters=60_000, study_heldout_bytes=1000)


def measure(choice: Choice, seed: int, settings: Settings) -> Measurement:
    bench, scale = training.Bench.of(settings), settings.scale
    domains = bench.corpus.domains
    if len(domains) < 2:
        raise UserError("a mixture is chosen on a corpus of several domains; give --data FOLDER with some")
    target = [d for d in scale.target.split(",") if d in domains and bench.corpus.heldout_texts(d)] or domains[:1]
    texts = {d: [x.text for x in bench.corpus.train if x.domain == d][:COMPARED] for d in domains}
    train_bytes = sum(d.nbytes for d in bench.corpus.train)
    documents = training.memory(bench.corpus.train, bench.tokenizer)
    tokens = sum(int(documents.lengths(d).sum()) for d in domains)
    corpus = Corpus(documents, bench.tokenizer, bench.corpus.heldout, train_bytes / tokens, {}, texts)
    spec = StudySpec(
        tokens=scale.study_tokens,
        parameters=scale.study_parameters,
        sequence_length=scale.sequence_length,
        batch_sequences=scale.batch_sequences,
        lr=scale.rate,
        dtype=scale.dtype,
        seed=seed,
        target=tuple(target),
        heldout_bytes=scale.study_heldout_bytes / len(domains),
        device=settings.device,
    )
    with tempfile.TemporaryDirectory(prefix="modicum-study-") as folder:
        study = Study(choice, corpus, spec, folder)
        conclusion, runs = study.run()
    if conclusion.weights is None:
        raise UserError(f"{choice.method} chooses no mixture; its table is what it gives")
    mixture = {"method": "fixed", "weights": {d: w for d, w in conclusion.weights.items() if w > 0}}
    model = bench.model(seed)
    record = bench.model_record(model)
    result = bench.train(model, seed, mixture=mixture)
    by_domain = {d: bench.bits(model, t) for d in domains if (t := bench.corpus.heldout_texts(d))}
    trained = [r for r in runs if not r.trial.merge]
    study_tokens, study_seconds = sum(r.tokens for r in trained), sum(r.seconds for r in runs)
    metrics = {
        "target_bits_per_byte": sum(by_domain[d] for d in target) / len(target),
        "mean_bits_per_byte": sum(by_domain.values()) / len(by_domain),
        "study_tokens": study_tokens,
        "study_runs": float(len(trained)),
        "study_seconds": study_seconds,
        **{f"{d}_weight": w / sum(conclusion.weights.values()) for d, w in conclusion.weights.items()},
    }
    if conclusion.predicted is not None:
        metrics["predicted_bits_per_byte"] = conclusion.predicted
    return Measurement(
        metrics=metrics,
        cost=Cost(seconds=result.seconds + study_seconds, flops=result.flops, tokens=result.tokens + study_tokens),
        model=record,
        data=bench.corpus.record,
    )
