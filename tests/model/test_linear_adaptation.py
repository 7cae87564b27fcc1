"""svfit, compacter and increlora against their equations, computed naively in float64."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from modicum.core import registry
from modicum.core.callback import step_with_factors
from modicum.core.errors import UserError
from modicum.model import attach
from modicum.model.linear import LinearForm, LinearShape
from modicum.model.linear.compacter import kronecker
from modicum.model.linear.increlora import Config, Growth, IncreLora, allocate, planned
from modicum.model.linear.lora import Lora


def gaussian(*sizes: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def over(choice: str, weight: torch.Tensor, bias: torch.Tensor | None = None, base: str = "dense") -> LinearForm:
    """The adapter `choice` on a form `base` of `weight`, with something learnt."""
    below = registry.build("linear", base, LinearShape.of(weight, bias)).fit(weight, bias)
    form = registry.build("linear", choice, LinearShape.of(weight, bias), below)
    return form.fit(below.dense(), generator=torch.Generator().manual_seed(0))


# --- svfit ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [0, 1, 5])
@pytest.mark.parametrize("shape", [(12, 20), (20, 12)])
def test_svfit_trains_the_largest_singular_values(rank: int, shape: tuple[int, int]) -> None:
    weight, bias, x = gaussian(*shape), gaussian(shape[0], seed=1), gaussian(3, shape[1], seed=2)
    form = over(f"svfit:rank={rank}", weight, bias)
    kept = rank or 12
    with torch.no_grad():
        form.delta.copy_(gaussian(kept, seed=3))
    u, sigma, v = torch.linalg.svd(weight, full_matrices=False)
    sigma[:kept] += gaussian(kept, seed=3)
    torch.testing.assert_close(form(x), x @ (u * sigma @ v).T + bias, atol=1e-9, rtol=1e-9)
    assert [p.numel() for p in form.trainable()] == [kept]
    form(x).square().sum().backward()
    expected = torch.zeros(12, dtype=torch.float64, requires_grad=True)  # dL/d(sigma), by autograd
    (x @ (u * (sigma + expected) @ v).T + bias).square().sum().backward()
    torch.testing.assert_close(form.delta.grad, expected.grad[:kept], atol=1e-8, rtol=1e-8)


def test_svfit_over_codes_takes_the_decoded_weight_apart() -> None:
    weight, x = gaussian(16, 32).float(), gaussian(3, 32, seed=1).float()
    form = over("svfit:rank=4", weight, base="int4:group=16")
    with torch.no_grad():
        form.delta.fill_(1.0)
    u, _, v = torch.linalg.svd(form.base.dense(), full_matrices=False)
    expected = x @ (form.base.dense() + u[:, :4] @ v[:4]).T
    torch.testing.assert_close(form(x), expected, atol=1e-4, rtol=1e-4)


# --- compacter -----------------------------------------------------------------------------------


@pytest.mark.parametrize("n,rank", [(1, 1), (4, 1), (2, 3)])
def test_kronecker_products_are_not_formed_but_are_these(n: int, rank: int) -> None:
    k, d = 24, 12
    slow, s, t = gaussian(n, n, n), gaussian(n, k // n, rank, seed=1), gaussian(n, rank, d // n, seed=2)
    w_KD = sum(torch.kron(slow[i], s[i] @ t[i]) for i in range(n))
    x = gaussian(2, 3, k, seed=3)
    torch.testing.assert_close(kronecker(x, slow, s, t), x @ w_KD, atol=1e-10, rtol=1e-10)


def test_compacter_is_a_bottleneck_with_a_skip_connection() -> None:
    weight, bias, x = gaussian(16, 20), gaussian(16, seed=1), gaussian(5, 20, seed=2)
    form = over("compacter:n=4,bottleneck=8", weight, bias)
    assert (form(x) - x @ weight.T - bias).abs().max() < 1e-5
    with torch.no_grad():
        for i, p in enumerate(form.trainable()):
            p.copy_(gaussian(*p.shape, seed=i))
    down = sum(torch.kron(form.slow[i], form.down_s[i] @ form.down_t[i]) for i in range(4))
    up = sum(torch.kron(form.slow[i], form.up_s[i] @ form.up_t[i]) for i in range(4))
    h = x @ weight.T + bias
    inner = h @ down + form.down_b
    inner = 0.5 * inner * (1 + torch.tanh(math.sqrt(2 / math.pi) * (inner + 0.044715 * inner**3)))
    torch.testing.assert_close(form(x), h + inner @ up + form.up_b, atol=1e-9, rtol=1e-9)
    own = sum(p.numel() for p in form.trainable())
    assert own == 2 * (16 + 8) + (16 + 8) + 4**3


class Block(nn.Module):
    """Three sublayers with norms, sizes that differ."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.LayerNorm(16)
        self.o_proj, self.down_proj, self.up_proj = nn.Linear(16, 16), nn.Linear(32, 16), nn.Linear(16, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.o_proj(self.norm(x))
        return x + self.down_proj(F.silu(self.up_proj(x)))


def test_compacters_share_their_slow_matrices_and_train_the_norms() -> None:
    model = nn.Sequential(Block(), Block())
    picked = attach.target_modules(model, "compacter:bottleneck=8")
    assert picked == ["0.o_proj", "0.down_proj", "1.o_proj", "1.down_proj"]
    assert attach.target_modules(model, "compacter++:bottleneck=8") == ["0.down_proj", "1.down_proj"]
    assert len(attach.target_modules(model, "lora")) == 6
    made = attach.attach(model, dict.fromkeys(picked[1:], "compacter:bottleneck=8"))
    first = made["0.down_proj"].slow
    with torch.no_grad():
        first.fill_(0.5)
    made |= attach.attach(model, {picked[0]: "compacter:bottleneck=8"})  # later, but before it in the model
    assert all(form.slow is first for form in made.values()) and first[0, 0, 0] == 0.5
    listed = [p for form in made.values() for p in form.trainable()]
    assert len(listed) == len({id(p) for p in listed}) == 1 + 4 * 6 + 2 * 2
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in listed}
    model(torch.randn(3, 16)).square().sum().backward()
    assert model[0].norm.weight.grad is not None and first.grad is not None
    twin = copy.deepcopy(model)
    forms = attach.forms(twin)
    assert len({id(form.slow) for form in forms.values()}) == 1
    assert {id(p) for f in forms.values() for p in f.trainable()} == {
        id(p) for p in twin.parameters() if p.requires_grad
    }


def test_compacter_goes_into_the_sublayers_of_hugging_face_models() -> None:
    import transformers

    size = dict(vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    bert = transformers.BertModel(transformers.BertConfig(**size))
    assert attach.target_modules(bert, "compacter++") == ["encoder.layer.0.output.dense"]
    gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2))
    assert attach.target_modules(gpt2, "compacter") == ["transformer.h.0.attn.c_proj", "transformer.h.0.mlp.c_proj"]
    attach.attach(gpt2, dict.fromkeys(attach.target_modules(gpt2, "compacter"), "compacter:bottleneck=8"))
    norms = [n for n, p in gpt2.named_parameters() if p.requires_grad and "ln_" in n]
    assert len(norms) == 6
    with pytest.raises(UserError, match=r"down_proj.*name its layers"):
        attach.target_modules(nn.Sequential(nn.Linear(4, 4)), "compacter++")


# --- increlora -----------------------------------------------------------------------------------


def grown(choice: str = "increlora:rank=4", shape: tuple[int, int] = (12, 20), ranks: int = 2) -> IncreLora:
    form = over(choice, gaussian(*shape)).double()
    assert isinstance(form, IncreLora)
    form.grow(ranks - 1, 0)
    with torch.no_grad():
        form.E[:ranks] = gaussian(ranks, seed=4)
    return form


def test_increlora_is_its_equation_and_settles_into_lora() -> None:
    form, x = grown("increlora:rank=4,alpha=6"), gaussian(3, 20, seed=1)
    update = sum(form.E[i] * torch.outer(form.B[:, i], form.A[i]) for i in range(2)) * 6 / 4
    torch.testing.assert_close(form(x), x @ (form.base.dense() + update).T, atol=1e-10, rtol=1e-10)
    settled = form.eval().settled()
    assert isinstance(settled, Lora) and settled.config.rank == 2 and settled.base is form.base
    assert torch.equal(settled(x), form(x)) and settled.nbytes() < form.nbytes()
    assert registry.build("linear", settled.choice, form.shape, form.base).scaling == settled.scaling


def test_new_ranks_change_nothing_until_they_have_learnt() -> None:
    form, x = grown(), gaussian(3, 20, seed=1)
    before = form.eval()(x)
    form.grow(2, 5)
    assert form.rank == 4
    torch.testing.assert_close(form(x), before, atol=1e-13, rtol=1e-13)
    torch.testing.assert_close(form.train()(x), before, atol=1e-13, rtol=1e-13)  # nor do those learnt in advance


def test_sensitivity_is_that_of_the_whole_update() -> None:
    form, x, target = grown(), gaussian(2, 3, 20, seed=1), gaussian(2, 3, 12, seed=2)
    a_RI, b_OR, scaling = form.low_rank()
    update = (scaling * b_OR @ a_RI).detach().requires_grad_()
    (x @ (form.base.dense() + update).T - target).square().sum().backward()
    expected = (update * update.grad).abs().mean().detach()
    loss = (form.train()(x) - target).square().sum()
    loss.backward()
    assert form.score is not None
    torch.testing.assert_close(form.score.double(), expected, rtol=1e-5, atol=0)
    (form(x) - target).square().sum().backward()  # a second micro-batch adds to it
    torch.testing.assert_close(form.score.double(), 2 * expected, rtol=1e-5, atol=0)


def test_ranks_in_advance_learn_as_if_lambda_were_small() -> None:
    form, x = grown("increlora:rank=4,ahead=0.01"), gaussian(3, 20, seed=1)
    (form.train()(x) ** 2).sum().backward()
    y = form(x).detach()
    a, b = form.A.detach()[2:4].clone().requires_grad_(), form.B.detach()[:, 2:4].clone().requires_grad_()
    (2 * y * (form.scaling * 0.01 * x @ a.T @ b.T)).sum().backward()  # dL/dy = 2 y, held fixed
    torch.testing.assert_close(form.A.grad[2:4], a.grad, atol=1e-10, rtol=1e-8)
    torch.testing.assert_close(form.B.grad[:, 2:4], b.grad, atol=1e-10, rtol=1e-8)
    assert not form.A.grad[4:].any() and not form.E.grad[2:].any()


def test_a_matrix_with_all_its_ranks_goes_on_while_others_grow() -> None:
    form = grown("increlora:rank=2,max_rank=3", ranks=3)
    assert form.learning == form.rank == 3 and form.growing
    form.train()(gaussian(2, 20)).sum().backward()
    assert form.score is not None and form.A.grad.all()
    allocate([form], form.config, 50, 100)
    assert form.rank == 3 and not form.growing


def loop(forms: dict[str, IncreLora], steps_done: int) -> SimpleNamespace:
    """What a callback sees of a run of 100 steps."""
    named = {f"{name}.{key}": p for name, form in forms.items() for key, p in form.named_parameters()}
    return SimpleNamespace(named=named, steps_done=steps_done, config=SimpleNamespace(total_steps=100))


def test_the_regulariser_is_added_to_the_gradients() -> None:
    forms = {str(i): grown(shape=(12, 20 + i)) for i in range(2)}
    for form in forms.values():
        for p in form.trainable():
            p.grad = torch.zeros_like(p)
    Growth(forms).before_step(loop(forms, 0))
    for form in forms.values():
        a, b = (p.detach().clone().requires_grad_() for p in (form.A[:4], form.B[:, :4]))
        eye = torch.eye(4, dtype=torch.float64)
        (0.1 / 4 * ((a @ a.T - eye).square().sum() + (b.T @ b - eye).square().sum())).backward()
        torch.testing.assert_close(form.A.grad[:4], a.grad, atol=1e-12, rtol=1e-9)
        torch.testing.assert_close(form.B.grad[:, :4], b.grad, atol=1e-12, rtol=1e-9)
        assert not form.A.grad[4:].any()


def test_sensitivity_and_uncertainty_are_smoothed() -> None:
    form = grown("increlora:rank=4,beta1=0.5,beta2=0.8")
    for value in (1.0, 3.0, math.nan):
        form.observe(value)
    assert form.sensitivity == 0.5 * 0.5 + 0.5 * 3
    assert form.uncertainty == pytest.approx(0.8 * 0.2 * 0.5 + 0.2 * 1.25)


def test_the_budget_is_spent_by_its_end_on_those_that_score_highest() -> None:
    config = Config(rank=4, add=2, begin=0.1, interval=0.1, end=0.5)
    assert [planned(config, 10, step, 100) for step in (0, 9, 10, 19, 20, 50, 100)] == [10, 10, 16, 16, 22, 40, 40]
    assert planned(config, 10, 1, 3) == 10 + math.ceil(30 * 3 / 5) and planned(config, 10, 3, 3) == 40
    forms = [over("increlora:rank=4,add=2,begin=0.1,interval=0.1,end=0.5", gaussian(20, 20)) for _ in range(5)]
    for form, value in zip(forms, (1.0, 5.0, 2.0, 4.0, 3.0), strict=True):
        form.sensitivity = form.uncertainty = value
    allocate(forms, forms[0].config, 10, 100)  # 3 of the 15 ranks are due
    assert [form.rank for form in forms] == [1, 3, 1, 2, 1] and forms[1].grown[:4] == [0, 10, 10, 0]
    for step in range(11, 101):
        allocate(forms, forms[0].config, step, 100)
    assert sum(form.rank for form in forms) == 20 and forms[1].rank == max(form.rank for form in forms)
    assert not any(form.growing for form in forms)


@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_a_new_rank_has_a_warm_up_of_its_own(name: str) -> None:
    form, x = grown("increlora:rank=4,gamma=0,warmup=0.1"), gaussian(3, 20, seed=1)
    form.grow(1, 50)  # rank 2, at step 50; ranks 3 and 4 learn in advance
    assert form.born[:6] == [0, 0, 0, 0, 50, 0] and form.learning == 5
    optimizer = getattr(torch.optim, name)(form.trainable(), lr=0.1)
    before = {n: p.detach().clone() for n, p in form.named_parameters()}
    form.train()(x).square().sum().backward()
    whole: dict[str, torch.Tensor] = {}

    def step() -> None:
        optimizer.step()
        whole.update({n: p.detach().clone() for n, p in form.named_parameters()})

    training = loop({"f": form}, 52)  # the step that is made is the 53rd: 3 of 10 steps of the warm-up
    step_with_factors(step, training.named, Growth({"f": form}).step_factors(training))
    for key, rates in (("A", [1, 1, 1, 1, 0.3]), ("E", [1, 1, 0.3])):
        for i, rate in enumerate(rates):
            expected = before[key][i] + rate * (whole[key][i] - before[key][i])
            torch.testing.assert_close(getattr(form, key)[i].detach(), expected, atol=1e-9, rtol=1e-9)
    assert form.E[2] != before["E"][2] and torch.equal(form.B[:, 0], whole["B"][:, 0])


# --- mistakes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "choice,word",
    [
        ("svfit:rank=13", r"rank=13 is larger than the matrix 12 x 20; give rank <= 12"),
        ("increlora:rank=13", r"rank=13 is larger than the matrix 12 x 20"),
        ("increlora:rank=2,max_rank=13", "max_rank=13 is larger"),
        ("increlora:rank=4,max_rank=3", "max_rank"),
        ("increlora:begin=0.6", "begin=0.6"),
        ("increlora:interval=0", "interval"),
        ("increlora:rank=0", "rank"),
        ("compacter:n=5,bottleneck=20", r"n=5 does not divide the 12 outputs.*n=1, 2, 4"),
        ("compacter:n=5", r"n=5 must divide bottleneck=24"),
        ("compacter:rank=4", "rank=4 is larger"),
        ("compacter++:n=5,bottleneck=20", "does not divide"),
        ("svfit:rank=-1", "rank"),
    ],
)
def test_mistakes_are_told_in_one_line(choice: str, word: str) -> None:
    model = nn.Sequential(nn.Linear(20, 12))
    with pytest.raises(UserError, match=word) as caught:
        attach.attach(model, {"0": choice})
    assert "\n" not in str(caught.value) and type(model[0]) is nn.Linear


@pytest.mark.parametrize("choice", ["svfit", "increlora:rank=2", "compacter:bottleneck=8"])
def test_attached_twice_is_refused_and_detached_it_is_gone(choice: str) -> None:
    model = nn.Sequential(nn.Linear(16, 16))
    weight = model[0].weight
    attach.attach(model, {"0": choice})
    with pytest.raises(UserError, match="already"):
        attach.attach(model, {"0": choice})
    with pytest.raises(UserError, match="matches no linear layer"):
        attach.attach(model, {"1": choice})
    attach.detach(model)
    assert model[0].weight is weight and all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("choice", ["svfit:rank=2", "increlora:rank=2", "compacter:bottleneck=8"])
def test_they_stand_where_a_conv1d_stood(choice: str) -> None:
    from transformers.pytorch_utils import Conv1D

    model, x = nn.Sequential(Conv1D(16, 12)), torch.randn(3, 12)
    before = model(x).detach()
    form = attach.attach(model, {"0": choice})["0"]
    torch.testing.assert_close(model(x), before, atol=1e-5, rtol=1e-5)
    assert form.transposed and attach.settle(model)["0"].transposed
