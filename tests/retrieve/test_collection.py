"""Judged collections: both layouts, metrics against ir-measures, paired tests, mistakes in files."""

import json
import sys

import numpy as np
import pytest
from typer.testing import CliRunner

from modicum.core.errors import UserError
from modicum.retrieve import metrics
from modicum.retrieve.bm25 import BM25, tokenize
from modicum.retrieve.collection import Collection, evaluate, paired, per_query
from modicum.retrieve.indexes import Hits

DOCS = {
    "d1": ("Sockets", "Open a socket and listen on it."),
    "d2": ("", "Close the file when it was read."),
    "d3": ("Threads", "Lock a thread before the socket is closed."),
    "d4": ("", "Nothing of interest."),
}
QUERIES = {"q1": "open socket", "q2": "read file", "q3": "unjudged"}
QRELS = {"q1": {"d1": 2, "d3": 1, "d4": 0}, "q2": {"d2": 1, "gone": 1}}


@pytest.fixture
def beir(tmp_path):
    folder = tmp_path / "toy"
    (folder / "qrels").mkdir(parents=True)
    rows = [json.dumps({"_id": i, "title": t, "text": x, "metadata": {}}) for i, (t, x) in DOCS.items()]
    (folder / "corpus.jsonl").write_text("\n".join(rows) + "\n\n")
    (folder / "queries.jsonl").write_text("\n".join(json.dumps({"_id": i, "text": t}) for i, t in QUERIES.items()))
    lines = [f"{q}\t{d}\t{g}" for q, judged in QRELS.items() for d, g in judged.items()]
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n" + "\n".join(lines))
    return folder


def test_beirs_layout_is_read_and_tables_say_the_same(beir, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    made = Collection.open(beir)
    assert made.ids == list(DOCS) and made.texts[0] == "Sockets\nOpen a socket and listen on it."
    assert made.queries == ["open socket", "read file"] and made.relevant == [
        {0: 2.0, 2: 1.0, 3: 0.0},
        {1: 1.0, -3: 1.0},
    ]
    tables = tmp_path / "tables"
    tables.mkdir()
    columns = {"id": list(DOCS), "title": [t for t, _ in DOCS.values()], "text": [x for _, x in DOCS.values()]}
    pq.write_table(pa.table(columns), tables / "corpus.parquet")
    pq.write_table(pa.table({"id": list(QUERIES), "text": list(QUERIES.values())}), tables / "queries.parquet")
    flat = [(q, d, g) for q, judged in QRELS.items() for d, g in judged.items()]
    names = ("query_id", "doc_id", "relevance")
    pq.write_table(
        pa.table(dict(zip(names, map(list, zip(*flat, strict=True)), strict=True))), tables / "qrels.parquet"
    )
    again = Collection.open(tables)
    assert (again.ids, again.texts, again.queries, again.relevant) == (
        made.ids,
        made.texts,
        made.queries,
        made.relevant,
    )
    assert len(Collection.open(beir, limit=1).queries) == 1


def test_metrics_are_those_of_ir_measures():
    ir_measures = pytest.importorskip("ir_measures")
    rng = np.random.default_rng(0)
    relevant = [{int(d): float(rng.integers(0, 4)) for d in rng.permutation(150)[:20]} for _ in range(40)]
    ids_QK = np.stack([rng.permutation(150)[:100] for _ in range(40)])
    values = per_query(Hits(ids_QK, np.zeros(ids_QK.shape, np.float32)), relevant)
    qrels = [ir_measures.Qrel(str(q), str(d), int(g)) for q, judged in enumerate(relevant) for d, g in judged.items()]
    run = [ir_measures.ScoredDoc(str(q), str(d), -r) for q, ids in enumerate(ids_QK) for r, d in enumerate(ids)]
    for name, measure in (("ndcg@10", "nDCG@10"), ("mrr@10", "RR@10"), ("recall@10", "R@10"), ("recall@100", "R@100")):
        theirs = ir_measures.iter_calc([ir_measures.parse_measure(measure)], qrels, run)
        by_query = {m.query_id: m.value for m in theirs}
        assert np.allclose(values[name], [by_query[str(q)] for q in range(40)], atol=1e-9), name


def test_bm25_is_its_formula_over_a_collection(beir):
    """A plain float64 computation, document by document."""
    made = Collection.open(beir)
    terms = [tokenize(t) for t in made.texts]
    mean = np.mean([len(t) for t in terms])

    def score(query: str, d: int) -> float:
        total = 0.0
        for t in tokenize(query):
            df, tf = sum(t in words for words in terms), terms[d].count(t)
            idf = np.log(1 + (len(terms) - df + 0.5) / (df + 0.5))
            total += idf * tf / (tf + 1.5 * (1 - 0.75 + 0.75 * len(terms[d]) / mean))
        return total

    bm25 = BM25.build(made.texts)
    for query in made.queries:
        assert np.allclose(bm25.scores(query), [score(query, d) for d in range(4)], atol=1e-5)


def test_what_is_missing_counts_as_missed(beir):
    result = evaluate(Collection.open(beir), ["bm25", "dense:encoder=lsa"], fuse=True)
    figures = result["retrievers"]
    assert set(figures) == {"bm25", "dense:encoder=lsa", "fused", "fused-ranks"} and result["queries"] == 2
    assert result["weights"] == {"bm25": 0.5, "dense:encoder=lsa": 0.5} and result["fitted_on"] == 0, "too few to fit"
    assert np.isclose(figures["bm25"]["recall@100"]["mean"], (1.0 + 0.5) / 2)
    assert figures["bm25"]["ndcg@10"]["low"] <= figures["bm25"]["ndcg@10"]["mean"] <= figures["bm25"]["ndcg@10"]["high"]
    assert {(p["a"], p["b"]) for p in result["paired"]} == {
        ("dense:encoder=lsa", "bm25"),
        ("fused", "bm25"),
        ("fused", "dense:encoder=lsa"),
        ("fused-ranks", "bm25"),
        ("fused", "fused-ranks"),
    }


def test_weights_are_fitted_on_other_queries_than_those_judged():
    """60 passages with a word each; queries are these words, and every second one is asked for in the judged half."""
    words = [f"word{n}" for n in range(60)]
    queries = [f"{w} word{(n + 1) % 60} word{(n + 1) % 60}" for n, w in enumerate(words)]
    made = Collection("words", words, words, queries, [{n: 1.0} for n in range(60)])
    result = evaluate(made, ["bm25", "bm25:b=0"], fuse=True)
    assert result["fitted_on"] == 30 and result["queries"] == 30
    assert set(result["weights"]) == {"bm25", "bm25:b=0"} and np.isclose(sum(result["weights"].values()), 1)


def test_paired_tests_see_differences_and_no_others():
    rng = np.random.default_rng(0)
    a = rng.random(200)
    clear, none = paired(a + 0.05, a), paired(a, rng.permutation(a))
    assert clear["p"] < 0.001 and np.isclose(clear["difference"], 0.05) and clear["low"] > 0
    assert none["p"] > 0.01 and none["low"] < 0 < none["high"]
    assert paired(a, a)["p"] == 1.0
    few = paired(np.array([1.0, 1, 1, 1]), np.zeros(4))
    assert 0.08 < few["p"] < 0.2, "four queries of one sign: 2/16"


@pytest.mark.parametrize(
    "name,content,message",
    [
        ("corpus.jsonl", '{"_id": "d1", "text": "a"}\n{"_id": "d1", "text": "b"}', "twice"),
        ("corpus.jsonl", '{"_id": "d1"}', "line 1"),
        ("queries.jsonl", '{"_id": "q1", "text": "a"}\nnot json', "line 2"),
        ("qrels/test.tsv", "query-id\tcorpus-id\tscore\nq1\td1", "line 2"),
        ("qrels/test.tsv", "query-id\tcorpus-id\tscore\nx\td1\t1", "ids agree"),
        ("qrels/test.tsv", None, "lacks qrels/test.tsv"),
    ],
)
def test_mistakes_in_files_get_one_line(beir, name, content, message):
    (beir / name).unlink() if content is None else (beir / name).write_text(content)
    with pytest.raises(UserError, match=message) as error:
        Collection.open(beir)
    assert "\n" not in str(error.value)


def test_the_verb_prints_a_table_and_json(beir, monkeypatch):
    from modicum import cli

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["modicum", *args])
        return CliRunner().invoke(cli.app, list(args))

    shown = run("retrieval", str(beir), "bm25", "dense:encoder=lsa", "--fuse")
    assert shown.exit_code == 0, shown.output
    assert "2 queries, 4 passages" in shown.stdout and "fused - bm25: ndcg@10" in shown.stdout
    result = json.loads(run("retrieval", str(beir), "--json").stdout)
    assert list(result["retrievers"]) == ["bm25"] and result["paired"] == []
    wrong = run("retrieval", str(beir), "bm26")
    assert isinstance(wrong.exception, UserError) and "bm25" in str(wrong.exception)


def test_rows_without_results_score_zero():
    ids_QK = np.full((2, 10), -1)
    assert not metrics.ndcgs(ids_QK, [{0: 1.0}, {}], 10).any()
