"""Python source: functions with their docstrings, and natural language separated from code.

Parsed by `ast`; nothing is imported or run.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass

from modicum.data.document import Document

SIGNATURE_LIMIT = 400  # characters; longer defaults are cut
# meta["format"] of the language in a Python file: `## signature`, docstring, and so on.
DOC_FORMAT = "python-doc"
COMMENT = " (comment)"  # ends the heading of a block of comments
COMMENT_LINES = 3  # a block of so many comment lines or more is prose; fewer stay beside their code
_SENTENCE_END = re.compile(r"(?<=[.!?])([\"')\]]*)\s+(?=[\"'(\[]?[A-Z0-9<`*])|\n\s*\n")
_ABBREVIATION = re.compile(r"(?:\b(?:e\.g|i\.e|etc|vs|cf|approx|resp|Mr|Dr)\.|\b[A-Z]\.)[\"')\]]*$")
# A string of any kind, or (group 1) a comment: whichever begins first holds the other's marks.
_STRING_OR_COMMENT = re.compile(
    r'"""(?:\\.|[^\\])*?"""|'
    r"'''(?:\\.|[^\\])*?'''|"
    r'"(?:\\.|[^"\\\n])*"|'
    r"'(?:\\.|[^'\\\n])*'|(#[^\n]*)",
    re.DOTALL,
)
_HEADING = re.compile(r"^## (class |module )?([\w.<>]+)((?:\(| \(|$).*)$", re.MULTILINE)
_NO_WORDS = re.compile(r"^[\W_]*$")


@dataclass(frozen=True)
class Function:
    """A function, method, class or module with a docstring; kind says which ("function" for methods).

    name: as a user would write it, such as `json.loads` or `pathlib.Path.exists`. signature: the
    def line without `def` and the colon, `class Name(bases)`, or `module NAME`. doc: the cleaned docstring.
    summary: its first sentence. body: the docstring without its summary. line: 1-based, 0 if unknown.
    """

    name: str
    kind: str
    signature: str
    doc: str
    summary: str
    body: str
    path: str
    line: int


def module_name(path: str) -> str:
    """`python/json/decoder.py` -> `json.decoder`; `python/json/__init__.py` -> `json`."""
    parts = path.split("#")[0].split("/")
    parts = parts[1:] if len(parts) > 1 else parts
    parts[-1] = re.sub(r"\.(?:py|pyi|pyx)$", "", parts[-1])
    if parts[-1] == "__init__" and len(parts) > 1:
        parts.pop()
    return ".".join(parts)


def parse(text: str) -> ast.Module | None:
    """The syntax tree, or None for source that this Python cannot parse."""
    import warnings

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd escapes in other people's strings
            return ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def first_sentence(text: str) -> tuple[str, str]:
    """(first sentence on one line, the rest)."""
    text = text.strip()
    for end in _SENTENCE_END.finditer(text):
        at = end.end(1) if end[1] else end.start()  # a closing quotation mark belongs to its sentence
        if not _ABBREVIATION.search(text[:at]):
            return " ".join(text[:at].split()), text[end.end() :].strip()
    return " ".join(text.split()), ""


def functions(document: Document) -> Iterator[Function]:
    """Every documented public function, method, class and module of a document, in source order.

    From Python source, or from the language that `split` took out of it (then without line numbers).
    Names with a part that begins with an underscore are left out, and so is what is nested in a function.
    """
    path = document.source or document.id
    if document.meta.get("format") == DOC_FORMAT:
        yield from _sections(document.text, path)
    elif (tree := parse(document.text)) is not None:
        name = module_name(path)
        if (doc := ast.get_docstring(tree)) and _is_public(name):
            yield _function("module", name, f"module {name}", doc, path, 1)
        yield from _walk(tree, name, path)


def _function(kind: str, name: str, signature: str, doc: str, path: str, line: int) -> Function:
    summary, body = first_sentence(doc)
    return Function(name, kind, signature, doc, summary, body, path, line)


def _is_public(name: str) -> bool:
    return not any(part.startswith("_") for part in name.split("."))


def _sections(text: str, path: str) -> Iterator[Function]:
    heads = list(_HEADING.finditer(text))
    for head, end in zip(heads, [h.start() for h in heads[1:]] + [len(text)], strict=True):
        kind, name, rest = (head[1] or "function").strip(), head[2], head[3]
        if "<" not in name and not rest.startswith(COMMENT) and _is_public(name):
            short_name = name.rpartition(".")[2]
            shown = {"class": f"class {short_name}{rest}", "module": f"module {name}"}.get(kind, short_name + rest)
            yield _function(kind, name, shown, text[head.end() : end].strip(), path, 0)


def _walk(node: ast.Module | ast.ClassDef, prefix: str, path: str) -> Iterator[Function]:
    for child in _definitions(node):
        if child.name.startswith("_"):
            continue
        name = f"{prefix}.{child.name}"
        doc = ast.get_docstring(child)
        if doc and not _NO_WORDS.match(doc) and _is_public(prefix):
            kind = "class" if isinstance(child, ast.ClassDef) else "function"
            yield _function(kind, name, signature(child), doc, path, child.lineno)
        if isinstance(child, ast.ClassDef):
            yield from _walk(child, name, path)


Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def _definitions(node: ast.AST) -> Iterator[Definition]:
    """Definitions directly in a module or class, also those under `if` and `try`."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, Definition):
            yield child
        elif isinstance(child, ast.If | ast.Try | ast.ExceptHandler | ast.With):
            yield from _definitions(child)


def _statements(node: ast.AST) -> Iterator[ast.AST]:
    """What stands directly in a node's blocks."""
    for name in ("body", "orelse", "handlers", "finalbody", "cases"):
        block = getattr(node, name, ())
        if isinstance(block, list):
            yield from block


def signature(node: Definition) -> str:
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(ast.unparse(b) for b in node.bases)
        text = f"class {node.name}({bases})" if bases else f"class {node.name}"
    else:
        returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
        text = f"{node.name}({ast.unparse(node.args)}){returns}"
    return text if len(text) <= SIGNATURE_LIMIT else text[:SIGNATURE_LIMIT] + "..."


def topics(source: str) -> Iterator[tuple[str, str]]:
    """(topic, text) of pydoc_data/topics.py, whose one statement assigns a dict of texts."""
    tree = parse(source)
    for node in ast.walk(tree) if tree else ():
        if isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                texts = [part.value for part in (key, value) if isinstance(part, ast.Constant)]
                if len(texts) == 2 and isinstance(texts[1], str):
                    yield str(texts[0]), texts[1]
            return


def split(document: Document) -> tuple[str, str] | None:
    """(prose, code) of a Python document, or None if it cannot be parsed.

    Prose is, in source order, each docstring under the signature it belongs to (`## json.loads(s, ...)`), and
    the longer blocks of comments. Code is the source without them; a body that was nothing but its docstring
    becomes `...`.
    """
    text = document.text.replace("\r\n", "\n").replace("\r", "\n")
    tree = parse(text)
    if tree is None:
        return None
    lines = re.findall(r"[^\n]*\n|[^\n]+", text)  # as `ast` counts them; str.splitlines knows more line ends
    name = module_name(document.source or document.id)
    prose: list[tuple[int, str]] = []
    removed: dict[int, str | None] = {}  # 0-based line -> what stands there instead

    def take(node: ast.Module | Definition, title: str) -> None:
        first = node.body[0] if node.body else None
        doc = ast.get_docstring(node)
        if doc is None or not isinstance(first, ast.Expr):
            return
        begin, end = first.lineno - 1, (first.end_lineno or first.lineno) - 1
        before = _at(lines[begin], first.col_offset)
        after = _after(lines[end], first.end_col_offset or 0)
        if before.strip() or after.strip():  # shares its line with code: leave it there
            return
        if not _NO_WORDS.match(doc):
            prose.append((first.lineno, _section(title, doc)))
        for i in range(begin, end + 1):
            removed[i] = None
        if len(node.body) == 1 and not isinstance(node, ast.Module):
            removed[begin] = f"{before}...\n"

    def visit(node: ast.AST, prefix: str) -> None:
        for child in _statements(node):
            if isinstance(child, Definition):
                title = f"{prefix}.{child.name}"
                shown = signature(child)
                take(
                    child,
                    f"class {title}" + shown[6 + len(child.name) :]
                    if isinstance(child, ast.ClassDef)
                    else title + shown[len(child.name) :],
                )
                visit(child, title if isinstance(child, ast.ClassDef) else f"{title}.<locals>")
            else:
                visit(child, prefix)  # under `if`, `try`, ...

    take(tree, f"module {name}")
    visit(tree, name)
    for begin, end, words in _comment_blocks(text):
        prose.append((begin + 1, _section(name + COMMENT, words)))
        removed.update(dict.fromkeys(range(begin, end + 1)))
    code = "".join(removed.get(i, line) or "" for i, line in enumerate(lines))
    code = re.sub(r"\n{4,}", "\n\n\n", code).strip("\n") + "\n"
    return "\n\n".join(words for _, words in sorted(prose)), code


def _section(title: str, words: str) -> str:
    """A heading that `_HEADING` finds, above words in which it finds none."""
    return f"## {title}\n\n" + _HEADING.sub(lambda match: " " + match[0], words.strip())


def _at(line: str, column: int) -> str:
    """Text before a column, which `ast` counts in UTF-8 bytes."""
    return line.encode()[:column].decode()


def _after(line: str, column: int) -> str:
    return line.encode()[column:].decode()


def _comment_blocks(text: str) -> Iterator[tuple[int, int, str]]:
    """(first line, last line, words) of comments that fill COMMENT_LINES lines or more; lines 0-based."""
    rows: list[tuple[int, int, str]] = []
    line, counted = 0, 0
    for match in _STRING_OR_COMMENT.finditer(text):
        if match[1]:
            begin = text.rfind("\n", 0, match.start()) + 1
            if not text[begin : match.start()].strip():
                line += text.count("\n", counted, match.start())
                counted = match.start()
                rows.append((line, match.start() - begin, match[1].lstrip("#!:").rstrip("# ")))
    block: list[tuple[int, int, str]] = []
    for row in [*rows, (-9, -9, "")]:
        if block and (row[0] != block[-1][0] + 1 or row[1] != block[-1][1]):
            words = "\n".join(r[2].removeprefix(" ") for r in block).strip()
            if len(block) >= COMMENT_LINES and _is_language(words):
                yield block[0][0], block[-1][0], words
            block = []
        block.append(row)


def _is_language(words: str) -> bool:
    """Sentences rather than rulers, tables or code that was commented out."""
    letters = sum(c.isalpha() or c == " " for c in words)
    return letters >= 0.75 * len(words) and len(words.split()) >= 12
