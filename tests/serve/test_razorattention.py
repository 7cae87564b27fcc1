"""Reference test of kv/razorattention: scores from whole attention matrices, compensation by equation 5."""

from __future__ import annotations

import pytest
import torch
from serve_tools import assert_clean, tiny
from torch import Tensor

from modicum.core.errors import UserError
from modicum.model.decoder import Decoder
from modicum.serve.config import EngineConfig
from modicum.serve.engine import Engine
from modicum.serve.kv import CacheShape, Entries
from modicum.serve.kv.razorattention import Config, RazorAttention, ranking, scores
from modicum.serve.request import SamplingParams

KNOBS = "razorattention:induction=0.25,echo=0.01,sinks=2,least=5,ratio=4,probe=10"
CONFIG = Config(induction=0.25, echo=0.01, sinks=2, least=5, ratio=4, probe=10)


def attention_matrices(model: Decoder, tokens_T: Tensor) -> list[Tensor]:
    """Of each layer, (H, T, T), in float64."""
    found: list[Tensor] = []

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, *, window: object, scale: float, softcap: object) -> Tensor:
        T = q.shape[2]
        a = q[0].double() @ k[0].double().repeat_interleave(2, 0).transpose(1, 2) * scale
        a = a.masked_fill(torch.ones(T, T, dtype=torch.bool).triu(1), float("-inf")).softmax(-1)
        found.append(a)
        return (a @ v[0].double().repeat_interleave(2, 0)).float()[None]

    with torch.no_grad():
        model.hidden(tokens_T[None], attend=attend)
    return found


def test_scores_are_those_of_whole_attention_matrices() -> None:
    model = tiny()
    tokens = torch.randint(400, (10,), generator=torch.Generator().manual_seed(0)).repeat(4)
    found = attention_matrices(model, tokens)
    echo_LG, induction_LG = scores(model, CONFIG)
    for layer, a in enumerate(found):
        for g in range(2):
            want = [0.0, 0.0]
            for h in (2 * g, 2 * g + 1):
                sums = [0.0, 0.0]
                for t in range(10, 40):
                    for m in (10, 20, 30):
                        sums[0] += float(a[h, t, t - m]) if t >= m else 0.0
                        sums[1] += float(a[h, t, t - m + 1]) if t >= m else 0.0
                want = [max(w, s / 30) for w, s in zip(want, sums, strict=True)]
            assert abs(float(echo_LG[layer, g]) - want[0]) < 1e-5
            assert abs(float(induction_LG[layer, g]) - want[1]) < 1e-5


def test_heads_can_be_measured_on_given_tokens() -> None:
    """Scores over the places whose token was said before, wherever that was; the engine passes its `kv_probe` on."""
    model = tiny()
    said = [7, 3, 3, 9, 7, 3, 5, 9, 9, 7]
    found = attention_matrices(model, torch.tensor(said))
    echo_LG, induction_LG = scores(model, CONFIG, said)
    again = [t for t in range(10) if said[t] in said[:t]]
    for layer, a in enumerate(found):
        for g in range(2):
            each = []
            for h in (2 * g, 2 * g + 1):
                echo = sum(float(a[h, t, s]) for t in again for s in range(t) if said[s] == said[t])
                after = sum(float(a[h, t, s]) for t in again for s in range(1, t) if said[s - 1] == said[t])
                each.append((echo / len(again), after / len(again)))
            assert abs(float(echo_LG[layer, g]) - max(e for e, _ in each)) < 1e-5
            assert abs(float(induction_LG[layer, g]) - max(i for _, i in each)) < 1e-5
    engine = Engine(model, None, EngineConfig(kv=KNOBS, cache="1ktok", kv_probe=tuple(said)))
    assert isinstance(engine.policy, RazorAttention)
    assert list(engine.policy.ranked) == ranking(echo_LG, induction_LG, CONFIG)


def test_induction_heads_come_first_then_echo_heads() -> None:
    induction, echo = torch.tensor([[0.1, 0.9], [0.3, 0.2]]), torch.tensor([[0.5, 0.8], [0.1, 0.2]])
    assert ranking(echo, induction, CONFIG) == [(0, 1), (0, 0)]
    assert ranking(echo, induction, Config(induction=0.5, echo=0)) == [(0, 1), (1, 0)]


class Lists:
    """RazorAttention over one list of (key, value, position, weight) per layer and KV head."""

    def __init__(self, model: Decoder, policy: RazorAttention, prompt: int, block: int):
        self.heads: list[list[list[tuple[Tensor, Tensor, int, float]]]] = [
            [[] for _ in range(model.config.kv_heads)] for _ in range(model.config.layers)
        ]
        self.ranked, self.prompt, self.n, self.block = policy.ranked, prompt, 0, block

    def __call__(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, window: object, scale: float, softcap: object
    ) -> Tensor:
        out, G = torch.empty_like(q), k.shape[1]
        for t in range(q.shape[2]):
            for g in range(G):
                self.heads[layer][g].append((k[0, g, t].double(), v[0, g, t].double(), self.n + t, 1.0))
            for h in range(q.shape[1]):
                top, bottom = torch.zeros(k.shape[3], dtype=torch.float64), 0.0
                for key, value, _, weight in self.heads[layer][h // (q.shape[1] // G)]:
                    e = weight * float(torch.exp(q[0, h, t].double() @ key * scale))
                    top, bottom = top + e * value, bottom + e
                out[0, h, t] = (top / bottom).float()
        return out

    def commit(self, n: int) -> None:
        self.n += n
        if self.n < self.prompt or (self.n > self.prompt and self.n % self.block):
            return
        buffer = max(5, self.n // 4)
        slack = 0 if self.n == self.prompt else self.block
        short = [(i, g) for i, heads in enumerate(self.heads) for g in range(len(heads)) if (i, g) not in self.ranked]
        if all(len(self.heads[i][g]) <= 2 + buffer + 1 + slack for i, g in short):
            return
        for i, g in short:
            head = self.heads[i][g]
            sinks = [e for e in head if e[2] < 2 and e[3] == 1]
            drop = [e for e in head[: len(head) - buffer] if e[2] >= 2 or e[3] != 1]
            if len(drop) < 2:
                continue
            n_dropped = sum(e[3] for e in drop)
            mean = [sum(e[j] * e[3] for e in drop) / n_dropped for j in (0, 1)]
            self.heads[i][g] = [(mean[0], mean[1], drop[-1][2], n_dropped), *sinks, *head[len(head) - buffer :]]


@pytest.mark.parametrize("chunked", [False, True])
def test_outputs_are_those_of_the_equations(chunked: bool) -> None:
    model, prompt = tiny(), torch.randint(1, 400, (45,), generator=torch.Generator().manual_seed(5)).tolist()
    config = EngineConfig(
        block_size=4, cache="900tok", kv=KNOBS, chunked_prefill=chunked, max_batch_tokens=11 if chunked else 2048
    )
    engine = Engine(model, None, config)
    assert isinstance(engine.policy, RazorAttention) and len(engine.policy.ranked) == 2
    got = engine.generate([prompt, prompt[:20]], SamplingParams(temperature=0, max_tokens=30, ignore_eos=True))
    lists, tokens, said = Lists(model, engine.policy, len(prompt), 4), prompt, []
    with torch.no_grad():
        for _ in range(30):
            at = torch.arange(lists.n, lists.n + len(tokens))[None]
            logits = model(torch.tensor([tokens]), positions_BT=at, attend=lists)[0, -1]
            lists.commit(len(tokens))
            tokens = [int(logits.argmax())]
            said += tokens
    assert got[0].tokens == said
    assert_clean(engine)


def test_retrieval_heads_keep_all_and_the_others_a_buffer_with_its_compensation() -> None:
    model = tiny()
    engine = Engine(model, None, EngineConfig(block_size=4, cache="900tok", kv=KNOBS, prefix_cache=False))
    prompt = torch.randint(1, 400, (60,), generator=torch.Generator().manual_seed(6)).tolist()
    for update in engine.stream(prompt, SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)):
        sample = next(iter(engine.samples.values()), None)
        if sample is None or not update.tokens:
            continue
        for layer in range(2):
            entries = engine.storage.entries_of_pages(layer, sample.pages)
            assert entries.weight_GS is not None
            for g in range(2):
                total = float(entries.weight_GS[g, : entries.counts[g]].sum())
                assert total == sample.job.computed, "every token is held or stands in the compensation token"
                full = (layer, g) in engine.policy.ranked
                assert entries.counts[g] == (sample.job.computed if full else 2 + 15 + 1 + sample.job.computed - 60)


def test_a_budget_is_the_mean_over_heads() -> None:
    shape = CacheShape(layers=4, heads=4, kv_heads=4, head_dim=8, block_size=4, windows=(None,) * 4)
    for budget, full in ((0.5, 2), (0.3, 2), (0.2, 2), (0.1, 1), (0.05, 0), (1.0, 16), (300, 2)):
        policy = RazorAttention(Config(budget=budget), shape)
        policy.ranked = [(1, 0), (2, 3)]
        mine = policy.begin(1000)
        held = 0
        for layer in range(4):
            k_GSE = torch.zeros(4, 1000, 8)
            keep = mine.keep(layer, Entries(k_GSE, k_GSE, torch.arange(1000).expand(4, 1000), [1000] * 4))
            assert keep.merged is not None
            held += sum(len(i) + (m is not None) for i, m in zip(keep.heads, keep.merged, strict=True))
        want = budget * 16000 if budget <= 1 else budget * 16
        assert want - 16 <= held <= want
        assert isinstance(mine, RazorAttention) and len(mine.ranked) == full


def test_refusals() -> None:
    with pytest.raises(UserError, match="razorattention"):
        Config(induction=2)
    with pytest.raises(UserError, match="budget"):
        Config(budget=1.5)
