"""Memories: a prefix is literally prepended keys and values; what mac and cmt do that the other does not."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from modicum.core.errors import UserError
from modicum.model.cache import ContiguousCache
from modicum.retrieve.memories import prompt
from modicum.retrieve.memories._aggregate import Aggregator
from modicum.retrieve.memories._conformance import DOCUMENTS, EXAMPLES, QUESTIONS, TOWNS, made, toy_reader
from modicum.retrieve.memories.cmt import matches
from modicum.retrieve.prefix import Prefix, PrefixAttend

PROMPTS = [prompt(q) for q in QUESTIONS]


@pytest.fixture(scope="module")
def reader():
    """One that knows that answers are towns, and not whose."""
    made_reader = toy_reader()
    model = made_reader.model.requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    pairs = [(p, t) for p in PROMPTS for t in TOWNS]
    for step in range(60):
        rows = np.random.default_rng(step).permutation(len(pairs))[:16]
        made_reader.losses(None, [pairs[i][0] for i in rows], [pairs[i][1] for i in rows]).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    model.requires_grad_(False)
    return made_reader


def same(a: Prefix, b: Prefix, atol: float = 0.0) -> bool:
    return all(torch.allclose(x, y, atol=atol, rtol=0) for x, y in zip((*a.k, *a.v), (*b.k, *b.v), strict=True))


def test_a_prefix_is_the_keys_and_values_of_tokens_that_were_read():
    reader = toy_reader()
    model = reader.model
    tokens = torch.from_numpy(np.random.default_rng(0).integers(0, model.config.vocab_size, (2, 12)))
    with torch.no_grad():
        cache = ContiguousCache(model.config, 2, 5)
        model(tokens[:, :5], attend=cache)
        prefix = Prefix(cache.k, cache.v)
        whole = model(tokens)[:, 5:]
        assert torch.allclose(model(tokens[:, 5:], attend=PrefixAttend(prefix)), whole, atol=1e-5)
        other = Prefix([k.roll(1, 0) for k in cache.k], cache.v)
        assert not torch.allclose(model(tokens[:, 5:], attend=PrefixAttend(other)), whole, atol=1e-3)


def test_losses_are_of_the_targets_tokens_whatever_else_is_in_the_batch():
    reader = toy_reader()
    together = reader.losses(None, PROMPTS, TOWNS)
    t = reader.tokenizer
    for n in (0, 5):
        ids, logs = [t.start_id, *t.encode(PROMPTS[n], specials=False)], []
        for token in t.encode(TOWNS[n], specials=False):
            logs.append(-float(reader.model(torch.tensor([ids]))[0, -1].detach().log_softmax(0)[token]))
            ids.append(token)
        assert together[n].item() == pytest.approx(np.mean(logs), abs=1e-5)
    with pytest.raises(UserError, match="target 1 is empty"):
        reader.losses(None, ["a", "b"], ["x", ""])


@pytest.mark.parametrize("key", ["mac", "cmt"])
def test_no_gradient_reaches_the_reader_and_all_that_is_trained_gets_one(key):
    with made(key) as memory:
        memory.loss(EXAMPLES[:4], np.random.default_rng(0)).backward()
        assert all(p.grad is None for p in memory.reader.model.parameters())
        without = [n for n, p in memory.net.named_parameters() if p.grad is None]
        # The update's A has no gradient yet where B is 0, but it has one.
        assert not without, without


# mac ------------------------------------------------------------------------------------------------------------


def test_mac_answers_from_the_document_that_knows(reader):
    with made("mac", reader) as memory:
        memory.fit(EXAMPLES, steps=150, batch=8, lr=3e-3)
        memory.write(list("abcdefgh"), DOCUMENTS)
        with torch.no_grad():
            prefix = memory.read(QUESTIONS)
            own = memory.reader.losses(prefix, PROMPTS, TOWNS).mean()
            none = memory.reader.losses(None, PROMPTS, TOWNS).mean()
            other = memory.reader.losses(prefix.rows(torch.arange(8).roll(1)), PROMPTS, TOWNS).mean()
        assert own < 0.5 * none < 0.5 * other


def test_every_document_of_the_bank_takes_part_in_mac():
    with made("mac") as memory:
        memory.write(list("abcdefgh"), DOCUMENTS)
        before = memory.read(QUESTIONS[:1])
        memory.remove(["h"])
        assert not same(before, memory.read(QUESTIONS[:1]), 1e-7)


def test_windows_read_as_one_where_the_bank_fits_and_otherwise_twice():
    torch.manual_seed(0)
    aggregator = Aggregator(8, 2, 2, [(1, 4)], 2).double().eval()
    q, entries = torch.randn(3, 2, 8).double(), torch.randn(6, 2, 8).double()
    flat = aggregator.gathered(q, entries.flatten(0, 1)[None].expand(3, -1, -1))
    assert torch.allclose(aggregator.windowed(q, entries, ()), flat, atol=1e-12)
    assert torch.allclose(aggregator.windowed(q, entries, (6,)), flat, atol=1e-12)
    permuted = aggregator.windowed(q, entries[[3, 1, 5, 0, 4, 2]], ())
    assert torch.allclose(permuted, flat, atol=1e-10), "no positions over documents"
    halves = [aggregator.gathered(q, part.flatten(0, 1)[None].expand(3, -1, -1)) for part in entries.split(4)]
    again = aggregator.gathered(q, torch.stack(halves, 1).flatten(1, 2))
    assert torch.allclose(aggregator.windowed(q, entries, (4,)), again, atol=1e-12)
    assert not torch.allclose(again, flat, atol=1e-3)


@pytest.mark.parametrize(("lift", "count"), [(0.25, 2), (0.5, 4), (1.0, 8)])
def test_exactly_the_lifted_documents_carry_gradients(lift, count):
    with made("mac", lift=lift) as memory:
        entries = memory.entries(DOCUMENTS, np.random.default_rng(0))
        assert torch.allclose(entries, memory.compress(DOCUMENTS), atol=1e-5), "in the documents' order"
        pooled = []
        memory.net["document"].register_forward_hook(lambda _m, _i, out: pooled.append(out))
        memory.entries(DOCUMENTS, np.random.default_rng(0))
        assert [len(p) for p in pooled if p.requires_grad] == [count]


# cmt ------------------------------------------------------------------------------------------------------------


def test_a_document_that_is_not_selected_changes_nothing():
    with made("cmt", k=2) as memory:
        memory.write(list("abcdefgh"), DOCUMENTS)
        before = memory.read(QUESTIONS[:1])
        entries = torch.stack(list(memory.bank.values())).float()
        with torch.no_grad():
            chosen = memory.select(memory.compress(QUESTIONS[:1]), entries)[0].tolist()
        assert len(chosen) == 2
        rest = [i for n, i in enumerate("abcdefgh") if n not in chosen]
        memory.remove(rest)
        assert same(before, memory.read(QUESTIONS[:1])), "bit for bit"
        memory.remove(["abcdefgh"[chosen[0]]])
        assert not same(before, memory.read(QUESTIONS[:1]), 1e-7)


def test_k_beyond_the_bank_reads_all_of_it():
    with made("cmt", k=50) as many, made("cmt", k=8) as exact:
        for memory in (many, exact):
            memory.write(list("abcdefgh"), DOCUMENTS)
        assert same(many.read(QUESTIONS), exact.read(QUESTIONS))


def test_the_update_is_active_only_while_compressing():
    with made("cmt") as memory:
        model, tokens = memory.reader.model, torch.tensor([[5, 6, 7]])
        with torch.no_grad():
            before, entry = model(tokens), memory.compress(DOCUMENTS[:1])
            for up in memory.net["compress"].up:
                up.normal_()
            assert torch.equal(model(tokens), before)
            assert not torch.allclose(memory.compress(DOCUMENTS[:1]), entry, atol=1e-3)
            assert torch.equal(model(tokens), before)
        assert not any(m._forward_hooks for m in model.modules())


def test_an_entry_is_the_state_of_memory_tokens_after_the_document():
    """With B at 0: the plain model on the document's embeddings and the memory tokens'."""
    with made("cmt") as memory, torch.no_grad():
        t, model = memory.reader.tokenizer, memory.reader.model
        entries = memory.compress(DOCUMENTS)
        ids = [t.start_id, *t.encode(DOCUMENTS[3], specials=False)]
        x = torch.cat([model.embed(torch.tensor([ids])), memory.net["compress"].memory_ND[None]], 1)
        hook = model.embed.register_forward_hook(lambda *_: x)
        expected = model.hidden(torch.zeros(1, x.shape[1], dtype=torch.long))[:, -3:]
        hook.remove()
        assert torch.allclose(entries[3], expected[0], atol=1e-5)


def test_matching_is_the_cosine_of_means_and_the_own_document_is_always_read_in_training():
    q, e = torch.randn(2, 3, 5), torch.randn(4, 3, 5)
    for i in range(2):
        for j in range(4):
            expected = F.cosine_similarity(q[i].mean(0), e[j].mean(0), dim=0)
            assert matches(q, e)[i, j].item() == pytest.approx(expected.item(), abs=1e-6)
    with made("cmt", k=2) as memory:
        worst = matches(q, e).argmin(1)
        chosen = memory.select(q, e, worst)
        assert all(int(w) in row.tolist() for w, row in zip(worst, chosen, strict=True))
        assert (memory.select(q, e) == matches(q, e).topk(2, 1).indices.sort(1).values).all()


def test_self_matching_is_learnt(reader):
    with made("cmt", reader, k=2, rebuild=0, margin=0) as memory:
        memory.fit(EXAMPLES, steps=150, batch=8, lr=5e-3)
        memory.write(list("abcdefgh"), DOCUMENTS)
        with torch.no_grad():
            entries = torch.stack(list(memory.bank.values())).float()
            best = matches(memory.compress(QUESTIONS), entries).argmax(1)
            own = memory.reader.losses(memory.read(QUESTIONS), PROMPTS, TOWNS).mean()
            none = memory.reader.losses(None, PROMPTS, TOWNS).mean()
        assert (best == torch.arange(8)).float().mean() >= 0.75
        assert own < 0.5 * none


def test_the_loss_is_the_sum_of_its_terms():
    zero = {"rebuild": 0, "margin": 0, "matching": 0}
    rng = lambda: np.random.default_rng(0)  # noqa: E731
    with torch.no_grad():
        values = {}
        for name in ("", *zero):
            with made("cmt", k=2, **{n: (0.7 if n == name else 0) for n in zero}) as memory:
                values[name] = memory.loss(EXAMPLES[:4], rng()).item() - values.get("", 0.0)
        entries, query = memory.compress(DOCUMENTS[:4]), memory.compress(QUESTIONS[:4])
        own = torch.arange(4)
        chosen = entries[memory.select(query, entries, own)]
        answers = memory.reader.losses(memory.from_selected(query, chosen), PROMPTS[:4], TOWNS[:4])
        assert values[""] == pytest.approx(answers.mean().item(), abs=1e-5)
        rebuilt = memory.reader.losses(memory.from_selected(entries, entries[:, None]), [""] * 4, DOCUMENTS[:4])
        assert values["rebuild"] == pytest.approx(0.7 * rebuilt.mean().item(), abs=1e-5)
        other = (own + int(rng().integers(1, 4))) % 4
        with_own, with_other = (
            memory.reader.losses(memory.from_selected(query, entries[n][:, None]), PROMPTS[:4], TOWNS[:4])
            for n in (own, other)
        )
        hinge = (0.7 + with_own - with_other).clamp(min=0).mean().item()
        assert values["margin"] == pytest.approx(hinge, abs=1e-5)
        infonce = F.cross_entropy(matches(query, entries) / 0.1, own).item()
        assert values["matching"] == pytest.approx(0.7 * infonce, abs=1e-5)


def test_a_question_that_is_answered_greedily():
    reader = toy_reader()
    assert isinstance(reader.answer(None, PROMPTS[0], 3), str)


def test_a_memory_of_another_reader_is_refused(tmp_path):
    from modicum.data.tokenizer import Tokenizer
    from modicum.model.config import DecoderConfig
    from modicum.model.decoder import Decoder
    from modicum.retrieve.memories import open_memory
    from modicum.retrieve.prefix import FrozenReader

    with made("cmt") as memory:
        memory.save(tmp_path / "m")
    tokenizer = Tokenizer.train(DOCUMENTS * 4, 300)
    shape = dict(width=32, layers=3, heads=2, kv_heads=1, head_dim=16, mlp_width=64, context_length=128)
    config = DecoderConfig(vocab_size=tokenizer.vocab_size, **shape)
    with pytest.raises(UserError, match="another shape"):
        open_memory(tmp_path / "m", FrozenReader(Decoder(config), tokenizer))
