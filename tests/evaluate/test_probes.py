"""Probes by hand and against brute force."""

import itertools

import numpy as np
import pytest

from modicum.core import registry
from modicum.evaluate import probes
from modicum.evaluate.probes import Graded, Item, ask, cbod, downstream_elusive, formatspread


def item(question, id_="0", choices=("a", "b"), right=0):
    return Item(id_, question, choices, right)


# cbod


@pytest.mark.parametrize(
    "question",
    [
        "Which of the following is usually the main part of a plant?",
        "What is the boiling point of water at 1,013.25 hPa?",
        "Which animal does not usually lay eggs?",
        "In 1969 Neil Armstrong went to the Moon; how did he get there?",
        "All of these except one are metals. Which of these is not?",
        "How many legs does a spider use to walk?",
        "Why do people never begin a race before the start?",
    ],
)
def test_rewriting_keeps_what_decides_the_answer(question):
    for seed in range(6):
        text = cbod.rewrite(question, 1.0, seed)
        assert cbod._facts(text) == cbod._facts(question)
        assert text[0].isupper() and text.count("?") == question.count("?")
    assert cbod.rewrite("Blue?", 1.0) == "Blue?"


def test_strength_is_the_share_of_edits():
    question = "Which of the following is usually used to begin and stop a big machine in this way?"
    changed = {s: cbod.rewrite(question, s) for s in (0.2, 0.5, 1.0)}
    words = [len(set(question.split()) - set(t.split())) for t in changed.values()]
    assert words[0] < words[1] < words[2] and all(t != question for t in changed.values())


def test_cbod_counts_pairs():
    """b = 6, c = 1 of 30: a drop of 5 in 30, and McNemar's exact p of 7 discordant pairs."""
    items = [item(f"Which of the following is usually the main part of thing {i}?", str(i)) for i in range(30)]
    plain = {i.id: ask(i).prompt for i in items}

    def grade(asked):
        found = []
        for a in asked:
            as_written, n = a.prompt == plain[a.item.id], int(a.item.id)
            right = n >= 10 or (n < 6 and as_written) or (n == 6 and not as_written)
            found.append(Graded(right, (0.0, 0.0)))
        return found

    report = registry.build("probe", "cbod").run(items, grade, 60)
    drop = report.figures["drop_1"]
    assert drop["value"] == pytest.approx(5 / 30)
    assert drop["p"] == pytest.approx(2 * (1 + 7) / 2**7) and not report.detected  # 0.125: too few pairs to say
    improved = registry.build("probe", "cbod").run(
        items, lambda asked: [Graded(a.prompt != plain[a.item.id], (0, 0)) for a in asked], 60
    )
    assert improved.figures["drop_1"]["value"] < 0 and not improved.detected  # a gain


# formatspread


def test_grammar_by_hand():
    formats = formatspread.every()
    assert formatspread.USUAL in formats and len(set(formats)) == len(formats)
    breaks = sum("\n" in s for s in formatspread.SEPARATORS)
    plain = len([s for s in formatspread.SEPARATORS if s and "\n" not in s])
    with_break = sum("\n" in s for s in formatspread.SPACES)
    pairs = plain * len(formatspread.SPACES) + breaks * with_break
    others = [formatspread.CASINGS, formatspread.NUMBERS, formatspread.WRAPPERS, formatspread.BETWEEN]
    assert len(formats) == pairs * int(np.prod([len(o) for o in others]))
    asked = formatspread.USUAL.write(item("Why?", choices=("x", "y")))
    assert asked.prompt == "Question: Why?\nOptions: A. x\nB. y\nAnswer:" and asked.choices == (" A.", " B.")
    other = formatspread.Format("upper", " - ", " || ", "i", "({})", " ").write(item("Why?", choices=("x", "y")))
    assert other.prompt + other.choices[1] == "QUESTION - Why? || OPTIONS - (i) x || (ii) y || ANSWER - (ii)"
    assert all(not f.write(item("Why?")).prompt.endswith(" ") for f in itertools.islice(formats, 0, None, 97))


def test_the_bandit_finds_the_extremes():
    """Of 40 formats one is right on 80% of the items, one on 20%, the others on half; few are graded on all items."""
    spreads, graded = [], []
    for seed in range(10):
        rng = np.random.default_rng(seed)
        rates: dict[str, float] = {}
        drawn = iter([0.5, *rng.permutation([0.8, 0.2, *[0.5] * 37])])

        def grade(asked, rng=rng, rates=rates, drawn=drawn):
            found = []
            for a in asked:
                key = repr((a.prompt.replace(a.item.question, "Q"), a.choices[0]))
                rates[key] = rate = rates[key] if key in rates else float(next(drawn))
                found.append(Graded(bool(rng.random() < rate), (0.0,) * 4))
            return found

        items = [Item(str(i), f"question {i}", ("a", "b", "c", "d"), 0) for i in range(200)]
        report = formatspread.FormatSpread(formatspread.Config(formats=40)).run(items, grade, 2600, seed)
        spreads.append(report.figures["spread"]["value"])
        graded.append(report.graded)
    assert sum(s > 0.45 for s in spreads) >= 8, spreads
    assert max(graded) <= 2600 < 40 * 200


# downstream-elusive


def test_chain_is_the_naive_softmax():
    nats = [-7.1, -5.0, -9.3]
    said = downstream_elusive.chain(nats, 0)
    p = np.exp(nats) / np.exp(nats).sum()
    assert said["p_choices"] == pytest.approx(p[0]) and said["log_p_choices"] == pytest.approx(np.log(p[0]))
    assert said["brier"] == pytest.approx((p[0] - 1) ** 2 + p[1] ** 2 + p[2] ** 2)
    assert said["accuracy"] == 0 and said["log_p_vocab"] == -7.1 and said["p_wrong"] == pytest.approx(p[1])
    assert np.isfinite(downstream_elusive.chain([-900.0, -2.0], 0)["log_p_choices"])  # whole choices underflow


def test_order_of_the_chain_on_a_planted_family():
    probe = registry.build("probe", "downstream-elusive")
    items, grade, budget = probe.simulate(np.random.default_rng(0), True)
    report = probe.run(items, grade, budget)
    f = {n: report.figures[n]["value"] for n in downstream_elusive.CHAIN}
    assert f["log_p_vocab"] > 0.9 > f["p_choices"] >= f["accuracy"] and report.detected


def test_gradings_are_kept(tmp_path):
    from modicum.evaluate.kept import Kept
    from modicum.evaluate.score import LogLikelihood

    class Counting:
        asked = 0

        def answers(self, requests):
            self.asked += len(requests)
            return [[LogLikelihood(-1.0 - i, False, 1, 2) for i in range(len(r.choices))] for r in requests]

    model, questions = Counting(), [ask(item(f"q{i}?", str(i))) for i in range(5)]
    first = probes.grader(model, Kept(tmp_path / "k.jsonl"), ["weights"])(questions[:3])
    again = probes.grader(model, Kept(tmp_path / "k.jsonl"), ["weights"])(questions)
    assert model.asked == 5 and again[:3] == first
    probes.grader(model, Kept(tmp_path / "k.jsonl"), ["other weights"])(questions)
    assert model.asked == 10
