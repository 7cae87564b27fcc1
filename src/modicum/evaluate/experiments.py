"""Run an experiment (port `experiment`): train its trials one after another, measure them, and conclude.

    OUT/trials/NAME/run.json    a finished trial: fingerprint of all that decides it, losses, tokens, seconds
    OUT/trials/NAME/model/      its weights, where later trials go on from it or merge it
    OUT/study.json              the table, the mixture and what the whole cost

A study that was stopped goes on: trials whose fingerprint is unchanged are read, not run.
"""

from __future__ import annotations

import functools
import math
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from modicum.budget import Cost, Deadline
from modicum.core import registry
from modicum.core.choice import Choice
from modicum.core.errors import CorruptError, ModicumError, UserError, unknown
from modicum.core.events import Events
from modicum.core.files import fingerprint, read_json, write_json
from modicum.data.document import Document
from modicum.data.insertions import Inserting, positions
from modicum.data.shards import Documents, folder_of
from modicum.data.subset import Subset
from modicum.data.tokenizer import Tokenizer
from modicum.evaluate.lm import document_nats
from modicum.evaluate.study import COMPARED, Corpus, StudySpec, number, summary
from modicum.laws.experiments import Between, Conclusion, Experiment, Run, Setting, Trial, rehearsed
from modicum.model.config import sized
from modicum.model.decoder import Decoder
from modicum.model.folder import load_config, load_model, save_model
from modicum.train.callback import Callback
from modicum.train.config import TrainConfig
from modicum.train.loop import train
from modicum.train.pretrain import step_seconds

CHARACTERS = 2000  # of a document that its embedding sees
EPSILON = 0.05  # entropy of those distances, in units of 1 - cosine
DIMENSIONS = 64
EVALUATION = 0.35  # of a training step's time that scoring as many tokens takes


class Study:
    """An experiment on a corpus. folder: where finished trials are kept."""

    def __init__(self, choice: Any, corpus: Corpus, spec: StudySpec, folder: str | Path):
        self.choice, self.corpus, self.folder = Choice.parse("experiment", choice), corpus, Path(folder)
        pool = spec.pool or tuple(corpus.documents.domains)
        for name in pool:
            if name not in corpus.documents.domains:
                raise unknown("domain of the pool", name, corpus.documents.domains)
        self.documents = Subset(corpus.documents, {d: np.arange(corpus.documents.documents(d)) for d in pool})
        self.texts: dict[str, list[str]] = {}
        for name in sorted({d.domain for d in corpus.heldout}):
            self._add_group(name, [d for d in corpus.heldout if d.domain == name], spec.heldout_bytes)
        for name in spec.target or ():
            if name not in self.texts:
                raise unknown("domain with held-out text", name, self.texts)
        self.shape = None if spec.model else _shape(spec, corpus.tokenizer)
        width = self.shape.width if self.shape else load_config(str(spec.model)).width
        self.spec = spec.for_width(width, continued=spec.model is not None)
        self.experiment: Experiment = registry.build("experiment", self.choice, self._setting())
        for name, wanted in self.experiment.groups().items():
            documents = [d for d in corpus.heldout if wanted.low <= number(d, wanted.column) < wanted.high]
            if not documents:
                raise UserError(
                    f"no held-out document has its {wanted.column} in {name}; hold out more, or choose others"
                )
            self._add_group(name, documents, spec.heldout_bytes)
        self.probes = self.experiment.probes()

    def _add_group(self, name: str, documents: Sequence[Document], most: float) -> None:
        texts, size = [], 0
        for document in documents:
            if size < most:
                texts.append(document.text[: max(4000, int(most) // 10)])
                size += len(texts[-1])
        self.texts[name] = texts

    def _setting(self) -> Setting:
        d, spec = self.documents, self.spec
        lengths = {name: d.lengths(name) for name in d.domains}
        columns = {}
        for column, by_domain in self.corpus.columns.items():
            values = np.concatenate([by_domain[name] for name in d.domains])
            tokens = np.concatenate([lengths[name] for name in d.domains]).astype(float)
            if (known := ~np.isnan(values)).any():
                columns[column] = values[known], tokens[known]
        return Setting(
            domains={name: float(n.sum()) for name, n in lengths.items()},
            target=dict.fromkeys(spec.target or tuple(self.texts), 1.0),
            tokens=float(spec.total_tokens),
            seed=spec.seed,
            bytes_per_token=self.corpus.bytes_per_token,
            columns=columns,
            distance=self._distance() if self.corpus.texts else None,
            given=spec.model is not None,
        )

    def _distance(self) -> Any:
        """Of a mixture's text to the target's: optimal transport between latent semantic embeddings."""
        from modicum.data.latent import Latent
        from modicum.data.transport import mixture_cost

        sources = [[t[:CHARACTERS] for t in self.corpus.texts[d]] for d in self.documents.domains]
        wanted = self.spec.target or tuple(self.texts)
        target = [t[:CHARACTERS] for name in wanted for t in self.texts[name][: -(-COMPARED // len(wanted))]]
        latent = Latent(DIMENSIONS, self.spec.seed).fit([t for texts in [*sources, target] for t in texts])
        made = [latent(texts) for texts in sources]
        target_BD = latent(target)

        @functools.lru_cache(maxsize=4096)
        def cost(fractions: tuple[float, ...]) -> tuple[float, np.ndarray]:
            return mixture_cost(made, np.array(fractions), target_BD, epsilon=EPSILON)

        return lambda fractions: cost(tuple(round(float(x), 9) for x in fractions))

    # ---- before anything runs

    def estimate(self) -> dict[str, Any]:
        """Trials, tokens and the cost of the whole study, from a few steps that are timed here."""
        trials = rehearsed(self.experiment)
        trained = [t for t in trials if not t.merge]
        config = self.trial_config(1.0, 0)
        second = step_seconds(self.fresh(0), config.stream(self.documents), config, 1.0)
        steps = sum(self.trial_config(t.length, 0).total_steps for t in trained)
        scored = sum(len(t.encode()) for texts in self.texts.values() for t in texts) / self.corpus.bytes_per_token
        scored += sum(len(c + t) * 2 for p in self.probes.values() for c, t in p) / self.corpus.bytes_per_token
        passes = sum(1 + max(t.points - 1, 0) for t in trials)
        parameters = self.fresh(0).config.parameters()
        tokens = float(steps * config.step_tokens)
        cost = Cost(
            parameters=parameters,
            tokens=tokens,
            flops=6.0 * parameters * tokens + 2.0 * parameters * passes * scored,
            seconds=second * (steps + EVALUATION * passes * scored / config.step_tokens),
            disk_bytes=4.0 * parameters * len(trained),
        )
        return {
            "experiment": str(self.choice),
            "trials": len(trained),
            "merges": len(trials) - len(trained),
            "finished": sum(self._saved(t) is not None for t in trials),
            "cost": cost.as_dict(),
        }

    # ---- running

    def run(self, events: Events | None = None, deadline: Deadline | None = None) -> tuple[Conclusion, list[Run]]:
        """All trials that are not finished, then the conclusion. Raises `ModicumError` when the deadline passes: what
        is finished is kept."""
        events, deadline = events or Events(), deadline or Deadline(None)
        runs: list[Run] = []
        total = len(rehearsed(self.experiment))
        with events.progress(self.choice.method, total, "trials") as progress:
            while trials := self.experiment.propose(runs):
                for trial in trials:
                    saved = self._saved(trial)
                    made = saved or self._run(trial, deadline)
                    runs.append(made)
                    events.emit("trial", name=trial.name, loss=self.experiment.setting.score(made), resumed=bool(saved))
                    progress.update(1, loss=self.experiment.setting.score(made))
        conclusion = self.experiment.conclude(runs)
        write_json(self.folder / "study.json", summary(self.choice, conclusion, runs))
        return conclusion, runs

    def _identity(self, trial: Trial) -> str:
        """Changes with anything that decides the trial's losses, the trials before it included."""
        plain = {k: v for k, v in self.spec.resolved().items() if k not in ("target", "device", "keep")}
        before = [self._identities[name] for name in (*trial.merge, *([trial.start] if trial.start else []))]
        texts = fingerprint([self.texts, self.probes])
        data = [self.documents.fingerprint, texts, self.corpus.tokenizer.fingerprint]
        made = fingerprint([asdict(trial), plain, str(self.spec.model), self.spec.parameters, before, data])
        self._identities[trial.name] = made
        return made

    @functools.cached_property
    def _identities(self) -> dict[str, str]:
        return {}

    def _path(self, name: str) -> Path:
        return self.folder / "trials" / folder_of(name)

    def _saved(self, trial: Trial) -> Run | None:
        path = self._path(trial.name) / "run.json"
        try:
            identity = self._identity(trial)
        except KeyError:  # what it goes on from has not run
            return None
        if not path.is_file():
            return None
        try:
            record = read_json(path)
            if record["fingerprint"] != identity:
                return None
            curve = tuple((float(at), losses) for at, losses in record["curve"])
            return Run(trial=trial, curve=curve, **{k: record[k] for k in ("losses", "tokens", "seconds", "epochs")})
        except (ValueError, KeyError, TypeError) as error:
            raise CorruptError(
                f"{path} is damaged ({type(error).__name__}); remove it to run the trial again"
            ) from None

    def _run(self, trial: Trial, deadline: Deadline) -> Run:
        if deadline.passed:
            raise _out_of_time(f"before trial {trial.name!r}")
        folder = self._path(trial.name)
        shutil.rmtree(folder, ignore_errors=True)
        made = self._merge(trial) if trial.merge else self._train(trial, folder, deadline)
        record = {k: v for k, v in asdict(made).items()} | {"fingerprint": self._identity(trial)}
        write_json(folder / "run.json", record)
        return made

    def _train(self, trial: Trial, folder: Path, deadline: Deadline) -> Run:
        config = self.trial_config(trial.length, trial.seed)
        if trial.weights is not None:
            known = {d: w for d, w in trial.weights.items() if w > 0}
            config = replace(config, methods={**config.methods, "mixture": {"method": "fixed", "weights": known}})
        stream = config.stream(self._kept(trial))
        fed: Any = stream
        if trial.insert:
            texts = [(f"{i.name}/{n}", t, i.repeats) for i in trial.insert for n, t in enumerate(i.texts)]
            rows = config.total_steps * config.sequences
            fed = Inserting(stream, positions(texts, self.corpus.tokenizer, rows, config.sequence_length, config.seed))
        model = load_model(self._path(trial.start) / "model", "float32") if trial.start else self.fresh(trial.seed)
        curve = [(0.0, self.losses(model))] if trial.points else []
        along = _Along(self, config, trial.points)
        result = train(
            model, fed, config, None, events=Events(None), deadline=deadline, parts={"along": along}, label=""
        )
        if result.stopped:
            raise _out_of_time(f"in trial {trial.name!r}")
        model.float().eval()
        losses = self.losses(model)
        save_model(model, folder / "model", None)
        return Run(
            trial=trial,
            losses=losses,
            curve=(*curve, *along.curve, (float(result.tokens), losses)) if trial.points else (),
            tokens=float(result.tokens),
            seconds=result.seconds,
            epochs=max(d.consumed / d.size for d in stream.sampler.domains.values()),
        )

    def _merge(self, trial: Trial) -> Run:
        """The mean of the trials' parameters, in float64."""
        began = time.perf_counter()
        first, *others = (load_model(self._path(name) / "model", "float32") for name in trial.merge)
        sums = {name: value.double() for name, value in first.state_dict().items()}
        for model in others:
            for name, value in model.state_dict().items():
                sums[name] = sums[name] + value.double()
        first.load_state_dict({n: (v / (1 + len(others))).to(first.state_dict()[n]) for n, v in sums.items()})
        losses = self.losses(first.eval())
        return Run(trial=trial, losses=losses, seconds=time.perf_counter() - began)

    def _kept(self, trial: Trial) -> Documents:
        rows = {}
        for domain in self.documents.domains:
            kept = np.ones(self.documents.documents(domain), bool)
            for one in trial.keep:
                kept &= _within(self.corpus.columns[one.column][domain], one)
            rows[domain] = np.flatnonzero(kept)
        if not any(map(len, rows.values())):
            raise UserError(f"trial {trial.name!r} keeps no document; give milder filters")
        return Subset(self.documents, rows)

    def trial_config(self, length: float, seed: int) -> TrainConfig:
        """The training run of a trial."""
        plain = {k: v for k, v in vars(self.spec).items() if k in TrainConfig.__dataclass_fields__}
        tokens = length * self.spec.total_tokens
        updates = {"tokens": max(tokens, self.spec.step_tokens), "steps": None, "seed": self.spec.seed + seed}
        return TrainConfig(**plain | updates)

    def fresh(self, seed: int) -> Decoder:
        if self.spec.model:
            return load_model(self.spec.model, "float32")
        assert self.shape
        return Decoder(self.shape, torch.Generator().manual_seed(self.spec.seed + seed))

    def losses(self, model: Any) -> dict[str, float]:
        """Bits per byte of every group and every probe."""
        length = min(self.spec.sequence_length, model.config.context_length)

        def nats(texts: Sequence[str]) -> list[tuple[float, int, int]]:
            return [*document_nats(model, self.corpus.tokenizer, texts, sequence_length=length)]

        losses = {}
        for name, texts in self.texts.items():
            rows = nats(texts)
            losses[name] = sum(n for n, _, _ in rows) / max(sum(b for _, b, _ in rows), 1) / math.log(2)
        for name, pairs in self.probes.items():
            whole, before = nats([c + t for c, t in pairs]), nats([c for c, _ in pairs])
            extra = sum(n for n, _, _ in whole) - sum(n for n, _, _ in before)
            losses[name] = extra / sum(len(t.encode()) for _, t in pairs) / math.log(2)
        return losses


class _Along(Callback):
    """Measures a model at even distances along its run, without its start and its end."""

    def __init__(self, study: Study, config: TrainConfig, points: int):
        inner = np.linspace(0, config.total_steps, points)[1:-1] if points > 2 else np.empty(0)
        self.study, self.tokens, self.steps = study, config.step_tokens, {round(float(x)) for x in inner}
        self.curve: list[tuple[float, Mapping[str, float]]] = []
        self.done = 0

    def after_step(self, trainer: Any) -> None:
        self.done += 1
        if self.done in self.steps:
            trainer.model.eval()
            self.curve.append((float(self.done * self.tokens), self.study.losses(trainer.model)))
            trainer.model.train()


def _out_of_time(where: str) -> ModicumError:
    return ModicumError(f"the time budget ended {where}; finished trials are kept, and the same command goes on")


def _within(values: np.ndarray, wanted: Between) -> np.ndarray:
    kept: np.ndarray = (values >= wanted.low) & (values < wanted.high)  # NaN lies nowhere
    return kept


def _shape(spec: StudySpec, tokenizer: Tokenizer) -> Any:
    return sized(
        spec.parameters or 5e5,
        tokenizer.vocab_size,
        context_length=max(256, spec.sequence_length),
        bos_id=tokenizer.bos_id,
        eos_ids=(tokenizer.eos_id,),
        pad_id=tokenizer.pad_id,
    )
