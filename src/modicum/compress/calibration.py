"""Calibration data: token sequences of a text, and the inputs of each linear layer on them.

Shapes: N sequences, T tokens, R rows (tokens, whichever sequence they are of), I inputs of a layer.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from modicum.core.errors import UserError
from modicum.data import python_source
from modicum.data.document import Document
from modicum.data.tokenizer import Tokenizer
from modicum.model import attach

BATCH = 8  # sequences computed at a time
SHORTEST = 500  # characters of a text of Python's own that is read
PYTHON_FILES = 100  # of them
MOST = 4000  # documents of a source


def texts(source: str | Path) -> Iterator[str]:
    """Training documents of a curated folder, or the text of any source that `data.readers` reads."""
    from modicum.data.document import read_documents
    from modicum.data.readers import ReadConfig, find, read

    if (Path(source) / "documents").is_dir():
        yield from (document.text for document in read_documents(source, "train"))
        return
    config = ReadConfig()
    for unit in find(str(source), config):
        yield from (d.text for d in read(unit, config) if isinstance(d, Document))


def halves(source: str | Path | None) -> tuple[list[str], dict[str, list[str]]]:
    """(calibration texts, held-out texts of two domains by name), no document in both.

    source: a curated folder (its training and its held-out side), other text (documents by turns), or None for this
    Python's own sources, parted into prose and code. The second domain of other text is Python code.
    """
    from modicum.data.document import read_documents

    prose, code = [], []
    for document in _shuffled_python():
        parts = python_source.split(document)
        if parts is not None:
            prose.append(parts[0])
            code.append(parts[1])
    prose, code = [t for t in prose if len(t) > SHORTEST], [t for t in code if len(t) > SHORTEST]
    if source is None or str(source) == "python":
        mixed = [t for pair in zip(prose[::2], code[::2], strict=False) for t in pair]
        return mixed, {"prose": prose[1::2], "code": code[1::2]}
    if (Path(source) / "documents").is_dir():
        heldout = [document.text for document in read_documents(source, "heldout")]
        return list(itertools.islice(texts(source), MOST)), {Path(source).name: heldout, "Python code": code}
    all_texts = list(itertools.islice(texts(source), MOST))
    if len(all_texts) < 2:
        raise UserError(f"{source} holds {len(all_texts)} documents; give two or more, some of them to be held out")
    return all_texts[::2], {Path(source).name: all_texts[1::2], "Python code": code}


def _shuffled_python() -> list[Document]:
    """Python's own source files, in an order that no folder decides."""
    from modicum.data.readers import ReadConfig, find, read

    config = ReadConfig()
    units = sorted(find("python", config), key=lambda unit: hashlib.sha256(unit.id.encode()).digest())
    sources = (d for unit in units[:PYTHON_FILES] for d in read(unit, config) if isinstance(d, Document))
    return [d for d in sources if d.id.endswith(".py")]


def sequences(documents: Iterable[str], tokenizer: Tokenizer, count: int, length: int) -> Tensor:
    """tokens_NT: the first `count` sequences of `length` tokens, documents concatenated.

    Raises `UserError` if there are fewer than `length` tokens.
    """
    ids: list[int] = []
    for text in documents:
        ids += [tokenizer.start_id, *tokenizer.encode(text, specials=False), tokenizer.eos_id]
        if len(ids) >= count * length:
            break
    n = min(count, len(ids) // length)
    if n < 1:
        raise UserError(f"the calibration text has {len(ids)} tokens, one sequence takes {length}; give more text")
    return torch.tensor(ids[: n * length]).view(n, length)


@torch.no_grad()
def activations(model: nn.Module, tokens_NT: Tensor, names: Sequence[str], rows: int = 4096) -> dict[str, Tensor]:
    """By module name: the inputs of the linear layers `names` on `tokens_NT`, about `rows` rows, evenly spaced.

    Layers with the same input tensor get the same result tensor.
    """
    every = max(1, -(-tokens_NT.numel() // rows))
    inputs: dict[str, list[Tensor]] = {name: [] for name in names}
    last: list[Any] = [None, None]

    def hook(name: str) -> Any:
        def record(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            if last[0] is not args[0]:
                last[:] = [args[0], args[0].flatten(0, -2)[::every].clone()]
            inputs[name].append(last[1])

        return record

    layers = attach.linears(model)
    hooks = [layers[name].register_forward_pre_hook(hook(name)) for name in names]
    try:
        _each(model, tokens_NT, lambda logits, tokens: None)
    finally:
        for handle in hooks:
            handle.remove()
    joined: dict[tuple[int, ...], Tensor] = {}
    for batches in inputs.values():
        key = tuple(id(batch) for batch in batches)
        if key and key not in joined:
            joined[key] = torch.cat(batches)
    return {name: joined[tuple(id(p) for p in batches)] for name, batches in inputs.items() if batches}


@torch.no_grad()
def nats(model: nn.Module, tokens_NT: Tensor) -> float:
    """Mean next-token loss: the logarithm of the perplexity."""
    total = 0.0

    def add(logits: Tensor, tokens: Tensor) -> None:
        nonlocal total
        loss = nn.functional.cross_entropy(
            logits[:, :-1].float().flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum"
        )
        total += loss.item()

    _each(model, tokens_NT, add)
    return total / (tokens_NT.shape[0] * (tokens_NT.shape[1] - 1))


def _each(model: nn.Module, tokens_NT: Tensor, use: Any) -> None:
    training, device = model.training, next(model.parameters()).device
    model.eval()
    try:
        for tokens in tokens_NT.split(BATCH):
            tokens = tokens.to(device)
            use(model(tokens), tokens)
    finally:
        model.train(training)
