"""What the OpenAI-compatible server reads and writes: request bodies, answers, errors.

Bodies are checked strictly (a number is not a string); a field that is unknown, or known but not
served, is refused by name rather than passed over. Fields that only concern the operator of a hosted
service (user, metadata, store, ...) are accepted and unused.
"""

from __future__ import annotations

import json
import time
import uuid
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from modicum.serve.request import Completion, InvalidRequest, SamplingParams, TokenLogprob

UNUSED = frozenset(
    (
        "user",
        "store",
        "metadata",
        "service_tier",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_retention",
        "parallel_tool_calls",
        "verbosity",
    )
)


class ApiError(Exception):
    """An answer that is an error: HTTP status and OpenAI's error body."""

    def __init__(
        self,
        status: int,
        message: str,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
    ):
        super().__init__(message)
        self.status = status
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    refused: ClassVar[dict[str, tuple[Any, ...]]] = {}  # field: the values that ask for nothing


class StreamOptions(_Body):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class _Sampling(_Body):
    """What both kinds of completion have in common; None means the default."""

    model: str
    temperature: float | None = None
    top_p: float | None = None
    n: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: str | list[str] | None = None
    max_tokens: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    seed: int | None = None
    # beyond OpenAI's
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None

    @property
    def usage_wanted(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    def _params(self, logprobs: int | None, max_tokens: int | None) -> SamplingParams:
        given = {
            name: getattr(self, name)
            for name in (
                "temperature",
                "top_p",
                "n",
                "presence_penalty",
                "frequency_penalty",
                "seed",
                "top_k",
                "min_p",
                "repetition_penalty",
                "ignore_eos",
            )
            if getattr(self, name) is not None
        }
        stop = self.stop or ()
        try:
            bias = {int(k): v for k, v in (self.logit_bias or {}).items()}
        except ValueError:
            raise InvalidRequest("logit_bias maps token ids (digits) to numbers", "logit_bias") from None
        return SamplingParams(
            **given,
            stop=(stop,) if isinstance(stop, str) else tuple(stop),
            logit_bias=bias,
            stop_token_ids=tuple(self.stop_token_ids or ()),
            logprobs=logprobs,
            max_tokens=max_tokens,
        )


class CompletionBody(_Sampling):
    prompt: str | list[int] | list[str | list[int]]
    echo: bool | None = None
    logprobs: int | None = None
    best_of: int | None = None

    refused: ClassVar[dict[str, tuple[Any, ...]]] = {"suffix": (None, "")}

    def params(self) -> SamplingParams:
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise InvalidRequest("best_of is not served beyond n; leave it out", "best_of")
        if self.echo and self.logprobs is not None:
            raise InvalidRequest("echo together with logprobs is not served; ask for one of them", "echo")
        return self._params(self.logprobs, 16 if self.max_tokens is None else self.max_tokens)

    def prompts(self) -> list[str | list[int]]:
        prompt = self.prompt
        if not prompt:
            raise InvalidRequest("prompt is empty; give a text, or a list of texts or token ids", "prompt")
        if isinstance(prompt, str) or isinstance(prompt[0], int):
            return [prompt]
        return list(prompt)


class Part(_Body):
    type: Literal["text"]
    text: str


class Message(BaseModel):
    """Further fields of a message (name, tool_calls, ...) go to the chat template as they are."""

    model_config = ConfigDict(extra="allow", strict=True)
    role: str
    content: str | list[Part] | None = None

    def plain(self) -> dict[str, Any]:
        content = self.content
        text = content if isinstance(content, str) else "".join(p.text for p in content or ())
        return (self.model_extra or {}) | {"role": self.role, "content": text}


class SearchOptions(_Body):
    k: int | None = None


class ChatBody(_Sampling):
    messages: list[Message] = Field(min_length=1)
    search: bool | SearchOptions | None = None  # beyond OpenAI's: ground the answer in the server's index
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None

    refused: ClassVar[dict[str, tuple[Any, ...]]] = {
        "tools": (None, []),
        "functions": (None, []),
        "tool_choice": (None, "none", "auto"),
        "function_call": (None, "none", "auto"),
        "response_format": (None, {"type": "text"}),
        "audio": (None,),
        "modalities": (None, ["text"]),
        "prediction": (None,),
        "reasoning_effort": (None,),
        "web_search_options": (None,),
    }

    @property
    def search_wanted(self) -> bool:
        return self.search is not None and self.search is not False

    @property
    def search_k(self) -> int | None:
        return self.search.k if isinstance(self.search, SearchOptions) else None

    def params(self) -> SamplingParams:
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidRequest("top_logprobs needs logprobs=true", "top_logprobs")
        limit = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        return self._params((self.top_logprobs or 0) if self.logprobs else None, limit)


class SearchBody(_Body):
    query: str
    k: int | None = None


def parse_body(data: bytes, kind: type[_Body]) -> Any:
    """Raises `ApiError` (400) that names the field and what is wrong with it."""
    try:
        value = json.loads(data.decode("utf-8"), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not valid JSON ({error})", code="invalid_json") from None
    if not isinstance(value, dict):
        raise ApiError(400, f"the body must be a JSON object, not {type(value).__name__}", code="invalid_json")
    for name, harmless in kind.refused.items():
        if name in value and value.pop(name) not in harmless:
            raise ApiError(400, f"{name} is not served here; leave it out", param=name, code="unsupported_parameter")
    value = {k: v for k, v in value.items() if k not in UNUSED}
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        # Of a union's complaints the one that went deepest is about the shape that was meant.
        field = error.errors()[0]["loc"][:1]
        first = max((e for e in error.errors() if e["loc"][:1] == field), key=lambda e: len(e["loc"]))
        name = ".".join(str(p) for p in first["loc"] if isinstance(p, int) or p in value or p in kind.model_fields)
        code = {"extra_forbidden": "unknown_parameter", "missing": "missing_required_parameter"}.get(
            first["type"], "invalid_type"
        )
        what = {
            "unknown_parameter": "is not a parameter of this endpoint",
            "missing_required_parameter": "is required",
        }.get(code, f"is not valid: {first['msg']}")
        raise ApiError(400, f"{name or 'the body'} {what}", param=name or None, code=code) from None


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")


def usage(prompt: int, completion: int, cached: int) -> dict[str, Any]:
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


class Format:
    """Answers of one endpoint: `chat` or legacy completion, whole or in chunks."""

    def __init__(self, chat: bool, model: str, tokenizer: Any):
        self.chat, self.model, self.tokenizer = chat, model, tokenizer
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
                choice["message"] = {"role": "assistant", "content": c.text, "refusal": None}
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
            "token_logprobs": [e.logprob for e in entries],
            "text_offset": offsets,
            "top_logprobs": [{self._text(t): p for t, p in e.top} for e in entries],
        }

    def _text(self, token: int) -> str:
        return str(self.tokenizer.decode([token], skip_special=False))

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        text = self._text(token)
        return {"token": text, "logprob": logprob, "bytes": list(text.encode("utf-8"))}
