"""bebr: symmetric integer distances against decoded float64, a hand-made code, and that loops and training help."""

import numpy as np
import pytest
import torch

from modicum.core.registry import build
from modicum.retrieve.encoders import unit
from modicum.retrieve.indexes import open_index
from modicum.retrieve.indexes._binary import Binary, Sign, rotation, signs
from modicum.retrieve.indexes.bebr import packed, scaled, symmetric


def vectors(n: int, dim: int = 32, seed: int = 0) -> np.ndarray:
    """Clustered, as embeddings are."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(7).standard_normal((40, dim))
    return unit(centres[rng.integers(0, 40, n)] + 0.7 * rng.standard_normal((n, dim)))


@pytest.mark.parametrize("loops", [0, 1, 2, 3])
@pytest.mark.parametrize("m", [8, 72, 128])
def test_symmetric_distance_is_the_product_of_decoded_codes(loops, m):
    rng = np.random.default_rng(loops)
    query, codes = rng.random((1, loops + 1, m)) > 0.5, rng.random((50, loops + 1, m)) > 0.5
    decode = lambda bits: np.einsum("t,ntm->nm", 0.5 ** np.arange(loops + 1), np.where(bits, 1.0, -1.0))  # noqa: E731
    expected = 4.0**loops * (decode(codes) @ decode(query)[0])
    got = symmetric(packed(query)[0], packed(codes), m)
    assert got.dtype == np.int64 and np.array_equal(got, expected), "exact in integers"
    values = np.unique(scaled(codes))
    assert set(values) <= set(range(-(2 ** (loops + 1)) + 1, 2 ** (loops + 1), 2)), "equally spaced values"


def test_a_code_made_by_hand():
    """Two dimensions, W and R given: the residual is taken in the original space, after the reading has length 1."""
    network = Binary(2, 2, 1)
    with torch.no_grad():
        network.encode[0].linear.weight.copy_(torch.eye(2))
        network.encode[1].linear.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, -1.0]]))
        network.decode[0].linear.weight.copy_(torch.tensor([[3.0, 0.0], [0.0, 4.0]]))
    f = torch.tensor([[0.8, 0.6]])
    b, parts = network(f)
    # b0 = (1, 1); read = unit(3, 4) = (0.6, 0.8); missing = (0.2, -0.2); W1 turns it to (0.2, 0.2); r0 = (1, 1)
    assert parts[0].tolist() == [[1, 1], [1, 1]] and b.tolist() == [[1.5, 1.5]]
    # A residual quantizer without R would take sgn(W1 (f - b0)) = sgn(-0.2, 0.4) = (-1, 1): another code.
    assert torch.where(network.encode[1].linear(f - parts[:, 0]) > 0, 1, -1).tolist() == [[-1, 1]]
    assert Sign.apply(torch.zeros(1)).item() == -1


def test_without_loops_a_code_is_the_sign_of_w0():
    index = build("index", "bebr:loops=0,steps=3")
    x = vectors(300)
    index.build([(np.arange(300), x)])
    expected = index.network.encode[0](torch.from_numpy(x)).detach().numpy() > 0
    assert np.array_equal(index.signs_NTW, packed(expected[:, None]))
    x_scores = index.search(x[:5], 300)
    cosines = np.where(expected, 1, -1)[:5] @ np.where(expected, 1, -1).T / 32
    for q in range(5):
        assert np.allclose(x_scores.scores_QK[q], cosines[q][x_scores.ids_QK[q]], atol=1e-6)


def test_gradients_pass_where_the_sign_is_not_saturated():
    x = torch.tensor([-2.0, -0.5, 0.5, 2.0], requires_grad=True)
    Sign.apply(x).sum().backward()
    assert x.grad.tolist() == [0, 1, 1, 0]


def recall(index, x, q, k=10) -> float:
    truth = np.argsort(-(q @ x.T), axis=1, kind="stable")[:, :k]
    return float(np.mean([np.isin(t, i).mean() for t, i in zip(truth, index.search(q, k).ids_QK, strict=True)]))


def test_each_loop_and_the_training_keep_more_of_the_ranking():
    x, q = vectors(1200), vectors(60, seed=3)
    kept = {}
    for choice in (
        "loops=0,steps=0",
        "loops=0,steps=60,batch=128",
        "loops=1,steps=0",
        "loops=3,steps=0",
        "loops=1,steps=20,rescore=5",
    ):
        index = build("index", f"bebr:{choice}")
        index.build([(np.arange(len(x)), x)])
        kept[choice] = recall(index, x, q)
    assert kept["loops=0,steps=0"] + 0.05 < kept["loops=1,steps=0"] < kept["loops=3,steps=0"]
    assert kept["loops=0,steps=60,batch=128"] > kept["loops=0,steps=0"] - 0.02
    assert kept["loops=1,steps=20,rescore=5"] > 0.95


def test_bytes_are_those_asked_for_and_survive_saving(tmp_path):
    x = vectors(1000, dim=64)
    index = build("index", "bebr:loops=1,steps=2,bits=128")
    index.build([(np.arange(1000), x)])
    assert index.signs_NTW.nbytes == 1000 * 128 // 8 and index.width == 64
    index.save(tmp_path / "i")
    again = open_index(tmp_path / "i")
    hits, expected = again.search(x[:20], 5), index.search(x[:20], 5)
    assert np.array_equal(hits.ids_QK, expected.ids_QK) and np.array_equal(hits.scores_QK, expected.scores_QK)
    assert np.array_equal(signs(again.network, x[:3]), signs(index.network, x[:3]))


def test_the_rotation_is_orthogonal_and_loses_less_than_a_random_one():
    x = vectors(1500)
    weight = rotation(x, 32, 0)
    assert np.allclose(weight @ weight.T, np.eye(32), atol=1e-4)
    loss = lambda r: np.linalg.norm(x @ r.T - np.where(x @ r.T > 0, 1, -1) / 32**0.5)  # noqa: E731
    assert loss(weight) < loss(rotation(x[:1], 32, 0))
