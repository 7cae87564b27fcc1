"""A worker process: reads tasks from standard input, one JSON line each, and answers on standard output."""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import traceback
from typing import Any

from modicum.core.errors import ModicumError


def execute(function: str, task: dict[str, Any]) -> dict[str, Any]:
    """{"result": ...} of `MODULE:NAME`(task), or {"error": kind, "message": one line}."""
    module, _, name = function.partition(":")
    try:
        return {"result": getattr(importlib.import_module(module), name)(task)}
    except ModicumError as error:
        return {"error": type(error).__name__, "message": str(error)}
    except OSError as error:
        import errno

        if error.errno == errno.ENOSPC:
            return {"error": "UserError", "message": no_space(error)}
        return {"error": "ModicumError", "message": f"{type(error).__name__}: {error}"}
    except MemoryError:
        return {"error": "ModicumError", "message": "a worker ran out of memory; use fewer processes"}
    except Exception as error:
        traceback.print_exc(file=sys.stderr)
        return {"error": "ModicumError", "message": f"{name} failed: {type(error).__name__}: {error}"}


def no_space(error: OSError) -> str:
    where = f" while writing {error.filename}" if error.filename else ""
    return f"no space left on the device{where}; free some, then type the same command again: finished parts are kept"


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what Ctrl-C ends
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # an exception, so that open files are cleaned up
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # printed text must not mix with the replies
    for line in sys.stdin:
        request = json.loads(line)
        replies.write(json.dumps(execute(request["function"], request["task"])) + "\n")
        replies.flush()


if __name__ == "__main__":
    main()
