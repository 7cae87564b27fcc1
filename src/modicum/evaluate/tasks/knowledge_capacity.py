"""knowledge-capacity: how many bits a model has stored about people it was trained on.

    {name} was born on {date}. She works for {employer}. ...        `style=full`: words and order new at every exposure
    {name}; She; {date}; {city}; ... {employer}.                    `style=short`: one rendering

    bits of a person = log2(N0 / e^p1) + sum_a log2(S_a / e^p2_a);      R = people x bits / parameters
    p1 = E[-ln p(name)], p2_a = E[-ln p(value_a | name, attribute a)],  summed over tokens

Training text holds each of `people` `exposures` times; the test is about the same people, as nothing else is in
question. The name is scored after the start token alone, every value after the name and words that ask for it (the
pronoun after a sentence about the city; in the short style after what stands before it). Terms below 0 count as 0,
attribute by attribute. `bits` is the figure per person, to be compared with `most_bits`; `known` the fraction of values
that greedy decoding gives. `biographies.Sizes` are the paper's: 47.6 bits of attributes, 27.3 of a name.

Allen-Zhu & Li 2024, arXiv:2404.05405 (Physics of Language Models 3.3), definitions 2.2, 4.1, 4.3, theorem 3.2.
Departs: made-up words of two syllables, 40 wordings an attribute instead of 50, no working city.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from modicum.core.errors import UserError
from modicum.evaluate.biographies import VERBS, People, Person, Sizes, learnt_bits, most_bits, sentences, short
from modicum.evaluate.playground import PlaygroundConfig
from modicum.evaluate.tasks import Choose, Doc, Task

CLAIM = {
    "figure": "2 bits a parameter at 1000 exposures, 1 at 100",
    "where": "results 1 and 3",
    "scale": "1M to 0.5B parameters, 10K to 10M people",
}
SWEEP = {"style": ("short",), "people": (150, 600, 1200)}


@dataclass(frozen=True, kw_only=True)
class Config(PlaygroundConfig):
    people: int = 1000
    exposures: int = 100  # of each person in the training text
    style: str = "full"  # or short
    examples: int = 500  # people who are tested, the first

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.people >= 1 and self.exposures >= 1, "people and exposures must be at least 1")
        self.require(self.style in ("full", "short"), "style must be full or short")


TOY = Config(people=20, exposures=3, examples=20)


class KnowledgeCapacity(Task):
    config: Config
    metric = "known"
    sizes = Sizes()

    def docs(self, split: str, limit: int | None, seed: int) -> Iterator[Doc]:
        c, people = self.config, People(self.sizes, seed)
        if split == "test":
            for i in range(min(c.people, c.examples if limit is None else limit)):
                person = people[i]
                yield self._doc(f"person-{seed}-{i}", person, self._text(person, Random(f"test/{seed}/{i}")))
        elif split == "train":
            count = c.people * c.exposures if limit is None else min(limit, c.people * c.exposures)
            for k in range(count):
                exposure, i = divmod(k, c.people)
                text = self._text(people[i], Random(f"train/{seed}/{i}/{exposure}"))
                yield self._doc(f"person-{seed}-{i}-{exposure}", people[i], text)
        else:
            raise UserError(f"split {split!r} is not known; allowed: train, test")

    def _doc(self, name: str, person: Person, text: str) -> Doc:
        return {"id": name, "prompt": text, "name": person.name, "values": person.values}

    def _text(self, person: Person, rng: Random) -> str:
        return short(person) if self.config.style == "short" else " ".join(sentences(person, rng))

    def requests(self, doc: Doc, shots: Sequence[Doc]) -> list[Any]:
        """The name, then each attribute of `Sizes.attributes`."""
        before = "".join(f"{self.text(shot)}\n\n" for shot in shots)
        name, values = doc["name"], doc["values"]
        requests = [Choose(before, (name,))]
        if self.config.style == "short":
            prompt = f"{before}{name};"
            for value in values.values():
                requests.append(Choose(prompt, (f" {value}",)))
                prompt += f" {value};"
            return requests
        city = f"{before}{name} {VERBS['city'][0]} {values['city']}."
        prompts = {"pronoun": city} | {kind: f"{before}{name} {verbs[0]}" for kind, verbs in VERBS.items()}
        return requests + [Choose(prompts[kind], (f" {values[kind]}",)) for kind in self.sizes.attributes()]

    def grade(self, doc: Doc, replies: Sequence[Any]) -> dict[str, float]:
        scores = [reply[0] for reply in replies]
        kinds = self.sizes.attributes()
        nats = {f"nats_{kind}": -s.nats for kind, s in zip(kinds, scores[1:], strict=True)}
        known = sum(s.greedy for s in scores[1:]) / len(kinds)
        return {"known": float(known), "nats_name": -scores[0].nats} | nats

    def aggregate(self, rows: Sequence[dict[str, float]]) -> dict[str, dict[str, float]]:
        figures = super().aggregate(rows)
        if rows and "nats_name" in rows[0]:
            nats = {kind: figures[f"nats_{kind}"]["value"] for kind in self.sizes.attributes()}
            bits = learnt_bits(figures["nats_name"]["value"], nats, self.sizes)
            counted = {"stderr": float("nan"), "documents": len(rows)}
            figures["bits"] = {"value": bits} | counted
            figures["most_bits"] = {"value": most_bits(self.config.people, self.sizes)} | counted
        return figures

    def text(self, doc: Doc) -> str:
        text: str = doc["prompt"]
        return text
