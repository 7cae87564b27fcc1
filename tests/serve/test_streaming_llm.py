"""Reference test of kv/streaming-llm: a rolling cache of unrotated keys, rotated anew by their index in the cache."""

from __future__ import annotations

import pytest
import torch
from serve_tools import assert_clean, tiny
from torch import Tensor

from modicum.core.errors import UserError
from modicum.model.decoder import Decoder
from modicum.model.rope import rotate
from modicum.serve.config import EngineConfig
from modicum.serve.engine import Engine
from modicum.serve.kv.streaming_llm import Config
from modicum.serve.request import SamplingParams

SINKS, WINDOW = 3, 12


class Rolling:
    """An `attend` as in the paper: token by token, first and latest entries, positions by index."""

    def __init__(self, model: Decoder, by_index: bool = True):
        self.tables, self.n, self.by_index = model.rope_tables(), 0, by_index
        self.held: dict[tuple[int, int], list[tuple[Tensor, Tensor, int]]] = {}

    def __call__(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, window: object, scale: float, softcap: object
    ) -> Tensor:
        angles = self.tables[layer].angles.double()  # type: ignore[union-attr]

        def turned(x_E: Tensor, places: int) -> Tensor:
            turn = places * angles[None]
            return rotate(x_E.double()[None], turn.cos(), turn.sin())[0]

        out = torch.empty_like(q)
        R = q.shape[1] // k.shape[1]
        for t in range(q.shape[2]):
            p = self.n + t
            for g in range(k.shape[1]):
                held = self.held.setdefault((layer, g), [])
                held.append((turned(k[0, g, t], -p), v[0, g, t].double(), p))
                if len(held) > SINKS + WINDOW:
                    del held[SINKS]
                for h in range(g * R, (g + 1) * R):
                    last = len(held) - 1 if self.by_index else p
                    query = turned(q[0, h, t], last - p)
                    places = range(len(held)) if self.by_index else [e[2] for e in held]
                    keys = [turned(e[0], at) for e, at in zip(held, places, strict=True)]
                    weights = torch.stack([query @ key * scale for key in keys]).softmax(0)
                    out[0, h, t] = sum(w * e[1] for w, e in zip(weights, held, strict=True)).float()
        return out


def _naive(model: Decoder, prompt: list[int], n: int, by_index: bool = True) -> list[int]:
    attend, tokens, said = Rolling(model, by_index), prompt, []
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


@pytest.mark.parametrize("piece", [None, 7])
def test_outputs_are_those_of_a_rolling_cache(piece: int | None) -> None:
    model, prompts = tiny(), [_prompt(40), _prompt(5), _prompt(23)]
    config = EngineConfig(
        block_size=4,
        cache="600tok",
        kv=f"streaming-llm:sinks={SINKS},window={WINDOW}",
        chunked_prefill=piece is not None,
        max_batch_tokens=piece or 2048,
    )
    engine = Engine(model, None, config)
    got = engine.generate(prompts, SamplingParams(temperature=0, max_tokens=14, ignore_eos=True))
    for output, prompt in zip(got, prompts, strict=True):
        assert output.tokens == _naive(model, prompt, 14)
    assert_clean(engine)


def test_places_in_the_text_would_say_something_else() -> None:
    model, prompt = tiny(), _prompt(60)
    assert _naive(model, prompt, 8) != _naive(model, prompt, 8, by_index=False)


def test_it_differs_from_a_ceiling_for_all_sinks() -> None:
    """lm-infinite puts all first tokens at one distance; here they keep their order."""
    model, prompt = tiny(), _prompt(60)
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    said = [
        Engine(model, None, EngineConfig(cache="600tok", kv=f"{kv}:sinks=10,window=6")).generate([prompt], params)
        for kv in ("streaming-llm", "lm-infinite")
    ]
    assert said[0][0].tokens != said[1][0].tokens


def test_knobs_that_cannot_be() -> None:
    for knobs in ({"sinks": -1}, {"window": 0}):
        with pytest.raises(UserError, match="streaming-llm"):
            Config(**knobs)
