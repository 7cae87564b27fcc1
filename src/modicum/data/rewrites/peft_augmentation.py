"""peft-augmentation: more examples of a small set, by words changed at random or by translation there and back.

    eda                a n words replaced by a synonym, a n synonyms inserted, a n pairs of words swapped, each word
                       deleted with probability a; n words in the text
    back-translation   the text into another language and back, by the generator

Copies keep the example's label and metadata, and its origin, so that no copy of a held-out example is trained on. Each
says so in its domain. Synonyms come from `synonyms`, a file with a word and its synonyms on each line; without one,
nothing is replaced or inserted: wrong synonyms turn the label.

Wei & Zou 2019, "EDA" (arXiv:1901.11196), section 2, as crossed with adapters by Zhang et al. 2023 (arXiv:2303.02577).
The paper's other halves, mixup and a contrastive term between examples, are the objectives `mixup` and `supcon`, whose
bench crosses them with these copies. Departs: no WordNet.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from modicum.core.errors import UserError
from modicum.data.document import Document, Drop
from modicum.data.replies import ask
from modicum.data.rewrites import Rewriter, Rounds, sampling
from modicum.data.rewrites._text import count, plain

CLAIM = {"figure": "half the examples suffice (EDA)", "where": "EDA, section 3", "scale": "five text sets, RNN and CNN"}
NOT_MEASURABLE = (
    "the port's bench asks for text, not labelled examples: measured beside the objectives supcon and mixup"
)


@dataclass(frozen=True, kw_only=True)
class Config:
    op: str = "eda"  # eda, back-translation
    alpha: float = 0.1  # part of the words changed by each of the four changes
    copies: int = 4  # of each example; the paper's 16 at 500 examples, 8 at 2,000, 4 above
    synonyms: str | None = None  # file: a word and its synonyms on each line
    language: str = "French"  # of the translation
    tokens: int = 200  # of an example that is translated at most
    temperature: float = 0.7
    top_p: float = 0.95

    def __post_init__(self) -> None:
        if self.op not in ("eda", "back-translation") or not 0 <= self.alpha <= 1 or self.copies < 1:
            raise ValueError("op is eda or back-translation, alpha lies in [0, 1], copies is at least 1")


class PeftAugmentation(Rewriter):
    config: Config
    generates = False

    def __init__(self, config: Config):
        super().__init__(config)
        self.generates = config.op == "back-translation"  # type: ignore[misc]
        self.synonyms = read_synonyms(config.synonyms) if config.synonyms else {}

    def rewrite(self, document: Document, rng: np.random.Generator) -> Rounds:
        config, texts = self.config, list[str]()
        if count(document.text) < 2:
            return [document]
        if config.op == "eda":
            texts = [augmented(document.text, config.alpha, self.synonyms, rng) for _ in range(config.copies)]
        else:
            most = {"max_tokens": 2 * config.tokens} | sampling(config)
            if count(document.text) > config.tokens:
                return [document, Drop(f"{document.id}#{self.key}", "too-long", f"above {config.tokens} tokens")]
            there = f"Translate into {config.language}. Write only the translation.\n\n"
            back = "Translate into English. Write only the translation.\n\n"
            abroad = yield [ask(there + document.text, **most) for _ in range(config.copies)]
            replies = yield [ask(back + plain(reply.text), **most) for reply in abroad]
            texts = [plain(reply.text) for reply in replies if reply.ended != "length"]
        unlike = dict.fromkeys(t for t in texts if t.strip() and t != document.text)
        return [document, *(self.made(document, t, f"-{k}", "augmented") for k, t in enumerate(unlike))]


def augmented(text: str, alpha: float, synonyms: dict[str, list[str]], rng: np.random.Generator) -> str:
    """One copy of the text's words, changed in all four ways."""
    words = text.split()
    number = max(1, round(alpha * len(words))) if alpha else 0
    known = [i for i, w in enumerate(words) if w.lower() in synonyms]
    for i in rng.permutation(known)[:number]:
        words[int(i)] = _synonym(words[int(i)], synonyms, rng)
    for i in rng.permutation(known)[:number]:
        word = text.split()[int(i)]
        words.insert(int(rng.integers(len(words) + 1)), _synonym(word, synonyms, rng))
    for _ in range(number):
        i, j = (int(x) for x in rng.integers(len(words), size=2))
        words[i], words[j] = words[j], words[i]
    kept = [w for w, x in zip(words, rng.random(len(words)), strict=True) if x >= alpha]
    return " ".join(kept or [words[int(rng.integers(len(words)))]])


def _synonym(word: str, synonyms: dict[str, list[str]], rng: np.random.Generator) -> str:
    return str(rng.choice(synonyms[word.lower()]))


@functools.lru_cache(maxsize=4)
def read_synonyms(path: str) -> dict[str, list[str]]:
    """{word: synonyms} of a file with a word and its synonyms on each line. Raises `UserError`."""
    try:
        rows = [line.split() for line in Path(path).read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"synonyms={path} cannot be read ({error}); give a file with a word and its synonyms a line"
        ) from None
    return {row[0].lower(): row[1:] for row in rows if len(row) > 1}
