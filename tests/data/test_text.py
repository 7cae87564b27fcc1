"""Functions, passages and question/answer pairs."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

from modicum.data.document import Document
from modicum.data.pairs import pairs, shorten
from modicum.data.passages import passages, sections
from modicum.data.python_source import first_sentence, functions, module_name

JSON = Document(
    "python/json/__init__.py",
    Path(json.__file__).read_text(),
    "code",
    "python/json/__init__.py",
    {"language": "python"},
)
GUIDE = """Intro words before any heading stand here for the reader.

# Kettle

A kettle boils water. It has a lid and a spout and a handle too.

## Care

Rinse it every week. Use vinegar against the lime that settles in it.

```
# not a heading
rinse --with vinegar
```

# Is it safe?

Yes, if you let it cool before you clean it with cold water.
"""
MARKDOWN = Document("guide.md", GUIDE, "prose", "guide.md", {"format": "markdown"})
RST = Document(
    "notes.txt",
    "Top\n***\n\nWords of the top part.\n\nInner\n=====\n\nWords of the inner part."
    "\n\nSecond\n======\n\nWords of the second part.\n\nOther\n*****\n\nMore words in the end.\n",
    "prose",
    "notes.txt",
)


def test_functions_agree_with_inspect() -> None:
    found = {f.name: f for f in functions(JSON)}
    for name in ("dump", "dumps", "load", "loads"):
        real, mine = getattr(json, name), found[f"json.{name}"]
        assert mine.doc == inspect.getdoc(real)
        assert mine.line == inspect.getsourcelines(real)[1]
        assert mine.signature == name + str(inspect.signature(real)).replace(" = ", "=")
        assert mine.kind == "function" and mine.path == JSON.source
    assert found["json"].kind == "module" and "json.detect_encoding" not in found
    assert found["json.loads"].summary.startswith("Deserialize ``s``")
    assert found["json.loads"].body.startswith("``object_hook``")


def test_functions_in_classes_and_branches() -> None:
    text = (
        'class A(Base):\n    "About A."\n    def m(self):\n        "Method."\n        def inner(): "no"\n'
        '    def _p(self): "private"\n'
        'if True:\n    async def g(*a, k=1, **kw) -> "X":\n        "In a branch."\n'
        'class _H:\n    def shown(self): "hidden with its class"\n'
    )
    found = [(f.name, f.kind, f.signature) for f in functions(Document("p/q/r.py", text, "code", "p/q/r.py"))]
    assert found == [
        ("q.r.A", "class", "class A(Base)"),
        ("q.r.A.m", "function", "m(self)"),
        ("q.r.g", "function", "g(*a, k=1, **kw) -> 'X'"),
    ]
    assert list(functions(Document("x", "def broken(:", "code"))) == []


def test_names() -> None:
    assert module_name("python/json/__init__.py") == "json"
    assert module_name("python/json/decoder.py#prose") == "json.decoder"
    assert module_name("tool.py") == "tool"


def test_first_sentence() -> None:
    assert first_sentence("Return x, e.g. 3. Then stop.") == ("Return x, e.g. 3.", "Then stop.")
    assert first_sentence("One\nline\n\nRest here") == ("One line", "Rest here")
    assert first_sentence("See http://a.b/c.d for version 3.11 now.") == (
        "See http://a.b/c.d for version 3.11 now.",
        "",
    )
    assert first_sentence('He said "No." Then left.') == ('He said "No."', "Then left.")


def test_sections() -> None:
    assert [(s.path, s.body.split("\n")[0]) for s in sections(MARKDOWN)] == [
        ((), "Intro words before any heading stand here for the reader."),
        (("Kettle",), "A kettle boils water. It has a lid and a spout and a handle too."),
        (("Kettle", "Care"), "Rinse it every week. Use vinegar against the lime that settles in it."),
        (("Is it safe?",), "Yes, if you let it cool before you clean it with cold water."),
    ]
    assert [s.path for s in sections(RST)] == [("Top",), ("Top", "Inner"), ("Top", "Second"), ("Other",)]


def test_passages_of_code_and_text() -> None:
    loads = next(p for p in passages(JSON) if p.title == "json.loads")
    assert loads.text.startswith("json.loads(s, *, cls=None") and "Deserialize" in loads.text
    assert loads.summary.startswith("Deserialize") and loads.summary not in " ".join(loads.body.split())
    assert loads.body.startswith("json.loads(s,") and loads.source == JSON.source
    kettle = {p.title: p for p in passages(MARKDOWN)}
    assert kettle["Kettle > Care"].text.startswith("Rinse it every week.")
    assert kettle["Kettle > Care"].summary == "Rinse it every week."
    assert set(kettle) == {"guide.md", "Kettle", "Kettle > Care", "Is it safe?"}


def test_passages_are_bounded_and_lose_nothing() -> None:
    text = "\n\n".join(" ".join(f"word{i}x{k}" for k in range(1 + 37 * i % 290)) for i in range(60))
    found = list(passages(Document("long.txt", text, "prose", "long.txt"), words=100))
    assert max(len(p.text.split()) for p in found) <= 300
    assert len({p.id for p in found}) == len(found)
    seen = {w for p in found for w in p.text.split()}
    whole = set(text.split())
    assert len(whole - seen) < 20, "only fragments of a few words are left out"
    text = "function f() {\n  return 1;\n}\n" * 120
    code = Document("a.js", text, "code", "a.js", {"language": "javascript"})
    assert sum(p.text.count("return") for p in passages(code, words=50)) == 120


def test_pairs() -> None:
    found = {p.question: p.answer for p in pairs(JSON)}
    assert found["What does `json.loads` do?"].startswith("Deserialize ``s``")
    call = found["How is `json.loads` called?"]
    assert call.startswith("`json.loads(s, *, cls=None")
    which = "Which function does this? Deserialize ``s``"
    assert [a for q, a in found.items() if q.startswith(which)] == [call]
    text = {p.question: p.answer for p in pairs(MARKDOWN)}
    assert text["Is it safe?"].startswith("Yes, if you let")
    assert text["What does 'Kettle' say about 'Care'?"].startswith("Rinse it")
    plain = list(pairs(Document("p", "The cat sat on the mat. It then slept there for the whole long day.")))
    assert [(p.question, p.answer) for p in plain] == [
        ("What follows from this? The cat sat on the mat.", "It then slept there for the whole long day.")
    ]
    assert list(pairs(Document("c", "x = 1", "code", "c", {"language": "go"}))) == []


def test_shorten_cuts_at_a_paragraph_sentence_or_word() -> None:
    text = "First part.\n\nSecond part is longer. It has two sentences."
    assert shorten(text, 1000) == text and shorten(text, 14) == "First part."
    assert shorten("x" * 50, 10) == "x" * 10
