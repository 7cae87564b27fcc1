"""The catalogue: what every method does, costs and claims, written from registry and evidence alone.

Three places are generated: the README's section between two markers, one page per port in docs/ports
with its plot, and the index of those pages. The same registry and records give the same bytes, so that
a stale catalogue can be told by comparing.
"""

from __future__ import annotations

from pathlib import Path

from modicum.bench import record
from modicum.bench.card import Card, claim_text
from modicum.bench.figures import cell, measured_text, of_method, rows_of
from modicum.bench.pages import NOTE, index, own_methods, port_files
from modicum.core import registry
from modicum.core.errors import UserError
from modicum.core.files import write_text

BEGIN, END = "<!-- catalogue:begin -->", "<!-- catalogue:end -->"


def generate(home: Path) -> dict[Path, str]:
    """Every generated file of the checkout `home` with its text. Plug-ins are left out."""
    evidence = home / "evidence"
    files = {home / "README.md": readme((home / "README.md").read_text(encoding="utf-8"), evidence)}
    for info in registry.ports().values():
        files |= port_files(info, home / "docs" / "ports", evidence)
    files[home / "docs" / "ports" / "README.md"] = index()
    return files


def stale(home: Path) -> list[Path]:
    """Generated files that differ from what registry and evidence say now, and pages of dropped ports."""
    files = generate(home)
    wrong = [p for p, text in files.items() if not p.exists() or p.read_text(encoding="utf-8") != text]
    place = home / "docs" / "ports"
    return wrong + sorted(p for p in (*place.glob("*.md"), *place.glob("plots/*.svg")) if p not in files)


def write(home: Path) -> list[Path]:
    """Bring every generated file up to date; returns those that changed."""
    files, changed = generate(home), stale(home)
    for path in changed:
        if path in files:
            write_text(path, files[path])
        else:
            path.unlink()
    return changed


def readme(text: str, evidence: Path) -> str:
    """`text` with the catalogue between its markers; the section is added at the end if there is none."""
    if (BEGIN in text) != (END in text):
        raise UserError(f"README.md holds only one of {BEGIN} and {END}; write both or none")
    if BEGIN not in text:
        text = text.rstrip("\n") + f"\n\n## Catalogue\n\n{BEGIN}\n{END}\n"
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{NOTE}\n\n{table(evidence)}\n{END}{after}"


def table(evidence: Path) -> str:
    """All ports and methods in one Markdown table."""
    lines = [
        "| port | method | what it does | paper | measured against the baseline | claim |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    n_methods = 0
    for info in registry.ports().values():
        measured = rows_of(record.read(evidence / f"{info.name}.jsonl"))
        for i, (key, card) in enumerate(own_methods(info.name).items()):
            n_methods += 1
            port = f"[{info.name}](docs/ports/{info.name}.md)" if i == 0 else ""
            shown = [
                ("" if row.choice == key else f"`{row.choice}`: ") + measured_text(row)
                for row, _ in of_method(measured, key)
            ]
            figure = "<br>".join(shown) or "—"
            cells = (
                port,
                f"**{key}**" if key == info.baseline else key,
                cell(card.summary),
                _paper(card),
                figure,
                cell(claim_text(card.claim)) or "—",
            )
            lines.append("| " + " | ".join(cells) + " |")
    return (
        f"{len(registry.ports())} ports, {n_methods} methods. Baselines are bold. A figure is the mean ± "
        "standard deviation over seeds; the change is paired with the baseline seed by seed, with its "
        "95% interval. Machine, model, data and seeds of every figure stand on the port's page.\n\n" + "\n".join(lines)
    )


def _paper(card: Card) -> str:
    if card.paper is None:
        return "—"
    name, link = card.paper
    return f"[{cell(name)}]({link})" if link else cell(name)
