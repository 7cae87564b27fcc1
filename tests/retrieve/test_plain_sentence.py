"""Sentence encoders without their library: the vectors that the library gives, for the folders that are plain."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from retrieve_toys import TEXTS

from modicum.core.errors import MissingExtra
from modicum.model import sources
from modicum.retrieve.encoders import make_encoder, unit
from modicum.retrieve.encoders._plain import PlainSentence
from modicum.retrieve.encoders.sentence_transformers import SentenceTransformer

sentence_transformers = pytest.importorskip("sentence_transformers")
LONG = [*TEXTS, "a file of the dog " * 40, "  the cat  "]


def made(folder: Path, pooling: str, max_tokens: int = 24) -> Path:
    """A random BERT as sentence-transformers itself saves it."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Normalize, Pooling, Transformer
    from transformers import BertConfig, BertModel, BertTokenizer

    bert = folder / "bert"
    bert.mkdir(parents=True)
    words = sorted({w for t in LONG for w in t.lower().split()})
    (bert / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]))
    BertTokenizer(str(bert / "vocab.txt")).save_pretrained(bert)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words) + 5, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    BertModel(config).save_pretrained(bert)
    transformer = Transformer(str(bert), max_seq_length=max_tokens)
    whole = SentenceTransformer(modules=[transformer, Pooling(16, pooling_mode=pooling), Normalize()])
    whole.save(str(folder / "whole"))
    classic(folder / "whole", pooling, max_tokens)
    return folder / "whole"


def classic(folder: Path, pooling: str, max_tokens: int) -> None:
    """The files as published encoders have them, written by the library's earlier versions."""
    settings = {"max_seq_length": max_tokens, "do_lower_case": False}
    (folder / "sentence_bert_config.json").write_text(json.dumps(settings))
    names = {"mean": "pooling_mode_mean_tokens", "cls": "pooling_mode_cls_token", "max": "pooling_mode_max_tokens"}
    modes = {name: key == pooling for key, name in names.items()}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 16} | modes))


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_vectors_are_the_librarys(tmp_path: Path, pooling: str) -> None:
    folder = made(tmp_path, pooling)
    plain = PlainSentence.open(folder, "cpu")
    assert plain is not None
    library = sentence_transformers.SentenceTransformer(str(folder), device="cpu")
    want = library.encode(LONG, convert_to_numpy=True)
    assert np.allclose(unit(plain.encode(LONG, batch=3)), want, atol=2e-6)
    other = PlainSentence.open(made(tmp_path / "other", "cls" if pooling == "mean" else "mean"), "cpu")
    assert other is not None and not np.allclose(unit(other.encode(LONG, batch=3)), want, atol=1e-2)


def test_what_says_more_goes_to_the_library(tmp_path: Path) -> None:
    assert PlainSentence.open(made(tmp_path / "max", "max"), "cpu") is None
    folder = made(tmp_path, "mean")
    changes = {
        "config_sentence_transformers.json": {"prompts": {"query": "query: "}},
        "sentence_bert_config.json": {"max_seq_length": 24, "do_lower_case": True},
        "modules.json": [
            *json.loads((folder / "modules.json").read_text())[:2],
            {"idx": 2, "name": "2", "path": "2_Dense", "type": "sentence_transformers.models.Dense"},
        ],
    }
    for name, content in changes.items():
        copy = tmp_path / name.partition(".")[0]
        shutil.copytree(folder, copy)
        (copy / name).write_text(json.dumps(content))
        assert PlainSentence.open(copy, "cpu") is None, name


def test_only_what_says_more_needs_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, other = made(tmp_path, "mean"), made(tmp_path / "max", "max")
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    encoder = make_encoder(str(plain))
    assert isinstance(encoder, SentenceTransformer)
    assert encoder.encode(TEXTS).shape == (len(TEXTS), 16)
    with pytest.raises(MissingExtra, match=r"modicum\[encoders\]"):
        make_encoder(str(other))


@pytest.mark.skipif(
    not sources.is_fetched(sources.source("minilm")), reason="modicum get minilm has not been typed here"
)
def test_minilm_knows_what_belongs_together() -> None:
    encoder = make_encoder("minilm")
    texts = ["A man is eating food.", "Someone has a meal.", "The stock market fell."]
    vectors_ND = encoder.encode(texts)
    library = sentence_transformers.SentenceTransformer(str(sources.folder_of("minilm")), device="cpu")
    assert np.allclose(vectors_ND, library.encode(texts), atol=1e-5)
    alike = vectors_ND @ vectors_ND.T
    assert alike[0, 1] > 0.5 > 0.2 > alike[0, 2]
