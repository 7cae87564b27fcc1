"""The steps against their definitions."""

from __future__ import annotations

import ast
import importlib
import re
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modicum.core import registry
from modicum.core.errors import UserError
from modicum.data import python_source
from modicum.data.document import Document, Drop
from modicum.data.split import heldout_rows
from modicum.data.steps import Context
from modicum.data.words import ngrams, word_hashes

WORDS = [f"w{i}" for i in range(400)]


def run(choice: str, documents: list[Document]) -> list[Document | Drop]:
    step = registry.build("step", choice)
    step.open(Context())
    return list(step.run(documents))


def one(choice: str, text: str, domain: str = "prose", **meta) -> Document | Drop:
    (out,) = run(choice, [Document("d", text, domain, "d", meta)])
    return out


def reason(text: str, domain: str = "prose", choice: str = "quality", **meta) -> str | None:
    out = one(choice, text, domain, **meta)
    return out.reason if isinstance(out, Drop) else None


# Words


@given(
    st.lists(st.text(alphabet="abAB_9é", min_size=1, max_size=6), max_size=30),
    st.sampled_from([" ", "\n", ", ", " -- ", "…"]),
)
@settings(max_examples=80, deadline=None)
def test_word_hashes_agree_with_a_loop(words: list[str], space: str) -> None:
    hashes, lengths = word_hashes(space.join(words))
    folded = [w.lower() for w in words]
    assert lengths.tolist() == [len(w) for w in folded]
    for i in range(len(folded)):
        for j in range(i):
            assert (hashes[i] == hashes[j]) == (folded[i] == folded[j])


def test_words_of_other_scripts() -> None:
    assert len(word_hashes("漢字かな交じり文。")[0]) == 8, "one word a character, punctuation none"
    assert len(word_hashes("нет words עברית हिन्दी")[0]) == 4
    assert len(word_hashes("한국어 문장")[0]) in (2, 5)
    assert len(word_hashes("")[0]) == len(word_hashes(" .,!\n")[0]) == 0


# Deduplication


def jaccard(a: str, b: str, n: int) -> float:
    sets = []
    for text in (a, b):
        words = re.findall(r"\w+", text.lower())
        m = min(n, len(words))
        sets.append({tuple(words[i : i + m]) for i in range(len(words) - m + 1)})
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def changed(rng: np.random.Generator, words: list[str], count: int) -> list[str]:
    out = list(words)
    for i in rng.choice(len(out), count, replace=False):
        out[i] = f"changed{rng.integers(1 << 30)}"
    return out


def test_minhash_estimates_jaccard() -> None:
    """The share of equal signature entries is unbiased with variance J (1 - J) / permutations."""
    rng = np.random.default_rng(0)
    step = registry.build("step", "minhash:permutations=1024")
    errors = []
    for count in (0, 1, 3, 8, 20, 60):
        base = [WORDS[k] for k in rng.integers(0, 400, 300)]
        a, b = " ".join(base), " ".join(changed(rng, base, count))
        true = jaccard(a, b, 5)
        rows = step.signatures([Document("a", a), Document("b", b)])
        estimate = float((rows[0] == rows[1]).mean())
        errors.append((estimate - true) / max(np.sqrt(true * (1 - true) / 1024), 1e-9))
        if count == 0:
            assert estimate == 1
    assert np.abs(errors[1:]).max() < 4, errors


def test_minhash_drops_what_jaccard_says() -> None:
    rng = np.random.default_rng(1)
    documents = []
    for i in range(40):
        base = [WORDS[k] for k in rng.integers(0, 400, 250)]
        documents.append(Document(f"base{i}", " ".join(base)))
        documents.append(Document(f"near{i}", " ".join(changed(rng, base, 2))))  # J about 0.92
        documents.append(Document(f"far{i}", " ".join(changed(rng, base, 40))))  # J about 0.3
    assert jaccard(documents[0].text, documents[1].text, 5) > 0.88
    assert jaccard(documents[0].text, documents[2].text, 5) < 0.5
    out = run("minhash:threshold=0.75", documents)
    dropped = {d.document_id for d in out if isinstance(d, Drop)}
    assert dropped == {f"near{i}" for i in range(40)}, "all near ones and nothing else; the first stays"
    assert all("like base" in d.detail for d in out if isinstance(d, Drop))


def test_minhash_does_not_chain() -> None:
    """c is like b and b like a, but c is not like a: only b is dropped."""
    words = [f"u{i}" for i in range(200)]
    a, b, c = words[:160], words[14:174], words[28:188]
    documents = [Document(n, " ".join(w)) for n, w in (("a", a), ("b", b), ("c", c))]
    assert (
        jaccard(documents[0].text, documents[1].text, 5) > 0.8 > 0.75 > jaccard(documents[0].text, documents[2].text, 5)
    )
    out = run("minhash:threshold=0.78,permutations=512", documents)
    assert [d.document_id for d in out if isinstance(d, Drop)] == ["b"]


def test_bands_and_rows_are_the_best_for_the_threshold() -> None:
    from modicum.data.steps.minhash import bands_and_rows

    def error(threshold: float, b: int, r: int) -> float:
        from scipy.integrate import quad

        low = quad(lambda s: 1 - (1 - s**r) ** b, 0, threshold)[0]
        return low + quad(lambda s: (1 - s**r) ** b, threshold, 1)[0]

    for threshold in (0.5, 0.8, 0.9):
        b, r = bands_and_rows(threshold, 128)
        assert b * r <= 128
        best = min(error(threshold, 128 // k, k) for k in range(1, 129))
        assert error(threshold, b, r) == pytest.approx(best, abs=2e-3)


def test_minhash_refuses_nonsense() -> None:
    with pytest.raises(UserError, match="threshold"):
        registry.build("step", "minhash:threshold=1.5")


def test_exact_dedup_keeps_the_first() -> None:
    texts = ["a b", "c", "a  b\n", "A b", "c", "d"]
    documents = [Document(str(i), t) for i, t in enumerate(texts)]
    out = run("exact-dedup", documents)
    drops = [(d.document_id, d.detail) for d in out if isinstance(d, Drop)]
    assert drops == [("2", "same as 0"), ("4", "same as 1")]
    strict = run("exact-dedup:ignore_space=false", documents)
    assert [d.document_id for d in strict if isinstance(d, Drop)] == ["4"]


# Normalise


@given(st.text(max_size=200))
@settings(max_examples=150, deadline=None)
def test_normalise_properties(text: str) -> None:
    out = one("normalise", text)
    if isinstance(out, Drop):
        return
    assert unicodedata.is_normalized("NFC", out.text)
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f]|[^\S\n]\n|\n{4}|\s\Z", out.text)
    again = one("normalise", out.text)
    assert isinstance(again, Document) and again.text == out.text


def test_normalise_examples() -> None:
    assert one("normalise", "e\u0301\r\nx \t\n\n\n\n\n\ny\x00\u2028z\n").text == "\u00e9\nx\n\n\ny\nz"
    assert one("normalise", "x²ﬁ").text == "x²ﬁ" and one("normalise:form=NFKC", "x²ﬁ").text == "x2fi"
    assert one("normalise", "a\n\n\n\n\nb", "code").text == "a\n\n\n\n\nb", "code keeps its empty lines"
    assert one("normalise", " \x00\n").reason == "empty"


# Quality

PROSE = (
    "The committee has published a report about the state of the water supply and the cost of repairs. "
    "It says that most pipes were laid before the war, and that replacing them would take twenty years. "
    "Members of the public have until spring to reply with their views on what ought to be done first. "
)


def test_quality_prose_rules() -> None:
    assert reason(PROSE) is None
    assert reason("The report is of the committee.") == "too-short"
    assert reason(PROSE * 5, choice="quality:max_words=100") == "too-long"
    assert reason("a b c of the to is it " * 20) == "word-length"
    assert reason(" ".join(["1234567 89"] * 60)) == "few-letters"
    assert reason(" ".join(f"Zylophonik{i % 7}x brandom" for i in range(40))) == "few-stop-words"
    assert reason(PROSE.replace(" ", " # ", 9)) == "symbols"
    assert reason("\n".join(f"- the point {w} of that list is here" for w in WORDS[:20])) == "bullets"
    trailing = "\n".join(f"and the words of {w} were these..." for w in WORDS[:9])
    assert reason(trailing + "\n" + PROSE) == "ellipses"


def test_quality_other_languages() -> None:
    german = (
        "Der Ausschuss hat einen Bericht über den Zustand der Leitungen vorgelegt, und die Kosten sind "
        "nicht gering. Die meisten Rohre wurden vor dem Krieg verlegt, und ihr Ersatz dauert mit Mühe "
        "zwanzig Jahre. Ein Beirat soll prüfen, welche Straßen dran sind, und wer zahlt. " * 2
    )
    chinese = "委员会发布了一份关于供水状况和维修费用的报告。大多数管道是战前铺设的，更换它们需要二十年。" * 2
    greek = "Η επιτροπή δημοσίευσε έκθεση για την κατάσταση και το κόστος των επισκευών. " * 6
    for text in (german, chinese, greek):
        assert reason(text) is None


def test_quality_repetition() -> None:
    rng = np.random.default_rng(0)
    fresh = " ".join(
        f"{w} the of" if i % 9 == 0 else w
        for i, w in enumerate("".join(chr(97 + c) for c in rng.integers(0, 26, 6)) for _ in range(300))
    )
    assert reason(fresh) is None
    lines = [" ".join(fresh.split()[i : i + 10]) for i in range(0, 300, 10)]
    assert reason("\n".join(lines + lines[:20])) == "duplicate-lines"
    assert reason("\n\n".join(lines + lines[:20])) in ("duplicate-lines", "duplicate-paragraphs")
    phrase = fresh.split()[:12]
    mixed = []
    for i, w in enumerate(fresh.split()):
        mixed.append(w)
        if i % 60 == 59:
            mixed += phrase
    assert reason(" ".join(mixed)) == "duplicate-ngrams"
    assert reason(" ".join(mixed), choice="quality:repetition=false") is None
    assert reason(" ".join(mixed), kind="reference") is None, "reference documentation may repeat itself"


def test_duplicate_ngram_share_agrees_with_a_loop() -> None:
    from modicum.data.steps.quality import _covered

    rng = np.random.default_rng(3)
    words = [WORDS[k] for k in rng.integers(0, 12, 200)]
    hashes, letters = word_hashes(" ".join(words))
    for n in (2, 5):
        grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
        naive = {i + k for i, g in enumerate(grams) if grams.count(g) > 1 for k in range(n)}
        _, inverse, counts = np.unique(ngrams(hashes, n), return_inverse=True, return_counts=True)
        covered = _covered(np.flatnonzero(counts[inverse] > 1), n, len(words))
        assert set(np.flatnonzero(covered).tolist()) == naive
        assert letters[covered].sum() == sum(len(words[i]) for i in naive)


def test_quality_code_rules() -> None:
    source = Path(ast.__file__).read_text()
    assert reason(source, "code") is None
    assert reason("x = 1\n" * 9 + "y = [" + "1, " * 400 + "]", "code") == "long-line"
    assert reason(("value = " + "a + " * 30 + "1\n") * 20, "code") == "long-lines"
    assert reason("@@ == ## {} [] \n" * 30, "code") == "few-letters"
    assert reason("# This file was automatically generated by a tool.\n" + source, "code") == "generated"


# Python split


def bare(tree: ast.AST) -> str:
    """The tree without docstrings, an empty body being `...`."""
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        is_doc = (
            isinstance(body, list)
            and body
            and isinstance(body[0], ast.Expr)
            and isinstance(body[0].value, ast.Constant)
            and isinstance(body[0].value.value, str)
            and isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        )
        if is_doc:
            del body[0]
            if not body and not isinstance(node, ast.Module):
                body.append(ast.Expr(ast.Constant(...)))
    return ast.dump(tree)


NAMES = [
    "json",
    "argparse",
    "typing",
    "dataclasses",
    "enum",
    "functools",
    "doctest",
    "inspect",
    "os",
    "tokenize",
    "logging.config",
    "email.message",
    "asyncio.base_events",
    "unittest.mock",
    "turtle",
]


@pytest.mark.parametrize("name", NAMES)
def test_python_split_keeps_the_program(name: str) -> None:
    text = Path(importlib.import_module(name).__file__).read_text(encoding="utf-8")
    path = "python/" + name.replace(".", "/") + ".py"
    out = run("python-split", [Document(path, text, "code", path, {"language": "python"})])
    prose, code = out
    assert (prose.domain, code.domain) == ("prose", "code")
    assert prose.origin == code.origin == path
    assert bare(ast.parse(code.text)) == bare(ast.parse(text)), "the same program but for its docstrings"
    documented = {
        f.name: f for f in python_source.functions(Document(path, text, "code", path, {"language": "python"}))
    }
    found = {f.name: f for f in python_source.functions(prose)}
    assert set(documented) <= set(found)
    spaced = {n for n, f in documented.items() if f.doc.split() != found[n].doc.split()}
    assert len(spaced) <= 1 and all(documented[n].signature == found[n].signature for n in documented)


def test_python_split_by_hand() -> None:
    text = (
        '"""What it is."""\nimport os  # stays\n\n# One.\n# Two.\n\n'
        "# This explains at some length why the function below is written\n"
        "# in the way it is written, so that nobody changes it lightly;\n# it is prose.\n"
        "def f(x: int = 1) -> int:\n    '''Twice.\n\n    More.\n    '''\n    return 2 * x\n\n\n"
        'class A:\n    """Empty."""\n\n\nclass B(A): "same line"\n'
    )
    prose, code = run("python-split", [Document("p/m.py", text, "code", "p/m.py", {"language": "python"})])
    assert prose.text == (
        "## module m\n\nWhat it is.\n\n## m (comment)\n\n"
        "This explains at some length why the function below is written\n"
        "in the way it is written, so that nobody changes it lightly;\nit is prose.\n\n"
        "## m.f(x: int=1) -> int\n\nTwice.\n\nMore.\n\n## class m.A\n\nEmpty."
    )
    assert code.text == (
        "import os  # stays\n\n# One.\n# Two.\n\n"
        "def f(x: int = 1) -> int:\n    return 2 * x\n\n\n"
        'class A:\n    ...\n\n\nclass B(A): "same line"\n'
    )


def test_python_split_leaves_others_alone() -> None:
    odd = [
        Document("a", "def f(:", "code", "a", {"language": "python"}),
        Document("b", "x", "prose"),
        Document("c", "var x", "code", "c", {"language": "javascript"}),
    ]
    assert run("python-split", odd) == odd


# Held out


def test_heldout_split() -> None:
    rng = np.random.default_rng(0)
    keys, sizes = rng.integers(0, 1 << 60, 2000).astype(np.uint64), rng.integers(100, 5000, 2000)
    held = heldout_rows(keys, sizes, 0.02, 10**9)
    assert 0.018 < sizes[held].sum() / sizes.sum() <= 0.02
    order = rng.permutation(2000)
    again = heldout_rows(keys[order], sizes[order], 0.02, 10**9)
    assert (again == held[order]).all(), "order does not matter"
    assert sizes[heldout_rows(keys, sizes, 0.5, 20_000)].sum() <= 20_000
    twice = heldout_rows(np.repeat(keys, 2), np.repeat(sizes, 2), 0.02, 10**9).reshape(-1, 2)
    assert (twice[:, 0] == twice[:, 1]).all(), "parts of one document stay together"
    few = heldout_rows(np.array([5, 3], np.uint64), np.array([1000, 10]), 0.001, 10**9)
    assert few.tolist() == [False, True], "at least one, the smallest"
    assert not heldout_rows(keys[:1], sizes[:1], 0.5, 10**9).any()
    assert not heldout_rows(keys, sizes, 0.0, 10**9).any()
