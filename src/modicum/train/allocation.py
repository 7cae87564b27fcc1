"""Freed memory stays with a training process: glibc's thresholds for the time of a run.

Every step allocates and frees the same large tensors. By default the C library gives what is free at the end of its
heap back to the system, and takes tensors above a limit from it one by one, so the system clears the same pages in
every step: about a tenth of the CPU time of a step of a small model. The peak is the same.
"""

from __future__ import annotations

import contextlib
import ctypes
import os

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # of mallopt
USUAL = 32 << 20  # where glibc's own, moving limit ends


def keep() -> None:
    """Give no freed memory back from now on. Nothing happens without glibc, or where the environment sets limits."""
    if {"MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"} & os.environ.keys():
        return
    _set(1 << 30, (1 << 31) - 1)


def release() -> None:
    """Give it back, and go on as usual."""
    if {"MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"} & os.environ.keys():
        return
    _set(USUAL, 2 * USUAL)
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _set(mmap: int, trim: int) -> None:
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        if not library.mallopt(MMAP_THRESHOLD, mmap):
            library.mallopt(MMAP_THRESHOLD, min(mmap, USUAL))
        library.mallopt(TRIM_THRESHOLD, trim)
