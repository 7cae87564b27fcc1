"""Every family against transformers: logits, caches, padding, packing, files both ways."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from modicum.model.cache import ContiguousCache
from modicum.model.config import DecoderConfig
from modicum.model.families import families, read_config, write_config
from modicum.model.folder import load_config, load_model, save_model
from modicum.model.generate import greedy

V, T = 97, 24
LLAMA = dict(
    vocab_size=V,
    hidden_size=32,
    intermediate_size=56,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
GEMMA = LLAMA | dict(head_dim=12, query_pre_attn_scalar=20, sliding_window=6)
NEOX = {k: v for k, v in LLAMA.items() if k != "num_key_value_heads"}
GPT2 = dict(vocab_size=V, n_embd=32, n_layer=3, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2)
OPT = dict(
    vocab_size=V,
    hidden_size=32,
    ffn_dim=56,
    num_hidden_layers=3,
    num_attention_heads=4,
    max_position_embeddings=64,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
PARTIAL = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
WHOLE = PARTIAL | {"partial_rotary_factor": 1.0}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [1.5, 2.0, 3.0, 4.0],
}

CASES = {
    "llama": ("Llama", LLAMA),
    "llama-bias-tied": ("Llama", LLAMA | dict(attention_bias=True, mlp_bias=True, tie_word_embeddings=True)),
    "llama-llama3": ("Llama", LLAMA | dict(rope_parameters=LLAMA3)),
    "llama-linear": ("Llama", LLAMA | dict(rope_parameters=LINEAR)),
    "llama-yarn": ("Llama", LLAMA | dict(rope_parameters=YARN)),
    "mistral": ("Mistral", LLAMA | dict(sliding_window=7, head_dim=16)),
    "mistral-full": ("Mistral", LLAMA | dict(sliding_window=None)),
    "qwen2": ("Qwen2", LLAMA | dict(tie_word_embeddings=True)),
    "qwen2-sliding": ("Qwen2", LLAMA | dict(use_sliding_window=True, sliding_window=5, max_window_layers=1)),
    "qwen3": ("Qwen3", LLAMA | dict(head_dim=16)),
    "smollm3": ("SmolLM3", LLAMA | dict(no_rope_layer_interval=2)),
    "olmo2": ("Olmo2", LLAMA),
    "phi3": ("Phi3", LLAMA | dict(sliding_window=9)),
    "phi3-longrope-short": ("Phi3", LLAMA | dict(rope_parameters=LONG, original_max_position_embeddings=48)),
    "phi3-longrope-long": ("Phi3", LLAMA | dict(rope_parameters=LONG, original_max_position_embeddings=8)),
    "phi3-partial": ("Phi3", LLAMA | dict(rope_parameters=PARTIAL)),
    "gemma": ("Gemma", LLAMA | dict(head_dim=12)),
    "gemma2": ("Gemma2", GEMMA | dict(attn_logit_softcapping=3.0, final_logit_softcapping=2.0)),
    "gemma3": (
        "Gemma3Text",
        GEMMA
        | dict(
            num_hidden_layers=4,
            layer_types=["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
        ),
    ),
    "gpt2": ("GPT2", GPT2),
    "gpt2-by-layer": ("GPT2", GPT2 | dict(scale_attn_by_inverse_layer_idx=True, n_inner=40)),
    "gpt_neox": ("GPTNeoX", NEOX),
    "gpt_neox-serial": (
        "GPTNeoX",
        NEOX | dict(use_parallel_residual=False, tie_word_embeddings=True, rope_parameters=WHOLE),
    ),
    "opt": ("OPT", OPT),
    "opt-350m": ("OPT", OPT | dict(do_layer_norm_before=False, word_embed_proj_dim=16)),
}


def shake(model: torch.nn.Module) -> None:
    """Give biases and norms values too, so that a forgotten one shows."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 0.3 if parameter.dim() == 1 else 0.15
            parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)


@pytest.fixture(scope="module", params=CASES)
def pair(request, tmp_path_factory):
    """(transformers' model, ours, its folder)."""
    name, knobs = CASES[request.param]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**knobs)
    theirs = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    shake(theirs)
    folder = tmp_path_factory.mktemp(request.param)
    theirs.save_pretrained(folder)
    return theirs, load_model(folder), folder


def tokens(rows: int = 2, length: int = T, seed: int = 3) -> torch.Tensor:
    return torch.randint(3, V, (rows, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def test_logits_equal(pair):
    theirs, ours, _ = pair
    reference = theirs(tokens()).logits
    assert reference.std() > 0.05, "the reference must not be trivial"
    assert (ours(tokens()) - reference).abs().max() < 1e-4


@torch.no_grad()
def test_left_padding(pair):
    theirs, ours, _ = pair
    mask = torch.ones(2, T, dtype=torch.bool)
    mask[0, :9] = False
    positions = (mask.long().cumsum(1) - 1).clamp(min=0)
    reference = theirs(tokens(), attention_mask=mask.long(), position_ids=positions).logits
    assert (ours(tokens(), mask_BT=mask) - reference)[mask].abs().max() < 1e-4


@torch.no_grad()
def test_packed_documents_equal_separate_ones(pair):
    theirs, ours, _ = pair
    lengths = (5, 11, 8)
    documents = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))[None]
    packed = tokens(1)
    if "longrope" in str(ours.config.rope.kind):
        pytest.skip("longrope's frequencies depend on the longest document of the batch")
    logits = ours(packed, documents_BT=documents)
    start = 0
    for length in lengths:
        alone = theirs(packed[:, start : start + length]).logits
        assert (logits[:, start : start + length] - alone).abs().max() < 1e-4
        start += length


@torch.no_grad()
def test_cache_equals_one_pass(pair):
    """Prompt in two pieces, then token by token, with a left-padded row."""
    _, ours, _ = pair
    mask = torch.ones(2, T, dtype=torch.bool)
    mask[1, :4] = False
    whole = ours(tokens(), mask_BT=mask)
    rope = ours.config.rope
    if rope.kind == "longrope" and rope.options["original_max_position_embeddings"] < T:
        pytest.skip("longrope rotates cached keys anew when the context is outgrown: see the greedy test")
    cache = ContiguousCache(ours.config, 2, T, padding_B=(~mask).sum(1))
    spans = [(0, 7), (7, 15), *((i, i + 1) for i in range(15, T))]
    pieces = [ours(tokens()[:, a:b], attend=cache) for a, b in spans]
    assert (torch.cat(pieces, 1) - whole)[mask].abs().max() < 1e-4


@torch.no_grad()
def test_greedy_equals_generate(pair):
    theirs, ours, _ = pair
    prompt = tokens(2, 7)
    expected = theirs.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=9,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    assert torch.equal(greedy(ours, prompt, 9, eos_ids=()), expected)


@torch.no_grad()
def test_export_is_bit_identical(pair, tmp_path):
    theirs, ours, folder = pair
    save_model(ours, tmp_path / "out")
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype and torch.equal(tensor, after[name]), name
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager").eval()
    state = again.state_dict()
    assert state.keys() == theirs.state_dict().keys()
    assert all(torch.equal(value, state[name]) for name, value in theirs.state_dict().items())
    assert torch.equal(again(tokens()).logits, theirs(tokens()).logits)


@torch.no_grad()
def test_bfloat16_within_tolerance(pair):
    theirs, _, folder = pair
    exact = theirs(tokens()).logits
    ours = load_model(folder, dtype="bf16")
    assert {p.dtype for p in ours.parameters()} == {torch.bfloat16}
    half = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, attn_implementation="eager")
    reference_error = (half.eval()(tokens()).logits.float() - exact).abs().mean()
    error = (ours(tokens()).float() - exact).abs().mean()
    assert error < 1.5 * reference_error + 1e-3, f"{error=} {reference_error=}"


def test_parameter_count(pair):
    theirs, ours, _ = pair
    assert ours.config.parameters() == sum(p.numel() for p in ours.parameters())
    assert ours.config.parameters() == sum(p.numel() for p in theirs.parameters())


def test_config_written_from_its_fields_alone(pair, tmp_path):
    """Without the original config.json, what is written is read back the same, by us and by transformers."""
    theirs, ours, _ = pair
    bare = DecoderConfig(**{f: getattr(ours.config, f) for f in ours.config.__dataclass_fields__ if f != "source"})
    written = write_config(bare, "float32")
    assert read_config(json.loads(json.dumps(written))) == bare
    ours.config, kept = bare, ours.config
    try:
        save_model(ours, tmp_path / "bare")
    finally:
        ours.config = kept
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "bare", attn_implementation="eager").eval()
    with torch.no_grad():
        assert (again(tokens()).logits - theirs(tokens()).logits).abs().max() < 1e-5


def test_every_family_is_tested():
    tested = {getattr(transformers, f"{name}Config").model_type for name, _ in CASES.values()}
    assert {t for family in families().values() if family.rules for t in family.model_types} == tested


OLD_STYLE = {
    "llama3": (
        {"rope_theta": 500.0, "rope_scaling": {k: v for k, v in LLAMA3.items() if k != "rope_theta"}},
        "llama-llama3",
    ),
    "linear": ({"rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 2.0}}, "llama-linear"),
    "plain": ({"rope_theta": 1e4, "rope_scaling": None}, "llama"),
    "neox": ({"rotary_emb_base": 10000, "rotary_pct": 0.25}, "gpt_neox"),
    "gemma3": ({"rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": None}, "gemma3"),
    "phi3-su": (
        {
            "rope_theta": 1e4,
            "rope_scaling": {"type": "su", "short_factor": LONG["short_factor"], "long_factor": LONG["long_factor"]},
        },
        "phi3-longrope-short",
    ),
}


@pytest.mark.parametrize("style", OLD_STYLE)
def test_rope_notation_of_older_files(style):
    keys, case = OLD_STYLE[style]
    name, knobs = CASES[case]
    new = getattr(transformers, f"{name}Config")(**knobs).to_dict()
    old = {k: v for k, v in new.items() if k != "rope_parameters"} | keys
    ours, theirs = read_config(old), read_config(new)
    assert ours.rope.kind == theirs.rope.kind and ours.rope.theta == theirs.rope.theta
    assert ours.rope.fraction == theirs.rope.fraction and [x.rope.theta for x in ours.per_layer] == [
        x.rope.theta for x in theirs.per_layer
    ]
    assert {k: v for k, v in theirs.rope.options.items() if k in ours.rope.options} == ours.rope.options


def test_longrope_generation_across_the_switch(tmp_path):
    """A prompt inside the original context that outgrows it while generating."""
    torch.manual_seed(0)
    config = transformers.Phi3Config(**LLAMA, rope_parameters=dict(LONG), original_max_position_embeddings=12)
    theirs = transformers.AutoModelForCausalLM.from_config(config).eval()
    shake(theirs)
    theirs.save_pretrained(tmp_path)
    prompt = tokens(1, 8)
    expected = theirs.generate(prompt, max_new_tokens=12, do_sample=False, eos_token_id=None)
    assert torch.equal(greedy(load_model(tmp_path), prompt, 12, eos_ids=()), expected)


def test_names_without_prefix_and_masks(tmp_path):
    """openai-community/gpt2 stores names without `transformer.` and the causal masks as tensors."""
    from safetensors.torch import save_file

    torch.manual_seed(0)
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2)).eval()
    theirs.save_pretrained(tmp_path)
    path = Path(tmp_path) / "model.safetensors"
    stored = {k.removeprefix("transformer."): v for k, v in load_file(path).items()}
    stored["h.0.attn.bias"] = torch.ones(1, 1, 64, 64)
    save_file(stored, path, {"format": "pt"})
    with torch.no_grad():
        assert (load_model(tmp_path)(tokens()) - theirs(tokens()).logits).abs().max() < 1e-4
    assert load_config(tmp_path).family == "gpt2"
