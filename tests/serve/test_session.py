"""Conversations that go on in the cache: the same answers as whole texts, whatever happens between the turns."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from serve_tools import assert_clean, tiny, tokenizer
from test_compress_at import CONTEXT, KV, Kept12

from modicum.core.errors import UserError
from modicum.serve.config import EngineConfig
from modicum.serve.engine import Engine
from modicum.serve.request import InvalidRequest, Request, SamplingParams
from modicum.serve.session import Session


def _tokens(seed: int, n: int) -> list[int]:
    return torch.randint(1, 400, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


TURNS = [_tokens(0, CONTEXT), _tokens(1, 7), _tokens(2, 1), _tokens(3, 19)]
PARAMS = SamplingParams(temperature=0, max_tokens=9, ignore_eos=True)


def _engine(**more: Any) -> Engine:
    return Engine(tiny(), None, EngineConfig(**({"block_size": 4, "cache": "400tok"} | more)))


def _resent(engine: Engine) -> list[list[int]]:
    """Each turn's answer by an engine that is sent the whole text."""
    text, answers = list[int](), []
    for turn in TURNS:
        text += turn
        answers.append(engine.generate([text], PARAMS)[0].tokens)
        text += answers[-1]
    return answers


@pytest.mark.parametrize("more", [{}, {"prefix_cache": False}, {"chunked_prefill": True, "max_batch_tokens": 5}])
def test_turns_are_answered_as_if_the_whole_text_was_sent(more: dict[str, Any]) -> None:
    want = _resent(_engine(prefix_cache=False))
    engine = _engine(**more)
    before = engine.counters["computed_tokens"]
    with Session(engine) as session, Session(engine) as other:
        for i, turn in enumerate(TURNS):
            neighbour = other.request(turn[::-1], PARAMS)
            engine.add(Request(_tokens(9, 23), PARAMS))
            known = len(session.tokens)
            output = session.generate(turn, PARAMS)
            assert output.tokens == want[i]
            assert output.cached_tokens == max(0, known - 1), "all but the last token, which was never computed"
            while engine.busy:
                engine.step()
            assert neighbour.sequences[0].finish == "length"
        assert engine.stats()["idle_sessions"] == 2 and engine.stats()["running"] == 0
        assert len(engine.cache.slots) == engine.config.max_sequences, "an idle session takes no slot"
        total = 2 * (sum(map(len, TURNS)) + 9 * len(TURNS) - 1) + 4 * (23 + 8)
        assert engine.counters["computed_tokens"] - before <= total
    assert_clean(engine)


def _held(engine: Engine, session: Session) -> list[list[list[int]]]:
    """Positions that the layers' heads hold of an idle session."""
    pages = engine.cache.idle[session._id].pages
    assert pages is not None
    kept = [engine.storage.entries_of_pages(layer, pages) for layer in range(2)]
    return [[e.position_GS[g, : e.counts[g]].tolist() for g in range(2)] for e in kept]


@pytest.mark.parametrize("preempt", [False, True])
def test_what_an_evicting_policy_kept_stays(preempt: bool) -> None:
    """Answers of all turns are those of a text of whose first context only the kept entries are seen. A turn that is
    preempted is compressed where the first one was."""
    engine = _engine(kv=KV)
    with Session(engine) as session:
        first = session.generate(TURNS[0], PARAMS)
        held = _held(engine, session)
        kept = {(i, g): [p for p in held[i][g] if p < CONTEXT] for i in range(2) for g in range(2)}
        assert all(len(p) == 12 for p in kept.values())
        text = TURNS[0] + first.tokens
        for turn in TURNS[1:]:
            request = session.request(turn, PARAMS)
            for step in range(100):
                if preempt and step == 4:
                    engine.preempt(request.sequences[0])
                engine.step()
                if not engine.busy:
                    break
            text += turn
            for _ in range(9):
                with torch.no_grad():
                    text.append(int(engine.model(torch.tensor([text]), attend=Kept12(kept))[0, -1].argmax()))
            assert session.tokens == text
        assert engine.counters["preemptions"] == 3 * preempt
        now = _held(engine, session)
        for i in range(2):
            for g in range(2):
                assert now[i][g] == kept[i, g] + list(range(CONTEXT, len(text) - 1))
        assert engine.stats()["thinnings"] == 1 + 3 * preempt
    assert_clean(engine)


@pytest.mark.parametrize("kv, length", [("full", 76), (KV, 90)])
def test_an_idle_session_gives_way_before_anybody_is_preempted(kv: str, length: int) -> None:
    small: dict[str, Any] = {"cache": "112tok", "kv": kv, "prefix_cache": False}
    engine, other = _engine(**small), _engine(kv=kv, prefix_cache=False)
    with Session(engine) as session, Session(other) as undisturbed:
        assert session.generate(TURNS[0], PARAMS).tokens == undisturbed.generate(TURNS[0], PARAMS).tokens
        large = engine.generate([_tokens(5, length), _tokens(6, 12)], PARAMS)
        assert all(len(o.tokens) == 9 for o in large)
        assert engine.counters["preemptions"] == 0 and engine.stats()["idle_sessions"] == 0
        again = session.generate(TURNS[1], PARAMS)
        assert again.cached_tokens == 0, "computed anew"
        assert again.tokens == undisturbed.generate(TURNS[1], PARAMS).tokens
    assert_clean(engine)


@pytest.mark.parametrize("kv", ["full", KV])
def test_a_session_may_fill_the_cache(kv: str) -> None:
    engine = _engine(cache="64tok", kv=kv, prefix_cache=False)
    with Session(engine) as session, Session(engine) as idle:
        idle.generate(_tokens(7, 9), PARAMS)
        for length in (18, 9, 2, 4):
            session.generate(_tokens(length, length), SamplingParams(temperature=0, max_tokens=7, ignore_eos=True))
        assert len(session.tokens) == 61
        with pytest.raises(InvalidRequest, match="shorten"):
            session.generate(_tokens(8, 4), PARAMS)
        assert len(session.tokens) == 61, "a refused turn changes nothing"
        assert len(session.generate([5, 6], SamplingParams(temperature=0, max_tokens=1)).tokens) == 1
    assert_clean(engine)


def test_an_answer_that_is_cut_short_goes_on() -> None:
    engine = _engine(prefix_cache=False)
    with Session(engine) as session:
        for update in session.stream(TURNS[0], PARAMS):
            if update.tokens and len(engine.requests) and len(session._last.sequences[0].tokens) == CONTEXT + 4:  # type: ignore[union-attr]
                break
        assert len(session.tokens) == CONTEXT + 4
        output = session.generate(TURNS[1], PARAMS)
        assert output.cached_tokens == CONTEXT + 3
        whole = _engine().generate([session.tokens[: CONTEXT + 4 + len(TURNS[1])]], PARAMS)[0]
        assert output.tokens == whole.tokens
    assert_clean(engine)


def test_texts_are_read_on_without_a_second_beginning() -> None:
    engine = Engine(tiny(), tokenizer(), EngineConfig(block_size=4, cache="400tok"))
    with Session(engine) as session:
        session.generate("The cache holds keys", PARAMS)
        before = session.tokens
        session.generate(" and values", PARAMS)
        new = list(engine.tokenizer.encode(" and values", add_special=False))
        assert session.tokens[: len(before) + len(new)] == before + new
    assert_clean(engine)


def test_what_cannot_be_is_refused() -> None:
    engine = _engine()
    session = Session(engine)
    with pytest.raises(InvalidRequest, match="empty"):
        session.request([])
    with pytest.raises(InvalidRequest, match="n=2"):
        session.request([5], SamplingParams(n=2))
    session.request(TURNS[0], PARAMS)
    engine.step()
    with pytest.raises(InvalidRequest, match="not over"):
        session.request(TURNS[1], PARAMS)
    session.close()
    assert_clean(engine)
    with pytest.raises(InvalidRequest, match="closed"):
        session.generate(TURNS[0])
    with pytest.raises(UserError, match="cache form kivi"):
        Session(_engine(cache_form="kivi:group=8,residual=8", block_size=8))
