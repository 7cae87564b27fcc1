"""sam-mimicry: a synthetic twin in place of each private record, and a gate that lets nothing private through.

    twin = first of g_1, ..., g_r that leaks(record, g) finds nothing in; none: the record is dropped

One prompt in four steps: read the record for its topic, structure, length, standard of work and errors; plan another
item that is alike in these; write it; compare the two and revise. A separate gate then looks for names, numbers,
addresses and phrases of the record; a twin that has some goes round again with the reasons, at most `rounds` times. One
twin for one record, so that lengths, labels and marks keep their distribution. Only twins come out, never the record.

arXiv:2508.05953 (2025), abstract. Departs from it: the gate is a set of rules in place of a model; the wording of the
steps is this file's own. It gives no differential privacy: who knows a record may recognise its twin.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from modicum.data.document import Document, Drop
from modicum.data.replies import ask
from modicum.data.rewrites import Rewriter, Rounds, sampling
from modicum.data.rewrites._text import count, head, overlap, plain, tagged

SWEEP = ("steps=false,rounds=0",)  # a model of 135M follows no four steps

CLAIM = {
    "figure": "BERTScore F1 0.84, correlation of marks 0.62 and of lengths 0.85; no private information left",
    "where": "abstract",
    "scale": "10,000 submissions of 155 assignments",
}
FOUR_STEPS = (
    "Here is a record.\n\n{record}\n\nMake one synthetic record like it, in four steps. 1. Note its topic, structure, "
    "length, standard of work and errors. 2. Plan a different item that is alike in these, with other names, numbers "
    "and places. 3. Write it. 4. Compare both and revise. Put the final version between <twin> and </twin>."
)
NAIVE = "Here is a record.\n\n{record}\n\nWrite something like this between <twin> and </twin>."
AGAIN = "\n\nAn earlier version must not be used, as it has these from the record: {reasons}. Leave them out."
_NAME = re.compile(r"\b[^\W\d_a-z][\w'\u2019-]*[^\W\d_]\b")
_CODE = re.compile(r"\b(?=\w*\d)\w{2,}\b")
_ADDRESS = re.compile(r"\S+@\S+\.\S+|https?://\S+|www\.\S+")
_WORD = re.compile(r"[\w'\u2019]+")
# Words that begin sentences and are no names.
COMMON = frozenset(
    [
        "the",
        "a",
        "an",
        "and",
        "or",
        "but",
        "if",
        "so",
        "as",
        "at",
        "by",
        "for",
        "from",
        "in",
        "into",
        "of",
        "on",
        "to",
        "up",
        "with",
        "without",
        "about",
        "after",
        "before",
        "during",
        "this",
        "that",
        "these",
        "those",
        "it",
        "its",
        "he",
        "she",
        "they",
        "we",
        "you",
        "i",
        "my",
        "your",
        "his",
        "her",
        "our",
        "their",
        "there",
        "here",
        "what",
        "when",
        "where",
        "which",
        "who",
        "why",
        "how",
        "is",
        "are",
        "was",
        "were",
        "be",
        "been",
        "am",
        "do",
        "does",
        "did",
        "done",
        "has",
        "have",
        "had",
        "can",
        "could",
        "will",
        "would",
        "shall",
        "should",
        "may",
        "might",
        "must",
        "not",
        "no",
        "nor",
        "yes",
        "all",
        "any",
        "both",
        "each",
        "few",
        "many",
        "more",
        "most",
        "much",
        "other",
        "some",
        "such",
        "only",
        "own",
        "same",
        "than",
        "then",
        "too",
        "very",
        "just",
        "now",
        "also",
        "even",
        "ever",
        "never",
        "always",
        "often",
        "still",
        "yet",
        "again",
        "once",
        "first",
        "second",
        "last",
        "next",
        "one",
        "two",
        "three",
        "four",
        "five",
        "new",
        "old",
        "good",
        "bad",
        "great",
        "while",
        "because",
        "although",
        "though",
        "since",
        "until",
        "unless",
        "however",
        "therefore",
        "thus",
        "finally",
        "overall",
        "well",
        "let",
        "please",
        "thank",
        "thanks",
        "dear",
        "hello",
        "hi",
        "record",
        "note",
        "answer",
        "question",
        "text",
        "english",
    ]
)


@dataclass(frozen=True, kw_only=True)
class Config:
    steps: bool = True  # the four steps; false: "write something like this"
    rounds: int = 2  # more attempts after the first
    phrase: int = 8  # words in a row that a twin must not have from its record
    tokens: int = 400  # of a record that the generator sees
    temperature: float = 1.0
    top_p: float = 0.95

    def __post_init__(self) -> None:
        if self.rounds < 0 or self.phrase < 2 or self.tokens < 1:
            raise ValueError("rounds is at least 0, phrase at least 2, tokens at least 1")


def names(text: str) -> set[str]:
    """Words that are written like names: with a capital, and nowhere in the text without one."""
    small = {w for w in _WORD.findall(text) if w.islower()}
    return {n for n in _NAME.findall(text) if n.lower() not in COMMON and n.lower() not in small}


def leaks(record: str, twin: str, phrase: int = 8) -> list[tuple[str, str]]:
    """(kind, what) of everything of the record that stands in the twin: kinds name, number, address, phrase."""
    words = {w.lower() for w in _WORD.findall(twin)}
    out = [("name", n) for n in sorted(names(record)) if n.lower() in words]
    out += [("number", n) for n in sorted(set(_CODE.findall(record))) if n.lower() in words]
    out += [("address", a) for a in sorted(set(_ADDRESS.findall(record))) if a.lower() in twin.lower()]
    copied = longest_copied(record, twin)
    if len(copied) >= phrase:
        out.append(("phrase", " ".join(copied)))
    return out


def longest_copied(record: str, twin: str) -> list[str]:
    """The longest run of words that stands in both."""
    a, b = ([w.lower() for w in _WORD.findall(t)] for t in (record, twin))
    best, end = 0, 0
    row = [0] * (len(b) + 1)
    for word in a:
        new = [0] * (len(b) + 1)
        for j, other in enumerate(b, 1):
            if word == other:
                new[j] = row[j - 1] + 1
                if new[j] > best:
                    best, end = new[j], j
        row = new
    return b[end - best : end]


def likeness(pairs: Sequence[tuple[str, str]]) -> dict[str, float]:
    """How much twins resemble their records, from (record, twin): correlation of their lengths in words and marks, mean
    cosine of terms, the longest phrase that one copies."""
    lengths_N2 = np.array([[count(a), count(b)] for a, b in pairs], np.float64)
    spread = lengths_N2.std(0).min() if len(pairs) > 1 else 0.0
    return {
        "length_correlation": float(np.asarray(np.corrcoef(lengths_N2.T))[0, 1]) if spread > 0 else 0.0,
        "cosine": float(np.mean([overlap(a, b) for a, b in pairs])) if pairs else 0.0,
        "longest_copied_words": float(max((len(longest_copied(a, b)) for a, b in pairs), default=0)),
    }


class Mimicry(Rewriter):
    config: Config
    keeps_original = False

    def rewrite(self, document: Document, rng: np.random.Generator) -> Rounds:
        config = self.config
        record = head(document.text, config.tokens)
        prompt = (FOUR_STEPS if config.steps else NAIVE).format(record=record.strip())
        most = 3 * count(record) + (400 if config.steps else 64)
        reasons: list[tuple[str, str]] = []
        for _ in range(config.rounds + 1):
            text = prompt + (AGAIN.format(reasons=", ".join(w for _, w in reasons)) if reasons else "")
            (reply,) = yield [ask(text, max_tokens=most, **sampling(config))]
            twin = tagged(reply.text, "twin") or plain(re.sub(r"</?twin>", "", reply.text))
            reasons = leaks(document.text, twin, config.phrase) if twin else [("empty", "an empty reply")]
            if not reasons:
                meta = {k: v for k, v in document.meta.items() if k not in ("title", "url")}
                return [dataclasses.replace(document, text=twin, source="", meta=meta | {"rewritten": self.key})]
        kinds = ", ".join(sorted({kind for kind, _ in reasons}))
        return [Drop(document.id, f"leak-{reasons[0][0]}", f"{len(reasons)} of the record in the twin ({kinds})")]
