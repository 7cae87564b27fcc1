"""Names and prose use the field's terms: words of the old private vocabulary fail here, with what to write instead.

`NAMES` are banned as identifiers only: a variable `told` says nothing of what it is. In a sentence the word is free.
`WORDS` are banned everywhere: in identifiers (split at underscores and capitals), docstrings, messages, comments and
documentation; `PHRASES` in prose. docs/log/ is free.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SRC = ROOT / "src" / "modicum"

# Whole identifiers (without leading underscores and shape suffix) -> what to write instead.
NAMES = {
    "told": "what it is: message, bounds, config",
    "found": "what it is: matches, candidates, result",
    "held": "what it is: heldout, buffer, entries",
    "said": "what it is: output, text",
    "says": "log, logits, describe",
    "say": "log, report",
    "books": "stats",
    "bill": "cost_estimate",
    "share": "fraction, ratio",
    "shares": "fractions",
    "place": "position, offset, slot, folder, target",
    "places": "positions, offsets, slots, targets",
    "piece": "chunk, span",
    "pieces": "chunks, spans",
    "room": "budget, capacity, scratch",
    "asked": "requested, questions",
}
# Words anywhere -> what to write instead.
WORDS = {
    "road": "pipeline",
    "yardstick": "baseline",
    "yardsticks": "baselines",
    "withheld": "without_query_text",
    "announce": "prefetch_weights",
}
# Phrases in prose -> what to write instead.
PHRASES = {
    "in any company": "batch-invariant",
    "its company": "batch-invariant",
    "come home": "are freed",
    "keeps the books": "counts",
    "the bill of": "the cost estimate of",
    "lest": "so that ... not",
}
# Files that may use one of these, and why.
EXCEPTIONS: dict[str, set[str]] = {
    "src/modicum/evaluate/playground.py": {"road"},  # a word of its texts
}


def _files() -> list[Path]:
    code = [*SRC.rglob("*.py"), *SRC.rglob("*.h"), *SRC.rglob("*.c")]
    docs = [p for p in (ROOT / "docs").rglob("*.md") if p.parent.name != "log"]
    return sorted([*code, *docs, ROOT / "README.md", ROOT / "CONTRIBUTING.md"])


def parts(identifier: str) -> list[str]:
    """`TokenShards_of` -> token, shards, of."""
    return [w.lower() for w in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", identifier)]


def bare(identifier: str) -> str:
    """Without leading underscores and a shape suffix: `_held_NK` -> `held`."""
    return re.sub(r"_[A-Z0-9]+$", "", identifier.strip("_"))


def defined(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, name) of every variable, parameter, attribute, function and class that a file defines."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id if isinstance(node, ast.Name) else node.attr
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.lineno, node.name


def python_faults(text: str) -> Iterator[tuple[int, str, str]]:
    for line, name in defined(ast.parse(text)):
        if bare(name) in NAMES:
            yield line, bare(name), NAMES[bare(name)]
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type in (tokenize.NAME, tokenize.STRING, tokenize.COMMENT):
            yield from prose_faults(token.string, token.start[0])


def prose_faults(text: str, first: int = 1) -> Iterator[tuple[int, str, str]]:
    for number, line in enumerate(text.split("\n"), first):
        for word in re.findall(r"[A-Za-z_][A-Za-z_0-9]*", line):
            for part in parts(word):
                if part in WORDS:
                    yield number, part, WORDS[part]
    joined = " ".join(text.split()).lower()
    for phrase, instead in PHRASES.items():
        if re.search(rf"\b{phrase}\b", joined):
            yield first, phrase, instead


def faults(path: Path) -> list[str]:
    """One line for each banned word in a file."""
    text = path.read_text(encoding="utf-8")
    name = path.relative_to(ROOT).as_posix()
    allowed = set().union(*(words for prefix, words in EXCEPTIONS.items() if name.startswith(prefix)))
    seen = python_faults(text) if path.suffix == ".py" else prose_faults(text)
    return [f"{name}:{line}: {word!r}; write {instead}" for line, word, instead in seen if word not in allowed]


@pytest.mark.parametrize("path", _files(), ids=lambda p: p.relative_to(ROOT).as_posix())
def test_names(path: Path) -> None:
    assert not faults(path), "\n".join(faults(path))


def test_what_is_banned_is_seen() -> None:
    words = [
        word for _, word, _ in python_faults('held_NK = 1\nclass RoadMap:\n    """A yardstick, lest it rain."""\n')
    ]
    assert sorted(words) == ["held", "lest", "road", "yardstick"]
    assert [word for _, word, _ in prose_faults("The `Yardstick` comes home.")] == ["yardstick"]
    assert not list(python_faults("heldout = file.found\nplaces_left = not_found('held-out')  # found nothing\n"))
