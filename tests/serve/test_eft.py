"""Reference test of guide/eft: the sum by hand, its two limits, the cache beside, speculation that changes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from serve_tools import assert_clean, tiny

from modicum.core import registry
from modicum.core.errors import UserError
from modicum.model.config import llama_like
from modicum.model.decoder import Decoder
from modicum.model.folder import save_model
from modicum.serve.config import EngineConfig
from modicum.serve.engine import Engine
from modicum.serve.guides.eft import OUT, nucleus
from modicum.serve.request import Request, SamplingParams

PROMPT = torch.randint(1, 400, (19,), generator=torch.Generator().manual_seed(5)).tolist()
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, logprobs=1)


def small(seed: int) -> Decoder:
    shape = llama_like(400, 16, 1, heads=2, kv_heads=1, context_length=256)
    model = Decoder(shape, torch.Generator().manual_seed(seed))
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.mul_(4.0) if p.dim() == 2 and "embed" not in name else None
    return model


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("models")
    made: dict[str, Decoder] = {"main": tiny(), "tuned": small(1), "base": small(2), "also": small(3)}
    for name, model in made.items():
        save_model(model, root / name)
    return {name: str(root / name) for name in made}


def combine(text: str, main: list[float], *beside: list[float]) -> torch.Tensor:
    guide: Any = registry.build("guide", text)
    rows = [torch.tensor([x]).log() for x in (main, *beside)]
    return guide.combine(rows[0], rows[1:]).softmax(-1)[0]


def test_three_tokens_by_hand() -> None:
    """p ~ main tuned / base: 0.5 0.2/0.4, 0.3 0.3/0.4, 0.2 0.5/0.2."""
    got = combine("eft:tuned=a,base=b", [0.5, 0.3, 0.2], [0.2, 0.3, 0.5], [0.4, 0.4, 0.2])
    want = torch.tensor([0.25, 0.225, 0.5])
    torch.testing.assert_close(got, want / want.sum())
    got = combine("eft:tuned=a,base=b,weight=2.0", [0.5, 0.3, 0.2], [0.2, 0.3, 0.5], [0.4, 0.4, 0.2])
    want = torch.tensor([0.125, 0.3 * 0.5625, 1.25])
    torch.testing.assert_close(got, want / want.sum())


def test_two_tuned_models_are_mixed_in_the_exponent() -> None:
    got = combine("eft:tuned=a,base=b,also=c,mix=0.25", [0.5, 0.5], [0.2, 0.8], [0.4, 0.6], [0.9, 0.1])
    want = torch.tensor([0.5 * 0.2**0.75 * 0.9**0.25 / 0.4, 0.5 * 0.8**0.75 * 0.1**0.25 / 0.6])
    torch.testing.assert_close(got, want / want.sum())


def test_tokens_outside_the_main_nucleus_are_left_out() -> None:
    log_p = torch.tensor([[0.5, 0.3, 0.15, 0.05], [0.05, 0.05, 0.1, 0.8]]).log()
    assert nucleus(log_p, 0.7).tolist() == [[True, True, False, False], [False, False, False, True]]
    assert nucleus(log_p, 1.0)[0].all()
    guide: Any = registry.build("guide", "eft:tuned=a,base=b,top_p=0.7")
    logits = guide.combine(log_p, [torch.zeros(2, 4), torch.zeros(2, 4)])
    assert bool((logits[0, 2:] == torch.tensor(OUT)).all()) and bool(logits.isfinite().all())


def test_it_is_normalised_whatever_the_logits_constants_are() -> None:
    guide: Any = registry.build("guide", "eft:tuned=a,base=b,top_p=0.9")
    rows = [torch.randn(3, 50, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    one = guide.combine(rows[0], rows[1:])
    two = guide.combine(rows[0] + 7, [rows[1] - 3, rows[2] + 100])
    torch.testing.assert_close(one.softmax(-1), two.softmax(-1))


def run(main: Decoder, guide: str, **more: Any) -> tuple[list[int], list[float]]:
    engine = Engine(main, None, EngineConfig(block_size=4, cache="400tok", guide=guide, **more))
    (output,) = engine.generate([PROMPT], GREEDY)
    assert_clean(engine)
    return list(output.tokens), [t.logprob for t in output.completions[0].logprobs]


def test_one_scale_gives_the_tuned_model_and_no_tuning_the_base(folders: dict[str, str]) -> None:
    """L = S: log p_base + log p_tuned - log p_base. tuned = base: the served model."""
    tokens, logprobs = run(small(2), f"eft:tuned={folders['tuned']},base={folders['base']}")
    want, scores = run(small(1), "none")
    assert tokens == want and logprobs == pytest.approx(scores, abs=1e-4)
    tokens, logprobs = run(tiny(), f"eft:tuned={folders['base']},base={folders['base']}")
    want, scores = run(tiny(), "none")
    assert tokens == want and logprobs == pytest.approx(scores, abs=1e-4)


def test_the_engine_gives_the_sum_of_three_forward_passes(folders: dict[str, str]) -> None:
    """Token by token with caches, against whole passes; with drafts and from the prefix cache alike."""
    guide = f"eft:tuned={folders['tuned']},base={folders['base']}"
    tokens, logprobs = run(tiny(), guide)
    models, row, want = (tiny(), small(1), small(2)), list(PROMPT), []
    with torch.no_grad():
        for token in tokens:
            main, tuned, base = (m(torch.tensor([row]))[0, -1].log_softmax(-1) for m in models)
            together = (main + tuned - base).log_softmax(-1)
            assert int(together.argmax()) == token
            want.append(float(together[token]))
            row.append(token)
    assert logprobs == pytest.approx(want, abs=1e-3)
    assert tokens != run(tiny(), "none")[0]
    assert run(tiny(), guide, drafter="prompt-lookup", draft_when="always")[0] == tokens
    engine = Engine(tiny(), None, EngineConfig(block_size=4, cache="400tok", guide=guide))
    for _ in range(2):
        assert list(engine.generate([PROMPT], GREEDY)[0].tokens) == tokens
    assert engine.counters["cached_tokens"] > 0


def test_given_tokens_are_scored_by_the_sum(folders: dict[str, str]) -> None:
    guide = f"eft:tuned={folders['tuned']},base={folders['base']}"
    engine = Engine(tiny(), None, EngineConfig(block_size=4, cache="400tok", guide=guide))
    (output,) = engine.outputs([Request(PROMPT[:10], SamplingParams(temperature=0, logprobs=1), (PROMPT[10:],))])
    with torch.no_grad():
        main, tuned, base = (m(torch.tensor([PROMPT]))[0].log_softmax(-1) for m in (tiny(), small(1), small(2)))
    together = (main + tuned - base).log_softmax(-1)
    want = [float(together[i - 1, PROMPT[i]]) for i in range(10, len(PROMPT))]
    assert [t.logprob for t in output.completions[0].logprobs] == pytest.approx(want, abs=1e-3)


def test_what_does_not_go_is_refused(folders: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="two small models"):
        Engine(tiny(), None, EngineConfig(cache="1ktok", guide="eft"))
    guide = f"eft:tuned={folders['tuned']},base={folders['base']}"
    with pytest.raises(UserError, match="kv=h2o"):
        Engine(tiny(), None, EngineConfig(cache="1ktok", guide=guide, kv="h2o", prefix_cache=False))
    save_model(Decoder(llama_like(300, 16, 1, 2)), tmp_path / "other")
    with pytest.raises(UserError, match="one tokenizer"):
        Engine(
            tiny(), None, EngineConfig(cache="1ktok", guide=f"eft:tuned={tmp_path / 'other'},base={folders['base']}")
        )


def test_drafts_are_moved_in_every_cache(folders: dict[str, str]) -> None:
    """A tree's accepted branch, not its first, is moved to the front entries: of the models beside too."""
    guide = f"eft:tuned={folders['tuned']},base={folders['base']}"
    prompts = [PROMPT * 3, [7, 8, 9] * 8]
    params = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
    outputs = []
    for drafter in ("none", "token-recycling"):
        engine = Engine(
            tiny(), None, EngineConfig(block_size=4, cache="800tok", guide=guide, drafter=drafter, draft_when="always")
        )
        outputs += [[list(o.tokens) for o in engine.generate(prompts, params)] for _ in range(2)]
    assert engine.counters["accepted_tokens"] > 0
    assert outputs[0] == outputs[1] == outputs[2] == outputs[3]
