"""The catalogue: what every method does, costs and claims, written from registry and evidence alone.

Generated are the README's section between two markers (a line per port) and docs/methods: one page per port with its
plots, their index, and index.html, which filters and sorts all methods. The same registry and records give the same
bytes, so that a stale catalogue can be told by comparing.
"""

from __future__ import annotations

from pathlib import Path

from modicum.bench import data_map
from modicum.bench.figures import cell
from modicum.bench.overview import page
from modicum.bench.pages import NOTE, index, own_methods, port_files
from modicum.core import registry
from modicum.core.errors import UserError
from modicum.core.files import write_text

PLACE = Path("docs/methods")
BEGIN, END = "<!-- catalogue:begin -->", "<!-- catalogue:end -->"


def generate(home: Path) -> dict[Path, str]:
    """Every generated file of the checkout `home` with its text. Plug-ins are left out."""
    evidence = home / "evidence"
    files = {home / "README.md": readme((home / "README.md").read_text(encoding="utf-8"))}
    for info in registry.ports().values():
        files |= port_files(info, home / PLACE, evidence)
    files[home / PLACE / "README.md"] = index()
    files[home / PLACE / "index.html"] = page(evidence)
    files[home / "docs" / "data-map.md"] = data_map.page()
    return files


def stale(home: Path) -> list[Path]:
    """Generated files that differ from what registry and evidence say now, and pages of dropped ports."""
    files = generate(home)
    wrong = [p for p, text in files.items() if not p.exists() or p.read_text(encoding="utf-8") != text]
    target = home / PLACE
    return wrong + sorted(p for p in (*target.glob("*.md"), *target.glob("plots/*.svg")) if p not in files)


def write(home: Path) -> list[Path]:
    """Bring every generated file up to date; returns those that changed."""
    files, changed = generate(home), stale(home)
    for path in changed:
        if path in files:
            write_text(path, files[path])
        else:
            path.unlink()
    return changed


def readme(text: str) -> str:
    """`text` with the catalogue between its markers; the section is added at the end if there is none."""
    if (BEGIN in text) != (END in text):
        raise UserError(f"README.md holds only one of {BEGIN} and {END}; write both or none")
    if BEGIN not in text:
        text = text.rstrip("\n") + f"\n\n## Catalogue\n\n{BEGIN}\n{END}\n"
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{NOTE}\n\n{table()}\n{END}{after}"


def table() -> str:
    """One line per port: what it is, its baseline, and how many methods it has."""
    lines = ["| port | what a method decides | baseline | methods |", "| --- | --- | --- | --- |"]
    count = 0
    for info in registry.ports().values():
        number = len(own_methods(info.name))
        count += number
        lines.append(f"| [{info.name}]({PLACE}/{info.name}.md) | {cell(info.summary)} | {info.baseline} | {number} |")
    return (
        f"{len(registry.ports())} ports, {count} methods. A port's page says what each method does, its paper, its "
        f"knobs and what was measured of it; [one page]({PLACE}/index.html) filters and sorts them all.\n\n"
        + "\n".join(lines)
    )
