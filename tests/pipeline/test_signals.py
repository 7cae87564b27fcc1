"""The makers of signals: losses under real models, in order, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from modicum.bench import fixtures
from modicum.core.errors import UserError
from modicum.data.signals import Signals
from modicum.data.tokenizer import Tokenizer
from modicum.evaluate.lm import document_nats
from modicum.model.config import llama_like
from modicum.model.decoder import Decoder
from modicum.model.folder import load_model, save_model
from modicum.pipeline.signals import embedding, makers


def test_losses_are_totals_of_each_text_under_each_model(tmp_path: Path) -> None:
    texts = ["the first text of some words", "another one", "a longer text " * 30]
    folders = []
    for seed, vocabulary in ((0, 270), (1, 300)):  # two tokenizers
        folder = tmp_path / str(seed)
        tokenizer = Tokenizer.train(["the words of a text and another one"] * 3, vocabulary)
        shape = llama_like(tokenizer.vocab_size, 32, 1, context_length=64)
        save_model(Decoder(shape, fixtures.seeded(seed)), folder)
        tokenizer.save(folder)
        folders.append(str(folder))
    made = makers(models=folders)
    column = Signals(made, tmp_path / "signals").column("losses", texts)
    for m, folder in enumerate(folders):
        nats = [n for n, _, _ in document_nats(load_model(folder, "float32"), Tokenizer.load(folder), texts)]
        assert np.allclose(column[:, m], nats, rtol=1e-4)
    assert made["losses"].version and made["losses"].version != makers(models=folders[::-1])["losses"].version
    assert makers() == {}


def test_an_encoder_that_has_to_be_fitted_is_refused() -> None:
    with pytest.raises(UserError, match="fit LSA"):
        embedding("lsa:dims=64")
