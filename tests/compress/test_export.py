"""Export: what is stored how, the tokenizer's metadata, and llama.cpp computing the same as this package."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from modicum.cli.export import export
from modicum.core.errors import UserError
from modicum.data.gguf_vocabulary import vocabulary
from modicum.data.tokenizer import Tokenizer
from modicum.model.attach import attach, merge
from modicum.model.config import llama_like
from modicum.model.decoder import Decoder
from modicum.model.families import read_config
from modicum.model.folder import load_model, save_model
from modicum.model.generate import greedy
from modicum.model.gguf.write import Types, write

V = 320
LLAMA: dict[str, Any] = dict(
    model_type="llama", vocab_size=V, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=128, bos_token_id=1, eos_token_id=2, tie_word_embeddings=False,
)  # fmt: skip
GEMMA = LLAMA | dict(head_dim=24, query_pre_attn_scalar=24, sliding_window=6, tie_word_embeddings=True)
LLAMA3 = dict(rope_type="llama3", rope_theta=500.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=32)  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "llama-bias-tied": LLAMA | dict(attention_bias=True, mlp_bias=True, tie_word_embeddings=True, head_dim=32),
    "llama-llama3": LLAMA | dict(rope_parameters=LLAMA3),
    "llama-linear": LLAMA | dict(rope_parameters=dict(rope_type="linear", rope_theta=1e4, factor=2.0)),
    "llama-yarn": LLAMA
    | dict(rope_parameters=dict(rope_type="yarn", rope_theta=1e4, factor=4.0, original_max_position_embeddings=32)),
    "mistral": LLAMA | dict(model_type="mistral", sliding_window=None),
    "qwen2": LLAMA | dict(model_type="qwen2", tie_word_embeddings=True),
    "qwen3": LLAMA | dict(model_type="qwen3", head_dim=32),
    "smollm3": LLAMA | dict(model_type="smollm3", num_hidden_layers=4),
    "olmo2": LLAMA | dict(model_type="olmo2", tie_word_embeddings=True),
    "phi3": LLAMA | dict(model_type="phi3", sliding_window=None),
    "phi3-partial": LLAMA
    | dict(model_type="phi3", rope_parameters=dict(rope_type="default", rope_theta=1e4, partial_rotary_factor=0.5)),
    "gemma": GEMMA | dict(model_type="gemma"),
    "gemma2": GEMMA | dict(model_type="gemma2", attn_logit_softcapping=3.0, final_logit_softcapping=2.0),
    "gemma3": GEMMA | dict(model_type="gemma3_text", num_hidden_layers=7, rope_theta=1e5),
    "gpt2": dict(model_type="gpt2", vocab_size=V, n_embd=64, n_layer=2, n_head=4, n_positions=128, n_inner=96),
    "gpt_neox": LLAMA | dict(model_type="gpt_neox", hidden_act="gelu_new", rotary_pct=0.5),
    "gpt_neox-serial": LLAMA | dict(model_type="gpt_neox", hidden_act="gelu_new", use_parallel_residual=False),
}
VARIED = (
    "Plain words, it's we'll DON'T; 3.14 12345 1,000,000\t\ttabs\n\n\n   indented\r\n  def f(x):\n\treturn x**2  \n",
    "Ça va? naïve Straße дом عربى हिन्दी 漢字かな交じり文 🙂👍🏽 ½ ² Ⅷ £€ …—“quotes”  trailing   ",
    "\n1\n\n2 !!?? ---  a-b_c/d\\e {json: [1, 2]} <tag attr='x'/> http://example.org/?q=1&r=2",
)
llama_cpp = pytest.mark.skipif(importlib.util.find_spec("llama_cpp") is None, reason="llama-cpp-python not installed")


def decoder(hf: dict[str, Any]) -> Decoder:
    """A small model with values in its biases and norms too, so that a forgotten one shows."""
    generator = torch.Generator().manual_seed(1)
    model = Decoder(read_config(hf), generator).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            spread = 0.3 if parameter.dim() == 1 else 0.1
            parameter.add_(torch.randn(parameter.shape, generator=generator) * spread)
    return model


def run(file: Path, **request: Any) -> dict[str, Any]:
    """llama.cpp in a process of its own."""
    asked = json.dumps({"texts": [], "prompts": [], "tokens": 0} | request)
    script = str(Path(__file__).with_name("llama_run.py"))
    done = subprocess.run([sys.executable, script, str(file)], input=asked, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train([Path(__file__).read_text(), *VARIED], vocab_size=V)


@llama_cpp
@pytest.mark.parametrize("case", CASES)
def test_llama_cpp_computes_the_same(case: str, tmp_path: Path, tokenizer: Tokenizer) -> None:
    model = decoder(CASES[case])
    words, _ = vocabulary(tokenizer, V)
    write(model, tmp_path / "a.gguf", Types(matrices="f32"), vocabulary=words)
    prompt = torch.randint(3, V, (1, 40), generator=torch.Generator().manual_seed(3))
    got = run(tmp_path / "a.gguf", prompts=[prompt[0].tolist()])
    with torch.no_grad():
        want = model(prompt)[0, -1]
    error = (torch.tensor(got["logits"][0]) - want).norm() / want.norm()
    # ggml's tanh approximation of GELU looks values up in a table of float16
    assert error < (2e-3 if model.config.activation == "gelu_tanh" else 1e-4)


def trained(kind: str) -> Tokenizer:
    """A small tokenizer of each way to split that llama.cpp has a name for."""
    import tokenizers
    from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers

    words = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|NUMBER"
    words += r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    specials = ["<unk>", "<s>", "</s>", "<|turn|>"]
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind in ("gpt-2", "smollm"))
    backend = tokenizers.Tokenizer(models.BPE())
    steps: dict[str, list[Any]] = {
        "gpt-2": [],
        "smollm": [pre_tokenizers.Digits(individual_digits=True)],
        "dbrx": [pre_tokenizers.Split(Regex(words.replace("NUMBER", r"\p{N}{1,3}")), "isolated")],
        "qwen2": [pre_tokenizers.Split(Regex(words.replace("NUMBER", r"\p{N}")), "isolated")],
    }
    if kind in steps:
        backend.pre_tokenizer = pre_tokenizers.Sequence([*steps[kind], level])
        trainer = trainers.BpeTrainer(
            vocab_size=700, special_tokens=specials, initial_alphabet=sorted(level.alphabet()), show_progress=False
        )
    else:
        byte_tokens = [f"<0x{i:02X}>" for i in range(256)]
        backend = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        space = normalizers.Replace(" ", "▁")
        prefix = [normalizers.Prepend("▁")] if kind == "llama" else []
        backend.normalizer = normalizers.Sequence([*prefix, space])
        backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
        trainer = trainers.BpeTrainer(
            vocab_size=700, special_tokens=specials + byte_tokens, limit_alphabet=90, show_progress=False
        )
    text = (Path(__file__).read_text() + "\n".join(VARIED)).splitlines(keepends=True)
    backend.train_from_iterator(text, trainer)
    if kind not in steps:  # bytes are ordinary tokens to the merges, not names to look for in a text
        described = json.loads(backend.to_str())
        described["added_tokens"] = [t for t in described["added_tokens"] if not t["content"].startswith("<0x")]
        backend = type(backend).from_str(json.dumps(described))
    return Tokenizer(backend, eos="</s>", bos="<s>", template="{{ messages }}")


@llama_cpp
@pytest.mark.parametrize("kind", ["gpt-2", "smollm", "dbrx", "qwen2", "llama", "gemma"])
def test_llama_cpp_cuts_text_alike(kind: str, tmp_path: Path) -> None:
    words = trained(kind)
    size = words.vocab_size + 5
    found, notes = vocabulary(words, size)
    assert not notes and found["tokenizer.ggml.pre"] == {
        "qwen2": "hunyuan",
        "llama": "default",
        "gemma": "default",
    }.get(kind, kind)
    assert len(found["tokenizer.ggml.tokens"]) == size == len(set(found["tokenizer.ggml.tokens"]))
    write(decoder(LLAMA | {"vocab_size": size}), tmp_path / "a.gguf", Types(matrices="f16"), vocabulary=found)
    texts = [*VARIED, "a<|turn|>b </s>c", Path(__file__).read_text()[:3000]]
    assert run(tmp_path / "a.gguf", texts=texts)["texts"] == [words.encode(text) for text in texts]


def test_tokenizers_that_llama_cpp_has_no_name_for_are_refused() -> None:
    import tokenizers
    from tokenizers import models, pre_tokenizers

    words = trained("gpt-2")
    with pytest.raises(UserError, match="embeddings"):
        vocabulary(words, 10)
    words.backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("e", "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    with pytest.raises(UserError, match="no name for this tokenizer's way"):
        vocabulary(words, 800)
    words.backend.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(UserError, match="Whitespace"):
        vocabulary(words, 800)
    piece = tokenizers.Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "<s>": 2}, unk_token="<unk>"))
    with pytest.raises(UserError, match="WordLevel"):
        vocabulary(Tokenizer(piece, eos="</s>"), 10)


def folder_of(model: Decoder, words: Tokenizer, folder: Path) -> Path:
    words.save(folder)
    save_model(model, folder, folder)
    return folder


@llama_cpp
def test_a_merged_adapter_answers_alike_in_llama_cpp(tmp_path: Path, tokenizer: Tokenizer) -> None:
    from modicum.adapt.peft_format import save_peft

    base = folder_of(decoder(LLAMA), tokenizer, tmp_path / "base")
    adapted = load_model(base)
    for form in attach(adapted, {"layers.*": "lora:rank=4"}).values():
        for i, factor in enumerate(form.trainable()):
            torch.nn.init.normal_(factor, std=0.2, generator=torch.Generator().manual_seed(i))
    save_peft(adapted, tmp_path / "adapter")
    export(str(base), tmp_path / "a.gguf", type="f32", adapter=tmp_path / "adapter")
    merge(adapted)
    prompts = [tokenizer.encode(text) for text in ("Export: what is stored", "def test(", "import json\n")]
    got = run(tmp_path / "a.gguf", prompts=prompts, tokens=64)
    want = [greedy(adapted, torch.tensor([p]), 64)[0, len(p) :].tolist() for p in prompts]
    assert got["tokens"] == want
    plain = greedy(load_model(base), torch.tensor([prompts[0]]), 64)[0, len(prompts[0]) :].tolist()
    assert plain != want[0], "the adapter must change something"


@llama_cpp
@pytest.mark.parametrize("kind", ["q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "q4_0", "q4_1", "q5_0", "q5_1", "q8_0"])
def test_llama_cpp_reads_every_type(kind: str, tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Of the token embedding, whose rows it dequantises; products round what they are multiplied with as well."""
    model = decoder(LLAMA | {"hidden_size": 256})
    words, _ = vocabulary(tokenizer, V)
    types = Types(matrices="f32", patterns={"token_embd.weight": kind})
    write(model, tmp_path / "a.gguf", types, vocabulary=words)
    stored = reread(model, tmp_path / "a.gguf")
    prompt = torch.randint(3, V, (1, 12), generator=torch.Generator().manual_seed(3))
    got = torch.tensor(run(tmp_path / "a.gguf", prompts=[prompt[0].tolist()])["logits"][0])
    with torch.no_grad():
        want, exact = stored(prompt)[0, -1], model(prompt)[0, -1]
    assert (got - want).norm() < 1e-4 * want.norm() and (got - exact).norm() > 20 * (got - want).norm()


def reread(model: Decoder, file: Path) -> Decoder:
    """The same model with the weights of a GGUF file, by the package `gguf`."""
    import gguf

    from modicum.model.gguf import architectures

    arch = architectures.require(model.config)
    read = Decoder(model.config, init=False).eval()
    parameters = dict(read.named_parameters(remove_duplicate=False))
    if model.config.tied and arch.tied is not False:
        parameters.pop("lm_head.weight")
    stored = {t.name: torch.tensor(gguf.dequantize(t.data, t.tensor_type)) for t in gguf.GGUFReader(file).tensors}
    plan = architectures.plan(arch, model.config, parameters)
    with torch.no_grad():
        for name, rule in plan.items():
            shapes = [tuple(parameters[n].shape) for n in rule.ours]
            parts = architectures.from_gguf(arch, model.config, rule, stored.pop(name), shapes)
            for ours, part in zip(rule.ours, parts, strict=True):
                parameters.pop(ours).copy_(part)
    assert not parameters and not {n for n in stored if not n.startswith("rope")}
    return read


@pytest.mark.parametrize("case", CASES)
def test_float_files_hold_the_weights_bit_for_bit(case: str, tmp_path: Path) -> None:
    model = decoder(CASES[case])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
    write(model, tmp_path / "a.gguf", Types(matrices="bf16"))
    again = reread(model, tmp_path / "a.gguf")
    for (name, want), got in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        if name.endswith("norm.weight") and model.config.norm == "rms_plus_one":
            assert torch.allclose(got, want, atol=1e-6), name  # the one that is added rounds
        else:
            assert torch.equal(got, want), name


def test_command_says_what_is_stored_how(
    tmp_path: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    shape = LLAMA | {"hidden_size": 128, "intermediate_size": 256, "tie_word_embeddings": True}
    folder, out = str(folder_of(decoder(shape).bfloat16(), tokenizer, tmp_path / "model")), tmp_path / "a.gguf"
    with pytest.raises(UserError, match=r"18 matrices.*--fallback with one of f16, bf16, q4_0"):
        export(folder, out, type="q4_k")
    options: dict[str, Any] = dict(type="q4_k", fallback="q5_0", tensor=["blk.0.ffn_down.*=q6_k"])
    export(folder, out, **options, dry_run=True)
    assert not out.exists() and "rows of 128 are not whole blocks of 256 (q4_k)" in capsys.readouterr().out
    export(folder, out, **options, as_json=True)
    done = json.loads(capsys.readouterr().out)
    rows = {(row["tensors"], row["type"]): row for row in done["tensors"]}
    assert rows["attn_q", "q5_0"]["bits"] == 5.5 and "128 are not whole blocks of 256" in rows["attn_q", "q5_0"]["why"]
    assert rows["ffn_down", "q4_k"]["count"] == 2 and rows["ffn_down", "q6_k"]["count"] == 1
    assert rows["token_embd", "q8_0"]["bits"] == 8.5 and rows["norms and biases", "f32"]["count"] == 7
    assert 0 < out.stat().st_size - done["bytes"] < 40_000  # metadata and the vocabulary
    wrong: tuple[tuple[dict[str, Any], str], ...] = (
        (dict(type="q4_x"), "q4_"),
        (dict(tensor=["blk.9.*=q8_0"]), "no matrix is named like"),
        (dict(tensor=["q8_0"]), "GLOB=TYPE"),
        (dict(format="onnx"), "gguf, hf, gptq, awq, compressed-tensors"),
    )
    for knobs, message in wrong:
        with pytest.raises(UserError, match=message):
            export(folder, tmp_path / "b.gguf", **knobs)
    assert not (tmp_path / "b.gguf").exists()


def test_models_that_llama_cpp_would_compute_otherwise_are_refused(tmp_path: Path) -> None:
    for change, message in (
        (dict(model_type="smollm3", no_rope_layer_interval=2), "rope=None in layer 1"),
        (dict(model_type="qwen3", attention_bias=True), "qkv_bias"),
        (dict(model_type="gpt_neox", hidden_act="relu", rotary_pct=0.5), "activation"),
        (GEMMA | dict(model_type="gemma2", query_pre_attn_scalar=7, attn_logit_softcapping=3.0), "scale"),
    ):
        with pytest.raises(UserError, match=message):
            write(decoder(LLAMA | change), tmp_path / "a.gguf", Types(matrices="f32"))
    opt = dict(model_type="opt", vocab_size=V, hidden_size=32, ffn_dim=64, num_hidden_layers=1, num_attention_heads=2,
               max_position_embeddings=32)  # fmt: skip
    with pytest.raises(UserError, match="no architecture for the family opt"):
        write(decoder(opt), tmp_path / "a.gguf", Types(matrices="f32"))
    assert not list(tmp_path.iterdir())


def test_a_window_shortens_the_context(tmp_path: Path) -> None:
    import gguf

    model = decoder(LLAMA | dict(model_type="mistral", sliding_window=17))
    write(model, tmp_path / "a.gguf", Types(matrices="f16"))
    assert gguf.GGUFReader(tmp_path / "a.gguf").fields["llama.context_length"].contents() == 17


def test_hugging_face_folder_is_dense(tmp_path: Path, tokenizer: Tokenizer) -> None:
    from transformers import AutoModelForCausalLM

    model = decoder(LLAMA)
    attach(model, {"layers.*": "int8"})
    folder = folder_of(model, tokenizer, tmp_path / "model")
    export(str(folder), tmp_path / "out", format="hf")
    assert not (tmp_path / "out" / "modicum.json").exists() and (tmp_path / "out" / "tokenizer.json").exists()
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    tokens = torch.randint(3, V, (1, 12), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        assert (theirs(tokens).logits - model(tokens)).abs().max() < 1e-4


# A file does not keep which GELU it was.
@pytest.mark.parametrize("case", [c for c in CASES if "neox" not in c])
def test_what_is_written_is_read(case: str, tmp_path: Path, tokenizer: Tokenizer) -> None:
    from modicum.model.gguf.read import load

    model = decoder(CASES[case]).float()
    words, _ = vocabulary(tokenizer, V)
    write(model, tmp_path / "a.gguf", Types(matrices="q5_0", fallback="f32"), vocabulary=words)
    again, want = load(tmp_path / "a.gguf", dtype=torch.float32), reread(model, tmp_path / "a.gguf")
    tokens = torch.randint(3, V, (1, 40), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        assert (again(tokens) - want(tokens)).abs().max() < 1e-4
        assert (want(tokens) - model(tokens)).abs().max() > 1e-3, "five bits must change something"


@pytest.mark.parametrize("kind", ["q4_0", "q4_1", "q8_0"])
def test_a_quantised_file_exported_again_has_the_same_bytes(kind: str, tmp_path: Path, tokenizer: Tokenizer) -> None:
    import gguf

    words, _ = vocabulary(tokenizer, V)
    write(decoder(LLAMA), tmp_path / "a.gguf", Types(matrices=kind), vocabulary=words)
    export(str(tmp_path / "a.gguf"), tmp_path / "b.gguf", type=kind)
    first, second = (
        {t.name: (t.tensor_type, t.data.tobytes()) for t in gguf.GGUFReader(tmp_path / f"{n}.gguf").tensors}
        for n in "ab"
    )
    assert first == second


@pytest.mark.parametrize("form", ["int4:group=64", "affine:bits=4,group=32"])
def test_codes_of_four_bits_are_not_rounded_again(form: str, tmp_path: Path, tokenizer: Tokenizer) -> None:
    """A q4_1 file of them holds the same weights but for float16 steps and minima; rounded anew they would move."""
    config = llama_like(tokenizer.vocab_size, 64, 2, 4, kv_heads=2, mlp_width=128, context_length=64)
    model = Decoder(config, torch.Generator().manual_seed(0))
    attach(model, {"layers.*": form})
    save_model(model, tmp_path / "model")
    tokenizer.save(tmp_path / "model")
    export(str(tmp_path / "model"), tmp_path / "out.gguf", type="q4_1")
    merge(model)
    read = load_model(tmp_path / "out.gguf", dtype="float32")
    for name, weight in model.named_parameters():
        if name.startswith("layers.") and weight.dim() == 2:
            off = (read.get_parameter(name).float() - weight.float()).norm() / weight.float().norm()
            assert float(off) < 2e-3, f"{name} moved by {float(off):.4f}"
