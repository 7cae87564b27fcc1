"""Likelihoods and bits per byte against naive float64 loops and transformers."""

import math

import numpy as np
import pytest
import torch

from modicum.core.errors import UserError
from modicum.data.tokenizer import Tokenizer
from modicum.evaluate.answer import Answerer
from modicum.evaluate.lm import bits_per_byte, ratio_stderr, windows
from modicum.evaluate.score import loglikelihood, score_rows, split_pair
from modicum.evaluate.tasks import Choose, Generate
from modicum.model.config import llama_like
from modicum.model.decoder import Decoder
from modicum.model.folder import save_model

TEXTS = [
    "The quick brown fox jumps over the lazy dog. " * 4,
    "x",
    "",
    "Ünïcödé — 日本語 🙂\n\n\ttabs",
    "<|endoftext|> is text",
]


@pytest.fixture(scope="module")
def tokenizer():
    texts = ["the quick brown fox jumps over the lazy dog", "one two three", "Question: Answer:"]
    return Tokenizer.train(texts * 4, 400)


@pytest.fixture(scope="module")
def model(tokenizer):
    config = llama_like(tokenizer.vocab_size, 64, 2, context_length=32, eos_ids=(tokenizer.eos_id,))
    return Decoder(config, torch.Generator().manual_seed(0)).eval()


def naive_nats(model, ids, length, overlap):
    """Each token's -log p by one forward pass of its own, with the context the windows give it."""
    total, n = 0.0, len(ids) - 1
    start, ends = 0, []
    while start < n:
        end = min(start + (length if start == 0 else length - overlap), n)
        ends += [(t, max(0, end - length)) for t in range(start, end)]
        start = end
    for t, first in ends:
        with torch.no_grad():
            logits = model(torch.tensor([ids[first : t + 1]]))[0, -1].double()
        total -= float(torch.log_softmax(logits, -1)[ids[t + 1]])
    return total


@pytest.mark.parametrize(("length", "overlap"), [(None, 0), (16, 0), (16, 7), (16, 0.5), (5, 4)])
def test_bits_per_byte_equals_a_naive_loop(model, tokenizer, length, overlap):
    double = Decoder(model.config).double().eval()
    double.load_state_dict({k: v.double() for k, v in model.state_dict().items()})
    said = bits_per_byte(double, tokenizer, TEXTS, sequence_length=length, overlap=overlap, batch_tokens=64)
    shared = int(overlap * length) if isinstance(overlap, float) else overlap
    nats = nbytes = tokens = 0
    for text in TEXTS:
        ids = [tokenizer.eos_id, *tokenizer.encode(text, specials=False)]
        nats += naive_nats(double, ids, length or 32, shared)
        nbytes += len(text.encode())
        tokens += len(ids) - 1
    assert said.bytes == nbytes and said.tokens == tokens and said.documents == 4
    assert np.isclose(said.nats, nats, rtol=1e-9)
    assert np.isclose(said.bits_per_byte, nats / nbytes / math.log(2)) and said.stderr > 0
    assert np.isclose(said.perplexity, math.exp(nats / tokens))


def test_bits_per_byte_equals_transformers(model, tokenizer, tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer.save(tmp_path / "tokenizer")
    save_model(model, tmp_path / "model", tmp_path / "tokenizer")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    texts = [t for t in TEXTS if 0 < len(tokenizer.encode(t, specials=False)) < 32]
    nats = 0.0
    for text in texts:
        ids = torch.tensor([[tokenizer.eos_id, *tokenizer.encode(text, specials=False)]])
        with torch.no_grad():
            nats += float(theirs(ids, labels=ids).loss) * (ids.shape[1] - 1)
    assert len(texts) >= 2
    assert np.isclose(bits_per_byte(model, tokenizer, texts).nats, nats, rtol=1e-5)


def test_windows_score_every_token_once():
    for n in (1, 2, 7, 8, 9, 40):
        for length, overlap in ((8, 0), (8, 3), (8, 7), (1, 0)):
            tokens = list(range(n))
            scored = []
            for row, count in windows(tokens, length, overlap):
                assert len(row) - 1 <= length and row == list(range(row[0], row[0] + len(row)))
                scored += row[len(row) - count :]
            assert scored == tokens[1:]


def test_a_batch_changes_nothing(model, tokenizer):
    pairs = [
        ("the quick", " brown fox"),
        ("", "one"),
        ("a b c " * 30, "dog"),
        ("Question: two\nAnswer: ", "three"),
    ]
    together = loglikelihood(model, tokenizer, pairs)
    for pair, both in zip(pairs, together, strict=True):
        (alone,) = loglikelihood(model, tokenizer, [pair], batch_tokens=1)
        assert np.isclose(both.nats, alone.nats, atol=1e-4) and both.tokens == alone.tokens
    assert together[1].nbytes == 3
    context, continuation = split_pair(tokenizer, "Question: two\nAnswer: ", "three")
    assert tokenizer.decode(context + continuation) == "Question: two\nAnswer: three"
    ids = tokenizer.encode("the quick brown fox")
    with torch.no_grad():
        log_p = torch.log_softmax(model(torch.tensor([ids]))[0].double(), -1)
    n = len(tokenizer.encode("the quick"))
    assert np.isclose(together[0].nats, sum(float(log_p[t - 1, ids[t]]) for t in range(n, len(ids))), atol=1e-4)


def test_replies_are_greedy_and_scored_as_such(model, tokenizer):
    prompts, budgets = ["the quick", "one two three one two three", "dog"], [4, 3, 4]
    asked = [Generate(prompt, budget, ()) for prompt, budget in zip(prompts, budgets, strict=True)]
    texts = Answerer(model, tokenizer).answers(asked)
    for prompt, text, budget in zip(prompts, texts, budgets, strict=True):
        assert Answerer(model, tokenizer).answers([Generate(prompt, budget, ())]) == [text]
        start = tokenizer.encode(prompt)
        ids = list(start)
        for _ in range(budget):
            token = int(model(torch.tensor([ids]))[0, -1].argmax())
            if token in tokenizer.stop_ids:
                break
            ids.append(token)
        assert tokenizer.decode(ids[len(start) :]) == text
        ((_, greedy),) = score_rows(model, [(ids, len(ids) - len(start))])
        assert greedy.all()
        ids[-1] = (ids[-1] + 1) % tokenizer.vocab_size
        ((_, greedy),) = score_rows(model, [(ids, len(ids) - len(start))])
        assert not greedy[-1] and greedy[:-1].all()
    (whole,) = Answerer(model, tokenizer).answers([Generate("dog", 8, ())])
    stops = (whole[5:7], whole[2:4])  # the earliest place counts, not the order
    assert Answerer(model, tokenizer).answers([Generate("dog", 8, stops)]) == [
        whole[: min(whole.index(s) for s in stops)]
    ]


@pytest.mark.parametrize("prefix", ["auto", "start"])
def test_choices_are_scored_as_by_the_decoder_itself(model, tokenizer, prefix):
    """Other contexts after the cut between context and choice, contexts that lose their beginning, many at once."""
    asked = [
        Choose("the quick", (" brown fox", " lazy", "er dog")),
        Choose("a b c " * 30, ("dog", "one two")),
        Choose("", ("one", "two three")),
        Choose("Question: two\nAnswer: ", ("three", "one")),
    ]
    found = Answerer(model, tokenizer, prefix=prefix).answers(asked)
    for request, scores in zip(asked, found, strict=True):
        pairs = [(request.prompt, choice) for choice in request.choices]
        for mine, plain in zip(scores, loglikelihood(model, tokenizer, pairs, prefix=prefix), strict=True):
            assert mine.nats == pytest.approx(plain.nats, abs=1e-4)
            assert (mine.greedy, mine.tokens, mine.nbytes) == (plain.greedy, plain.tokens, plain.nbytes)


def test_a_chat_template_wraps_what_is_answered_in_words(model, tokenizer):
    auto = Answerer(model, tokenizer, template="auto")
    ((ids,), (plain,)) = (
        a.encode(Generate("the fox", 4, lead="The dog")).contexts for a in (auto, Answerer(model, tokenizer))
    )
    chat = tokenizer.chat([{"role": "user", "content": "the fox"}])
    assert tokenizer.decode(ids, skip_special=False) == chat + "The dog" and chat.count("the fox") == 1
    assert tokenizer.decode(plain) == "the fox"
    choose = Choose("the fox", (" one", " two"))
    assert auto.encode(choose) == Answerer(model, tokenizer).encode(choose)
    always = Answerer(model, tokenizer, template="always").encode(choose)
    assert tokenizer.decode(always.contexts[0], skip_special=False) == chat
    assert [tokenizer.decode(ids) for ids in always.continuations] == ["one", "two"]
    with pytest.raises(UserError, match="auto, always, none"):
        Answerer(model, tokenizer, template="chat")


def test_ratio_error_matches_the_delta_method():
    rng = np.random.default_rng(0)
    size = rng.integers(50, 150, 400).astype(float)
    top = 0.7 * size + rng.normal(0, 10, 400)
    residual = top - top.sum() / size.sum() * size
    expected = math.sqrt((residual**2).sum()) / size.sum()
    assert np.isclose(ratio_stderr(top, size), expected, rtol=0.1)
    assert math.isnan(ratio_stderr(top[:1], size[:1]))


def test_mistakes(model, tokenizer):
    small = Decoder(llama_like(300, 64, 1, context_length=32))
    with pytest.raises(UserError, match="do not belong together"):
        bits_per_byte(small, tokenizer, ["the quick brown fox"])
    with pytest.raises(UserError, match="no text"):
        bits_per_byte(model, tokenizer, ["", ""])
    with pytest.raises(UserError, match="overlap"):
        bits_per_byte(model, tokenizer, TEXTS, sequence_length=16, overlap=16)
    with pytest.raises(UserError, match="empty continuation"):
        loglikelihood(model, tokenizer, [("a", "")])
    with pytest.raises(UserError, match="exceeds"):
        loglikelihood(model, tokenizer, [("a", "the " * 100)])
    with pytest.raises(UserError, match="no room"):
        Answerer(model, tokenizer).answers([Generate("a", 32)])
    with pytest.raises(UserError, match="empty continuation"):
        Answerer(model, tokenizer).answers([Choose("a", ("b", ""))])
    with pytest.raises(UserError, match="exceeds"):
        Answerer(model, tokenizer).answers([Choose("a", ("the " * 100, "b"))])
    with pytest.raises(UserError, match="do not belong together"):
        Answerer(small, tokenizer).answers([Generate("the quick brown fox", 2)])
    with pytest.raises(UserError, match="prefix"):
        loglikelihood(model, tokenizer, [("a", "b")], prefix="bos")
