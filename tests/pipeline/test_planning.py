"""What a plan measures with: the miniature, traces of deep models, and what is kept between plans."""

from pathlib import Path

import pytest
import torch

from modicum.core.errors import UserError
from modicum.data.stream import Batch
from modicum.model.config import llama_like
from modicum.model.decoder import Decoder
from modicum.pipeline import costs, training
from modicum.pipeline.measured import Memo
from modicum.pipeline.recipe import parse
from modicum.pipeline.rehearse import miniature
from modicum.pipeline.stage import Input
from modicum.train.callback import split_state
from modicum.train.config import TrainConfig


def test_knobs_for_a_real_model_do_not_reach_the_miniature(tmp_path):
    recipe = parse(
        {"fallback": {"adapt.model": None}},
        [
            "pretrain.optimizer=galore:rank=128",
            "pretrain.form=sltrain:rank=512",
            "adapt.model=smollm2",
            "adapt.form=lora:rank=256",
            "compress.forms=[int4:group=256]",
            "ground.encoder=minilm",
            "predict=null",
        ],
    )
    small, _ = miniature(recipe, tmp_path)
    pretrain, adapt, ground = (small.section(name) for name in ("pretrain", "adapt", "ground"))
    assert pretrain.optimizer is None and pretrain.form is None and "predict" not in {e.key for e in small.entries}
    assert adapt.model is None and adapt.form == "lora:rank=4"
    assert ground.encoder not in (None, "minilm") and small.fallback is None


@pytest.mark.parametrize("masked", [False, True])
def test_a_deep_model_is_traced_by_shallow_ones(masked):
    shape = llama_like(400, 32, 12)
    config = TrainConfig(steps=2, sequence_length=32, batch_sequences=2, dtype="float32")

    def measure(s):
        return costs.traced_step(lambda: costs.blank(s), config, s, masked=masked)

    whole, guessed = measure(shape), costs.by_layers(shape, measure)
    assert guessed["trainable"] == whole["trainable"] == shape.parameters()
    assert guessed["flops"] == pytest.approx(whole["flops"], rel=0.01)
    assert guessed["peak_bytes"] == pytest.approx(whole["peak_bytes"], rel=0.02)


def test_a_model_without_values_has_the_weights_of_its_dtype():
    model = costs.blank_in(llama_like(400, 32, 2), torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16} and torch.get_default_dtype() == torch.float32


def test_what_was_measured_is_kept_and_a_broken_file_only_costs_a_measurement(tmp_path):
    path = tmp_path / "cache" / "measured.json"
    assert Memo(path).once(("trace", 1), lambda: {"peak_bytes": 7}) == {"peak_bytes": 7}
    assert Memo(path).once(("trace", 1), lambda: 1 / 0) == {"peak_bytes": 7}
    path.write_text("{")
    assert Memo(path).once(("trace", 1), lambda: {"peak_bytes": 8}) == {"peak_bytes": 8}
    (tmp_path / "file").write_text("")
    assert Memo(tmp_path / "file" / "no.json").once("x", lambda: 3) == 3  # nowhere to keep it


@pytest.mark.parametrize("optimizer", ["adamw", "adamw-8bit", "galore:rank=4"])
@pytest.mark.parametrize("form", [None, "sltrain:rank=4"])
def test_a_checkpoint_is_as_large_as_the_optimizer_says(tmp_path, optimizer, form):
    from modicum.train.engine import TrainEngine

    shape = llama_like(400, 32, 2)
    config = TrainConfig(
        steps=2, sequence_length=32, batch_sequences=2, dtype="bfloat16", optimizer=optimizer, form=form
    )
    engine = TrainEngine(Decoder(shape), config)
    engine.build()
    tokens = torch.zeros((2, 32), dtype=torch.int64)
    costs.train_step(engine, Batch(tokens, tokens, None, torch.arange(32).expand(2, 32)), 0)
    saved = {
        **engine.saved_tensors(),
        **{f"o.{k}": v for k, v in split_state(dict(engine.optimizer.state_dict()))[0].items()},
    }
    bytes_saved = sum(t.numel() * t.element_size() for t in saved.values())
    assert costs.checkpoint_bytes(shape, config) == pytest.approx(bytes_saved, rel=0.03)


def test_a_rank_for_the_real_model_is_no_reason_to_refuse_a_plan():
    """The planner tries small shapes first, and proxies are smaller still: those that the rank is too large for are
    left out."""
    from modicum.pipeline.plan import Planner
    from modicum.pipeline.stages import predict, pretrain

    section = pretrain.Section(optimizer="galore:rank=128", time=1e9, batch_tokens=256, sequence_length=64)
    planner = Planner(parse({}), {}, Path("none"))
    planner.once = lambda key, measure: 1e-3  # type: ignore[method-assign]
    shapes, _ = pretrain._candidates(section, Input("curate", section, {"vocab_size": 400}), None)
    assert not costs.fits(shapes[0], training.train_config(section, shapes[0], 1e5, 0))
    chosen, _ = pretrain._choose(planner, section, shapes[:5], 1e9)
    assert chosen.width == 256
    assert predict._smaller(section, chosen, 0.1, 400).width >= 128
    too_large = section.model_copy(update={"optimizer": "galore:rank=4096"})
    with pytest.raises(UserError, match="4096"):
        planner.once = lambda key, measure: measure()  # type: ignore[method-assign]
        pretrain._choose(planner, too_large, shapes[:2], 1e9)
