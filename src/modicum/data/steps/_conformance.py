"""What holds for any data step."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence

import numpy as np

from modicum.core import registry
from modicum.data.document import Document, Drop
from modicum.data.signals import Signals
from modicum.data.steps import Context, Step, sampled

_WORDS = [
    "budget",
    "model",
    "token",
    "layer",
    "index",
    "the",
    "of",
    "and",
    "to",
    "cache",
    "loss",
    "data",
    "word",
    "with",
    "page",
    "text",
    "rank",
    "that",
    "seed",
    "have",
    "step",
    "batch",
    "key",
    "value",
]


def toy_documents() -> list[Document]:
    """Prose and code: unique, repeated exactly, nearly repeated, tiny, odd characters, other scripts."""
    rng = np.random.default_rng(7)

    def words(n: int) -> list[str]:
        return [_WORDS[k] for k in rng.integers(0, len(_WORDS), n)]

    texts = [" ".join(words(120)) + "." for _ in range(10)]
    near = texts[3].split()
    near[60] = "otherwise"
    texts += [
        texts[0],
        " ".join(near),
        texts[0].upper(),
        "short",
        "e\u0301\r\nline \x07\n\n\n\n\nend  ",
        "\u4e00\u4e8c\u4e09" * 40,
        "\U0001f600 " * 30,
        "same line\n" * 40,
        " \n ",
        "#\n" * 30,
    ]
    documents = [Document(f"d{i}", text, "prose", f"d{i}") for i, text in enumerate(texts)]
    source = '"""Module words.\n\nMore."""\nimport os\n\ndef f(x):\n    """Twice."""\n    return 2 * x\n'
    documents += [
        Document("m.py", source, "code", "toy/m.py", {"language": "python"}),
        Document("bad.py", "def f(:\n", "code", "toy/bad.py", {"language": "python"}),
        Document("long.js", "x = 1;" * 400, "code", "toy/long.js", {"language": "javascript"}),
    ]
    return documents


def _context() -> Context:
    """Signals and targets as a run may have them: vectors and losses of a text's letters, and a few texts to select."""

    def embedding(texts: Sequence[str]) -> np.ndarray:
        x_ND = np.array([[text.count(c) + 0.1 for c in "abcdefgh"] for text in texts])
        return x_ND / np.linalg.norm(x_ND, axis=1, keepdims=True)

    def losses(texts: Sequence[str]) -> np.ndarray:
        return np.array([[len(text), len(text) - text.count("a"), len(text) - text.count("e")] for text in texts])

    targets = {"one": ["the budget of the model", "token and layer"], "two": ["index cache page", "rank", "data"]}
    return Context(signals=Signals({"embedding": embedding, "losses": losses}), targets=targets)


def _make(key: str) -> Step:
    loaded = registry.load("step", key)
    step = loaded.cls(getattr(loaded.module, "TOY", loaded.config()))
    step.open(_context())
    return step


def _run(key: str, documents: list[Document], sizes: list[int]) -> list[Document | Drop]:
    """The step as the pipeline runs it, its documents handed over in batches of `sizes` in turn."""
    step = _make(key)
    if step.sample:
        arrays = step.fit(sampled(documents, step.sample))
        step = _make(key)
        step.load(arrays)  # as in another process
    batches: list[list[Document]] = []
    at = 0
    while at < len(documents):
        size = sizes[len(batches) % len(sizes)]
        batches.append(documents[at : at + size])
        at += size
    if step.scope == "document":
        out = [item for batch in batches for item in step.run(batch)]
    else:
        rows = np.concatenate([step.signatures(batch) for batch in batches])
        assert len(rows) == len(documents), f"{key}: {len(rows)} signatures of {len(documents)} documents"
        drops = step.decide(rows, [d.id for d in documents])
        out = [Drop(d.id, *drops[i]) if i in drops else d for i, d in enumerate(documents)]
    step.close()
    return out


def check_batch_size(key: str) -> None:
    """The same output however documents are batched."""
    documents = toy_documents()
    whole = _run(key, documents, [len(documents)])
    assert whole == _run(key, documents, [1]), f"{key}: depends on batch size"
    assert whole == _run(key, documents, [3, 1, 7]), f"{key}: depends on batch size"
    assert whole == list(_make(key).run(documents)), f"{key}: run() differs from the pipeline's way"


def check_reasons(key: str) -> None:
    """Every drop names its document and a reason; nothing disappears without one; ids stay unique."""
    documents = toy_documents()
    out = _run(key, documents, [len(documents)])
    ids = [item.id for item in out if isinstance(item, Document)]
    assert len(set(ids)) == len(ids), f"{key}: ids are not unique"
    seen = set()
    texts = {d.id: d.text for d in documents}
    for item in out:
        name = item.document_id if isinstance(item, Drop) else item.id
        seen.add(name.split("#")[0])
        if isinstance(item, Drop):
            assert item.reason and " " not in item.reason, f"{key}: drop of {name} has reason {item.reason!r}"
        else:
            assert item.text.strip() or not texts[name].strip(), f"{key}: {name} is left with no text"
    assert seen == {d.id for d in documents}, f"{key}: { ({d.id for d in documents} - seen) } vanished"


def check_again(key: str) -> None:
    """What passed once passes again unchanged: a step leaves nothing for itself to do. One that keeps a fraction of
    what
    it gets drops some and changes no text."""
    kept = [d for d in _run(key, toy_documents(), [5]) if isinstance(d, Document)]
    if _make(key).relative:
        given = {d.id: d.text for d in toy_documents()}
        assert 0 < len(kept) <= len(given) and all(given[d.id] == d.text for d in kept), f"{key}: texts changed"
        return
    again = _run(key, kept, [5])
    texts = [d.text for d in again if isinstance(d, Document)]
    assert texts == [d.text for d in kept], f"{key}: not idempotent"


def check_other_process(key: str) -> None:
    """The same output in another process with another hash seed."""
    code = (
        "from modicum.data.steps._conformance import _run, toy_documents\n"
        f"print(ascii(_run({key!r}, toy_documents(), [4])))"
    )
    import os

    outputs = {
        subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            env=os.environ | {"PYTHONHASHSEED": seed},
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1, f"{key}: output depends on PYTHONHASHSEED"
    assert outputs == {ascii(_run(key, toy_documents(), [4])) + "\n"}, f"{key}: differs between processes"
