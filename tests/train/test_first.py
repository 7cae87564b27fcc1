"""first: a fixed set of layers against a decoder written out, batches of different sets, decisions, products saved."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from modicum.core import registry
from modicum.core.errors import UserError
from modicum.data.stream import Batch
from modicum.model.attend import attention
from modicum.model.config import llama_like
from modicum.model.decoder import Decoder
from modicum.model.folder import load_model, save_model
from modicum.serve.config import EngineConfig
from modicum.serve.engine import Engine
from modicum.serve.request import Request, SamplingParams
from modicum.train.objectives import Step
from modicum.train.objectives.first import add_routers

L = 5
PROMPTS = [torch.randint(1, 61, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (17, 3, 26, 9)]
GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)


def decoder() -> Decoder:
    model = Decoder(llama_like(61, 32, L, 4, kv_heads=2, context_length=96), torch.Generator().manual_seed(0))
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.mul_(4.0) if p.dim() == 2 and "embed" not in name else None
    return model.eval()


def routed(used: set[int] | None = None) -> Any:
    """Routers that let these layers through, or that decide by the text (None)."""
    model: Any = decoder()
    add_routers(model)
    with torch.no_grad():
        for i in range(1, L - 1):
            router = model.layers[i].router
            if used is None:
                router.weight.normal_(generator=torch.Generator().manual_seed(i)).mul_(3)
                router.bias.zero_()
            else:
                router.bias.fill_(9.0 if i in used else -9.0)
    return model


class Lists:
    """An `attend` with a list of keys for each layer."""

    def __init__(self) -> None:
        self.k: dict[int, torch.Tensor] = {}
        self.v: dict[int, torch.Tensor] = {}

    def __call__(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **how: Any) -> torch.Tensor:
        for old, new in ((self.k, k), (self.v, v)):
            old[layer] = torch.cat([old[layer], new], 2) if layer in old else new
        T, S = q.shape[2], self.k[layer].shape[2]
        mask = torch.ones(T, S, dtype=torch.bool).tril(S - T)
        return attention(q, self.k[layer], self.v[layer], scale=how["scale"], softcap=None, mask=mask)


def written_out(model: Any, prompt: list[int], used: list[int], n: int) -> list[int]:
    """The whole model on the prompt, then the layers `used` with what they cached."""
    attend, row = Lists(), list(prompt)
    with torch.no_grad():
        for start in (0, *range(len(prompt), len(prompt) + n - 1)):
            positions = torch.arange(start, len(row))[None]
            x = model.embed(torch.tensor([row[start:]]))
            rotations = model.rotations(positions, x.dtype)
            for i in range(L) if start == 0 else used:
                x = model.layers[i](x, rotations[i], attend)
            row.append(int(model.head(model.norm(x))[0, -1].argmax()))
    return row[len(prompt) :]


def decided(model: Any, prompt: list[int]) -> list[int]:
    """Layers whose router says more than a half on average, over the full model's pass."""
    given: dict[int, torch.Tensor] = {}
    handles = [
        layer.register_forward_pre_hook(lambda m, a, i=i: given.update({i: a[0]}))
        for i, layer in enumerate(model.layers)
    ]
    with torch.no_grad():
        model(torch.tensor([prompt]))
        used = [i for i in range(L) if i in (0, L - 1) or float(model.layers[i].router(given[i]).mean()) > 0.5]
    for handle in handles:
        handle.remove()
    return used


def engine(model: Decoder, **more: Any) -> Engine:
    return Engine(model, None, EngineConfig(block_size=4, cache="400tok", prefix_cache=False, **more))


def test_routers_that_let_all_through_change_nothing() -> None:
    want = [o.tokens for o in engine(decoder()).generate(PROMPTS, GREEDY)]
    assert [o.tokens for o in engine(routed({1, 2, 3})).generate(PROMPTS, GREEDY)] == want


@pytest.mark.parametrize("used", [{1, 3}, {2}, set()])
def test_a_fixed_set_is_a_decoder_without_the_others_from_the_first_answer_on(used: set[int]) -> None:
    model = routed(used)
    for prompt in PROMPTS:
        (output,) = engine(model).generate([prompt], GREEDY)
        assert list(output.tokens) == written_out(model, prompt, sorted({0, L - 1} | used), 8)


@pytest.mark.parametrize("more", [{}, {"chunked_prefill": True, "max_batch_tokens": 8}, {"cache": "44tok"}])
def test_sequences_of_a_batch_leave_out_layers_of_their_own(more: dict[str, Any]) -> None:
    """Different sets in one batch, in chunks, and after a preemption, when answers are computed again."""
    model = routed()
    sets = {tuple(decided(model, p)) for p in PROMPTS}
    assert len(sets) > 1
    want = [written_out(model, p, decided(model, p), 8) for p in PROMPTS]
    one = Engine(model, None, EngineConfig(**{"block_size": 4, "cache": "400tok", "prefix_cache": False} | more))
    for _ in range(2):
        assert [list(o.tokens) for o in one.generate(PROMPTS, GREEDY)] == want
    assert one.counters["failures"] == 0 and (one.counters["preemptions"] > 0) == (more.get("cache") == "44tok")
    drafts = engine(model, drafter="prompt-lookup", draft_when="always")
    assert [list(o.tokens) for o in drafts.generate(PROMPTS, GREEDY)] == want


def test_given_tokens_are_scored_by_the_layers_that_are_left() -> None:
    """A continuation that is computed at once skips as one that is generated."""
    model = routed({2})
    prompt = PROMPTS[0]
    answer = written_out(model, prompt, [0, 2, 4], 6)
    scores = []
    for step in (False, True):
        request = Request(prompt, SamplingParams(temperature=0, logprobs=1), (answer,), token_by_token=step)
        (output,) = engine(model).outputs([request])
        scores.append([t.logprob for t in output.completions[0].logprobs])
    assert scores[0] == pytest.approx(scores[1], abs=1e-4)


def test_products_of_answers_are_saved() -> None:
    counted = {}
    for used in ((1, 2, 3), ()):
        one = engine(routed(set(used)))
        with FlopCounterMode(display=False) as counter:
            one.generate([PROMPTS[2]], GREEDY)
        counted[used] = counter.get_total_flops()
        routing = one.runner.backends[-1].routing  # type: ignore[attr-defined]
        assert routing.left_out == 7 * (3 - len(used))  # of eight tokens the prompt's last row gives the first
    layer = decoder().config.per_layer[0].matmul_weights(32)
    saved = counted[1, 2, 3] - counted[()]
    assert 2 * layer * 3 * 7 <= saved < 1.5 * 2 * layer * 3 * 7


def test_what_does_not_go_is_refused() -> None:
    with pytest.raises(UserError, match="prefix_cache=false"):
        Engine(routed({1}), None, EngineConfig(cache="1ktok"))
    with pytest.raises(UserError, match="three layers"):
        add_routers(Decoder(llama_like(61, 32, 2, 4)))


def test_routers_are_trained_alone_and_stored(tmp_path) -> None:
    objective: Any = registry.build("objective", "first:penalty=0.3,sharp=0.2")
    model: Any = objective.prepare(decoder(), None)
    names = {n for n, p in model.named_parameters() if p.requires_grad}
    assert names == {f"layers.{i}.router.{part}" for i in range(1, L - 1) for part in ("weight", "bias")}
    tokens = torch.tensor([PROMPTS[2][:17], PROMPTS[0]])
    zeros = torch.zeros(2, 16, dtype=torch.int64)
    targets = tokens[:, 1:].clone()
    targets[0, :5] = -100
    batch = Batch(tokens[:, :-1].contiguous(), targets, zeros, torch.arange(16).expand(2, 16).contiguous())
    loss = objective.loss(model, batch, Step())
    p = torch.sigmoid(torch.tensor(2.0))
    with torch.no_grad():
        x = model.embedded(batch.tokens_BT, batch.positions_BT)
        rotations = model.rotations(batch.positions_BT, x.dtype)
        from modicum.model.attend import DenseAttend

        for i, layer in enumerate(model.layers):
            y = layer._whole(x, rotations[i], DenseAttend(), None)
            x = y if i in (0, L - 1) else p * y + (1 - p) * x
        logits = model.head(model.norm(x))
        torch.testing.assert_close(model(batch.tokens_BT), logits, atol=1e-5, rtol=1e-5)
        scores = logits.log_softmax(-1)
    mask = targets != -100
    own = -scores.gather(-1, targets.clamp(min=0)[..., None])[..., 0][mask].sum()
    want = float(own + mask.sum() * (0.3 * p + 0.2 * p * (1 - p)))
    assert float(loss.total.detach()) == pytest.approx(want, rel=1e-4)
    objective.finish(type("T", (), {"model": model}))
    save_model(model, tmp_path / "model")
    again = load_model(tmp_path / "model")
    with torch.no_grad():
        assert torch.equal(again(tokens), model(tokens))
    assert model.config.parameters() == sum(q.numel() for q in model.parameters())
