"""qwenlong-cprs: the mixed mask, tags by hand, windows that join, the loss, and a tagger that learns."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from modicum.core.errors import UserError
from modicum.core.registry import build
from modicum.data.tokenizer import Tokenizer
from modicum.model.config import DecoderConfig
from modicum.model.decoder import Decoder
from modicum.retrieve.tagger import B, E, I, Labelled, MixedAttend, O, Tagger, fit, joined, labels, loss, sentences

COLOURS = ("red", "green", "blue", "grey")
NAMES = ("ada", "boris", "carla", "dmitri", "emma", "farid")
RNG = np.random.default_rng(0)


def example(rng: np.random.Generator) -> Labelled:
    """Three sentences about a house; the one that answers what is asked supports."""
    parts = {
        "colour": f"the front door is painted {rng.choice(COLOURS)} now.",
        "owner": f"it was bought last year by {rng.choice(NAMES)} alone.",
        "age": f"people built it {rng.integers(10, 99)} years ago here.",
    }
    kinds = list(rng.permutation(list(parts)))
    context = " ".join(parts[k] for k in kinds)
    kind = kinds[int(rng.integers(3))]
    start = context.index(parts[kind])
    return Labelled(f"which {kind}", context, [(start, start + len(parts[kind]))])


EXAMPLES = [example(RNG) for _ in range(516)]


def made(layers: int = 4, window: int = 256, both_from: int | None = None) -> Tagger:
    texts = [f"{e.question} {e.context} Tag the supporting facts with 'fact'. other" for e in EXAMPLES[:60]]
    tokenizer = Tokenizer.train(texts, 400)
    shape = {"width": 32, "layers": layers, "heads": 2, "kv_heads": 2, "head_dim": 16, "mlp_width": 64}
    config = DecoderConfig(vocab_size=tokenizer.vocab_size, context_length=512, **shape)
    torch.manual_seed(0)
    return Tagger(Decoder(config, torch.Generator().manual_seed(0)), tokenizer, both_from, window).eval()


def hidden(tagger: Tagger, tokens: torch.Tensor, mask: torch.Tensor, layer: int) -> torch.Tensor:
    states = []
    hook = tagger.model.layers[layer].register_forward_hook(lambda _m, _i, out: states.append(out))
    with torch.no_grad():
        tagger(tokens, mask)
    hook.remove()
    return states[0]


def test_lower_layers_do_not_see_later_tokens_and_upper_ones_do():
    tagger = made()
    assert tagger.both_from == 3
    tokens = torch.arange(5, 17)[None]
    other = tokens.clone()
    other[0, -1] = 99
    mask = torch.ones_like(tokens, dtype=torch.bool)
    for layer in range(4):
        a, b = (hidden(tagger, t, mask, layer)[0, :-1] for t in (tokens, other))
        assert torch.allclose(a, b, atol=1e-6) == (layer < 3), layer


def test_all_causal_is_the_plain_decoder_and_padding_is_never_seen():
    tagger = made(both_from=4)
    tokens = torch.arange(5, 17)[None]
    mask = torch.ones_like(tokens, dtype=torch.bool)
    with torch.no_grad():
        plain = tagger.model.hidden(tokens)
        same = tagger.model.hidden(tokens, attend=MixedAttend(4, mask))
    assert torch.allclose(plain, same, atol=1e-5)
    mixed = made()
    padded = torch.cat([tokens, torch.full((1, 5), 3)], 1)
    with torch.no_grad():
        alone = mixed(tokens, mask)
        beside = mixed(padded, torch.arange(17)[None] < 12)
        left = mixed(torch.cat([torch.full((1, 5), 3), tokens], 1), torch.arange(17)[None] >= 5)
    for a, b, c in zip(alone, beside, left, strict=True):
        assert torch.allclose(a, b[:, :12], atol=1e-5) and torch.allclose(a, c[:, 5:], atol=1e-5)


def test_tags_are_joined_by_hand():
    assert joined([O, B, I, I, I, E, O]) == [(1, 6)]
    assert joined([B, I, O, O, I, E]) == [(0, 6)], "a gap within a span is filled"
    assert joined([B, I, I, I, E, O, B, I, I, I, E]) == [(0, 5), (6, 11)], "B begins another one"
    assert joined([B, I, I, I, I] + [O] * 20 + [I] * 5) == [(0, 5), (25, 30)]
    assert joined([B, I, I, I, I] + [O] * 19 + [I] * 5) == [(0, 29)]
    assert joined([B, I, E, O, B, I, I, E]) == [], "spans of four tokens or fewer are dropped"
    assert joined([B, E, O, I, I], least=2) == [(0, 2), (3, 5)], "a span that ended is not gone on with"
    assert joined([]) == [] and joined([O] * 9) == []


def test_labels_follow_characters():
    offsets = [(0, 3), (3, 7), (7, 9), (9, 12), (12, 12), (12, 15)]
    assert labels(offsets, [(4, 11)]).tolist() == [O, B, I, E, O, O]
    assert labels(offsets, [(0, 2), (13, 15)]).tolist() == [B, O, O, O, O, B], "one token is B"
    assert labels(offsets, []).tolist() == [O] * 6
    text = "One is here. Two is there!\nThree"
    assert [text[a:b] for a, b in sentences(text)] == ["One is here.", "Two is there!", "Three"]


def test_windows_end_at_sentences_and_their_characters_are_of_the_whole_text():
    tagger = made(window=60)
    context = " ".join(e.context for e in EXAMPLES[:4])
    parts = tagger.windows(context, 20)
    assert len(parts) >= 3 and all(len(ids) <= 40 for ids, _ in parts)
    assert [i for ids, _ in parts for i in ids] == tagger.tokenizer.encode(context, specials=False)
    for _, offsets in parts:
        assert context[offsets[-1][1] - 1] == "."
    one, _, offsets = tagger.tags("colour of ada", context)
    assert len(one) == len(offsets) and offsets[-1][1] == len(context)
    # A text that fits one window is tagged as it would be without windows.
    short = EXAMPLES[0]
    wide, narrow = made(window=512), made(window=len(tagger.prefix(short.question)) + 60)
    assert len(narrow.windows(short.context, len(narrow.prefix(short.question)))) == 1
    assert np.allclose(wide.tags(short.question, short.context)[1], narrow.tags(short.question, short.context)[1])


def test_the_loss_is_of_context_tokens_at_their_own_positions():
    tagger = made()
    item = EXAMPLES[0]
    prefix = tagger.prefix(item.question)
    ids, offsets = tagger.windows(item.context, len(prefix))[0]
    tags = torch.from_numpy(labels(offsets, item.spans))
    tokens = torch.tensor([[*prefix, *ids]])
    logits, _ = tagger(tokens, torch.ones_like(tokens, dtype=torch.bool))
    weights = torch.tensor([2.0, 3.0, 4.0, 0.5])
    own = F.cross_entropy(logits[0, len(prefix) :], tags, weight=weights)
    head = tagger.model.head(tagger.model.hidden(tokens, attend=MixedAttend(3, torch.ones_like(tokens).bool())))
    words = head[0, len(prefix) :, list(tagger.words)].log_softmax(-1)
    expected = own + 0.7 * F.nll_loss(words, (tags == O).long())
    value = loss(tagger, [item], weights=weights.tolist(), critic=0.7)
    assert torch.allclose(value, expected, atol=1e-5)
    both = loss(tagger, [item, EXAMPLES[1]])
    assert torch.isfinite(both)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    tagger = made(both_from=0)
    fit(tagger, EXAMPLES[:500], steps=260, batch=8, lr=4e-3)
    folder = tmp_path_factory.mktemp("tagger") / "t"
    tagger.save(folder)
    return folder


def test_a_trained_tagger_shows_the_supporting_sentence(trained):
    reader = build("reader", f"qwenlong-cprs:model={trained}")
    count = lambda text: len(text.split())  # noqa: E731
    right = 0
    for item in EXAMPLES[500:]:
        shown = reader.shorten(item.context, item.question, 30, count)
        ((start, end),) = item.spans
        right += shown == item.context[start:end]
    assert right >= 11, f"{right} of 16"


def test_what_exceeds_the_tokens_is_left_out_by_the_critic(trained):
    reader = build("reader", f"qwenlong-cprs:model={trained}")
    text, count = "One two three. Four five six. Seven eight nine.", lambda t: len(t.split())
    spans = [(a, b, s) for (a, b), s in zip(sentences(text), (0.4, 0.9, 0.6), strict=True)]
    reader.marked = lambda *_: list(spans)
    assert reader.shorten(text, "q", 9, count) == text
    assert reader.shorten(text, "q", 7, count) == "Four five six. Seven eight nine."
    assert reader.shorten(text, "q", 3, count) == "Four five six."
    reader.marked = lambda *_: []
    assert reader.shorten(text, "seven", 3, count) == "Seven eight nine.", "as `ranked` shows it"


def test_only_the_upper_layers_are_trained_and_wrong_folders_are_refused(tmp_path):
    tagger = made()
    before = {n: p.clone() for n, p in tagger.named_parameters()}
    fit(tagger, EXAMPLES[:4], steps=2, batch=2, lr=1e-2)
    changed = {n for n, p in tagger.named_parameters() if not torch.equal(p, before[n])}
    assert any(n.startswith("model.layers.3.") for n in changed) and "classes.weight" in changed
    assert not any(n.startswith(("model.layers.0.", "model.layers.2.", "model.embed")) for n in changed)
    with pytest.raises(UserError, match=r"no tagger\.json"):
        build("reader", f"qwenlong-cprs:model={tmp_path}")
    with pytest.raises(UserError, match="both_from=9"):
        made(both_from=9)
