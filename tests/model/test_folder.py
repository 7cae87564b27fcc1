"""Shapes, counts, folders and what goes wrong with them."""

import dataclasses
import json
import subprocess
import sys

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from modicum.core.errors import CorruptError, UserError
from modicum.model import attach
from modicum.model.cache import ContiguousCache
from modicum.model.config import DecoderConfig, by_layer, llama_like, sized
from modicum.model.decoder import Decoder
from modicum.model.folder import load_config, load_model, save_model
from modicum.model.generate import greedy


def tiny(**more) -> Decoder:
    return Decoder(llama_like(61, 64, 2, 4, 2, **more), torch.Generator().manual_seed(0))


@pytest.fixture
def folder(tmp_path):
    save_model(tiny(tied=False), tmp_path / "model")
    return tmp_path / "model"


def test_config_needs_no_torch():
    code = "import sys; from modicum.model.config import sized; sized(5e6, 8192); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("parameters, vocab", [(3e5, 512), (3e6, 4096), (1e7, 8192), (1.35e8, 49152), (1e9, 32000)])
def test_sized_is_near(parameters, vocab):
    config = sized(parameters, vocab)
    assert abs(config.parameters() / parameters - 1) < 0.12
    assert config.width % 64 == 0 and config.heads * config.head_dim == config.width
    if parameters < 2e7:
        assert sum(p.numel() for p in Decoder(config).parameters()) == config.parameters()


def test_sized_refuses_what_the_embedding_fills():
    with pytest.raises(UserError, match="smallest has"):
        sized(1e6, 128000)


def test_flops_are_those_of_the_matrix_products():
    """Against PyTorch's own counter, with attention counted in full (as it does), then causally by hand."""
    from torch.utils.flop_counter import FlopCounterMode

    # in which attention, where gradients are wanted, is made of products that the counter sees
    model, T = tiny().to(torch.bfloat16), 32
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, T, dtype=torch.long))
    config = model.config
    full = 2 * 2 * config.heads * config.head_dim * T * T * config.layers
    causal = full * (T + 1) / (2 * T)
    assert config.flops_per_token(T) * T == counter.get_total_flops() - full + causal


def test_windows_cost_less():
    base = llama_like(61, 64, 2, 4, 2)
    slid = dataclasses.replace(base, overrides=by_layer(window=(4, None)))
    keys = sum(min(i + 1, 4) for i in range(10)) / 10
    assert base.flops_per_token(10) - slid.flops_per_token(10) == pytest.approx(4 * 64 * (5.5 - keys))


def test_kv_bytes():
    config = llama_like(61, 64, 2, 4, 2)
    cache = ContiguousCache(config, 3, 7, dtype=torch.bfloat16)
    assert config.kv_bytes_per_token(torch.bfloat16) * 3 * 7 == sum(x.nbytes for x in cache.k + cache.v)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"kv_heads": 3}, "kv_heads=3 must divide heads=4"),
        ({"layers": 0}, "layers=0 must be at least 1"),
        ({"overrides": by_layer(window=(3,))}, "one per layer"),
        ({"activation": "sliu"}, "Did you mean 'silu'"),
        ({"norm_place": "mid"}, "unknown norm_place"),
    ],
)
def test_impossible_shapes_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(llama_like(61, 64, 2, 4, 2), **change)


def test_init_is_seeded_and_scaled():
    a, b = tiny(), tiny()
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    std = (2 / (5 * 64)) ** 0.5
    assert a.embed.weight.std().item() == pytest.approx(std, rel=0.05)
    assert a.layers[0].mlp.down.weight.std().item() == pytest.approx(std / 2, rel=0.05)
    with torch.no_grad():
        logits = a(torch.randint(0, 61, (4, 32), generator=torch.Generator().manual_seed(0)))
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.randint(0, 61, (128,)))
    assert abs(loss.item() - torch.tensor(61.0).log().item()) < 0.5


def test_checkpointed_layers_give_the_same_gradients():
    tokens = torch.randint(0, 61, (2, 16), generator=torch.Generator().manual_seed(0))
    documents = torch.arange(16).expand(2, -1) // 6
    grads = []
    for flag in (False, True):
        model = tiny().train()
        model.checkpoint_layers = flag
        model(tokens, documents_BT=documents).square().mean().backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_a_model_learns_in_bfloat16():
    model = tiny().to(torch.bfloat16).train()
    tokens = torch.randint(0, 61, (4, 33), generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(30):
        logits = model(tokens[:, :-1]).float()
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]


def test_shards_load_and_are_loaded(folder, tmp_path):
    model = load_model(folder)
    save_model(model, tmp_path / "sharded", max_shard_bytes=40_000)
    assert len(list((tmp_path / "sharded").glob("model-*.safetensors"))) > 3
    again = load_model(tmp_path / "sharded")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "sharded").eval()
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(again(tokens), model(tokens))
        assert (theirs(tokens).logits - model(tokens)).abs().max() < 1e-5
    theirs.save_pretrained(tmp_path / "back", max_shard_size="40KB")
    assert (tmp_path / "back" / "model.safetensors.index.json").exists()
    assert all(
        torch.equal(a, b) for a, b in zip(load_model(tmp_path / "back").parameters(), model.parameters(), strict=True)
    )


def test_dtypes_survive_or_are_converted(folder, tmp_path):
    model = load_model(folder, dtype="bf16")
    save_model(model, tmp_path / "half")
    with safe_open(tmp_path / "half" / "model.safetensors", "pt") as file:
        assert {file.get_tensor(n).dtype for n in file.keys()} == {torch.bfloat16}  # noqa: SIM118
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"
    assert load_model(tmp_path / "half").dtype == torch.bfloat16
    with pytest.raises(UserError, match="unknown dtype 'int3'"):
        load_model(folder, dtype="int3")


def test_saving_replaces_and_leaves_nothing_else(folder, tmp_path):
    save_model(tiny(), folder)
    assert load_config(folder).tied
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors"]


def test_a_failed_save_leaves_the_old_folder(folder, tmp_path):
    before = (folder / "model.safetensors").read_bytes()
    with pytest.raises(UserError, match="no tokenizer files"):
        save_model(tiny(), folder, tokenizer_folder=tmp_path / "nowhere")
    assert (folder / "model.safetensors").read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_tokenizer_files_go_along(folder, tmp_path):
    (tmp_path / "tok").mkdir()
    (tmp_path / "tok" / "tokenizer.json").write_text("{}")
    (tmp_path / "tok" / "unrelated.txt").write_text("x")
    save_model(tiny(), tmp_path / "new", tokenizer_folder=tmp_path / "tok")
    assert (tmp_path / "new" / "tokenizer.json").read_text() == "{}"
    assert not (tmp_path / "new" / "unrelated.txt").exists()


def test_a_changed_shape_is_written_as_changed(tmp_path):
    config = transformers.Qwen3Config(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
    )
    transformers.Qwen3ForCausalLM(config).save_pretrained(tmp_path / "three")
    model = load_model(tmp_path / "three")
    del model.layers[1]
    model.layers[1].attention.layer = 1
    model.config = dataclasses.replace(model.config, layers=2)
    save_model(model, tmp_path / "two")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "two").eval()
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        assert (theirs(tokens).logits - load_model(tmp_path / "two")(tokens)).abs().max() < 1e-5


def test_a_shape_its_family_cannot_say_is_refused(tmp_path):
    config = dataclasses.replace(llama_like(61, 64, 2, 4, 2), overrides=by_layer(window=(4, None)))
    with pytest.raises(UserError, match=r"llama config.json cannot say overrides"):
        save_model(Decoder(config), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "choices",
    [
        {"layers.*.mlp.*": "int8"},
        {"layers.0.attention.q": "lora:rank=2", "layers.1.*": "int4:group=32"},
        {"lm_head": "int8"},
    ],
)
@pytest.mark.parametrize("tied", [True, False])
def test_forms_are_stored_beside_and_restored(choices, tied, tmp_path):
    model = tiny(tied=tied).eval()
    attach.attach(model, choices, generator=torch.Generator().manual_seed(0))
    save_model(model, tmp_path / "forms")
    again = load_model(tmp_path / "forms")
    assert attach.forms(again).keys() == attach.forms(model).keys()
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(again(tokens), model(tokens))
    assert [p.requires_grad for p in again.parameters()] == [p.requires_grad for p in model.parameters()]


def test_a_form_inside_a_fused_weight_is_stored(tmp_path):
    config = transformers.Phi3Config(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        pad_token_id=0,
        max_position_embeddings=64,
    )
    transformers.Phi3ForCausalLM(config).save_pretrained(tmp_path / "phi")
    model = load_model(tmp_path / "phi")
    attach.attach(model, {"layers.*.attention.q": "int8"})
    save_model(model, tmp_path / "forms")
    with torch.no_grad():
        tokens = torch.arange(12)[None]
        assert torch.equal(load_model(tmp_path / "forms")(tokens), model(tokens))


def test_an_embedding_in_a_form(tmp_path):
    model = tiny().eval()
    attach.attach_embedding(model, "embed", "int8")
    save_model(model, tmp_path / "forms")
    again = load_model(tmp_path / "forms")
    with torch.no_grad():
        tokens = torch.arange(12)[None]
        assert torch.equal(again(tokens), model(tokens))
        assert torch.equal(greedy(again, tokens, 3, eos_ids=()), greedy(model, tokens, 3, eos_ids=()))


# What goes wrong ---------------------------------------------------------------------------------


def edit(folder, change):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


Q = "model.layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop(Q), f"lacks 1 weight.*{Q}"),
        (lambda t: t.update({"model.layers.9.mlp.gate_proj.weight": torch.zeros(2)}), "unexpected 1 weight.*layers.9"),
        (lambda t: t.update({Q: torch.zeros(3, 64)}), r"has shape \(3, 64\), config.json asks for \(64, 64\)"),
    ],
)
def test_weights_that_do_not_belong(folder, change, message):
    edit(folder, change)
    with pytest.raises(UserError, match=message):
        load_model(folder)


def test_a_second_head_in_a_tied_model(folder, tmp_path):
    save_model(tiny(tied=True), tmp_path / "tied")
    edit(tmp_path / "tied", lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    assert load_model(tmp_path / "tied").lm_head.weight is not None
    edit(tmp_path / "tied", lambda t: t.update({"lm_head.weight": t["lm_head.weight"] + 1}))
    with pytest.raises(UserError, match="tie_word_embeddings to false"):
        load_model(tmp_path / "tied")


@pytest.mark.parametrize("keep", [0, 5, 200, 100_000])
def test_a_cut_file_is_named(folder, keep):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CorruptError, match=r"model.safetensors.* (fetch or write it again)"):
        load_model(folder)


def test_a_missing_shard_is_named(folder, tmp_path):
    save_model(load_model(folder), tmp_path / "sharded", max_shard_bytes=40_000)
    next((tmp_path / "sharded").glob("model-00002*")).unlink()
    with pytest.raises(UserError, match=r"names model-00002.*1 of"):
        load_model(tmp_path / "sharded")


def test_an_index_cannot_point_outside(folder):
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../../etc/passwd"}}))
    with pytest.raises(UserError, match="not in"):
        load_model(folder)


def test_pickles_are_refused(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pickled weights.*convert them to model.safetensors"):
        load_model(folder)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model_type": "lama"}, "Did you mean 'llama'.*Allowed:.*qwen3"),
        ({"hidden_size": None}, "lacks 'hidden_size'"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantised weights"),
        ({"rope_parameters": {"rope_type": "dynamic"}}, "unknown RoPE scaling 'dynamic'"),
        ({"rope_parameters": {"rope_type": "linear"}}, "'linear' lacks 'factor'"),
        ({"hidden_act": "mish"}, "unknown hidden_act 'mish'"),
    ],
)
def test_configs_that_cannot_be_built(folder, change, message):
    path = folder / "config.json"
    written = json.loads(path.read_text()) | {"rope_scaling": None} | change
    path.write_text(json.dumps({k: v for k, v in written.items() if v is not None or k == "rope_scaling"}))
    with pytest.raises(UserError, match=message):
        load_model(folder)


def test_broken_json(folder):
    (folder / "config.json").write_text("{")
    with pytest.raises(CorruptError, match="not valid JSON"):
        load_model(folder)


def test_places_that_hold_no_model(tmp_path, folder, monkeypatch):
    with pytest.raises(UserError, match=r"no config.json"):
        load_model(tmp_path)
    with pytest.raises(UserError, match=r"no model at ./nowhere"):
        load_model("./nowhere")
    with pytest.raises(UserError, match="is a file"):
        load_model(folder / "config.json")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    with pytest.raises(UserError, match=r"no folder nobody/nothing, and the hub did not give it") as caught:
        load_model("nobody/nothing")
    assert "\n" not in str(caught.value)


def test_generation_limits():
    config = DecoderConfig(
        family="gpt2",
        vocab_size=61,
        width=32,
        layers=1,
        heads=2,
        kv_heads=2,
        head_dim=16,
        mlp_width=64,
        norm="layer",
        position="learned",
        gated=False,
        context_length=8,
    )
    with pytest.raises(UserError, match="exceed the model's 8 positions"):
        greedy(Decoder(config), torch.zeros(1, 6, dtype=torch.long), 4)
    with pytest.raises(UserError, match="padded on the left"):
        greedy(tiny(), torch.zeros(1, 3, dtype=torch.long), 2, mask_BT=torch.tensor([[1, 1, 0]]))
    cache = ContiguousCache(tiny().config, 1, 4)
    with pytest.raises(UserError, match="capacity=5"):
        tiny()(torch.zeros(1, 5, dtype=torch.long), attend=cache)


def test_rows_end_at_eos():
    model = tiny().eval()
    prompt = torch.arange(6)[None].repeat(2, 1)
    prompt[1] += 7
    free = greedy(model, prompt, 6, eos_ids=())
    eos = int(free[0, 7])
    ended = greedy(model, prompt, 6, eos_ids=(eos,), pad_id=60)
    first = free[0, 6:].tolist().index(eos) + 7
    assert ended[0, :first].tolist() == free[0, :first].tolist() and set(ended[0, first:].tolist()) <= {60}


@pytest.mark.slow
def test_loading_keeps_weights_in_memory_once(tmp_path):
    """Peak resident growth while loading a 400 MB file stays near its size, also when dtypes change."""
    save_model(Decoder(llama_like(32000, 1024, 5)), tmp_path / "big")
    size = (tmp_path / "big" / "model.safetensors").stat().st_size
    code = (
        "import sys, torch; from modicum.model.folder import load_model; from modicum.budget import "
        "meter; "
        "before = meter.resident_peak(); load_model(sys.argv[1], sys.argv[2] if sys.argv[2] != '-' else "
        "None); "
        "print(meter.resident_peak() - before)"
    )
    for dtype, share in (("-", 1.0), ("bf16", 0.5)):
        grown = int(
            subprocess.run(
                [sys.executable, "-c", code, str(tmp_path / "big"), dtype], check=True, capture_output=True, text=True
            ).stdout
        )
        assert grown < (share + 0.45) * size, f"{dtype}: {grown / size:.2f} of the file"
