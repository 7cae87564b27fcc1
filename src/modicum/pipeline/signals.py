"""Makers of a curation's signals: embeddings by any encoder, losses under several models, text by a generator.

`data.signals` names them by these functions, so that any process of a curation makes its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from modicum.data.signals import Maker, Signal


def makers(
    encoder: str | None = None, models: Sequence[str] = (), generator: str | None = None, device: str = "cpu"
) -> Mapping[str, Maker]:
    """What a curation gets for `--encoder`, `--models` (from the weakest to the strongest) and `--generator`: a model,
    or MODEL@URL, one of an OpenAI-compatible server."""
    from modicum.retrieve.encoders import fingerprint, parse

    out: dict[str, Maker] = {}
    if encoder:
        version = str(fingerprint(parse(encoder).knobs.get("model", "")))
        out["embedding"] = Maker(f"{__name__}:embedding", {"encoder": encoder, "device": device}, version)
    if models:
        version = " ".join(str(fingerprint(model)) for model in models)
        out["losses"] = Maker(f"{__name__}:losses", {"models": list(models), "device": device}, version)
    if generator:
        model, _, url = generator.partition("@")
        if url.startswith(("http://", "https://")):
            out["generate"] = Maker("modicum.serve.generate:remote", {"url": url, "model": model or None}, generator)
        else:
            version = str(fingerprint(generator))
            out["generate"] = Maker("modicum.serve.generate:local", {"model": generator, "device": device}, version)
    return out


def embedding(encoder: str, device: str = "cpu") -> Signal:
    """Unit vectors of an encoder of the port; one that is fitted on its passages is refused."""
    from modicum.core.errors import UserError
    from modicum.retrieve.encoders import make_encoder

    made = make_encoder(encoder, device=device)
    if made.fitted:
        raise UserError(
            f"--encoder {encoder} would have to be fitted on the corpus; give a sentence-transformers model such as "
            "minilm, or leave it out: steps then fit LSA on their sample"
        )
    return made.encode


def losses(models: Sequence[str], device: str = "cpu") -> Signal:
    """float64 [N, M]: nats of each text under each model. They stay in memory together."""
    from modicum.data.tokenizer import Tokenizer
    from modicum.evaluate.lm import document_nats
    from modicum.model.folder import find_folder, load_model

    loaded: list[tuple[Any, Tokenizer]] = [
        (load_model(name, "float32", device), Tokenizer.load(find_folder(name))) for name in models
    ]

    def signal(texts: Sequence[str]) -> np.ndarray:
        return np.array([[n for n, _, _ in document_nats(*one, texts)] for one in loaded]).T

    return signal
