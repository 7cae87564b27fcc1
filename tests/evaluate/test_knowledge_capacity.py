"""Knowledge capacity: bits against the paper's formula, models that know all, nothing, or worse than nothing."""

import math
from random import Random

import pytest
import torch

from modicum.core import registry
from modicum.data.tokenizer import Tokenizer
from modicum.evaluate import biographies
from modicum.evaluate.biographies import People, Sizes, learnt_bits, most_bits
from modicum.evaluate.run import run_tasks, solved_texts
from modicum.evaluate.score import LogLikelihood, loglikelihood
from modicum.model.config import llama_like
from modicum.model.decoder import Decoder

SIZES = Sizes()


def build(**knobs):
    return registry.build("task", {"method": "knowledge-capacity", **knobs})


def test_sizes_are_those_of_the_paper():
    assert 2**SIZES.name_bits == pytest.approx(400 * 400 * 1000)
    assert 2**SIZES.attribute_bits == pytest.approx(2 * (12 * 28 * 200) * 200 * 300 * 100 * 263)
    assert SIZES.attribute_bits == pytest.approx(47.6, abs=0.05)
    people = People(SIZES, 0)
    assert [len(set(people.words[k])) for k in ("first", "last", "city", "employer")] == [400, 1000, 200, 263]
    assert people[7] == People(SIZES, 0)[7] != People(SIZES, 1)[7]


def oracle(task, p_name, p_value):
    """Replies of a model that gives names and values these probabilities."""
    docs = list(task.docs("test", None, 0))
    kinds = task.sizes.attributes()
    rows = []
    for doc in docs:
        nats = [math.log(p_name), *(math.log(p_value(kind)) for kind in kinds)]
        rows.append(task.grade(doc, [[LogLikelihood(n, n > -0.1, 3, 9)] for n in nats]))
    return task.aggregate(rows)


def test_bits_of_models_that_know_all_and_nothing():
    n = 40
    task = build(people=n, exposures=1)
    all_known = oracle(task, 1 / n, lambda kind: 1.0)
    direct = n * math.log2(2**SIZES.name_bits / n) + n * SIZES.attribute_bits
    assert n * all_known["bits"]["value"] == pytest.approx(direct) == pytest.approx(n * most_bits(n, SIZES))
    assert all_known["known"]["value"] == 1 and all_known["most_bits"]["value"] == pytest.approx(direct / n)
    sizes = SIZES.attributes()
    uniform = oracle(task, 2**-SIZES.name_bits, lambda kind: 1 / sizes[kind])
    assert uniform["bits"]["value"] == pytest.approx(0, abs=1e-9)
    worse = oracle(task, 2**-60, lambda kind: 1e-9 if kind == "city" else 1 / sizes[kind])
    assert worse["bits"]["value"] == pytest.approx(0, abs=1e-9), "worse than guessing must not count below nothing"
    one = oracle(task, 2**-SIZES.name_bits, lambda kind: 1.0 if kind == "major" else 1 / sizes[kind])
    assert one["bits"]["value"] == pytest.approx(math.log2(100))


def test_bits_never_exceed_what_there_is():
    rng = Random(0)
    for _ in range(50):
        n = rng.randint(1, 10**5)
        nats = {kind: rng.random() * 2 * math.log(size) for kind, size in SIZES.attributes().items()}
        name = math.log(n) + rng.random() * 5
        assert 0 <= learnt_bits(name, nats, SIZES) <= most_bits(n, SIZES) + 1e-9


@pytest.mark.parametrize("style", ["full", "short"])
def test_what_is_scored_stands_in_the_training_text(style):
    task = build(people=30, exposures=4, style=style)
    train = list(task.docs("train", None, 0))
    assert len(train) == 120 and len({d["name"] for d in train}) == 30
    of_first = {d["prompt"] for d in train if d["name"] == train[0]["name"]}
    assert len(of_first) == (4 if style == "full" else 1)
    for doc in list(task.docs("test", 5, 0)):
        name, *values = task.requests(doc, [])
        assert name.prompt == "" and name.choices == (doc["name"],), "the name stands after nothing"
        assert [v.choices[0].strip() for v in values] == list(doc["values"].values())
        for value in values:  # nothing of the answer in its prompt, and the name before it
            assert value.choices[0] not in value.prompt and doc["name"] in value.prompt
        text = task.text(doc)
        assert all(v in text for v in doc["values"].values()) and text.startswith(doc["name"])
    if style == "full":
        assert len(biographies.ENDS) * min(len(v) for v in biographies.VERBS.values()) == 40


def test_losses_are_sums_over_tokens_as_scored_without_the_engine():
    task = "knowledge-capacity:people=6,exposures=2,style=short"
    texts = [d["text"] for d in solved_texts(task, 12)]
    tokenizer = Tokenizer.train(texts, 300)
    config = llama_like(tokenizer.vocab_size, 64, 1, context_length=256, eos_ids=(tokenizer.eos_id,))
    model = Decoder(config, torch.Generator().manual_seed(0)).eval()
    (result,) = run_tasks(model, tokenizer, [task])
    method = registry.build("task", task)
    for doc, row in zip(method.docs("test", None, 0), result.rows, strict=True):
        requests = method.requests(doc, [])
        scores = loglikelihood(model, tokenizer, [(r.prompt, r.choices[0]) for r in requests])
        assert row["nats_name"] == pytest.approx(-scores[0].nats, abs=1e-3) and scores[0].tokens > 1
        assert row["nats_employer"] == pytest.approx(-scores[-1].nats, abs=1e-3)
    assert result.figures["bits"]["value"] < 5, "a fresh model knows nobody"
