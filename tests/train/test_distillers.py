"""Reference tests of the distillers: losses written out in numpy, limits, and what may not be read."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import scipy.fft
import torch
from train_toys import VOCAB, config, decoder, stream

from modicum.core import registry
from modicum.core.choice import Choice
from modicum.core.errors import UserError
from modicum.data.batch import Batch
from modicum.model.attend import DenseAttend
from modicum.model.config import llama_like
from modicum.model.decoder import Decoder
from modicum.model.folder import save_model
from modicum.train.distillers._teacher import divergence_N, frozen_copy, map_layers
from modicum.train.distillers.scalekd import Projector, no_mean, over_width, visible
from modicum.train.loop import train
from modicum.train.objectives import Step


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "teacher"
    save_model(decoder(5, width=48, layers=4, heads=4), folder)
    return str(folder)


def batch(rows: int = 3, length: int = 9) -> Batch:
    tokens = torch.randint(2, VOCAB, (rows, length + 1), generator=torch.Generator().manual_seed(2))
    targets = tokens[:, 1:].clone()
    targets[1, :4] = -100
    return Batch(tokens[:, :-1].contiguous(), targets, None, torch.arange(length).repeat(rows, 1))


def make(key: str, **knobs):
    return registry.build("distiller", Choice("distiller", key, knobs))


def loss(method, model, given=None):
    return method.loss(registry.build("objective", "next-token"), model, given or batch(), Step())


def softmax(logits, temperature=1.0):
    z = np.exp((logits - logits.max(-1, keepdims=True)) / temperature)
    return z / z.sum(-1, keepdims=True)


def logits_of(model, given):
    with torch.no_grad():
        return model(given.tokens_BT).double().numpy()[(given.targets_BT != -100).numpy()]


@pytest.mark.parametrize("reverse", [False, True])
def test_logit_loss_is_the_papers(teacher, reverse):
    model, given = decoder(), batch()
    method = make("distil-logit", teacher=teacher, alpha=0.3, temperature=2.0, reverse=reverse)
    made = loss(method, model, given)
    s, t = logits_of(model, given), logits_of(method.teacher, given)
    hard = -np.log(softmax(s))[np.arange(len(s)), given.targets_BT[given.targets_BT != -100].numpy()].sum()
    p, q = softmax(t, 2.0), softmax(s, 2.0)
    soft = 4 * ((q * np.log(q / p)) if reverse else (p * np.log(p / q))).sum()
    assert made.total.item() == pytest.approx(0.7 * hard + 0.3 * soft, rel=1e-5)
    assert float(made.count) == len(s) == 23


def test_logit_gradient_is_that_of_whole_logits(teacher):
    """Slice by slice as from one tensor of logits, for the head as for everything below."""
    model, given = decoder(), batch()
    method = make("distil-logit", teacher=teacher, alpha=1.0)
    loss(method, model, given).total.backward()
    mine = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    mask = given.targets_BT != -100
    divergence_N(model(given.tokens_BT)[mask], method.teacher(given.tokens_BT)[mask]).sum().backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(mine[name], p.grad, atol=1e-5, rtol=1e-4)


def test_a_student_that_is_its_teacher_has_nothing_to_learn():
    model = decoder()
    for key in ("distil-logit", "distil-feature", "self-distill-further"):
        knobs = {"alpha": 1.0} if key == "distil-logit" else {}
        method = make(key, **knobs)
        made = loss(method, model)
        terms = {k: v for k, v in made.metrics.items() if k in ("distil", "feature")}
        assert all(abs(float(v)) < 1e-4 for v in terms.values()), (key, terms)
    model.zero_grad()
    loss(make("distil-logit", alpha=1.0), model).total.backward()
    assert max(float(p.grad.abs().max()) for p in model.parameters()) < 1e-5


def test_high_temperatures_compare_centred_logits():
    s, t = torch.randn(2, 5, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    centred = (s - s.mean(-1, keepdim=True)) - (t - t.mean(-1, keepdim=True))
    wanted = centred.square().sum(-1) / (2 * 40)
    torch.testing.assert_close(divergence_N(s, t, 300.0).double(), wanted, atol=2e-2, rtol=2e-2)


def test_top_tokens_are_renormalised_and_their_mass_reported(teacher):
    model, given = decoder(), batch()
    method = make("distil-logit", teacher=teacher, alpha=1.0, top=5)
    made = loss(method, model, given)
    s, t = logits_of(model, given), logits_of(method.teacher, given)
    p, q = softmax(t), softmax(s)
    order = np.argsort(-t, -1)[:, :5]
    top, mine = np.take_along_axis(p, order, -1), np.take_along_axis(q, order, -1)
    share = top / top.sum(-1, keepdims=True)
    assert made.total.item() == pytest.approx((share * np.log(share / mine)).sum(), rel=1e-5)
    assert float(made.metrics["teacher_mass"]) == pytest.approx(top.sum(), rel=1e-5)


def test_features_are_mapped_by_depth_and_width(teacher):
    assert map_layers(2, 4) == [1, 3] and map_layers(4, 2) == [0, 0, 1, 1] and map_layers(3, 30) == [9, 19, 29]
    model, given = decoder(), batch()
    method = make("distil-feature", teacher=teacher, weight=2.0)
    made = loss(method, model, given)
    with torch.no_grad():
        states = {}
        for name, m in (("s", model), ("t", method.teacher)):
            for i, layer in enumerate(m.layers):
                layer.register_forward_hook(lambda _, __, out, at=(name, i): states.__setitem__(at, out.double()))
            m(given.tokens_BT)
        mask, total = given.targets_BT != -100, 0.0
        for i, j in ((0, 1), (1, 3)):
            mapped = states["s", i] @ method.extra[str(i)].weight.double().T
            total += (mapped - states["t", j]).square().mean(-1)[mask].sum() / 2
    assert float(made.metrics["feature"]) == pytest.approx(2.0 * float(total), rel=1e-5)


def test_the_maps_between_widths_learn(teacher):
    method = Choice("distiller", "distil-feature", {"teacher": teacher, "weight": 0.1})
    first, last = [], []
    for steps, into in ((1, first), (40, last)):
        result = train(decoder(), stream(), config(steps=steps, distiller=method, dtype="float32"), None, label="")
        into.append(result.loss)
    assert last[0] < 0.8 * first[0]


def test_pretrained_distillation_is_cross_entropy_with_the_teacher(teacher):
    model, given = decoder(), batch()
    method = make("pretrained-distillation", teacher=teacher)
    made = loss(method, model, given)
    p, q = softmax(logits_of(method.teacher, given)), softmax(logits_of(model, given))
    assert made.total.item() == pytest.approx(-(p * np.log(q)).sum(), rel=1e-5)
    shuffled = dataclasses.replace(given, targets_BT=torch.where(given.targets_BT == -100, -100, 7))
    assert loss(method, model, shuffled).total.item() == made.total.item(), "the text's own labels play no part"


def test_a_teacher_that_is_certain_is_plain_training():
    """One-hot outputs of the teacher: the loss of next-token prediction."""
    model, given = decoder(), batch()
    given = dataclasses.replace(given, targets_BT=given.tokens_BT.clone())
    sure = frozen_copy(decoder(tied=True))
    with torch.no_grad():  # the likeliest next token is the token itself, by far
        for layer in sure.layers:
            layer.attention.o.weight.zero_()
            layer.mlp.down.weight.zero_()
        sure.embed.weight.copy_(torch.nn.functional.normalize(sure.embed.weight, dim=-1) * 40)
    method = make("pretrained-distillation")
    method.teacher = sure
    made = loss(method, model, given)
    plain = registry.build("objective", "next-token").loss(model, given, Step())
    assert made.total.item() == pytest.approx(plain.total.item(), rel=1e-4)


def test_self_distillation_restarts_and_draws_to_the_teacher(tmp_path):
    """Weight 0 is plain further pretraining bit for bit; the term is the squared distance over the width."""
    base, told = decoder(), {"steps": 6, "dtype": "float32"}
    plain, zero = frozen_copy(base).requires_grad_(True), frozen_copy(base).requires_grad_(True)
    train(plain, stream(), config(**told), None, label="")
    train(zero, stream(), config(**told, distiller="self-distill-further:weight=0"), None, label="")
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), zero.parameters(), strict=True))
    save_model(plain, tmp_path / "once")
    method, given = make("self-distill-further", teacher=str(tmp_path / "once"), weight=3.0), batch()
    made = loss(method, base, given)
    with torch.no_grad():
        apart = (base.hidden(given.tokens_BT) - plain.hidden(given.tokens_BT)).double().square().mean(-1)
    wanted = 3.0 * float(apart[given.targets_BT != -100].sum())
    assert wanted > 0 and float(made.metrics["feature"]) == pytest.approx(wanted, rel=1e-4)


def test_another_width_cannot_teach_itself(teacher):
    with pytest.raises(UserError, match="distil-feature"):
        loss(make("self-distill-further", teacher=teacher), decoder())


def test_the_second_view_is_a_cosine_transform_without_its_mean():
    x = torch.randn(2, 12, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    spectrum = scipy.fft.dct(x.numpy(), axis=1, norm="ortho")
    spectrum[:, 0] = 0
    np.testing.assert_allclose(no_mean(x).numpy(), scipy.fft.idct(spectrum, axis=1, norm="ortho"), atol=1e-12)
    normal = over_width(x)
    assert float(normal.mean(-1).abs().max()) < 1e-6 and float((normal.var(-1, unbiased=False) - 1).abs().max()) < 1e-3


def test_a_projector_sees_no_later_position():
    projector = Projector(8, 12, 16, 4, torch.Generator().manual_seed(0))
    x = torch.randn(1, 10, 8, generator=torch.Generator().manual_seed(1))
    changed = x.clone()
    changed[:, 6:] += 1.0
    documents = torch.tensor([[0] * 4 + [1] * 6])
    mask = torch.ones(1, 10, dtype=torch.bool)
    with torch.no_grad():
        one, two = (projector(y, visible(mask, documents)) for y in (x, changed))
        assert torch.equal(one[:, :6], two[:, :6]) and not torch.equal(one[:, 6:], two[:, 6:])
        changed = x.clone()
        changed[:, :4] += 1.0
        assert torch.equal(projector(changed, visible(mask, documents))[:, 4:], one[:, 4:]), "another document is seen"


def test_scalekd_goes_through_the_teachers_last_layers(teacher):
    """What the projector gives is pushed through them, with gradient for the student and none for them."""
    model, given = decoder(), batch()
    method = make("scalekd", teacher=teacher, weight=0.7)
    made = loss(method, model, given)
    made.total.backward()
    assert all(p.grad is None for p in method.teacher.parameters())
    with torch.no_grad():
        states = {}
        for name, m in (("s", model), ("t", method.teacher)):
            for i, layer in enumerate(m.layers):
                layer.register_forward_hook(lambda _, __, out, at=(name, i): states.__setitem__(at, out))
            m(given.tokens_BT)
        sees, mask, end = visible(given.tokens_BT, None), given.targets_BT != -100, states["t", 3]
        x = method.extra["late"](states["s", 0], sees)
        table = method.teacher.rope_tables()[0]
        y = x
        for layer in method.teacher.layers[2:]:
            y = layer(y, table(given.positions_BT, torch.float32), DenseAttend())
        apart = (over_width(y) - over_width(end)).double().square().mean(-1)
        final = method.extra["final"](states["s", 1], sees, y)
        last = (over_width(final) - over_width(end)).double().square().mean(-1)
    assert float(made.metrics["last_layers"]) == pytest.approx(0.7 * float(apart[mask].sum()), rel=1e-4)
    assert float(made.metrics["final"]) == pytest.approx(0.7 * float(last[mask].sum()), rel=1e-4)


def test_a_teacher_of_another_vocabulary_is_refused(tmp_path):
    save_model(Decoder(llama_like(99, 32, 1), torch.Generator().manual_seed(0)), tmp_path / "other")
    with pytest.raises(UserError, match="99 tokens"):
        loss(make("distil-logit", teacher=str(tmp_path / "other")), decoder())


def test_an_objective_of_other_rows_is_refused():
    class Changes:
        config = None

        def loss(self, model, batch, step):
            return registry.build("objective", "next-token").loss(
                model, dataclasses.replace(batch, tokens_BT=batch.tokens_BT.clone()), step
            )

    with pytest.raises(UserError, match="objective=next-token"):
        make("distil-logit").loss(Changes(), decoder(), batch(), Step())
