"""The whole curation: one outcome on any engine and number of processes, resuming, books, users' mistakes."""

from __future__ import annotations

import errno
import hashlib
import json
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from modicum.core import registry
from modicum.core.errors import CorruptError, ModicumError, UserError
from modicum.core.events import Events, read_events
from modicum.data import engines, pipeline, stages
from modicum.data.curate import CurateConfig, Curation, curate
from modicum.data.readers import ReadConfig
from modicum.data.stream import Stream
from modicum.data.tokenizer import Tokenizer

SMALL = CurateConfig(vocab_size=512, tokenizer_bytes=100_000, heldout=0.1)
SYLLABLES = ["ka", "lo", "mi", "ren", "tas", "vu", "del", "por", "san", "qui"]


def prose(seed: int, words: int = 220) -> str:
    """Text that passes the quality step: words of two to four syllables among the commonest ones."""
    rng = np.random.default_rng(seed)
    out = []
    for k in range(words):
        made = "".join(SYLLABLES[s] for s in rng.integers(0, 10, int(rng.integers(2, 5))))
        out.append(("the", "of", "and", "to")[int(rng.integers(4))] + " " + made if k % 4 == 0 else made)
        if k % 12 == 11:
            out[-1] += ".\n\n" if k % 48 == 47 else "."
    return " ".join(out).replace("\n\n ", "\n\n")


@pytest.fixture(autouse=True)
def small_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "MIN_GROUP_BYTES", 70_000)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 200 kB: prose, its copies, near copies, code, rubbish."""
    root = tmp_path_factory.mktemp("source") / "texts"
    root.mkdir()
    for i in range(60):
        (root / f"doc{i:02d}.md").write_text(f"# Report {i}\n\n{prose(i)}\n")
    (root / "copy.txt").write_text((root / "doc03.md").read_text())
    (root / "near.txt").write_text((root / "doc07.md").read_text() + "One more sentence in the end.\n")
    (root / "broken.txt").write_bytes(bytes(range(256)) * 10)
    (root / "short.txt").write_text("Too short.")
    for module in (json, subprocess):
        path = Path(module.__file__)
        (root / f"{path.parent.name}_{path.name}").write_text(path.read_text())
    return root


def contents(folder: Path) -> dict[str, str]:
    """Checksum of every file; of curation.json what does not measure time."""
    out = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            data = path.read_bytes()
            if path.name == "curation.json":
                stats = json.loads(data)
                del stats["seconds"]
                for book in stats["steps"]:
                    del book["seconds"]
                data = json.dumps(stats, sort_keys=True).encode()
            out[path.relative_to(folder).as_posix()] = hashlib.sha256(data).hexdigest()
    return out


@pytest.fixture(scope="module")
def curated(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Curation:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "MIN_GROUP_BYTES", 70_000)
        return curate(str(source), tmp_path_factory.mktemp("one") / "out", SMALL, processes=1)


def test_books_balance(curated: Curation, source: Path) -> None:
    steps = {b["step"]: b for b in curated.stats["steps"]}
    assert list(steps) == ["read", "normalise", "python-split", "quality", "exact-dedup", "minhash"]
    assert steps["read"]["documents_in"] == len(list(source.iterdir()))
    assert curated.drops == {
        "read": {"binary": 1},
        "quality": {"too-short": 1},
        "exact-dedup": {"duplicate": 1},
        "minhash": {"near-duplicate": 1},
    }
    before = None
    for name, book in steps.items():
        if before is not None:
            assert (book["documents_in"], book["bytes_in"]) == before
        if name not in ("read", "python-split"):
            assert book["documents_in"] - book["documents_out"] == sum(book["drops"].values())
        before = (book["documents_out"], book["bytes_out"])
    assert sum(curated.count("documents", s) for s in ("train", "heldout")) == before[0]
    assert sum(curated.count("bytes", s) for s in ("train", "heldout")) == before[1]
    drops = [json.loads(line) for line in (curated.folder / "drops.jsonl").read_text().splitlines()]
    assert Counter((d["step"], d["reason"]) for d in drops) == {
        (s, r): n for s, reasons in curated.drops.items() for r, n in reasons.items()
    }
    by_id = {d["id"]: d for d in drops}
    assert by_id["texts/near.txt"]["detail"].endswith("like texts/doc07.md")
    assert by_id["texts/doc03.md"]["detail"] == "same as texts/copy.txt", "the first by name stays"


def test_documents_and_shards_agree(curated: Curation) -> None:
    tokenizer = curated.tokenizer()
    assert curated.domains == ["code", "prose"]
    for split in ("train", "heldout"):
        shards = curated.shards(split)
        shards.verify()
        assert shards.manifest["tokenizer"] == tokenizer.fingerprint
        for domain in shards.domains:
            documents = list(curated.documents(split, domain))
            assert shards.documents(domain) == len(documents)
            for i, document in enumerate(documents):
                assert tokenizer.decode(shards.tokens(domain, i)[1:-1]) == document.text
        assert shards.total() == curated.count("tokens", split)
    total = curated.count("bytes", "train") + curated.count("bytes", "heldout")
    assert 0 < curated.count("bytes", "heldout") <= 0.1 * total
    sides = [{d.origin for d in curated.documents(split)} for split in ("train", "heldout")]
    assert not sides[0] & sides[1]
    batch = Stream(curated.shards(), sequence_length=64).next_batch(4)
    assert batch.tokens_BT.shape == (4, 64)
    assert not (curated.folder / ".work").exists()


def test_two_processes_give_the_same(curated: Curation, source: Path, tmp_path: Path) -> None:
    curate(str(source), tmp_path / "out", SMALL, processes=2)
    assert contents(tmp_path / "out") == contents(curated.folder)


def test_ray_gives_the_same(curated: Curation, source: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    curate(str(source), tmp_path / "out", SMALL, engine="ray", processes=2)
    assert contents(tmp_path / "out") == contents(curated.folder)


def test_done_is_done(curated: Curation, source: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in curated.folder.rglob("*")}
    again = curate(str(source), curated.folder, SMALL)
    assert again.stats == curated.stats
    assert before == {p: p.stat().st_mtime_ns for p in curated.folder.rglob("*")}


SCRIPT = """
import sys
from modicum.data import engines, pipeline, stages
from modicum.data.curate import CurateConfig, curate
stages.MIN_GROUP_BYTES = 70_000
curate(sys.argv[1], sys.argv[2], CurateConfig(vocab_size=512, tokenizer_bytes=100_000, heldout=0.1),
       processes=int(sys.argv[3]))
"""


@pytest.mark.parametrize(
    ("marker", "processes"), [("pass-0/part-00002.json", 2), ("split/part-00001.json", 1), ("tokens-train", 1)]
)
def test_killed_run_goes_on(curated: Curation, source: Path, tmp_path: Path, marker: str, processes: int) -> None:
    out = tmp_path / "out"
    run = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(source), str(out), str(processes)], stderr=subprocess.DEVNULL
    )
    for _ in range(12_000):
        if (out / ".work" / marker).exists() or run.poll() is not None:
            break
        time.sleep(0.005)
    run.send_signal(signal.SIGKILL)
    run.wait()
    if not (out / "curation.json").exists():
        with pytest.raises(UserError, match="unfinished"):
            Curation.load(out)
        kept = list((out / ".work").glob("pass-0/part-*.json"))
        assert kept, "it was killed after its first group"
        curate(str(source), out, SMALL, processes=1)
    assert contents(out) == contents(curated.folder)


def test_finished_groups_are_not_done_again(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that fails in its third group leaves two; the next run reads only the rest."""
    real, calls = pipeline.run_group, []

    def failing(task: dict) -> dict:
        calls.append(task["stem"][-5:])
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, "No space left on device", "/somewhere")
        return real(task)

    monkeypatch.setattr(pipeline, "run_group", failing)
    with pytest.raises(UserError, match="no space left on the device") as caught:
        curate(str(source), tmp_path / "out", SMALL, processes=1)
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "out").rglob("*.part")), "nothing half-written"
    curate(str(source), tmp_path / "out", SMALL, processes=1)
    assert calls[:3] == ["00000", "00001", "00002"] and calls[3] == "00002"


def test_full_disk(source: Path, tmp_path: Path) -> None:
    """A real small file system, where the machine lets us mount one."""
    place = tmp_path / "small"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", str(place)], capture_output=True).returncode:
        pytest.skip("cannot mount a tmpfs here")
    try:
        with pytest.raises(UserError, match="no space left"):
            curate(str(source), place / "out", SMALL, processes=2)
        assert not [p for p in (place / "out").rglob("*") if p.name.endswith(".part")]
        assert not (place / "out" / "curation.json").exists()
    finally:
        subprocess.run(["umount", str(place)], check=True)


def test_another_config_replaces(source: Path, tmp_path: Path, curated: Curation) -> None:
    out = tmp_path / "out"
    first = curate(str(source), out, CurateConfig(steps=["keep"], vocab_size=300, heldout=0), processes=1)
    assert first.count("documents", "heldout") == 0 and first.drops == {"read": {"binary": 1}}
    curate(str(source), out, SMALL, processes=1)
    assert contents(out) == contents(curated.folder)


def test_given_tokenizer(source: Path, tmp_path: Path, curated: Curation) -> None:
    model = tmp_path / "model"
    Tokenizer.train(["the words of a model"] * 3, 280).save(model)
    config = CurateConfig(tokenizer=str(model), steps=["normalise"])
    got = curate(str(source), tmp_path / "out", config, processes=1)
    given = Tokenizer.load(model).fingerprint
    assert got.tokenizer().fingerprint == given == got.shards().manifest["tokenizer"]
    assert got.stats["tokenizer"]["trained"] is False
    with pytest.raises(UserError, match=r"no tokenizer\.json"):
        curate(str(source), tmp_path / "other", CurateConfig(tokenizer=str(tmp_path)))


def test_several_sources(source: Path, tmp_path: Path) -> None:
    twin = tmp_path / "twin" / "texts"
    twin.mkdir(parents=True)
    (twin / "doc00.md").write_text("# Other\n\n" + prose(901))
    got = curate([str(source), str(twin)], tmp_path / "out", CurateConfig(vocab_size=300, steps=["keep"]), processes=1)
    ids = {d.id for split in ("train", "heldout") for d in got.documents(split)}
    assert {"texts/doc00.md", "texts-2/doc00.md"} <= ids


def test_out_inside_the_source_is_not_read(tmp_path: Path) -> None:
    root = tmp_path / "texts"
    root.mkdir()
    for i in range(4):
        (root / f"{i}.txt").write_text(prose(i))
    config = CurateConfig(vocab_size=300, heldout=0.3)
    first = curate(str(root), root / "out", config, processes=1)
    assert curate(str(root), root / "out", config, processes=1).stats == first.stats
    with pytest.raises(UserError, match="source itself"):
        curate(str(root), root, config)


PLUGIN = '''"""explode: fails on one document."""
from dataclasses import dataclass
from modicum.data.steps import Step

@dataclass(frozen=True, kw_only=True)
class Config:
    at: str = "doc31"

class Explode(Step):
    def each(self, document):
        if self.config.at in document.id:
            raise ZeroDivisionError("oh no")
        yield document
'''


@pytest.mark.parametrize("processes", [1, 2])
def test_a_failing_step_names_its_document(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, processes: int
) -> None:
    """The step comes from another distribution, as a third party's would."""
    info = tmp_path / "site" / "plug-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: plug\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[modicum.methods]\nstep/explode = plug_explode\n")
    (info.parent / "plug_explode.py").write_text(PLUGIN)
    monkeypatch.syspath_prepend(str(info.parent))
    for cached in (registry.methods, registry.load):
        cached.cache_clear()
    try:
        with pytest.raises(
            ModicumError,
            match=r"step explode failed on document 'texts/doc31\.md': "
            "ZeroDivisionError: oh no",
        ):
            curate(str(source), tmp_path / "out", CurateConfig(steps=["normalise", "explode"]), processes=processes)
        config = CurateConfig(steps=["explode:at=nowhere"], vocab_size=300)
        kept = curate(str(source), tmp_path / "out", config, processes=processes)
        assert kept.count("documents") > 50
    finally:
        sys.modules.pop("plug_explode", None)
        monkeypatch.undo()
        for cached in (registry.methods, registry.load):
            cached.cache_clear()


def test_a_worker_that_dies_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "fatal.py").write_text("import os\n\ndef die(task):\n    os.kill(os.getpid(), 9)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with engines.make("local", 2) as machine, pytest.raises(ModicumError, match="memory ran out"):
        list(machine.run("fatal:die", [{}, {}]))


def test_mistakes(source: Path, tmp_path: Path) -> None:
    def fails(match: str, sources: object = str(source), out: Path = tmp_path / "out", **more) -> None:
        with pytest.raises(UserError, match=match) as caught:
            curate(sources, out, **more)
        assert "\n" not in str(caught.value)

    fails("does not exist", str(tmp_path / "nowhere"))
    fails("no source given", [])
    fails("Did you mean 'local'", engine="locl")
    fails("at least 1", processes=0)
    fails("Did you mean 'minhash'", config=CurateConfig(steps=["minhas"]))
    fails("Did you mean 'threshold'", config=CurateConfig(steps=["minhash:treshold=1"]))
    fails("must be a fraction", config=CurateConfig(heldout=1.5))
    fails("vocab_size=10 is too small", config=CurateConfig(vocab_size=10, steps=["keep"]))
    (tmp_path / "file").write_text("")
    fails("cannot write to", out=tmp_path / "file")
    fails("cannot write to", out=tmp_path / "file" / "below")
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "tokenizer.json").write_text("{}")
    fails("which no curation wrote", out=foreign)
    assert (foreign / "tokenizer.json").read_text() == "{}"
    rubbish = tmp_path / "rubbish"
    rubbish.mkdir()
    (rubbish / "a.txt").write_bytes(bytes(range(256)))
    (rubbish / "b.txt").write_text("tiny")
    fails(r"no document of .*dropped: .*binary 1", str(rubbish), tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_two_at_once_are_refused(source: Path, tmp_path: Path) -> None:
    import fcntl

    work = tmp_path / "out" / ".work"
    work.mkdir(parents=True)
    with open(work / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process"):
            curate(str(source), tmp_path / "out", SMALL)


def test_damaged_books(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a curated folder"):
        Curation.load(tmp_path)
    (tmp_path / "curation.json").write_text('{"version"')
    with pytest.raises(CorruptError, match="damaged"):
        Curation.load(tmp_path)


def test_events_and_verb(source: Path, tmp_path: Path) -> None:
    events = Events(tmp_path / "events.jsonl", "curate")
    curate(str(source), tmp_path / "a", SMALL, processes=1, events=events)
    assert read_events(tmp_path / "events.jsonl", "step")[0]["step"] == "read"
    command = [sys.executable, "-c", "from modicum.cli import main; main()"]
    arguments = [
        "curate",
        str(source),
        "--out",
        str(tmp_path / "b"),
        "--vocab-size",
        "400",
        "--processes",
        "1",
        "--steps",
        "normalise minhash:threshold=0.9",
        "--json",
    ]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, check=True)
    stats = json.loads(done.stdout)
    assert [b["step"] for b in stats["steps"]] == ["read", "normalise", "minhash"]
    assert stats["tokenizer"]["vocab_size"] == 400
    plain = subprocess.run([*command, *arguments[:-1]], capture_output=True, text=True, check=True)
    assert "near-duplicate" in plain.stdout and "train:" in plain.stdout
    bad = subprocess.run(
        [*command, "curate", str(tmp_path / "no"), "--out", str(tmp_path / "c")], capture_output=True, text=True
    )
    assert bad.returncode == 2 and "does not exist" in bad.stderr and "Traceback" not in bad.stderr


@pytest.mark.slow
def test_python_installation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "MIN_GROUP_BYTES", 4 << 20)
    got = curate("python", tmp_path / "out", CurateConfig(), processes=2)
    assert got.count("tokens") > 1_000_000 and set(got.domains) == {"code", "prose"}
    assert got.count("bytes") / got.count("tokens") > 3, "bytes a token"
    assert got.stats["seconds"] < 60


def test_bounded_reading(tmp_path: Path) -> None:
    """A long file is curated in pieces that never meet in memory."""
    (tmp_path / "long.txt").write_text("\n\n".join(prose(i) for i in range(120)))
    config = CurateConfig(vocab_size=300, steps=["normalise"], read=ReadConfig(max_document_bytes=15_000))
    got = curate(str(tmp_path / "long.txt"), tmp_path / "out", config, processes=1)
    assert got.count("documents") + got.count("documents", "heldout") > 10
    assert got.count("documents", "heldout") == 0, "parts of one document stay together"
