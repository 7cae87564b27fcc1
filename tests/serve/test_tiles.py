"""Products by tiles, their instructions written out in C: as exact as by vectors, and never taken unless allowed."""

from __future__ import annotations

import pytest
import torch
from kernel_tools import coded, decoder, distance, exact, logits_of
from torch import Tensor

from modicum.model.decoder import Decoder
from modicum.serve import native
from modicum.serve.backends import choose as backends
from modicum.serve.backends.native import Native

PROMPTS = [[5, 6, 7], list(range(40)), [9] * 17, list(range(90, 160)), [3]]  # 131 rows: 128 of them, then three


@pytest.fixture(autouse=True)
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODICUM_ISA", native.EMULATED)
    if native.library() is None:
        pytest.skip(native.reason())


def by_tiles(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    """Engines take tiles from so many rows on."""

    class Tiled(Native):
        def __init__(self, *given: object) -> None:
            super().__init__(*given)  # type: ignore[arg-type]
            assert self.tiles
            self.use_tiles(rows)

    monkeypatch.setattr(backends, "Native", Tiled)


def eager(model: Decoder) -> Tensor:
    """By the decoder's own modules, in its dtype."""
    with torch.no_grad():
        return torch.stack([model(torch.tensor([p]))[0, -1:] for p in PROMPTS]).double()


def first_logits(model: Decoder, prompts: list[list[int]] = PROMPTS) -> tuple[Tensor, list[list[int]]]:
    return logits_of(model, prompts, steps=1)


@pytest.mark.parametrize(
    "name", ["plain", "biases, half rotation", "windows and caps", "norms of heads", "no gate, odd sizes", "long rows"]
)
def test_they_are_no_further_from_exact_than_the_decoder(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """199 outputs of the head and 160 of others: the last tiles are not full; inputs of 80 go by vectors."""
    model = decoder(name).to(torch.bfloat16)
    vectors, tokens = first_logits(model)
    want = exact(model, PROMPTS, tokens)
    by_tiles(monkeypatch, 1)
    tiles, _ = first_logits(model)
    assert not torch.equal(tiles, vectors)
    assert distance(tiles, want) < distance(eager(model), want)


@pytest.mark.parametrize("form", ["int8", "int8:group=64", "int4", "affine:bits=2,group=64", "affine:bits=3,group=64"])
def test_codes_are_decoded_for_them(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = coded(form)
    by_tiles(monkeypatch, 1)
    tiles, tokens = first_logits(model)
    want = exact(model, PROMPTS, tokens)
    assert distance(tiles, want) < distance(eager(model), want)


@pytest.mark.parametrize(("rows", "same"), [(0, True), (100, False), (129, True)])
def test_steps_of_fewer_rows_than_allowed_stay_with_vectors(
    rows: int, same: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = decoder().to(torch.bfloat16)
    want, _ = first_logits(model)
    by_tiles(monkeypatch, rows)
    assert torch.equal(first_logits(model)[0], want) == same


@pytest.mark.parametrize("count", [16, 17, 33, 128])
def test_a_row_does_not_depend_on_those_beside_it(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = decoder().to(torch.bfloat16)
    by_tiles(monkeypatch, 1)
    prompt, other = list(range(20)), [i % 199 for i in range(7, 7 + count - 10)]
    alone, _ = first_logits(model, [prompt])
    beside, _ = first_logits(model, [other, prompt])
    assert torch.equal(alone[0], beside[1])


def test_threads_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, before = decoder().to(torch.bfloat16), torch.get_num_threads()
    by_tiles(monkeypatch, 1)
    made = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            made.append(first_logits(model)[0])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*made)


@pytest.mark.skipif(not set(native.USEFUL) <= native.abilities(), reason="no products of bytes in vectors")
@pytest.mark.parametrize("form", ["int8", "int8:group=64", "int4", "int4:group=128"])
def test_eight_bits_are_those_of_vectors_bit_for_bit(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = coded(form)
    want, _ = logits_of(model, PROMPTS, steps=1, activation_bits=8)
    monkeypatch.setenv("MODICUM_ISA", "avx512")
    assert distance(logits_of(model, PROMPTS, steps=1, activation_bits=8)[0], want) < 1e-3
