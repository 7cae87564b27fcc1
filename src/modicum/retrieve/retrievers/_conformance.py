"""What holds for any retriever: rows keep their meaning, additions and removals are seen, a subset is kept to."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from modicum.core import registry
from modicum.core.errors import CorruptError, UserError
from modicum.retrieve.retrievers import Retriever, open_retriever

NOUNS = ("socket", "thread", "file", "queue", "parser", "matrix")
VERBS = ("open", "close", "read", "write", "lock", "merge")
TEXTS = [f"To {verb} a {noun}, call {verb}_{noun} on the {noun} itself." for noun in NOUNS for verb in VERBS]
QUERIES = ["read the file", "lock a thread", "merge one matrix", "close the socket"]


@contextmanager
def _made(key: str, texts: list[str] | None = None) -> Iterator[Retriever]:
    """The method with its defaults, or with a small model made here where it takes one."""
    loaded = registry.load("retriever", key)
    with tempfile.TemporaryDirectory() as folder:
        knobs = {f.name for f in dataclasses.fields(loaded.config)}
        if "model" in knobs:
            config = loaded.config(model=str(_trained(Path(folder) / "model", key)))
        elif getattr(loaded.config(), "encoder", "") == "minilm":
            config = loaded.config(encoder=f"sentence-transformers:model={_raw(Path(folder) / 'model')}")
        else:
            config = loaded.config()
        made = loaded.cls(config)
        if texts is None or texts:
            made.build(TEXTS if texts is None else texts)
        yield made


def _raw(folder: Path) -> Path:
    from modicum.retrieve.student import Student

    Student.new([*TEXTS, *QUERIES], width=24, layers=1, heads=2, vocabulary=360).save(folder)
    return folder


def _trained(folder: Path, key: str) -> Path:
    """By the trainer of the same key."""
    from modicum.retrieve.student import Student
    from modicum.retrieve.trainers._conformance import toy_pairs
    from modicum.retrieve.training import Training, train

    student = Student.new([*TEXTS, *QUERIES], width=24, layers=1, heads=2, vocabulary=360)
    loaded = registry.load("trainer", key)
    trainer = loaded.cls(getattr(loaded.module, "TOY", None) or loaded.config(), toy_pairs())
    train(student, trainer, Training(steps=4, batch=6, lr=1e-3), out=folder)
    return folder


def check_rankings(key: str) -> None:
    with _made(key) as made:
        assert len(made) == len(TEXTS) and made.nbytes() > 0
        hits = made.rank(QUERIES, 5)
        assert hits.ids_QK.shape == (4, 5) and hits.ids_QK.dtype == np.int64 and hits.scores_QK.dtype == np.float32
        for ids, scores in zip(hits.ids_QK, hits.scores_QK, strict=True):
            real = ids >= 0
            assert len(set(ids[real].tolist())) == real.sum() and (np.diff(scores[real]) <= 1e-5).all()
        everything = made.rank(QUERIES, len(TEXTS) + 3)
        assert everything.ids_QK.shape == (4, len(TEXTS) + 3) and (everything.ids_QK[:, -3:] == -1).all()
        alone = np.concatenate([made.rank([q], 5).ids_QK for q in QUERIES])
        assert np.array_equal(alone, hits.ids_QK), "a query's ranking does not depend on the others"


def check_a_subset_is_kept_to(key: str) -> None:
    with _made(key) as made:
        whole = made.rank(QUERIES, len(TEXTS)).ids_QK
        chosen = list(range(3, 30, 2))
        ids_QK = made.rank(QUERIES, 5, subset=[*chosen, 999, -4]).ids_QK
        for ids, ranking in zip(ids_QK, whole, strict=True):
            assert ids[ids >= 0].tolist() == [i for i in ranking.tolist() if i in chosen][: int((ids >= 0).sum())]
        assert (made.rank(QUERIES, 3, subset=[]).ids_QK == -1).all()


def check_additions_and_removals(key: str) -> None:
    with _made(key) as made:
        best = int(made.rank(QUERIES[:1], 1).ids_QK[0, 0])
        assert made.remove([best, 12345]) == 1 and made.remove([best]) == 0 and len(made) == len(TEXTS) - 1
        assert best not in made.rank(QUERIES[:1], len(TEXTS)).ids_QK
        rows = made.add([TEXTS[best], "A zebra gallops over the savanna."])
        assert rows.tolist() == [len(TEXTS), len(TEXTS) + 1], "rows are never given again"
        ids = made.rank(QUERIES[:1], 2).ids_QK[0].tolist()  # a small model may take an odd text for the best
        assert next(i for i in ids if i != rows[1]) == rows[0], "the same text is as good as it was"
        made.remove(range(len(TEXTS) + 2))
        assert len(made) == 0 and (made.rank(QUERIES, 3).ids_QK == -1).all()
    with _made(key, texts=[]) as empty:
        assert (empty.rank(QUERIES, 2).ids_QK == -1).all() and not len(empty.add([]))


def check_save_and_open(key: str) -> None:
    with _made(key) as made, tempfile.TemporaryDirectory() as folder:
        made.remove([0, 5])
        made.add(["One more text about a file."])
        made.save(Path(folder) / "r")
        again = open_retriever(Path(folder) / "r")
        assert type(again) is type(made) and again.config == made.config and len(again) == len(made)
        before, after = made.rank(QUERIES, 9), again.rank(QUERIES, 9)
        assert np.array_equal(before.ids_QK, after.ids_QK) and np.allclose(before.scores_QK, after.scores_QK, atol=1e-5)
        again.add(["And one more."])
        again.save(Path(folder) / "r")
        assert len(open_retriever(Path(folder) / "r")) == len(made) + 1
        (Path(folder) / "r" / "alive.npy").write_bytes(b"")
        try:
            open_retriever(Path(folder) / "r")
        except CorruptError:
            return
        raise AssertionError("a truncated file must be noticed")


def check_wrong_input(key: str) -> None:
    with _made(key) as made:
        for wrong in (lambda: made.rank(["a", " "], 3), lambda: made.rank(QUERIES, 0), lambda: made.build(TEXTS)):
            try:
                wrong()
            except UserError as error:
                assert "\n" not in str(error)
                continue
            raise AssertionError("an empty query, no results and a second build must be refused")
