"""latent-thoughts on a made process whose thoughts, weights and posterior are known exactly."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from modicum.core import registry
from modicum.core.errors import UserError
from modicum.data.document import Document, Drop
from modicum.data.replies import Replies, Reply, Request
from modicum.data.rewrites import latent_thoughts as lt
from modicum.data.rewriting import rewrite

RNG = np.random.default_rng(0)
PRIOR = RNG.dirichlet(np.ones(8))  # p(z | prefix)
LIKELY = RNG.uniform(0.01, 0.6, 8)  # p(suffix | z, prefix)
POSTERIOR = PRIOR * LIKELY / (PRIOR * LIKELY).sum()
GUESS = 0.5 * POSTERIOR + 0.5 / 8  # q(z | prefix, suffix): near the posterior, not it
EVIDENCE = float((PRIOR * LIKELY).sum())
TEXT = "The lamp was lit at nine. " * 3 + "The ship came in. " * 3


class Process:
    """Generates thoughts z0 ... z7 by GUESS, and knows their likelihoods. cut: thoughts that end at their limit."""

    def __init__(self, cut: set[int] | None = None):
        self.cut, self.requests = cut or set(), list[Request]()

    def __call__(self, requests: Sequence[Request]) -> Iterator[tuple[int, Reply]]:
        self.requests += requests
        for k, request in enumerate(requests):
            if not request.continuation:
                z = int(np.random.default_rng(request.seed).choice(8, p=GUESS))
                yield k, Reply(f" z{z} ", "length" if z in self.cut else "stop")
                continue
            z = int(request.continuation.split("z")[1][0])
            joint = lt.PRIOR in request.continuation
            yield k, Reply("", "stop", math.log(PRIOR[z] * LIKELY[z]) if joint else math.log(GUESS[z]))


def run(number: int, process: Process, knobs: str = "samples=4,tokens=21") -> list[Document | Drop]:
    rewriter = registry.build("rewrite", f"latent-thoughts:{knobs}")
    return list(rewrite(rewriter, [Document(f"d{number}", TEXT)], Replies(process), 3))


def thoughts(out: Sequence[Document | Drop]) -> list[int]:
    return [
        int(d.text.split(lt.PRIOR)[1].split("z")[1][0]) for d in out if isinstance(d, Document) and lt.PRIOR in d.text
    ]


def test_drawn_thoughts_follow_the_posterior_and_not_the_guess() -> None:
    from scipy.stats import chisquare

    process, counts = Process(), Counter[int]()
    for n in range(400):
        counts.update(thoughts(run(n, process, "samples=48,tokens=21")))
    seen = np.array([counts[z] for z in range(8)], float)
    assert chisquare(seen, POSTERIOR * seen.sum()).pvalue > 1e-3
    assert chisquare(seen, GUESS * seen.sum()).pvalue < 1e-3  # neither an unweighted draw ...
    assert seen.max() < 0.9 * seen.sum()  # ... nor the largest weight


def test_the_bound_lies_below_the_evidence_and_closes_as_samples_grow() -> None:
    means = []
    for samples in (1, 4, 32):
        bounds = []
        for n in range(150):
            out = run(n, Process(), f"samples={samples},tokens=21")
            bounds.append(next(d.meta["bound"] for d in out if isinstance(d, Document) and "bound" in d.meta))
        means.append(float(np.mean(bounds)))
    assert means[0] < means[1] < means[2] <= math.log(EVIDENCE) + 0.02
    assert means[2] == pytest.approx(math.log(EVIDENCE), abs=0.03)


def test_layouts_and_requests_are_those_of_the_card() -> None:
    process = Process()
    out = run(0, process)
    original, prior, posterior = (d for d in out if isinstance(d, Document))
    prefix, suffix = registry.build("rewrite", "latent-thoughts:tokens=21").pairs(TEXT)[0]
    z = prior.text.split(lt.PRIOR)[1].split(lt.END)[0].strip()
    assert original.text == TEXT and prior.text == f"{prefix} {lt.START}{lt.PRIOR} {z} {lt.END} {suffix}"
    assert posterior.text == f"{prefix} {lt.START}{lt.END} {suffix} {lt.START}{lt.POSTERIOR} {z} {lt.END}"
    assert prior.origin == "d0" and prior.domain == "prose-thoughts"
    asked, scored = process.requests[:4], process.requests[4:]
    assert {r.prompt for r in asked} == {posterior.text.split(f" {z}")[0]}
    assert len({r.seed for r in asked}) == 4 and all(r.temperature == 1 and r.stop == (lt.END,) for r in asked)
    assert len(scored) == 8 and scored[0].prompt == prefix  # the prefix itself is not counted
    assert scored[0].continuation.endswith(suffix) and scored[1].continuation.endswith(f"{lt.END}")


def test_a_thought_that_was_cut_takes_no_part() -> None:
    for n in range(40):
        assert not set(thoughts(run(n, Process(cut={0, 1, 2})))) & {0, 1, 2}
    out = run(0, Process(cut=set(range(8))))
    assert [type(x) for x in out] == [Document, Drop] and isinstance(out[1], Drop) and out[1].reason == "no-thought"


def test_a_generator_without_likelihoods_is_named_and_the_document_stays() -> None:
    def plain(requests: Sequence[Request]) -> Iterator[tuple[int, Reply]]:
        for k, _ in enumerate(requests):
            yield k, Reply("a thought")

    rewriter = registry.build("rewrite", "latent-thoughts:tokens=21")
    kept, drop = rewrite(rewriter, [Document("d", TEXT)], Replies(plain), 3)
    assert isinstance(kept, Document) and kept.text == TEXT
    assert isinstance(drop, Drop) and drop.reason == "unscored"


def test_a_teacher_gives_one_thought_and_no_scores() -> None:
    process = Process()
    out = run(0, process, "teacher=true,tokens=21,temperature=0.7")
    assert len(process.requests) == 1 and process.requests[0].messages and len(thoughts(out)) == 1
    with pytest.raises(UserError, match="teacher=true"):
        registry.build("rewrite", "latent-thoughts:temperature=0.7")


def test_likelihoods_are_kept_with_the_replies(tmp_path: Path) -> None:
    rewriter, path = registry.build("rewrite", "latent-thoughts:samples=3,tokens=21"), tmp_path / "replies.jsonl"
    first = Replies(Process(), path, "v")
    made = list(rewrite(rewriter, [Document("d", TEXT)], first, 3))
    first.close()
    again = Replies(Process(), path, "v")
    assert list(rewrite(rewriter, [Document("d", TEXT)], again, 3)) == made and not again.generated
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert sum("log_probability" in line for line in lines) == len(lines) - 3


def test_the_engine_s_likelihood_is_the_model_s() -> None:
    import torch

    from modicum.data.tokenizer import Tokenizer
    from modicum.model.config import llama_like
    from modicum.model.decoder import Decoder
    from modicum.serve.config import EngineConfig
    from modicum.serve.engine import Engine
    from modicum.serve.generate import of_engine

    tokenizer = Tokenizer.train([TEXT * 4], 300)
    model = Decoder(
        llama_like(tokenizer.vocab_size, 32, 2, context_length=256), torch.Generator().manual_seed(0)
    ).eval()
    generate = of_engine(Engine(model, tokenizer, EngineConfig(cache="2048tok")))
    requests = [
        Request(prompt="The lamp", continuation=" was lit"),
        Request(prompt="The", max_tokens=3, temperature=0.0),
    ]
    replies = dict(generate(requests))
    before = tokenizer.encode("The lamp", add_special=True)
    after = tokenizer.encode(" was lit", add_special=False)
    with torch.no_grad():
        log_p = torch.log_softmax(model(torch.tensor([[*before, *after]]))[0].double(), -1)
    right = sum(float(log_p[len(before) - 1 + i, t]) for i, t in enumerate(after))
    assert replies[0].log_probability == pytest.approx(right, abs=1e-3)
    assert replies[1].log_probability is None


# Augmented examples


def test_eda_counts_its_changes(tmp_path: Path) -> None:
    from modicum.data.rewrites.peft_augmentation import augmented, read_synonyms

    (tmp_path / "synonyms.txt").write_text("good fine splendid\nfilm movie\n\nlone\n")
    synonyms = read_synonyms(str(tmp_path / "synonyms.txt"))
    assert synonyms == {"good": ["fine", "splendid"], "film": ["movie"]}
    text = " ".join(f"w{i}" for i in range(40))
    rng = np.random.default_rng(0)
    sizes = [len(augmented(text, 0.25, {}, rng).split()) for _ in range(200)]
    assert np.mean(sizes) == pytest.approx(30, abs=1) and min(sizes) > 15  # deletion with probability a quarter
    moved = [
        sum(a != b for a, b in zip(augmented(text, 0.0, {}, rng).split(), text.split(), strict=True)) for _ in range(5)
    ]
    assert moved == [0] * 5
    films = "the good film ends well and the film is good"
    out = augmented(films, 0.2, synonyms, np.random.default_rng(1)).split()
    changed = [w for w in out if w in ("fine", "splendid", "movie")]
    assert 1 <= len(changed) <= 4 and set(out) <= {*films.split(), "fine", "splendid", "movie"}


def test_copies_keep_the_label_and_the_origin_and_differ() -> None:
    document = Document("x", " ".join(f"w{i}" for i in range(30)), "reviews", meta={"label": 1, "quality": 0.5})
    rewriter = registry.build("rewrite", "peft-augmentation:copies=6")
    out = [d for d in rewrite(rewriter, [document], None, 0) if isinstance(d, Document)]
    assert out[0] == document and len({d.text for d in out}) == 7
    assert all(d.origin == "x" and d.meta["label"] == 1 and d.domain == "reviews-augmented" for d in out[1:])


def test_back_translation_asks_twice_and_refuses_what_was_cut() -> None:
    asked: list[str] = []

    def generate(requests: Sequence[Request]) -> Iterator[tuple[int, Reply]]:
        for k, request in enumerate(requests):
            asked.append(request.messages[0][1])
            text = request.messages[0][1].split("\n\n")[1]
            yield (
                k,
                Reply(text.upper() if "French" in asked[-1] else text.lower() + "!", "length" if k == 1 else "stop"),
            )

    rewriter = registry.build("rewrite", "peft-augmentation:op=back-translation,copies=2")
    out = list(rewrite(rewriter, [Document("x", "A fine day it was")], Replies(generate), 0))
    texts = [d.text for d in out if isinstance(d, Document)]
    assert texts[0] == "A fine day it was" and texts[1:] == ["a fine day it was!"]
    assert len(asked) == 4 and sum("A FINE DAY" in a for a in asked) == 2
