"""coqa: questions in a conversation about a story, answered in a few words.

    {story}

    Q: {earlier question}

    A: {its answer}

    Q: {question}

    A: {answer}

`f1` is the main figure, `em` the exact match, both over the accepted answers after SQuAD's normalisation: with several
of them each is left out in turn and the best of the others counts, as people are graded. Questions about one story
form a cluster. A row: context, prompt, references, and `extra.history` with the turns of the conversation.

Reddy et al. 2019, arXiv:1808.07042. Wording of lm-evaluation-harness, which asks the last question of each story only;
here each row is a question with its own history.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from modicum.core.files import fingerprint
from modicum.evaluate.multiple_choice import first
from modicum.evaluate.rows import FileConfig
from modicum.evaluate.tasks import Doc
from modicum.evaluate.tasks.generate import squad_normal, word_f1
from modicum.evaluate.written import Written, WrittenTask, extra_of

_TURN = re.compile(r"_turn(\d+)$")


NOT_MEASURABLE = "its questions are no part of modicum; modicum eval --tasks coqa --data FOLDER asks them"


@dataclass(frozen=True, kw_only=True)
class Config(FileConfig):
    """Where the conversations are."""


TOY = Config(file=str(Path(__file__).parent / "examples" / "stories.jsonl"))


class Coqa(WrittenTask):
    config: Config
    metric = "f1"
    stop = ("\nQ:",)
    max_new_tokens = 48

    def question(self, row: dict[str, Any], where: str) -> Written:
        story, query = first(row, ("context", "story"), where), first(row, ("prompt", "question"), where)
        turns = extra_of(row).get("history", [])
        turn_match = _TURN.search(str(row.get("id", "")))
        if turn_match:  # the whole conversation may stand in the row: only what came before may be shown
            turns = turns[: int(turn_match[1])]
        before = "".join(f"Q: {t['question']}\n\nA: {t['answer']}\n\n" for t in turns)
        answers = first(row, ("references", "answer"), where)
        answers = answers if isinstance(answers, list) else [answers]
        return Written(f"{story}\n\n{before}Q: {query}\n\nA:", answers, cluster=fingerprint(str(story)))

    def mark(self, reply: str, doc: Doc) -> dict[str, float]:
        given, wanted = squad_normal(reply), [squad_normal(a) for a in doc["answers"]]
        sets = [wanted[:i] + wanted[i + 1 :] for i in range(len(wanted))] if len(wanted) > 1 else [wanted]
        return {
            "f1": float(np.mean([max(word_f1(given, w) for w in others) for others in sets])),
            "em": float(np.mean([max(float(given == w) for w in others) for others in sets])),
            "unparsed": float(not given),
        }
