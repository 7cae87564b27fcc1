"""Show what every step of a curation decided about one document, with score and reason."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def why(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A curated folder, or a run directory with one.")],
    document: Annotated[str, typer.Argument(metavar="DOC_ID", help="Its id; parts of it (ID#...) are shown as well.")],
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
) -> None:
    """Show what every step of a curation decided about one document, with score and reason.

    Ids stand in documents/*.parquet and drops.jsonl of a curated folder.
    """
    import json

    from modicum.core.errors import UserError
    from modicum.data.explain import explain

    folders = (
        [run]
        if (run / "curation.json").is_file()
        else sorted(p.parent for p in run.glob("stages/*/data/curation.json"))
    )
    if not folders:
        raise UserError(
            f"{run} holds no finished curation; give a folder that modicum curate wrote, or a run directory"
        )
    verdicts, errors = [], []
    for folder in folders:
        try:
            verdicts += explain(folder, document)
        except UserError as error:
            errors.append(error)
    if not verdicts:
        raise errors[-1]
    if as_json:
        print(json.dumps([v.as_dict() for v in verdicts], indent=2, ensure_ascii=False))
        return
    for verdict in verdicts:
        state = f"kept in {verdict.split}, domain {verdict.domain}" if verdict.split else "dropped"
        print(f"{verdict.id}: {state}")
        for d in verdict.decisions:
            print(f"  {d.step:<20}{' '.join(part for part in (d.decision, d.reason, d.detail) if part)}")
        for name, value in sorted(verdict.meta.items()):
            print(f"  {name:<20}{value}")
