"""Errors a person can act on.

Every message is one line of three parts: what was given, what is allowed, what to type next.
The command line prints it without a traceback and exits with the error's `exit_code`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ModicumError(Exception):
    """An error with a message for the user; exit code 1 unless a subclass sets another."""

    exit_code = 1


class UserError(ModicumError):
    """The input cannot be used as given: wrong key, missing file, impossible combination. Exit code 2."""

    exit_code = 2


class BudgetError(UserError):
    """The plan does not fit the budget; the message shows the arithmetic."""


class CorruptError(ModicumError):
    """A stored file does not match its checksum, length or format."""


class MissingExtra(UserError):
    """The requested work needs an optional package."""

    def __init__(self, package: str, extra: str, purpose: str):
        super().__init__(
            f"{purpose} needs the package {package!r}, which is not installed; type: pip install 'modicum[{extra}]'"
        )


def unknown(kind: str, given: object, allowed: Iterable[object], hint: str = "") -> UserError:
    """A `UserError` for a name that is not among `allowed`, with the nearest valid one first."""
    names = sorted(str(a) for a in allowed)
    near = difflib.get_close_matches(str(given), names, n=1, cutoff=0.5)
    did_you_mean = f" Did you mean {near[0]!r}?" if near else ""
    shown = ", ".join(names[:24]) + (", ..." if len(names) > 24 else "")
    return UserError(
        f"unknown {kind} {str(given)!r}.{did_you_mean} Allowed: {shown or '(none)'}." + (f" {hint}" if hint else "")
    )
