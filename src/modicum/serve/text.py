"""Tokens to text while they come: no half characters, no half stop strings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

UNFINISHED = "\ufffd"  # what a decoder shows for bytes that are no character (yet)
MOST_PENDING = 3  # an unfinished UTF-8 character has at most three bytes
KEEP, LONGEST = 4, 12  # tokens of context kept; tokens after which the window is cut


class Decodes(Protocol):
    def decode(self, ids: list[int], /) -> str: ...


class TextStream:
    """Feed it sampled tokens; it gives the text that no later token can change.

    Decoding starts a few tokens before the end of the prompt, because a tokenizer may treat the first
    token of a text in its own way (a space left out). Text is held back while it ends in an unfinished
    character, or in something that could become a stop string. `stopped` is set once one was found;
    the text before it is the last.
    """

    def __init__(self, tokenizer: Decodes, stop: Sequence[str] = (), context: Sequence[int] = ()):
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._ids = list(context)[-KEEP:]
        self._shown = len(tokenizer.decode(self._ids)) if self._ids else 0
        self._pending_text = ""
        self.stopped: str | None = None

    def push(self, token: int) -> str:
        """New text after one more token."""
        self._ids.append(token)
        text = self._tokenizer.decode(self._ids)
        pending = 0
        while pending < min(MOST_PENDING, len(text)) and text[-1 - pending] == UNFINISHED:
            pending += 1
        end = len(text) - pending
        new, self._shown = text[self._shown : end], max(self._shown, end)
        if not pending and len(self._ids) > LONGEST:
            self._ids = self._ids[-KEEP:]
            self._shown = len(self._tokenizer.decode(self._ids))
        return self._release(new)

    def finish(self) -> str:
        """What was held back, when no more tokens come."""
        if self.stopped is not None:
            return ""
        text = self._tokenizer.decode(self._ids)[self._shown :] if self._ids else ""
        self._shown += len(text)
        text = self._release(text)
        rest, self._pending_text = self._pending_text, ""
        return text + rest

    def _release(self, new: str) -> str:
        if not self._stop or self.stopped is not None:
            return "" if self._stop else new
        text = self._pending_text + new
        matches = [(at, s) for s in self._stop if (at := text.find(s)) >= 0]
        if matches:
            at, self.stopped = min(matches)
            self._pending_text = ""
            return text[:at]
        keep = 0
        for s in self._stop:
            for n in range(min(len(s) - 1, len(text)), keep, -1):
                if text.endswith(s[:n]):
                    keep = n
                    break
        self._pending_text = text[len(text) - keep :]
        return text[: len(text) - keep]
