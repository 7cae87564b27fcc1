"""Reference test of kv/lm-infinite: true distances, masked and capped one pair at a time in float64."""

from __future__ import annotations

import pytest
import torch
from serve_tools import assert_clean, lively, tiny
from torch import Tensor

from modicum.core import registry
from modicum.core.errors import UserError
from modicum.model.config import llama_like
from modicum.model.decoder import Decoder
from modicum.model.rope import rotate
from modicum.serve.config import EngineConfig
from modicum.serve.engine import Engine
from modicum.serve.kv.lm_infinite import Config
from modicum.serve.request import SamplingParams

SINKS, WINDOW = 3, 12


class Pairs:
    """An `attend` that turns every key to its capped distance from every query, over plain lists."""

    def __init__(self, model: Decoder, ceiling: int):
        self.model, self.ceiling, self.n = model, ceiling, 0
        self.k: dict[int, list[Tensor]] = {}
        self.v: dict[int, list[Tensor]] = {}

    def __call__(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, window: object, scale: float, softcap: object
    ) -> Tensor:
        angles = self.model.rope_tables()[layer].angles.double()
        out = torch.empty_like(q)
        for t in range(q.shape[2]):
            p = self.n + t
            self.k.setdefault(layer, []).append(k[0, :, t].double())
            self.v.setdefault(layer, []).append(v[0, :, t].double())
            seen = [s for s in range(p + 1) if p - s < WINDOW or s < SINKS]
            for h in range(q.shape[1]):
                g = h // (q.shape[1] // k.shape[1])
                scores = []
                for s in seen:  # R(p - min(p - s, ceiling) - s) puts the key where the distance is right
                    more = (p - min(p - s, self.ceiling) - s) * angles
                    key = rotate(self.k[layer][s][g][None], more.cos()[None], more.sin()[None])[0]
                    scores.append(float(q[0, h, t].double() @ key * scale))
                weights = torch.tensor(scores, dtype=torch.float64).softmax(0)
                out[0, h, t] = sum(w * self.v[layer][s][g] for w, s in zip(weights, seen, strict=True)).float()
        return out


def _naive(model: Decoder, prompt: list[int], n: int, ceiling: int) -> list[int]:
    attend, tokens, said = Pairs(model, ceiling), prompt, []
    with torch.no_grad():
        for _ in range(n):
            at = torch.arange(attend.n, attend.n + len(tokens))[None]
            logits = model(torch.tensor([tokens]), positions_BT=at, attend=attend)[0, -1]
            attend.n += len(tokens)
            tokens = [int(logits.argmax())]
            said += tokens
    return said


def _prompt(n: int) -> list[int]:
    return torch.randint(1, 400, (n,), generator=torch.Generator().manual_seed(n)).tolist()


@pytest.mark.parametrize("ceiling", [WINDOW, 17])
@pytest.mark.parametrize("piece", [None, 7])
def test_outputs_are_those_of_capped_distances(piece: int | None, ceiling: int) -> None:
    model, prompts = tiny(), [_prompt(40), _prompt(5), _prompt(23)]
    kv = f"lm-infinite:sinks={SINKS},window={WINDOW},ceiling={ceiling}"
    config = EngineConfig(
        block_size=4, cache="600tok", kv=kv, chunked_prefill=piece is not None, max_batch_tokens=piece or 2048
    )
    engine = Engine(model, None, config)
    got = engine.generate(prompts, SamplingParams(temperature=0, max_tokens=14, ignore_eos=True))
    for output, prompt in zip(got, prompts, strict=True):
        assert output.tokens == _naive(model, prompt, 14, ceiling)
    assert_clean(engine)


def test_the_cap_matters() -> None:
    model, prompt = tiny(), _prompt(60)
    assert _naive(model, prompt, 8, WINDOW) != _naive(model, prompt, 8, 10_000)


def test_a_stream_of_fifty_contexts_in_constant_memory() -> None:
    model = lively(Decoder(llama_like(60, 16, 1, heads=2, kv_heads=1, context_length=16), torch.Generator()))
    length = 50 * 16
    engine = Engine(
        model,
        None,
        EngineConfig(block_size=4, cache="64tok", kv="lm-infinite:sinks=2", max_length=length, prefix_cache=False),
    )
    held = []
    params = SamplingParams(temperature=0, max_tokens=length - 4, ignore_eos=True)
    for _ in engine.stream([1, 2, 3, 4], params):
        held.append(engine.stats()["used_blocks"])
    assert len(held) == length - 4
    assert max(held) == max(held[:100]) <= -(-(2 + 16) // 4) + 2
    assert_clean(engine)


def test_models_without_rotation_and_knobs_that_cannot_be() -> None:
    with pytest.raises(UserError, match="lm-infinite"):
        Config(window=0)
    with pytest.raises(UserError, match="ceiling"):
        Config(window=20, ceiling=10)
    with pytest.raises(UserError, match="window"):
        Engine(tiny(), None, EngineConfig(kv="lm-infinite:ceiling=9"))


def test_lambda_sees_two_arms() -> None:
    pattern = registry.build("attention", "lambda:window=2,sinks=1")
    seen = pattern.allowed(torch.arange(5)[:, None], torch.arange(5)[None]).int().tolist()
    assert seen == [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 0, 1, 1, 0], [1, 0, 0, 1, 1]]
