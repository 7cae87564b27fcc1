"""Questions over a folder: the split, the arms through a real engine, and what the verb prints and keeps."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from retrieve_toys import random_llama
from typer.testing import CliRunner

from modicum.core.errors import UserError
from modicum.evaluate import grounded
from modicum.evaluate.reading import open_index, read_items

N = 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("qa") / "cats"
    out.mkdir()
    ids = [f"p{i}" for i in range(N)]
    texts = [f"The cat number{i} sat on the mat of house{i} and slept." for i in range(N)]
    pq.write_table(pa.table({"id": ids, "title": [None] * N, "text": texts}), out / "corpus.parquet")
    answers = [[f"house{i}"] for i in range(N)] + [[]]
    queries = {"id": [f"q{i}" for i in range(N + 1)], "text": [f"Where sat number{i}?" for i in range(N + 1)]}
    pq.write_table(pa.table(queries | {"answers": answers}), out / "queries.parquet")
    judged = {"query_id": [f"q{i}" for i in range(N + 1)], "doc_id": [*ids, "p0"], "relevance": [1] * (N + 1)}
    pq.write_table(pa.table(judged), out / "qrels.parquet")
    return out


def test_items_have_answers_and_a_split_and_an_order_of_their_own(folder):
    test, dev = read_items(folder), read_items(folder, split="dev")
    assert len(test) + len(dev) == N and not {i.id for i in test} & {i.id for i in dev} and 1 <= len(dev) <= 12
    assert all(i.answers == (f"house{i.id[1:]}",) and i.gold == (f"p{i.id[1:]}",) for i in test)
    assert read_items(folder, 5) == test[:5] != read_items(folder, 5, seed=1)
    with pytest.raises(UserError, match=r"lacks corpus\.parquet"):
        read_items(folder.parent)
    with pytest.raises(UserError, match="not one of dev, test"):
        read_items(folder, split="train")


def test_the_prompts_of_the_arms_hold_what_their_names_say(folder, tmp_path):
    searcher = open_index(folder, tmp_path, None)
    asked = read_items(folder, 6)
    prompts, shown = grounded.compose_arms(asked, searcher, grounded.ARMS, 2, None, 200, lambda t: len(t.split()))
    for i, item in enumerate(asked):
        closed, retrieved, gold = (prompts[arm][i][-1]["content"] for arm in grounded.ARMS)
        assert item.answers[0] not in closed and item.answers[0] in gold and "[2]" not in gold
        assert item.gold[0] in shown[i] and item.answers[0] in retrieved
        assert closed == retrieved[retrieved.index("Question:") :]
    said = {"closed": ["no idea"] * 6, "retrieved": [item.answers[0] for item in asked]}
    graded = grounded.grade(asked, said, shown)
    assert graded.recall == 1.0 and graded.figures["retrieved"]["exact"]["value"] == 1.0
    assert {(r["arm"], r["against"], r["figure"]): r["difference"] for r in graded.paired}[
        "retrieved", "closed", "exact"
    ] == 1.0
    for wrong in (["closed", "closed"], ["open"], []):
        with pytest.raises(UserError, match="arm"):
            grounded.check_arms(wrong)


def test_the_verb_asks_a_real_model_and_keeps_replies_and_evidence(folder, tmp_path, monkeypatch):
    from modicum import cli

    model = random_llama(tmp_path / "model", context=512)
    args = ["qa", str(model), str(folder), "--limit", "4", "--max-tokens", "4", "--out", str(tmp_path / "out")]
    args += ["--prompt-tokens", "300", "--evidence", str(tmp_path / "evidence"), "--json"]
    monkeypatch.setattr("sys.argv", ["modicum", *args])
    done = CliRunner().invoke(cli.app, args)
    assert done.exit_code == 0, (done.output, done.exception)
    said = json.loads(done.stdout)
    assert said["questions"] == 4 and set(said["figures"]) == set(grounded.ARMS) and said["recall"] == 1.0
    kept = json.loads((tmp_path / "out" / "qa-model-cats.json").read_text())
    assert len(kept["rows"]) == 4 and all({"closed", "retrieved", "gold"} <= set(row) for row in kept["rows"])
    (line,) = (tmp_path / "evidence" / "qa.jsonl").read_text().splitlines()
    entry = json.loads(line)
    assert entry["figures"] == said["figures"] and entry["paired"] == said["paired"] and "rows" not in entry
    assert set(entry["data"]["sha256"]) == {"corpus.parquet", "queries.parquet", "qrels.parquet"}
    assert entry["model"]["name"] == "model" and entry["machine"]["cores"] >= 1 and entry["seconds"] > 0
