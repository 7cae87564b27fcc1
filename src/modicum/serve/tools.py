"""Tool calls in the chat API: how a model family writes them, read back into OpenAI's `tool_calls`.

Which family it is can be read off the chat template: it is the template that tells the model how to write a call.

    hermes    <tool_call>\\n{"name": ..., "arguments": {...}}\\n</tool_call>      Qwen 2.5 and 3, Hermes, SmolLM2 1.7B
    mistral   [TOOL_CALLS][{"name": ..., "arguments": {...}}]                   Mistral
    llama     {"name": ..., "parameters": {...}}                               Llama 3.1 and later

With `tool_choice` "required", or the name of a function, the answer is a structured output whose arguments match the
function's own schema. With "auto" the model writes what it likes and calls are read out of it; what cannot be read as a
call stays text.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from modicum.serve.request import InvalidRequest, StructuredOutput

MOST_TOOLS = 128
ANY_OBJECT: Mapping[str, Any] = {"type": "object"}


@dataclass(frozen=True)
class ToolFormat:
    """start, end: the marks around a call; arguments: the key that holds them; listed: whether calls form a list."""

    name: str
    start: str
    end: str
    arguments: str = "arguments"
    listed: bool = False


FORMATS = (
    ToolFormat("hermes", "<tool_call>", "</tool_call>"),
    ToolFormat("mistral", "[TOOL_CALLS]", "", listed=True),
    ToolFormat("llama", "", "", arguments="parameters"),
)


def format_of(template: str | None) -> ToolFormat | None:
    """The format that a chat template teaches; None for a template that knows no tools."""
    if template is None or not re.search(r"\btools\b", template):
        return None
    hermes, mistral, llama = FORMATS
    if hermes.start in template:
        return hermes
    if mistral.start in template:
        return mistral
    return llama if '"parameters"' in template else hermes


def names_of(tools: Sequence[Mapping[str, Any]]) -> list[str]:
    return [str(tool["function"]["name"]) for tool in tools]


def call_schema(tools: Sequence[Mapping[str, Any]], form: ToolFormat) -> dict[str, Any]:
    """A JSON schema of one call to one of `tools`."""
    calls = [
        {
            "type": "object",
            "properties": {
                "name": {"const": tool["function"]["name"]},
                form.arguments: tool["function"].get("parameters") or ANY_OBJECT,
            },
            "required": ["name", form.arguments],
            "additionalProperties": False,
        }
        for tool in tools
    ]
    return calls[0] if len(calls) == 1 else {"anyOf": calls}


def forced(tools: Sequence[Mapping[str, Any]], form: ToolFormat, token: int | None) -> StructuredOutput:
    """An answer that is one call to one of `tools`, in the model's own format; token: the id of its starting mark."""
    schema = call_schema(tools, form)
    if form.listed:
        schema = {"type": "array", "items": schema, "minItems": 1, "maxItems": 1}
    rules = f"\ncall: %json {json.dumps(schema)}"
    if not form.start:
        return StructuredOutput("grammar", f"start: call{rules}", "tools")
    start = json.dumps(form.start) if token is None else f"<[{token}]>"
    around = ('"\\n" ', f' "\\n{form.end}"') if form.end else ("", "")  # line ends as the templates write them
    return StructuredOutput("grammar", f"start: {start} {around[0]}call{around[1]}{rules}", "tools")


def pick(tools: Sequence[Mapping[str, Any]], choice: Any) -> tuple[Sequence[Mapping[str, Any]], bool]:
    """The tools that may be called, and whether one must be. Raises `InvalidRequest` for a choice that is none."""
    if choice == "required":
        return tools, True
    if isinstance(choice, Mapping):
        function = choice.get("function")
        name = function.get("name") if choice.get("type") == "function" and isinstance(function, Mapping) else None
        named = [tool for tool in tools if tool["function"]["name"] == name]
        if not named:
            raise InvalidRequest(
                f"tool_choice names {name!r}, which is none of the tools: {', '.join(names_of(tools))}", "tool_choice"
            )
        return named, True
    if choice not in (None, "auto", "none"):
        raise InvalidRequest(
            f"tool_choice={choice!r} is not allowed; write auto, none, required, or "
            '{"type": "function", "function": {"name": NAME}}',
            "tool_choice",
        )
    return ([] if choice == "none" else tools), False


def read_calls(text: str, form: ToolFormat, names: Sequence[str]) -> tuple[str, list[dict[str, Any]]]:
    """(what is text, calls in OpenAI's form) of an answer; calls to unknown functions stay text."""
    if not form.start:
        calls = _calls(text.strip(), form, names)
        return ("", calls) if calls else (text, [])
    if form.listed and form.start not in text:  # a mark that is a special token is not shown
        calls = _calls(text.strip(), form, names)
        return ("", calls) if calls else (text, [])
    kept, calls, at = [], [], 0
    while (start := text.find(form.start, at)) >= 0:
        body_at = start + len(form.start)
        end = text.find(form.end, body_at) if form.end else len(text)
        end = len(text) if end < 0 else end
        these = _calls(text[body_at:end].strip(), form, names)
        after = min(len(text), end + len(form.end))
        kept.append(text[at:start] if these else text[at:after])
        calls += these
        at = after
    return "".join([*kept, text[at:]]).strip() if calls else text, calls


def _calls(body: str, form: ToolFormat, names: Sequence[str]) -> list[dict[str, Any]]:
    try:
        value = json.loads(body)
    except ValueError:
        return []
    entries = value if isinstance(value, list) else [value]
    calls = []
    for entry in entries:
        arguments = entry.get(form.arguments) if isinstance(entry, dict) else None
        if not isinstance(arguments, dict) or entry.get("name") not in names:
            return []
        calls.append(
            {
                "id": f"call_{uuid.uuid4().hex[:24]}",
                "type": "function",
                "function": {"name": entry["name"], "arguments": json.dumps(arguments, ensure_ascii=False)},
            }
        )
    return calls


class CallStream:
    """Text of a streamed answer: what can be shown at once, and what may be the start of a call."""

    def __init__(self, form: ToolFormat):
        self.form, self.kept = form, ""
        self._opening = "[" if form.listed else "{" if not form.start else None

    def push(self, text: str) -> str:
        """Text that is part of no call; the rest is kept for the end."""
        self.kept += text
        start = self.form.start
        if self._opening is not None:  # a call without a mark is the whole answer
            first = self.kept.lstrip()
            if not first or first.startswith(self._opening):
                return ""
            self._opening = None
        if not start:
            at = len(self.kept)
        elif (at := self.kept.find(start)) < 0:
            # The longest end of the text with which a mark may begin.
            longest = next((n for n in range(len(start) - 1, 0, -1) if self.kept.endswith(start[:n])), 0)
            at = len(self.kept) - longest
        shown, self.kept = self.kept[:at], self.kept[at:]
        return shown
