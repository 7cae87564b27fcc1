"""The playground: synthetic tasks with seeded generators and exact grading.

Each task draws its documents from a generator seeded by (seed, split, index), so document i is the same
whatever the limit, and the splits never share a stream. The text is made of a few hundred common
words in short plain sentences: small BPE vocabularies cover it, and small decoders can learn it from `text`.
"""

from __future__ import annotations

import zlib
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from modicum.core.errors import UserError
from modicum.evaluate.tasks import Doc, Generate, Task

_NOUNS = (
    "apple arm baby ball band bank barn bath beach bear bed bell belt bench bird boat body bone book "
    "boot bottle bowl box boy branch bread bridge brother brush bucket building bus bush butter button "
    "cake camp candle cap car card cart castle cat cave chain chair cheese child church circle city "
    "class clock cloth cloud coat coin cook corn corner cotton country cow cream crowd crown cup "
    "daughter desk dish doctor dog door dress drum duck ear egg engine eye face farm father fence field "
    "finger fire fish flag floor flower foot forest fork fox friend frog fruit garden gate girl glass "
    "goat gold grass group hair hall hammer hand hat head heart hen hill horse hospital house ice "
    "island jar jewel judge key king kitchen kite knee knife lake lamp leaf leg letter library lion lip "
    "lock lunch machine map market mask meal milk mill mirror money monkey moon mother mountain mouse "
    "mouth music nail neck needle nest net night nose nut oil onion orange oven owl page paint paper "
    "park path pen pencil pet picture pig pin pipe plant plate pocket pond pot potato queen rabbit rail "
    "rain rat rice ring river road rock roof room root rope rose sail salt sand school sea seat seed "
    "sheep shell ship shirt shoe shop silver sister skin sky snake snow soap sock soup spoon spring "
    "square stamp star station stem stick stone store storm stove street string sugar summer sun table "
    "tail teacher tent thread ticket tiger toe tongue tooth tower town toy train tree truck valley vest "
    "village voice wall watch water wheel wind window wing winter wolf wood worm writer yard "
)
_ADJECTIVES = (
    "big black blue bright brown clean cold cool dark deep dry early easy fast fine flat free fresh "
    "full good gray great green happy hard heavy high hot kind large late light little long loud low "
    "new nice old open pink poor quick quiet red rich round sad safe sharp short slow small soft strong "
    "sweet tall thick thin tiny warm weak wet white wide wild wise yellow young "
)
_VERBS = (
    "bought brought called carried caught cleaned covered crossed drew fed filled followed found held "
    "helped hid kept left liked lost loved met missed moved needed opened painted passed pulled pushed "
    "reached saved saw sold sent showed shut stopped took touched turned used visited wanted washed "
    "watched won "
)
NOUNS, ADJECTIVES, VERBS = _NOUNS.split(), _ADJECTIVES.split(), _VERBS.split()


@dataclass(frozen=True, kw_only=True)
class PlaygroundConfig:
    """examples: documents per split unless a limit is given."""

    examples: int = 200

    def __post_init__(self) -> None:
        if self.examples < 1:
            raise ValueError("examples must be at least 1")

    def require(self, holds: bool, message: str) -> None:
        if not holds:
            raise ValueError(message)


def sentence(rng: Random) -> str:
    """Seven words that say nothing of use."""
    return (
        f"The {rng.choice(ADJECTIVES)} {rng.choice(NOUNS)} {rng.choice(VERBS)} the "
        f"{rng.choice(ADJECTIVES)} {rng.choice(NOUNS)}."
    )


def scatter(rng: Random, facts: Sequence[str], n_words: int, depths: Sequence[float] | None = None) -> str:
    """A text of about `n_words` words with `facts` in it, at random places (or at `depths` in [0, 1])."""
    own = sum(len(fact.split()) for fact in facts)
    filler = [sentence(rng) for _ in range(max(0, round((n_words - own) / 7)))]
    if depths is None:
        facts = rng.sample(list(facts), len(facts))
        positions = sorted(rng.randint(0, len(filler)) for _ in facts)
    else:
        positions = [round(depth * len(filler)) for depth in depths]
    out: list[str] = []
    done = 0
    for position, fact in sorted(zip(positions, facts, strict=True), key=lambda item: item[0]):
        out += [*filler[done:position], fact]
        done = position
    return " ".join(out + filler[done:])


def lead(prompt: str) -> str:
    """The unfinished sentence at a prompt's end, which the answer completes."""
    return prompt.rpartition(". ")[2].rpartition("\n")[2]


def normal(text: str) -> list[str]:
    """Words of an answer as they are compared: lower case, no punctuation around them."""
    words = (word.strip(".,;:!?\"'()[]") for word in text.lower().split())
    return [word for word in words if word]


class Playground(Task):
    """Base of the synthetic tasks: a subclass makes one document from a seeded generator."""

    answer_words = 4  # of the longest answer: how far to generate

    @abstractmethod
    def make(self, rng: Random) -> tuple[str, str]:
        """(prompt, answer): the prompt ends where the answer begins, without a trailing space."""

    def docs(self, split: str, limit: int | None, seed: int) -> Iterator[Doc]:
        if split not in ("train", "test"):
            raise UserError(f"split {split!r} is not known; allowed: train, test")
        name = type(self).__name__.lower()
        for index in range(self.config.examples if limit is None else limit):
            rng = Random(zlib.crc32(f"{name}/{split}".encode()) << 64 | (seed & 0xFFFFFFFF) << 32 | index)
            prompt, answer = self.make(rng)
            yield {"id": f"{name}-{split}-{seed}-{index}", "prompt": prompt, "answer": answer}

    def requests(self, doc: Doc, shots: Sequence[Doc]) -> list[Any]:
        prompt = "\n\n".join([self.text(shot) for shot in shots] + [doc["prompt"]])
        # a word of the lists is at most four tokens even of a byte-level vocabulary of a thousand
        words = max(self.answer_words, len(doc["answer"].split()))
        return [Generate(prompt, 4 * words + 4, ("\n", "."), lead(prompt), self.steps(doc))]

    def steps(self, doc: Doc) -> tuple[str, ...]:
        """An outline of sub-problems, for solvers (`tasks.Generate.steps`)."""
        return ()

    def extract(self, reply: str) -> str:
        return " ".join(normal(reply))

    def grade(self, doc: Doc, replies: Sequence[Any]) -> dict[str, float]:
        """accuracy: the whole answer is right. words: the share of its words that are, place by place."""
        given, wanted = normal(replies[0]), normal(doc["answer"])
        same = sum(a == b for a, b in zip(given, wanted, strict=False))
        return {"accuracy": float(given == wanted), "words": same / len(wanted)}

    def text(self, doc: Doc) -> str:
        return f"{doc['prompt']} {doc['answer']}."
