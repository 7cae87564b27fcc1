"""Encoders: texts to unit vectors by any sentence-transformers model, a language model, or no model at all."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from modicum.core.errors import MissingExtra, UserError, unknown
from modicum.core.files import read_json
from modicum.data.latent import Latent
from modicum.model import sources
from modicum.retrieve.decoder_encoder import DecoderEncoder
from modicum.retrieve.encoder import Encoder, fingerprint, unit
from modicum.retrieve.plain_sentence import PlainSentence

__all__ = [
    "DecoderEncoder",
    "Encoder",
    "LatentEncoder",
    "SentenceTransformerEncoder",
    "load_encoder",
    "make_encoder",
    "parse_knobs",
    "unit",
]


class SentenceTransformerEncoder(Encoder):
    """A model of the `sentence-transformers` kind; its own prompts for queries and documents are used.

    A folder that is a transformer and one pooling is opened without that library (`PlainSentence`); any other with it.
    """

    kind = "sentence-transformers"

    def __init__(self, model: str | Path, *, device: str = "cpu", batch: int = 64):
        self.model, self.batch = str(model), batch
        model_folder = sources.resolve(self.model)
        try:
            self._plain = PlainSentence.open(model_folder, device)
            self._model = None if self._plain else self._library(model_folder, device)
        except (OSError, ValueError) as error:
            raise UserError(
                f"{model} does not open as an encoder ({str(error).splitlines()[0]}); give a folder, a known name or a "
                "hub id of a sentence-transformers model, or decoder:FOLDER for a language model"
            ) from None

    def _library(self, model_folder: str, device: str) -> Any:
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError:
            raise MissingExtra("sentence-transformers", "encoders", f"the encoder {self.model}") from None
        return SentenceTransformer(model_folder, device=device, trust_remote_code=False)

    def _vectors(self, side: str, texts: Sequence[str]) -> np.ndarray:
        if self._plain is not None:
            return unit(self._plain.encode(texts, self.batch))
        encode = getattr(self._model, f"encode_{side}")
        return unit(
            np.asarray(
                encode(list(texts), batch_size=self.batch, show_progress_bar=False, convert_to_numpy=True), np.float32
            )
        )

    def pool(self, texts: Sequence[str]) -> np.ndarray:
        return self._vectors("document", texts)

    def finish(self, pooled_NE: np.ndarray) -> np.ndarray:
        return pooled_NE

    def encode_queries(self, texts: Sequence[str]) -> np.ndarray:
        return self._vectors("query", texts)


class LatentEncoder(Encoder):
    """No model at all: latent semantic analysis of the passages (see `Latent`); `model` is the number of directions."""

    kind = "lsa"

    def __init__(self, model: str | Path = "512", *, device: str = "cpu"):
        self.model = str(model)
        if not self.model.isdecimal() or int(self.model) < 1:
            raise UserError(f"lsa:{model} does not say how many directions to keep; write for example lsa:512")
        self.latent = Latent(int(self.model))

    def count(self, texts: Iterable[str]) -> None:
        self.latent.fit(texts)

    def pool(self, texts: Sequence[str]) -> np.ndarray:
        return self.latent(texts)

    def finish(self, pooled_NE: np.ndarray) -> np.ndarray:
        return unit(pooled_NE)

    def state(self) -> dict[str, np.ndarray]:
        return self.latent.state()

    def set_state(self, state: dict[str, np.ndarray]) -> None:
        self.latent.set_state(state)


KINDS: dict[str, Any] = {c.kind: c for c in (SentenceTransformerEncoder, LatentEncoder, DecoderEncoder)}


def make_encoder(spec: str, *, device: str = "cpu", **knobs: Any) -> Encoder:
    """From `decoder:MODEL`, `sentence-transformers:MODEL`, `lsa` (or `lsa:512`), or a bare MODEL: a folder, a known
    name such as minilm, or a hub id.

    A folder with `modules.json`, or whose config names no causal language model, is taken for an encoder.
    """
    kind, _, rest = spec.partition(":")
    if kind in KINDS and (rest or kind == LatentEncoder.kind):
        return _construct(KINDS[kind], rest or "512", device, knobs)
    folder = Path(sources.resolve(spec))
    if folder.is_dir() and not (folder / "config.json").is_file() and not (folder / "modules.json").is_file():
        raise UserError(f"{spec} holds neither modules.json nor config.json; give a model's folder")
    if not folder.exists() and (spec.startswith((".", "/", "~")) or spec.count("/") > 1):
        raise UserError(f"there is no folder {spec}; give a model's folder, or a hub id such as OWNER/NAME")
    if not folder.exists() and "/" not in spec:
        sources.source(spec)  # refuses it with the nearest name
    if folder.is_dir() and not (folder / "modules.json").is_file():
        named = read_json(folder / "config.json").get("architectures") or []
        if any(str(a).endswith(("ForCausalLM", "LMHeadModel")) for a in named):
            return _construct(DecoderEncoder, spec, device, knobs)
    return _construct(SentenceTransformerEncoder, spec, device, knobs)


def parse_knobs(text: str | None) -> dict[str, Any]:
    """`layers=[0,1],max_tokens=256` as keywords of an encoder."""
    import yaml

    try:
        knobs = yaml.safe_load("{" + (text or "").replace("=", ": ") + "}")
    except yaml.YAMLError:
        knobs = None
    if not isinstance(knobs, dict) or any(not isinstance(k, str) or v is None for k, v in knobs.items()):
        raise UserError(f"{text!r} is not KNOB=VALUE; write for example layers=[0,1],max_tokens=256")
    return knobs


def _construct(kind: Any, model: str | Path, device: str, knobs: dict[str, Any]) -> Encoder:
    allowed = [n for n in inspect.signature(kind).parameters if n not in ("model", "device")]
    for name in knobs:
        if name not in allowed:
            raise unknown(f"knob of encoder {kind.kind}", name, allowed)
    made: Encoder = kind(model, device=device, **knobs)
    return made


def load_encoder(folder: str | Path, *, device: str = "cpu", model: str | None = None) -> Encoder:
    """The encoder saved in `folder`; `model`: the new path of its model, if it moved."""
    from safetensors.numpy import load_file

    folder = Path(folder)
    saved = read_json(folder / "encoder.json")
    kind, was, relative = saved.pop("kind"), saved.pop("model"), saved.pop("relative", None)
    expected = saved.pop("model_fingerprint")
    if "share" in saved:  # the name of this setting in older indexes
        saved["latent_weight"] = saved.pop("share")
    if kind not in KINDS:
        raise unknown("encoder kind", kind, KINDS)
    model_folder = model or was
    if model is None and expected is not None and not Path(was).is_dir() and not sources.is_name(was) and relative:
        model_folder = str((folder / relative).resolve())
    if expected is not None and not Path(sources.resolve(model_folder)).is_dir():
        raise UserError(
            f"the encoder's model is not at {model_folder} any more; give its new path with: --encoder FOLDER"
        )
    if fingerprint(model_folder) != expected:
        raise UserError(
            f"{model_folder} is not the model this index was made with; give that one with --encoder, or build the "
            "index again"
        )
    encoder = _construct(KINDS[kind], model_folder, device, saved)
    encoder.set_state(load_file(str(folder / "encoder.safetensors")))
    return encoder
