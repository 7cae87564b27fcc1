"""Padded decode steps as CUDA graphs record them: on the CPU unrecorded, beside the decoder as written."""

from __future__ import annotations

import dataclasses
import logging
import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from serve_tools import assert_clean, assert_crowd_says, lively, tiny
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from modicum.model.config import Rope, by_layer, llama_like
from modicum.model.decoder import Decoder
from modicum.serve.backends import Runner, graphs
from modicum.serve.backends.choose import make_runner
from modicum.serve.backends.graphs import Graphs, bucket_of, unfit
from modicum.serve.backends.torch import Torch
from modicum.serve.cacheforms.plain import Config as PlainConfig
from modicum.serve.cacheforms.plain import Plain
from modicum.serve.config import EngineConfig
from modicum.serve.engine import Engine
from modicum.serve.pages import Storage
from modicum.serve.plan import AttentionPlan
from modicum.serve.request import Request, SamplingParams
from modicum.serve.schedule import reserve
from modicum.serve.table import BlockTable
from modicum.serve.work import Work, arrange, by_policy

SHAPES: dict[str, dict[str, Any]] = {
    "grouped heads": {},
    "one query head each": {"kv_heads": 4},
    "one key head": {"kv_heads": 1},
    "windows": {"overrides": by_layer(window=(None, 9, 1, 100))},
    "windows that turn otherwise": {
        "overrides": by_layer(window=(8, None, 8, None), rope=(Rope(theta=100.0), Rope()) * 2)
    },
    "softcaps": {
        "overrides": by_layer(window=(None, 17, None, 9)),
        "attention_softcap": 5.0,
        "logit_softcap": 8.0,
        "embed_scale": 3.0,
    },
    "learned positions": {"position": "learned", "position_offset": 2, "norm": "layer", "parallel": True},
    "projected embeddings": {"embed_width": 16, "qk_norm": "head"},
    "layers that do not turn": {"overrides": by_layer(rope=(Rope(), None) * 2, scale=(0.3, 0.15, 0.1, 0.08))},
}


def decoder(**more: Any) -> Decoder:
    given: dict[str, Any] = {"kv_heads": 2, "head_dim": 8, "context_length": 256} | more
    return lively(Decoder(llama_like(199, 32, 4, 4, **given), torch.Generator().manual_seed(0)))


class Counting(Torch):
    """Notes the steps that it is given."""

    def __init__(self, model: Decoder):
        super().__init__(model)
        self.given: list[list[Work]] = []

    def __call__(self, plan: AttentionPlan, rows: Sequence[int]) -> Tensor | None:
        self.given.append(list(plan.works))
        return super().__call__(plan, rows)


def served(model: Decoder, static: bool = True, **config: Any) -> tuple[Engine, Counting, Graphs | None]:
    """An engine whose decode steps are the padded ones, or the decoder's own."""
    e = Engine(model, None, EngineConfig(**({"block_size": 8, "cache": "2ktok"} | config)))
    eager = Counting(model)
    runner = Graphs(model, e.cache.storage, e.cache.table, capture=False) if static else None
    e.runner = Runner(eager) if runner is None else Runner(runner, eager)
    return e, eager, runner


def watch(e: Engine) -> list[Tensor]:
    """The logits of every step from now on, as the engine gets them."""
    seen: list[Tensor] = []
    runner = e.runner

    def watched(plan: AttentionPlan, rows: Sequence[int]) -> Tensor | None:
        logits = runner(plan, rows)
        if logits is not None:
            seen.append(logits.clone())
        return logits

    e.runner = watched  # type: ignore[assignment]
    return seen


def prompts(count: int, longest: int = 70) -> list[list[int]]:
    rng = random.Random(count)
    return [[rng.randrange(1, 199) for _ in range(rng.randint(1, longest))] for _ in range(count)]


GREEDY = SamplingParams(temperature=0, max_tokens=9, ignore_eos=True)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("count", [1, 3, 9])
def test_steps_equal_those_of_the_decoder(name: str, count: int) -> None:
    model, asked = decoder(**SHAPES[name]), prompts(count)
    plain, _, _ = served(model, static=False)
    padded, eager, runner = served(model)
    assert runner is not None
    want, got = watch(plain), watch(padded)
    said = [o.tokens for o in plain.generate(asked, GREEDY)]
    assert [o.tokens for o in padded.generate(asked, GREEDY)] == said and len({*map(tuple, said)}) == count
    assert len(got) == len(want)
    for one, other in zip(got, want, strict=True):
        assert one.shape == other.shape and (one - other).norm() <= 1e-5 * other.norm()
    assert all(any(w.n > 1 for w in works) for works in eager.given), "decode steps went elsewhere"
    assert sum(runner.used.values()) >= 8
    assert_clean(padded)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_caches_in_half_precision(dtype: torch.dtype) -> None:
    model, asked = decoder(overrides=by_layer(window=(None, 9, None, 9))).to(dtype), prompts(3)
    plain, _, _ = served(model, static=False, dtype="bfloat16")
    padded, _, runner = served(model, dtype="bfloat16")
    want, got = watch(plain), watch(padded)
    plain.generate(asked, GREEDY)
    padded.generate(asked, GREEDY)
    assert runner is not None and runner.used and got[1].dtype == dtype
    error = float((got[1] - want[1]).norm() / want[1].norm())  # of the first decode step: later ones may part
    assert error < (1e-5 if dtype == torch.float32 else 5e-2)


def test_buckets_are_few_and_used_again() -> None:
    assert [bucket_of(n, 1, 8, 64)[0] for n in (1, 2, 3, 4, 5, 8, 9, 16, 17, 25, 60, 64)] == [
        1, 2, 4, 4, 8, 8, 16, 16, 24, 32, 64, 64,
    ]  # fmt: skip
    assert [bucket_of(n, 1, 8, 20)[0] for n in (9, 17, 20)] == [16, 20, 20]
    assert [bucket_of(1, n, 8, 1)[1] for n in (1, 64, 65, 128, 129, 800)] == [8, 8, 16, 16, 32, 128]
    assert [bucket_of(1, n, 300, 1)[1] for n in (1, 300, 301, 900)] == [1, 1, 2, 4]
    e, eager, runner = served(decoder(), prefix_cache=False)
    assert runner is not None
    for _ in range(2):
        e.generate(prompts(3, 20), dataclasses.replace(GREEDY, max_tokens=60))
        assert runner.used.keys() == {(4, 8), (4, 16)} == runner.steps.keys()
    assert sum(runner.used.values()) == 2 * 59
    for count in (1, 6, 12):
        e.generate(prompts(count, 20), GREEDY)
    assert runner.used.keys() == {(4, 8), (4, 16), (1, 8), (8, 8), (16, 8)}
    assert len(eager.given) == 5


def test_no_more_graphs_than_memory_is_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "MOST_GRAPHS", 2)
    e, eager, runner = served(decoder())
    assert runner is not None
    for count in (1, 2, 4, 1):
        e.generate(prompts(count, 9), GREEDY)
    assert runner.used == {(1, 8): 16, (2, 8): 8} and len(eager.given) == 4 + 8


def test_requests_that_come_and_go() -> None:
    """A crowd in too small a cache, with found prefixes and prompts in pieces, says what each says alone."""
    rng = random.Random(1)
    model = tiny()
    start = [rng.randrange(400) for _ in range(16)]
    asks = [
        (
            start[: rng.choice((0, 16))] + [rng.randrange(400) for _ in range(rng.randint(1, 50))],
            SamplingParams(temperature=rng.choice((0, 0.8)), seed=i, max_tokens=rng.randint(1, 30), ignore_eos=True,
                           presence_penalty=rng.choice((0, 0.5)), logprobs=rng.choice((None, 2))),
        )
        for i in range(20)
    ]  # fmt: skip
    alone, _, _ = served(model, static=False, max_sequences=1, prefix_cache=False)
    want = [alone.generate([p], s)[0].tokens for p, s in asks]
    crowd, eager, runner = served(
        model, cache="160tok", max_sequences=6, chunked_prefill=True, max_batch_tokens=32, scheduler="fcfs:reserve=0"
    )
    assert runner is not None
    assert_crowd_says(crowd, asks, want, rng, leave=4)
    assert crowd.counters["cached_tokens"] > 0
    assert len({b for b, _ in runner.used}) >= 3 and eager.given


@pytest.mark.parametrize(
    "config",
    [
        {"kv": "snapkv:budget=16,window=4"},
        {"kv": "razorattention:budget=0.5,probe=8"},
        {"kv": "lm-infinite:window=16,sinks=2"},
        {"drafter": "prompt-lookup", "draft_when": "always"},
    ],
    ids=lambda c: str(next(iter(c.values()))),
)
def test_what_steps_are_not_made_for_runs_eagerly(config: dict[str, Any]) -> None:
    """Thinned caches, policies that observe or attend themselves, drafts: the same tokens, and no such step padded."""
    asked = [[5, 6, 7, 8] * 12, [9, 10, 11] * 14, [3] * 12]
    model = decoder()
    plain, _, _ = served(model, static=False, **config)
    padded, eager, runner = served(model, **config)
    assert runner is not None
    params = dataclasses.replace(GREEDY, max_tokens=50)  # long enough for the model to repeat itself
    want = [o.tokens for o in plain.generate(asked, params)]
    wrong: list[bool] = []
    both = padded.runner

    def watched(plan: AttentionPlan, rows: Sequence[int]) -> Tensor | None:
        works = plan.works
        odd = any(w.n > 1 or w.tree is not None or w.sample.pages is not None or by_policy(w) for w in works)
        before = len(eager.given)
        logits = both(plan, rows)
        wrong.append((len(eager.given) > before) != (odd or plan.watched))
        return logits

    padded.runner = watched  # type: ignore[assignment]
    assert [o.tokens for o in padded.generate(asked, params)] == want
    assert len(wrong) > 3 and not any(wrong)
    assert any(w.n == 1 or w.tree is not None for works in eager.given for w in works), "nothing was odd"


def started(e: Engine, asked: list[list[int]]) -> list[Work]:
    """The decode step that an engine would run next, after the prompts and one more token."""
    for prompt in asked:
        e.add(Request(prompt, GREEDY))
    while e.scheduler.waiting or len(e.scheduler.running) < len(asked):
        e.step()
    e.step()
    return reserve(e, e.scheduler.plan(e.scheduler.state(e.blocks.free, 0.0)))


@torch.inference_mode()
def test_padding_writes_where_the_first_row_does() -> None:
    e, eager, runner = served(decoder(), prefix_cache=False)
    assert runner is not None
    works = started(e, prompts(5, 30))
    assert [w.n for w in works] == [1] * 5
    storage = e.storage
    before = [x.clone() for x in (storage.k_LGNPE, storage.v_LGNPE)]
    logits = runner(e.plan(works), range(5))
    assert runner.used[8, 8] and logits is not None and logits.shape == (5, 199)
    places = e.cache.table.rows([w.sample.slot for w in works], [w.start for w in works])
    written = [x.clone() for x in (storage.k_LGNPE, storage.v_LGNPE)]
    for old, new in zip(before, written, strict=True):
        changed_S = (old != new).flatten(2, 3).any(-1).any(0).any(0)
        assert set(changed_S.nonzero()[:, 0].tolist()) == set(places.tolist())
    # Rows of padding can be told from others by nothing but the first row: other fillings change no bit.
    runner._inputs[8 * (3 + 8) :] = -1
    assert torch.equal(runner(e.plan(works), range(5)), logits)
    want = eager(e.plan(works), range(5))
    assert want is not None and (logits - want).norm() <= 1e-5 * want.norm()
    assert runner(e.plan(works), []) is None
    some = runner(e.plan(works), [3, 1])
    assert some is not None and torch.allclose(some, logits[[3, 1]], rtol=1e-5, atol=1e-6)
    assert torch.allclose(runner.logits([1, 2]), logits[1:3], rtol=1e-5, atol=1e-6)


@torch.inference_mode()
def test_logits_are_nobody_elses() -> None:
    """What one step returned may be edited, and stays what it is through the next step."""
    e, _, runner = served(decoder())
    assert runner is not None
    works = started(e, prompts(3, 30))
    first = runner(e.plan(works), range(3))
    assert first is not None
    kept = first.clone()
    first.zero_()
    second = runner(e.plan(works), range(3))
    assert second is not None and torch.equal(second, kept)
    runner(e.plan(arrange(works[:2])), range(2))
    assert torch.equal(second, kept) and not first.any()


@torch.inference_mode()
def test_uneven_steps_run_in_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    e, eager, runner = served(decoder())
    assert runner is not None
    works = started(e, [[3], [4], [5], list(range(150))])
    padded, before = runner.used[4, 32], len(eager.given)
    assert padded, "little memory is read without asking"
    monkeypatch.setattr(graphs, "SMALL", 512)
    e.runner(e.plan(works), range(4))
    assert runner.used[4, 32] == padded and len(eager.given) == before + 1


@torch.inference_mode()
def test_a_neighbours_nan_is_not_read() -> None:
    """Keys that are not numbers, in a block that another row's table still names, reach nobody."""
    e, _, runner = served(decoder(), prefix_cache=False)
    assert runner is not None
    works = started(e, prompts(2, 20))
    want = runner(e.plan(works), range(2))
    assert want is not None
    first, second = (w.sample for w in works)
    place = len(first.blocks)
    e.cache.table.hold(first.slot, place, [second.blocks[0]] * 3)  # stale, past the end of `first`
    e.storage.k_LGNPE[:, :, second.blocks[0]] = float("nan")
    assert e.cache.table.numbers[first.slot, place] == second.blocks[0]
    got = runner(e.plan(works), range(2))
    at = next(w.at for w in works if w.sample is first)
    assert got is not None and torch.equal(got[at], want[at]) and bool(got[1 - at].isnan().all())


def test_nothing_in_a_step_asks_for_values_or_for_the_host() -> None:
    """On tensors without data, and on a device that is not the host: either would raise."""
    for more in SHAPES.values():
        shape = decoder(**more).config
        with FakeTensorMode(), torch.inference_mode():
            with torch.device("meta"):
                model = Decoder(shape, init=False).eval()
            device = model.device
            storage = Storage(shape, 64, 8, Plain(PlainConfig(), shape.head_dim, torch.float32), device)
            runner = Graphs(model, storage, BlockTable(12, 8), capture=False)
            runner._static((4, 16))  # moves what lies on the host for good
            with Moves() as moves:
                runner._static((4, 16))
                runner._static((12, 32))
            assert not moves.seen
            with pytest.raises(Exception, match="scalar"):  # so would a step that looked at a value
                runner._h_BD.sum().item()


class Moves(torch.utils._python_dispatch.TorchDispatchMode):
    """Notes tensors that come into being on the host, and everything that copies between devices."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tensors = [x for x in (out if isinstance(out, tuple | list) else [out]) if isinstance(x, Tensor)]
        self.seen += [str(func) for x in tensors if x.device.type == "cpu" and x.dim()]
        return out


def test_recording_that_fails_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    """A model on the CPU cannot be recorded: its steps are run all the same."""
    model, asked = decoder(), prompts(3)
    plain, _, _ = served(model, static=False)
    e, eager, _ = served(model, static=False)
    runner = Graphs(model, e.cache.storage, e.cache.table)
    e.runner = Runner(runner, eager)
    assert runner.name == e.stats()["runner"] == "cuda graphs"
    with caplog.at_level(logging.WARNING, "modicum.serve"):
        said = [o.tokens for o in e.generate(asked, GREEDY)]
    assert said == [o.tokens for o in plain.generate(asked, GREEDY)]
    warnings = [r.message for r in caplog.records if "no CUDA graphs" in r.message]
    assert len(warnings) == 1 and "(" in warnings[0], caplog.text
    assert e.stats()["runner"].startswith("eager") and not runner.steps and len(eager.given) == 9


def test_who_gets_graphs() -> None:
    e, _, _ = served(tiny())
    assert not isinstance(make_runner(e.model, e.cache.storage, e.cache.table).backends[0], Graphs), "not on the CPU"
    assert unfit(e.model) is None
    options = {"long_factor": [2.0] * 4, "short_factor": [1.0] * 4, "original_max_position_embeddings": 64}
    shape = dataclasses.replace(decoder().config, rope=Rope(kind="longrope", options=options))
    assert "longrope" in (unfit(Decoder(shape)) or "")
    assert graphs.reason()


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("name", SHAPES)
def test_recorded_steps_equal_those_of_the_decoder(name: str) -> None:
    model = decoder(**SHAPES[name]).to("cuda")
    said, logits = [], []
    for cuda_graphs in (False, True):
        e = Engine(model, None, EngineConfig(block_size=8, cache="2ktok", cuda_graphs=cuda_graphs))
        runner = e.runner
        assert isinstance(runner, Graphs) == cuda_graphs
        seen = watch(e)
        said.append([[o.tokens for o in e.generate(prompts(n), GREEDY)] for n in (3, 1, 9, 3)])
        logits.append(seen)
        if isinstance(runner, Graphs):
            assert not runner.failed and sum(runner.used.values()) > 20 and len(runner.steps) < 8
        assert_clean(e)
    assert said[0] == said[1]
    for one, other in zip(*logits, strict=True):
        assert (one - other).norm() <= 1e-4 * other.norm()
