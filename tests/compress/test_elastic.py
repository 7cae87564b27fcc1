"""Models in blocks: what lies where in the file, loading to a size, growing and shrinking, the measured order."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from modicum.compress import calibration
from modicum.compress.run import compress
from modicum.compress.stacking import cut, sort_blocks
from modicum.core.errors import CorruptError, UserError
from modicum.data.tokenizer import Tokenizer
from modicum.model import attach, elastic
from modicum.model.config import llama_like
from modicum.model.decoder import Decoder
from modicum.model.folder import load_model, save_model
from modicum.model.safetensor import SafetensorsFile

FORM = "bitstack:rank=2,blocks=4"
TEXT = "the quick brown fox jumps over the lazy dog and some text to be had with it "
TOKENS = torch.arange(3, 35).view(2, 16)


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("stack")
    tokenizer = Tokenizer.train([TEXT], 300)
    tokenizer.save(root / "tokenizer")
    shape = llama_like(tokenizer.vocab_size, 64, 2, 4, kv_heads=2, tied=True, context_length=64)
    save_model(Decoder(shape, torch.Generator().manual_seed(0)).to(torch.bfloat16), root / "model", root / "tokenizer")
    (root / "text").mkdir()
    (root / "text" / "a.txt").write_text("".join(f"{TEXT} number {i} of {i * i}\n" for i in range(200)))
    return root


@pytest.fixture(scope="module")
def stacked(plain: Path) -> Path:
    compress(plain / "model", FORM, plain / "out", calibration=plain / "text", sequences=2, length=32)
    return plain / "out"


def held(model: Decoder) -> dict[str, int]:
    return {name: form.loaded for name, form in elastic.elastic_forms(model).items()}


def output(model: Decoder) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS)


def test_the_file_holds_the_blocks_in_the_measured_order(stacked: Path) -> None:
    model = load_model(stacked)
    order = [f"{name}.block_{i}" for name, i in elastic.ranking(elastic.elastic_forms(model))]
    with SafetensorsFile(stacked / elastic.BLOCKS_FILE) as file:
        assert file.names == order and len(order) == 14 * 4
        begins = [file._entries[name]["data_offsets"][0] for name in order]
        assert begins == sorted(begins)
    assert all(name.endswith("block_0") for name in order[:14])  # always there
    levels = [int(name[-1]) for name in order]
    assert levels == sorted(levels)
    by_level = [[name[:-1] for name, at in zip(order, levels, strict=True) if at == level] for level in range(4)]
    assert by_level[1] != by_level[0] and sorted(by_level[1]) == sorted(by_level[0])  # the loss decided


def test_any_size_is_a_prefix_and_never_more_than_asked(stacked: Path, plain: Path) -> None:
    full = load_model(stacked)
    everything = elastic.nbytes(full)
    found = elastic.elastic_forms(full)
    least = everything - sum((f.loaded - 1) * f.block_nbytes(0) for f in found.values())
    before: dict[str, int] = {}
    errors = []
    reference = output(load_model(plain / "model")).float()
    for share in (0, 0.1, 0.35, 0.6, 0.99, 1):
        size = least + share * (everything - least)
        model = load_model(stacked, size=size)
        assert size - max(f.block_nbytes(0) for f in found.values()) < elastic.nbytes(model) <= size
        now = held(model)
        assert all(now[name] >= n for name, n in before.items())
        before = now
        errors.append((output(model).float() - reference).norm().item())
    assert errors[-1] == min(errors) and torch.equal(output(load_model(stacked, size="1GiB")), output(full))
    assert torch.equal(output(model), output(full))


def test_grown_and_shrunk_it_is_what_is_loaded_at_that_size_and_reads_no_more(stacked: Path) -> None:
    whole = elastic.nbytes(load_model(stacked))
    sizes = {share: whole * share for share in (0.75, 0.85, 0.95)}
    fresh = {share: load_model(stacked, size=size) for share, size in sizes.items()}
    model = load_model(stacked, size=sizes[0.75])
    embed = model.embed.weight
    grown = elastic.resize(model, stacked, sizes[0.95])
    assert grown.read_bytes == elastic.nbytes(fresh[0.95]) - elastic.nbytes(fresh[0.75]) and grown.dropped_bytes == 0
    assert torch.equal(output(model), output(fresh[0.95])) and model.embed.weight is embed
    shrunk = elastic.resize(model, stacked, sizes[0.85])
    assert shrunk.read_bytes == 0 and shrunk.dropped_bytes == grown.bytes - shrunk.bytes > 0
    assert torch.equal(output(model), output(fresh[0.85])) and held(model) == held(fresh[0.85])
    assert shrunk.blocks == sum(held(model).values()) < shrunk.available == 56
    assert elastic.resize(model, stacked, sizes[0.85]).read_bytes == 0


def test_the_order_is_that_of_the_measured_losses(plain: Path) -> None:
    model = load_model(plain / "model", dtype="float32")
    attach.attach(model, {"layers.0.*": "bitstack:rank=2,blocks=3"})
    found = elastic.elastic_forms(model)
    tokens = calibration.sequences(calibration.texts(plain / "text"), Tokenizer.load(plain / "model"), 2, 24)
    whole = {name: form.dense() for name, form in found.items()}
    ordered = sort_blocks(model, found, tokens)
    assert all(torch.equal(form.dense(), whole[name]) for name, form in found.items())
    for name, level, loss in ordered[7:]:  # naively: every layer cut to the level, this one more
        for other, form in found.items():
            form.partial_sum = sum(form.block_weight(i) for i in range(level + (other == name)))
        logits = model(tokens)[:, :-1].double().log_softmax(-1)
        naive = -logits.gather(-1, tokens[:, 1:, None]).mean().item()
        assert loss == pytest.approx(naive, abs=1e-5)
    for level in (1, 2):
        mine = [loss for _, at, loss in ordered if at == level]
        assert len(mine) == 7 and mine == sorted(mine)


def test_calibration_sees_what_the_layers_see(plain: Path) -> None:
    model = load_model(plain / "model", dtype="float32")
    tokens = calibration.sequences([TEXT * 9], Tokenizer.load(plain / "model"), 3, 20)
    names = list(attach.match(model, ["layers.*"]))
    seen = calibration.activations(model, tokens, names)
    assert seen.keys() == set(names) and seen["layers.0.attention.q"] is seen["layers.0.attention.k"]
    with torch.no_grad():
        normed = model.layers[0].attention_norm(model.embed(tokens)).flatten(0, 1)
    torch.testing.assert_close(seen["layers.0.attention.q"], normed)
    few = calibration.activations(model, tokens, names, rows=10)
    assert 10 <= len(few[names[0]]) <= 12 and torch.equal(few[names[0]][0], seen[names[0]][0])
    with pytest.raises(UserError, match="give more text"):
        calibration.sequences(["short"], Tokenizer.load(plain / "model"), 3, 50)


def test_saved_again_and_under_an_adapter(stacked: Path, tmp_path: Path) -> None:
    size = 0.9 * elastic.nbytes(load_model(stacked))
    model = load_model(stacked, size=size)
    save_model(model, tmp_path / "again", stacked)
    again = load_model(tmp_path / "again")
    assert held(again) == held(model) and torch.equal(output(again), output(model))
    smaller = elastic.nbytes(model) * 0.97
    assert held(load_model(tmp_path / "again", size=smaller)) == held(load_model(stacked, size=smaller))
    attach.attach(model, {"layers.0.attention.q": "lora:rank=2"})
    save_model(model, tmp_path / "adapted", stacked)
    adapted = load_model(tmp_path / "adapted")
    assert torch.equal(output(adapted), output(model)) and sum(held(adapted).values()) == sum(held(model).values())
    assert "layers.0.attention.q.base" in held(adapted)


def test_bits_embeddings_and_the_figures(plain: Path, tmp_path: Path) -> None:
    text = {"calibration": plain / "text", "sequences": 2, "length": 32}
    result = compress(
        plain / "model", FORM + ",bits=5", tmp_path / "five", embeddings="bitstack:rank=2,blocks=3", **text
    )
    model = load_model(tmp_path / "five")
    layers = {name: form for name, form in elastic.elastic_forms(model).items() if name != "embed.form"}
    weights = sum(f.in_features * f.out_features for f in layers.values())
    assert 4.5 < 8 * sum(f.loaded * f.block_nbytes(0) for f in layers.values()) / weights <= 5
    assert elastic.elastic_forms(model)["embed.form"].loaded == 3 and model.lm_head is model.embed.form
    lost = norm = 0.0
    source = load_model(plain / "model")
    for name, form in elastic.elastic_forms(model).items():
        weight = source.get_submodule(name.removesuffix(".form")).weight.float()
        lost, norm = lost + (form.dense().float() - weight).square().sum(), norm + weight.square().sum()
    assert result.error == pytest.approx((lost / norm).sqrt().item(), rel=0.02)
    assert result.least_bytes < elastic.nbytes(model) < result.bytes < result.original_bytes


def test_mistakes_and_damage(stacked: Path, plain: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"measured on text.*--calibration"):
        compress(plain / "model", FORM, tmp_path / "out")
    with pytest.raises(UserError, match=r"in blocks already.*--size"):
        compress(stacked, FORM, tmp_path / "out", calibration=plain / "text")
    with pytest.raises(UserError, match=r"too small.*one block of each layer"):
        load_model(stacked, size="1KiB")
    with pytest.raises(UserError, match=r"one size only.*--form bitstack"):
        load_model(plain / "model", size="1MiB")
    with pytest.raises(UserError, match="write a size"):
        load_model(stacked, size="3 parsecs")
    shutil.copytree(stacked, tmp_path / "broken")
    model = load_model(tmp_path / "broken", size=0.8 * elastic.nbytes(load_model(stacked)))
    before, path = held(model), tmp_path / "broken" / elastic.BLOCKS_FILE
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(CorruptError, match="cut or damaged"):
        elastic.resize(model, tmp_path / "broken")
    assert held(model) == before and output(model).isfinite().all()
    path.unlink()
    with pytest.raises(CorruptError, match="lacks"):
        load_model(tmp_path / "broken")


def test_verbs(stacked: Path, plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    from modicum.cli.compress import compress as verb

    size = int(0.9 * elastic.nbytes(load_model(stacked)))
    verb(str(stacked), tmp_path / "small", size=f"{size}b", as_json=True)
    assert json.loads(capsys.readouterr().out)["bytes"] <= size
    assert held(load_model(tmp_path / "small")) == held(load_model(stacked, size=size))
    cut(stacked, size, tmp_path / "same")
    assert (tmp_path / "same" / elastic.BLOCKS_FILE).read_bytes() == (
        tmp_path / "small" / elastic.BLOCKS_FILE
    ).read_bytes()
    verb(
        str(plain / "model"),
        tmp_path / "one",
        form="bitstack:rank=2,blocks=2",
        targets="layers.0.*",
        calibration=str(plain / "text"),
        sequences=1,
        length=16,
    )
    assert "loads at any size from" in capsys.readouterr().out
    with pytest.raises(UserError, match="another folder"):
        cut(stacked, size, stacked)


PLUGIN = """
    \"\"\"halves: eight bits per weight, then what they miss in sixteen.\"\"\"
    from dataclasses import dataclass
    import torch
    import torch.nn.functional as F
    from modicum.model.linear._elastic import Elastic

    @dataclass(frozen=True, kw_only=True)
    class Config:
        pass

    class Halves(Elastic):
        provides = frozenset({"adapter_base", "elastic", "fit", "merge"})
        fit_error = 1e-3

        def __init__(self, config, shape):
            super().__init__(config, shape)
            self.set_layout({"blocks": 2})

        def block_nbytes(self, i):
            entries = self.in_features * self.out_features
            return 2 * entries if i else entries + 4 * self.out_features

        def take(self, weight_OI, calibration_NI, generator):
            scale_O1 = weight_OI.float().abs().amax(1, keepdim=True) / 127
            codes_OI = (weight_OI.float() / scale_O1).round().to(torch.int8)
            self.block_0.copy_(torch.cat([codes_OI.view(torch.uint8).flatten(), scale_O1.view(torch.uint8).flatten()]))
            left_OI = (weight_OI.float() - self.block_weight(0)).half()
            self.block_1.copy_(left_OI.view(torch.uint8).flatten())

        def block_weight(self, i):
            shape = (self.out_features, self.in_features)
            if i:
                return self.block_1.view(torch.float16).view(shape).float()
            codes, scale = self.block_0[: shape[0] * shape[1]], self.block_0[shape[0] * shape[1] :].clone()
            return codes.view(torch.int8).view(shape).float() * scale.view(torch.float32)[:, None]

        def dense(self):
            held = sum(self.block_weight(i) for i in range(self.loaded))
            return (held if self.partial_sum is None else self.partial_sum).to(self.dtype)

        def forward(self, x):
            return F.linear(x, self.dense().to(x.dtype), self.bias)
"""


@pytest.fixture
def halves(install_plugin) -> None:
    """Another any-size form, of blocks of unequal size, as another distribution would install it."""
    install_plugin("modicum.methods:linear/halves", "halves_plugin", PLUGIN)


def test_a_second_elastic_method_needs_nothing_but_its_file(halves: None, plain: Path, tmp_path: Path) -> None:
    from modicum.model.linear._conformance import check_any_number_of_blocks_is_a_weight, check_state_round_trip

    check_any_number_of_blocks_is_a_weight("halves")
    check_state_round_trip("halves")
    made = compress(plain / "model", "halves", tmp_path / "out", calibration=plain / "text", sequences=2, length=32)
    whole = load_model(tmp_path / "out")
    everything = elastic.nbytes(whole)
    assert made.least_bytes < everything and set(held(whole).values()) == {2}
    sizes = {f: f * everything for f in (0.95, 0.7)}
    for f, size in sizes.items():
        model = load_model(tmp_path / "out", size=size)
        biggest = max(form.block_nbytes(1) for form in elastic.elastic_forms(model).values())
        assert size - biggest < elastic.nbytes(model) <= size and 1 in held(model).values(), f
    grown = elastic.resize(model, tmp_path / "out")
    assert torch.equal(output(model), output(whole)) and grown.read_bytes == everything - elastic.nbytes(
        load_model(tmp_path / "out", size=sizes[0.7])
    )
    with pytest.raises(UserError, match="too small"):
        load_model(tmp_path / "out", size=made.least_bytes - 1)
