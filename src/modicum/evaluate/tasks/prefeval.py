"""prefeval: does a model still follow a preference after other talk? Four answers, of which one does.

    User: {preference}            Assistant: {acknowledgement}
    User: ...                     Assistant: ...                 `filler` exchanges about something else
    User: {question that tempts to forget it}
    Assistant: {option}

Every option is scored after the conversation (`evaluate/multiple_choice.py`); the main figure is acc_norm, chance a
quarter. The right option comes first in the published file, so the options are put in an order drawn from the item's
id: the same under every strategy and length, so that these can be compared in pairs. `strategy=remind` adds a sentence
to the question, `retrieve` quotes the five earlier exchanges that share most rare words with it. Exchanges come from
`filler_file`, dialogues of "User:" and "System:" lines. A conversation that does not fit into the model's context is
refused, since cutting its beginning would cut the preference. Topics form the clusters of the standard error.

Zhao et al. 2025, arXiv:2502.09597 (ICLR 2025), the classification form with stated preferences. Departs: the
acknowledgement is one sentence for all models, not the model's own; retrieval is by words instead of sentence
embeddings; forms that need a judge or several calls (generation, self-critic, chain of thought) and implied
preferences are not there; rows that repeat a pair of preference and question are left out.
"""

from __future__ import annotations

import itertools
import math
import random
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modicum.core.errors import UserError
from modicum.evaluate.multiple_choice import ChoiceConfig, MultipleChoice, Question, first
from modicum.evaluate.rows import pick, read_rows
from modicum.evaluate.tasks import Doc

CLAIM = {
    "figure": "Llama-3-8B 85, 55, 42% with 0, 3, 8 exchanges between; reminded 94, 80, 59%",
    "where": "Figure 6",
    "scale": "8B parameters",
}
NOT_MEASURABLE = "its questions are no part of modicum; modicum eval --tasks prefeval:file=FILE asks them"
NOTED = "Thank you for telling me. I will keep that in mind."
REMINDER = " Please answer so that it agrees with what I told you about my preferences before."
QUOTED = 5  # exchanges that `retrieve` puts before the question
STRATEGIES = ("none", "remind", "retrieve")


@dataclass(frozen=True, kw_only=True)
class Config(ChoiceConfig):
    filler: int = 0  # exchanges between preference and question
    filler_file: str = ""  # dialogues they are taken from: rows with a text of "User:" and "System:" lines
    strategy: str = "none"  # none, remind or retrieve

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.filler < 0 or self.strategy not in STRATEGIES:
            raise ValueError(f"filler must be 0 or more, strategy one of {', '.join(STRATEGIES)}")
        if self.filler and not self.filler_file:
            raise ValueError(f"filler={self.filler} needs filler_file=PATH, dialogues of User: and System: lines")
        if self.form != "cloze":
            raise ValueError("form=cloze is the only one here: the options are the assistant's own words")


TOY = Config(file=str(Path(__file__).parent / "examples" / "preferences.jsonl"))


class PrefEval(MultipleChoice):
    config: Config
    whole = True

    def docs(self, split: str, limit: int | None, seed: int) -> Iterator[Doc]:
        exchanges = read_exchanges(self.config.filler_file) if self.config.filler else []
        if len(exchanges) < self.config.filler:
            raise UserError(f"{self.config.filler_file} has {len(exchanges)} exchanges, filler={self.config.filler}")
        self._exchanges = exchanges
        seen: set[str] = set()
        for doc in super().docs(split, None, seed):
            utterance = repr((doc["prompt"].partition("\n")[0], doc["prompt"].rpartition("User:")[2]))
            if utterance not in seen and (limit is None or len(seen) < limit):
                seen.add(utterance)
                yield doc

    def question(self, row: dict[str, Any], where: str) -> Question:
        preference, request = (str(pick(row, name, where)) for name in ("preference", "question"))
        options = [str(o) for o in first(row, ("options", "choices"), where)]
        rng = random.Random(f"{row.get('id')}/{preference}/{request}")
        order = rng.sample(range(len(options)), len(options))
        between = rng.sample(self._exchanges, self.config.filler) if self.config.filler else []
        talk = [(preference, NOTED), *between]
        if self.config.strategy == "remind":
            request += REMINDER
        elif self.config.strategy == "retrieve":
            quoted = "\n".join(
                f"- {utterance}" for utterance in relevant(request, [utterance for utterance, _ in talk], QUOTED)
            )
            request = f"Earlier I said:\n{quoted}\n{request}"
        lines = "".join(f"User: {utterance}\nAssistant: {reply}\n" for utterance, reply in talk)
        topic = row.get("topic")
        return Question(
            f"{lines}User: {request}\nAssistant:",
            [options[i] for i in order],
            order.index(0),
            None if topic is None else str(topic),
        )


def read_exchanges(path: str) -> list[tuple[str, str]]:
    """(what the user said, what the system answered) of every dialogue of a file, in order."""
    pairs = []
    for row in read_rows(path):
        lines = [line for line in str(pick(row, "text", path)).splitlines() if line.strip()]
        for utterance, answer in itertools.pairwise(lines):
            if utterance.startswith("User:") and answer.startswith("System:"):
                pairs.append((utterance[5:].strip(), answer[7:].strip()))
    return pairs


def relevant(query: str, texts: list[str], count: int) -> list[str]:
    """The `count` texts that share most with the query, words weighed by how rare they are; in order."""
    bags = [Counter(re.findall(r"[a-z]+", text.lower())) for text in texts]
    seen = Counter(word for bag in bags for word in bag)
    wanted = set(re.findall(r"[a-z]+", query.lower()))
    weights = {word: math.log((1 + len(texts)) / (0.5 + seen[word])) for word in wanted}
    scores = [sum(w for word, w in weights.items() if word in bag) / (1 + len(bag)) ** 0.5 for bag in bags]
    best = sorted(range(len(texts)), key=lambda i: (-scores[i], i))[:count]
    return [texts[i] for i in sorted(best)]
