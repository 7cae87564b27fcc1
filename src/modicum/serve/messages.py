"""Conversations as prompts of an engine: token ids by the model's own chat template, and replies to many at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from modicum.serve.request import SamplingParams

Messages = list[dict[str, str]]
REPETITION = 0.1  # taken off the logit of a token for each time the reply has it; ends loops of small models


def without_specials(tokenizer: Any) -> Callable[[str], str]:
    """Breaks up the names of special tokens in a text: a quoted passage must not open a turn of its own."""
    specials = [t.content for t in tokenizer.backend.get_added_tokens_decoder().values() if t.special]

    def plain(text: str) -> str:
        for name in specials:
            text = text.replace(name, name[:1] + " " + name[1:])
        return text

    return plain


def prompt_ids(tokenizer: Any, messages: Sequence[dict[str, str]]) -> list[int]:
    """The prompt's token ids, ending where the assistant begins to speak; special tokens in messages are broken up."""
    plain = without_specials(tokenizer)
    prompt = tokenizer.chat([{**m, "content": plain(m["content"])} for m in messages])
    return list(tokenizer.encode(prompt, specials=True, add_special=False))


def greedy_params(max_tokens: int) -> SamplingParams:
    """The likeliest token each time, with a mild penalty on what the reply has; the prompt may be quoted freely."""
    return SamplingParams(temperature=0, max_tokens=max_tokens, frequency_penalty=REPETITION)


def replies(
    engine: Any,
    conversations: Sequence[Sequence[dict[str, str]]],
    params: SamplingParams,
    *,
    progress: Callable[[int], None] | None = None,
) -> list[str]:
    """The reply to each conversation, in order; they run in the engine's batches.

    progress: called with the number of replies just finished.
    """
    prompts = [prompt_ids(engine.tokenizer, messages) for messages in conversations]
    outputs = engine.generate(prompts, params, progress=progress)
    return [output.text.strip() for output in outputs]
