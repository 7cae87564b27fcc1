"""port encoder: texts to vectors, one for each text or one for each token.

Shape letters: N texts, E dimensions of pooled vectors, D of the final ones, T tokens of one text.

An encoder works in two steps so that a long encoding can be resumed: `pool` is the expensive one and needs only the
statistics of `count`; `fit` and `finish` turn pooled vectors into final ones and cost two passes over an array.
Most encoders give vectors of length 1, whose inner product is the cosine; `unit` is False where length carries
meaning. A folder of a model is not copied into an index but named there, with a fingerprint.
"""

from __future__ import annotations

import hashlib
import os
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from modicum.core import registry
from modicum.core.choice import Choice
from modicum.core.errors import CorruptError, UserError
from modicum.core.files import read_json, sha256, write_json
from modicum.model import sources

BASELINE = "lsa"
FORMAT = 2
SAMPLE_BYTES = 1 << 20  # read from each end of a weight file to recognise it
Side = Literal["query", "document"]


class Encoder(registry.Method):
    """Texts to vectors. A method defines `pool`, and `finish` where pooled vectors are not the final ones."""

    fitted: ClassVar[bool] = False  # whether `count` and `fit` must see the passages before any is encoded
    unit: bool = True  # vectors have length 1

    def __init__(self, config: Any, device: str = "cpu"):
        self.config, self.device = config, device

    def count(self, texts: Iterable[str]) -> None:
        """See every text once before any is pooled."""

    @abstractmethod
    def pool(self, texts: Sequence[str]) -> np.ndarray:
        """pooled_NE, float32."""

    def fit(self, blocks: Iterable[np.ndarray]) -> None:
        """See every pooled_NE once before any is finished."""

    def finish(self, pooled_NE: np.ndarray) -> np.ndarray:
        """vectors_ND, float32 (0 for a text without content)."""
        return pooled_NE

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """vectors_ND of passages."""
        return self.finish(self.pool(texts))

    def encode_queries(self, texts: Sequence[str]) -> np.ndarray:
        """vectors_ND of queries."""
        return self.encode(texts)

    def tokens(self, texts: Sequence[str], side: Side = "document") -> list[np.ndarray]:
        """states_TD of every text, for late interaction. Raises `UserError` where there is one vector for a text."""
        raise UserError(
            f"the encoder {self.key} gives one vector for a text; late interaction needs one for each token, such as "
            "sentence-transformers:model=MODEL"
        )

    def state(self) -> dict[str, np.ndarray]:
        """Arrays made by `count` and `fit`."""
        return {}

    def set_state(self, state: dict[str, np.ndarray]) -> None:
        """Restore what `state` gave."""

    @property
    def key(self) -> str:
        return next(m.key for m in registry.methods("encoder").values() if m.module == type(self).__module__)

    def settings(self) -> dict[str, Any]:
        """JSON-able; two encoders with equal settings pool alike once they have counted the same texts."""
        model = getattr(self.config, "model", None)
        return {"method": self.key} | asdict(self.config) | ({"fingerprint": fingerprint(model)} if model else {})

    def save(self, folder: str | Path) -> None:
        """Settings and state; not the model itself."""
        from safetensors.numpy import save_file

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        header = {"format": FORMAT} | self.settings()
        model = getattr(self.config, "model", None)
        if model and Path(model).is_dir() and not sources.is_name(model):  # index and model may move together
            header["relative"] = os.path.relpath(Path(model).resolve(), folder.resolve())
        write_json(folder / "encoder.json", header)
        save_file({k: np.ascontiguousarray(v) for k, v in self.state().items()}, str(folder / "encoder.safetensors"))


def parse(spec: Any) -> Choice:
    """An encoder as it is chosen: `KEY:knob=value,...`, or a bare MODEL (a folder, a known name, a hub id).

    A folder with `modules.json`, or whose config names no causal language model, is taken for a sentence encoder.
    """
    if not isinstance(spec, str) or spec.partition(":")[0] in registry.methods("encoder"):
        return Choice.parse("encoder", spec)
    folder = Path(sources.resolve(spec))
    if folder.is_dir() and not (folder / "config.json").is_file() and not (folder / "modules.json").is_file():
        raise UserError(f"{spec} holds neither modules.json nor config.json; give a model's folder")
    if not folder.exists() and (spec.startswith((".", "/", "~")) or spec.count("/") > 1):
        raise UserError(f"there is no folder {spec}; give a model's folder, or a hub id such as OWNER/NAME")
    if not folder.exists() and "/" not in spec:
        sources.source(spec)  # refuses it with the nearest name
    key = "sentence-transformers"
    if folder.is_dir() and not (folder / "modules.json").is_file():
        named = read_json(folder / "config.json").get("architectures") or []
        key = "decoder" if any(str(a).endswith(("ForCausalLM", "LMHeadModel")) for a in named) else key
    return Choice("encoder", key, {"model": spec})


def make_encoder(spec: Any, *, device: str = "cpu") -> Encoder:
    """An encoder from anything that `parse` reads."""
    made: Encoder = registry.build("encoder", parse(spec), device)
    return made


def load_encoder(folder: str | Path, *, device: str = "cpu", model: str | None = None) -> Encoder:
    """The encoder saved in `folder`; `model`: the new path of its model, if it moved."""
    from safetensors.numpy import load_file

    folder = Path(folder)
    knobs = read_json(folder / "encoder.json")
    if knobs.pop("format", None) != FORMAT or not isinstance(knobs.get("method"), str):
        raise CorruptError(f"{folder / 'encoder.json'} is of another version; build the index again")
    relative, expected = knobs.pop("relative", None), knobs.pop("fingerprint", None)
    was = knobs.get("model")
    if was is not None:
        knobs["model"] = model or was
        if model is None and expected and not Path(was).is_dir() and not sources.is_name(was) and relative:
            knobs["model"] = str((folder / relative).resolve())
        if expected and not Path(sources.resolve(knobs["model"])).is_dir():
            raise UserError(
                f"the encoder's model is not at {knobs['model']} any more; give its new path with: --encoder FOLDER"
            )
        if fingerprint(knobs["model"]) != expected:
            raise UserError(
                f"{knobs['model']} is not the model this index was made with; give that one with --encoder, or build "
                "the index again"
            )
    encoder = make_encoder(knobs, device=device)
    encoder.set_state(load_file(str(folder / "encoder.safetensors")))
    return encoder


def unit(x_ND: np.ndarray) -> np.ndarray:
    """Rows divided by their length; rows of zeros stay."""
    length_N1 = np.linalg.norm(x_ND, axis=1, keepdims=True)
    return (x_ND / np.where(length_N1 > 0, length_N1, 1)).astype(np.float32)


def fingerprint(model: str) -> str | None:
    """16 hex digits of a model folder or known name: small files whole, weights by length and both ends.

    None for a hub id.
    """
    folder = Path(sources.resolve(model))
    if not folder.is_dir():
        return None
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.suffix in (".json", ".safetensors", ".gguf") and p.is_file()):
        digest.update(f"{path.relative_to(folder).as_posix()} {path.stat().st_size} ".encode())
        if path.stat().st_size <= 2 * SAMPLE_BYTES:
            digest.update(sha256(path).encode())
            continue
        with open(path, "rb") as file:
            digest.update(file.read(SAMPLE_BYTES))
            file.seek(-SAMPLE_BYTES, os.SEEK_END)
            digest.update(file.read())
    return digest.hexdigest()[:16]
