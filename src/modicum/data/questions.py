"""Questions with one short answer that a document states: facts read from signatures and docstrings of Python.

Four kinds, each answered by a few words of the function's own passage:

    default     the value of a parameter that the signature gives
    exception   what is raised under a condition that a sentence of the docstring names
    returns     a summary sentence "Return ..." of a few words
    base        the one class that a class derives from

Everything is taken from the text by rule, so the same documents give the same questions; `draw` takes some of them.
"""

from __future__ import annotations

import ast
import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from modicum.data.document import Document
from modicum.data.passages import is_python
from modicum.data.python_source import Function, functions, parse

KINDS = ("default", "exception", "returns", "base")
SPLITS = ("dev", "test")
DEV = 0.3  # of the documents
RETURNS = 6  # words of a returned value that is asked for, at most
REPEATS = 0.1  # fraction of the drawn questions that may have the same answer, so that a constant guess scores low

_EXCEPTION = r"`{0,2}([A-Z]\w*(?:Error|Exception|Warning|Iteration|Exit|Interrupt))`{0,2}"
_CONDITION = r"((?:if|when|unless|in case|on|for)\b[^.;:]{8,120})"
_RAISES = (
    re.compile(rf"^Raises? (?:an? )?{_EXCEPTION}(?: exception)? {_CONDITION}\.?$"),
    re.compile(rf"^{_EXCEPTION} is raised {_CONDITION}\.?$"),
    re.compile(rf"^((?:[Ii]f|[Ww]hen|[Uu]nless)\b[^.;:]{{8,120}}?),? (?:raises?|\w+ raises) (?:an? )?{_EXCEPTION}\.?$"),
)
_RETURNS = re.compile(r"^Returns? ((?:a|an|the) [^.;:()]+)\.?$")
_SENTENCE = re.compile(r"(?<=[.;])\s+|\n\s*\n")
_LITERAL = re.compile(r"[A-Za-z0-9](?:[\w.\- ]*\w)?")  # survives a grading that drops punctuation
_ARTICLES = {"a", "an", "the"}


@dataclass(frozen=True)
class Question:
    """document: the id of the document that states the answer. answers: accepted ones, the first as documented.

    evidence: the name of the function, class or module whose passage holds the answer.
    """

    id: str
    kind: str
    question: str
    answers: tuple[str, ...]
    document: str
    evidence: str


def questions(documents: Iterable[Document] | Document) -> Iterator[Question]:
    """Every question of the documents, in order; a question whose wording or fact came before is left out."""
    seen: set[object] = set()
    for document in [documents] if isinstance(documents, Document) else documents:
        if not is_python(document):
            continue
        for function in functions(document):
            for kind, detail, question, answer in _of(function):
                short_name = function.name.rpartition(".")[2]
                fact = (kind, short_name, detail, answer)  # an override states the same fact again
                if question in seen or fact in seen:
                    continue
                seen |= {question, fact}
                key = hashlib.blake2b(question.encode("utf-8", "surrogatepass"), digest_size=6).hexdigest()
                yield Question(f"{kind}-{key}", kind, question, (answer,), document.origin, function.name)


def split_of(question: Question) -> str:
    """`dev` or `test`, decided by a hash of the document, so that no document is in both."""
    digest = hashlib.blake2b(question.document.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return SPLITS[int.from_bytes(digest, "big") / 2**64 >= DEV]


def draw(candidates: Iterable[Question], limit: int, seed: int = 0) -> list[Question]:
    """At most `limit` questions, the kinds in turn, in an order that the seed and their wording decide.

    No answer appears more often than `REPEATS` of the limit (but twice at least); fewer are drawn where that leaves
    too few.
    """
    pools: dict[str, list[Question]] = defaultdict(list)
    for question in candidates:
        pools[question.kind].append(question)
    for pool in pools.values():
        pool.sort(key=lambda q: hashlib.blake2b(f"{seed}/{q.id}".encode()).digest(), reverse=True)
    most, repeats = max(2, round(REPEATS * limit)), Counter[str]()
    drawn: list[Question] = []
    while len(drawn) < limit and any(pools.values()):
        for kind in KINDS:
            while pools[kind]:
                question = pools[kind].pop()
                answer = question.answers[0].casefold()
                if repeats[answer] < most:
                    repeats[answer] += 1
                    drawn.append(question)
                    break
            if len(drawn) == limit:
                break
    return drawn


def _of(f: Function) -> Iterator[tuple[str, str, str, str]]:
    """(kind, detail, question, answer) of one function or class."""
    if f.kind == "module":
        return
    if f.kind == "class":
        tree = parse(f"{f.signature}: pass")
        node = tree.body[0] if tree and tree.body else None
        if isinstance(node, ast.ClassDef) and len(node.bases) == 1 and not node.keywords:
            base = ast.unparse(node.bases[0])
            if _plain(base) and base not in ("object", node.name):
                yield "base", base, f"Which class does the class `{f.name}` derive from?", base
        return
    for name, value in _defaults(f.signature):
        yield "default", name, f"What is the default value of the parameter `{name}` of `{f.name}`?", value
    for sentence in (" ".join(s.split()) for s in _SENTENCE.split(f.doc)):
        for number, pattern in enumerate(_RAISES):
            if match := pattern.match(sentence):
                error, condition = (match[2], match[1]) if number == 2 else (match[1], match[2])
                if "rais" not in condition and "Error" not in condition and not (number == 2 and "," in condition):
                    condition = condition[0].lower() + condition[1:].rstrip(" ,")
                    yield "exception", condition, f"Which exception does `{f.name}` raise {condition}?", error
    if (match := _RETURNS.match(f.summary)) and 2 <= len(match[1].split()) <= RETURNS:
        yield "returns", "", f"What does `{f.name}` return?", match[1]


def _defaults(signature: str) -> Iterator[tuple[str, str]]:
    """(parameter, default) where the default is a plain literal or a name."""
    tree = parse(f"def {signature}: pass")
    node = tree.body[0] if tree and tree.body else None
    if not isinstance(node, ast.FunctionDef):
        return
    a = node.args
    positional = [*a.posonlyargs, *a.args]
    pairs = [
        *zip(positional[len(positional) - len(a.defaults) :], a.defaults, strict=True),
        *zip(a.kwonlyargs, a.kw_defaults, strict=True),
    ]
    for argument, default in pairs:
        if isinstance(default, ast.Constant):
            value = str(default.value) if not isinstance(default.value, bytes) else ""
        elif isinstance(default, ast.Name | ast.Attribute):
            value = ast.unparse(default)
        else:
            continue
        if not argument.arg.startswith("_") and _plain(value):
            yield argument.arg, value


def _plain(value: str) -> bool:
    """Whether a value is the same after letter case, punctuation and articles are dropped; a name must be public."""
    return bool(_LITERAL.fullmatch(value)) and value.lower() not in _ARTICLES and "._" not in value
