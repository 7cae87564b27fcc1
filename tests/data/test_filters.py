"""Filters that others have published against those others; repairs, languages, lines, addresses, contamination."""

from __future__ import annotations

import dataclasses
import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from modicum.core import registry
from modicum.core.errors import UserError
from modicum.data import rules
from modicum.data.curate import CurateConfig, curate
from modicum.data.document import Document, Drop
from modicum.data.steps import Context, gopher
from modicum.data.steps.line_dedup import keys_of
from modicum.data.steps.pii import iban, luhn
from modicum.data.words import combine, word_hashes, word_hashes_of

COMMON = re.findall(r"\w+", "the of and to that have with be a in it was for on are as with his they at")
NOUNS = re.findall(
    r"\w+", "budget model token layer index cache loss data word page text rank seed step batch key value"
)


def run(choice: str, documents: list[Document], **context) -> list[Document | Drop]:
    step = registry.build("step", choice)
    step.open(Context(**context))
    return list(step.run(documents))


def one(choice: str, text: str, domain: str = "prose") -> Document | Drop:
    (item,) = run(choice, [Document("d", text, domain)])
    return item


def odd_texts(count: int) -> list[str]:
    """Prose with the faults that the rules name, each more or less of it, so that decisions fall on both sides."""
    rng = np.random.default_rng(3)
    texts = []
    for _ in range(count):
        words = [str(rng.choice(COMMON if rng.random() < 0.5 else NOUNS)) for _ in range(int(rng.integers(5, 400)))]
        kind, amount = int(rng.integers(12)), rng.random()
        lines, at = [], 0
        while at < len(words):
            size = int(rng.integers(2, 30))
            lines.append(" ".join(words[at : at + size]) + str(rng.choice([".", "!", "?", "", " [3].", "...", '."'])))
            at += size
        for i in range(len(lines)):
            if rng.random() < amount:
                lines[i] = {
                    0: "- " + lines[i],
                    1: lines[i] + "...",
                    2: lines[i].replace(" ", " # "),
                    3: lines[0],
                    4: " ".join(c for c in lines[i][:30]),
                    5: lines[i].replace(" ", "") + ".",
                    6: "12 34 56 78 " * 5,
                    7: lines[i][:25],
                    8: "We use cookies here.",
                    9: lines[i] + "\n\n" + lines[i],
                    10: "Use JavaScript to read this." if amount < 0.9 else "lorem ipsum dolor sit.",
                    11: lines[i],
                }[kind]
        if rng.random() < 0.05:
            lines.append("function { return }.")
        texts.append(("\n\n" if rng.random() < 0.3 else "\n").join(lines))
    return texts


@pytest.fixture(scope="module")
def theirs() -> dict[str, object]:
    """datatrove's filters, reading the words and sentences that ours read: theirs come from spaCy."""
    pytest.importorskip("datatrove")
    pytest.importorskip("loguru")
    pytest.importorskip("humanize")
    from datatrove.pipeline.filters import (
        c4_filters,
        fineweb_quality_filter,
        gopher_quality_filter,
        gopher_repetition_filter,
    )

    modules = (gopher_quality_filter, gopher_repetition_filter, fineweb_quality_filter)
    for module in modules:
        module.split_into_words = lambda text, language: rules.words(text)
    c4_filters.split_into_sentences = lambda text, language: [""] * rules.sentences(text)
    return {
        "gopher:repetition=false": gopher_quality_filter.GopherQualityFilter(),
        "gopher:quality=false": gopher_repetition_filter.GopherRepetitionFilter(),
        "fineweb": fineweb_quality_filter.FineWebQualityFilter(),
        "c4": c4_filters.C4QualityFilter(),
    }


@pytest.mark.parametrize("choice", ["gopher:repetition=false", "gopher:quality=false", "fineweb", "c4"])
def test_decisions_are_datatroves(choice: str, theirs: dict) -> None:
    from datatrove.data import Document as Theirs

    kept = 0
    for number, text in enumerate(odd_texts(500)):
        other = Theirs(text=text, id=str(number))
        answer = theirs[choice].filter(other)
        item = one(choice, text)
        assert isinstance(item, Document) == (answer is True), f"{answer} but {item}: {text!r}"
        if answer is True:
            kept += 1
            assert item.text == other.text, "and the text that is left"
    assert 50 < kept < 450, "both decisions occur"


# The same rules by hand, for where datatrove is not installed


GOOD = "\n".join(
    f"The budget of model {n} and that of the token have to be with the index number {n * n}." for n in range(20)
)


def test_a_bound_that_is_met_is_kept() -> None:
    spoken = [*COMMON[:8], *(f"{a}{b}" for a in NOUNS for b in NOUNS)]
    for letters, reason in ((80, None), (79, "few-letters")):
        text = " ".join([*spoken[:letters], *(str(100 + i) for i in range(100 - letters))])
        item = one("gopher:repetition=false", text)
        assert getattr(item, "reason", None) == reason
    for hashes, reason in ((11, None), (13, "hashes")):  # they are words too: 11 of 111, 13 of 113
        item = one("gopher:repetition=false", " ".join([*spoken[:100], *["#"] * hashes]))
        assert getattr(item, "reason", None) == reason


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda t: t[:200], "too-short"),
        (lambda t: t.replace("budget", "budget" * 30), "word-length"),
        (lambda t: t.replace("budget", "# # # budget"), "hashes"),
        (lambda t: t.replace("budget", "budget... ... ..."), "ellipses"),
        (lambda t: "\n".join("- " + line for line in t.split("\n")), "bullets"),
        (lambda t: t.replace(".", "…").replace("model", "model large"), "ellipsis-lines"),
        (lambda t: t.replace("token have to be", "1 22 333 4444 55555 66"), "few-letters"),
        (
            lambda t: "\n".join(f"Kein deutsches Wort steht heute hier {n} mal drin." for n in range(40)),
            "few-stop-words",
        ),
        (lambda t: "\n".join([*t.split("\n"), *t.split("\n")[:12]]), "duplicate-lines"),
        (lambda t: "\n".join(line + " as a matter of fact as a matter of fact" for line in t.split("\n")), "top-ngram"),
    ],
)
def test_gopher_by_rule(change, reason: str) -> None:
    assert isinstance(one("gopher:quality=true,repetition=false", GOOD), Document)
    item = one("gopher", change(GOOD))
    assert isinstance(item, Drop) and item.reason == reason


def test_c4_keeps_sentences_and_drops_pages() -> None:
    text = (
        "Home\nThe first sentence is here.[1] And another one!\nWe use cookies on this site.\nshort one.\n"
        'He said: "the third."\nEnable Javascript to read this page.\nIs this the fourth? It may be the fifth.'
    )
    item = one("c4", text)
    assert isinstance(item, Document)
    assert item.text == (
        'The first sentence is here. And another one!\nHe said: "the third."\nIs this the fourth? It may be the fifth.'
    )
    assert one("c4", text.replace("It may be the fifth.", "")).reason == "few-sentences"
    assert one("c4", text + "\nIt is { x } of this.").reason == "curly-bracket"
    assert one("c4", text + "\nLorem ipsum dolor sit amet.").reason == "lorem-ipsum"
    assert one("c4", "int main() { return 0; }", "code").text == "int main() { return 0; }"


def test_fineweb_by_rule() -> None:
    base = "\n".join(f"The budget of model {n} and that of the token have to be with the index." for n in range(20))
    assert isinstance(one("fineweb", base), Document)
    assert one("fineweb", base.replace(".", "")).reason == "line-ends"
    short = "\n".join(f"The budget of model {n}.\nIt is {n} today." for n in range(20))
    assert one("fineweb", short).reason == "short-lines"
    assert one("fineweb", base + "\n" + base.split("\n")[0]).reason == "duplicate-lines"
    spaced = "\n\n\n\n\n\n".join(f"The budget of model {n} has to be with the index." for n in range(20))
    assert one("fineweb", spaced).reason == "list"


# Repairs and languages


def test_mojibake_is_undone_and_right_text_stays() -> None:
    pytest.importorskip("ftfy")
    for text in ("schön, naïve — “quoted” œuvre", "Ça coûte 5 €", "漢字かな", "ligature ﬁ and ½"):
        assert one("ftfy", text).text == text, "nothing to repair"
        spoilt = text.encode().decode("cp1252", "ignore")
        if spoilt.encode("cp1252", "ignore") == text.encode():
            assert one("ftfy", spoilt).text == text
    assert one("ftfy", "schÃ¶n").text == "schön" and one("ftfy", "a &lt; b &amp; c").text == "a < b & c"
    assert one("ftfy", "schÃ¶n", "code").text == "schÃ¶n"


SAMPLES = {
    "en": "The committee will meet on Thursday to discuss the plans for the new library in the town.",
    "de": "Der Ausschuss trifft sich am Donnerstag, um die Pläne für die neue Bibliothek zu besprechen.",
    "fr": "Le comité se réunira jeudi pour discuter des projets de la nouvelle bibliothèque de la ville.",
    "es": "El comité se reunirá el jueves para discutir los planes de la nueva biblioteca de la ciudad.",
    "ru": "Комитет соберётся в четверг, чтобы обсудить планы новой городской библиотеки.",
    "ja": "委員会は木曜日に集まり、町の新しい図書館の計画について話し合います。",
    "ar": "ستجتمع اللجنة يوم الخميس لمناقشة خطط المكتبة الجديدة في المدينة.",
}


def test_languages_are_named_and_kept() -> None:
    pytest.importorskip("py3langid")
    documents = [Document(code, text) for code, text in SAMPLES.items()]
    named = run("language", documents)
    assert [d.meta["language"] for d in named] == list(SAMPLES)
    out = run("language:keep=[en, fr]", [*documents, Document("short", "ok"), Document("c", "x = 1", "code")])
    assert [d.id for d in out if isinstance(d, Document)] == ["en", "fr", "short", "c"]
    assert {d.reason for d in out if isinstance(d, Drop)} == {"language"}
    assert isinstance(one("language:short=false", "ok"), Drop)


# Lines


def test_lines_of_many_documents_go_and_repetitions_within_one() -> None:
    menu, notice = "Home, products and support for everyone", "Copyright 2024, all rights reserved by us"
    documents = []
    for i in range(6):
        lines = [menu, f"Document number {NOUNS[i]} says something of its own.", notice.replace("2024", str(i)), "- ok"]
        documents.append(Document(f"d{i}", "\n".join(lines)))
    twice = "A line of some length here.\nAnother line of length.\nA LINE of some length, here!"
    documents.append(Document("twice", twice))
    documents.append(Document("only", f"{menu}\n{notice}"))
    out = run("line-dedup", documents)
    texts = {d.id: d.text for d in out if isinstance(d, Document)}
    assert texts["d1"] == f"Document number {NOUNS[1]} says something of its own.\n- ok", "digits and case do not count"
    assert texts["twice"] == "A line of some length here.\nAnother line of length."
    assert [d.document_id for d in out if isinstance(d, Drop)] == ["only"]
    kept = {d.id: d.text for d in run("line-dedup:within=false,documents=20", documents)}
    assert kept == {d.id: d.text for d in documents}
    paragraphs = [dataclasses.replace(d, text=d.text.replace("\n", "\n\n")) for d in documents]
    left = {d.id: d.text for d in run("line-dedup:unit=paragraph", paragraphs) if isinstance(d, Document)}
    assert left["d1"] == f"Document number {NOUNS[1]} says something of its own.\n\n- ok"
    one, same, other, none = keys_of(["Page 1 of 2!", "page of", "of page", "12 ..."])
    assert one == same != other and none != 0
    assert not any(chr(i).isdigit() for i in range(0x20000, 0x110000, 7))  # digits are looked for below


def test_the_keys_of_many_lines_are_those_of_each() -> None:
    """The polynomial of all lines at once against one line after the other, word by word."""
    lines = ["One line, of words", "x", "", "…", "Ünïcode 漢字 42", "a " * 300, "İstanbul\u0130 7", "the same the same"]
    right = []
    for line in lines:
        words, _ = word_hashes("".join(" " if c.isdigit() else c for c in line))
        right.append(max(int(combine(words[None])[0]), 1) if len(words) else 1)
    assert keys_of(lines).tolist() == right


def test_line_dedup_splits_where_lines_end_and_nowhere_else() -> None:
    shared = "This notice stands on every page of it."
    texts = [
        f"Own text of page {n} says something.\x0cpart {NOUNS[n]}\u2028{shared}\n{shared}\nend {NOUNS[n]}\r\n"
        for n in range(5)
    ]
    out = [d for d in run("line-dedup", [Document(str(n), t) for n, t in enumerate(texts)]) if isinstance(d, Document)]
    assert [d.text for d in out] == [t.replace(f"\n{shared}\n", "\n").strip("\n") for t in texts]


# Personal data


def test_what_names_somebody_is_masked() -> None:
    text = (
        "Write to jane.doe+x@mail.example.org or call +44 20 7946 0958, (555) 123-4567 or 555-123-4567.\n"
        "From 8.8.8.8 and 2001:4860:4860::8888, card 4111 1111 1111 1111, IBAN DE89 3704 0044 0532 0130 00."
    )
    item = one("pii", text)
    assert item.text == (
        "Write to <EMAIL> or call <PHONE>, <PHONE> or <PHONE>.\nFrom <IP> and <IP>, card <CARD>, IBAN <IBAN>."
    )


@pytest.mark.parametrize(
    "text",
    [
        "192.168.0.1 and 127.0.0.1 and 10.0.0.7 name nobody",
        "version 1.2.3.4.5 and 300.1.2.3 are no addresses",
        "card 4111 1111 1111 1112 has a wrong check digit",
        "on 2024-05-06 at 12:30:45, pages 100-200, sum 1234567890123",
        "IBAN DE88 3704 0044 0532 0130 00 is wrong",
        "user at example dot com, @handle, a@b",
        "std::vector::size and ::1",
        "ISBN 978-3-16-148410-0",
    ],
)
def test_what_names_nobody_stays(text: str) -> None:
    assert one("pii", text).text == text


def test_check_digits() -> None:
    assert luhn("79927398713") and not luhn("79927398710") and not luhn("0000000000000")
    assert iban("GB82 WEST 1234 5698 7654 32") and not iban("GB82 WEST 1234 5698 7654 33")
    with pytest.raises(UserError, match="email"):
        registry.build("step", "pii:kinds=[mail]")


# Contamination


QUESTION = "Which river flows through the old town before it reaches the northern harbour of the island in summer"


def test_a_benchmarks_text_is_dropped_with_its_span() -> None:
    before = "Some prose stands here first, and it goes on for a while. "
    hit = Document("hit", before + QUESTION.upper().replace(" ", ", ") + " - nobody knows.")
    twelve = Document("near", before + " ".join(QUESTION.split()[:12]) + " valley.")
    step = registry.build("step", "decontaminate")
    step.open(Context(targets={"quiz": [QUESTION, "too short to look for"]}))
    hit_item, near_item = step.run([hit, twelve])
    assert isinstance(near_item, Document), "twelve words in a row are no hit"
    assert hit_item.reason == "contaminated"
    start = len(before)
    assert f"from character {start} to {start + len(QUESTION.replace(' ', ', '))}" in hit_item.detail


def test_spans_are_cut_with_a_margin() -> None:
    left, right = "left " * 100, "right " * 100
    document = Document("d", left + QUESTION + " " + right)
    step = registry.build("step", "decontaminate:action=cut,margin=50")
    step.open(Context(targets={"quiz": [QUESTION]}))
    (item,) = step.run([document])
    first, second = item.text.split("\n\n")
    assert first.strip() == left[: len(left) - 50].strip() and second == right[49:].strip()
    whole = registry.build("step", "decontaminate:action=cut")
    whole.open(Context(targets={"quiz": [QUESTION]}))
    assert isinstance(next(iter(whole.run([Document("d", QUESTION)]))), Drop), "nothing would be left"


def test_short_targets_are_looked_for_as_a_whole() -> None:
    target = "nine words are enough to be looked for here"
    step = registry.build("step", "decontaminate")
    step.open(Context(targets={"t": [target]}))
    texts = [f"well, {target}, is it", target.replace("enough", "too few")]
    assert [type(i) for i in step.run([Document(str(n), t) for n, t in enumerate(texts)])] == [Drop, Document]


def test_decontamination_in_the_pipeline(tmp_path: Path) -> None:
    source = tmp_path / "texts"
    source.mkdir()
    for i in range(6):
        (source / f"{i}.txt").write_text(GOOD.replace("model", NOUNS[i]) + (QUESTION if i == 3 else ""))
    (tmp_path / "quiz.jsonl").write_text(json.dumps({"question": QUESTION}))
    steps = [{"method": "decontaminate", "targets": [str(tmp_path / "quiz.jsonl")], "text_field": "question"}, "pii"]
    made = curate(str(source), tmp_path / "out", CurateConfig(steps=steps, vocab_size=300, heldout=0.2), processes=1)
    assert made.drops == {"decontaminate": {"contaminated": 1}}
    assert "texts/3.txt" in (made.folder / "drops.jsonl").read_text()


def test_bounds_of_what_repeats_are_bounds() -> None:
    """What the exact count skips by is never below it, and is it where nothing overlaps."""
    tight = 0
    for text in odd_texts(200):
        words = rules.words(text)
        joined, spaced = gopher.Grams(words, ""), gopher.Grams(words, " ")
        for n in range(2, 11):
            exact = gopher.repeated(words, n)
            assert joined.repeated(n) >= exact
            tight += joined.repeated(n) == exact > 0
            grams = Counter(" ".join(words[i : i + n]) for i in range(len(words) - n + 1))
            assert spaced.most(n) >= max((len(g) * c for g, c in grams.items() if c == max(grams.values())), default=0)
    assert tight > 50


def test_curate_bench_beside_datatrove() -> None:
    pytest.importorskip("datatrove")
    from modicum.bench import curate

    rows = {row.task: row for row in curate.measure(megabytes=0.1, seconds=0.0)}
    assert rows["gopher"].differ == 0 and rows["gopher"].dropped > 0
    assert rows["minhash"].differ <= 0.1 * rows["minhash"].documents and all(row.rate > 0 for row in rows.values())


def test_words_of_several_texts_are_those_of_each() -> None:
    texts = [
        "",
        "one",
        "two words",
        " ",
        "\u0130STANBUL \u03a3\u0391\u03a3",
        "\u4e00\u4e8c three",
        "...",
        "ends here",
        *odd_texts(20),
    ]
    for ours, text in zip(word_hashes_of(texts), texts, strict=True):
        assert ours.tolist() == word_hashes(text)[0].tolist()
