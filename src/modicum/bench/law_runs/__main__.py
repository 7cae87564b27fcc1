"""Command line of the run tables: a finished run is appended to TABLE.jsonl and is not made again after a kill."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from modicum.bench import law_runs
from modicum.bench.measurement import Settings
from modicum.core.errors import ModicumError
from modicum.core.files import write_text
from modicum.laws.table import read_runs

TABLES = sorted(f.stem for f in Path(__file__).parent.glob("[!_]*.py"))


def main(words: Sequence[str] | None = None) -> int:
    about = (law_runs.__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(prog="python -m modicum.bench.law_runs", description=about)
    parser.add_argument("table", choices=TABLES)
    parser.add_argument("--out", type=Path, required=True, help="folder of the tables")
    parser.add_argument("--data", help="a folder or file of text instead of the Python installation")
    parser.add_argument("--domain", default="code", help="mixed: the domain that the models are continued on")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--quick", action="store_true", help="seconds, for a test")
    given = parser.parse_args(words)
    table = importlib.import_module(f"modicum.bench.law_runs.{given.table}")
    settings = Settings(scale=table.SMALL if given.quick else table.SCALE, data=given.data, quick=given.quick)
    path = given.out / f"{given.table}.jsonl"
    try:
        for seed in map(int, given.seeds.split(",")):
            done = {str(v) for v in read_runs(path)["run"]} if path.is_file() else set()
            for rows in table.rows(settings, seed, done, given.domain):
                old = path.read_text(encoding="utf-8") if path.is_file() else ""
                write_text(path, old + "".join(json.dumps(row) + "\n" for row in rows))
                end = rows[-1]
                shown = {k: v for k, v in end.items() if k in ("loss", "change", "score", "tokens")}
                print(f"{end['run']}: " + ", ".join(f"{k} {v:,.6g}" for k, v in shown.items()), flush=True)
    except KeyboardInterrupt:
        print("modicum: stopped; the same command goes on after the runs in the table", file=sys.stderr)
        return 130
    except ModicumError as error:
        print(f"modicum: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
