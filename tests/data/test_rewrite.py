"""Rewriters against their papers' definitions, and the driver: what it asks for, keeps, and does about failures."""

from __future__ import annotations

import dataclasses
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import chisquare

from modicum.core import registry
from modicum.core.choice import Choice
from modicum.core.errors import UserError
from modicum.data.curate import CurateConfig, curate
from modicum.data.document import Document, Drop
from modicum.data.replies import Replies, Reply, Request
from modicum.data.rewrites import _text, math_synthesis, rephrase_multilingual, restructured, sam_mimicry
from modicum.data.rewriting import rewrite
from modicum.data.signals import Maker
from modicum.data.steps import Context

STORY = (
    "The ferry crossed the strait twice a day. Its captain, a quiet man, knew every rock. In winter the crossing took "
    "three hours, and passengers slept on the benches below. Nobody had ever drowned."
)


def replying(answer: Callable[[str], str | Reply]) -> Replies:
    """A generator that answers each prompt with `answer` of it."""

    def generate(requests: Sequence[Request]) -> Iterator[tuple[int, Reply]]:
        for number, request in enumerate(requests):
            reply = answer(request.messages[-1][1] if request.messages else request.prompt)
            yield number, reply if isinstance(reply, Reply) else Reply(reply)

    return Replies(generate)


def run(choice: object, texts: Sequence[str | Document], answer: Callable[[str], str | Reply] | None = None):
    rewriter = registry.build("rewrite", Choice.parse("rewrite", choice))
    documents = [Document(f"d{i}", t) if isinstance(t, str) else t for i, t in enumerate(texts)]
    return list(rewrite(rewriter, documents, replying(answer) if answer else None))


# Passages, prefaces, marks


@pytest.mark.parametrize("by_lines", [False, True])
@pytest.mark.parametrize("most", [1, 7, 50, 300])
def test_passages_keep_to_the_limit_and_join_to_the_text(most: int, by_lines: bool) -> None:
    rng = np.random.default_rng(0)
    letters = list("ab.,!? \n\u3002\u2026\"'-")
    texts = ["".join(rng.choice(letters, 400)) for _ in range(20)] + [STORY, "", "x" * 50, "word " * 700]
    for text in texts:
        parts = _text.passages(text, most, by_lines)
        assert "".join(parts) == text
        assert all(_text.count(p) <= most for p in parts)


def test_passages_end_where_sentences_do() -> None:
    parts = _text.passages(STORY, 30)
    assert len(parts) == 2 and [p.strip()[-1] for p in parts] == [".", "."]


def test_passages_by_lines_end_at_line_breaks_first() -> None:
    text = "One short line. And more of it\nA second line. It goes on\nA third"
    assert _text.passages(text, 8, by_lines=True) == text.splitlines(keepends=True)


PREFACES = (
    "Sure! ",
    "Sure, here is a paraphrase of the text: ",
    "Sure. Here's the rewritten version:\n\n",
    "Certainly! Here is the text in simpler words:\n",
    "Of course! ",
    "Of course, here you go: ",
    "Absolutely! Here is the revised text:\n",
    "Okay, here is the result: ",
    "OK: ",
    "Great! Here is the new text: ",
    "Here is the paraphrased text:\n\n",
    "Here's a rephrased version: ",
    "Here are the sentences in plain English: ",
    "Here is an improved version of the passage:\n",
    "Below is the rewritten paragraph:\n",
    "The following is a simplified version: ",
    "Paraphrase: ",
    "Paraphrased text: ",
    "Rephrased version: ",
    "Rewritten passage: ",
    "Revised: ",
    "**Rephrased text:** ",
    "**Improved version**: ",
    "## Rewritten text: ",
    "Simplified text:\n",
    "The paraphrased version of the text is: ",
    "The rewritten text reads as follows:\n",
    "The improved passage: ",
    "I have rewritten the text in plain English: ",
    "I will rephrase this for you:\n",
)


@pytest.mark.parametrize("preface", PREFACES)
def test_prefaces_are_taken_off(preface: str) -> None:
    assert _text.plain(preface + STORY) == STORY
    assert _text.plain(f'{preface}"{STORY}"') == STORY


@pytest.mark.parametrize(
    "text", [STORY, "Here the river bends.", "Sure-footed goats climb.", "Great Britain is an island.", "I have a dog."]
)
def test_texts_are_left_as_they_are(text: str) -> None:
    assert _text.plain(text) == text


MALFORMED = {
    "": None,
    "no marks": None,
    "<improved>": None,
    "</improved>": None,
    "<improved></improved>": None,
    "<improved>   </improved>": None,
    "<improved>cut off in the mid": None,
    "a</improved>b<improved>": None,
    "<improve>a</improve>": None,
    "<improved>a</improved>": "a",
    "plan <improved>a</improved> thanks": "a",
    "<improved>\na\n</improved>": "a",
    "<IMPROVED>a</IMPROVED>": "a",
    "<improved>a</improved><improved>b</improved>": "b",
    "<improved>a</improved> or better <improved>b": "a",
    "<improved>a<improved>b</improved>": "b",
    "<improved>a</improved></improved>": "a",
    "use <improved> and </improved>: <improved>b</improved>": "b",
    "<improved>a < b > c</improved>": "a < b > c",
    "<improved>a\n\nb</improved>": "a\n\nb",
}


@pytest.mark.parametrize("reply", MALFORMED)
def test_only_what_is_between_complete_marks_is_taken(reply: str) -> None:
    assert _text.tagged(reply, "improved") == MALFORMED[reply]


# wrap


def test_wrap_adds_rephrasings_and_keeps_the_original() -> None:
    source = Document("d0", f"{STORY} " * 4, "web", "http://x", {"quality": 0.4})
    out = run("wrap:tokens=80", [source], lambda prompt: f"Sure! {prompt.rsplit(chr(10) * 2, 1)[-1].upper()}")
    parts = [p for p in _text.passages(source.text, 80) if _text.count(p) >= 20]
    assert out[0] == source
    assert [d.text for d in out[1:]] == [p.strip().upper() for p in parts]
    assert {d.domain for d in out[1:]} == {"web-rewritten"} and {d.origin for d in out[1:]} == {"d0"}
    assert all(d.quality is None for d in out[1:])  # it was the original's


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        ("Short.", "length"),
        (STORY * 3, "length"),
        (STORY + " of the sea" * 5, "repetition"),
        ("Write the text below again in clear, plain English. " + STORY, "instruction"),
        ("A budget is a plan of what is earned and spent, made for each month. " * 2, "other-content"),
        (Reply(STORY, "length"), "unfinished"),
    ],
)
def test_wrap_refuses_what_cannot_stand_for_its_source(reply: str | Reply, reason: str) -> None:
    original, drop = run("wrap", [STORY], lambda prompt: reply)
    assert original.text == STORY and (drop.document_id, drop.reason) == ("d0#wrap0", reason)


# rephrase-multilingual


def test_passages_come_back_in_their_order_and_refused_ones_as_they_were() -> None:
    lines = [f"{STORY} Number {n} of the reports ends here." for n in range(6)]

    def answer(prompt: str) -> str:
        text = re.findall(r"<text>\n(.*)\n</text>", prompt, re.DOTALL)[-1]
        if "Number 2" in text:
            return "too short"
        if "Number 4" in text:
            return "<text>Le bac traversait le fleuve deux fois par jour; son capitaine connaissait les rochers. " * 3
        return f"<text>{text.replace('ferry', 'boat')}</text>"

    original, merged, *drops = run("rephrase-multilingual:tokens=70", ["\n".join([*lines, "", "tiny", ""])], answer)
    new = [line.replace("ferry", "boat") if n not in (2, 4) else line for n, line in enumerate(lines)]
    assert original.id == "d0" and merged.text == "\n".join([*new, "", "tiny", ""])
    assert [d.document_id for d in drops] == ["d0#rephrase-multilingual2", "d0#rephrase-multilingual4"]


def test_a_reply_in_another_language_is_refused() -> None:
    french = (
        "The ferry crossed le d\u00e9troit deux fois par jour et son capitaine, un homme tranquille, connaissait "
        "chaque rocher; en hiver la travers\u00e9e durait trois heures et les passagers dormaient sur les bancs."
    )
    assert rephrase_multilingual.language_of(french) == "fr"
    knobs = {"method": "rephrase-multilingual", "least_overlap": 0.0}
    original, drop = run(knobs, [STORY], lambda prompt: french)
    assert original.text == STORY and drop.reason == "language"
    german = Document(
        "d0",
        "Die F\u00e4hre \u00fcberquerte die Meerenge zweimal am Tag, und ihr Kapit\u00e4n kannte jeden Felsen genau, "
        "auch im Winter, wenn die Fahrt drei Stunden dauerte.",
    )
    seen: list[str] = []
    run(knobs, [german], lambda prompt: seen.append(prompt) or "")  # type: ignore[func-returns-value]
    assert "in German only" in seen[0]


# rewire, tpt


def test_rewire_keeps_the_marked_part_and_drops_replies_without() -> None:
    def answer(prompt: str) -> str:
        draft = prompt.rsplit("\n\n", 1)[-1]
        return f"It is dull. Plan: liven it up. <improved>{draft}!</improved>" if "strait" in draft else "better!"

    other = (
        "A text about something else entirely, with enough words in it that it is long enough to be rewritten by it."
    )
    out = run("rewire", [STORY, other], answer)
    assert [getattr(o, "reason", None) for o in out] == [None, None, None, "no-marks"]
    assert [d.id for d in out[:3]] == ["d0", "d0#rewire", "d1"] and out[1].text == f"{STORY}!"
    assert out[1].origin == out[0].origin and out[1].domain == "prose-rewritten"


def test_tpt_puts_thoughts_after_the_document_and_cuts_it_exactly() -> None:
    text = " ".join(f"w{i}" for i in range(30))
    seen: list[str] = []
    with_thoughts, rest = run("tpt:tokens=20", [text], lambda prompt: seen.append(prompt) or " deep thought ")  # type: ignore[func-returns-value]
    head = " ".join(f"w{i}" for i in range(20))
    assert seen[0].endswith(head) and with_thoughts.text == f"{head}\n\ndeep thought" and with_thoughts.id == "d0"
    assert rest.text == " ".join(f"w{i}" for i in range(20, 30)) and rest.origin == "d0"
    cut = run("tpt", [STORY], lambda prompt: Reply("thoughts without end", "length"))
    assert [d.text for d in cut] == [f"{STORY}\n\nthoughts without end"]  # nothing is filtered


# math-synthesis


def sums(count: int) -> list[Document]:
    question = "Question: Ann has {n} nuts and gets {m}. How many?\nAnswer: She gets {m}. So {n} + {m} = {k}. #### {k}"
    return [Document(f"d{n}", question.format(n=n, m=n + 3, k=2 * n + 3)) for n in range(count)]


def test_tutor_keeps_right_verdicts_with_right_results_only() -> None:
    def answer(prompt: str) -> str:
        n = int(re.findall(r"Ann has (\d+)", prompt)[-1])
        right = 2 * n + 3
        if "You are a teacher" not in prompt:
            return f"I add and get {right if n % 2 == 0 else right + 1}."
        return {1: f"WRONG. It is {right}.", 3: "CORRECT", 5: f"WRONG. It is {right + 5}."}[n % 6]

    out = run("math-synthesis:op=tutor", sums(18), answer)
    made = {o.id.split("#")[0]: o.text for o in out if isinstance(o, Document) and "#" in o.id}
    reasons = {o.document_id.split("#")[0]: o.reason for o in out if isinstance(o, Drop)}
    assert set(made) == {f"d{n}" for n in range(18) if n % 2 == 0 or n % 6 == 1}
    assert reasons == {f"d{n}": "wrong-verdict" if n % 6 == 3 else "wrong-result" for n in range(18) if n % 6 in (3, 5)}
    assert "Teacher: CORRECT" in made["d0"] and "Teacher: WRONG" in made["d1"]


def test_diversify_needs_its_word_and_the_right_result() -> None:
    def answer(prompt: str) -> str:
        n = int(re.findall(r"Ann has (\d+)", prompt)[-1])
        both = f"Solution 1: twice {n} and 3 more, {2 * n + 3}\nSolution 2: by counting, {2 * n + (3 if n < 2 else 4)}"
        return both if n == 1 else f"ACCEPT\n{both}"

    out = run("math-synthesis:op=diversify", sums(3), answer)
    assert [o.id for o in out if isinstance(o, Document) and "#" in o.id] == [
        "d0#math-synthesis0",
        "d0#math-synthesis1",
        "d2#math-synthesis0",
    ]
    assert [o.reason for o in out if isinstance(o, Drop)] == ["refused", "wrong-result"]


def test_expand_keeps_problems_that_come_out_twice_alike() -> None:
    def answer(prompt: str) -> str:
        if prompt.startswith(math_synthesis.SOLVE):
            return "It is 7." if "pears" in prompt else "It is 9."
        return "Problem: 3 pears and 4 pears?\nSolution: 3 + 4 = 7\nProblem: 5 figs and 5 figs?\nSolution: 5 + 5 = 10"

    out = run("math-synthesis:op=expand", sums(1), answer)
    assert [getattr(o, "reason", "kept") for o in out] == ["kept", "kept", "wrong-result"]
    assert "pears" in out[1].text and out[1].text.startswith("Problem: 3 pears")


def test_retrospect_marks_once_and_keeps_the_steps_in_order() -> None:
    steps = ["Take a.", "Then b follows.", "From it c.", "So d holds.", "Done: 5."]
    for seed in range(30):
        lines = math_synthesis.retrospect(" ".join(steps), np.random.default_rng(seed)).split("\n")
        at = lines.index(math_synthesis.BACK)
        assert lines.count(math_synthesis.BACK) == 1 and at >= 2
        assert lines[: at - 1] + lines[at + 1 :] == steps  # without the early step and the mark: the solution
        assert steps.index(lines[at - 1]) > at - 1  # it comes from later on, not the step that is due
    assert math_synthesis.retrospect("One step. Two.", np.random.default_rng(0)) is None


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so 3 + 4 = 7", 7),
        ("#### 1,250 of 3 kinds", 1250),
        ("a 3.5 and \u22122", -2),
        ("#### $12\nthat is 13", 12),
        ("none", None),
    ],
)
def test_the_answer_of_a_solution(text: str, number: float | None) -> None:
    assert math_synthesis.answer_of(text) == number


# restructured


def rich(n: int) -> Document:
    text = (
        f"# Guide {n}\n\n## Before\n\nA lantern is a lamp that has a case of glass around its flame. Find some dry "
        f"wood number {n} in the forest near you.\n\n## Steps\n\n1. Gather wood {n}.\n2. Dig a pit.\n"
        f"3. Light the fire.\n4. Boil the water.\n5. Let it rest.\n\n## After\n\n"
        "Put the fire out with plenty of sand and water, always.\n"
    )
    return Document(f"d{n}", text, "howto", "", {"format": "markdown", "title": f"Camping for {n}"})


def test_every_template_leads_back_to_its_signal() -> None:
    config = restructured.Config(most=50, topics=["howto", "news", "law"])
    kinds: Counter[str] = Counter()
    for n in range(40):
        for signal in restructured.signals(rich(n), config):
            text = restructured.written(signal, np.random.default_rng(n))
            assert (signal.kind, signal.source, signal.answer) in restructured.read(text), text
            assert signal.answer.lower() not in signal.source.lower()
            kinds[signal.kind] += 1
    assert set(kinds) == {"title", "heading", "topic", "next-step", "definition"} and min(kinds.values()) >= 40
    code = Document(
        "m.py",
        'def area(r):\n    """Compute the surface of a disc."""\n    return 3 * r * r\n',
        "code",
        "",
        {"language": "python"},
    )
    (signal,) = restructured.signals(code, config)
    assert signal.kind == "docstring" and signal.source.startswith("area(") and "surface" in signal.answer


def test_the_right_option_stands_anywhere() -> None:
    signal = restructured.Signal("topic", "some text", "news", ("law", "howto", "poetry"))
    rng = np.random.default_rng(1)
    positions = Counter(
        m[1] for _ in range(2000) if (m := re.search(r"\(([A-D])\) news$", restructured.written(signal, rng)))
    )
    assert sum(positions.values()) > 800 and chisquare([positions[c] for c in "ABCD"]).pvalue > 0.01


def test_prompts_are_few_reproducible_and_beside_the_text() -> None:
    out = run("restructured:most=3", [rich(0)])
    assert out == run("restructured:most=3", [rich(0)])
    assert out[0] == rich(0) or out[0].text == rich(0).text
    assert len(out) == 4 and {d.domain for d in out[1:]} == {"howto-restructured"}


# sam-mimicry


def test_no_secret_survives_the_gate() -> None:
    rng = np.random.default_rng(5)
    names = ["Marta Kovac", "Oduya", "St. Brigid Hospital", "Lindqvist"]
    leaked, passed = Counter[str](), 0
    for n in range(200):
        name, code = names[n % 4], f"QX{rng.integers(10**5, 10**6)}"
        phrase = " ".join(rng.permutation(STORY.lower().replace(".", "").replace(",", "").split())[:9])
        record = f"The patient of {name} came with the file {code}. It was written that {phrase}."
        secret = (name, code, phrase, "")[n % 4 if n < 150 else 3]
        twin = f"<twin>Somebody else arrived at a clinic. They had {secret} with them.</twin>"
        out = run("sam-mimicry:rounds=1", [record], lambda prompt, twin=twin: twin)
        assert len(out) == 1
        if isinstance(out[0], Drop):
            leaked[out[0].reason] += 1
            assert secret
        else:
            assert not secret and record not in out[0].text
            passed += 1
    assert set(leaked) == {"leak-name", "leak-number", "leak-phrase"} and passed == sum(
        n >= 150 or n % 4 == 3 for n in range(200)
    )


def test_a_leaking_twin_goes_round_again_with_the_reasons() -> None:
    prompts: list[str] = []

    def answer(prompt: str) -> str:
        prompts.append(prompt)
        return "<twin>A nurse met Kovac.</twin>" if len(prompts) < 3 else "<twin>A nurse met a guest.</twin>"

    (twin,) = run("sam-mimicry", [Document("d0", "Doctor Kovac saw her.", meta={"label": 1, "title": "Kovac"})], answer)
    assert twin.text == "A nurse met a guest." and twin.meta == {"label": 1, "rewritten": "sam-mimicry"}
    assert "Kovac" not in prompts[0].split("record:")[-1] or "earlier version" not in prompts[0]
    assert all("earlier version" in p and "Kovac" in p.rsplit("earlier", 1)[-1] for p in prompts[1:])


def test_likeness_of_twins() -> None:
    pairs = [
        ("a b c d", "x y z"),
        ("a b c d e f", "x y z w v"),
        ("a b", "x"),
        ("one two three four", "one two three x y"),
    ]
    result = sam_mimicry.likeness(pairs)
    lengths = np.array([[4, 3], [6, 5], [2, 1], [4, 5]])
    assert result["length_correlation"] == pytest.approx(np.corrcoef(lengths.T)[0, 1])
    assert result["longest_copied_words"] == 3
    assert result["cosine"] == pytest.approx(3 / np.sqrt(4 * 5) / 4)


# The pipeline


def upper() -> Callable:
    """A curation's generator: the prompt's last paragraph in capitals; it fails where FAIL is set and dies on DIE."""

    def generate(requests: Sequence[Request]) -> Iterator[tuple[int, Reply]]:
        for number, request in enumerate(requests):
            CALLS.append(request)
            text = request.messages[-1][1].rsplit("\n\n", 1)[-1]
            if FAIL and "harbour" in text:
                raise RuntimeError("out of memory")
            if len(CALLS) == DIE:
                raise KeyboardInterrupt
            yield number, Reply(text.upper())

    return generate


CALLS: list[Request] = []
FAIL, DIE = False, 0


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, CurateConfig]:
    CALLS.clear()
    words = ["harbour", "valley", "desert", "forest", "village"]
    rows = [{"text": STORY.replace("strait", words[n % 5]).replace("three", str(n))} for n in range(20)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    signals = {"generate": Maker(f"{__name__}:upper", {}, "1")}
    return tmp_path / "in.jsonl", CurateConfig(steps=["rewrite:by=wrap"], vocab_size=300, heldout=0.2, signals=signals)


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, __name__, sys.modules.get(__name__) or __import__(__name__))


def texts(folder: Path) -> dict[str, bytes]:
    return {
        p.relative_to(folder).as_posix(): p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p.name != "curation.json" and ".work" not in p.parts
    }


def test_a_killed_curation_generates_nothing_twice(corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, config = corpus
    curate(str(source), tmp_path / "whole", config, processes=1)
    assert len(CALLS) == 20
    CALLS.clear()
    monkeypatch.setattr(f"{__name__}.DIE", 8)
    with pytest.raises(KeyboardInterrupt):
        curate(str(source), tmp_path / "cut", config, processes=1)
    curate(str(source), tmp_path / "cut", config, processes=1)
    assert len(CALLS) == 21  # the reply that was never given is asked for once more
    assert texts(tmp_path / "cut") == texts(tmp_path / "whole")
    kept = [d for split in ("train", "heldout") for d in curate(str(source), tmp_path / "cut", config).documents(split)]
    sides = {
        s: {d.origin for d in curate(str(source), tmp_path / "cut", config).documents(s)} for s in ("train", "heldout")
    }
    assert len(kept) == 40 and not sides["train"] & sides["heldout"] and sides["heldout"]


def test_failed_documents_are_named_and_tried_again(corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, config = corpus
    monkeypatch.setattr(f"{__name__}.FAIL", True)
    made = curate(str(source), tmp_path / "out", config, processes=1)
    assert [line.split(":")[0] for line in made.unanswered] == [f"in.jsonl#{n}#wrap" for n in (1, 6, 11, 16)]
    assert all("out of memory" in line for line in made.unanswered)
    count = {s: made.count("documents", s) for s in ("train", "heldout")}
    assert sum(count.values()) == 36  # 20 originals, 16 rephrased
    monkeypatch.setattr(f"{__name__}.FAIL", False)
    CALLS.clear()
    again = curate(str(source), tmp_path / "out", config, processes=1)
    assert len(CALLS) == 4 and not again.unanswered
    assert sum(again.count("documents", s) for s in ("train", "heldout")) == 40


def test_no_generator_is_one_line() -> None:
    step = registry.build("step", Choice.parse("step", {"method": "rewrite", "by": "wrap"}))
    with pytest.raises(UserError, match="--generator"):
        step.open(Context())
    registry.build("step", Choice.parse("step", {"method": "rewrite", "by": "restructured"})).open(Context())


def test_dclm_cuts_the_matching_domains_alone_and_learns_from_them() -> None:
    good = ["To solve this, first add both sides, then explain why it holds."] * 30
    raw = [Document(f"r{i}", f"buy cheap watches now {i} click here", "web") for i in range(40)]
    fine = [Document(f"f{i}", f"first explain, then solve and add number {i}", "web") for i in range(10)]
    style = [Document(f"s{i}", f"WATCHES NOW {i} click", "web-rewritten") for i in range(20)]
    step = registry.build("step", Choice.parse("step", {"method": "dclm", "keep": 0.2, "domains": "!*-rewritten"}))
    step.open(dataclasses.replace(Context(), targets={"good": good}))
    out = list(step.run([*raw, *fine, *style]))
    kept = [d for d in out if isinstance(d, Document)]
    assert {d.id for d in style} <= {d.id for d in kept}
    chosen = [d for d in kept if d.domain == "web"]
    assert {d.id for d in chosen} <= {d.id for d in fine} and len(chosen) >= 8
