"""Pages of the web: the main text of HTML with its formulas, and the pages of a crawl in WARC files.

The main text is trafilatura's (Barbaresi 2021), as Markdown. It knows nothing of formulas, so these are put into the
page as TeX between dollars first, where MathJax, MathML, KaTeX or an image's alternative text carry them: what is lost
here no later step finds again (Han et al. 2024, arXiv:2409.12568, section 3.1).
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from modicum.core.errors import MissingExtra
from modicum.data.decoding import BOMS, decode, open_packed, read_whole, too_large
from modicum.data.document import Document, Drop

if TYPE_CHECKING:
    from modicum.data.readers import ReadConfig

_MATHS = re.compile(rb"math/tex|<math|class=[\"'][^\"']*(?:katex|tex|latex|math)", re.IGNORECASE)
_TEX_IMAGE = re.compile(r"\b(?:tex|latex|math\w*|mwe-math-fallback-image-\w+)\b", re.IGNORECASE)
_DISPLAY = re.compile(r"\\displaystyle\s*")
_ESCAPED = re.compile(r"\\([_*<>\[\]#|~`])")
_MARK = "qzformula{}zq"  # a word that the extraction does not touch, in place of a formula
_MARKS = re.compile(r"qzformula(\d+)zq")


def html(path: str, id_: str, config: ReadConfig) -> Iterator[Document | Drop]:
    """One page in a file."""
    data = read_whole(path, config)
    yield too_large(id_, config) if data is None else page(data, id_, id_, config)


def page(data: bytes, id_: str, source: str, config: ReadConfig, charset: str | None = None) -> Document | Drop:
    """The main text of a page as Markdown, without navigation and the like."""
    if not data.strip():
        return Drop(id_, "empty")
    if not data.startswith(tuple(bom for bom, _ in BOMS)) and b"\0" in data:
        return Drop(id_, "binary", "not HTML")
    content = main_text(data, charset)
    if not content or not content.strip():
        return Drop(id_, "no-text", "no main text found in the page")
    title = re.search(rb"<title[^>]*>(.*?)</title>", data, re.IGNORECASE | re.DOTALL)
    meta: dict[str, Any] = {"format": "markdown"}
    if title:
        import html as entities

        meta["title"] = " ".join(entities.unescape(decode(title[1]) or "").split())
    return Document(id_, content, "prose", source, meta)


def main_text(data: bytes, charset: str | None = None) -> str | None:
    """trafilatura's main text as Markdown, with formulas as TeX between dollars. None for a page without any."""
    import logging

    import trafilatura

    logging.getLogger("trafilatura").setLevel(logging.CRITICAL)
    logging.getLogger("htmldate").setLevel(logging.CRITICAL)
    given: Any = data
    if charset and charset.lower().replace("-", "") not in ("utf8", "usascii"):
        with contextlib.suppress(LookupError):
            given = data.decode(charset, "replace")
    tex: list[str] = []
    if _MATHS.search(data):
        tree = trafilatura.load_html(given)
        if tree is not None and (tex := formulas(tree)):
            given = tree
    content: str | None = trafilatura.extract(
        given,
        output_format="markdown",
        include_formatting=True,
        include_comments=False,
        include_tables=True,
        favor_precision=True,
    )
    if not content:
        return None
    content = _ESCAPED.sub(r"\1", content)  # nobody will render it
    return _MARKS.sub(lambda match: tex[int(match[1])], content)


def formulas(tree: Any) -> list[str]:
    """The formulas of a parsed page as TeX between dollars, in order; each is replaced by a mark with its number."""
    out: list[str] = []
    for node in list(tree.iter()):
        if not isinstance(node.tag, str) or (node.getparent() is None and node is not tree):
            continue
        classes = (node.get("class") or "").split()
        tex, display = None, False
        if node.tag == "script" and "math/tex" in (node.get("type") or ""):
            tex, display = node.text, "mode=display" in node.get("type")
        elif node.tag == "math":
            tex, display = _of_mathml(node), node.get("display") == "block"
            node = _enclosing(node, "katex") if tex else node
        elif node.tag == "img" and node.get("alt") and _TEX_IMAGE.search(" ".join(classes)):
            tex = node.get("alt")
        elif {"MathJax", "MathJax_Preview", "MathJax_Display"} & set(classes):
            _replace(node, "")  # what a browser had drawn; its source stands in a script beside it
            continue
        if tex and tex.strip():
            tex = _DISPLAY.sub("", tex.strip().removeprefix("{").removesuffix("}") if _wrapped(tex) else tex.strip())
            mark = "$$" if display else "$"
            _replace(node, _MARK.format(len(out)))
            out.append(f"{mark}{' '.join(tex.split())}{mark}")
    return out


def _wrapped(tex: str) -> bool:
    """`{\\displaystyle ...}`, as MediaWiki writes every formula."""
    return tex.strip().startswith("{\\displaystyle") and tex.strip().endswith("}")


def _of_mathml(node: Any) -> str | None:
    for child in node.iter():
        name = child.tag if isinstance(child.tag, str) else ""
        if name.endswith("annotation") and "tex" in (child.get("encoding") or "").lower():
            text: str | None = child.text
            return text
    alternative: str | None = node.get("alttext")
    return alternative


def _enclosing(node: Any, name: str) -> Any:
    """The outermost element of a class around a node, or the node."""
    outer = node
    for parent in node.iterancestors():
        if name in (parent.get("class") or "").split():
            outer = parent
    return outer


def _replace(node: Any, text: str) -> None:
    """A node's place is taken by text; what follows it stays."""
    parent = node.getparent()
    if parent is None:
        return
    text += node.tail or ""
    before = node.getprevious()
    if before is not None:
        before.tail = (before.tail or "") + text
    else:
        parent.text = (parent.text or "") + text
    parent.remove(node)


def warc(path: str, id_: str, config: ReadConfig) -> Iterator[Document | Drop]:
    """The pages of a crawl: HTML of `response` and `resource` records, text of `conversion` records (WET files).

    A document's source is its URL, its `date` the crawl's. A record that ends early, or whose header cannot be read, is
    a `Drop` of its own; redirects and errors of the server are left out.
    """
    try:
        from fastwarc.warc import ArchiveIterator, WarcRecordType
    except ImportError:
        raise MissingExtra("fastwarc", "data", "reading WARC files") from None
    number = 0
    # fastwarc unpacks gzip itself, record by record, so that those before a damaged one are read.
    with open(path, "rb") if path.endswith(".gz") else open_packed(path) as file:
        for entry in ArchiveIterator(file, parse_http=False):
            number += 1
            name, conversion = f"{id_}#{number}", entry.record_type == WarcRecordType.conversion
            declared = entry.headers.get("Content-Length")
            if declared is None:
                yield Drop(name, "unreadable", "the record's header is cut off")
            kinds = (WarcRecordType.response, WarcRecordType.resource, WarcRecordType.conversion)
            if declared is None or entry.record_type not in kinds:
                continue
            url = entry.headers.get("WARC-Target-URI") or ""
            if int(declared) > config.max_document_bytes + (1 << 20):
                yield too_large(name, config)
                continue
            if not entry.is_http:
                body, charset, is_page = entry.reader.read(), None, not conversion
                whole = len(body) == int(declared)
            else:
                available = entry.content_length
                entry.parse_http()
                header = available - entry.content_length
                body, charset = entry.reader.read(), entry.http_charset
                whole = len(body) == int(declared) - header
                status, type_ = entry.http_headers.status_code, entry.http_content_type or ""
                is_page = "html" in type_
                if status is None or not 200 <= int(status) < 300 or not (is_page or type_.startswith("text/plain")):
                    continue
            if not whole:
                yield Drop(name, "unreadable", f"the record of {url} ends early: {len(body)} of {declared} bytes")
                continue
            item = page(body, name, url, config, charset) if is_page else _plain(body, name, url)
            if isinstance(item, Document):
                item.meta.update({"date": entry.headers.get("WARC-Date") or ""})
            yield item
    if number == 0:
        yield Drop(id_, "no-records", "the file holds no WARC record")


def _plain(body: bytes, id_: str, url: str) -> Document | Drop:
    content = decode(body)
    if content is None:
        return Drop(id_, "binary", "not text")
    return Document(id_, content, "prose", url, {}) if content.strip() else Drop(id_, "empty")
