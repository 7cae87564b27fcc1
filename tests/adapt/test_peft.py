"""Adapters in PEFT format: peft loads ours and we load peft's, with equal logits."""

import json
import shutil
from pathlib import Path

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from modicum.adapt.peft_format import load_peft, save_peft
from modicum.core.errors import CorruptError, UserError
from modicum.model import attach
from modicum.model.decoder import Decoder
from modicum.model.folder import load_model

V = 61
LLAMA = dict(
    vocab_size=V,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    pad_token_id=0,
    bos_token_id=1,
)
NEOX = {k: v for k, v in LLAMA.items() if k != "num_key_value_heads"}
GPT2 = dict(vocab_size=V, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2)
# family: configuration, our targets, peft's targets for the same layers
FAMILIES = {
    "Llama": (
        LLAMA,
        ["layers.*.attention.*", "layers.*.mlp.down"],
        ["q_proj", "k_proj", "v_proj", "o_proj", "down_proj"],
    ),
    "Qwen3": (LLAMA | dict(head_dim=16, tie_word_embeddings=True), ["*.q", "*.v"], ["q_proj", "v_proj"]),
    "GPT2": (GPT2, ["layers.*"], ["c_attn", "c_proj", "c_fc"]),
    "Phi3": (LLAMA, ["layers.*"], ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]),
    "GPTNeoX": (NEOX, ["layers.*.attention.*"], ["query_key_value", "dense"]),
}
TOKENS = torch.randint(3, V, (2, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module", params=FAMILIES)
def model_folder(request, tmp_path_factory) -> tuple[str, Path]:
    torch.manual_seed(0)
    config = getattr(transformers, f"{request.param}Config")(**FAMILIES[request.param][0])
    theirs = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    folder = tmp_path_factory.mktemp(request.param)
    theirs.save_pretrained(folder)
    return request.param, folder


def theirs_with(folder: Path, adapter: Path) -> torch.Tensor:
    base = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    with torch.no_grad():
        return peft.PeftModel.from_pretrained(base, adapter).eval()(TOKENS).logits


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        out = model.eval()(TOKENS)
    return getattr(out, "logits", out)


def learn(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for form in attach.forms(model).values():
            for parameter in form.trainable():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)


@pytest.mark.parametrize("choice", ["lora:rank=4,alpha=8", "lora:rank=3,alpha=2,rslora=true"])
def test_peft_loads_ours(model_folder, tmp_path: Path, choice: str) -> None:
    family, folder = model_folder
    ours = load_model(folder, dtype=torch.float32)
    plain = logits(ours)
    attach.attach(ours, dict.fromkeys(FAMILIES[family][1], choice))
    learn(ours)
    adapted = logits(ours)
    assert (adapted - plain).abs().max() > 0.1  # an adapter that does nothing would pass for any
    save_peft(ours, tmp_path / "adapter", base_model=str(folder))
    torch.testing.assert_close(theirs_with(folder, tmp_path / "adapter"), adapted, atol=1e-5, rtol=1e-5)

    again = load_model(folder, dtype=torch.float32)  # and so do we
    load_peft(again, tmp_path / "adapter")
    torch.testing.assert_close(logits(again), adapted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("more", [{}, {"use_rslora": True, "lora_alpha": 5}])
def test_we_load_pefts(model_folder, tmp_path: Path, more: dict) -> None:
    family, folder = model_folder
    base = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    targets = FAMILIES[family][2]
    config = peft.LoraConfig(
        **(
            {
                "r": 4,
                "lora_alpha": 9,
                "target_modules": targets,
                "lora_dropout": 0.1,
                "task_type": "CAUSAL_LM",
                "rank_pattern": {targets[0]: 2},
                "alpha_pattern": {targets[-1]: 3},
            }
            | more
        )
    )
    theirs = peft.get_peft_model(base, config).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.2)
        expected = theirs(TOKENS).logits
    theirs.save_pretrained(tmp_path / "adapter")
    ours = load_model(folder, dtype=torch.float32)
    made = load_peft(ours, tmp_path / "adapter")
    torch.testing.assert_close(logits(ours), expected, atol=1e-5, rtol=1e-5)
    assert all(form.config.dropout == 0.1 for form in made.values())
    assert {id(p) for p in ours.parameters() if p.requires_grad} == {
        id(p) for form in made.values() for p in form.trainable()
    }


def test_any_transformers_model_takes_and_gives_adapters(model_folder, tmp_path: Path) -> None:
    _, folder = model_folder
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    before = logits(model)
    names = [name for name in attach.linears(model) if name != "lm_head" and "embed_out" not in name]
    attach.attach(model, dict.fromkeys(names, "lora:rank=2"))
    torch.testing.assert_close(logits(model), before)
    learn(model)
    save_peft(model, tmp_path / "adapter")
    torch.testing.assert_close(theirs_with(folder, tmp_path / "adapter"), logits(model), atol=1e-5, rtol=1e-5)
    again = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    load_peft(again, tmp_path / "adapter")
    torch.testing.assert_close(logits(again), logits(model), atol=1e-5, rtol=1e-5)


def test_different_ranks_and_scales_survive(tmp_path: Path) -> None:
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA))
    theirs.save_pretrained(tmp_path / "model")
    ours = load_model(tmp_path / "model", dtype=torch.float32)
    attach.attach(ours, {"layers.*.attention.*": "lora:rank=2,alpha=3", "layers.1.mlp.down": "lora:rank=5,alpha=7"})
    learn(ours)
    save_peft(ours, tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["r"] == 2 and list(config["rank_pattern"].values()) == [5]
    torch.testing.assert_close(
        theirs_with(tmp_path / "model", tmp_path / "adapter"), logits(ours), atol=1e-5, rtol=1e-5
    )


def test_adapter_over_a_quantised_base_is_saved_alone(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(**LLAMA)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    ours = load_model(tmp_path / "model", dtype=torch.float32)
    attach.attach(ours, {"layers.*": "int4:group=16"})
    attach.attach(ours, {"*.q": "lora:rank=2"})
    learn(ours)
    save_peft(ours, tmp_path / "adapter")
    other = load_model(tmp_path / "model", dtype=torch.float32)
    attach.attach(other, {"layers.*": "int4:group=16"})
    load_peft(other, tmp_path / "adapter")
    assert torch.equal(logits(other), logits(ours))


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Decoder, Path]:
    """A fresh model, and the folder of an adapter that fits it."""
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA)).save_pretrained(tmp_path / "model")
    model = load_model(tmp_path / "model", dtype=torch.float32)
    attach.attach(model, {"*.q": "lora:rank=2"})
    save_peft(model, tmp_path / "adapter")
    attach.detach(model)
    return model, tmp_path / "adapter"


@pytest.mark.parametrize(
    "change,error,word",
    [
        ({"use_dora": True}, UserError, "use_dora"),
        ({"bias": "all"}, UserError, "bias"),
        ({"modules_to_save": ["lm_head"]}, UserError, "modules_to_save"),
        ({"peft_type": "IA3"}, UserError, "IA3"),
        ({"alpha_pattern": {"(": 1}}, CorruptError, "pattern"),
        ({"lora_alpha": None}, CorruptError, "adapter_config"),
    ],
)
def test_what_plain_lora_cannot_say_is_refused(saved, change: dict, error: type, word: str) -> None:
    model, folder = saved
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(error, match=word):
        load_peft(model, folder)


def test_broken_adapters_are_refused(saved) -> None:
    model, folder = saved
    weights = folder / "adapter_model.safetensors"
    good = load_file(weights)
    name = next(n for n in good if "lora_A" in n)
    for bad, error, word in (
        ({k.replace("layers.1", "layers.9"): v for k, v in good.items()}, UserError, "layers.9"),
        ({k: v for k, v in good.items() if k != name}, CorruptError, "belong"),
        (good | {name: torch.zeros(2, 16)}, UserError, "32 x 16"),
        ({k.replace("lora_A", "magnitude"): v for k, v in good.items()}, UserError, "magnitude"),
    ):
        save_file(bad, weights)
        with pytest.raises(error, match=word):
            load_peft(model, folder)
    weights.write_bytes(b"\x10\0\0\0\0\0\0\0 not json")
    with pytest.raises(CorruptError):
        load_peft(model, folder)
    weights.unlink()
    (folder / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(UserError, match="pickle"):
        load_peft(model, folder)
    shutil.rmtree(folder)
    with pytest.raises(UserError, match="adapter_config"):
        load_peft(model, folder)
    assert not attach.forms(model)


def test_a_model_without_adapter_has_nothing_to_save(saved, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no adapter"):
        save_peft(saved[0], tmp_path / "x")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("choice", ["lora:rank=20,alpha=8", "lora:rank=20,rslora=true"])
def test_parts_of_a_fused_module_come_back_at_their_own_rank(tmp_path: Path, choice: str) -> None:
    config = transformers.Phi3Config(**(LLAMA | dict(num_key_value_heads=4)))
    transformers.Phi3ForCausalLM(config).save_pretrained(tmp_path / "model")
    ours = load_model(tmp_path / "model", dtype=torch.float32)
    attach.attach(ours, {"*.q": choice, "*.v": choice})
    learn(ours)
    save_peft(ours, tmp_path / "adapter")
    again = load_model(tmp_path / "model", dtype=torch.float32)
    made = load_peft(again, tmp_path / "adapter")  # 40 ranks in peft's one module, more than 32 columns
    assert {name: form.config.rank for name, form in made.items()} == {
        f"layers.{i}.attention.{part}": 20 for i in (0, 1) for part in "qv"
    }
    torch.testing.assert_close(logits(again), logits(ours), atol=1e-5, rtol=1e-5)
