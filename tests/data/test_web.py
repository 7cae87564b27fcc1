"""Pages, formulas, crawls, PDF and tables: what is read, and what a damaged file leaves."""

from __future__ import annotations

import gzip
import re
from pathlib import Path

import pytest

from modicum.data import web
from modicum.data.document import Document, Drop
from modicum.data.readers import ReadConfig, find, read

CONFIG = ReadConfig()
SENTENCE = "The kettle boils the water until it is hot enough to make tea for all of the guests. "
TEX = [r"x^2 + y_1 = \frac{a}{b}", r"\sum_{i=1}^n i", r"E = mc^2", r"a < b", r"\alpha*\beta*\gamma", r"f_1 \cdot f_2"]


def read_all(path: Path, config: ReadConfig = CONFIG) -> list[Document | Drop]:
    return [item for unit in find(str(path), config) for item in read(unit, config)]


def page(body: str) -> bytes:
    return (
        "<html><head><title>T</title></head><body><nav><a href='/'>Home</a></nav><article><h1>Tea</h1>"
        f"{body}</article><footer>Imprint</footer></body></html>"
    ).encode()


def escaped(tex: str) -> str:
    return tex.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")


DIALECTS = {
    "mathjax": lambda t: f'<span class="MathJax">drawn</span><script type="math/tex">{t}</script>',
    "mathml": lambda t: (
        '<math><semantics><mi>x</mi><annotation encoding="application/x-tex">'
        f"{escaped(t)}</annotation></semantics></math>"
    ),
    "alttext": lambda t: f'<math alttext="{escaped(t)}"><mi>x</mi></math>',
    "katex": lambda t: (
        '<span class="katex"><span class="katex-mathml"><math><semantics><mi>x</mi>'
        f'<annotation encoding="application/x-tex">{escaped(t)}</annotation></semantics></math></span>'
        '<span class="katex-html" aria-hidden="true">drawn</span></span>'
    ),
    "image": lambda t: (
        '<img class="mwe-math-fallback-image-inline" src="x" '
        f'alt="{escaped("{" + chr(92) + "displaystyle " + t + "}")}">'
    ),
}


@pytest.mark.parametrize("dialect", DIALECTS)
def test_every_formula_comes_back_in_order(dialect: str) -> None:
    made = "".join(f"<p>{SENTENCE}{n} {DIALECTS[dialect](tex)} and so on. {SENTENCE}</p>" for n, tex in enumerate(TEX))
    text = web.main_text(page(made))
    assert text and re.findall(r"\$([^$]+)\$", text) == TEX
    assert "drawn" not in text and text.count("and so on") == len(TEX), "what follows a formula stays"
    assert not any(tex in text.replace(f"${tex}$", "") for tex in TEX), "once each"


def test_a_plain_extractor_loses_them() -> None:
    """The control of the test above: without `formulas`, trafilatura gives none of them."""
    import trafilatura

    for dialect in ("mathjax", "image"):
        made = "".join(f"<p>{SENTENCE} {DIALECTS[dialect](tex)}. {SENTENCE}</p>" for tex in TEX)
        plain = trafilatura.extract(page(made), output_format="markdown") or ""
        assert not any(tex in plain for tex in TEX)


def test_displayed_formulas_have_two_dollars() -> None:
    made = (
        f'<p>{SENTENCE * 3}</p><p>So <script type="math/tex; mode=display">a\n = b</script> holds. {SENTENCE * 2}</p>'
    )
    assert "$$a = b$$" in (web.main_text(page(made)) or "")


def http(body: bytes, type_: str = "text/html; charset=utf-8", status: str = "200 OK") -> bytes:
    return f"HTTP/1.1 {status}\r\nContent-Type: {type_}\r\n\r\n".encode() + body


def entry(url: str, body: bytes, kind: str = "response", type_: str = "application/http; msgtype=response") -> bytes:
    head = (
        f"WARC/1.0\r\nWARC-Type: {kind}\r\nWARC-Target-URI: {url}\r\nWARC-Record-ID: <urn:uuid:1>\r\n"
        f"WARC-Date: 2024-05-06T07:08:09Z\r\nContent-Type: {type_}\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body + b"\r\n\r\n"


def crawl() -> list[bytes]:
    return [
        entry("", b"software: test", "warcinfo", "application/warc-fields"),
        entry("https://a.org/tea", http(page(f"<p>{SENTENCE * 4}</p>"))),
        entry("https://a.org/gone", http(page("<p>Not here.</p>"), status="404 Not Found")),
        entry("https://a.org/cup.png", http(b"\x89PNG\0", "image/png")),
        entry(
            "https://b.fr/th%C3%A9",
            http(
                page(f"<p>{'Un thé à la crème. ' * 12}</p>").decode().encode("latin-1"), "text/html; charset=iso-8859-1"
            ),
        ),
        entry("https://c.org/plain", b"Plain text of a crawl.", "conversion", "text/plain"),
        entry("https://d.org/nothing", http(b"<html><body><script>x()</script></body></html>")),
    ]


@pytest.fixture(params=["warc", "warc.gz"])
def crawled(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    pytest.importorskip("fastwarc")
    pack = gzip.compress if request.param.endswith("gz") else bytes
    (tmp_path / f"c.{request.param}").write_bytes(b"".join(pack(one) for one in crawl()))
    return tmp_path / f"c.{request.param}"


def test_pages_of_a_crawl(crawled: Path) -> None:
    items = read_all(crawled)
    documents = {d.source: d for d in items if isinstance(d, Document)}
    assert list(documents) == ["https://a.org/tea", "https://b.fr/th%C3%A9", "https://c.org/plain"]
    tea = documents["https://a.org/tea"]
    assert tea.text.count("kettle") == 4 and "Imprint" not in tea.text and tea.site == "a.org"
    assert tea.meta == {"format": "markdown", "title": "T", "date": "2024-05-06T07:08:09Z"}
    assert "thé à la crème" in documents["https://b.fr/th%C3%A9"].text, "by the charset of the header"
    assert [(i.document_id.split("#")[1], i.reason) for i in items if isinstance(i, Drop)] == [("7", "no-text")]


def test_a_crawl_that_ends_early_says_where(crawled: Path) -> None:
    data = crawled.read_bytes()
    ends = [len(gzip.compress(one)) if crawled.suffix == ".gz" else len(one) for one in crawl()]
    crawled.write_bytes(data[: sum(ends[:4]) + ends[4] - 60])
    items = read_all(crawled)
    assert [d.source for d in items if isinstance(d, Document)] == ["https://a.org/tea"], "what came before stays"
    (drop,) = [i for i in items if isinstance(i, Drop)]
    assert (drop.reason == "unreadable" and "#5" in drop.document_id) or drop.document_id == crawled.name


def test_text_of_a_pdf(tmp_path: Path) -> None:
    pypdf = pytest.importorskip("pypdf")
    lines = b"BT /F1 12 Tf 72 720 Td (The kettle boils the water.) Tj 0 -20 Td (Tea for all.) Tj ET"
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents 4 0 R "
        b"/Resources << /Font << /F1 5 0 R >> >> >>",
        b"<< /Length %d >>\nstream\n%s\nendstream" % (len(lines), lines),
        b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    ]
    out, offsets = b"%PDF-1.4\n", []
    for number, one in enumerate(objects, 1):
        offsets.append(len(out))
        out += b"%d 0 obj\n%s\nendobj\n" % (number, one)
    table = b"".join(b"%010d 00000 n \n" % at for at in offsets)
    out += (
        b"xref\n0 6\n0000000000 65535 f \n"
        + table
        + b"trailer << /Size 6 /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF" % len(out)
    )
    (tmp_path / "tea.pdf").write_bytes(out)
    (tmp_path / "cut.pdf").write_bytes(out[:80])
    writer = pypdf.PdfWriter()
    writer.add_blank_page(100, 100)
    writer.write(tmp_path / "scan.pdf")
    items = {(i.id if isinstance(i, Document) else i.document_id).split("/")[1]: i for i in read_all(tmp_path)}
    assert items["tea.pdf"].text.split("\n") == ["The kettle boils the water.", "Tea for all."]
    assert items["scan.pdf"].reason == "no-text" and items["cut.pdf"].reason == "unreadable"


def test_tables_with_a_text_column(tmp_path: Path) -> None:
    rows = 'text,domain,quality,url\n"one, with\na line",wiki,0.5,http://x/1\n,wiki,1,\nthree,,high,\n'
    (tmp_path / "t.csv").write_text(rows)
    (tmp_path / "t.csv.gz").write_bytes(gzip.compress(rows.encode()))
    (tmp_path / "t.tsv").write_text("text\ttitle\nfour\tT\n")
    (tmp_path / "none.csv").write_text("text\n")
    (tmp_path / "bad.csv").write_bytes(b"text\nfine\n\xff\xfe\nlost\n")
    items = read_all(tmp_path)
    documents = {d.id.split("/")[1]: d for d in items if isinstance(d, Document)}
    assert {k: d.text for k, d in documents.items() if not k.startswith("bad")} == {
        "t.csv#1": "one, with\na line",
        "t.csv#3": "three",
        "t.csv.gz#1": "one, with\na line",
        "t.csv.gz#3": "three",
        "t.tsv#1": "four",
    }
    assert documents["t.csv#1"].meta == {"quality": 0.5} and documents["t.csv#1"].domain == "wiki"
    assert documents["t.csv#3"].meta == {} and documents["t.tsv#1"].meta == {"title": "T"}
    reasons = {i.document_id.split("/")[1].split("#")[0]: i.reason for i in items if isinstance(i, Drop)}
    assert reasons == {"bad.csv": "bad-record", "none.csv": "no-records", "t.csv": "empty", "t.csv.gz": "empty"}
