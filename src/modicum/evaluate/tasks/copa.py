"""copa: the likelier cause or effect of an everyday event, two choices.

    {premise without its full stop} because|therefore {choice, its first letter small}

The main figure is acc. The file has the data set's columns (premise, question, choice1, choice2, label) or a question
that ends in "What was the cause?" or "What happened as a result?", choices, answer; 100 validation rows.

Roemmele et al. 2011 (SuperGLUE: Wang et al. 2019, arXiv:1905.00537). Wording of lm-evaluation-harness, which writes two
spaces before a choice; so is it written here, or nats would differ.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modicum.evaluate.multiple_choice import ChoiceConfig, MultipleChoice, Question, first

ENDINGS = {"What was the cause?": "cause", "What happened as a result?": "effect"}


NOT_MEASURABLE = "its questions are no part of modicum; modicum eval --tasks copa --data FOLDER asks them"


@dataclass(frozen=True, kw_only=True)
class Config(ChoiceConfig):
    """Where the questions are, and how they are scored."""

    normalise: str = "none"


TOY = Config(file=str(Path(__file__).parent / "examples" / "choice.jsonl"))


class Copa(MultipleChoice):
    config: Config
    delimiter = "  "

    def question(self, row: dict[str, Any], where: str) -> Question:
        query = str(first(row, ("question",), where)).strip()
        if "premise" in row:
            premise, kind = str(row["premise"]).strip(), query
            choices = [row["choice1"], row["choice2"]]
        else:
            ending = next((e for e in ENDINGS if query.endswith(e)), None)
            premise, kind = (query.removesuffix(ending).strip(), ENDINGS[ending]) if ending else (query, "effect")
            choices = first(row, ("choices",), where)
        word = "because" if kind == "cause" else "therefore"
        small = [str(c)[:1].lower() + str(c)[1:] for c in choices]
        answer = first(row, ("label", "answer"), where)
        if isinstance(answer, str) and answer in choices:
            answer = list(choices).index(answer)
        return Question(f"{premise[:-1] if premise.endswith('.') else premise} {word}", small, answer)
