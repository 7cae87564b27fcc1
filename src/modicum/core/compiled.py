"""C sources of the package as shared libraries: compiled once per machine, stored in the user's cache.

A compiled file is named by a hash of its sources, the flags, the compiler and the processor's features, so that a cache
used by several machines, or an upgrade, stays consistent.

Environment: MODICUM_NATIVE=0 turns kernels off; MODICUM_ISA=amx, avx512, avx2 or none limits the instructions that
serving kernels use; CC names the compiler; MODICUM_HOME or XDG_CACHE_HOME moves the cache.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from modicum.core.files import cache_home

FLAGS = ("-O3", "-march=native", "-fopenmp", "-shared", "-fPIC")
OFF = ("0", "no", "off", "false")


@functools.cache
def abilities() -> frozenset[str]:
    """Feature flags of this processor."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(
                (frozenset(line.split(":")[1].split()) for line in file if line.startswith("flags")), frozenset()
            )
    except OSError:
        return frozenset()


def wanted() -> str:
    """What MODICUM_NATIVE is set to."""
    return os.environ.get("MODICUM_NATIVE", "1")


def compiler() -> str | None:
    """The C compiler to use, or None where there is none."""
    return os.environ.get("CC") or next((c for c in ("cc", "gcc", "clang") if shutil.which(c)), None)


def folder() -> Path:
    return cache_home() / "native"


def build(compiler: str, source: Path, features: Iterable[str], flags: Sequence[str] = FLAGS) -> Path:
    """The path of the shared library of `source`, compiled if this machine does not have it. Headers lie beside it.

    Raises OSError, SubprocessError.
    """
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=60, check=True).stdout
    directory = folder()
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError:  # no writable home: a private temporary folder
        directory = Path(tempfile.gettempdir()) / f"modicum-{os.getuid()}"
        directory.mkdir(mode=0o700, exist_ok=True)
        if directory.stat().st_uid != os.getuid():
            raise
    path = directory / f"{source.stem}-{stamp(version, source.parent, features, flags)}.so"
    if not path.exists():
        descriptor, temporary = tempfile.mkstemp(suffix=".so", dir=directory)
        os.close(descriptor)
        try:
            subprocess.run(
                [compiler, *flags, str(source), "-o", temporary, "-lm"],
                capture_output=True,
                text=True,
                timeout=300,
                check=True,
            )
            os.replace(temporary, path)
        finally:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
    return path


def stamp(version: str, sources: Path, features: Iterable[str], flags: Sequence[str] = FLAGS) -> str:
    """Names the compiled sources: -march=native may use any of the processor's features."""
    digest = hashlib.sha256(repr((version, tuple(flags), sorted(features), platform.machine())).encode())
    for source in sorted([*sources.glob("*.h"), *sources.glob("*.c")]):
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    return digest.hexdigest()[:24]


def failure(error: Exception) -> str:
    """The first line of what a compiler or loader wrote."""
    output = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
    return output[0] if output else type(error).__name__
