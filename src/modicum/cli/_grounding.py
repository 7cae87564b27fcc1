"""An index for the server: joins retrieve's search and prompts to the server's `Grounding`."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modicum.core.errors import ModicumError, UserError

if TYPE_CHECKING:
    from modicum.data.tokenizer import Tokenizer
    from modicum.retrieve.live import Live
    from modicum.retrieve.search import Hit, Searcher
    from modicum.serve.grounding import Messages


class IndexGrounding:
    """A folder made by `modicum index`, opened when it is first needed or by `open_in_background`.

    Only its header is read at once, so that a wrong folder is refused before a model is loaded.
    """

    def __init__(self, folder: str | Path, k: int = 3, *, device: str = "cpu"):
        from modicum.retrieve.live import HEADER, Live
        from modicum.retrieve.manifest import read_header
        from modicum.serve.grounding import MAX_PASSAGES

        if not 1 <= k <= MAX_PASSAGES:
            raise UserError(f"--passages {k} is outside 1 to {MAX_PASSAGES}")
        self.folder, self.k, self._device = Path(folder), k, device
        if (self.folder / HEADER).is_file():
            self.passages: int | None = len(Live(self.folder))
        else:
            make = "modicum index SOURCE --out FOLDER"
            self.passages = read_header(self.folder, "manifest.json", "index", make).get("passages")
        self._searcher: Searcher | Live | None = None
        self._lock = threading.Lock()  # one search at a time: encoders are not made for several threads
        self._count: Callable[[str], int] = len
        self._plain: Callable[[str], str] = str
        self._context = 2048

    def use(self, tokenizer: Tokenizer, context: int) -> None:
        """The model that answers: its tokenizer, and its longest sequence in tokens (prompt and answer)."""
        self._count = lambda text: len(tokenizer.encode(text, specials=False))
        from modicum.serve.messages import without_specials

        self._plain, self._context = without_specials(tokenizer), context

    def open_in_background(self) -> threading.Thread:
        def first() -> None:
            try:
                self._hits("first search", 1)
            except ModicumError as error:
                print(f"modicum: searches will fail: {error}", file=sys.stderr, flush=True)

        thread = threading.Thread(target=first, daemon=True, name="modicum-index")
        thread.start()
        return thread

    def card(self) -> dict[str, Any]:
        return {"index": self.folder.resolve().name, "passages": self.passages, "k": self.k}

    def search(self, query: str, k: int, where: dict[str, Any] | None = None) -> list[dict[str, Any]]:
        return [
            {
                "rank": rank,
                "score": hit.score,
                "ranks": hit.ranks,
                "id": hit.passage.id,
                "title": hit.passage.title,
                "source": hit.passage.source,
                "meta": hit.passage.meta,
                "text": hit.passage.text,
            }
            for rank, hit in enumerate(self._hits(query, k, where), 1)
        ]

    def ground(
        self, messages: Messages, k: int, max_tokens: int | None, where: dict[str, Any] | None = None
    ) -> tuple[Messages, list[dict[str, Any]]]:
        """Searches with the last message; earlier turns stay in the prompt without the passages they had."""
        from modicum.retrieve.ground import SYSTEM, compose, prompt_budget_for

        *earlier, last = messages
        if last["role"] != "user":
            raise UserError(f"search needs the user's question as the last message, not one of {last['role']!r}")
        question = self._plain(last["content"])
        system = "\n\n".join([SYSTEM, *(m["content"] for m in earlier if m["role"] == "system")])
        turns = [m for m in earlier if m["role"] != "system"]
        answer = min(max_tokens or self._context // 4, self._context // 2)
        budget = min(prompt_budget_for(k), self._context - answer - sum(self._count(m["content"]) + 8 for m in turns))
        (instructions, user_message), sources, _ = compose(
            question, self._hits(question, k, where), budget, self._count, system
        )
        user_message["content"] = self._plain(user_message["content"])  # a passage must not open a turn of its own
        return [instructions, *turns, user_message], [
            {name: getattr(s, name) for name in ("number", "id", "title", "source", "excerpt", "score")}
            for s in sources
        ]

    def _hits(self, query: str, k: int, where: dict[str, Any] | None = None) -> list[Hit]:
        from modicum.retrieve.live import open_searcher

        with self._lock:
            if self._searcher is None:
                self._searcher = open_searcher(self.folder, device=self._device)
            return self._searcher.search(query, k, where=where)
