"""One stage in a process of its own: `python -m modicum.pipeline.worker RUN STAGE SECONDS`.

The process dies with its parent, keeps its allocator from hoarding freed memory (so that the resident
peak is the peak of live tensors, which is what a plan can promise), measures itself, and leaves
`done.json` or `failed.json`; only the first makes the stage finished.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import signal
import sys
import threading
import time
import traceback
from pathlib import Path

from modicum.budget import Deadline, Meter
from modicum.core.errors import ModicumError
from modicum.core.events import Events
from modicum.core.files import read_json, tree_bytes, write_json
from modicum.pipeline.context import Context, Run, stage_fingerprint
from modicum.pipeline.recipe import load

MMAP_THRESHOLD = 16 << 20  # bytes; larger blocks go back to the system when freed (1 MiB would halve the speed)
DISK_FULL = 74  # exit code of a stage that could not even write why it failed
SPINS = "1000"  # turns that a thread of OpenMP waits awake
_M_MMAP_THRESHOLD, _PR_SET_PDEATHSIG = -3, 1


def environment() -> dict[str, str]:
    """The environment of a stage.

    glibc asks for huge pages, which makes training steps about a third faster. OpenMP's threads go to sleep
    soon instead of spinning: on a machine that does something else besides, spinning costs a factor of three.
    """
    tunables = ":".join(filter(None, (os.environ.get("GLIBC_TUNABLES"), "glibc.malloc.hugetlb=1")))
    return {"GOMP_SPINCOUNT": SPINS} | os.environ | {"GLIBC_TUNABLES": tunables}


def frugal_allocator() -> None:
    """Hand blocks above `MMAP_THRESHOLD` back to the system at once (glibc; elsewhere nothing)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, MMAP_THRESHOLD)


def trim_allocator() -> None:
    """Hand back what the allocator holds unused: blocks of ever other sizes leave glibc's heap full of holes."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def die_with_parent(parent: int) -> None:
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)

    def watch() -> None:  # where prctl does not exist, and for a parent that died before the call
        while os.getppid() == parent:
            time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def main(folder: str, name: str, seconds: str, parent: str) -> int:
    die_with_parent(int(parent))
    frugal_allocator()
    run = Run(Path(folder))
    recipe = load(run.folder / "run.yaml")
    if recipe.threads:
        os.environ["OMP_NUM_THREADS"] = str(recipe.threads)
    plan = read_json(run.folder / "plan.json")["stages"].get(name, {})
    events = Events(run.folder / "events.jsonl", stage=name)
    context = Context(recipe, run, name, events, Deadline(float(seconds)), plan.get("decisions", {}))
    failed = run.stage(name) / "failed.json"
    failed.unlink(missing_ok=True)
    with run.lock("worker", wait=10):
        run.stage(name).mkdir(parents=True, exist_ok=True)
        try:
            events.emit("stage_start", planned=plan.get("cost", {}))
            with Meter(children=True) as meter:
                figures = recipe.entry(name).stage.run(recipe.section(name), run.inputs(recipe, name), context)
            measured = figures.pop("cost", {}) | {
                "peak_bytes": meter.peak_bytes,
                "seconds": meter.seconds,
                "disk_bytes": tree_bytes(run.stage(name)),
            }
            run.finish(
                name,
                {
                    "fingerprint": stage_fingerprint(recipe, name),
                    "figures": figures,
                    "planned": plan.get("cost", {}),
                    "measured": measured,
                },
            )
            events.emit("stage_end", measured=measured)
        except ModicumError as error:
            return _fail(failed, str(error), error.exit_code)
        except KeyboardInterrupt:
            return 130
        except (OSError, MemoryError) as error:
            if not isinstance(error, MemoryError) and error.errno != errno.ENOSPC:
                traceback.print_exc()
            return _fail(failed, _system(error), 2)
    return 0


def _fail(failed: Path, message: str, exit_code: int) -> int:
    """Leave the reason for the run to read; where not even that can be written, say so by the exit code."""
    try:
        write_json(failed, {"message": message, "exit_code": exit_code})
    except OSError:
        return DISK_FULL
    return exit_code


def _system(error: BaseException) -> str:
    if isinstance(error, MemoryError):
        return "the machine's memory is used up; ask for less (a smaller model or batch) or set budget.memory"
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return f"the disk is full ({error.filename or 'while writing'}); free space or choose another folder with --out"
    return f"{type(error).__name__}: {error}"


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
