"""The engine against transformers.generate, and what it does with blocks, failures and long sequences."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from serve_tools import assert_clean, assert_crowd_says, engine, folder, lively, tiny, tokenizer

from modicum.core.errors import BudgetError, ModicumError, UserError
from modicum.model.attach import attach
from modicum.model.config import llama_like
from modicum.model.decoder import Decoder
from modicum.model.folder import load_model, save_model
from modicum.serve.config import EngineConfig
from modicum.serve.engine import Engine
from modicum.serve.load import load_engine
from modicum.serve.request import InvalidRequest, Request, SamplingParams, Update

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 9, "head_dim": 8},
    "gemma2": {"sliding_window": 9, "head_dim": 8},
    "gpt2": {},
}
COMMON = {
    "vocab_size": 199,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
NEW = 14
MODES: dict[str, dict[str, Any]] = {
    "plain": {"prefix_cache": False},
    "eager": {"prefix_cache": False},
    "prefix": {},
    "chunked": {"chunked_prefill": True, "max_batch_tokens": 16},
    "one by one": {"prefix_cache": False, "max_sequences": 1},
    "crowded": {"cache": "112tok"},
    "crowded, chunked": {"cache": "112tok", "chunked_prefill": True, "max_batch_tokens": 24},
}


def _prompts() -> list[list[int]]:
    rng = random.Random(5)
    prompts = [[rng.randrange(1, 199) for _ in range(n)] for n in (1, 3, 16, 17, 40, 33, 70)]
    return [*prompts, [*prompts[4][:32], 5, 6, 7]]


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Decoder, list[list[int]]]:
    """A random model as read by us, and what transformers.generate says to the prompts."""
    import transformers

    config = transformers.AutoConfig.for_model(request.param, **COMMON | FAMILIES[request.param])
    config.initializer_range = 0.3
    config.eos_token_id = config.bos_token_id = None
    torch.manual_seed(0)
    theirs = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    path = tmp_path_factory.mktemp(request.param)
    theirs.save_pretrained(path)
    want = []
    for prompt in _prompts():
        ids = torch.tensor([prompt])
        out = theirs.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False, pad_token_id=0
        )
        want.append(out[0, len(prompt) :].tolist())
    assert len({tuple(w) for w in want}) == len(want), "the model repeats itself: the test would see nothing"
    return load_model(path), want


@pytest.mark.parametrize("mode", MODES)
def test_greedy_output_is_that_of_transformers(
    pair: tuple[Decoder, list[list[int]]], mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, want = pair
    if mode == "eager":
        monkeypatch.setenv("MODICUM_NATIVE", "0")
    under_test = Engine(model, None, EngineConfig(**{"block_size": 8, "cache": "2ktok"} | MODES[mode]))
    params = SamplingParams(temperature=0, max_tokens=NEW)
    for turn in range(2):
        got = [o.tokens for o in under_test.generate(_prompts(), params)]
        assert got == want, f"turn {turn}"
    stats = under_test.stats()
    assert (stats["cached_tokens"] > 0) == (mode in ("prefix", "chunked", "crowded", "crowded, chunked"))
    assert (stats["preemptions"] > 0) == mode.startswith("crowded")
    assert_clean(under_test)


def test_random_arrivals_change_nothing() -> None:
    """Requests that come and go at random, in a cache too small for all, say what they say alone."""
    rng = random.Random(0)
    model = tiny()
    asks = [
        (
            [rng.randrange(400) for _ in range(rng.randint(1, 60))],
            SamplingParams(temperature=rng.choice((0, 0.8)), seed=i, max_tokens=rng.randint(1, 30), ignore_eos=True),
        )
        for i in range(24)
    ]
    alone = Engine(model, None, EngineConfig(block_size=8, cache="2ktok", prefix_cache=False, max_sequences=1))
    want = [alone.generate([p], s)[0].tokens for p, s in asks]
    crowd = Engine(
        model,
        None,
        EngineConfig(block_size=8, cache="160tok", max_sequences=6, chunked_prefill=True, max_batch_tokens=32),
    )
    assert_crowd_says(crowd, asks, want, rng, leave=5)


def test_a_second_turn_finds_the_first_in_the_cache() -> None:
    chat = engine()
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    prompt = list(range(30))
    first = chat.generate([prompt], params)[0]
    second = chat.generate([prompt + first.tokens + [3]], params)[0]
    assert first.cached_tokens == 0
    assert second.cached_tokens == (30 + 19) // 8 * 8  # the last sampled token was never computed
    fresh = engine(prefix_cache=False).generate([prompt + first.tokens + [3]], params)[0]
    assert second.tokens == fresh.tokens


def test_n_samples_share_the_prompt_and_differ() -> None:
    many = engine()
    out = many.generate([list(range(40))], SamplingParams(n=4, seed=3, max_tokens=12, ignore_eos=True))[0]
    assert len({tuple(c.tokens) for c in out.completions}) == 4
    assert many.counters["cached_tokens"] == 3 * 32
    assert_clean(many)


def test_text_stops_and_limits() -> None:
    e = engine()
    whole = e.generate(["The cache"], SamplingParams(temperature=0, max_tokens=40, ignore_eos=True))[0]
    assert whole.finish == "length" and len(whole.tokens) == 40 and whole.text
    assert whole.completions[0].first_token_seconds is not None
    assert whole.completions[0].seconds >= whole.completions[0].first_token_seconds  # type: ignore[operator]
    stop = whole.text[len(whole.text) // 2 :][:2]
    cut = e.generate(["The cache"], SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, stop=(stop,)))[0]
    assert cut.finish == "stop" and cut.text == whole.text[: whole.text.index(stop)]
    token = e.generate(
        ["The cache"],
        SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, stop_token_ids=(whole.tokens[5],)),
    )[0]
    assert token.finish == "stop" and token.tokens == whole.tokens[: whole.tokens.index(whole.tokens[5]) + 1]
    long = e.generate([[1] * 250], SamplingParams(max_tokens=None, ignore_eos=True))[0]
    assert long.finish == "length" and len(long.tokens) == 6
    assert_clean(e)


def test_eos_ends_unless_ignored() -> None:
    e = engine()
    first = e.generate([[1, 2, 3]], SamplingParams(temperature=0, max_tokens=9, ignore_eos=True))[0].tokens
    e.eos = frozenset({first[4]})
    ended = e.generate([[1, 2, 3]], SamplingParams(temperature=0, max_tokens=9))[0]
    assert ended.tokens == first[: first.index(first[4]) + 1] and ended.finish == "stop"


def test_streaming_joins_to_the_whole_and_early_exit_frees() -> None:
    e = engine()
    params = SamplingParams(seed=1, max_tokens=60, ignore_eos=True)
    whole = e.generate(["emoji "], params)[0].text
    assert "".join(u.text for u in e.stream("emoji ", params)) == whole
    for _ in e.stream("emoji ", params):
        break
    assert_clean(e)


def test_failing_step_fails_its_requests_only() -> None:
    e = engine(max_sequences=2, prefix_cache=True)
    runner = e.runner
    calls = []

    def broken(*args: Any, **more: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:
            raise RuntimeError("no")
        return runner(*args, **more)

    e.runner = broken  # type: ignore[assignment]
    requests = [Request([1, 2, 3 + i], SamplingParams(temperature=0, max_tokens=9, ignore_eos=True)) for i in range(4)]
    for request in requests:
        e.add(request)
    updates: list[Update] = []
    while e.busy:
        updates += e.step()
    assert [next(u.finish for u in updates if u.request == r.id and u.finish) for r in requests] == [
        "error",
        "error",
        "length",
        "length",
    ]
    assert e.counters["failures"] == 1
    assert_clean(e)
    e.runner = runner
    decode = e.tokenizer.decode
    e.tokenizer.decode = lambda ids: 1 / 0 if len(ids) > 2 else decode(ids)  # type: ignore[method-assign]
    with pytest.raises(ModicumError, match="generation failed"):
        e.generate([[5], [6]], SamplingParams(ignore_eos=True))
    assert_clean(e)


def test_output_that_is_not_a_number_is_an_error_and_poisons_nobody() -> None:
    e = engine()
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    prompts = [[7] * 30, list(range(50))]
    want = [o.tokens for o in e.generate(prompts, params)]
    e.blocks.clear()
    weight = e.model.embed.weight
    kept = weight[399].clone()
    with torch.no_grad():
        weight[399] = float("nan")
        with pytest.raises(ModicumError, match="not a number"):
            e.generate([[399] * 40], params)
        weight[399] = kept
    assert_clean(e)
    assert bool(torch.isfinite(e.storage.k_LGNPE).all() and torch.isfinite(e.storage.v_LGNPE).all())
    assert [o.tokens for o in e.generate(prompts, params)] == want


def test_what_cannot_be_served_is_refused() -> None:
    e = engine()
    for prompt in ([], [1] * 256, [400], [-1]):
        with pytest.raises(InvalidRequest):
            e.generate([prompt])
    with pytest.raises(InvalidRequest):
        e.generate([[1]], SamplingParams(logit_bias={400: 1.0}))
    with pytest.raises(UserError):
        e.generate([[1]], [SamplingParams()] * 2)
    with pytest.raises(InvalidRequest):
        Engine(tiny(), None, EngineConfig(cache="1ktok")).generate(["text"])
    assert_clean(e)


@pytest.mark.parametrize(
    "field",
    [
        {"temperature": -1},
        {"top_p": 0},
        {"top_p": 1.1},
        {"n": 0},
        {"max_tokens": 0},
        {"stop": ("",)},
        {"min_p": 2},
        {"logit_bias": {1: 200.0}},
        {"top_k": -1},
        {"repetition_penalty": 0},
        {"temperature": float("nan")},
    ],
)
def test_impossible_sampling_parameters(field: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest) as caught:
        SamplingParams(**field)
    assert caught.value.param == next(iter(field))


@pytest.mark.parametrize(
    ("config", "error"),
    [
        ({"cache": "10B"}, UserError),
        ({"cache": "soon"}, UserError),
        ({"cache": "900TiB"}, BudgetError),
        ({"scheduler": "fcsf"}, UserError),
        ({"kv": "half"}, UserError),
        ({"block_size": 0}, UserError),
        ({"dtype": "int8"}, UserError),
        ({"max_length": 257}, UserError),
    ],
)
def test_impossible_engines(config: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        engine(**config)


def test_cache_size_in_bytes_is_kept() -> None:
    e = engine(cache="64KiB")
    assert e.stats()["cache_bytes"] <= 64 << 10 < e.stats()["cache_bytes"] + e.storage.block_bytes
    assert e.storage.k_LGNPE.nbytes + e.storage.v_LGNPE.nbytes == e.stats()["cache_bytes"]


def test_cache_in_half_precision() -> None:
    e = engine(dtype="bfloat16")
    assert e.storage.k_LGNPE.dtype == torch.bfloat16
    out = e.generate([list(range(60))] * 3, SamplingParams(temperature=0, max_tokens=12, ignore_eos=True))
    assert len(out[0].tokens) == 12


def test_folders_with_forms_are_served(tmp_path: Path) -> None:
    """int8 and int4 weights come from disk and give what the same model gives in memory."""
    for form in ("int8", "int4:group=16"):
        model = tiny()
        attach(model, {"layers.*": form})
        params = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)
        want = Engine(model, None, EngineConfig(cache="1ktok")).generate([[1, 2, 3]], params)[0].tokens
        path = tmp_path / form[:4]
        save_model(model, path)
        tokenizer().save(path)
        assert load_engine(path, EngineConfig(cache="1ktok")).generate([[1, 2, 3]], params)[0].tokens == want


def test_load_engine_reads_a_folder(tmp_path: Path) -> None:
    loaded = load_engine(folder(tmp_path), EngineConfig(cache="1ktok"))
    want = engine().generate(["The"], SamplingParams(temperature=0))[0].text
    assert loaded.generate(["The"], SamplingParams(temperature=0))[0].text == want


def test_bfloat16_model_runs() -> None:
    shape = llama_like(400, 64, 2, heads=4, kv_heads=2, context_length=128)
    model = lively(Decoder(shape, torch.Generator().manual_seed(0))).to(torch.bfloat16)
    e = Engine(model, None, EngineConfig(block_size=16, cache="1ktok", chunked_prefill=True, max_batch_tokens=20))
    out = e.generate([[1] * 50, [2] * 9], SamplingParams(max_tokens=12, seed=0))
    assert all(len(o.tokens) == 12 for o in out)
    assert_clean(e)
