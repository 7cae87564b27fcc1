"""Requests to a text generator, its replies, and a file that keeps them.

Generators belong to rooms that come after this one: any local model through the serving engine, or any
OpenAI-compatible address. What a curation gets is a callable that takes requests and yields `(number, reply)` as
replies come, in any order.

Replies are kept in a file of JSON lines by a hash of the generator and the request, so that a run that was killed
generates nothing twice, and one that only its later steps tell from an earlier one generates nothing at all.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from modicum.core.errors import ModicumError, UserError

ERROR = "error"  # a reply's `ended` where there is no reply; `text` says why


@dataclass(frozen=True, kw_only=True)
class Request:
    """messages: a chat, or one text to be continued, by itself as a `prompt`. seed: None: the driver gives one.
    continuation: text that is not generated: the reply says how likely it is after the prompt."""

    messages: tuple[tuple[str, str], ...] = ()  # (role, content)
    prompt: str = ""
    max_tokens: int = 256
    temperature: float = 0.7
    top_p: float = 0.95
    stop: tuple[str, ...] = ()
    seed: int | None = None
    continuation: str = ""


@dataclass(frozen=True)
class Reply:
    """ended: stop, length (cut at max_tokens), or error. log_probability: of a continuation, in nats; None where the
    generator gives none."""

    text: str
    ended: str = "stop"
    log_probability: float | None = None


Generate = Callable[[Sequence[Request]], Iterator[tuple[int, Reply]]]


def ask(user: str, **sampling: Any) -> Request:
    """One message to a chat model."""
    return Request(messages=(("user", user),), **sampling)


class Replies:
    """Replies of one generator, kept in `path` (None: nowhere). version: changes with the generator."""

    def __init__(self, generate: Generate, path: Path | None = None, version: str = ""):
        self.generate, self.path, self.version = generate, path, version
        self.kept: dict[str, Reply] = {}
        self.generated = 0  # replies that were not kept already
        self._file: IO[bytes] | None = None
        if path is not None:
            self._load(path)

    def _load(self, path: Path) -> None:
        with suppress(FileNotFoundError):
            whole = 0
            with open(path, "rb") as file:
                for line in file:
                    if not line.endswith(b"\n"):  # the run was killed while it wrote
                        break
                    whole += len(line)
                    entry = json.loads(line)
                    self.kept[entry["key"]] = Reply(entry["text"], entry["ended"], entry.get("log_probability"))
            if whole < path.stat().st_size:
                os.truncate(path, whole)

    def __call__(self, requests: Sequence[Request]) -> list[Reply]:
        """A reply to each. One that the generator fails on is asked again by itself; then its reply is an error."""
        keys = [self._key(request) for request in requests]
        missing = [i for i, key in enumerate(keys) if key not in self.kept]
        replies: dict[int, Reply] = {}
        why = self._try(requests, keys, missing, replies)
        for i in [i for i in missing if i not in replies]:
            again = self._try(requests, keys, [i], replies) if len(missing) > 1 else why
            replies.setdefault(i, Reply(again or why or "no reply came", ERROR))
        return [replies[i] if i in replies else self.kept[key] for i, key in enumerate(keys)]

    def _try(self, requests: Sequence[Request], keys: list[str], at: list[int], replies: dict[int, Reply]) -> str:
        """Replies of the requests `at`; returns why it ended early, or ""."""
        if not at:
            return ""
        try:
            for k, reply in self.generate([requests[i] for i in at]):
                replies[at[k]] = reply
                if reply.ended != ERROR:
                    self._keep(keys[at[k]], reply)
        except UserError:
            raise
        except (ModicumError, OSError, RuntimeError, ValueError) as error:
            return f"{type(error).__name__}: {' '.join(str(error).split())}"
        return ""

    def _keep(self, key: str, reply: Reply) -> None:
        self.kept[key] = reply
        self.generated += 1
        if self.path is not None:
            if self._file is None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115
            entry: dict[str, Any] = {"key": key, "text": reply.text, "ended": reply.ended}
            if reply.log_probability is not None:
                entry["log_probability"] = reply.log_probability
            self._file.write(json.dumps(entry).encode() + b"\n")  # one write: whole, or cut at its end

    def _key(self, request: Request) -> str:
        plain = {k: v for k, v in asdict(request).items() if k != "continuation" or v}
        text = json.dumps([self.version, plain], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
