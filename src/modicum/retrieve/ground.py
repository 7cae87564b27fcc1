"""Answers grounded in passages: a prompt with numbered sources under a token budget, and the citations of the reply.

The generator of the answer is passed in as a callable, so any engine or API can be used: see `Generate`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol

from modicum.core import registry
from modicum.core.errors import BudgetError, MissingExtra, ModicumError, UserError
from modicum.retrieve.citations import attribute, citations
from modicum.retrieve.excerpt import excerpt
from modicum.retrieve.live import Live
from modicum.retrieve.passages import Passage
from modicum.retrieve.search import Hit, Searcher

SYSTEM = "Answer the question from the sources in a few words."
CLOSED = "Answer the question in a few words."  # to ask without sources, for comparison
CUE = "Short answer:"  # what the prompt ends with
# One passage of 60 to 120 words: a model of 135 M parameters answers better from one than from two or three that hold
# the right one more often (docs/retrieve.md). A larger model takes more.
PASSAGES = 1
PER_PASSAGE, INSTRUCTIONS = 160, 40  # tokens of the prompt
MIN_SOURCE_TOKENS = 24  # a shorter excerpt is not worth its tokens
Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Generated:
    """The output of a generator; the counts are its own, None if it reports none."""

    text: str
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


class Generate(Protocol):
    def __call__(self, messages: Messages, on_text: Callable[[str], None]) -> Generated | str:
        """Answer [{"role", "content"}, ...]; call `on_text` with each new chunk of text."""
        ...


@dataclass(frozen=True)
class Source:
    """A passage as shown to the generator. `number` is what the answer cites; `excerpt` is the text it was shown."""

    number: int
    id: str
    title: str
    source: str
    excerpt: str
    score: float
    cited: bool = False


@dataclass(frozen=True)
class Answer:
    """`citations`: numbers of the sources that the answer cites; `unknown_citations`: numbers without a source.

    attributed: the reply cited nothing, and its citations (at the end of `text`) were added by overlap of words, see
    `retrieve.citations`. `prompt_tokens` as the generator counted them, else as `count` did. `seconds` covers search
    and generation.
    """

    question: str
    text: str
    sources: list[Source]
    citations: list[int]
    unknown_citations: list[int] = field(default_factory=list)
    attributed: bool = False
    prompt_tokens: int = 0
    completion_tokens: int | None = None
    seconds: float = 0.0
    seconds_to_first: float | None = None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def prompt_budget_for(k: int) -> int:
    """Tokens of a prompt that shows k passages at the length that suits a small model."""
    return INSTRUCTIONS + PER_PASSAGE * k


def approximate_tokens(text: str) -> int:
    """A safe guess where no tokenizer is at hand: three UTF-8 bytes a token (English prose runs at four to five)."""
    return -(-len(text.encode("utf-8", "surrogatepass")) // 3)


def ask(
    question: str,
    searcher: Searcher | Live,
    generate: Generate,
    *,
    k: int = PASSAGES,
    mode: str | None = None,
    prompt_budget: int | None = None,
    count: Callable[[str], int] | None = None,
    system: str = SYSTEM,
    reader: Any = "ranked",
    on_text: Callable[[str], None] | None = None,
) -> Answer:
    """Search, show the best k passages to `generate`, and return its text with its sources.

    `prompt_budget` (`prompt_budget_for(k)` if None) bounds the prompt in tokens as `count` measures them
    (`approximate_tokens` if None); passages are cut to the sentences around the match, or left out, to keep it.
    `reader`: a method of port reader, which orders them. A reply that cites nothing is attributed by overlap. Raises
    `BudgetError` if not even one source fits.
    """
    start = time.monotonic()
    if not question.strip():
        raise UserError("the question is empty; write what you want to know")
    hits = searcher.search(question, k, mode)
    budget = prompt_budget_for(k) if prompt_budget is None else prompt_budget
    layout = registry.build("reader", reader)
    messages, sources, estimate = layout.compose(question, hits, budget, count or approximate_tokens, system)
    first: list[float] = []

    def stream(chunk: str) -> None:
        if not first:
            first.append(time.monotonic() - start)
        if on_text:
            on_text(chunk)

    reply = generate(messages, stream)
    reply = Generated(reply) if isinstance(reply, str) else reply
    text = reply.text
    cited, unknown = citations(text, len(sources))
    attributed = attribute(question, text, [s.excerpt for s in sources]) if not cited and not unknown else []
    if attributed:
        appended = " " + "".join(f"[{number}]" for number in attributed)
        text, cited = text.rstrip() + appended, attributed
        stream(appended)
    return Answer(
        question=question,
        text=text,
        citations=cited,
        unknown_citations=unknown,
        attributed=bool(attributed),
        sources=[Source(**asdict(s) | {"cited": s.number in cited}) for s in sources],
        prompt_tokens=estimate if reply.prompt_tokens is None else reply.prompt_tokens,
        completion_tokens=reply.completion_tokens,
        seconds=time.monotonic() - start,
        seconds_to_first=first[0] if first else None,
    )


def compose(
    question: str,
    hits: Sequence[Hit],
    budget: int,
    count: Callable[[str], int],
    system: str = SYSTEM,
    order: Callable[[int], Sequence[int]] = range,
    shorten: Callable[[str, str, int, Callable[[str], int]], str] = excerpt,
) -> tuple[Messages, list[Source], int]:
    """(messages, numbered sources, tokens): the prompt with as many hits as the budget holds, best first.

    `order` puts the n hits that are shown into another order: the rank, from 0, at each position (see port reader);
    `shorten` cuts a passage for a question to so many tokens, as `excerpt` does.

    Of a passage that is too long the sentences around the match are shown. The remaining budget is divided equally
    among the remaining sources, so that a long first passage does not crowd out the others; what a short one does
    not use goes to them.
    """

    def messages_with(blocks: Sequence[str]) -> Messages:
        shown = "\n\n".join(blocks) if blocks else "(no source matches)"
        return [
            {"role": "system", "content": system},
            {"role": "user", "content": f"Sources:\n\n{shown}\n\nQuestion: {question}\n{CUE}"},
        ]

    def tokens(blocks: Sequence[str]) -> int:
        return sum(count(m["content"]) + 4 for m in messages_with(blocks))  # 4: role marks of a chat template

    fixed = tokens([])
    if fixed + (MIN_SOURCE_TOKENS if hits else 0) > budget:
        raise BudgetError(
            f"the instructions and the question take {fixed} tokens, the prompt budget is {budget} and a "
            f"source needs {MIN_SOURCE_TOKENS}; ask a shorter question or allow a longer prompt"
        )
    blocks: list[str] = []
    sources: list[Source] = []
    for index, hit in enumerate(hits):
        remaining = budget - tokens(blocks) if blocks else budget - fixed
        head = _head(len(sources) + 1, hit.passage)
        limit = remaining // (len(hits) - index) - count(head) - 2
        if limit < MIN_SOURCE_TOKENS:  # an equal part of the budget is too small: show fewer sources
            limit = min(remaining - count(head) - 2, MIN_SOURCE_TOKENS)
            if limit < MIN_SOURCE_TOKENS:
                break
        text = shorten(hit.passage.text, question, limit, count)
        blocks.append(head + text)
        while text and tokens(blocks) > budget:  # counts of parts need not add up to the count of the whole
            text = text[: int(len(text) * 0.9)]
            blocks[-1] = head + text
        if not text:
            blocks.pop()
            break
        sources.append(Source(len(sources) + 1, hit.passage.id, hit.passage.title, hit.passage.source, text, hit.score))
    arranged = list(order(len(sources)))
    sources = [replace(sources[rank], number=number) for number, rank in enumerate(arranged, 1)]
    passages = [hits[rank].passage for rank in arranged]
    blocks = [_head(s.number, p) + s.excerpt for s, p in zip(sources, passages, strict=True)]
    return messages_with(blocks), sources, tokens(blocks)


def _head(number: int, passage: Passage) -> str:
    """The source's number, and its title unless the text begins with it, as a function's does with its signature."""
    title = " ".join(passage.title.split())
    first = passage.text.lstrip().partition("\n")[0]
    return f"[{number}] " if not title or title in first else f"[{number}] {title}\n"


def closed_book(question: str) -> Messages:
    """The question without sources, to compare with."""
    return [{"role": "system", "content": CLOSED}, {"role": "user", "content": f"Question: {question}\n{CUE}"}]


def openai_generator(
    url: str | None = None,
    *,
    model: str | None = None,
    api_key: str | None = None,
    max_tokens: int = 256,
    temperature: float = 0.0,
    timeout: float = 120.0,
    **more: Any,
) -> Generate:
    """A generator behind any OpenAI-compatible server (`url` ends in /v1), streamed by the `openai` client.

    model: the server's first one if None. api_key: the environment's OPENAI_API_KEY, or none for a local server.
    """
    import os

    try:
        import openai
    except ImportError:
        raise MissingExtra("openai", "dev", "asking a remote model") from None
    client = openai.OpenAI(base_url=url, api_key=api_key or os.environ.get("OPENAI_API_KEY") or "none", timeout=timeout)

    def generate(messages: Messages, on_text: Callable[[str], None]) -> Generated:
        try:
            name = model or client.models.list().data[0].id
            stream = client.chat.completions.create(
                model=name,
                messages=messages,
                max_tokens=max_tokens,
                temperature=temperature,
                stream=True,  # type: ignore[call-overload]
                stream_options={"include_usage": True},
                **more,
            )
            chunks: list[str] = []
            usage: Any = None
            for event in stream:
                usage = event.usage or usage
                chunk = event.choices[0].delta.content if event.choices else None
                if chunk:
                    chunks.append(chunk)
                    on_text(chunk)
        except IndexError:
            raise UserError(f"{client.base_url} serves no model; start one with: modicum serve MODEL") from None
        except openai.APIConnectionError as error:
            raise UserError(
                f"nothing answers at {client.base_url} ({error.__cause__ or error}); start a server with: "
                "modicum serve MODEL, or check the URL (it usually ends in /v1)"
            ) from None
        except openai.APIStatusError as error:
            kind = UserError if 400 <= error.status_code < 500 else ModicumError
            raise kind(f"{client.base_url} refused ({error.status_code}): {error.message}") from None
        except openai.APIError as error:
            raise ModicumError(f"{client.base_url} failed while answering: {error.message}; ask again") from None
        return Generated(
            "".join(chunks), getattr(usage, "prompt_tokens", None), getattr(usage, "completion_tokens", None)
        )

    return generate
