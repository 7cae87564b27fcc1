"""swiftkv: forward pass against one written out, early end in the engine, what is trained, the loss in numpy."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from modicum.core import registry
from modicum.core.errors import UserError
from modicum.data.stream import Batch
from modicum.model.config import llama_like
from modicum.model.decoder import Decoder
from modicum.model.folder import load_model, save_model
from modicum.model.mixers.swiftkv import convert
from modicum.serve.config import EngineConfig
from modicum.serve.engine import Engine
from modicum.serve.plan import AttentionPlan
from modicum.serve.request import SamplingParams
from modicum.train.objectives import Step

L, OWN, E = 4, 2, 8
PROMPTS = [torch.randint(1, 61, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (37, 3, 26, 40)]
GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, logprobs=1)


def plain() -> Decoder:
    model = Decoder(llama_like(61, 32, L, 4, kv_heads=2, context_length=96), torch.Generator().manual_seed(0))
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.mul_(4.0) if p.dim() == 2 and "embed" not in name else None
            if p.dim() == 1:
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name))) * 0.3)
    return model.eval()


def swift(own: int = OWN) -> Decoder:
    model = plain()
    convert(model, own)
    return model.eval()


def written_out(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Logits, every step by hand in float64."""
    model = copy.deepcopy(model).double()
    x, T = model.embed(tokens), tokens.shape[1]
    angles = torch.arange(T, dtype=torch.float64)[:, None] * model.ropes()[0][0].angles.double()
    cos, sin = angles.cos(), angles.sin()

    def turned(y: torch.Tensor) -> torch.Tensor:
        a, b = y.chunk(2, -1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    source = None
    for i, layer in enumerate(model.layers):
        a, normed = layer.attention, layer.attention_norm(x)
        own = normed if i < OWN else source
        q, k, v = (m(y).view(1, T, -1, E).transpose(1, 2) for m, y in ((a.q, normed), (a.k, own), (a.v, own)))
        q, k = turned(q), turned(k)
        scores = q @ k.repeat_interleave(2, 1).mT * E**-0.5
        scores = scores.masked_fill(torch.ones(T, T).triu(1).bool(), float("-inf")).softmax(-1)
        x = x + a.o((scores @ v.repeat_interleave(2, 1)).transpose(1, 2).flatten(2))
        x = x + layer.mlp(layer.mlp_norm(x))
        if i == OWN - 1:
            source = model.kv_norm(x)
    return model.head(model.norm(x))


def test_later_keys_are_of_one_earlier_output() -> None:
    model, tokens = swift(), torch.tensor([PROMPTS[0]])
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).double(), written_out(model, tokens), atol=1e-4, rtol=1e-4)
        assert not torch.allclose(model(tokens), plain()(tokens), atol=1e-2)


def test_the_first_later_layer_begins_as_it_was() -> None:
    """N is the norm of layer l: with one later layer nothing has changed."""
    tokens = torch.tensor([PROMPTS[0]])
    with torch.no_grad():
        torch.testing.assert_close(swift(L - 1)(tokens), plain()(tokens), atol=1e-5, rtol=1e-5)
    with pytest.raises(UserError, match="1 to 3"):
        convert(plain(), L)


def test_it_is_stored_and_counted(tmp_path) -> None:
    model, tokens = swift(), torch.tensor([PROMPTS[0]])
    save_model(model, tmp_path / "model")
    with torch.no_grad():
        assert torch.equal(load_model(tmp_path / "model")(tokens), model(tokens))
    assert model.config.parameters() == sum(p.numel() for p in model.parameters())


def engine(model: Decoder, **more: object) -> Engine:
    return Engine(model, None, EngineConfig(block_size=4, cache="600tok", **more))  # type: ignore[arg-type]


@pytest.mark.parametrize("more", [{}, {"chunked_prefill": True, "max_batch_tokens": 16}, {"cache_form": "int8"}])
def test_an_early_end_gives_the_logits_of_the_whole(monkeypatch: pytest.MonkeyPatch, more: dict[str, object]) -> None:
    model, got = swift(), {}
    for way in ("early", "whole"):
        if way == "whole":
            monkeypatch.setattr(AttentionPlan, "of_rows", lambda plan, rows: None)
        one = engine(model, **more)
        for turn in range(2):  # the second from the prefix cache
            outputs = one.generate(PROMPTS, GREEDY)
            got[way, turn] = [[t.logprob for t in o.completions[0].logprobs] for o in outputs]
        assert one.counters["failures"] == 0
    for turn in range(2):
        np.testing.assert_allclose(got["early", turn], got["whole", turn], atol=1e-4)


def test_a_prompts_products_are_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the later half there remain the keys and values of all rows, and one row of the rest."""
    counted = {}
    for name, model in (("plain", plain()), ("swift", swift())):
        monkeypatch.setenv("MODICUM_NATIVE", "0")
        one = Engine(model, None, EngineConfig(cache="600tok", prefix_cache=False))
        with FlopCounterMode(display=False) as counter:
            one.generate([PROMPTS[3]], SamplingParams(temperature=0, max_tokens=1, ignore_eos=True))
        counted[name] = counter.get_total_flops()
    layer = plain().config.per_layer[0]
    rest = 2 * 40 * (layer.matmul_weights(32) - 2 * 32 * layer.kv_heads * E) * (L - OWN)
    saved = counted["plain"] - counted["swift"]
    assert 0.9 * rest * 39 / 40 < saved < 1.35 * rest, (saved, rest)  # and the scores of attention
    assert counted["swift"] < 0.65 * counted["plain"]


def test_scored_tokens_are_computed_whole() -> None:
    """Log-probabilities of given tokens need every row."""
    from modicum.serve.request import Request

    model, row = swift(), PROMPTS[0]
    one = engine(model)
    request = Request(row[:20], SamplingParams(temperature=0, logprobs=1), (row[20:],))
    (output,) = one.outputs([request])
    with torch.no_grad():
        logits = model(torch.tensor([row]))[0].log_softmax(-1)
    want = [float(logits[i - 1, row[i]]) for i in range(20, len(row))]
    np.testing.assert_allclose([t.logprob for t in output.completions[0].logprobs], want, atol=1e-4)


def test_queries_keys_values_and_the_norm_are_trained() -> None:
    method: Any = registry.build("distiller", f"swiftkv:own={OWN / L}")
    model: Any = method.prepare(plain(), None)
    names = {n for n, p in model.named_parameters() if p.requires_grad}
    late = {f"layers.{i}.attention.{part}.weight" for i in range(OWN, L) for part in "qkv"}
    assert names == late | {"kv_norm.weight"}
    assert method.teacher.config.source_layer is None


def test_the_loss_is_numpys() -> None:
    method: Any = registry.build("distiller", f"swiftkv:own={OWN / L},hidden=0.5,temperature=2.0")
    model: Any = method.prepare(plain(), None)
    tokens = torch.tensor([PROMPTS[0][:17], PROMPTS[3][:17]])
    targets = tokens[:, 1:].clone()
    targets[0, :5] = -100
    zeros = torch.zeros(2, 16, dtype=torch.int64)
    batch = Batch(tokens[:, :-1].contiguous(), targets, zeros, torch.arange(16).expand(2, 16).contiguous())
    loss = method.loss(registry.build("objective", "next-token"), model, batch, Step())
    hidden: dict[str, np.ndarray] = {}
    with torch.no_grad():
        for name, m in (("s", model), ("t", plain())):
            handle = m.layers[L - 2].register_forward_hook(
                lambda mod, a, out, name=name: hidden.update({name: out.numpy()})
            )
            hidden[f"{name}_logits"] = m(batch.tokens_BT).numpy()
            handle.remove()
    mask = (targets != -100).numpy()
    p, q = (hidden[f"{n}_logits"].astype(np.float64) / 2 for n in "ts")
    p, q = (z - np.log(np.exp(z).sum(-1, keepdims=True)) for z in (p, q))
    divergence = 4 * (np.exp(p) * (p - q)).sum(-1)[mask].sum()
    square = ((hidden["s"].astype(np.float64) - hidden["t"]) ** 2).mean(-1)[mask].sum()
    assert float(loss.total.detach()) == pytest.approx(divergence + 0.5 * square, rel=1e-4)
    assert float(loss.count) == mask.sum()
