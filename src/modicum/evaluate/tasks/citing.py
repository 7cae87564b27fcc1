r"""citing: which result a mathematical text refers to: the form of CaseHOLD, of any LaTeX corpus with references.

    {sentence before} {sentence, its reference replaced by "the following result"}: {statement}

Statements are the bodies of lemmas, propositions and theorems with a \label; a question is a sentence elsewhere with
one \ref to such a statement. Wrong choices are the `wrong` statements nearest to the right one by TF-IDF that the
sentences around do not cite. A text that repeats five words in a row of the right statement is left out, as they would
give it away. Splits go by the statement: none that train questions cite is cited in the test. A row of the file: id and
text; the part of the id before its last colon names the chapter that references without a chapter mean.

Zheng et al. 2021, arXiv:2104.08671 (CaseHOLD), whose form it is; the generator is this project's.
"""

from __future__ import annotations

import random
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from modicum.core.errors import UserError
from modicum.evaluate.multiple_choice import ChoiceConfig, MultipleChoice, Question
from modicum.evaluate.rows import pick, read_rows
from modicum.evaluate.tasks import Doc

NOT_MEASURABLE = "it has no corpus of its own; bench task citing:file=FILE measures it on one with references"
STATEMENT = re.compile(r"\\begin\{(lemma|proposition|theorem)\}\s*\\label\{([^}]+)\}(.*?)\\end\{\1\}", re.DOTALL)
REFERENCE = re.compile(r"(?:[A-Z][\w ,]{0,40}, )?(?:Lemma|Proposition|Theorem)\s+\\ref\{([^}]+)\}")
PROOF = re.compile(r"\\begin\{proof\}(.*?)\\end\{proof\}", re.DOTALL)
LEAK = 5  # words in a row
LONGEST = 240  # characters of a statement, cut at a word


@dataclass(frozen=True, kw_only=True)
class Config(ChoiceConfig):
    wrong: int = 4  # other statements to choose from

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.wrong < 1:
            raise ValueError("wrong must be at least 1")


TOY = Config(file=str(Path(__file__).parent / "examples" / "lemmas.jsonl"), wrong=2)


class Citing(MultipleChoice):
    config: Config

    def docs(self, split: str, limit: int | None, seed: int) -> Iterator[Doc]:
        rows = [(str(pick(r, "id", self.config.file)), str(pick(r, "text", self.config.file))) for r in self._rows()]
        statements = read_statements(rows)
        if len(statements) <= self.config.wrong:
            raise UserError(
                f"{self.config.file} has {len(statements)} labelled lemmas, propositions and theorems; "
                f"a question needs {self.config.wrong + 1}"
            )
        neighbours = Neighbours(statements)
        questions = [q for q in citations(rows, statements) if (side(q[0]) == "test") == (split == "test")]
        random.Random(f"citing/{seed}").shuffle(questions)
        given = 0
        seen: set[str] = set()
        for label, context, cited in questions:
            wrong = neighbours.of(label, self.config.wrong, cited)
            if len(wrong) < self.config.wrong or label in seen:  # a statement is asked for once
                continue
            if limit is not None and given >= limit:
                return
            seen.add(label)
            given += 1
            order = random.Random(f"{label}/{context}").sample([label, *wrong], 1 + len(wrong))
            yield {
                "id": f"{label}/{zlib.crc32(context.encode()):08x}",
                "prompt": context,
                "choices": [statements[name] for name in order],
                "answer": order.index(label),
                "cluster": label.partition("-lemma")[0].partition("-prop")[0].partition("-theorem")[0],
            }

    def _rows(self) -> list[dict[str, Any]]:
        return read_rows(self.config.file)

    def question(self, row: dict[str, Any], where: str) -> Question:
        raise NotImplementedError("questions come from all rows together")


def side(label: str) -> str:
    """The split of every question that cites a statement."""
    return "test" if zlib.crc32(label.encode()) % 2 else "train"


def full(label: str, chapter: str) -> str:
    """A label with its chapter; in its own chapter a text leaves it out."""
    return f"{chapter}-{label}" if re.match(r"(lemma|proposition|theorem)-", label) else label


def chapter_of(row_id: str) -> str:
    return row_id.rpartition(":")[0].rpartition(":")[2]


def plain(text: str) -> str:
    """One line, without labels and comments; formulas stay."""
    text = re.sub(r"\\label\{[^}]*\}|(?<!\\)%.*", "", text)
    text = re.sub(r"\\(begin|end)\{(enumerate|itemize)\}|\\item(\[[^\]]*\])?|\\noindent", " ", text)
    return " ".join(text.split())


def read_statements(rows: list[tuple[str, str]]) -> dict[str, str]:
    """Statement by full label, cut to LONGEST characters; those with the same text count once."""
    statements: dict[str, str] = {}
    texts: set[str] = set()
    for row_id, text in rows:
        for match in STATEMENT.finditer(text):
            body = plain(match[3])
            body = body if len(body) <= LONGEST else body[:LONGEST].rpartition(" ")[0]
            if body and body not in texts and "\\ref" not in body:
                texts.add(body)
                statements[full(match[2], chapter_of(row_id))] = body
    return statements


def citations(rows: list[tuple[str, str]], statements: dict[str, str]) -> Iterator[tuple[str, str, set[str]]]:
    """(label, text that ends where the statement would stand, all labels cited there) of sentences of proofs."""
    for row_id, text in rows:
        chapter = chapter_of(row_id)
        for proof in PROOF.finditer(text):
            sentences = re.split(r"(?<=[.?!])\s+(?=[A-Z])", plain(proof[1]))
            for before, sentence in zip(["", *sentences], sentences, strict=False):
                labels = [full(m[1], chapter) for m in REFERENCE.finditer(sentence)]
                if len(labels) != 1 or labels[0] not in statements or "\\ref" in REFERENCE.sub("", sentence):
                    continue
                cited = {full(m[1], chapter) for m in REFERENCE.finditer(before)}
                if labels[0] in cited:
                    continue
                named = REFERENCE.sub("the following result", f"{before} {sentence}".strip())
                context = re.sub(r"\(?\\ref\{[^}]*\}\)?", "above", named).rstrip(".")
                if not leaks(context, statements[labels[0]]):
                    yield labels[0], f"{context}. Result:", cited | {labels[0]}


def leaks(context: str, statement: str) -> bool:
    """Whether LEAK words in a row of the statement stand in the context."""
    words, other = statement.lower().split(), f" {' '.join(context.lower().split())} "
    return any(f" {' '.join(words[i : i + LEAK])} " in other for i in range(len(words) - LEAK + 1))


class Neighbours:
    """Statements by cosine similarity of TF-IDF vectors."""

    def __init__(self, statements: dict[str, str]):
        from scipy.sparse import csr_matrix

        self.labels = list(statements)
        self.row = {label: i for i, label in enumerate(self.labels)}
        words = [re.findall(r"[a-z]{2,}", text.lower()) for text in statements.values()]
        column = {word: k for k, word in enumerate(dict.fromkeys(w for some in words for w in some))}
        rows = np.repeat(np.arange(len(words)), [len(some) for some in words])
        columns = [column[word] for some in words for word in some]
        counts = csr_matrix((np.ones(len(columns)), (rows, columns)), shape=(len(words), max(len(column), 1)))
        rarity = np.log(len(words) / np.maximum(np.asarray((counts > 0).sum(0)).ravel(), 1)) + 1
        weights = counts.multiply(rarity).tocsr()
        norms = np.sqrt(np.asarray(weights.multiply(weights).sum(1)).ravel())
        self.vectors = weights.multiply(1 / np.maximum(norms, 1e-12)[:, None]).tocsr()

    def of(self, label: str, count: int, without: set[str]) -> list[str]:
        """The `count` nearest others, nearest first; fewer where there are no more."""
        similar = np.asarray((self.vectors @ self.vectors[self.row[label]].T).todense()).ravel()
        order = (self.labels[i] for i in np.argsort(-similar, kind="stable"))
        near = [name for name in order if name != label and name not in without]
        return near[:count]
