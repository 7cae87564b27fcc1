"""cbod: is a score won by the wording of the questions? The same questions in other words, item by item.

    b = right as written, wrong rewritten       c = the other way round       D = (b - c) / n
    overfit to wording  if McNemar's exact p < 0.05 and D > 0

Every question is rewritten with strength m (the share of possible edits that is made), choices, numbers, names and
negations staying; the model answers both. Items whose rewriting changes nothing are left out; several strengths are
corrected by Holm. Rewritten questions are also a little odd, so compare D with that of a model that cannot know the
benchmark, and read the least D that could have been found.

Cohen-Inger et al. 2025, arXiv:2502.07445 (EMNLP 2025). Departs: they let language models rewrite; here
`rewriter=rules` (a table of synonyms, contractions, frames of questions) works without one, and `file` takes any
paraphrases as {"id", "question"} rows.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from modicum.core.errors import UserError
from modicum.evaluate.compare import detectable, holm, sign_test
from modicum.evaluate.probes import Asked, Graded, Grader, Item, Probe, Report, ask
from modicum.evaluate.rows import pick, read_rows

CLAIM = {
    "figure": "-2.75% on MMLU, over 80% of 32 models significant",
    "where": "version 2, abstract",
    "scale": "to 236B",
}
# Words that may stand for each other in most questions, and are safe in either direction.
SYNONYMS = (
    "begin start|begins starts|big large|buy purchase|called named|choose select|correct right|"
    "create make|described characterised|fast quick|find locate|get obtain|happens occurs|happen occur|"
    "help aid|helps aids|important significant|kind type|kinds types|likely probable|main principal|"
    "mostly mainly|often frequently|part portion|person individual|place location|primarily chiefly|"
    "require need|requires needs|show demonstrate|shows demonstrates|small little|stop halt|use employ|"
    "used employed|uses employs|usually typically|way manner|ways manners|"
)
CONTRACTIONS = (
    "what is=what's|who is=who's|it is=it's|that is=that's|there is=there's|they are=they're|you are=you're|"
    "we are=we're|I am=I'm|I have=I've"
)
PAIRS = [
    *(tuple(pair.split(" ")) for pair in SYNONYMS.split("|") if pair),
    *(tuple(pair.split("=")) for pair in CONTRACTIONS.split("|")),
]
FRAMES = (
    (re.compile(r"^What is ", re.I), "Can you tell what {rest} is"),
    (re.compile(r"^Which of the following ", re.I), "Of the options below, which one "),
    (re.compile(r"^Which of these ", re.I), "Of these, which one "),
    (re.compile(r"^Which ", re.I), "Say which "),
    (re.compile(r"^How ", re.I), "In what way "),
    (re.compile(r"^Why ", re.I), "For what reason "),
    (re.compile(r"^Where ", re.I), "In which place "),
)
NEGATIONS = re.compile(r"\b(no|not|never|none|nor|neither|without|except|least|cannot)\b|n't\b", re.I)
HOW_MUCH = re.compile(r"^how (many|much|long|far|old|often|fast|large|big|tall|high|deep)\b", re.I)


@dataclass(frozen=True, kw_only=True)
class Config:
    strength: str = "1.0"  # shares of the possible edits that are made; several are separated by |
    rewriter: str = "rules"  # rules, or a .jsonl or .parquet file of {"id", "question"} rows

    def __post_init__(self) -> None:
        values = [float(v) for v in str(self.strength).split("|")]
        if not values or not all(0 < v <= 1 for v in values):
            raise ValueError(f"strength={self.strength!r}: shares above 0 up to 1, such as 0.5|1")

    @property
    def strengths(self) -> list[float]:
        return [float(v) for v in str(self.strength).split("|")]


class Cbod(Probe):
    config: Config

    def run(self, items: Sequence[Item], grade: Grader, budget: int, seed: int = 0) -> Report:
        given = self._given()
        figures: dict[str, dict[str, float]] = {}
        rows: list[dict[str, Any]] = []
        tests: list[tuple[str, float, float]] = []
        per_item = 1 + len(self.config.strengths)
        plain: dict[str, bool] = {}
        spent = 0
        for strength in self.config.strengths:
            pairs = []
            for item in items:
                text = given.get(item.id) if given is not None else rewrite(item.question, strength, seed)
                if text and text != item.question:
                    pairs.append((item, text))
            pairs = pairs[: budget // per_item]
            if not pairs:
                raise UserError(
                    f"none of {len(items)} questions is changed at strength {strength}, or the budget is {budget}"
                )
            new = [item for item, _ in pairs if item.id not in plain]
            plain |= {i.id: g.right for i, g in zip(new, grade([ask(i) for i in new]), strict=True)}
            other = grade([ask(item, text) for item, text in pairs])
            spent += len(new) + len(pairs)
            before = np.array([plain[item.id] for item, _ in pairs])
            after = np.array([g.right for g in other])
            lost, won, n = int((before & ~after).sum()), int((~before & after).sum()), len(pairs)
            gap = (lost - won) / n
            error = float(np.sqrt(max(lost + won - (lost - won) ** 2 / n, 1)) / n)
            name = f"drop_{strength:g}"
            figures[name] = {"value": gap, "low": gap - 1.96 * error, "high": gap + 1.96 * error}
            figures[f"detectable_{strength:g}"] = {"value": detectable(error), "low": 0.0, "high": 1.0}
            tests.append((name, sign_test(lost, won), gap))
            rows += [
                {"id": i.id, "strength": strength, "rewritten": text, "right": bool(b), "right_rewritten": bool(a)}
                for (i, text), b, a in zip(pairs, before, after, strict=True)
            ]
        corrected = holm([p for _, p, _ in tests])
        for (name, _, _), p in zip(tests, corrected, strict=True):
            figures[name] |= {"p": p}
        detected = any(p < 0.05 and gap > 0 for p, (_, _, gap) in zip(corrected, tests, strict=True))
        best = int(np.argmin(corrected))
        summary = "overfit" if detected else "no sign of overfitting"
        verdict = f"{summary} to the wording (drop {tests[best][2]:+.1%}, p {corrected[best]:.2g})"
        return Report(figures=figures, detected=detected, verdict=verdict, graded=spent, rows=rows)

    def _given(self) -> dict[str, str] | None:
        if self.config.rewriter == "rules":
            return None
        rows = read_rows(self.config.rewriter)
        return {str(pick(r, "id", self.config.rewriter)): str(pick(r, "question", self.config.rewriter)) for r in rows}

    def simulate(self, rng: np.random.Generator, effect: bool) -> tuple[list[Item], Grader, int]:
        """A model that answers by meaning, or one that knows a tenth of the questions by their exact text alone."""
        items = [
            Item(str(i), f"Which of the following is usually the main part of thing {i}?", ("a", "b", "c", "d"), 0)
            for i in range(1000)
        ]
        knows = {i.id: bool(rng.random() < 0.4) for i in items}
        exact = {i.id: ask(i).prompt for i in items if effect and rng.random() < 0.1}

        def grade(prompts: Sequence[Asked]) -> list[Graded]:
            rows = []
            for a in prompts:
                luck = rng.random() < 0.25
                flip = rng.random() < 0.03
                right = (knows[a.item.id] != flip) or bool(luck and not knows[a.item.id] and rng.random() < 0.1)
                rows.append(Graded(right or exact.get(a.item.id) == a.prompt, (0.0,) * 4))
            return rows

        return items, grade, 2000


def rewrite(question: str, strength: float, seed: int = 0) -> str:
    """The question with a share of the possible edits made; numbers, names and negations stay."""
    rng = np.random.default_rng([seed, len(question), *question.encode()[:64]])
    edits = []
    for pair in PAIRS:
        for old, new in (pair, pair[::-1]):
            for match in re.finditer(rf"(?<![\w'’-]){re.escape(old)}(?![\w'’-])", question, re.I):
                if match.group()[0].islower() or match.start() == 0:
                    edits.append((match.start(), match.end(), new))
    if not HOW_MUCH.match(question):
        for pattern, frame in FRAMES:
            head = pattern.match(question)
            if head and "{rest}" in frame and re.fullmatch(r"[^,;:?]{3,60}\?", question[head.end() :]):
                rest = question[head.end() :].rstrip("?")
                edits.append((0, len(question), frame.format(rest=rest) + "?"))
                break
            if head and "{rest}" not in frame:
                edits.append((0, head.end(), frame))
                break
    count = max(1, round(strength * len(edits))) if edits else 0
    chosen: list[tuple[int, int, str]] = []
    for i in rng.permutation(len(edits)):
        start, end, _ = edits[i]
        if len(chosen) < count and all(end <= s or start >= e for s, e, _ in chosen):
            chosen.append(edits[i])
    text = question
    for start, end, new in sorted(chosen, reverse=True):
        old = text[start:end]
        text = text[:start] + (new[0].upper() + new[1:] if old[0].isupper() else new) + text[end:]
    kept = _facts(text) == _facts(question)
    return text if kept else question


def _facts(text: str) -> tuple[list[str], list[str], list[str]]:
    """Numbers, names (capitalised within a sentence) and negations, which no rewriting may change."""
    numbers = re.findall(r"\d+(?:[.,]\d+)*", text)
    names = sorted(re.findall(r"(?<=[a-z,] )[A-Z]\w+", text))
    return numbers, names, [m.group().lower() for m in NEGATIONS.finditer(text)]
