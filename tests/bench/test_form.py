"""The bench of forms that start afresh: the search for a rate, and bytes counted as the paper counts them."""

import math

import pytest
import torch

from modicum.bench.ports import _linear_scratch as scratch
from modicum.bench.ports.linear import axes_of
from modicum.core.choice import Choice
from modicum.model import attach
from modicum.model.config import llama_like
from modicum.model.decoder import Decoder


@pytest.mark.parametrize("best", [0.25, 1.0, 3.0, 14.0])
def test_the_rate_found_is_better_than_its_neighbours(best: float) -> None:
    def loss(rate: float) -> float:
        tried.append(rate)
        return (math.log2(rate) - math.log2(best)) ** 2

    tried: list[float] = []
    found = scratch.tune(loss, 1.0)
    assert found == min(tried, key=lambda rate: abs(math.log2(rate) - math.log2(best)))
    assert {found / 2, found * 2} <= set(tried) and len(tried) == len(set(tried)) <= 8


def test_bytes_are_six_per_trained_parameter_and_the_places() -> None:
    model = Decoder(llama_like(64, 32, 2, 4, mlp_width=96), torch.Generator().manual_seed(0))
    dense = scratch.count(model)
    parameters = sum(p.numel() for p in model.parameters())
    assert dense["training_bytes"] == 6 * parameters and dense["pretrained_parameters"] == parameters
    attach.attach(model, {"layers.*": "sltrain:rank=8,density=0.05"})
    sparse = scratch.count(model)
    layer = 2 * (4 * (8 * 64 + 51) + 3 * (8 * 128 + 153))  # factors and a twentieth of the entries
    kept = parameters - 2 * (4 * 32 * 32 + 3 * 32 * 96)
    assert sparse["pretrained_parameters"] == kept + layer
    assert sparse["training_bytes"] == 6 * (kept + layer) + 4 * 2 * (4 * 51 + 3 * 153)


def test_each_kind_of_form_has_its_axes() -> None:
    judged = {
        form: axes_of(Choice.parse("linear", form)).quality.metric for form in ("dense", "bitstack", "lora", "sltrain")
    }
    assert judged == {
        "dense": "bits_per_byte",
        "bitstack": "bits_per_byte",
        "lora": "adapted_bits_per_byte",
        "sltrain": "pretrained_bits_per_byte",
    }
