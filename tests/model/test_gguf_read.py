"""Reading GGUF: every family and type, codes that stay codes, folders from lone files, damaged files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from modicum.core.errors import CorruptError, UserError
from modicum.core.gguf import GgufFile, dequantize
from modicum.model.attach import forms
from modicum.model.config import DecoderConfig, Rope, by_layer
from modicum.model.decoder import Decoder
from modicum.model.families import read_config
from modicum.model.gguf import architectures
from modicum.model.gguf.read import folder_files, load, values_of

gguf = pytest.importorskip("gguf")
SIZES = {"vocab_size": 64, "width": 64, "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 16, "mlp_width": 96}
MHA = SIZES | {"kv_heads": 4}
GEMMA = {"norm": "rms_plus_one", "activation": "gelu_tanh", "embed_scale": 8.0, "tied": True}
LAYER_NORM = {"norm": "layer", "gated": False, "qkv_bias": True, "o_bias": True, "mlp_bias": True, "norm_eps": 1e-5}
SHAPES = {
    "llama": DecoderConfig(family="llama", **SIZES),
    "llama-tied-biased": DecoderConfig(family="llama", tied=True, qkv_bias=True, o_bias=True, **SIZES),
    "llama3": DecoderConfig(
        family="llama",
        rope=Rope(
            theta=5e5,
            kind="llama3",
            options={
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
        ),
        **SIZES,
    ),
    "qwen2": DecoderConfig(family="qwen2", qkv_bias=True, **SIZES),
    "qwen3": DecoderConfig(family="qwen3", qk_norm="head", **SIZES),
    "olmo2": DecoderConfig(family="olmo2", qk_norm="full", norm_place="output", **MHA),
    "gemma": DecoderConfig(family="gemma", **GEMMA, **SIZES),
    "gemma2": DecoderConfig(
        family="gemma2",
        norm_place="sandwich",
        overrides=by_layer(window=(8, None)),
        scale=0.25,
        attention_softcap=50.0,
        logit_softcap=30.0,
        **GEMMA,
        **SIZES,
    ),
    "gemma3": DecoderConfig(
        family="gemma3",
        norm_place="sandwich",
        qk_norm="head",
        scale=0.25,
        rope=Rope(theta=1e6),
        overrides=by_layer(window=(8, None), rope=(Rope(theta=1e4), Rope(theta=1e6))),
        **GEMMA,
        **SIZES,
    ),
    "phi3": DecoderConfig(family="phi3", **SIZES),
    "gpt2": DecoderConfig(family="gpt2", activation="gelu_tanh", position="learned", tied=True, **LAYER_NORM, **MHA),
    "gptneox": DecoderConfig(
        family="gpt_neox", parallel=True, rope=Rope(fraction=0.25), activation="gelu", **LAYER_NORM, **MHA
    ),
}  # fmt: skip


def decoder(shape: DecoderConfig) -> Decoder:
    torch.manual_seed(0)
    model = Decoder(shape).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.2)
    return model


def write(path: Path, model: Decoder, kind: str = "F32", **more: object) -> Path:
    """The model as a GGUF file by the reference package's writer, matrices of whole blocks in `kind`."""
    arch = architectures.require(model.config)
    writer = gguf.GGUFWriter(str(path), arch.name)
    for key, value in (architectures.metadata(model.config) | more).items():
        if key == "general.architecture":
            continue
        kinds = (
            (bool, writer.add_bool),
            (int, writer.add_uint32),
            (float, writer.add_float32),
            (str, writer.add_string),
        )
        add = next((a for k, a in kinds if isinstance(value, k)), writer.add_array)
        add(key, value)
    parameters = dict(model.named_parameters())
    tensors: dict[str, Tensor] = {
        name: architectures.to_gguf(arch, model.config, rule, [parameters[n].detach() for n in rule.ours])
        for name, rule in architectures.plan(arch, model.config, parameters).items()
    }
    for name, x in (tensors | architectures.rope_tensors(model.config)).items():
        values = x.float().numpy()
        number = gguf.GGMLQuantizationType[kind]
        whole = x.ndim == 2 and values.shape[-1] % gguf.GGML_QUANT_SIZES[number][0] == 0
        number = number if whole else gguf.GGMLQuantizationType.F32
        writer.add_tensor(name, gguf.quantize(values, number), raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("name", SHAPES)
def test_every_family_comes_back_as_it_was(name: str, tmp_path: Path) -> None:
    model = decoder(SHAPES[name])
    again = load(write(tmp_path / "m.gguf", model), dtype=torch.float32)
    written = folder_files(tmp_path / "m.gguf")
    assert read_config(json.loads(written["config.json"])) == again.config
    lost = [
        field
        for field in DecoderConfig.__dataclass_fields__
        if field not in ("source", "rope") and getattr(again.config, field) != getattr(model.config, field)
    ]
    assert not lost, [(f, getattr(model.config, f), getattr(again.config, f)) for f in lost]
    assert again.config.rope.kind == model.config.rope.kind
    tokens = torch.randint(0, 64, (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        torch.testing.assert_close(again(tokens), model(tokens), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "MXFP4", "TQ1_0", "TQ2_0"])
def test_every_type_is_dequantised_as_the_package_does(kind: str, tmp_path: Path) -> None:
    shape = DecoderConfig(family="llama", **(SIZES | {"width": 256, "head_dim": 64, "mlp_width": 256}))
    model = decoder(shape)
    file = GgufFile(write(tmp_path / "m.gguf", model, kind))
    tensor = file.tensors["blk.1.ffn_down.weight"]
    assert tensor.type == kind
    wanted = gguf.dequantize(tensor.blocks, gguf.GGMLQuantizationType[kind])
    assert np.array_equal(dequantize(tensor), wanted)
    assert np.array_equal(values_of(tensor, torch.float32).numpy(), wanted)
    again = load(file.path, dtype=torch.float32)
    assert np.array_equal(again.layers[1].mlp.down.weight.detach().numpy(), wanted)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1"])
@pytest.mark.parametrize("name", ["llama-tied-biased", "gemma3", "phi3", "gpt2"])
def test_kept_codes_are_the_dequantised_weights(kind: str, name: str, tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", decoder(SHAPES[name]), kind)
    plain = load(path, dtype=torch.float32)
    kept = load(path, dtype=torch.float32, keep_quantized=True)
    found = forms(kept)
    assert len(found) >= 2 * (7 if SHAPES[name].gated else 6), "every matrix of the layers keeps its codes"
    for module, form in found.items():
        dense = plain.embed.weight if module.startswith("embed") else plain.get_submodule(module).weight
        assert torch.equal(form.dense(), dense), module
    tokens = torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        torch.testing.assert_close(kept(tokens), plain(tokens), rtol=1e-4, atol=1e-4)


def test_what_is_damaged_or_unknown_is_one_line(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", decoder(SHAPES["llama"]))
    data = path.read_bytes()
    for name, content, error, words in (
        ("short", data[:200], CorruptError, "damaged"),
        ("cut", data[:-4096], CorruptError, "it was cut"),
        ("magic", b"GGML" + data[4:], UserError, "no GGUF file"),
        ("empty", b"", UserError, "no GGUF file"),
        ("huge", data[:8] + b"\xff" * 8 + data[16:], CorruptError, "damaged"),
        ("other", data.replace(b"llama", b"bloom"), UserError, "'bloom'"),
        ("tensor", data.replace(b"blk.1.ffn_gate.weight", b"blk.1.ffn_gote.weight"), UserError, "ffn_gote"),
    ):
        broken = tmp_path / f"{name}.gguf"
        broken.write_bytes(content)
        with pytest.raises(error, match=words) as caught:
            load(broken)
        assert "\n" not in str(caught.value)


def test_writing_to_a_loaded_weight_leaves_the_file_alone(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", decoder(SHAPES["llama"]))
    before = path.read_bytes()
    model = load(path, dtype=torch.float32)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
    assert path.read_bytes() == before


def raw_types() -> list[str]:
    return [t.name for t in gguf.quants._type_traits if t.name not in ("BF16",)]


@pytest.mark.parametrize("kind", raw_types())
def test_raw_blocks_of_every_type(kind: str, tmp_path: Path) -> None:
    """Random bytes are blocks of every type: also of those that the package can read but not write."""
    number = gguf.GGMLQuantizationType[kind]
    block, size = gguf.GGML_QUANT_SIZES[number]
    raw = np.random.default_rng(3).integers(0, 256, (40, 512 // block * size), dtype=np.uint8)
    writer = gguf.GGUFWriter(str(tmp_path / "m.gguf"), "llama")
    writer.add_tensor("x", raw, raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    tensor = GgufFile(tmp_path / "m.gguf").tensors["x"]
    assert (tensor.type, tensor.shape) == (kind, (40, 512))
    with np.errstate(all="ignore"):
        wanted = gguf.dequantize(raw, number)
        got = values_of(tensor, torch.float32).numpy()
    assert np.array_equal(got, wanted, equal_nan=True)


def test_a_folder_with_nothing_but_the_file(tmp_path: Path) -> None:
    from modicum.model.folder import load_config, load_model

    model = decoder(SHAPES["llama"])
    write(tmp_path / "model.gguf", model, "Q8_0")
    assert load_config(tmp_path).width == model.config.width
    assert not forms(load_model(tmp_path)) and load_model(tmp_path).dtype == torch.bfloat16
    kept = load_model(tmp_path, keep_quantized=True)
    assert {str(form.choice) for form in forms(kept).values()} == {"ggml:type=q8_0"}
    assert not forms(load_model(tmp_path / "model.gguf", dtype="float32", keep_quantized=True))


def test_llama_cpp_computes_the_same_logits(tmp_path: Path) -> None:
    """In float32 to its rounding (its GELU is a table of float16); where it rounds activations to eight bits, this
    decoder is nearer to the truth."""
    llama_cpp = pytest.importorskip("llama_cpp")
    texts = [f"t{i}" for i in range(64)]
    more = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": texts, "tokenizer.ggml.merges": ["t 1"]}
    tokens = [int(i) for i in np.random.default_rng(4).integers(0, 64, 24)]
    for name in ("llama", "gemma3", "qwen3"):
        for kind, near in (("F32", 1e-5 if name != "gemma3" else 1e-3), ("Q8_0", 0.05), ("Q4_1", 0.2)):
            path = write(tmp_path / f"{name}-{kind}.gguf", decoder(SHAPES[name]), kind, **more)
            theirs = llama_cpp.Llama(str(path), n_ctx=64, logits_all=True, verbose=False, type_k=0, type_v=0)
            theirs.eval(tokens)
            got = torch.tensor(np.array(theirs.scores[: len(tokens)])).double()
            theirs.close()
            with torch.inference_mode():
                want = load(path, dtype=torch.float64)(torch.tensor([tokens]))[0]
                kept = load(path, dtype=torch.float32, keep_quantized=True)(torch.tensor([tokens]))[0].double()
            distance, ours = ((x - want).norm() / want.norm() for x in (got, kept))
            assert distance < near and ours < 1e-5, (name, kind, float(distance), float(ours))
            assert kind == "F32" or ours < distance


def test_metadata_of_every_kind_and_an_alignment_of_its_own(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(str(tmp_path / "m.gguf"), "llama")
    writer.add_custom_alignment(128)
    given = {"text": "ü", "yes": True, "small": 7, "real": 0.5, "texts": ["a", "", "é"], "numbers": [1, 2, 3]}
    adds = (
        writer.add_string,
        writer.add_bool,
        writer.add_uint8,
        writer.add_float64,
        writer.add_array,
        writer.add_array,
    )
    for (key, value), add in zip(given.items(), adds, strict=True):
        add(key, value)
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    writer.add_tensor("a", values)
    writer.add_tensor("b", values + 10)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = GgufFile(tmp_path / "m.gguf")
    assert {key: file.metadata[key] for key in given} == given
    for name, wanted in (("a", values), ("b", values + 10)):
        assert np.array_equal(values_of(file.tensors[name], torch.float32).numpy(), wanted)
    part = tmp_path / "part.gguf"
    writer = gguf.GGUFWriter(str(part), "llama")
    writer.add_uint16("split.count", 3)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UserError, match=r"one of 3 parts.*llama-gguf-split --merge"):
        GgufFile(part)
