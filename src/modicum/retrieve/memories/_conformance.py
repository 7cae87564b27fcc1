"""What holds for any memory: the reader stays as it is, documents come and go in any order, what is saved opens."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from modicum.core import registry
from modicum.core.errors import CorruptError, UserError
from modicum.retrieve.memories import Example, Memory, open_memory, prompt
from modicum.retrieve.prefix import FrozenReader, Prefix

NAMES = ("ada", "boris", "carla", "dmitri", "emma", "farid", "greta", "hugo")
TOWNS = ("oslo", "vienna", "lima", "cairo", "tokyo", "delhi", "quito", "perth")
EXAMPLES = [Example(f"{n} lives in {t}", f"where does {n} live", t) for n, t in zip(NAMES, TOWNS, strict=True)]
DOCUMENTS = [e.document for e in EXAMPLES]
QUESTIONS = [e.question for e in EXAMPLES]


def toy_reader() -> FrozenReader:
    from modicum.data.tokenizer import Tokenizer
    from modicum.model.config import DecoderConfig
    from modicum.model.decoder import Decoder

    tokenizer = Tokenizer.train([*DOCUMENTS, *map(prompt, QUESTIONS)] * 4, 400)
    config = DecoderConfig(
        vocab_size=tokenizer.vocab_size, width=32, layers=2, heads=2, kv_heads=1, head_dim=16, mlp_width=64,
        context_length=128,
    )  # fmt: skip
    return FrozenReader(Decoder(config, torch.Generator().manual_seed(0)), tokenizer)


@contextmanager
def made(key: str, reader: FrozenReader | None = None, **knobs: object) -> Iterator[Memory]:
    """The method at toy size; where it takes an encoder, one that was made here."""
    from modicum.retrieve.student import Student

    loaded = registry.load("kvmemory", key)
    fields = {f.name for f in dataclasses.fields(loaded.config)}
    small = {"width": 32, "heads": 2, "vectors": 3, "blocks": 1} | knobs
    with tempfile.TemporaryDirectory() as folder:
        if "encoder" in fields:
            student = Student.new([*DOCUMENTS, *QUESTIONS], width=16, layers=1, heads=2, vocabulary=330)
            student.save(Path(folder) / "encoder")
            small |= {"encoder": f"sentence-transformers:model={folder}/encoder"}
        config = loaded.config(**{k: v for k, v in small.items() if k in fields})
        yield loaded.cls(config, reader or toy_reader())


def _equal(a: Prefix | None, b: Prefix | None, atol: float) -> bool:
    if a is None or b is None:
        return a is b
    return all(torch.allclose(x, y, atol=atol) for x, y in zip((*a.k, *a.v), (*b.k, *b.v), strict=True))


def check_documents_come_and_go(key: str) -> None:
    with made(key) as memory:
        assert memory.read(QUESTIONS) is None and memory.nbytes() == 0, "an empty bank gives nothing"
        memory.write(["a", "b", "c"], DOCUMENTS[:3])
        before, size = memory.read(QUESTIONS), memory.nbytes()
        memory.write(["d"], DOCUMENTS[3:4])
        assert memory.remove(["d", "d", "nobody"]) == 1 and memory.nbytes() == size
        assert _equal(memory.read(QUESTIONS), before, 0), "what is removed leaves nothing behind"
        assert memory.remove(["a", "b", "c"]) == 3 and memory.read(QUESTIONS) is None and memory.nbytes() == 0


def check_the_order_of_documents_says_nothing(key: str) -> None:
    with made(key) as memory:
        memory.write(list("abcdefgh"), DOCUMENTS)
        one = memory.read(QUESTIONS)
        memory.remove("abcdefgh")
        memory.write(list("hgfedcba"), DOCUMENTS[::-1])
        assert _equal(memory.read(QUESTIONS), one, 2e-3), "stored as float16, read by sets"


def check_prefixes_fit_the_reader(key: str) -> None:
    with made(key) as memory:
        memory.write(list("abc"), DOCUMENTS[:3])
        prefix = memory.read(QUESTIONS)
        if prefix is None:
            return
        for (g, e), k, v in zip(memory.reader.shapes, prefix.k, prefix.v, strict=True):
            assert k.shape == v.shape == (len(QUESTIONS), g, prefix.length, e)
        alone = memory.read(QUESTIONS[2:3])
        assert _equal(alone, prefix.rows([2]), 1e-4), "a question's prefix does not depend on the others"
        losses = memory.reader.losses(prefix, [prompt(q) for q in QUESTIONS], TOWNS)
        assert losses.shape == (len(QUESTIONS),) and torch.isfinite(losses).all()


def check_training_leaves_the_reader_as_it_was(key: str) -> None:
    with made(key) as memory:
        weights = {n: p.clone() for n, p in memory.reader.model.named_parameters()}
        args = (None, [prompt(q) for q in QUESTIONS], TOWNS)
        before = memory.reader.losses(*args)
        losses = memory.fit(EXAMPLES, steps=40, batch=8, lr=3e-3)
        assert all(p.grad is None and not p.requires_grad for p in memory.reader.model.parameters())
        assert all(torch.equal(p, weights[n]) for n, p in memory.reader.model.named_parameters())
        assert torch.equal(memory.reader.losses(*args), before), "without a prefix it answers as ever"
        assert bool(losses) == (memory.net is not None)
        if losses:
            first, last = sum(losses[:3]) / 3, sum(losses[-3:]) / 3
            assert last < 0.95 * first, f"{first} at first, {last} after 40 steps"


def check_save_and_open(key: str) -> None:
    with made(key) as memory, tempfile.TemporaryDirectory() as folder:
        memory.fit(EXAMPLES, steps=2, batch=4)
        memory.write(list("abc"), DOCUMENTS[:3])
        memory.save(Path(folder) / "m")
        again = open_memory(Path(folder) / "m", memory.reader)
        assert list(again.bank) == ["a", "b", "c"] and again.config == memory.config
        assert _equal(again.read(QUESTIONS), memory.read(QUESTIONS), 0)
        (Path(folder) / "m" / "bank.safetensors").write_bytes(b"")
        try:
            open_memory(Path(folder) / "m", memory.reader)
        except CorruptError:
            return
        raise AssertionError("a truncated file must be noticed")


def check_wrong_input(key: str) -> None:
    with made(key) as memory:
        memory.write(["a"], DOCUMENTS[:1])
        for wrong in (
            lambda: memory.write(["a"], ["again"]),
            lambda: memory.write(["b", "b"], ["x", "y"]),
            lambda: memory.write(["b"], ["  "]),
            lambda: memory.write(["b"], []),
            lambda: memory.read(["what", " "]),
        ):
            try:
                wrong()
            except UserError as error:
                assert "\n" not in str(error)
                continue
            raise AssertionError("an id twice, an empty document and an empty question must be refused")
        assert list(memory.bank) == ["a"], "nothing half-written"
