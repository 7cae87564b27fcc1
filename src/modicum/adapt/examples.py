"""Question/answer pairs as training examples: read, split, formatted, encoded.

An example is a conversation whose last message is the assistant's. Its prompt is the output of `Tokenizer.chat`
before that message, its target the text that the template adds for the message, up to the token that ends it;
the two are encoded separately, as they are at inference. The loss is on the target alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from modicum.core.errors import UserError
from modicum.data.shards import MemoryDocuments
from modicum.data.tokenizer import Tokenizer

Message = dict[str, str]


@dataclass(frozen=True)
class Example:
    """messages: [{"role", "content"}, ...], the last one the assistant's."""

    id: str
    messages: tuple[Message, ...]

    @classmethod
    def of(cls, question: str, answer: str, id: str = "") -> Example:
        return cls(id, ({"role": "user", "content": question}, {"role": "assistant", "content": answer}))

    @property
    def key(self) -> str:
        """The question, normalised: examples with the same key are in the same split."""
        return " ".join(" ".join(m["content"] for m in self.messages[:-1]).split()).casefold()


@dataclass(frozen=True)
class Encoded:
    """ids: prompt and target, int32; given: number of prompt tokens."""

    ids: np.ndarray
    given: int

    def __len__(self) -> int:
        """Predictions: every token but the first."""
        return len(self.ids) - 1


def read_examples(path: str | Path) -> list[Example]:
    """From a JSONL file: one {"question", "answer"} or {"messages": [...]} per line.

    Raises `UserError` naming the first line that is neither.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no file {path}; give a JSONL file of question and answer, or a curated folder")
    examples = []
    try:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    examples.append(_example(line, f"{path}, line {number}", str(number)))
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error.reason}); give a JSONL file") from None
    if not examples:
        raise UserError(f'{path} holds no pairs; write one {{"question": ..., "answer": ...}} per line')
    return examples


def _example(line: str, where: str, number: str) -> Example:
    wanted = '{"question": "...", "answer": "..."} or {"messages": [{"role": ..., "content": ...}, ...]}'
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where} is not JSON ({error.msg}); write {wanted}") from None
    if isinstance(row, dict) and isinstance(row.get("messages"), list):
        messages = row["messages"]
        if not all(
            isinstance(m, dict) and all(isinstance(m.get(k), str) for k in ("role", "content")) for m in messages
        ):
            raise UserError(f"{where}: every message needs a role and a content, both text; write {wanted}")
        if len(messages) < 2 or messages[-1]["role"] != "assistant":
            raise UserError(f"{where}: the last of two or more messages must be the assistant's, the training target")
        turns = tuple({"role": m["role"], "content": m["content"]} for m in messages)
        return Example(str(row.get("id", number)), turns)
    if isinstance(row, dict) and isinstance(row.get("question"), str) and isinstance(row.get("answer"), str):
        return Example.of(row["question"], row["answer"], str(row.get("id", number)))
    raise UserError(f"{where} is neither a pair nor a conversation; write {wanted}")


def split(examples: Sequence[Example], fraction: float, seed: int = 0) -> tuple[list[Example], list[Example]]:
    """(train, held-out): about `fraction` of the questions are held out, the same ones on every machine.

    The split of a question depends on its text and the seed alone, so adding pairs moves none.
    """
    train: list[Example] = []
    heldout: list[Example] = []
    for example in examples:
        text = f"{seed}/{example.key}".encode("utf-8", "surrogatepass")
        draw = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") / 2.0**64
        (heldout if draw < fraction else train).append(example)
    if fraction > 0 and (not train or not heldout):
        raise UserError(
            f"{len(examples)} pairs with heldout={fraction} give {len(train)} to train on and "
            f"{len(heldout)} held out; give more pairs (hundreds), or another fraction"
        )
    return train, heldout


def sample(examples: Sequence[Example], limit: int | None) -> list[Example]:
    """At most `limit` of them in their order, the same ones on every machine."""
    if limit is None or len(examples) <= limit:
        return list(examples)
    ranks = [hashlib.blake2b(repr(e.messages).encode("utf-8", "surrogatepass")).digest() for e in examples]
    chosen = set(sorted(range(len(examples)), key=ranks.__getitem__)[:limit])
    return [example for i, example in enumerate(examples) if i in chosen]


def encode(example: Example, tokenizer: Tokenizer) -> Encoded:
    """Prompt and target token ids. The target ends with the token that ends the assistant's turn."""
    *before, last = example.messages
    prompt = tokenizer.chat(before)
    conversation = tokenizer.chat(example.messages, generate=False)
    if conversation.startswith(prompt):
        target = tokenizer.encode(conversation[len(prompt) :].rstrip(), specials=True)
        end = next((i for i, token in enumerate(target) if token in tokenizer.stop_ids), None)
        target = target if end is None else target[: end + 1]
    else:  # a template that writes the last turn differently when it is complete (thinking left out, ...)
        target = tokenizer.encode(last["content"], specials=False)
    if not target or target[-1] not in tokenizer.stop_ids:
        target = [*target, tokenizer.eos_id]
    given = tokenizer.encode(prompt, specials=True)
    return Encoded(np.array(given + target, np.int32), len(given))


@dataclass(frozen=True)
class Prepared:
    """Encoded examples that fit `length` predictions; counts of those that did not fit."""

    examples: list[Encoded]
    cut: int = 0  # truncated answers
    dropped: int = 0  # prompts without room for an answer

    @property
    def targets(self) -> int:
        return sum(len(e.ids) - e.given for e in self.examples)

    def documents(self, reserved: int = 0) -> MemoryDocuments:
        """The pairs as a stream reads them: one document each, with a loss on its answer alone."""
        return MemoryDocuments({"pairs": [(e.ids, e.given) for e in self.examples]}, reserved=reserved)


def prepare(examples: Iterable[Example], tokenizer: Tokenizer, length: int) -> Prepared:
    """Encode for sequences of `length` predictions: too long an answer is truncated, too long a prompt dropped."""
    return fit((encode(example, tokenizer) for example in examples), length)


def fit(encoded: Iterable[Encoded], length: int) -> Prepared:
    kept: list[Encoded] = []
    cut = dropped = 0
    for item in encoded:
        if item.given < 1 or item.given > length:
            dropped += 1
        elif len(item) > length:
            kept.append(Encoded(item.ids[: length + 1], item.given))
            cut += 1
        else:
            kept.append(item)
    return Prepared(kept, cut, dropped)
