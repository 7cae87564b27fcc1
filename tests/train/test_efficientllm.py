"""efficientllm: saliency against true changes of the loss, correction as least squares, the shrunk model's logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from modicum.core.errors import UserError
from modicum.core.events import Events
from modicum.data.shards import MemoryDocuments
from modicum.data.stream import Stream
from modicum.model.config import llama_like
from modicum.model.decoder import Decoder
from modicum.model.folder import load_model, save_model
from modicum.model.submodel import without_zeros
from modicum.serve.config import EngineConfig
from modicum.serve.engine import Engine
from modicum.serve.request import SamplingParams
from modicum.train.config import TrainConfig
from modicum.train.engine import TrainEngine
from modicum.train.loop import train
from modicum.train.surgery import efficientllm as method

V, L = 61, 3
TOKENS = torch.randint(1, V, (6, 16), generator=torch.Generator().manual_seed(1))


def decoder(layers: int = L) -> Decoder:
    return Decoder(
        llama_like(V, 32, layers, 4, kv_heads=2, mlp_width=48, context_length=64), torch.Generator().manual_seed(0)
    )


def run(choice: str) -> Decoder:
    documents = [([1, *[(i * k) % 57 + 3 for k in range(40)], 2], 1) for i in range(1, 40)]
    stream = Stream(MemoryDocuments({"all": documents}), sequence_length=16, seed=0)
    sizes: dict[str, Any] = {"steps": 20, "sequence_length": 16, "batch_sequences": 8, "lr": 1e-2}
    config = TrainConfig(**sizes, device="cpu", dtype="float32", surgery=choice)
    model = decoder()
    train(model, stream, config, None, events=Events(None), label="")
    return model


def loss(model: Decoder) -> torch.Tensor:
    logits = model(TOKENS[:, :-1]).flatten(0, 1)
    return torch.nn.functional.cross_entropy(logits, TOKENS[:, 1:].flatten())


def test_saliency_ranks_channels_as_their_true_loss_does() -> None:
    """One layer, each channel taken out by itself: the ranks agree, and to first order the change does."""
    model: Any = decoder(1).double()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3.0) if p.dim() == 2 else None
    loss(model).backward()
    mlp = model.layers[0].mlp
    score = sum(method.taylor(m.weight, m.weight.grad).sum(1) for m in (mlp.up, mlp.gate))
    score = (score + method.taylor(mlp.down.weight, mlp.down.weight.grad).sum(0)).abs()
    before, true = float(loss(model).detach()), []
    with torch.no_grad():
        for c in range(48):
            kept = mlp.down.weight[:, c].clone()
            mlp.down.weight[:, c] = 0
            true.append(abs(float(loss(model)) - before))
            mlp.down.weight[:, c] = kept
    ranks = [torch.tensor(x).argsort().argsort().double() for x in (score.tolist(), true)]
    assert float(torch.corrcoef(torch.stack(ranks))[0, 1]) > 0.7


def test_taylor_is_the_change_of_a_quadratic() -> None:
    w, g = torch.tensor([0.5, -2.0]), torch.tensor([3.0, 0.1])
    torch.testing.assert_close(method.taylor(w, g), g * w - g.square() * w.square() / 2)


def test_the_correction_is_least_squares_on_the_columns_that_stay() -> None:
    random = torch.Generator().manual_seed(0)
    x = torch.randn(200, 12, dtype=torch.float64, generator=random)
    x[:, 3] = 0.5 * x[:, 0] + 0.1 * x[:, 3]
    W = torch.randn(5, 12, dtype=torch.float64, generator=random)
    wanted, gone = x @ W.T, torch.tensor([3, 7])
    stay = torch.tensor([i for i in range(12) if i not in (3, 7)])
    method.correct(W, x.T @ x, gone, stay, 0.0)
    best = torch.linalg.lstsq(x[:, stay], wanted).solution.T
    torch.testing.assert_close(W[:, stay], best, atol=1e-8, rtol=1e-8)


def test_the_least_go_over_all_layers_but_none_loses_all() -> None:
    score = torch.tensor([[0.1, 0.2, 0.3], [5.0, 6.0, float("inf")]])
    assert method.choose(score, 2).tolist() == [[True, True, False], [False] * 3]
    assert method.choose(score, 9).tolist() == [[True, True, False], [True, False, False]]


@pytest.mark.parametrize("groups", [0.0, 0.34])
def test_the_shrunk_model_computes_what_the_masked_one_does(tmp_path, groups: float) -> None:
    masked: Any = run(f"efficientllm:mlp=0.5,groups={groups},rounds=4")
    cut = sum(int((layer.mlp.down.weight == 0).all(0).sum()) for layer in masked.layers)
    heads = sum(int((layer.attention.k.weight.view(2, -1) == 0).all(1).sum()) for layer in masked.layers)
    assert cut == round(0.5 * 48 * L) and heads == round(groups * 2 * L)
    with torch.no_grad():
        wanted = masked(TOKENS)
        small = without_zeros(masked)
        torch.testing.assert_close(small(TOKENS), wanted, atol=1e-5, rtol=1e-5)
    assert sum(c.mlp_width for c in small.config.per_layer) == 48 * L - cut
    save_model(small, tmp_path / "small")
    params = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
    engine = Engine(load_model(tmp_path / "small"), None, EngineConfig(cache="200tok"))
    (output,) = engine.generate([TOKENS[0].tolist()], params)
    row = TOKENS[0].tolist()
    with torch.no_grad():
        for _ in range(5):
            row.append(int(small(torch.tensor([row]))[0, -1].argmax()))
    assert list(output.tokens) == row[16:]


def test_cuts_are_spread_over_the_rounds() -> None:
    surgery = method.EfficientLlm(method.Config(mlp=0.5, rounds=4, begin=0.1, until=0.6))
    config = TrainConfig(steps=20, sequence_length=16, batch_sequences=8, lr=1e-2, device="cpu", dtype="float32")
    engine = TrainEngine(decoder(), config)
    engine.build()
    engine.model = surgery.prepare(engine.model, None)
    surgery.start(engine)
    assert surgery.marks(engine) == [4, 7, 10, 12] or surgery.marks(engine) == [4, 7, 9, 12]
    each = [surgery.removed(step) for step in range(20)]
    assert each == sorted(each) and len(set(each)) == 5 and each[3] == 0 < each[4]
    assert each[-1] == 72 * 3 * 32


def test_zeros_anywhere_are_taken_out() -> None:
    """The first group and channels in the middle, with their query heads."""
    model: Any = decoder()
    with torch.no_grad():
        attention, mlp = model.layers[1].attention, model.layers[1].mlp
        for part in (attention.q, attention.k, attention.v):
            part.weight[: len(part.weight) // 2] = 0
        attention.o.weight[:, :16] = 0
        mlp.up.weight[7:20] = 0
        mlp.gate.weight[7:20] = 0
        mlp.down.weight[:, 7:20] = 0
        wanted = model(TOKENS)
        small = without_zeros(model)
        assert (small.config.per_layer[1].kv_heads, small.config.per_layer[1].mlp_width) == (1, 35)
        torch.testing.assert_close(small(TOKENS), wanted)


def test_nothing_to_shrink_is_refused() -> None:
    with pytest.raises(UserError, match="nothing to take out"):
        without_zeros(decoder())
