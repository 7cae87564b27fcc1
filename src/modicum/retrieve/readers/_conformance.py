"""What holds for any reader: a permutation, the budget, the same passages for all, sources numbered as they stand."""

from __future__ import annotations

import dataclasses
import functools
import tempfile
from pathlib import Path
from typing import Any

from modicum.core import registry
from modicum.core.errors import BudgetError
from modicum.data.passages import Passage
from modicum.retrieve import ground
from modicum.retrieve.readers import Reader
from modicum.retrieve.search import Hit


def _made(key: str) -> Reader:
    loaded = registry.load("reader", key)
    if any(f.name == "model" for f in dataclasses.fields(loaded.config)):
        made: Reader = loaded.cls(loaded.config(model=_tagger()))
    else:
        made = loaded.cls(getattr(loaded.module, "TOY", None) or loaded.config())
    return made


@functools.cache
def _tagger() -> str:
    """A folder of a small tagger, raw but for its tokenizer."""
    import torch

    from modicum.data.tokenizer import Tokenizer
    from modicum.model.config import DecoderConfig
    from modicum.model.decoder import Decoder
    from modicum.retrieve.tagger import Tagger

    folder = tempfile.TemporaryDirectory()
    _FOLDERS.append(folder)  # as long as the process
    tokenizer = Tokenizer.train([h.passage.text + " fact other" for h in _hits(9)], 330)
    shape: Any = {
        "width": 16,
        "layers": 2,
        "heads": 2,
        "kv_heads": 1,
        "head_dim": 8,
        "mlp_width": 32,
        "context_length": 512,
    }
    model = Decoder(DecoderConfig(vocab_size=tokenizer.vocab_size, **shape), torch.Generator().manual_seed(0))
    Tagger(model, tokenizer).save(Path(folder.name) / "tagger")
    return str(Path(folder.name) / "tagger")


_FOLDERS: list[tempfile.TemporaryDirectory[str]] = []


def _hits(count: int) -> list[Hit]:
    text = "Sentence one of passage {0} tells a fact. Sentence two of it tells another. And a third is there as well."
    return [Hit(Passage(f"id{i}", text.format(i), f"s{i}", f"Title {i}"), 1 / (i + 1), {}) for i in range(count)]


def _count(text: str) -> int:
    return len(text.split())


def check_the_order_is_a_permutation(key: str) -> None:
    for count in (0, 1, 2, 3, 7, 40):
        assert sorted(_made(key).order(count)) == list(range(count)), f"{count} passages"


def check_the_passages_are_those_of_the_baseline(key: str) -> None:
    for count, budget in ((1, 60), (3, 90), (8, 200), (8, 90)):
        messages, sources, tokens = _made(key).compose("What is one fact?", _hits(count), budget, _count)
        _, expected, _ = ground.compose("What is one fact?", _hits(count), budget, _count)
        # What takes fewer tokens leaves more to the passages after it.
        assert tokens <= budget and {s.id for s in sources} >= {s.id for s in expected}
        if type(_made(key)).shorten is Reader.shorten:
            assert len(sources) == len(expected), "which passages are shown is decided by rank and budget"
            assert {s.id: s.excerpt for s in sources} == {s.id: s.excerpt for s in expected}, "cut by rank"
        texts = {h.passage.id: h.passage.text for h in _hits(count)}
        for source in sources:  # parts of the passage, in its order
            read = 0
            for word in source.excerpt.split():
                read = texts[source.id].index(word, read) + len(word)
        assert [s.number for s in sources] == list(range(1, len(sources) + 1))
        shown = messages[-1]["content"]
        at = [shown.index(f"[{s.number}] {s.title}\n{s.excerpt}") for s in sources]
        assert at == sorted(at) and shown.index("Question:") > max(at), "numbered from the top, question last"


def check_a_budget_too_small_is_refused(key: str) -> None:
    try:
        _made(key).compose("What is it?", _hits(2), 10, _count)
    except BudgetError:
        return
    raise AssertionError("a prompt that cannot hold one source must be refused")
