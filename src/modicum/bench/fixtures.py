"""What benches measure on when they are given nothing: a small real corpus, a tokenizer, a small decoder.

The corpus is the documentation and source of the Python installation, read as a user's folder would be,
or the folder or file given by --data. Everything is made from a seed and cached within the process, so
that the methods of a port share it.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modicum.core.errors import UserError
from modicum.core.events import Events, Progress
from modicum.data.document import Document
from modicum.data.readers import ReadConfig, Unit, find, read

if TYPE_CHECKING:
    from modicum.data.tokenizer import Tokenizer
    from modicum.model.decoder import Decoder


TABLES = ("jsonl", "parquet")  # kinds of files that hold many documents


@dataclass(frozen=True)
class Corpus:
    """Documents for training and documents held out; `name` and `checksum` go into the records."""

    name: str
    train: tuple[Document, ...]
    heldout: tuple[Document, ...]
    checksum: str

    @property
    def record(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "checksum": self.checksum,
            "train_bytes": sum(d.nbytes for d in self.train),
            "heldout_bytes": sum(d.nbytes for d in self.heldout),
        }

    def heldout_texts(self, domain: str | None = None) -> list[str]:
        return [d.text for d in self.heldout if domain in (None, d.domain)]

    @property
    def domains(self) -> list[str]:
        return sorted({d.domain for d in self.train})


@functools.lru_cache(maxsize=4)
def corpus(source: str | None, train_bytes: int, heldout_bytes: int, parted: bool = True) -> Corpus:
    """Read about `train_bytes` + `heldout_bytes` of text; files are picked and split by a hash of names.

    Files, not documents, are held out, so that no two parts of one file lie on both sides; but tables (Parquet, JSONL)
    hold documents of their own, and each gives its part to both sides. With `parted`, documentation that stands in
    code is a domain of its own ("prose" beside "code").
    """
    name = source or "python"
    config = ReadConfig(max_document_bytes=1 << 18)
    units = find(name, config)
    tables = [unit for unit in units if unit.kind in TABLES or unit.kind == "hub"]
    limits = {"heldout": heldout_bytes, "train": train_bytes}
    if tables:
        sides = _of_tables(tables, limits, config, parted)
    else:
        config = dataclasses.replace(config, limit_bytes=train_bytes + 2 * heldout_bytes)
        sides = _of_files(find(name, config), limits, config, parted)
    sizes = {side: sum(d.nbytes for d in documents) for side, documents in sides.items()}
    if not sides["train"] or not sides["heldout"]:
        raise UserError(
            f"{name} holds too little text to measure on: {sizes['heldout']} bytes held out, "
            f"{sizes['train']} to train on; give a larger folder, or ask for less: "
            f"--scale heldout_bytes={heldout_bytes // 10}"
        )
    digest = hashlib.sha256()
    for document in (*sides["train"], *sides["heldout"]):
        digest.update(document.text.encode("utf-8", "surrogatepass"))
    label = "documentation and source of the Python installation" if source is None else Path(name).name
    return Corpus(label, tuple(sides["train"]), tuple(sides["heldout"]), digest.hexdigest()[:16])


def _of_files(units: list[Unit], limits: dict[str, int], config: ReadConfig, parted: bool) -> dict[str, list[Document]]:
    sides: dict[str, list[Document]] = {"heldout": [], "train": []}
    sizes = dict.fromkeys(sides, 0)
    for unit in sorted(units, key=lambda unit: hashlib.sha256(unit.id.encode()).digest()):
        side = "heldout" if sizes["heldout"] < limits["heldout"] else "train"
        for item in read(unit, config):
            if isinstance(item, Document):
                for part in by_domain(item) if parted else [item]:
                    if sizes[side] < limits[side]:
                        sides[side].append(part)
                        sizes[side] += part.nbytes
        if sizes["train"] >= limits["train"]:
            break
    return sides


def _of_tables(
    units: list[Unit], limits: dict[str, int], config: ReadConfig, parted: bool
) -> dict[str, list[Document]]:
    """From each table alike: held out are its first documents, the next are trained on."""
    sides: dict[str, list[Document]] = {"heldout": [], "train": []}
    for unit in units:
        documents = (item for item in read(unit, config) if isinstance(item, Document))
        for side, own in sides.items():
            size = 0
            while size < limits[side] / len(units) and (document := next(documents, None)) is not None:
                own += by_domain(document) if parted else [document]
                size += document.nbytes
    return sides


def by_domain(document: Document) -> Iterator[Document]:
    """A Python source as two documents, its prose (docstrings, comments) and its code; others as they are."""
    from modicum.data.python_source import split

    parts = split(document) if document.domain == "code" and document.id.endswith(".py") else None
    if parts is None:
        yield document
        return
    for domain, text in zip(("prose", "code"), parts, strict=True):
        if text.strip():
            yield Document(f"{document.id}#{domain}", text, domain, document.source, {"part_of": document.origin})


@functools.lru_cache(maxsize=4)
def tokenizer(
    source: str | None, train_bytes: int, heldout_bytes: int, vocabulary: int, reserved: int = 0
) -> Tokenizer:
    """A BPE trained on the corpus' training side; the same, with so many `reserved` tokens after its words."""
    from modicum.data.tokenizer import Tokenizer

    texts = (d.text for d in corpus(source, train_bytes, heldout_bytes).train)
    return Tokenizer.train(texts, vocab_size=vocabulary + reserved, reserved=reserved)


def weights_checksum(model: Any) -> str:
    """16 hex digits over every parameter and buffer, in order of names."""
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b"")
    return digest.hexdigest()[:16]


def model_record(model: Decoder, name: str) -> dict[str, Any]:
    """Name, shape, parameters and checksum of a decoder, as a record holds them."""
    c = model.config
    shape = (
        f"{c.family} {c.layers}x{c.width}, {c.heads}/{c.kv_heads} heads of {c.head_dim}, "
        f"mlp {c.mlp_width}, vocabulary {c.vocab_size}"
    )
    return {"name": name, "shape": shape, "parameters": c.parameters(), "checksum": weights_checksum(model)}


def seeded(seed: int) -> Any:
    """A torch generator."""
    import torch

    return torch.Generator().manual_seed(seed)


class Quiet(Events):
    """Events that are kept nowhere and show no progress line: a bench has its own."""

    def progress(self, label: str, total: float | None, unit: str = "") -> Progress:
        return Progress(label, total, unit, stream=io.StringIO())
