"""loram: what counts least is cut, the cut model computes the zeroed one, adapters come back to their rows."""

from __future__ import annotations

import pytest
import torch

from modicum.adapt.peft_format import load_peft, save_peft
from modicum.adapt.recover import positions, recover
from modicum.compress.compressors.loram import head_rows, parts, without
from modicum.compress.method import compress_model
from modicum.core.errors import UserError
from modicum.model import attach
from modicum.model.config import llama_like
from modicum.model.decoder import Decoder
from modicum.model.folder import load_model, save_model

TOKENS = torch.arange(3, 51).view(3, 16)


def decoder() -> Decoder:
    shape = llama_like(64, 48, 3, 6, kv_heads=3, mlp_width=80, context_length=64)
    return Decoder(shape, torch.Generator().manual_seed(0))


def cut_model(tmp_path, knobs="mlp=0.5,groups=1,first=1,last=0"):
    return compress_model(decoder(), f"loram:{knobs}", TOKENS, tmp_path / "work")


def test_the_least_important_go_and_the_ends_stay(tmp_path):
    model = decoder()
    with torch.no_grad():
        dead = torch.tensor([3, 5, 40, 71])
        model.layers[1].mlp.down.weight[:, dead] *= 1e-6
        model.layers[1].attention.o.weight[:, 16:32] *= 1e-6  # the two query heads of group 1
        kept = model.layers[1].mlp.up.weight.detach().clone()
        groups = model.layers[1].attention.v.weight.detach().clone()
        made = compress_model(model, "loram:mlp=0.05,groups=1,first=1,last=1", TOKENS, tmp_path)
    assert [layer.mlp_width for layer in made.config.per_layer] == [80, 76, 80]
    assert [layer.kv_heads for layer in made.config.per_layer] == [3, 2, 3]
    assert [layer.heads for layer in made.config.per_layer] == [6, 4, 6]
    rest = torch.tensor([i for i in range(80) if i not in dead.tolist()])
    assert torch.equal(made.layers[1].mlp.up.weight, kept[rest])
    assert torch.equal(made.layers[1].attention.v.weight, groups[torch.cat([torch.arange(8), torch.arange(16, 24)])])


def test_a_group_goes_with_its_query_heads():
    """Brute force over heads: query head h reads key/value head h // (H / G)."""
    model = decoder()
    cut = {"channels": [], "groups": [0, 2]}
    heads = [h for h in range(6) if h // 2 in (0, 2)]
    index = {id(layer): i.tolist() for layer, _, i in parts(model.layers[0], cut)}
    attention = model.layers[0].attention
    assert index[id(attention.q)] == index[id(attention.o)] == [h * 8 + i for h in heads for i in range(8)]
    assert index[id(attention.k)] == index[id(attention.v)] == [g * 8 + i for g in (0, 2) for i in range(8)]
    assert head_rows([1], 16).tolist() == list(range(16, 32))


def test_without_computes_what_zeros_do():
    model = decoder()
    cut = {1: {"channels": [0, 7, 79], "groups": [1]}, 2: {"channels": list(range(40)), "groups": [0, 2]}}
    with torch.no_grad():
        for index, gone in cut.items():
            for layer, axis, where in parts(model.layers[index], gone):
                layer.weight.index_fill_(axis, where, 0.0)
        wanted = model(TOKENS)
        torch.testing.assert_close(without(model, cut)(TOKENS), wanted, atol=1e-5, rtol=1e-5)


def trained(model, seed=0):
    forms = attach.attach(model, {"layers.*": "lora:rank=2,alpha=6"}, generator=torch.Generator().manual_seed(seed))
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for form in forms.values():
            form.B.normal_(generator=generator)
    return forms


def test_an_adapter_comes_back_to_its_rows_and_columns(tmp_path):
    save_model(decoder(), tmp_path / "big")
    small = cut_model(tmp_path)
    save_model(small, tmp_path / "small")
    small = load_model(tmp_path / "small")
    plain = {name: layer.weight.detach().clone() for name, layer in attach.linears(small).items()}
    forms = trained(small)
    save_peft(small, tmp_path / "adapter")
    recover(tmp_path / "adapter", tmp_path / "small", tmp_path / "big", tmp_path / "large")
    big = load_model(tmp_path / "big")
    weights = {name: layer.weight.detach().clone() for name, layer in attach.linears(big).items()}
    large = load_peft(big, tmp_path / "large")
    assert set(large) == set(forms)
    for name, form in forms.items():
        update = form.scaling * form.B @ form.A
        grown = large[name].scaling * large[name].B @ large[name].A
        rows = positions(plain[name], weights[name]) if plain[name].shape[1] == weights[name].shape[1] else None
        columns = None if rows is not None else positions(plain[name].T, weights[name].T)
        there = grown[rows] if columns is None else grown[:, columns]
        torch.testing.assert_close(there, update, atol=1e-6, rtol=1e-5)
        assert (
            int((grown.abs().sum(1 if columns is None else 0) > 0).sum()) == (update.shape[0 if columns is None else 1])
        )


def test_with_nothing_cut_it_is_lora(tmp_path):
    save_model(decoder(), tmp_path / "big")
    save_model(cut_model(tmp_path, "mlp=0,groups=0,first=0,last=0"), tmp_path / "same")
    model = load_model(tmp_path / "same")
    assert model.config == load_model(tmp_path / "big").config
    forms = trained(model)
    save_peft(model, tmp_path / "adapter")
    recover(tmp_path / "adapter", tmp_path / "same", tmp_path / "big", tmp_path / "large")
    again = load_peft(load_model(tmp_path / "big"), tmp_path / "large")
    assert all(torch.equal(again[n].A, f.A) and torch.equal(again[n].B, f.B) for n, f in forms.items())


def test_a_model_that_was_trained_since_is_refused():
    many = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    assert positions(many[[1, 4, 7]], many).tolist() == [1, 4, 7]
    with pytest.raises(UserError, match="before it was trained"):
        positions(many[[1, 4]] + 1e-3, many)


def test_a_cut_model_is_stored_trained_and_loaded(tmp_path):
    small = cut_model(tmp_path)
    save_model(small, tmp_path / "small")
    again = load_model(tmp_path / "small")
    with torch.no_grad():
        assert torch.equal(again(TOKENS), small.eval()(TOKENS))
    again(TOKENS).square().mean().backward()
    assert all(p.grad is not None for p in again.parameters())
