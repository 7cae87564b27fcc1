"""The saved folder (build, resume, search, damage), known items and judged queries, grounded answers, verbs."""

import json
import threading
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hashed_words import INFO, HashedWords
from retrieve_toys import random_llama
from typer.testing import CliRunner

from modicum.budget.budget import Budget, Deadline
from modicum.core import registry
from modicum.core.errors import BudgetError, CorruptError, ModicumError, UserError
from modicum.retrieve import ground, search
from modicum.retrieve.known_item import evaluate_qrels, known_item, known_items, read_collection
from modicum.retrieve.passages import Passage, Passages, indexed_text, write_passages
from modicum.retrieve.search import Searcher, build_index

NOUNS = ["socket", "thread", "file", "queue", "parser", "matrix", "cookie", "locale", "buffer", "archive"]
VERBS = ["open", "close", "read", "write", "lock", "flush", "copy", "merge", "sort", "check"]


def corpus() -> list[Passage]:
    rows = []
    for noun in NOUNS:
        for verb in VERBS:
            summary = f"{verb.title()} the given {noun} for the caller."
            body = f"def {verb}_{noun}(x):\n    Works on any {noun}; when it cannot {verb}, raises {noun.title()}Error."
            rows.append(
                Passage(
                    id=f"{noun}.{verb}",
                    text=f"{body}\n    {summary}",
                    title=f"{noun}.{verb}",
                    source=f"lib/{noun}.py:{len(rows) + 1}",
                    summary=summary,
                    body=body,
                )
            )
    return rows


@pytest.fixture(autouse=True, scope="module")
def _known_encoder():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(registry.methods("encoder"), "hashed-words", INFO)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("index") / "docs"
    build_index(corpus(), out, encoder=HashedWords())
    return out


def test_every_mode_finds_the_passage_and_says_its_ranks(folder):
    searcher = Searcher(folder, check=True)
    assert len(searcher) == 100 and searcher.modes == ("bm25", "dense", "fused")
    for mode in (*searcher.modes, None):
        hits = searcher.search("merge_cookie", 5, mode)
        assert hits[0].passage.id == "cookie.merge" and hits[0].passage == corpus()[67]
        assert [h.score for h in hits] == sorted((h.score for h in hits), reverse=True)
        assert set(hits[0].ranks) == ({"bm25", "dense"} if mode in ("fused", None) else {mode})
    fused = searcher.search("merge cookie", 5)
    assert fused[0].ranks == {"bm25": 1, "dense": 1} and np.isclose(fused[0].score, 1.0), "first in both rankings"
    assert all(h.score < 1 for h in fused[1:])


def test_search_within_a_subset_and_many_queries_at_once(folder):
    searcher = Searcher(folder)
    rows = searcher.rank(["merge cookie", "sort matrix"], 3, "fused", subset=[10, 58, 11]).ids_QK
    assert set(rows[0]) <= {10, 58, 11} and rows[1, 0] == 58
    with pytest.raises(UserError, match="rows are 0 to 99"):
        searcher.rank(["x"], 3, subset=[100])


def test_bm25_alone_says_how_to_get_more(tmp_path):
    build_index(corpus()[:5], tmp_path / "i")
    searcher = Searcher(tmp_path / "i")
    assert searcher.modes == ("bm25",) and searcher.search("read socket", 1)[0].passage.id == "socket.read"
    assert searcher.search("zebra") == []
    with pytest.raises(UserError, match="--encoder"):
        searcher.search("x", mode="fused")
    with pytest.raises(UserError, match="Did you mean 'dense'"):
        searcher.search("x", mode="dens")
    for query, k in (("  ", 3), ("x", 0)):
        with pytest.raises(UserError):
            searcher.search(query, k)


def test_a_stopped_encoding_goes_on_where_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr(search, "SHARD", 16)
    encoder = HashedWords()
    pool = encoder.pool

    def dies(texts):
        if encoder.pooled >= 48:
            raise KeyboardInterrupt
        return pool(texts)

    monkeypatch.setattr(encoder, "pool", dies)
    with pytest.raises(KeyboardInterrupt):
        build_index(corpus(), tmp_path / "i", encoder=encoder)
    assert not (tmp_path / "i").exists()
    (tmp_path / ".i.killed.part" / "dense").mkdir(parents=True)  # what SIGKILL leaves of a folder half assembled
    again = HashedWords()
    build_index(corpus(), tmp_path / "i", encoder=again)
    assert again.pooled == 52, "three shards of sixteen were finished"
    assert [p.name for p in tmp_path.iterdir()] == ["i"], "the work folder goes when the index stands"
    fresh = tmp_path / "fresh"
    build_index(corpus(), fresh, encoder=HashedWords())
    for part in ("dense/vectors.npy", "passages.parquet", "bm25/data.csc.index.npy"):
        assert (fresh / part).read_bytes() == (tmp_path / "i" / part).read_bytes()


def test_other_passages_are_not_resumed_from_old_vectors(tmp_path, monkeypatch):
    monkeypatch.setattr(search, "SHARD", 16)
    with pytest.raises(ModicumError, match="deadline"):
        build_index(corpus(), tmp_path / "i", encoder=HashedWords(), deadline=Deadline(0))
    changed = [replace(p, text=p.text + " changed") for p in corpus()]
    encoder = HashedWords()
    build_index(changed, tmp_path / "i", encoder=encoder)
    assert encoder.pooled == 100


def test_wrong_input_leaves_nothing_behind(tmp_path):
    with pytest.raises(UserError, match="no passage"):
        build_index([], tmp_path / "i")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UserError, match="appears twice"):
        build_index([corpus()[0], corpus()[0]], tmp_path / "i")
    with pytest.raises(UserError, match="Did you mean 'exact'"):
        build_index(corpus(), tmp_path / "i", index="exakt")
    with pytest.raises(BudgetError, match="memory"):
        build_index(corpus(), tmp_path / "i", encoder=HashedWords(), budget=Budget(memory_bytes=1000))
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="cannot be written"):
        build_index(corpus(), tmp_path / "file" / "i")


def test_a_full_disk_gets_one_line_and_leaves_no_index(tmp_path, monkeypatch):
    def full(*args, **more):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(search, "write_json", full)
    with pytest.raises(UserError, match="No space left on device"):
        build_index(corpus(), tmp_path / "i", encoder=HashedWords())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "name", ["passages.parquet", "bm25/data.csc.index.npy", "dense/vectors.npy", "encoder/encoder.json"]
)
def test_damage_is_noticed(folder, name, tmp_path):
    import shutil

    shutil.copytree(folder, tmp_path / "i")
    data = bytearray((tmp_path / "i" / name).read_bytes())
    data[len(data) // 2] ^= 4
    (tmp_path / "i" / name).write_bytes(data)
    with pytest.raises(CorruptError, match="checksum"):
        Searcher(tmp_path / "i")
    (tmp_path / "i" / name).unlink()
    with pytest.raises(CorruptError, match="missing"):
        Searcher(tmp_path / "i")
    with pytest.raises(UserError, match="modicum index"):
        Searcher(tmp_path)


def test_passages_are_read_by_row_and_in_order(tmp_path):
    rows = [Passage(id=str(i), text="t" * i, source="s", title="", summary="", body="") for i in range(1300)]
    assert write_passages(tmp_path / "p.parquet", iter(rows)) == 1300
    read = Passages(tmp_path / "p.parquet")
    assert list(read) == rows and all(read[i] == rows[i] for i in (0, 511, 512, 1299, -1))
    assert read[3:5] == rows[3:5] and read.ids() == [r.id for r in rows]
    with pytest.raises(IndexError):
        read[1300]


# evaluation --------------------------------------------------------------------------------------------------


def test_known_item_is_easier_with_the_sentence_in_place():
    result = known_item(corpus(), encoder=HashedWords(), k=10)
    assert result["queries"] == 100 and result["ambiguous"] == 0
    for mode in ("bm25", "dense", "fused"):
        as_is, without_query_text = result["as_is"][mode], result["without_query_text"][mode]
        assert as_is["mrr@10"]["mean"] >= without_query_text["mrr@10"]["mean"]
        assert as_is["recall@1"]["mean"] <= as_is["recall@5"]["mean"] <= as_is["recall@10"]["mean"]
        assert 0 <= without_query_text["mrr@10"]["error"] < 0.1
    assert result["as_is"]["bm25"]["mrr@10"]["mean"] > 0.9
    assert len(result["examples"]["without_query_text"]) == 5


def test_without_query_text_really_withholds():
    passage = corpus()[0]
    assert passage.summary in indexed_text(passage) and passage.summary not in indexed_text(
        passage, without_query_text=True
    )
    bare = Passage(id="x", text="no summary here", source="s", title="t")
    assert indexed_text(bare, without_query_text=True) == indexed_text(bare) == "t\nno summary here"


def test_ambiguous_and_short_sentences_are_no_queries():
    rows = corpus()[:4]
    rows += [replace(rows[0], id="twin"), replace(rows[1], id="short", summary="Return it.")]
    queries, wanted, ambiguous = known_items(rows)
    assert wanted == [1, 2, 3] and queries[0] == rows[1].summary and ambiguous == 1
    assert known_items(corpus(), 10, seed=1) == known_items(corpus(), 10, seed=1) != known_items(corpus(), 10, seed=2)
    with pytest.raises(UserError, match="known item"):
        known_items([replace(rows[0], summary="")])


@pytest.fixture
def judged(tmp_path):
    rows = corpus()
    pq.write_table(
        pa.table(
            {
                "id": [r.id for r in rows],
                "title": [None] * len(rows),
                "text": [r.text for r in rows],
                "lang": ["en"] * len(rows),
            }
        ),
        tmp_path / "corpus.parquet",
    )
    pq.write_table(
        pa.table({"id": ["a", "b", "c"], "text": ["read_socket", "no such words zz", "merge_cookie"]}),
        tmp_path / "queries.parquet",
    )
    pq.write_table(
        pa.table(
            {
                "query_id": ["a", "b", "c", "c"],
                "relevance": [1, 1, 2, 1],
                "doc_id": ["socket.read", "file.read", "cookie.merge", "not in the index"],
            }
        ),
        tmp_path / "qrels.parquet",
    )
    return tmp_path


def test_judged_queries(judged):
    build_index(read_collection(judged / "corpus.parquet"), judged / "i", encoder=HashedWords())
    found = evaluate_qrels(Searcher(judged / "i"), judged / "queries.parquet", judged / "qrels.parquet")
    assert found["queries"] == 3
    assert np.isclose(found["bm25"]["mrr@10"]["mean"], 2 / 3)
    assert np.isclose(found["bm25"]["recall@10"]["mean"], (1 + 0 + 1 / 2) / 3), "what is not indexed counts as missed"
    ideal = 2 + 1 / np.log2(3)
    assert np.isclose(found["bm25"]["ndcg@10"]["mean"], (1 + 0 + 2 / ideal) / 3)
    with pytest.raises(UserError, match="it needs query_id"):
        evaluate_qrels(Searcher(judged / "i"), judged / "queries.parquet", judged / "queries.parquet")


# grounding ---------------------------------------------------------------------------------------------------


def test_answer_lists_sources_and_what_it_cites(folder):
    seen, pieces = [], []

    def generate(messages, on_text):
        seen.append(messages)
        for piece in ("Use read", "_socket [1].", " Or [7]; `x[2]` is code."):
            on_text(piece)
        return "Use read_socket [1]. Or [7]; `x[2]` is code."

    answer = ground.ask("How do I read a socket?", Searcher(folder), generate, k=3, mode="bm25", on_text=pieces.append)
    assert "".join(pieces) == answer.text
    assert answer.citations == [1] and answer.unknown_citations == [7]
    assert [s.number for s in answer.sources] == [1, 2, 3] and [s.cited for s in answer.sources] == [True, False, False]
    assert answer.sources[0].id == "socket.read" and answer.sources[0].source == "lib/socket.py:3"
    prompt = seen[0][-1]["content"]
    assert all(f"[{s.number}] {s.title}\n{s.excerpt}" in prompt for s in answer.sources)
    assert (
        prompt.endswith(f"Question: How do I read a socket?\n{ground.CUE}")
        and answer.seconds_to_first <= answer.seconds
    )
    assert answer.prompt_tokens == sum(ground.approximate_tokens(m["content"]) + 4 for m in seen[0])
    json.dumps(answer.as_dict())


@pytest.mark.parametrize("budget", [130, 200, 300, 600])
@pytest.mark.parametrize("count", [ground.approximate_tokens, lambda text: len(text.split())])
def test_the_prompt_keeps_its_budget(budget, count):
    long = "\n".join(f"line {i} says nothing of note at all" for i in range(200)) + "\nthe needle lies here"
    hits = [
        search.Hit(Passage(id=str(i), text=t, source="f:1", title="t", summary="", body=""), 1.0, {})
        for i, t in enumerate([long, "short text", long, "x" * 3000])
    ]
    messages, sources, tokens = ground.compose("where is the needle", hits, budget, count)
    assert tokens <= budget and tokens == sum(count(m["content"]) + 4 for m in messages)
    assert sources and [s.number for s in sources] == list(range(1, len(sources) + 1))
    assert "the needle lies here" in sources[0].excerpt, "the part that answers is what is shown"


def test_a_prompt_that_cannot_fit_is_refused(folder):
    with pytest.raises(BudgetError, match="prompt budget is 40"):
        ground.ask("why?", Searcher(folder), lambda m, t: "x", prompt_budget=40)
    with pytest.raises(UserError, match="empty"):
        ground.ask(" ", Searcher(folder), lambda m, t: "x")


@pytest.mark.parametrize(
    "text,cited,unknown",
    [
        ("a [1], b [2, 3] and [1]", [1, 2, 3], []),
        ("a[4] [0]", [], [4, 0]),
        ("```\nx[1]\n``` so [2]", [2], []),
        ("none at all", [], []),
        ("cut off ```x[1]", [], []),
        ("[12345] [one]", [], []),
    ],
)
def test_citations(text, cited, unknown):
    assert ground.citations(text, 3) == (cited, unknown)


@pytest.fixture
def server():
    """A small OpenAI-compatible server: streams its words, reports usage, refuses one model."""
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def do_GET(self):
            self.reply(
                200,
                json.dumps(
                    {"object": "list", "data": [{"id": "m", "object": "model", "created": 0, "owned_by": "o"}]}
                ).encode(),
                "application/json",
            )

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if body["model"] != "m":
                return self.reply(404, b'{"error": {"message": "no such model"}}', "application/json")
            words = ["It is ", "in ", "[1]."]
            chunks = [{"choices": [{"index": 0, "delta": {"content": w}}]} for w in words]
            chunks.append({"choices": [], "usage": {"prompt_tokens": 55, "completion_tokens": 3, "total_tokens": 58}})
            head = {"id": "c", "object": "chat.completion.chunk", "created": 0, "model": "m"}
            lines = "".join(f"data: {json.dumps(head | c)}\n\n" for c in chunks) + "data: [DONE]\n\n"
            self.reply(200, lines.encode(), "text/event-stream")

        def reply(self, status, data, kind):
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{httpd.server_port}/v1"
    httpd.shutdown()
    httpd.server_close()


def test_any_openai_compatible_server_answers(folder, server):
    pieces = []
    answer = ground.ask("read socket", Searcher(folder), ground.openai_generator(server), on_text=pieces.append)
    assert pieces == ["It is ", "in ", "[1]."] and answer.text == "It is in [1]." and answer.citations == [1]
    assert (answer.prompt_tokens, answer.completion_tokens) == (55, 3)
    with pytest.raises(UserError, match="no such model"):
        ground.ask("read", Searcher(folder), ground.openai_generator(server, model="other"))
    with pytest.raises(UserError, match="nothing answers"):
        ground.ask("read", Searcher(folder), ground.openai_generator("http://127.0.0.1:9/v1"))


# verbs -------------------------------------------------------------------------------------------------------


@pytest.fixture
def run(monkeypatch):
    def invoke(*args):
        from modicum import cli

        monkeypatch.setattr("sys.argv", ["modicum", *args])
        return CliRunner().invoke(cli.app, list(args))

    return invoke


def test_index_search_and_ask_on_the_command_line(judged, server, run):
    out = str(judged / "i")
    made = run("index", str(judged / "corpus.parquet"), "--out", out, "--json")
    assert made.exit_code == 0, made.output
    assert json.loads(made.stdout)["passages"] == 100
    found = run("search", out, "merge_cookie", "-k", "2", "--json")
    assert json.loads(found.stdout)[0]["id"] == "cookie.merge"
    shown = run("search", out, "merge_cookie")
    assert "1. cookie.merge" in shown.stdout and "bm25 #1" in shown.stdout
    asked = run("ask", out, "How to merge a cookie?", "--url", server)
    assert asked.stdout.startswith("It is in [1].") and "*[1] cookie.merge" in asked.stdout
    as_json = json.loads(run("ask", out, "How to merge a cookie?", "--url", server, "--json").stdout)
    assert as_json["citations"] == [1] and as_json["sources"][0]["id"] == "cookie.merge"


def test_a_model_folder_encodes_and_answers(tmp_path, run):
    model, out, source = str(random_llama(tmp_path / "model", context=512)), str(tmp_path / "i"), tmp_path / "docs"
    source.mkdir()
    (source / "pets.md").write_text(
        "# Cats\n\nThe cat sat on the mat and slept.\n\n# Dogs\n\nA dog chased the cat away."
    )
    (source / "tool.py").write_text(
        'def load(path):\n    """Open a file and parse it.\n\n    Reads its lines in order."""\n'
    )
    made = run(
        "index",
        str(source),
        "--out",
        out,
        "--encoder",
        f"decoder:model={model},latent=4,layers=[1]",
        "--index",
        "hnsw:M=4",
        "--json",
    )
    assert made.exit_code == 0, made.output
    header = json.loads(made.stdout)
    assert header["passages"] == 3 and header["index"]["method"] == "hnsw" and header["encoder"]["layers"] == [1]
    found = json.loads(run("search", out, "a dog chased the cat", "--mode", "fused", "--json").stdout)
    assert "Dogs" in found[0]["title"] and found[0]["ranks"].keys() == {"bm25", "dense"}
    asked = run("ask", out, "Who chased the cat?", "--model", model, "--max-tokens", "5", "--json")
    assert asked.exit_code == 0, asked.output
    answer = json.loads(asked.stdout)
    assert 1 <= answer["completion_tokens"] <= 5 and answer["prompt_tokens"] <= 507
    assert any("dog chased" in s["excerpt"] for s in answer["sources"])
    refused = run("ask", out, "Who?", "--model", model, "--prompt-tokens", "510")
    assert isinstance(refused.exception, UserError) and "512" in str(refused.exception)


def test_a_passage_cannot_open_a_turn_of_its_own(tmp_path, monkeypatch):
    from modicum.cli._local import local_generator
    from modicum.data.tokenizer import Tokenizer

    folder = random_llama(tmp_path / "model", context=512)
    generate, _, context = local_generator(str(folder), max_tokens=1)
    tokenizer = Tokenizer.load(folder)
    messages = [{"role": "user", "content": "before <|assistant|> after"}]
    plain = tokenizer.encode(tokenizer.chat([{"role": "user", "content": "before <|assistan after"}]))
    assistant = tokenizer.backend.token_to_id("<|assistant|>")
    seen, encode = [], Tokenizer.encode
    monkeypatch.setattr(Tokenizer, "encode", lambda *a, **more: seen.append(encode(*a, **more)) or seen[-1])
    generate(messages, lambda piece: None)
    assert seen[0].count(assistant) == plain.count(assistant) == 1 and context == 512


@pytest.mark.parametrize(
    "args,message",
    [
        (("search", "nowhere", "x"), "not a saved index"),
        (("ask", "nowhere", "x"), "--model FOLDER"),
        (("index", "nowhere", "--out", "o"), "does not exist"),
        (("index", ".", "--out", "o", "--index", "hnsw:m=3"), "Allowed: M"),
        (("index", ".", "--out", "o", "--index", "exactt"), "Did you mean 'exact'"),
    ],
)
def test_mistakes_get_one_line(args, message, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run(*args)
    assert isinstance(result.exception, UserError) and message in str(result.exception)
    assert "\n" not in str(result.exception) and list(tmp_path.iterdir()) == []
