"""Runs made here (`bench.law_runs`) as back-tests of a law, in the laws' columns.

`repeated`: the largest size on many passes over little text. `short`: the later half of single-pass runs. `mixed`:
continual pretraining at several domain fractions. `pruned`: the largest size, pruned on the way. `mixtures`: others
than those fitted, at a larger size. `examples`: accuracy after more finetuning examples; `format`: the replies in the
wanted form.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from modicum.bench.ports._law_tables import Case, Protocols, pick
from modicum.laws.table import read_runs


def _own(folder: Path, name: str) -> dict[str, np.ndarray] | None:
    path = folder / f"{name}.jsonl"
    return {n: np.array(v, dtype=object) for n, v in read_runs(path).items()} if path.is_file() else None


def repeated(folder: Path) -> Iterator[Case]:
    """The largest size on 16 and 64 passes over its text, from its runs of 1 and 4 passes and all of the others."""
    t = _own(folder, "repeated")
    if t is None:
        return
    rows = {n: t[n] for n in ("run", "parameters", "tokens", "unique_tokens", "loss")}
    far = (t["parameters"] == t["parameters"].max()) & (t["passes"] >= 16)
    yield Case("repeated data", pick(rows, ~far), pick(rows, far), extra={"mixed": True}, own=True)


def short(folder: Path) -> Iterator[Case]:
    """The second half of the single-pass runs from their first half: a few hundred steps, where curves begin flat."""
    t = _own(folder, "repeated")
    if t is None:
        return
    once = t["passes"] == 1
    early = t["tokens"] <= t["tokens"].max() / 2
    rows = {n: t[n] for n in ("run", "parameters", "tokens", "loss")}
    vocabulary = int(t["vocabulary"][0])
    yield Case("short runs", pick(rows, once & early), pick(rows, once & ~early), extra={"vocabulary": vocabulary})


def mixed(folder: Path) -> Iterator[Case]:
    """General loss in the second half of continual pretraining, from the first half, at every domain fraction."""
    t = _own(folder, "mixed")
    if t is None:
        return
    rows = {n: t[n] for n in ("run", "parameters", "ratio", "tokens", "change", "loss")}
    early = t["tokens"] <= t["tokens"].max() / 2
    for size in sorted(set(t["parameters"])):
        at = t["parameters"] == size
        yield Case(f"{size / 1e6:.2f}M", pick(rows, at & early), pick(rows, at & ~early), extra={"changes": True})


def pruned(folder: Path) -> Iterator[Case]:
    """The pruned runs of the largest size from its dense runs and all runs of the smaller ones."""
    t = _own(folder, "pruned")
    if t is None:
        return
    rows = {n: t[n] for n in ("run", "parameters", "average_parameters", "tokens", "loss")}
    far = (t["dense_parameters"] == t["dense_parameters"].max()) & (t["pruned"] != "dense")
    yield Case("pruned runs", pick(rows, ~far), pick(rows, far), own=True)


def mixtures(folder: Path) -> Iterator[Case]:
    """Other mixtures at the largest size from mixtures at two smaller ones, each seed's runs by themselves."""
    t = _own(folder, "mixtures")
    if t is None:
        return
    names = ("run", "parameters", "tokens", "transport", "loss", *(n for n in t if n.startswith("ratio_")))
    for seed in sorted(set(t["seed"])):
        at = t["seed"] == seed
        large = t["tokens"] == t["tokens"].max()
        yield Case(f"seed {seed}", pick({n: t[n] for n in names}, at & ~large), pick(t, at & large), own=True)


def examples(folder: Path) -> Iterator[Case]:
    """Scores after the two largest numbers of finetuning examples from those after fewer."""
    yield from _after_examples(folder, "score")


def formats(folder: Path) -> Iterator[Case]:
    """The same of the share of replies in the wanted form."""
    yield from _after_examples(folder, "format")


def _after_examples(folder: Path, figure: str) -> Iterator[Case]:
    t = _own(folder, "examples")
    if t is None:
        return
    read = 30 * (1 + t["examples"])  # a stand-in for tokens, for laws that know no examples
    columns = {n: t[n] for n in ("run", "examples", "items")}
    rows = columns | {"score": t[figure], "tokens": read, "parameters": np.full(len(read), 134.5e6, object)}
    sizes = sorted(set(t["examples"]))
    far = t["examples"] >= sizes[-2]
    yield Case(figure, pick(rows, ~far), pick(rows, far), own=True)


PROTOCOLS: Protocols = {
    "repeated": (repeated,),
    "short": (short,),
    "mixed": (mixed,),
    "pruned": (pruned,),
    "mixtures": (mixtures,),
    "examples": (examples,),
    "format": (formats,),
}
TABLES = {"short": "repeated", "format": "examples"}  # the file a protocol reads, where it has another name
