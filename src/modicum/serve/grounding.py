"""What the server asks of an index, so that chats can be grounded in its passages.

The server knows nothing of retrieval: whoever starts it passes an object with these three methods in
(`modicum serve --index` passes `cli._grounding.IndexGrounding`). They are called from several threads.
"""

from __future__ import annotations

from typing import Any, Protocol

MAX_PASSAGES = 32  # of one request

Messages = list[dict[str, Any]]


class Grounding(Protocol):
    k: int  # passages of a request that does not say how many

    def card(self) -> dict[str, Any]:
        """What /v1/models says of the index: its name, how many passages it has, and k."""
        ...

    def search(self, query: str, k: int, where: dict[str, Any] | None = None) -> list[dict[str, Any]]:
        """The k best passages, best first: rank, score, id, title, source, meta, text. where: conditions on source and
        metadata."""
        ...

    def ground(
        self, messages: Messages, k: int, max_tokens: int | None, where: dict[str, Any] | None = None
    ) -> tuple[Messages, list[dict[str, Any]]]:
        """The messages with passages for the last one in the prompt, and those passages.

        A source is {number, id, title, source, excerpt, score}; answers cite it by its number, like [1].
        Raises `BudgetError` where no passage fits the context beside the messages and `max_tokens` of answer.
        """
        ...
