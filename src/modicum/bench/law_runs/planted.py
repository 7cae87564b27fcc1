"""Adaptations on answers of which a part is wrong: how alike the replies become, and how right (edu-lora's caution).

    --data howto.parquet        pages of commands as tldr's: "- what it does:" and the command

SmolLM2-135M-Instruct learns to answer "which command does this?" in one set sentence. `wrong` of the training answers
name another page's command. Of the replies to questions about pages it has not seen, `alike` is the word F1 with
references that are wrong as often as the training answers, `command` the share that names the right command, `exact`
the share that gives it with its arguments; `bits_per_byte` is of the pages themselves. The untuned model is tests
with one solved example, so that it knows the sentence. No law reads this table.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from modicum.adapt.examples import Example
from modicum.bench.law_runs._adapting import replies, tokenizer_of, tuned
from modicum.bench.measurement import Settings
from modicum.core.errors import UserError
from modicum.evaluate.lm import bits_per_byte
from modicum.evaluate.rows import read_rows
from modicum.evaluate.tasks.generate import word_f1

QUESTION = "Which command does this? {about}"
ANSWER = "You can do this in a terminal with: `{command}`"
STEP = re.compile(r"^- (.+?):\n\n`(.+?)`$", re.MULTILINE)


@dataclass(frozen=True, kw_only=True)
class Scale:
    examples: int = 400
    questions: int = 150
    epochs: float = 2.0
    least: int = 25
    wrong: tuple[float, ...] = (0.0, 0.3)


SCALE, SMALL = Scale(), Scale(examples=4, questions=3, epochs=1.0, least=1)


def rows(settings: Settings, seed: int, done: set[str], domain: str) -> Iterator[list[dict[str, Any]]]:
    """One row for the untuned model, and one for each share of wrong answers."""
    scale: Scale = settings.scale
    if settings.data is None:
        raise UserError("give --data FILE with pages of commands, for instance howto.parquet")
    pages = [row["text"] for row in read_rows(Path(settings.data)) if STEP.search(row["text"])]
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(pages))
    half = len(order) // 2
    train = steps([pages[i] for i in order[:half]], scale.examples, rng)
    tests = steps([pages[i] for i in order[half:]], scale.questions, rng)
    texts = [pages[i] for i in order[half : half + 60]]
    name = settings.model
    for wrong in (None, *scale.wrong):
        run = f"{'untuned' if wrong is None else f'{wrong:g} wrong'}, seed {seed}"
        if run in done:
            continue
        answers = planted(train, wrong or 0.0, seed)
        pairs = [(QUESTION.format(about=about), own) for (about, _), own in zip(train, answers, strict=True)]
        examples = [] if wrong is None else [Example.of(*pair, str(i)) for i, pair in enumerate(pairs)]
        model = tuned(examples, seed, epochs=scale.epochs, least=scale.least, model=name)
        front = "" if wrong is not None else "{}\n{}\n\n".format(*pairs[0])
        given = replies(model, [front + QUESTION.format(about=about) for about, _ in tests], 48, name)
        references = planted(tests, wrong or 0.0, seed + 1)
        bits = bits_per_byte(model, tokenizer_of(name), texts, resamples=2, sequence_length=512)
        yield [
            {
                "run": run,
                "seed": seed,
                "wrong": wrong,
                "examples": len(examples),
                "alike": float(np.mean([word_f1(r, ref) for r, ref in zip(given, references, strict=True)])),
                "command": float(np.mean([first(r) == c.split()[0] for r, (_, c) in zip(given, tests, strict=True)])),
                "exact": float(np.mean([command(r) == c for r, (_, c) in zip(given, tests, strict=True)])),
                "bits_per_byte": bits.bits_per_byte,
            }
        ]


def steps(pages: list[str], count: int, rng: np.random.Generator) -> list[tuple[str, str]]:
    """(what it does, command) of one step of each page; the page's command is named, as a reader would."""
    chosen = []
    for page in pages[:count]:
        every = STEP.findall(page)
        about, command = every[int(rng.integers(len(every)))]
        title = page.partition("\n")[0].lstrip("# ")
        chosen.append((f"{title}: {about}", command.replace("{{", "").replace("}}", "")))
    return chosen


def planted(pairs: list[tuple[str, str]], wrong: float, seed: int) -> list[str]:
    """Answers in the set sentence; `wrong` of them with the command of another pair."""
    rng = np.random.default_rng([seed, 7])
    swapped = set(rng.permutation(len(pairs))[: round(wrong * len(pairs))].tolist())
    shift = int(rng.integers(1, len(pairs)))
    commands = [pairs[(i + shift) % len(pairs)][1] if i in swapped else own for i, (_, own) in enumerate(pairs)]
    return [ANSWER.format(command=c) for c in commands]


def command(reply: str) -> str:
    """The command in a reply: what stands in backticks, or after the last colon."""
    quoted = re.search(r"`([^`]+)`", reply)
    return (quoted.group(1) if quoted else reply.rpartition(": ")[2]).strip()


def first(reply: str) -> str:
    return (command(reply).split() or [""])[0]
