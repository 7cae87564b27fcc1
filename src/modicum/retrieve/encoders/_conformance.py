"""What holds for any encoder: shapes, texts apart or together, state that is saved, odd texts."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from modicum.core import registry
from modicum.retrieve.encoders import Encoder, load_encoder, make_encoder

TEXTS = [
    "the cat sat on the mat",
    "a dog chased the cat over the mat",
    "json parses a string",
    "open a file and read its lines " * 8,
    "serialize an object to a json string",
    "the dog sat",
]


@contextmanager
def _made(key: str) -> Iterator[Encoder]:
    """The method with its `TOY`, or with small random models of both kinds where it takes one."""
    loaded = registry.load("encoder", key)
    with tempfile.TemporaryDirectory() as folder:
        if any(f.name == "model" for f in fields(loaded.config)):
            makers = {"decoder": _decoder, "xbt": _projected, "o1-embedder": _thinking}
            model = makers.get(key, _sentence)(Path(folder) / "model")
            config = loaded.config(model=str(model))
        else:
            config = getattr(loaded.module, "TOY", None) or loaded.config()
        encoder = loaded.cls(config)
        encoder.count(TEXTS)
        encoder.fit([encoder.pool(TEXTS[:4]), encoder.pool(TEXTS[4:])])
        yield encoder


def _decoder(folder: Path) -> Path:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from modicum.data.tokenizer import Tokenizer

    tokenizer = Tokenizer.train(TEXTS, 280)
    torch.manual_seed(0)
    shape: dict[str, Any] = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    shape |= dict(num_key_value_heads=1, max_position_embeddings=64, eos_token_id=tokenizer.eos_id)
    LlamaForCausalLM(LlamaConfig(vocab_size=tokenizer.vocab_size, **shape)).save_pretrained(folder)
    tokenizer.save(folder)
    return folder


def _sentence(folder: Path) -> Path:
    from modicum.retrieve.student import Student

    student = Student.new(TEXTS, width=16, layers=1, heads=2, vocabulary=330, max_tokens=48, seed=0)
    student.save(folder)
    return folder


def _projected(folder: Path) -> Path:
    """A small encoder with a projection of random weights."""
    import torch
    from safetensors.torch import save_file

    from modicum.core.files import write_json
    from modicum.retrieve.compatible import Projection

    _sentence(folder)
    torch.manual_seed(0)
    save_file(Projection(16, 12, 8).state_dict(), folder / "phi.safetensors")
    write_json(folder / "xbt.json", {"new": 16, "old": 12, "hidden": 8})
    return folder


def _thinking(folder: Path) -> Path:
    """A small decoder that would write thoughts."""
    import torch

    from modicum.data.tokenizer import Tokenizer
    from modicum.model.config import DecoderConfig
    from modicum.model.decoder import Decoder
    from modicum.retrieve.thinking import Thinker

    tokenizer = Tokenizer.train(TEXTS, 280)
    shape: Any = {"width": 16, "layers": 1, "heads": 2, "kv_heads": 1, "head_dim": 8, "mlp_width": 32}
    config = DecoderConfig(vocab_size=tokenizer.vocab_size, context_length=128, **shape)
    Thinker(Decoder(config, torch.Generator().manual_seed(0)), tokenizer, 64).save(folder)
    return folder


def check_vectors(key: str) -> None:
    with _made(key) as encoder:
        vectors_ND = encoder.encode(TEXTS)
        queries_ND = encoder.encode_queries(TEXTS)
        assert vectors_ND.shape[0] == len(TEXTS) and vectors_ND.shape == queries_ND.shape
        assert vectors_ND.dtype == queries_ND.dtype == np.float32 and np.isfinite(vectors_ND).all()
        if encoder.unit:
            assert np.allclose(np.linalg.norm(vectors_ND, axis=1), 1, atol=1e-4), "unit=True means vectors of length 1"
        assert encoder.encode([]).shape[0] == 0, "no text gives no vector"


def check_texts_do_not_depend_on_their_batch(key: str) -> None:
    with _made(key) as encoder:
        together = encoder.encode(TEXTS)
        alone = np.concatenate([encoder.encode([t]) for t in TEXTS])
        assert np.allclose(together, alone, atol=1e-4)
        again = encoder.encode(TEXTS[::-1])[::-1]
        assert np.allclose(together, again, atol=1e-4), "the order of texts changes nothing"


def check_similar_texts_are_near(key: str) -> None:
    with _made(key) as encoder:
        near = encoder.encode([TEXTS[0], TEXTS[0] + " ", TEXTS[2]])
        assert near[0] @ near[1] > near[0] @ near[2], "a text is nearer to itself than to another"


def check_odd_texts(key: str) -> None:
    with _made(key) as encoder:
        vectors_ND = encoder.encode(["", " \n", "été ? 猫 \U0001f431", "\x00", "word " * 5000])
        assert vectors_ND.shape[0] == 5 and np.isfinite(vectors_ND).all(), "odd texts give finite vectors"


def check_save_and_load(key: str) -> None:
    with _made(key) as encoder, tempfile.TemporaryDirectory() as folder:
        encoder.save(Path(folder) / "encoder")
        assert {p.suffix for p in (Path(folder) / "encoder").iterdir()} == {".json", ".safetensors"}
        again = load_encoder(Path(folder) / "encoder")
        assert type(again) is type(encoder) and again.config == encoder.config
        assert np.array_equal(again.encode(TEXTS), encoder.encode(TEXTS))
        assert np.array_equal(again.encode_queries(TEXTS), encoder.encode_queries(TEXTS))


def check_tokens(key: str) -> None:
    with _made(key) as encoder:
        try:
            states = encoder.tokens(TEXTS)
        except Exception as error:
            assert "one vector for a text" in str(error), "an encoder without token states says so"
            return
        assert len(states) == len(TEXTS) and len({s.shape[1] for s in states}) == 1
        assert len(states[1]) > len(states[0]) > 0, "a longer text has more tokens"


def check_choice(key: str) -> None:
    with _made(key) as encoder:
        again = make_encoder({k: v for k, v in encoder.settings().items() if k != "fingerprint"})
        assert again.config == encoder.config and again.key == key
