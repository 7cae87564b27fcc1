"""What must hold for any rewriter, with generators that answer well, badly and not at all."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from modicum.core import registry
from modicum.data.document import Document, Drop
from modicum.data.replies import ERROR, Generate, Replies, Reply, Request
from modicum.data.rewrites import Rewriter
from modicum.data.rewriting import NO_REPLY, rewrite

PROSE = (
    "The old mill at the river was built by a miller who had come from the mountains. It ground the corn of nine "
    "villages, and in dry summers its wheel stood still for weeks. People then carried their sacks over the hills."
)
LIST = (
    "# Tea\n\nHow tea is made in this house, as everybody likes it.\n\n"
    "1. Boil water.\n2. Warm the pot.\n3. Add leaves.\n4. Wait."
)


def documents() -> list[Document]:
    texts = [PROSE, LIST, "", "short", "\u4e00\u4e8c\u4e09\u3002" * 30, "word " * 900, f"{PROSE}\n\n{PROSE}\n\n{LIST}"]
    texts.append("Question: Tom has 3 boxes of 4 pens. How many pens?\nAnswer: Each box has 4. So 3 * 4 = 12. #### 12")
    out = [Document(f"toy/d{i}", text, "prose", f"d{i}") for i, text in enumerate(texts)]
    source = 'def double(x):\n    """Return twice the number."""\n    return 2 * x\n'
    return [*out, Document("toy/m.py", source, "code", "m.py", {"language": "python"})]


def echo(requests: Sequence[Request]) -> Iterator[tuple[int, Reply]]:
    """Gives the last lines of the prompt back, in every kind of marks, the last request first."""
    for number, request in reversed(list(enumerate(requests))):
        text = request.messages[-1][1] if request.messages else request.prompt
        last = re.sub(r"</?\w+>", "", text).strip().split("\n\n")[-1]
        yield number, Reply(f"<text>{last}</text><improved>{last}</improved><twin>{last}</twin> {request.seed}")


def babble(requests: Sequence[Request]) -> Iterator[tuple[int, Reply]]:
    for number, _ in enumerate(requests):
        yield number, Reply(("", "blah " * 500, "<text></text><improved>", "\x00\ud800")[number % 4], "length")


def dead(requests: Sequence[Request]) -> Iterator[tuple[int, Reply]]:
    raise RuntimeError("the generator is gone")
    yield


def _make(key: str) -> Rewriter:
    loaded = registry.load("rewrite", key)
    return loaded.cls(getattr(loaded.module, "TOY", loaded.config()))


def _run(key: str, generate: Generate, given: Sequence[Document] | None = None) -> list[Document | Drop]:
    return list(rewrite(_make(key), documents() if given is None else given, Replies(generate), 3))


def check_batches(key: str) -> None:
    """The same output whatever is rewritten at once, and in whichever order replies come."""
    whole = _run(key, echo)
    assert whole == [item for d in documents() for item in _run(key, echo, [d])], f"{key}: depends on the batch"


def check_ids_and_origins(key: str) -> None:
    """Ids are unique and begin with the original's; what is made has its origin; every document is accounted for."""
    for generate in (echo, babble):
        out = _run(key, generate)
        ids = [d.id for d in out if isinstance(d, Document)]
        assert len(set(ids)) == len(ids), f"{key}: ids are not unique"
        for item in out:
            name = item.document_id if isinstance(item, Drop) else item.id
            original = name.split("#")[0]
            assert original in {d.id for d in documents()}, f"{key}: {name}"
            if isinstance(item, Document):
                assert item.origin == original, f"{key}: {name} has origin {item.origin}"
            else:
                assert item.reason and " " not in item.reason, f"{key}: reason {item.reason!r}"
        names = {(i.document_id if isinstance(i, Drop) else i.id).split("#")[0] for i in out}
        assert names == {d.id for d in documents()}, f"{key}: a document vanished"


def check_a_dead_generator_loses_nothing(key: str) -> None:
    """Documents that nothing was generated for stay as they are, or are dropped where they must not stay; each is
    named."""
    rewriter, out = _make(key), _run(key, dead)
    failed = {i.document_id.split("#")[0] for i in out if isinstance(i, Drop) and i.reason == NO_REPLY}
    assert bool(failed) == rewriter.generates, f"{key}: {failed}"
    left = {d.id: d.text for d in out if isinstance(d, Document)}
    for document in documents():
        if document.id in failed:
            assert (left.get(document.id) == document.text) == rewriter.keeps_original, f"{key}: {document.id}"


def check_replies_are_kept(key: str) -> None:
    """A second run asks for nothing, one that was cut in the middle of a reply only for the rest; both end alike."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "replies.jsonl"
        replies = Replies(echo, path, "v")
        first = list(rewrite(_make(key), documents(), replies, 3))
        replies.close()
        if not path.exists():
            return
        again = Replies(dead, path, "v")
        assert list(rewrite(_make(key), documents(), again, 3)) == first and not again.generated, f"{key}: asked again"
        data = path.read_bytes()
        path.write_bytes(data[:-7])
        once_more = Replies(echo, path, "v")
        assert list(rewrite(_make(key), documents(), once_more, 3)) == first, f"{key}: differs after a cut"
        once_more.close()
        assert once_more.generated == 1 and path.read_bytes() == data, f"{key}: the file is another"


def check_errors_are_not_kept(key: str) -> None:
    """A reply that failed is asked for again the next time."""

    def failing(requests: Sequence[Request]) -> Iterator[tuple[int, Reply]]:
        for number, _ in enumerate(requests):
            yield number, Reply("out of order", ERROR)

    with TemporaryDirectory() as folder:
        path = Path(folder) / "replies.jsonl"
        list(rewrite(_make(key), documents(), Replies(failing, path), 3))
        assert list(rewrite(_make(key), documents(), Replies(echo, path), 3)) == _run(key, echo), key
