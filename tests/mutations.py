"""Near misses that the tests must catch: wrong programs that look right, one change of the sources each.

    python tests/mutations.py [WORD ...] [--list]

copies the package and the tests to a temporary folder, plants one mutation after another there, and runs the test that
must fail for it. WORD picks those whose file, test or description has it. Exits with 1 if a mutation lives.

A test that was never seen failing may test nothing: whoever writes a method adds the mistake that is easiest to make.
`old` must occur once in the file. `tests/test_mutations.py` checks that, and runs all of them where slow tests run.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from near_misses import Mutation, mutations

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 300  # for one test

MUTATIONS = mutations()


def picked(words: Sequence[str]) -> list[Mutation]:
    return [m for m in MUTATIONS if not words or any(w in f"{m.what} {m.file} {m.test}" for w in words)]


def copy(folder: Path) -> None:
    """The package and its tests, without what running them left behind."""
    for name in ("src", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    shutil.copy(ROOT / "pyproject.toml", folder)


def fails(folder: Path, test: str) -> bool:
    """Whether a test fails in a copy. Raises RuntimeError if it could not be run."""
    environment = os.environ | {
        "PYTHONPATH": str(folder / "src"),
        "PYTHONDONTWRITEBYTECODE": "1",
        "XDG_CACHE_HOME": str(folder / "cache"),  # kernels of mutated sources go with the copy
    }
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", f"tests/{test}"],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    if done.returncode < 0:  # a signal: a crash is a failure
        return True
    if done.returncode not in (0, 1):  # 1: tests ran, some failed
        raise RuntimeError(f"{test} could not be run:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    if " passed" not in done.stdout and done.returncode == 0 and "skipped" in done.stdout:
        raise RuntimeError(f"{test} is skipped here")
    return done.returncode == 1


def caught(folder: Path, mutation: Mutation) -> bool:
    """Plant a mutation in a copy, run its test, and take the mutation out again."""
    path = folder / "src" / "modicum" / mutation.file
    source = path.read_text(encoding="utf-8")
    if source.count(mutation.old) != 1:
        raise RuntimeError(f"{mutation.file} has {source.count(mutation.old)} times: {mutation.old}")
    path.write_text(source.replace(mutation.old, mutation.new), encoding="utf-8")
    try:
        return fails(folder, mutation.test)
    except subprocess.TimeoutExpired:
        return True
    finally:
        path.write_text(source, encoding="utf-8")


def survivors(mutations: Iterable[Mutation]) -> list[Mutation]:
    """Run them all, a line for each; those whose test passed. Raises RuntimeError if one could not be run."""
    alive = []
    with tempfile.TemporaryDirectory(prefix="modicum-mutations-") as place:
        folder = Path(place)
        copy(folder)
        sound: set[str] = set()
        for mutation in mutations:
            start = time.monotonic()
            if mutation.test not in sound and fails(folder, mutation.test):
                raise RuntimeError(f"{mutation.test} fails without any mutation")
            sound.add(mutation.test)
            killed = caught(folder, mutation)
            word = "caught" if killed else "LIVES "
            print(f"{word} {time.monotonic() - start:6.1f} s  {mutation.what} ({mutation.file})", flush=True)
            if not killed:
                alive.append(mutation)
    return alive


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("word", nargs="*")
    parser.add_argument("--list", action="store_true")
    given = parser.parse_args()
    chosen = picked(given.word)
    if given.list or not chosen:
        print(*(f"{m.file}: {m.what} -> {m.test}" for m in chosen or MUTATIONS), sep="\n")
        return 0 if chosen else 2
    return 1 if survivors(chosen) else 0


if __name__ == "__main__":
    sys.exit(main())
