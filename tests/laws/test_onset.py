"""The law for short runs: its equation, its start, its limit, and what it is for."""

import numpy as np
import pytest

from modicum.core import registry
from modicum.core.errors import UserError


def test_equation_and_start():
    law = registry.build("law", "onset:vocabulary=4096")
    p = {"E": 1.7, "A": 60.0, "B": 150.0, "alpha": 0.33, "beta": 0.3, "D0": 5e4}
    sizes, tokens = np.array([1e5, 1e6]), np.array([1e4, 3e6])
    expected = 1.7 + 60 / sizes**0.33 + 150 / (tokens + 5e4) ** 0.3
    assert np.allclose(law.value(p, {"parameters": sizes, "tokens": tokens}), expected, rtol=1e-12)
    anchored = p | {"D0": (150 / (np.log(4096) - 1.7)) ** (1 / 0.3)}
    assert law.from_parameters(anchored, {"parameters": 1.0, "tokens": 1.0})[5] == pytest.approx(0)
    (start,) = law.value(anchored, {"parameters": [1e30], "tokens": [1e-6]})
    assert start == pytest.approx(np.log(4096))


def test_agrees_with_chinchilla_on_long_runs():
    rng = np.random.default_rng(0)
    sizes, tokens = (
        np.exp(rng.uniform(np.log(5e7), np.log(5e9), 25)),
        np.exp(rng.uniform(np.log(2e9), np.log(2e11), 25)),
    )
    loss = (1.8 + 480 / sizes**0.35 + 2000 / tokens**0.37) * np.exp(rng.laplace(0, 0.003, 25))
    runs = {"parameters": sizes, "tokens": tokens, "loss": loss}
    point = {"parameters": [5e10], "tokens": [1e12]}
    said = [
        law.predict(law.fit(runs), point)
        for law in (registry.build("law", "chinchilla:draws=300"), registry.build("law", "onset:draws=300"))
    ]
    assert said[0].mean == pytest.approx(said[1].mean, rel=0.005)


# Llama-style decoders on Python source, vocabulary 2048, batches of 2048 tokens, WSD with 20% decay; held-out
# loss in nats per token. (parameters, tokens, loss): what short runs really look like.
MEASURED = [
    (98464, 38912, 6.8603),
    (237888, 79872, 6.1911),
    (237888, 159744, 5.6479),
    (529056, 319488, 5.0094),
    (237888, 638976, 4.7144),
    (1115264, 1198080, 3.9703),
]


def test_short_real_runs():
    """From three runs of 19 to 78 steps, the outcomes at 2 to 7 times the tokens lie within the interval."""
    runs = [dict(zip(("parameters", "tokens", "loss"), row, strict=True)) for row in MEASURED]
    law, plain = registry.build("law", "onset:vocabulary=2048"), registry.build("law", "chinchilla")
    said, other = (each.predict(each.fit(runs[:3]), runs[3:]) for each in (law, plain))
    outcome = np.array([r["loss"] for r in runs[3:]])
    assert ((said.low <= outcome) & (outcome <= said.high)).all()
    assert (np.abs(said.mean - outcome) < np.abs(other.mean - outcome)).all()


def test_mistakes():
    for knobs in ("vocabulary=1", "ratio=0"):
        with pytest.raises(UserError):
            registry.build("law", f"onset:{knobs}")
