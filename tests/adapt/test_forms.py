"""svfit, compacter and increlora through adaptation: resume, model folders, PEFT's format, forecasts."""

import json
from pathlib import Path

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

from modicum.adapt.peft_format import load_peft, save_peft
from modicum.adapt.run import adapt
from modicum.adapt.spec import AdaptSpec
from modicum.budget import Deadline
from modicum.budget.trace import Live
from modicum.core.errors import UserError
from modicum.data.stream import Batch
from modicum.data.tokenizer import Tokenizer
from modicum.model import attach
from modicum.model.config import llama_like
from modicum.model.decoder import Decoder
from modicum.model.folder import load_model, save_model
from modicum.train.config import TrainConfig
from modicum.train.engine import TrainEngine
from modicum.train.forecast import blank, step_cost
from modicum.train.objectives import Step

PAIRS = [(f"what is {a} plus {b}?", f"{a} plus {b} is {a + b}") for a in range(8) for b in range(8)]
TOKENS = torch.arange(3, 19).view(1, 16)
GROWS = "increlora:rank=3,max_rank=6,begin=0.1,interval=0.1,end=0.7,warmup=0.3,gamma=0.01"
FORMS = {
    "increlora": GROWS,
    "svfit": "svfit:rank=8",
    "compacter": "compacter:bottleneck=8",
    "compacter++": "compacter++:bottleneck=8",
}
QUICK = dict(lr=2e-2, steps=10, sequence_length=48, batch_sequences=2, micro_batch=1, limit=40)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a tiny random model (`model`) and pairs (`pairs.jsonl`)."""
    root = tmp_path_factory.mktemp("adapt")
    tokenizer = Tokenizer.train([f"{q} {a}" for q, a in PAIRS], 400)
    tokenizer.save(root / "tokenizer")
    config = llama_like(tokenizer.vocab_size, 32, 1, 2, context_length=64)
    save_model(Decoder(config, torch.Generator().manual_seed(0)), root / "model", root / "tokenizer")
    (root / "pairs.jsonl").write_text("\n".join(json.dumps({"question": q, "answer": a}) for q, a in PAIRS))
    return root


def run(place: Path, out: Path, **knobs):
    more = {k: knobs.pop(k) for k in ("deadline",) if k in knobs}
    return adapt(place / "model", place / "pairs.jsonl", AdaptSpec(**(QUICK | knobs)), out, **more)


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        out = model.eval()(TOKENS)
    return getattr(out, "logits", out)


class AfterPolls(Deadline):
    """A deadline that passes when it has been looked at `n` times."""

    def __init__(self, n: int):
        super().__init__(None)
        self.n = n

    @property
    def passed(self) -> bool:
        self.n -= 1
        return self.n < 0


def files(folder: Path) -> dict[str, torch.Tensor]:
    found = {
        f"{path.name}:{name}": t
        for path in sorted(folder.rglob("*.safetensors"))
        for name, t in load_file(path).items()
    }
    assert found
    return found


@pytest.mark.parametrize(
    "name,dtype",
    [
        ("increlora", "float32"),
        ("increlora", "bfloat16"),
        ("svfit", "bfloat16"),
        ("compacter", "float32"),
        ("compacter", "bfloat16"),
    ],
)
def test_stopped_half_way_it_goes_on_bit_for_bit(place: Path, tmp_path: Path, name: str, dtype: str) -> None:
    knobs = {"dtype": dtype, "form": FORMS[name]}
    whole = run(place, tmp_path / "whole", **knobs)
    stopped = run(place, tmp_path / "parts", **knobs, deadline=AfterPolls(5))
    assert stopped.steps == 5
    state = json.loads((tmp_path / "parts/checkpoints/step-00000005/state.json").read_text())["parts"]["forms"]
    if name == "increlora":  # ranks have grown, some are warming up, some are still to come
        ranks = [layout["rank"] for layout in state["layouts"].values()]
        assert max(ranks) > 1 and sum(ranks) < 3 * len(ranks) and all(la["growing"] for la in state["layouts"].values())
        assert any(5 - la["grown"][la["rank"] - 1] < 3 for la in state["layouts"].values())
    resumed = run(place, tmp_path / "parts", **knobs)
    assert resumed.resumed_from == 5 and (resumed.heldout_after, resumed.loss) == (whole.heldout_after, whole.loss)
    assert whole.heldout_after < whole.heldout_before
    left, right = (tmp_path / run / "checkpoints/step-00000010" for run in ("whole", "parts"))
    first, second = files(left), files(right)
    assert first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)
    layouts = [json.loads((side / "state.json").read_text())["parts"]["forms"] for side in (left, right)]
    assert layouts[0] == layouts[1]
    kept = "model" if whole.adapter is None else "adapter"
    first, second = files(tmp_path / "whole" / kept), files(tmp_path / "parts" / kept)
    assert all(torch.equal(first[k], second[k]) for k in first)


def test_under_bf16_the_masters_warm_up(place: Path, tmp_path: Path) -> None:
    """New ranks with a warm-up over the whole run go less far than those without: the change outlives the step."""
    lambdas = []
    for warmup in (0, 1):
        form = f"increlora:rank=3,max_rank=6,begin=0.4,interval=1,end=0.4,warmup={warmup}"
        run(place, tmp_path / str(warmup), form=form)
        saved = load_file(tmp_path / str(warmup) / "checkpoints/step-00000010/model.safetensors")
        lambdas.append(torch.stack([t[1:] for n, t in saved.items() if n.endswith(".E")]).abs())
    new = lambdas[0] != 0
    assert new.any() and lambdas[1][new].norm() < 0.7 * lambdas[0][new].norm()


@pytest.mark.parametrize("name", ["compacter", "compacter++"])
def test_adapted_folder_is_the_trained_model(place: Path, tmp_path: Path, name: str) -> None:
    result = run(place, tmp_path / "out", form=FORMS[name], dtype="float32", lr=5e-2)
    assert result.adapter is None
    model = load_model(result.model)
    names = ["layers.0.mlp.down"] if name == "compacter++" else ["layers.0.attention.o", "layers.0.mlp.down"]
    assert list(attach.forms(model)) == names
    assert len({id(form.slow) for form in attach.forms(model).values()}) == 1
    before, after = load_file(place / "model/model.safetensors"), load_file(f"{result.model}/model.safetensors")
    changed = {n for n in after if not torch.equal(before[n], after[n])}
    assert changed == {n for n in after if "norm" in n} and changed
    slow = [n for n in load_file(f"{result.model}/modicum.safetensors") if n.endswith("slow")]
    assert slow == [f"{names[0]}.slow"]  # stored once
    assert (logits(model) - logits(load_model(place / "model"))).abs().max() > 1e-2
    trained = load_file(tmp_path / "out/checkpoints/step-00000010/model.safetensors")
    state = model.state_dict()
    assert all(torch.equal(state[n], t) for n, t in trained.items())
    with pytest.raises(UserError, match="cannot be combined with merge=true"):
        run(place, tmp_path / "merged", form=FORMS[name], merge=True)


@pytest.mark.parametrize("name", [*FORMS])
def test_a_model_folder_gives_equal_logits(place: Path, tmp_path: Path, name: str) -> None:
    model = load_model(place / "model", dtype=torch.float32)
    attach.attach(model, {"layers.*": "int8"})
    made = attach.attach(model, dict.fromkeys(attach.target_modules(model, FORMS[name]), FORMS[name]))
    with torch.no_grad():
        for form in made.values():
            if name == "increlora":
                form.grow(2, 3)
            for p in form.trainable():
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)) * 0.2)
    expected = logits(model)
    save_model(model, tmp_path / "out")
    again = load_model(tmp_path / "out")
    assert torch.equal(logits(again), expected)
    assert {n for n, p in again.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }
    stored = sum(t.nbytes for t in load_file(tmp_path / "out/modicum.safetensors").values())
    shared = (len(made) - 1) * 4 * 64 if name.startswith("compacter") else 0  # in nbytes() of every form
    assert sum(form.nbytes() for form in attach.forms(model).values()) - shared == stored
    attach.settle(again)
    assert torch.equal(logits(again), expected)


@pytest.mark.parametrize("name", ["increlora", "svfit"])
def test_peft_loads_them_as_lora(tmp_path: Path, name: str) -> None:
    config = transformers.Phi3Config(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        pad_token_id=0,
    )
    transformers.Phi3ForCausalLM(config).save_pretrained(tmp_path / "model")
    ours = load_model(tmp_path / "model", dtype=torch.float32)
    made = attach.attach(ours, {"layers.*": FORMS[name]})
    with torch.no_grad():
        for i, form in enumerate(made.values()):
            if name == "increlora":
                form.grow(i % 4, 3)  # ranks 1 to 4, parts of fused modules among them
            for p in form.trainable():
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
    expected = logits(ours)
    save_peft(ours, tmp_path / "adapter", base_model=str(tmp_path / "model"))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", attn_implementation="eager")
    plain = logits(theirs)
    with_adapter = logits(peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter"))
    torch.testing.assert_close(with_adapter, expected, atol=1e-4, rtol=1e-4)
    assert (expected - plain).abs().max() > 0.1
    again = load_model(tmp_path / "model", dtype=torch.float32)
    load_peft(again, tmp_path / "adapter")
    torch.testing.assert_close(logits(again), expected, atol=1e-4, rtol=1e-4)


def test_over_a_quantised_base_increlora_is_saved_as_lora(place: Path, tmp_path: Path) -> None:
    result = run(place, tmp_path / "out", base="int4:group=32", form=FORMS["increlora"], dtype="float32")
    model = load_model(result.model)
    forms = attach.forms(model)
    assert {form.choice.method for form in forms.values()} == {"lora"}
    assert {form.base.choice.method for form in forms.values()} == {"int4"}
    ranks = [form.config.rank for form in forms.values()]
    assert sum(ranks) == 3 * len(ranks) and len(set(ranks)) > 1
    other = load_model(place / "model")
    attach.attach(other, {"layers.*": "int4:group=32"})
    load_peft(other, result.adapter)
    torch.testing.assert_close(logits(other), logits(model), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("choice", ["increlora:rank=16,begin=0", "svfit", "compacter", "compacter++"])
def test_forecasts_of_training_memory(choice: str) -> None:
    """Peak of live bytes of real steps against `step_cost`, within the promised 15%."""
    shape = llama_like(512, 64, 1, context_length=128)
    config = TrainConfig(steps=10, sequence_length=128, batch_sequences=8, optimizer="adamw:weight_decay=0")

    def adapted(model: Decoder) -> Decoder:
        attach.attach(model, dict.fromkeys(attach.target_modules(model, choice), choice))
        return model

    def work() -> None:
        engine = TrainEngine(adapted(Decoder(shape)), config)
        engine.build()
        tokens_BT = torch.zeros((8, 128), dtype=torch.int64)
        batch = Batch(tokens_BT, tokens_BT.clone(), None, torch.arange(128).expand(8, 128))
        for index in range(3):
            engine.optimizer.begin({"lr": 1.0})
            engine.gradients(batch, 1024, Step(index, 0, 10, 0))
            engine.before_step()
            engine.norm()
            engine.update({"lr": 1.0}, 0.5)
            engine.steps_done += 1
            for part in engine.parts.values():
                part.after_step(engine)

    planned = step_cost(lambda: adapted(blank(shape)), config, 512).peak_bytes
    with Live() as live:
        work()
    assert live.peak == pytest.approx(planned, rel=0.15)
