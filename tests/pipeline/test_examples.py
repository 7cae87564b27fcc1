"""Examples asked with passages: the right one is among those shown, and the answer cites it."""

import re

import pipeline_toys
import pytest

from modicum.data.curate import CurateConfig, curate
from modicum.data.document import read_documents
from modicum.data.passages import passages
from modicum.pipeline.examples import examples
from modicum.retrieve.search import Searcher, build_index

MODULES = ("json", "textwrap", "heapq", "shutil", "argparse", "random")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """(curated folder, an index over both sides of it)"""
    folder = tmp_path_factory.mktemp("corpus")
    source = pipeline_toys.corpus(folder / "notes", *MODULES)
    config = CurateConfig(steps=["normalise", "python-split"], vocab_size=400, heldout=0.3)
    made = curate([str(source)], folder / "curated", config, processes=1)
    found = [p for side in ("train", "heldout") for d in made.documents(side) for p in passages(d)]
    build_index(found, folder / "index")
    return folder / "curated", Searcher(folder / "index")


def test_grounded_examples_show_the_passage_that_they_cite(corpus):
    folder, searcher = corpus
    made = examples(folder, "train", 40, grounded=0.5, searcher=searcher, budget=600, count=lambda t: len(t.split()))
    shown = [e for e in made if "Sources:" in e.messages[-2]["content"]]
    assert len(made) == 40 and len(shown) == 20
    for example in shown:
        prompt, reply = example.messages[-2]["content"], example.messages[-1]["content"]
        answer, number = re.fullmatch(r"(.*) \[(\d)\]", reply, re.DOTALL).groups()
        source = prompt.partition(f"\n[{number}] ")[2].partition("\n\n[")[0].partition("\n\nQuestion: ")[0]
        assert " ".join(answer.strip("`").split())[:60] in " ".join(source.split()), example
    asked = [e.messages[-2]["content"].rpartition("Question: ")[2] for e in shown]
    assert any(q.startswith("What is the default value") for q in asked)  # one documented fact
    assert any(q.startswith(("What does", "How is", "Which function")) for q in asked)  # and what the pairs ask
    assert len({e.id for e in made}) == 40


def test_the_two_sides_share_no_passage_and_the_choice_is_the_same_each_time(corpus):
    folder, searcher = corpus
    knobs = {"grounded": 1.0, "searcher": searcher, "budget": 600, "count": lambda t: len(t.split())}
    train, heldout = ({d.id for d in read_documents(folder, side)} for side in ("train", "heldout"))
    texts = {
        side: [p.text for p in searcher.passages if p.id.partition("::")[0] in ids and len(p.text) > 40]
        for side, ids in (("train", train), ("heldout", heldout))
    }
    made = examples(folder, "train", 30, **knobs)
    prompts = [e.messages[-2]["content"] for e in made]
    assert len(texts["heldout"]) > 5 and any(text in prompt for prompt in prompts for text in texts["train"])
    for text in set(texts["heldout"]) - set(texts["train"]):
        assert not any(text in prompt for prompt in prompts)
    assert made == examples(folder, "train", 30, **knobs)
    assert made != examples(folder, "train", 30, **knobs, seed=1)


def test_without_an_index_the_pairs_are_asked_alone(corpus):
    made = examples(corpus[0], "train", 5)
    assert len(made) == 5 and all(len(e.messages) == 2 for e in made)
