"""The live index: any sequence of changes against a plain dictionary, threads, processes killed at random."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from hashed_words import INFO, HashedWords
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from typer.testing import CliRunner

from modicum.core import registry
from modicum.core.errors import UserError
from modicum.retrieve.bm25 import BM25
from modicum.retrieve.live import Live, open_searcher
from modicum.retrieve.passages import Passage, indexed_text
from modicum.retrieve.search import Searcher, build_index

NOUNS, VERBS = "socket thread file queue parser matrix cookie locale buffer archive", "open close read write lock flush"
WORDS = f"{NOUNS} {VERBS}".split()


@pytest.fixture(autouse=True, scope="module")
def _known_encoder():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(registry.methods("encoder"), "hashed-words", INFO)
        yield


def passage(name: str, text: str) -> Passage:
    return Passage(name, text, "s", "")


def texts_of(live: Live) -> dict[str, str]:
    return {p.id: p.text for p in live.passages()}


class Changes(RuleBasedStateMachine):
    """Add, replace, remove, compact and reopen in any order; every search is that of brute force."""

    def __init__(self):
        super().__init__()
        import tempfile

        self.home = tempfile.TemporaryDirectory()
        self.truth: dict[str, str] = {}

    @initialize()
    def begin(self):
        self.live = Live.create(Path(self.home.name) / "i", encoder="hashed-words")

    @rule(rows=st.dictionaries(st.integers(0, 9), st.lists(st.sampled_from(WORDS), min_size=1, max_size=5), max_size=4))
    def add(self, rows):
        fresh = {f"p{n}": " ".join(words) for n, words in rows.items()}
        assert self.live.add(passage(n, t) for n, t in fresh.items()) == len(fresh)
        self.truth |= fresh

    @rule(numbers=st.sets(st.integers(0, 12), max_size=4))
    def remove(self, numbers):
        ids = {f"p{n}" for n in numbers}
        assert self.live.remove(ids) == len(ids & self.truth.keys())
        self.truth = {n: t for n, t in self.truth.items() if n not in ids}

    @rule()
    def compact(self):
        self.live.compact()
        assert len(self.live.header["segments"]) <= 1 or not self.truth

    @rule()
    def reopen(self):
        self.live = Live(self.live.folder)

    @invariant()
    def searches_are_brute_force(self):
        assert texts_of(self.live) == self.truth and len(self.live) == len(self.truth)
        if not self.truth:
            assert self.live.search("open file", 3) == []
            return
        names = [p.id for p in self.live.passages()]
        scores = HashedWords().encode([self.truth[n] for n in names]) @ HashedWords().encode(["open file"])[0]
        hits = self.live.search("open file", len(names), "dense")
        assert np.allclose([h.score for h in hits], np.sort(scores)[::-1], atol=1e-5)
        assert all(np.isclose(h.score, scores[names.index(h.passage.id)], atol=1e-5) for h in hits)
        lexical = BM25.build([self.truth[n] for n in names]).scores("open file")
        found = {h.passage.id: h.score for h in self.live.search("open file", len(names), "bm25")}
        assert np.allclose([found.get(n, 0.0) for n in names], lexical, atol=1e-5), "statistics of what is there"
        assert {h.passage.id for h in self.live.search("open file", 3)} <= self.truth.keys()

    def teardown(self):
        self.home.cleanup()


TestChanges = Changes.TestCase
TestChanges.settings = settings(
    max_examples=6, stateful_step_count=8, deadline=None, suppress_health_check=list(HealthCheck)
)


def test_an_encoder_keeps_its_statistics_until_a_compaction(tmp_path):
    live = Live.create(tmp_path / "i", encoder="lsa:dims=8")
    base = [passage(f"p{i}", " ".join(np.random.default_rng(i).choice(WORDS, 8))) for i in range(30)]
    live.add(base)
    before = live.encoder.encode(["open file", "lock thread"])
    live.add([passage("new", "open file open file")])
    assert np.array_equal(live.encoder.encode(["open file", "lock thread"]), before)
    assert live.search("open file", 1, "dense")[0].passage.id == "new"
    other = Live(tmp_path / "i")
    other.compact()
    live.search("open file", 1)
    fresh = tmp_path / "fresh"
    build_index([*base, passage("new", "open file open file")], fresh, encoder="lsa:dims=8")
    expected = Searcher(fresh).search("open file", 5, "dense")
    got = live.search("open file", 5, "dense")  # the reader that stayed open takes the new statistics too
    assert [h.passage.id for h in got] == [h.passage.id for h in expected]
    assert np.allclose([h.score for h in got], [h.score for h in expected], atol=1e-4)


def test_searches_go_on_while_a_writer_adds_and_compacts(tmp_path):
    live = Live.create(tmp_path / "i", encoder="hashed-words")
    live.add([passage("stays", "open the socket")])
    failures, done = [], threading.Event()

    def read() -> None:
        reader = Live(tmp_path / "i")
        while not done.is_set():
            try:
                hits = reader.search("open the socket", 3)
                assert hits[0].passage.id == "stays"
            except BaseException as error:
                failures.append(error)
                return

    threads = [threading.Thread(target=read) for _ in range(3)]
    for t in threads:
        t.start()
    for n in range(6):
        live.add([passage(f"p{n}", f"lock thread number {n}")])
        live.remove([f"p{n - 1}"])
        if n % 2:
            live.compact()
    done.set()
    for t in threads:
        t.join()
    assert not failures, failures[0]
    assert texts_of(live).keys() == {"stays", "p5"}


CHILD = """
import sys
from hashed_words import INFO
from modicum.core import registry
from modicum.retrieve.live import Live
from modicum.retrieve.passages import Passage
registry.methods("encoder")["hashed-words"] = INFO
live = Live(sys.argv[1])
n = int(sys.argv[2])
while True:
    live.add([Passage(f"p{n}", f"open file {n}", "s", ""), Passage("last", f"the last is {n}", "s", "")])
    print("added", n, flush=True)
    if n % 3 == 2:
        live.remove([f"p{n - 1}"])
        print("removed", n - 1, flush=True)
        live.compact()
        print("compacted", flush=True)
    n += 1
"""


def test_a_writer_killed_at_random_loses_nothing_committed(tmp_path):
    """What the child reported is there after SIGKILL; at most the change it was making may be there besides."""
    folder = tmp_path / "i"
    Live.create(folder, encoder="hashed-words")
    (tmp_path / "child.py").write_text(CHILD)
    paths = [str(Path(__file__).parent), *sys.path]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in paths if p)}
    present: set[int] = set()
    first, last = 0, None
    rng = np.random.default_rng(0)
    for _ in range(3):
        child = subprocess.Popen(
            [sys.executable, str(tmp_path / "child.py"), str(folder), str(first)],
            stdout=subprocess.PIPE,
            env=env,
            text=True,
        )
        lines = [child.stdout.readline()]
        for _ in range(int(rng.integers(1, 5))):
            lines.append(child.stdout.readline())
        time.sleep(float(rng.random()) * 0.05)
        child.send_signal(signal.SIGKILL)
        lines += child.stdout.readlines()
        child.wait()
        for line in filter(str.strip, lines):
            word, *number = line.split()
            if word == "added":
                present.add(int(number[0]))
                last = int(number[0])
            elif word == "removed":
                present.discard(int(number[0]))
        assert last is not None, "the child did something"
        live = Live(folder)
        rows = texts_of(live)
        numbers = {int(n[1:]) for n in rows if n != "last"}
        undecided = {last + 1, last - 1}  # the change that was cut off: an addition or a removal
        assert numbers ^ present <= undecided, (numbers, present)
        assert rows["last"] in (f"the last is {last}", f"the last is {last + 1}")
        assert live.search("open file", 3, "bm25") and live.search("open file", 3, "dense")
        present, first, last = numbers, max(numbers) + 1, max(numbers)
    live.compact()
    assert len(list((folder / "segments").iterdir())) == 1, "what was left half-written is gone"


def test_a_built_folder_becomes_live_and_stays_searchable(tmp_path):
    rows = [passage(f"p{i}", f"{w} the thing") for i, w in enumerate(WORDS)]
    build_index(rows, tmp_path / "i", encoder="hashed-words")
    before = Searcher(tmp_path / "i").search("lock the thing", 4)
    live = Live.adopt(tmp_path / "i")
    assert isinstance(open_searcher(tmp_path / "i"), Live) and isinstance(Live.adopt(tmp_path / "i"), Live)
    assert [h.passage.id for h in live.search("lock the thing", 4)] == [h.passage.id for h in before]
    assert {p.name for p in (tmp_path / "i").iterdir()} <= {"live.json", "segments", ".writer.lock"}
    live.add([passage("p0", "zebra zebra")])
    assert live.search("zebra", 1)[0].passage.text == "zebra zebra" and len(live) == len(WORDS)
    assert indexed_text(rows[0]) not in {p.text for p in live.passages()}


def test_the_verb_updates_and_the_search_verb_sees_it(tmp_path, monkeypatch):
    import json

    from modicum import cli

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["modicum", *args])
        result = CliRunner().invoke(cli.app, list(args))
        assert result.exit_code == 0, result.output
        return result.stdout

    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "a.md").write_text("# Cats\n\nThe cat sat on the mat and slept all day long.\n")
    run("index", str(docs), "--out", str(tmp_path / "i"))
    (docs / "b.md").write_text("# Dogs\n\nA dog chased the cat away over the hill.\n")
    made = json.loads(run("update", str(tmp_path / "i"), str(docs / "b.md"), "--json"))
    assert made["added"] == 1 and made["passages"] == 2 and made["segments"] == 2
    hits = json.loads(run("search", str(tmp_path / "i"), "dog", "--json"))
    assert "Dogs" in hits[0]["title"]
    run("update", str(tmp_path / "i"), "--remove", hits[0]["id"], "--compact")
    assert json.loads(run("search", str(tmp_path / "i"), "dog", "--json")) == []
    monkeypatch.setattr(sys, "argv", ["modicum", "update"])
    wrong = CliRunner().invoke(cli.app, ["update", str(tmp_path / "i")])
    assert isinstance(wrong.exception, UserError) and "nothing to do" in str(wrong.exception)


def test_wrong_use_gets_one_line(tmp_path):
    live = Live.create(tmp_path / "i")
    assert live.modes == ("bm25",) and live.search("anything", 3) == [] and live.add([]) == 0
    for wrong in (
        lambda: live.search(" ", 3),
        lambda: live.search("x", 0),
        lambda: live.search("x", 3, "dense"),
        lambda: live.add([passage("a", "one"), passage("a", "two")]),
        lambda: Live(tmp_path / "none"),
        lambda: Live.create(tmp_path / "i"),
    ):
        with pytest.raises(UserError) as error:
            wrong()
        assert "\n" not in str(error.value)
    assert len(Live(tmp_path / "i")) == 0, "a refused addition leaves nothing"
