"""Attaching forms by pattern, composing, merging, describing and restoring them."""

import copy
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from modicum.core.errors import CorruptError, UserError
from modicum.model import attach, form_state
from modicum.model.linear.dense import Dense
from modicum.model.linear.int4 import Int4
from modicum.model.linear.lora import Lora


class Tiny(nn.Module):
    """Two layers of q, v and down below an embedding with a tied head."""

    def __init__(self, seed: int = 0):
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(50, 32)
        self.layers = nn.ModuleList(
            nn.ModuleDict(
                {
                    "attention": nn.ModuleDict({"q": nn.Linear(32, 32), "v": nn.Linear(32, 32, bias=False)}),
                    "mlp": nn.ModuleDict({"down": nn.Linear(32, 32)}),
                }
            )
            for _ in range(2)
        )
        self.lm_head = nn.Linear(32, 50, bias=False)
        self.lm_head.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = x + layer["attention"]["v"](torch.tanh(layer["attention"]["q"](x)))
            x = x + layer["mlp"]["down"](torch.tanh(x))
        return self.lm_head(x)


TOKENS = torch.arange(20).view(2, 10)


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(TOKENS)


def nudge(model: nn.Module) -> None:
    """Something an adapter could have learned."""
    with torch.no_grad():
        for i, form in enumerate(attach.forms(model).values()):
            for parameter in form.trainable():
                parameter.normal_(0, 0.1, generator=torch.Generator().manual_seed(i))


def test_patterns_choose_layers_and_adapters_freeze_the_rest() -> None:
    model = Tiny()
    before = logits(model)
    made = attach.attach(model, {"layers.*.attention.*": "lora:rank=2", "layers.1.mlp.down": "lora:rank=3"})
    assert sorted(made) == [
        "layers.0.attention.q",
        "layers.0.attention.v",
        "layers.1.attention.q",
        "layers.1.attention.v",
        "layers.1.mlp.down",
    ]
    assert made["layers.1.mlp.down"].A.shape == (3, 32)
    assert {n.rsplit(".", 1)[-1] for n, p in model.named_parameters() if p.requires_grad} == {"A", "B"}
    assert torch.equal(logits(model), before)


def test_the_base_is_shared_not_copied() -> None:
    model = Tiny()
    weight = model.layers[0]["attention"]["q"].weight
    attach.attach(model, {"*.q": "lora"})
    assert model.layers[0]["attention"]["q"].base.weight is weight
    attach.detach(model)
    assert model.layers[0]["attention"]["q"].weight is weight


@pytest.mark.parametrize(
    "pattern,hint",
    [
        ("q", "'*.q'"),
        ("layers.*.attn.*", "layers.*.attention.q"),
        ("*.q_proj", "layers.*.attention.q"),
        ("embed", "Linear layers here"),
    ],
)
def test_a_pattern_that_matches_nothing_names_near_ones(pattern: str, hint: str) -> None:
    with pytest.raises(UserError) as caught:
        attach.attach(Tiny(), {pattern: "lora"})
    assert pattern in str(caught.value) and hint in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("first,second", [("lora", "lora"), ("int4", "int4"), ("int8", "int4"), ("lora", "int8")])
def test_a_second_form_is_refused_and_nothing_changes(first: str, second: str) -> None:
    model = Tiny()
    attach.attach(model, {"*.q": first})
    before = [type(m) for m in model.modules()]
    with pytest.raises(UserError, match=r"layers\.0\.attention\.q.*already"):
        attach.attach(model, {"layers.*": second})
    assert [type(m) for m in model.modules()] == before


def test_overlapping_patterns_are_refused() -> None:
    with pytest.raises(UserError, match="exclude each other"):
        attach.attach(Tiny(), {"layers.*": "int8", "*.q": "int4"})


def test_rank_larger_than_the_matrix() -> None:
    with pytest.raises(UserError, match=r"layers\.0\.attention\.q.*rank=33.*32 x 32"):
        attach.attach(Tiny(), {"*.q": "lora:rank=33"})


def test_weights_that_are_not_finite_are_refused() -> None:
    model = Tiny()
    with torch.no_grad():
        model.layers[0]["attention"]["v"].weight[0, 0] = float("nan")
    with pytest.raises(UserError, match=r"layers\.0\.attention\.v.*NaN"):
        attach.attach(model, {"layers.*": "int8"})
    assert not attach.forms(model)


def test_a_bare_layer_cannot_be_replaced() -> None:
    with pytest.raises(UserError, match="Sequential"):
        attach.attach(nn.Linear(4, 4), {"*": "int8"})


def test_lora_over_int4_detaches_to_int4_and_merges_to_dense() -> None:
    model = Tiny()
    attach.attach(model, {"layers.*": "int4:group=16"})
    quantised = logits(model)
    attach.attach(model, {"*.q": "lora:rank=4"})
    assert torch.equal(logits(model), quantised)
    nudge(model)
    adapted = logits(model)
    assert not torch.equal(adapted, quantised)

    detached = copy.deepcopy(model)
    attach.detach(detached)
    assert isinstance(detached.layers[0]["attention"]["q"], Int4)
    assert torch.equal(logits(detached), quantised)

    dense = {name: form.dense().detach().clone() for name, form in attach.forms(model).items()}
    changed = attach.merge(model)
    assert sorted(changed) == sorted(dense) and not attach.forms(model)
    for name, weight in dense.items():
        assert torch.equal(model.get_submodule(name).weight, weight)
    torch.testing.assert_close(logits(model), adapted, atol=1e-5, rtol=1e-5)
    assert all(p.requires_grad for p in model.parameters())


def test_conv1d_of_transformers() -> None:
    from transformers.pytorch_utils import Conv1D

    model = nn.Sequential(Conv1D(6, 10))
    x = torch.randn(3, 10)
    before = model(x).detach()
    attach.attach(model, {"0": "lora:rank=2"})
    torch.testing.assert_close(model(x), before)
    nudge(model)
    adapted = model(x).detach()
    attach.merge(model)
    assert isinstance(model[0], nn.Linear)
    torch.testing.assert_close(model(x), adapted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("choice", ["int8", "int4:group=16"])
def test_tied_embedding_and_head_share_one_form(choice: str) -> None:
    model = Tiny()
    form = attach.attach_embedding(model, "embed", choice)
    assert model.lm_head is form and model.embed.form is form
    table = form.dense()
    assert torch.equal(model.embed(TOKENS), table[TOKENS])
    state = form_state.form_state(model)
    assert sum(t.nbytes for t in state.values()) == form.nbytes()

    other = Tiny(seed=1)
    for target, source in zip(other.layers.parameters(), model.layers.parameters(), strict=True):
        target.data.copy_(source.data)
    form_state.restore(other, json.loads(json.dumps(form_state.describe(model))))
    form_state.load_form_state(other, state)
    assert other.lm_head is other.embed.form
    assert torch.equal(logits(other), logits(model))

    expected = logits(model)
    attach.merge(model)
    assert type(model.embed) is nn.Embedding and model.embed.weight is model.lm_head.weight
    torch.testing.assert_close(logits(model), expected)


def test_embedding_refuses_adapters_and_other_modules() -> None:
    with pytest.raises(UserError, match="cannot hold an embedding"):
        attach.attach_embedding(Tiny(), "embed", "lora")
    with pytest.raises(UserError, match="embeddings here: embed"):
        attach.attach_embedding(Tiny(), "lm_head", "int8")


def plain_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """The tensors outside forms."""
    inside = {id(t) for form in attach.forms(model).values() for t in form.state_dict(keep_vars=True).values()}
    return {n: t.detach() for n, t in model.state_dict(keep_vars=True).items() if id(t) not in inside}


def stored(model: nn.Module, folder: Path) -> dict[str, torch.Tensor]:
    (folder / "modicum.json").write_text(json.dumps(form_state.describe(model)))
    save_file(form_state.form_state(model), folder / "forms.safetensors")
    save_file({n: t.clone() for n, t in plain_state(model).items()}, folder / "plain.safetensors")
    return load_file(folder / "forms.safetensors")


def test_files_round_trip_and_are_as_large_as_nbytes(tmp_path: Path) -> None:
    model = Tiny()
    attach.attach(model, {"layers.*": "int4:group=16"})
    attach.attach(model, {"*.q": "lora:rank=4"})
    nudge(model)
    stored(model, tmp_path)
    claimed = sum(form.nbytes() for form in attach.forms(model).values())
    header = 8 + int.from_bytes((tmp_path / "forms.safetensors").read_bytes()[:8], "little")
    assert (tmp_path / "forms.safetensors").stat().st_size - header == claimed

    other = Tiny(seed=5)
    form_state.restore(other, json.loads((tmp_path / "modicum.json").read_text()))
    form_state.load_form_state(other, load_file(tmp_path / "forms.safetensors"))
    other.load_state_dict(load_file(tmp_path / "plain.safetensors"), strict=False)
    assert torch.equal(logits(other), logits(model))
    grad = {n for n, p in other.named_parameters() if p.requires_grad}
    assert grad == {n for n, p in model.named_parameters() if p.requires_grad} and len(grad) == 4
    assert isinstance(other.layers[0]["attention"]["q"], Lora)
    assert isinstance(other.layers[0]["attention"]["q"].base, Int4)


def test_descriptions_that_do_not_fit_are_corrupt() -> None:
    model = Tiny()
    attach.attach(model, {"*.q": "int8"})
    good = json.loads(json.dumps(form_state.describe(model)))
    tensors = form_state.form_state(model)

    def broken(change) -> dict:
        description = copy.deepcopy(good)
        change(description)
        return description

    for change in (
        lambda d: d.update(version=99),
        lambda d: d["forms"].update({"layers.7.q": d["forms"]["layers.0.attention.q"]}),
        lambda d: d["forms"]["layers.0.attention.q"].update({"in": 16}),
        lambda d: d["forms"]["layers.0.attention.q"].pop("out"),
    ):
        with pytest.raises(CorruptError):
            form_state.restore(Tiny(), broken(change))
    other = Tiny()
    form_state.restore(other, good)
    name = "layers.0.attention.q.codes"
    for bad in (
        {k: v for k, v in tensors.items() if k != name},
        tensors | {"more": torch.zeros(1)},
        tensors | {name: tensors[name][:4]},
        tensors | {name: tensors[name].float()},
    ):
        with pytest.raises(CorruptError):
            form_state.load_form_state(other, bad)


def test_dense_form_trains_only_the_chosen_layers() -> None:
    model = Tiny()
    attach.attach(model, {"*.down": "dense"})
    assert len(attach.freeze(model)) == 4
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        f"layers.{i}.mlp.down.{k}" for i in (0, 1) for k in ("weight", "bias")
    }
    attach.detach(model)
    assert isinstance(model.layers[0]["mlp"]["down"], nn.Linear)
    assert not isinstance(model.layers[0]["mlp"]["down"], Dense)


PLUGIN = '''
    """gatedtoy: a bottleneck adapter whose factor all layers share, and which closes as training goes on."""
    from dataclasses import dataclass
    import torch
    from torch import nn
    from modicum.core.callback import Callback
    from modicum.model.linear._adapter import Adapter

    @dataclass(frozen=True, kw_only=True)
    class Config:
        width: int = 4

    class Close(Callback):
        def __init__(self, forms):
            self.forms = forms
        def after_step(self, trainer):
            for form in self.forms.values():
                form.gate = 1 - trainer.steps_done / trainer.config.total_steps

    class GatedToy(Adapter):
        provides = frozenset({"adapter", "fit", "trainable"})
        def __init__(self, config, shape, base):
            super().__init__(config, shape, base)
            self.down = nn.Parameter(self._empty(config.width, shape.in_features))
            self.up = nn.Parameter(self._empty(shape.out_features, config.width))
            self.gate = 1.0
        def take(self, weight_OI, calibration_NI, generator):
            nn.init.normal_(self.down, generator=generator)
            nn.init.zeros_(self.up)
        def forward(self, x):
            return self.base(x) + self.gate * torch.relu(x @ self.down.T) @ self.up.T
        def trainable(self):
            return [self.down, self.up]
        def layout(self):
            return {"gate": self.gate}
        def set_layout(self, layout):
            self.gate = layout["gate"]
        @classmethod
        def after_attach(cls, model, forms):
            first = next(iter(forms.values()))
            for form in forms.values():
                form.down = first.down
        @classmethod
        def callback(cls, forms):
            return Close(forms)
'''


@pytest.fixture
def plugin(install_plugin) -> None:
    install_plugin("modicum.methods:linear/gatedtoy", "gatedtoy_plugin", PLUGIN)


def test_a_form_may_share_change_and_refuse_to_merge(plugin: None) -> None:
    model = Tiny()
    before = logits(model)
    attach.attach(model, {"layers.*.mlp.*": "gatedtoy:width=3", "*.q": "lora:rank=2"})
    assert torch.equal(logits(model), before)
    nudge(model)
    first, second = (model.layers[i]["mlp"]["down"] for i in (0, 1))
    assert first.down is second.down
    loop = SimpleNamespace(steps_done=1, config=SimpleNamespace(total_steps=4))
    attach.callbacks(model)["linear.gatedtoy"].after_step(loop)
    assert first.gate == second.gate == 0.75
    state = form_state.form_state(model)
    assert "layers.0.mlp.down.down" in state and "layers.1.mlp.down.down" not in state

    other = Tiny(seed=3)
    other.load_state_dict(plain_state(model), strict=False)
    form_state.restore(other, json.loads(json.dumps(form_state.describe(model))))
    form_state.load_form_state(other, state)
    assert other.layers[0]["mlp"]["down"].down is other.layers[1]["mlp"]["down"].down
    assert torch.equal(logits(other), logits(model))
    with pytest.raises(UserError, match="not linear"):
        attach.merge(model)
    attach.detach(model)
    assert torch.equal(logits(model), before)
