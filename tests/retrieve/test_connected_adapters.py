"""connected-adapters: a no-op at first, the recurrence by hand, and gradients that need no frozen layer."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from modicum.core.errors import UserError
from modicum.core.registry import build
from modicum.retrieve.connected import ConnectedAdapters, fraction
from modicum.retrieve.encoders import make_encoder
from modicum.retrieve.student import Student
from modicum.retrieve.trainers._conformance import toy_pairs
from modicum.retrieve.training import Training, train

TEXTS = ["open one socket", "lock a thread and close the file"]


def student(layers: int = 3) -> Student:
    pairs = toy_pairs(False)
    return Student.new([*pairs.queries, *pairs.passages], width=16, layers=layers, heads=2, vocabulary=330)


def adapters(made: Student, inside: int, beside: int, seed: int = 1) -> ConnectedAdapters:
    fresh = ConnectedAdapters(made.width, made.depth, inside, beside)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in fresh.parameters():
            p.copy_(0.3 * torch.randn(p.shape, generator=generator))
    return fresh


def test_fresh_adapters_change_nothing_bit_for_bit_and_detaching_ends_them():
    made = student()
    before = made.encode(TEXTS)
    fresh = ConnectedAdapters(16, 3, 4, 4)
    fresh.attach(made.model)
    assert np.array_equal(made.encode(TEXTS), before)
    with pytest.raises(UserError, match="attached already"):
        fresh.attach(made.model)
    with torch.no_grad():
        for p in fresh.parameters():
            p.normal_()
    assert not np.allclose(made.encode(TEXTS), before, atol=1e-2)
    fresh.detach()
    assert np.array_equal(made.encode(TEXTS), before)
    with pytest.raises(UserError, match="BERT family"):
        fresh.attach(torch.nn.Linear(2, 2))


def test_the_path_beside_is_its_recurrence():
    made = student()
    side = adapters(made, 0, 5)
    inputs = made.tokenizer(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        x = made.model.embeddings(input_ids=inputs["input_ids"])
        mask = torch.where(inputs["attention_mask"][:, None, None].bool(), 0.0, -torch.inf)
        a = torch.zeros_like(x)
        for n, layer in enumerate(made.model.encoder.layer):
            out = layer(x, mask)
            h = out[0] if isinstance(out, tuple) else out
            b = side.beside[n]
            a = a + torch.nn.functional.gelu(h @ b.down.weight.T + b.down.bias) @ b.up.weight.T + b.up.bias
            x = h + a
        side.attach(made.model)
        for _ in range(2):  # nothing is carried from one forward pass to the next
            got = made.model(**{k: v for k, v in inputs.items() if k != "token_type_ids"}).last_hidden_state
            real = inputs["attention_mask"].bool()
            assert torch.allclose(got[real], x[real], atol=1e-5)


def test_adapters_inside_follow_attention_and_feed_forward():
    made = student(1)
    inside = adapters(made, 4, 0)
    layer = made.model.encoder.layer[0]
    seen = []
    for module in (layer.attention.output, layer.output):
        module.register_forward_hook(lambda _m, _i, out: seen.append(out))
    inside.attach(made.model)
    after = []
    for module in (layer.attention.output, layer.output):
        module.register_forward_hook(lambda _m, _i, out: after.append(out))
    made.encode(TEXTS)
    for plain, changed, adapter in zip(seen, after, (inside.after_attention[0], inside.after_mlp[0]), strict=True):
        with torch.inference_mode():
            assert torch.allclose(changed, plain + adapter(plain), atol=1e-6)


def test_gradients_reach_the_lowest_adapter_without_the_frozen_layers():
    """With the stream between layers cut off, scattered adapters get none; connected ones do."""
    gradients = {}
    for inside, beside in ((4, 0), (0, 4)):
        made = student()
        made.requires_grad_(False)
        side = adapters(made, inside, beside)
        # Inputs of the upper layers carry no graph: what is left is the path beside.
        for layer in list(made.model.encoder.layer)[1:]:
            layer.register_forward_pre_hook(lambda _m, inputs: (inputs[0].detach(), *inputs[1:]))
        side.attach(made.model)
        made(TEXTS).pooled().pow(2).sum().backward()
        lowest = (side.after_mlp if inside else side.beside)[0]
        gradients[inside > 0] = lowest.up.weight.grad
    assert gradients[True] is None or not gradients[True].any()
    assert gradients[False].abs().max() > 1e-4


def test_only_adapters_are_trained_and_few_they_are(tmp_path):
    pairs = toy_pairs()
    made = student()
    before = copy.deepcopy(made.state_dict())
    trainer = build("trainer", "connected-adapters:inside=1,beside=1", pairs)
    train(made, trainer, Training(steps=12, batch=12, lr=5e-3), out=tmp_path / "e")
    assert all(torch.equal(p, before[n]) for n, p in made.state_dict().items()), "the encoder is frozen"
    assert all(b.up.weight.any() for b in trainer.heads.beside)
    assert fraction(trainer.heads, made.model) < 0.03
    encoder = make_encoder(f"sentence-transformers:model={tmp_path}/e,unit=false")
    assert np.allclose(encoder.encode(TEXTS), made.encode(TEXTS), atol=1e-5)
    with pytest.raises(UserError, match="cannot cut"):
        make_encoder(f"sentence-transformers:model={tmp_path}/e,layers=1")
    with pytest.raises(UserError, match="not a transformer"):
        Student.open(tmp_path / "e")  # not opened without its adapters
    with pytest.raises(UserError, match="nothing to train"):
        build("trainer", "connected-adapters:inside=0,beside=0", pairs)
