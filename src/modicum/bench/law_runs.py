"""Run tables for laws of which no published table has rows: small decoders trained here, their losses kept.

    python -m modicum.bench.law_runs repeated --out evidence/runs --seeds 0,1,2
    python -m modicum.bench.law_runs mixed --data FOLDER --domain specs_python --out evidence/runs

`repeated`: three sizes on the same number of tokens, made of 1, 4, 16 or 64 passes over ever less text. `mixed`: two
sizes trained on general text, each then continued on mixtures with several domain fractions, and once on general text
alone, which shows what warming the rate up again costs. Held-out loss (nats per token) along every run. A finished run
is appended to TABLE.jsonl and is not made again, so the command goes on after a kill. `modicum bench law --data
evidence/runs --scale protocol=repeated` reads the tables.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from modicum.bench import training
from modicum.bench.measurement import Settings
from modicum.core.choice import Choice
from modicum.core.errors import ModicumError, UserError
from modicum.core.files import write_text
from modicum.data.document import Document
from modicum.evaluate.lm import document_nats
from modicum.laws.table import read_runs
from modicum.model.config import llama_like
from modicum.model.decoder import Decoder
from modicum.train.callback import Callback

PASSES = (1, 4, 16, 64)
RATIOS = (0.0, 0.125, 0.25, 0.5, 0.75)


@dataclass(frozen=True, kw_only=True)
class Scale(training.Scale):
    """As of every bench that trains; sizes: width x layers of the decoders."""

    tokens: int = 256 * 1024
    sizes: tuple[tuple[int, int], ...] = ((64, 2), (96, 3), (128, 4))
    checkpoints: int = 8


class Curve(Callback):
    """Held-out loss, nats per token, at evenly spaced steps."""

    def __init__(self, bench: training.Bench, texts: Sequence[str], checkpoints: int):
        self.bench, self.texts, self.checkpoints = bench, list(texts), checkpoints
        self.points: list[tuple[int, float]] = []

    def after_step(self, trainer: Any) -> None:
        total, done = trainer.config.total_steps, trainer.steps_done
        if done * self.checkpoints // total > (done - 1) * self.checkpoints // total:
            trainer.write_back()
            self.points.append((trainer.tokens, nats(self.bench, trainer.model, self.texts)))
            trainer.model.train()


def nats(bench: training.Bench, model: Any, texts: Sequence[str]) -> float:
    """Mean loss of the texts, nats per token."""
    rows = list(document_nats(model, bench.tokenizer, texts, sequence_length=bench.scale.sequence_length))
    return sum(r[0] for r in rows) / sum(r[2] for r in rows)


def decoder(bench: training.Bench, size: tuple[int, int], seed: int) -> Decoder:
    import torch

    shape = llama_like(bench.tokenizer.vocab_size, *size, context_length=bench.scale.sequence_length)
    return Decoder(shape, torch.Generator().manual_seed(seed))


def repeated(settings: Settings, seed: int, done: set[str]) -> Iterator[list[dict[str, Any]]]:
    """The rows of each run: every size, every number of passes, equal tokens, constant rate."""
    bench, scale = training.Bench.of(settings), settings.scale
    texts = bench.corpus.heldout_texts()
    for passes in PASSES:
        documents = training.memory(first_tokens(bench, scale.tokens // passes, seed), bench.tokenizer)
        for size in scale.sizes:
            name = f"{size[0]}x{size[1]}, {passes} passes, seed {seed}"
            if name in done:
                continue
            model = decoder(bench, size, seed)
            schedule = Choice.parse("schedule", "constant")
            stream = bench.stream(seed, documents, schedule=schedule)
            curve = Curve(bench, texts, scale.checkpoints)
            bench.train(model, seed, stream, schedule=schedule, parts={"curve": curve})
            unique = sum(domain.size for domain in stream.sampler.domains.values())
            yield [
                {
                    "run": name,
                    "seed": seed,
                    "parameters": model.config.parameters(),
                    "tokens": tokens,
                    "unique_tokens": min(unique, scale.tokens),
                    "passes": passes,
                    "schedule": "constant",
                    "vocabulary": bench.tokenizer.vocab_size,
                    "loss": loss,
                }
                for tokens, loss in curve.points
            ]


def first_tokens(bench: training.Bench, tokens: int, seed: int) -> list[Document]:
    """Documents of the corpus in an order of the seed, up to `tokens` tokens; smaller sets are parts of larger ones."""
    documents = bench.corpus.train
    chosen, left = [], tokens
    for i in np.random.default_rng(seed).permutation(len(documents)):
        document = documents[i]
        (ids,) = bench.tokenizer.encode_batch([document.text], specials=False)
        if len(ids) + 1 > left:
            chosen.append(Document(document.id, document.text[: len(document.text) * left // (len(ids) + 1)]))
            return chosen
        chosen.append(Document(document.id, document.text))
        left -= len(ids) + 1
    raise UserError(f"the corpus has {tokens - left} tokens and {tokens} are needed; set corpus_bytes higher")


def mixed(settings: Settings, seed: int, done: set[str], domain: str) -> Iterator[list[dict[str, Any]]]:
    """Change of the general loss (rows of each run) in continual pretraining at several domain fractions."""
    bench, scale = training.Bench.of(settings), settings.scale
    if domain not in bench.corpus.domains:
        raise UserError(f"no domain {domain!r} in {bench.corpus.name}; it has {', '.join(bench.corpus.domains)}")
    general = [d for d in bench.corpus.domains if d != domain]
    texts = [text for d in general for text in bench.corpus.heldout_texts(d)]
    own = bench.corpus.heldout_texts(domain)
    plain = dict.fromkeys(general, 1.0)
    for size in scale.sizes:
        names = {ratio: f"{size[0]}x{size[1]}, {domain} {ratio:g}, seed {seed}" for ratio in RATIOS}
        if done >= set(names.values()):
            continue
        base = decoder(bench, size, seed)
        first: dict[str, Any] = {
            "schedule": Choice.parse("schedule", "wsd"),
            "mixture": Choice("mixture", "fixed", {"weights": plain}),
        }
        bench.train(base, seed, bench.stream(seed, **first), **first)
        before, before_own = nats(bench, base, texts), nats(bench, base, own)
        for ratio, name in names.items():
            if name in done:
                continue
            model = copy.deepcopy(base)
            weights = {d: (1 - ratio) / len(general) for d in general} | {domain: ratio}
            more: dict[str, Any] = {
                "schedule": Choice.parse("schedule", "rewarm"),
                "mixture": Choice("mixture", "fixed", {"weights": weights}),
            }
            curve, ours = Curve(bench, texts, scale.checkpoints), Curve(bench, own, scale.checkpoints)
            stream = bench.stream(seed + 100, **more)  # other documents first than the first run read
            bench.train(model, seed, stream, parts={"curve": curve, "domain": ours}, **more)
            yield [
                {
                    "run": name,
                    "seed": seed,
                    "parameters": model.config.parameters(),
                    "domain": domain,
                    "ratio": ratio,
                    "tokens": tokens,
                    "change": loss - before,
                    "loss": loss,
                    "domain_change": domain_loss - before_own,
                }
                for (tokens, loss), (_, domain_loss) in zip(curve.points, ours.points, strict=True)
            ]


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m modicum.bench.law_runs", description=__doc__.split("\n")[0])
    parser.add_argument("table", choices=("repeated", "mixed"))
    parser.add_argument("--out", type=Path, required=True, help="folder of the tables")
    parser.add_argument("--data", help="a folder of text instead of the Python installation")
    parser.add_argument("--domain", default="code", help="mixed: the domain that the models are continued on")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--quick", action="store_true", help="seconds, for a test")
    given = parser.parse_args(words)
    own: dict[str, Any] = training.QUICK | {"sizes": ((32, 1),), "checkpoints": 8} if given.quick else {}
    if given.table == "mixed" and not given.quick:
        own = {
            "corpus_bytes": 4_000_000,
            "heldout_bytes": 80_000,
            "vocabulary": 1024,
            "sizes": ((64, 3), (128, 4)),
            "checkpoints": 12,
        }
    settings = Settings(scale=Scale(**own), data=given.data)
    path = given.out / f"{given.table}.jsonl"
    try:
        for seed in map(int, given.seeds.split(",")):
            done = {str(v) for v in read_runs(path)["run"]} if path.is_file() else set()
            made = repeated(settings, seed, done)
            if given.table == "mixed":
                made = mixed(settings, seed, done, given.domain)
            for rows in made:
                old = path.read_text(encoding="utf-8") if path.is_file() else ""
                write_text(path, old + "".join(json.dumps(row) + "\n" for row in rows))
                end = rows[-1]
                print(f"{end['run']}: loss {end['loss']:.4f} after {end['tokens']:,} tokens", flush=True)
    except ModicumError as error:
        print(f"modicum: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
