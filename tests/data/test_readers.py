"""Reading: formats, odd files, order, the Python installation, the hub."""

from __future__ import annotations

import gzip
import json
import os
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from modicum.core.errors import MissingExtra, UserError
from modicum.data.document import Document, Drop
from modicum.data.readers import ReadConfig, find, read

CONFIG = ReadConfig()


def read_all(source: str | Path, config: ReadConfig = CONFIG, **more) -> tuple[dict[str, Document], dict[str, Drop]]:
    items = [item for unit in find(str(source), config, **more) for item in read(unit, config)]
    documents = {i.id: i for i in items if isinstance(i, Document)}
    drops = {i.document_id: i for i in items if isinstance(i, Drop)}
    assert len(documents) + len(drops) == len(items), "an id was given twice"
    return documents, drops


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "corpus"
    (root / "deep" / "er").mkdir(parents=True)
    (root / "a.txt").write_text("Plain text, with an umlaut: ü.\n")
    (root / "deep" / "b.md").write_text("# Title\n\nBody.\n")
    (root / "deep" / "er" / "c.py").write_text('"""Doc."""\nx = 1\n')
    (root / "page.html").write_text(
        "<html><head><title>A &amp; B</title></head><body>"
        "<nav><a href='/'>Home</a> <a href='/x'>Other</a></nav><article><h1>Kettles</h1>"
        + "<p>The kettle boils the water until it is hot enough to make tea for all.</p>" * 6
        + "</article><script>var tracking = 1;</script></body></html>"
    )
    (root / "README").write_text("No suffix is text too.\n")
    (root / "latin.txt").write_bytes("Caf\xe9 cr\xe8me".encode("cp1252"))
    (root / "utf16.txt").write_text("Sixteen bits: ü €", encoding="utf-16")
    return root


def test_formats(folder: Path) -> None:
    documents, drops = read_all(folder)
    assert not drops
    assert list(documents) == sorted(documents), "order is by name"
    assert documents["corpus/a.txt"] == Document(
        "corpus/a.txt", "Plain text, with an umlaut: ü.\n", "prose", "corpus/a.txt"
    )
    assert documents["corpus/deep/b.md"].meta == {"format": "markdown"}
    code = documents["corpus/deep/er/c.py"]
    assert (code.domain, code.meta["language"]) == ("code", "python")
    page = documents["corpus/page.html"]
    assert "The kettle boils" in page.text and "tracking" not in page.text and "Home" not in page.text
    assert page.meta["title"] == "A & B"
    assert documents["corpus/latin.txt"].text == "Café crème"
    assert documents["corpus/utf16.txt"].text == "Sixteen bits: ü €"
    assert documents["corpus/README"].domain == "prose"


def test_single_file_and_labels(folder: Path) -> None:
    documents, _ = read_all(folder / "a.txt")
    assert list(documents) == ["a.txt"]
    documents, _ = read_all(folder / "deep", label="mine")
    assert set(documents) == {"mine/b.md", "mine/er/c.py"}


def test_bad_files_become_drops(folder: Path) -> None:
    (folder / "binary.txt").write_bytes(bytes(range(256)) * 40)
    (folder / "image.txt").write_bytes(b"\x89PNG\r\n\x1a\n" + os.urandom(4000).replace(b"\0", b"\1"))
    (folder / "empty.txt").write_bytes(b"")
    (folder / "blank.txt").write_text(" \n\n")
    (folder / "broken.py").write_bytes(b"\xff\xfe\0\0 not python")
    (folder / "bad.parquet").write_bytes(b"PAR1 nonsense PAR1")
    (folder / "bad.jsonl.gz").write_bytes(b"not gzip at all")
    (folder / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"text": "hello"}\n' * 2000)[:-20])
    (folder / "bad.txt.zst").write_bytes(b"not zstd at all")
    (folder / "nothing.html").write_text("<html><body><script>x()</script></body></html>")
    (folder / "table.csv").write_text("a,b\n1,2\n")
    (folder / "gone.txt").symlink_to(folder / "missing")
    os.mkfifo(folder / "pipe.txt")
    documents, drops = read_all(folder)
    reasons = {name.removeprefix("corpus/"): drop.reason for name, drop in drops.items()}
    assert reasons == {
        "binary.txt": "binary",
        "image.txt": "binary",
        "empty.txt": "empty",
        "blank.txt": "empty",
        "broken.py": "binary",
        "bad.parquet": "unreadable",
        "bad.jsonl.gz": "unreadable",
        "cut.jsonl.gz": "unreadable",
        "bad.txt.zst": "unreadable",
        "nothing.html": "no-text",
        "table.csv": "data-file",
        "gone.txt": "unreadable",
        "pipe.txt": "not-a-file",
    }
    assert "No such file" in drops["corpus/gone.txt"].detail
    assert "corpus/a.txt" in documents, "good files are still read"
    assert any(name.startswith("corpus/cut.jsonl.gz#") for name in documents), "what came before stays"


def test_jsonl(tmp_path: Path) -> None:
    lines = [
        json.dumps({"text": "one", "domain": "wiki", "url": "http://x/1", "title": "T", "id": 7}),
        "not json",
        json.dumps({"body": "no text"}),
        json.dumps([1]),
        "",
        json.dumps({"text": ""}),
        '{"text": "lone \\ud800 surrogate", "title": "\\udfff"}',
        json.dumps({"text": "y" * 500}),
    ]
    data = "\n".join(lines).encode()
    (tmp_path / "r.jsonl").write_bytes(data)
    (tmp_path / "r.jsonl.gz").write_bytes(gzip.compress(data))
    (tmp_path / "r.jsonl.zst").write_bytes(zstandard.compress(data))
    config = ReadConfig(max_document_bytes=300)
    outcomes = []
    for name in ("r.jsonl", "r.jsonl.gz", "r.jsonl.zst"):
        documents, drops = read_all(tmp_path / name, config)
        outcomes.append(
            (
                {k.split("#")[1]: v.text for k, v in documents.items()},
                {k.split("#")[1]: v.reason for k, v in drops.items()},
            )
        )
        first = documents[f"{name}#1"]
        assert (first.domain, first.source) == ("wiki", "http://x/1")
        assert first.meta == {"title": "T", "record_id": "7"}
    assert outcomes[0] == (
        {"1": "one", "7": "lone � surrogate"},
        {"2": "bad-json", "3": "no-text-field", "4": "no-text-field", "6": "empty", "8": "too-large"},
    )
    assert outcomes[1] == outcomes[0] and outcomes[2] == outcomes[0]


def test_overlong_jsonl_line_is_skipped_in_bounded_reads(tmp_path: Path) -> None:
    (tmp_path / "r.jsonl").write_text('{"text": "' + "x" * 50_000 + '"}\n{"text": "after"}\n')
    documents, drops = read_all(tmp_path, ReadConfig(max_document_bytes=1000))
    assert [d.text for d in documents.values()] == ["after"]
    assert [d.reason for d in drops.values()] == ["long-line"]


def test_parquet(tmp_path: Path) -> None:
    table = pa.table({"content": ["one", None, "three"], "domain": ["a", "b", None]})
    pq.write_table(table, tmp_path / "t.parquet")
    _, drops = read_all(tmp_path)
    assert drops[f"{tmp_path.name}/t.parquet"].reason == "no-text-field"
    assert "content" in drops[f"{tmp_path.name}/t.parquet"].detail
    documents, drops = read_all(tmp_path, ReadConfig(text_field="content"))
    assert [(d.text, d.domain) for d in documents.values()] == [("one", "a"), ("three", "prose")]
    assert len(drops) == 1


def test_long_text_is_cut_at_lines(tmp_path: Path) -> None:
    text = "".join(f"line {i} with an é in it\n" + "\n" * (i % 7 == 0) for i in range(400))
    (tmp_path / "long.txt").write_text(text)
    (tmp_path / "one-line.txt").write_text("é" * 3000)
    documents, drops = read_all(tmp_path, ReadConfig(max_document_bytes=1000))
    assert not drops
    parts = [d for k, d in documents.items() if "long.txt" in k]
    assert "".join(p.text for p in parts) == text and len(parts) > 10
    assert all(p.nbytes <= 1000 and p.text.endswith("\n") for p in parts)
    assert {p.meta["part_of"] for p in parts} == {f"{tmp_path.name}/long.txt"} == {p.origin for p in parts}
    assert "".join(d.text for k, d in documents.items() if "one-line" in k) == "é" * 3000


def test_too_large_whole_files_are_dropped(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("x = 1\n" * 1000)
    (tmp_path / "b.html").write_text("<p>" + "word " * 1000)
    (tmp_path / "c.txt").write_text("wide " * 1000, encoding="utf-16")
    _, drops = read_all(tmp_path, ReadConfig(max_document_bytes=1000))
    assert [d.reason for d in drops.values()] == ["too-large"] * 3


def test_nothing_to_read(tmp_path: Path) -> None:
    for given, message in ((tmp_path / "nowhere", "does not exist"), (tmp_path, "holds no files")):
        with pytest.raises(UserError, match=message) as caught:
            find(str(given), CONFIG)
        assert "\n" not in str(caught.value)


def test_hidden_and_excluded_folders(folder: Path) -> None:
    (folder / ".git").mkdir()
    (folder / ".git" / "x.txt").write_text("hidden")
    (folder / "out").mkdir()
    (folder / "out" / "y.txt").write_text("ours")
    documents, drops = read_all(folder, exclude=[folder / "out"])
    assert not drops and not any("x.txt" in k or "y.txt" in k for k in documents)


def test_python_installation() -> None:
    units = find("python", CONFIG)
    names = {u.id for u in units}
    assert {"python/json/__init__.py", "python/os.py", "python/pydoc_data/topics.py"} <= names
    assert not any(part in n for n in names for part in ("site-packages", "/test/", "/tests/", "__pycache__"))
    assert any("/test/" in u.id for u in find("python", ReadConfig(tests=True)))
    topics = next(u for u in units if u.kind == "pydoc")
    found = list(read(topics, CONFIG))
    assert len(found) > 50 and all(isinstance(d, Document) and d.domain == "prose" for d in found)
    assert any(d.id.endswith("#lambda") and "anonymous" in d.text for d in found)
    some = find("python", ReadConfig(limit_bytes=500_000))
    assert 300_000 < sum(u.nbytes for u in some) <= 500_000
    assert [u.id for u in some] == sorted(u.id for u in some)
    assert len({u.id.split("/")[1] for u in some}) > 5, "picked all over, not the alphabet's beginning"


def test_hub_reads_through_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "set").mkdir()
    rows = "".join(json.dumps({"text": f"row {i}"}) + "\n" for i in range(5))
    (tmp_path / "set" / "train.jsonl").write_text(rows)
    name = str(tmp_path / "set")
    documents, drops = read_all(f"hub:{name}")
    assert [d.text for d in documents.values()] == [f"row {i}" for i in range(5)] and not drops
    documents, _ = read_all(f"hub:{name}@train", ReadConfig(limit_bytes=12))
    assert len(documents) == 3, "reading stops at the limit"
    with pytest.raises(UserError, match="cannot be opened"):
        read_all(f"hub:{tmp_path / 'none'}")


def test_hub_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"modicum\[hub\]"):
        find("hub:some/name", CONFIG)


def test_the_language_reference_is_a_document_each_topic_also_by_itself() -> None:
    config = ReadConfig()
    topics = {i.id for unit in find("python:pydoc_data", config) for i in read(unit, config) if isinstance(i, Document)}
    assert len(topics) > 50 and "pydoc_data/topics.py#assert" in topics
