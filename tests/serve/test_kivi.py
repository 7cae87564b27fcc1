"""Reference test of cacheform/kivi: groups coded one by one in float64, and a step's keys put together by hand."""

from __future__ import annotations

import pytest
import torch
from serve_tools import assert_clean, tiny
from torch import Tensor

from modicum.core.errors import UserError
from modicum.model.decoder import Decoder
from modicum.serve.cacheforms.kivi import Config, Kivi
from modicum.serve.config import EngineConfig
from modicum.serve.engine import Engine
from modicum.serve.request import Request, SamplingParams

BLOCK = 4


def rounded(numbers: Tensor, bits: int) -> Tensor:
    """Numbers that share a scale, coded and decoded in float64."""
    zero = float(numbers.min().bfloat16())
    scale = float(((numbers.max().float() - zero) / (2**bits - 1)).bfloat16())
    codes = [0 if scale == 0 else min(2**bits - 1, max(0, round((float(x) - zero) / scale))) for x in numbers.double()]
    return torch.tensor([c * scale + zero for c in codes], dtype=torch.float64)


def naive(which: str, x_PE: Tensor, bits: int, group: int) -> Tensor:
    """A block's keys per channel, its values per token in groups of channels."""
    out_PE = torch.zeros(x_PE.shape, dtype=torch.float64)
    P, E = x_PE.shape
    if which == "k":
        for e in range(E):
            out_PE[:, e] = rounded(x_PE[:, e], bits)
    else:
        for p in range(P):
            for e in range(0, E, group):
                out_PE[p, e : e + group] = rounded(x_PE[p, e : e + group], bits)
    return out_PE


@pytest.mark.parametrize("which", ["k", "v"])
@pytest.mark.parametrize("bits", [2, 4])
def test_codes_are_those_of_groups_of_tokens_or_of_channels(which: str, bits: int) -> None:
    x_PE = torch.randn(16, 8, generator=torch.Generator().manual_seed(bits)) * torch.tensor(
        [1, 1, 30, 1, 0.1, 1, 1, 5.0]
    )
    form = Kivi(Config(bits=bits, group=4), 8, torch.float32)
    codes = form.encode(which, x_PE)
    want_PE = naive(which, x_PE, bits, 4)
    assert torch.allclose(form.decode(which, codes).double(), want_PE, rtol=1e-5, atol=1e-5)
    assert codes[0].dtype == torch.uint8 and codes[0].numel() == 16 * 8 * bits // 8
    # The large channel costs the others nothing in keys, and their precision in values.
    error_E = (want_PE - x_PE.double()).abs().amax(0)
    assert (float(error_E[0]) < 0.8) == (which == "k")


def test_bytes_at_the_papers_groups() -> None:
    """4 bits with bfloat16 scale and zero for 32 numbers: 0.3125 of bfloat16."""
    assert Kivi(Config(bits=4), 64, torch.bfloat16).block_bytes(32) == 0.3125 * 2 * 2 * 32 * 64
    assert Kivi(Config(bits=2), 64, torch.bfloat16).block_bytes(32) == 0.1875 * 2 * 2 * 32 * 64


class Mixed:
    """An `attend` over lists: tokens that left the residual as whole blocks are coded, the others are as they were."""

    def __init__(self, model: Decoder, bits: int, group: int, residual: int):
        self.bits, self.group, self.residual, self.n = bits, group, residual, 0
        self.kv: dict[tuple[str, int, int], Tensor] = {}
        self.coded = 0

    def __call__(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, window: int | None, scale: float, softcap: object
    ) -> Tensor:
        out, R, T = torch.empty_like(q), q.shape[1] // k.shape[1], q.shape[2]
        after = max(self.coded, (self.n + T - self.residual) // BLOCK * BLOCK)
        for g in range(k.shape[1]):
            keys, values = (
                torch.cat([self.kv.get((name, layer, g), x[0, g, :0].double()), x[0, g].double()])
                for name, x in (("k", k), ("v", v))
            )
            for t in range(T):
                end = self.n + t + 1
                low = 0 if window is None else max(0, end - window)
                for h in range(g * R, (g + 1) * R):
                    weights = (keys[low:end] @ q[0, h, t].double() * scale).softmax(0)
                    out[0, h, t] = (weights @ values[low:end]).float()
            for name, x in (("k", keys), ("v", values)):
                for first in range(self.coded, after, BLOCK):
                    x[first : first + BLOCK] = naive(name, x[first : first + BLOCK], self.bits, self.group)
                self.kv[name, layer, g] = x
        if layer == 1:
            self.coded, self.n = after, self.n + T
        return out


@pytest.mark.parametrize("residual", [0, 6, 40])
@pytest.mark.parametrize("piece", [None, 16])
def test_a_step_reads_codes_and_the_latest_tokens_as_they_are(residual: int, piece: int | None) -> None:
    model = tiny()
    prompts = [torch.randint(1, 400, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (37, 3, 26)]
    config = EngineConfig(
        block_size=BLOCK, cache="400tok", cache_form=f"kivi:bits=2,group=4,residual={residual}", prefix_cache=False,
        chunked_prefill=piece is not None, max_batch_tokens=piece or 2048,
    )  # fmt: skip
    engine = Engine(model, None, config)
    requests = [Request(p, SamplingParams(temperature=0, max_tokens=14, ignore_eos=True, logprobs=1)) for p in prompts]
    naives = [Mixed(model, 2, 4, residual) for _ in prompts]
    for request in requests:
        engine.add(request)
    checked = 0
    while engine.busy:
        samples = [r.sequences[0] for r in requests]
        before = [s.job.computed for s in samples]
        updates = {u.request: u for u in engine.step()}
        for sample, attend, start in zip(samples, naives, before, strict=True):
            n = sample.job.computed - start
            if not n:
                continue
            with torch.no_grad():
                at = torch.arange(start, start + n)[None]
                h = model.hidden(torch.tensor([sample.tokens[start : start + n]]), positions_BT=at, attend=attend)
                logits = model.head(h[0, -1])
            if (update := updates.get(sample.request.id)) is not None and update.logprobs:
                want = float(logits.log_softmax(-1)[update.tokens[0]])
                assert abs(update.logprobs[0].logprob - want) < 2e-3, f"after {start + n} tokens"
                checked += 1
    assert checked == 3 * 14
    assert_clean(engine)


def test_found_prefixes_are_read_in_codes() -> None:
    model, prompt = tiny(), torch.randint(1, 400, (50,), generator=torch.Generator().manual_seed(1)).tolist()
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    config = EngineConfig(block_size=BLOCK, cache="400tok", cache_form="kivi:group=4,residual=8")
    engine = Engine(model, None, config)
    engine.generate([prompt], params)
    second = Request(prompt, params)
    engine.add(second)
    while engine.busy:
        engine.step()
    # 57 tokens were computed; those of whole blocks that had left the residual can be found: 48, the prompt's 49 apart
    assert second.cached == 48
    assert_clean(engine)


def test_held_bytes_are_fewer_and_count_what_is_not_coded() -> None:
    model, prompt = tiny().to(torch.bfloat16), [7] * 200
    held = {}
    for form in ("plain", "kivi:bits=4,group=8,residual=16", "kivi:bits=2,group=8,residual=16"):
        engine = Engine(model, None, EngineConfig(cache="400tok", max_sequences=2, cache_form=form))
        engine.add(Request(prompt, SamplingParams(max_tokens=4)))
        engine.step()
        held[form] = engine.stats()["held_bytes"]
        engine.close()
    plain, four, two = held.values()
    # Of bfloat16: codes 1/4; scale and zero of keys for 16 tokens 1/8, of values for 8 channels 1/4. 32 plain tokens.
    assert four == pytest.approx(plain * (0.25 + (0.125 + 0.25) / 2 + 32 / 208))
    assert two < four < 0.6 * plain


def test_it_is_refused_with_what_drops_entries_or_takes_tokens_back() -> None:
    for more in ({"kv": "snapkv"}, {"kv": "streaming-llm"}, {"drafter": "prompt-lookup"}):
        with pytest.raises(UserError, match=r"kivi.*(kv=full|drafter=none)"):
            Engine(tiny(), None, EngineConfig(cache="1ktok", cache_form="kivi:group=4", **more))  # type: ignore[arg-type]
    with pytest.raises(UserError, match="group"):
        Engine(tiny(), None, EngineConfig(cache="1ktok", cache_form="kivi:group=5"))
    with pytest.raises(UserError, match="bits"):
        Config(bits=3)
