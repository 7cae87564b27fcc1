"""What the OpenAI-compatible server writes: completions and chat completions, whole or in chunks."""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import Sequence
from typing import Any

from modicum.serve.request import Completion, TokenLogprob
from modicum.serve.tools import ToolFormat, read_calls


def usage(prompt: int, completion: int, cached: int) -> dict[str, Any]:
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


class Format:
    """Answers of one endpoint: `chat` or legacy completion, whole or in chunks."""

    def __init__(self, chat: bool, model: str, tokenizer: Any, tools: tuple[ToolFormat, Sequence[str]] | None = None):
        """tools: how the model writes calls, and the names of the functions it may call."""
        self.chat, self.model, self.tokenizer, self.tools = chat, model, tokenizer, tools
        self.id = f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}"
        self.created = int(time.time())

    def _shell(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }

    def whole(
        self,
        completions: list[tuple[int, Completion]],
        used: dict[str, Any],
        sources: list[dict[str, Any]] | None = None,
    ) -> dict[str, Any]:
        """`completions` with the index each choice gets; `sources` of a grounded answer."""
        choices = []
        for index, c in completions:
            choice: dict[str, Any] = {
                "index": index,
                "finish_reason": c.finish,
                "logprobs": self.logprobs(c.logprobs),
            }
            if self.chat:
                text, calls = read_calls(c.text, *self.tools) if self.tools else (c.text, [])
                choice["message"] = {"role": "assistant", "content": text, "refusal": None}
                if calls:
                    choice["message"] |= {"content": text or None, "tool_calls": calls}
                    choice["finish_reason"] = "tool_calls" if c.finish == "stop" else c.finish
            else:
                choice["text"] = c.text
            choices.append(choice)
        extra: dict[str, Any] = {"usage": used} | ({} if sources is None else {"sources": sources})
        return self._shell("chat.completion" if self.chat else "text_completion", choices) | extra

    def chunk(
        self,
        index: int,
        text: str,
        logprobs: list[TokenLogprob],
        finish: str | None,
        first: bool = False,
        offset: int = 0,
    ) -> dict[str, Any]:
        choice: dict[str, Any] = {
            "index": index,
            "finish_reason": finish,
            "logprobs": self.logprobs(logprobs, offset),
        }
        if self.chat:
            choice["delta"] = {"role": "assistant", "content": text} if first else {"content": text} if text else {}
        else:
            choice["text"] = text
        return self._shell("chat.completion.chunk" if self.chat else "text_completion", [choice])

    def calls(self, index: int, text: str, finish: str | None) -> dict[str, Any]:
        """The last chunk of an answer that may hold calls, whose text was kept back until it was whole."""
        assert self.tools is not None
        shown, calls = read_calls(text, *self.tools)
        delta: dict[str, Any] = {"content": shown} if shown else {}
        if calls:
            delta["tool_calls"] = [{"index": i} | call for i, call in enumerate(calls)]
        reason = "tool_calls" if calls and finish == "stop" else finish
        choice = {"index": index, "finish_reason": reason, "logprobs": None, "delta": delta}
        return self._shell("chat.completion.chunk", [choice])

    def last(self, used: dict[str, Any]) -> dict[str, Any]:
        return self._shell("chat.completion.chunk" if self.chat else "text_completion", []) | {"usage": used}

    def logprobs(self, entries: list[TokenLogprob], offset: int = 0) -> dict[str, Any] | None:
        if not entries:
            return None
        if self.chat:
            return {
                "content": [
                    self._entry(e.token, e.logprob) | {"top_logprobs": [self._entry(t, p) for t, p in e.top]}
                    for e in entries
                ],
                "refusal": None,
            }
        tokens = [self._text(e.token) for e in entries]
        offsets = [offset + sum(map(len, tokens[:i])) for i in range(len(tokens))]
        return {
            "tokens": tokens,
            "token_logprobs": [None if math.isnan(e.logprob) else e.logprob for e in entries],
            "text_offset": offsets,
            "top_logprobs": [{self._text(t): p for t, p in e.top} if e.top else None for e in entries],
        }

    def _text(self, token: int) -> str:
        return str(self.tokenizer.decode([token], skip_special=False))

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        text = self._text(token)
        return {"token": text, "logprob": logprob, "bytes": list(text.encode("utf-8"))}
