"""What the OpenAI-compatible server reads: request bodies, and the errors it answers bad ones with.

Bodies are checked strictly (a number is not a string); a field that is unknown, or known but not
served, is refused by name rather than passed over. Fields that only concern the operator of a hosted
service (user, metadata, store, ...) are accepted and unused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from modicum.serve import tools
from modicum.serve.request import InvalidRequest, SamplingParams, StructuredOutput

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


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    refused: ClassVar[dict[str, tuple[Any, ...]]] = {}  # field: the values that ask for nothing


class StructuredOptions(Body):
    """vLLM's `structured_outputs`: exactly one of these."""

    json_: dict[str, Any] | bool | None = Field(default=None, alias="json")
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None

    def wanted(self) -> StructuredOutput:
        given = {
            "json": None if self.json_ is None else json.dumps(self.json_),
            "regex": self.regex,
            "choice": None if self.choice is None else json.dumps(self.choice),
            "grammar": self.grammar,
        }
        set_ = [(kind, value) for kind, value in given.items() if value is not None]
        if len(set_) != 1 or self.choice == [] or "" in (self.choice or ()):
            raise InvalidRequest(
                "structured_outputs takes one of json, regex, choice (texts, none empty) and grammar",
                "structured_outputs",
            )
        kind, value = set_[0]
        return StructuredOutput(kind, value, "structured_outputs")  # type: ignore[arg-type]


NOTHING: Mapping[str, Any] = MappingProxyType({})


class StreamOptions(Body):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class _Sampling(Body):
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
    structured_outputs: StructuredOptions | None = None

    @property
    def usage_wanted(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    def structured(self) -> StructuredOutput | None:
        """What the answer must match."""
        return None if self.structured_outputs is None else self.structured_outputs.wanted()

    def _params(self, logprobs: int | None, max_tokens: int | None, defaults: Mapping[str, Any]) -> SamplingParams:
        given = dict(defaults) | {
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
            structured=self.structured(),
        )


class CompletionBody(_Sampling):
    prompt: str | list[int] | list[str | list[int]]
    echo: bool | None = None
    logprobs: int | None = None
    best_of: int | None = None

    refused: ClassVar[dict[str, tuple[Any, ...]]] = {"suffix": (None, "")}

    def params(self, defaults: Mapping[str, Any] = NOTHING) -> SamplingParams:
        """`defaults`: of sampling settings that the request leaves out."""
        if self.best_of is not None and (self.best_of < (self.n or 1) or self.stream):
            raise InvalidRequest(f"best_of={self.best_of} must be n or more, and cannot be streamed", "best_of")
        if self.echo and self.logprobs is not None and self.logprobs > 1:
            raise InvalidRequest("of an echoed prompt only the likeliest token is named; write logprobs=1", "logprobs")
        if self.max_tokens == 0 and self.echo:  # nothing is sampled: the prompt is scored, or given back
            return self._params(self.logprobs, 1, defaults)
        return self._params(self.logprobs, 16 if self.max_tokens is None else self.max_tokens, defaults)

    def drawn(self, params: SamplingParams) -> SamplingParams:
        """What is sampled: `best_of` answers with their log-probabilities, of which the best `n` are given."""
        if self.best_of is None or self.best_of == params.n:
            return params
        return replace(params, n=self.best_of, logprobs=params.logprobs or 0)

    def prompts(self) -> list[str | list[int]]:
        prompt = self.prompt
        if not prompt:
            raise InvalidRequest("prompt is empty; give a text, or a list of texts or token ids", "prompt")
        if isinstance(prompt, str) or isinstance(prompt[0], int):
            return [prompt]
        return list(prompt)


class Part(Body):
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


class SearchOptions(Body):
    k: int | None = None
    filter: dict[str, Any] | None = None  # {"source": "docs/*", "year": {"gte": 2020}}


class JsonSchema(Body):
    name: str
    description: str | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class Function(Body):
    name: str = Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Body):
    type: Literal["function"]
    function: Function


class ChatBody(_Sampling):
    messages: list[Message] = Field(min_length=1)
    search: bool | SearchOptions | None = None  # beyond OpenAI's: ground the answer in the server's index
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    response_format: ResponseFormat | None = None
    tools: list[Tool] | None = Field(default=None, max_length=tools.MOST_TOOLS)
    tool_choice: str | dict[str, Any] | None = None

    refused: ClassVar[dict[str, tuple[Any, ...]]] = {
        "functions": (None, []),
        "function_call": (None, "none", "auto"),
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

    @property
    def search_filter(self) -> dict[str, Any] | None:
        return self.search.filter if isinstance(self.search, SearchOptions) else None

    def structured(self) -> StructuredOutput | None:
        form, wanted = self.response_format, super().structured()
        if form is None or form.type == "text":
            return wanted
        if wanted is not None:
            raise InvalidRequest("give response_format or structured_outputs, not both", "response_format")
        if form.type == "json_object":
            return StructuredOutput("json", '{"type": "object"}', "response_format")
        if form.json_schema is None or form.json_schema.schema_ is None:
            raise InvalidRequest("response_format of type json_schema needs json_schema.schema", "response_format")
        return StructuredOutput("json", json.dumps(form.json_schema.schema_), "response_format")

    def callable_tools(self) -> tuple[list[dict[str, Any]], bool]:
        """The tools that the answer may call, and whether it must call one."""
        given = [tool.model_dump(exclude_none=True) for tool in self.tools or ()]
        if not given:
            if self.tool_choice not in (None, "none", "auto"):
                raise InvalidRequest("tool_choice needs tools", "tool_choice")
            return [], False
        chosen, must_call = tools.pick(given, self.tool_choice)
        if must_call and self.structured() is not None:
            raise InvalidRequest("tool_choice cannot demand a call of a structured answer", "tool_choice")
        return [dict(tool) for tool in chosen], must_call

    def params(self, defaults: Mapping[str, Any] = NOTHING) -> SamplingParams:
        """`defaults`: of sampling settings that the request leaves out."""
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidRequest("top_logprobs needs logprobs=true", "top_logprobs")
        limit = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        return self._params((self.top_logprobs or 0) if self.logprobs else None, limit, defaults)


class LoadAdapterBody(Body):
    """vLLM's body of /v1/load_lora_adapter."""

    lora_name: str = Field(pattern=r"^[^/\s]{1,96}$")
    lora_path: str = Field(min_length=1)


class UnloadAdapterBody(Body):
    lora_name: str


class SearchBody(Body):
    query: str
    k: int | None = None
    filter: dict[str, Any] | None = None


def parse_body(data: bytes, kind: type[Body]) -> Any:
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
