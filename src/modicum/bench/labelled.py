"""Few labelled texts, a model adapted to them, and how often it then gives the right label.

A table of texts and labels (--data FILE.parquet with `text` and `label_name`), or, without one, first sentences of
docstrings of the Python installation, whose label is the package. `per_class` examples of every class train a LoRA
adapter by the ordinary verb, for equal steps with and without copies. Others, at most `tests`, are judged by the
likeliest first token of an answer: the label's text, or a letter for it, where texts begin alike.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from modicum.adapt.examples import Example, encode
from modicum.adapt.load import load_adapted
from modicum.adapt.run import adapt
from modicum.adapt.spec import AdaptSpec
from modicum.bench import fixtures
from modicum.bench.measurement import Axes, Axis, Measurement, Settings
from modicum.budget import Cost
from modicum.core import registry
from modicum.core.choice import Choice
from modicum.core.errors import UserError
from modicum.core.files import fingerprint
from modicum.data.document import Document
from modicum.data.passages import is_python, passages
from modicum.data.readers import ReadConfig, find, read
from modicum.data.rewriting import rewrite
from modicum.data.tokenizer import Tokenizer
from modicum.model.config import llama_like
from modicum.model.decoder import Decoder
from modicum.model.folder import find_folder, save_model

AXES = Axes(quality=Axis("accuracy", "higher"), cost=Axis("adapt_seconds", "lower", "s", against=""))
CLASSES = 6  # at most
DOCUMENT_BYTES = 4_000_000  # of the Python installation


@dataclass(frozen=True, kw_only=True)
class Size:
    per_class: int = 8
    tests: int = 240
    steps: int = 30  # of one row of `row` tokens, some nine examples
    row: int = 512
    lr: float = 5e-4
    rank: int = 8
    model: str = "smollm2"  # "": a fresh small decoder


QUICK = Size(per_class=2, tests=12, steps=2, row=128, model="")


def measure(choice: Choice, seed: int, settings: Settings) -> Measurement:
    """Adapted by `choice`, an objective, and by next-token prediction, each with and without EDA's copies of the
    examples. `gain` and `eda_gain` are differences of accuracy."""
    size = QUICK if settings.quick else Size()
    metrics: dict[str, float] = {}
    seconds = 0.0
    for name, objective in (("", str(choice)), ("plain_", "next-token")):
        for copies in ("", "eda_"):
            made, took = arm(settings.data, size, objective, bool(copies), seed)
            metrics |= {f"{copies}{name}{key}": value for key, value in made.items()}
            seconds += took if not name else 0.0
    metrics |= {f"{c}gain": metrics[f"{c}accuracy"] - metrics[f"{c}plain_accuracy"] for c in ("", "eda_")}
    texts, labels = rows(settings.data)
    name = Path(settings.data).name if settings.data else "first sentences of docstrings, by package"
    checksum = fingerprint([texts[:50], labels[:50]])
    record = {"name": name, "texts": len(texts), "classes": len(set(labels)), "checksum": checksum}
    return Measurement(metrics=metrics | {"adapt_seconds": seconds}, cost=Cost(seconds=seconds), data=record, axes=AXES)


@functools.lru_cache(maxsize=64)
def arm(data: str | None, size: Size, objective: str, eda: bool, seed: int) -> tuple[dict[str, float], float]:
    """`accuracy`, and `separation`: mean cosine of the states of two test texts of one class, less that of two
    classes; seconds of the adaptation."""
    train, tests, labels = drawn(data, size, seed)
    if eda:
        train = augmented(train, seed)
    with tempfile.TemporaryDirectory() as work:
        folder = find_folder(size.model) if size.model else _small(Path(work) / "model", data)
        spec = AdaptSpec(
            form=f"lora:rank={size.rank}",
            objective=objective,
            steps=size.steps,
            batch_tokens=size.row,
            sequence_length=size.row,
            lr=size.lr,
            heldout=0.0,
            seed=seed,
        )
        tokenizer = Tokenizer.load(folder)
        answer_of = answers(labels, tokenizer)
        pairs = [Example.of(text, answer_of[label], str(i)) for i, (text, label) in enumerate(train)]
        made = adapt(folder, pairs, spec, Path(work) / "out")
        model = load_adapted(folder, adapter=made.adapter, dtype="float32")
        scores = judged(model, tokenizer, [(text, answer_of[label]) for text, label in tests], list(answer_of.values()))
    return scores, made.seconds


def drawn(data: str | None, size: Size, seed: int) -> tuple[list[tuple[str, str]], list[tuple[str, str]], list[str]]:
    """(text, label) to train on and to be judged by, and the labels, whose first tokens differ."""
    texts, names = rows(data)
    labels = sorted(set(names))
    order = [int(i) for i in np.random.default_rng([53, seed]).permutation(len(texts))]
    train: list[tuple[str, str]] = []
    tests: list[tuple[str, str]] = []
    count = dict.fromkeys(labels, 0)
    for i in order:
        if count[names[i]] < size.per_class:
            count[names[i]] += 1
            train.append((texts[i], names[i]))
        elif len(tests) < size.tests:
            tests.append((texts[i], names[i]))
    return train, tests, labels


@functools.lru_cache(maxsize=2)
def rows(data: str | None) -> tuple[list[str], list[str]]:
    """Texts and labels, those of the classes with most texts."""
    if data:
        import pyarrow.parquet as pq

        try:
            table = pq.read_table(data, columns=["text", "label_name"]).to_pydict()
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"{data}: {error}; give a parquet file with the columns text and label_name") from None
        texts, names = [str(t) for t in table["text"]], [str(n) for n in table["label_name"]]
    else:
        config, documents, size = ReadConfig(), list[Document](), 0
        for unit in find("python", config):
            documents += [d for d in read(unit, config) if isinstance(d, Document) and is_python(d)]
            size = sum(len(d.text) for d in documents)
            if size > DOCUMENT_BYTES:
                break
        pairs = {p.summary: p.title.partition(".")[0] for p in passages(documents) if p.summary and "." in p.title}
        texts, names = list(pairs), list(pairs.values())
    kept = sorted(set(names), key=lambda n: (-names.count(n), n))[:CLASSES]
    chosen = [(t, n) for t, n in zip(texts, names, strict=True) if n in kept]
    return [t for t, _ in chosen], [n for _, n in chosen]


def augmented(train: Sequence[tuple[str, str]], seed: int) -> list[tuple[str, str]]:
    """The examples and EDA's copies of each, as `rewrite/peft-augmentation` makes them."""
    rewriter: Any = registry.build("rewrite", Choice.parse("rewrite", "peft-augmentation:copies=3"))
    documents = [Document(f"{seed}/{i}", text, label, "") for i, (text, label) in enumerate(train)]
    label_of = {d.id: d.domain for d in documents}
    made = [d for d in rewrite(rewriter, documents, None) if isinstance(d, Document)]
    return [(d.text, label_of[d.origin]) for d in made]


def answers(labels: Sequence[str], tokenizer: Tokenizer) -> dict[str, str]:
    """What the model is to answer for each label; first tokens differ."""
    if len({_first(label, tokenizer) for label in labels}) == len(labels):
        return {label: label for label in labels}
    return {label: chr(ord("A") + i) for i, label in enumerate(labels)}


def _first(answer: str, tokenizer: Tokenizer) -> int:
    encoded = encode(Example.of("", answer), tokenizer)
    return int(encoded.ids[encoded.given])


@torch.no_grad()
def judged(
    model: Decoder, tokenizer: Tokenizer, tests: Sequence[tuple[str, str]], labels: Sequence[str]
) -> dict[str, float]:
    model.eval()
    firsts = [_first(label, tokenizer) for label in labels]
    states, right = [], 0
    for text, label in tests:
        encoded = encode(Example.of(text, label), tokenizer)
        ids_1T = torch.from_numpy(np.asarray(encoded.ids[: encoded.given], np.int64))[None]
        h_D = model.hidden(ids_1T)[0, -1]
        right += labels[int(model.head(h_D)[firsts].argmax())] == label
        states.append(h_D)
    z_ND = F.normalize(torch.stack(states), dim=-1)
    of_N = torch.tensor([labels.index(label) for _, label in tests])
    cosine_NN, alike_NN = z_ND @ z_ND.T, of_N[:, None] == of_N
    apart = cosine_NN[~alike_NN].mean() if (~alike_NN).any() else torch.tensor(0.0)
    alike_NN.fill_diagonal_(False)
    near = cosine_NN[alike_NN].mean() if alike_NN.any() else torch.tensor(0.0)
    return {"accuracy": right / len(tests), "separation": float(near - apart)}


def _small(folder: Path, data: str | None) -> Path:
    texts, names = rows(data)
    tokenizer = Tokenizer.train([*texts[:400], *(" ".join(dict.fromkeys(names)) for _ in range(20))], 400)
    shape = llama_like(tokenizer.vocab_size, 32, 2, context_length=256)
    save_model(Decoder(shape, fixtures.seeded(0)), folder)
    tokenizer.save(folder)
    return folder
