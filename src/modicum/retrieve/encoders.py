"""Texts to unit vectors: any sentence-transformers model, a decoder with a closed-form head, or no model at all.

Shape letters: N texts, B batch, T tokens, L layers taken, E = L * width of the pooled vectors, D of the final ones.

An encoder works in two steps so that a long encoding can be resumed: `pool` is the expensive one and needs only what
`count` has seen; `fit` and `finish` turn pooled vectors into final ones and cost two passes over an array.
"""

from __future__ import annotations

import hashlib
import inspect
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from modicum.core.errors import CorruptError, MissingExtra, UserError, unknown
from modicum.core.files import read_json, sha256, write_json
from modicum.retrieve.latent import Latent
from modicum.retrieve.whiten import Whitener

SAMPLE_BYTES = 1 << 20   # read from each end of a weight file to recognise it


class Encoder(ABC):
    """What an index asks of an encoder. `model` is a folder or a hub id."""

    kind: ClassVar[str]
    model: str

    def count(self, texts: Iterable[str]) -> None:  # noqa: B027 - most encoders need no statistics
        """See every text once before any is pooled."""

    @abstractmethod
    def pool(self, texts: Sequence[str]) -> np.ndarray:
        """pooled_NE, float32."""

    def fit(self, blocks: Iterable[np.ndarray]) -> None:  # noqa: B027
        """See every pooled_NE once before any is finished."""

    @abstractmethod
    def finish(self, pooled_NE: np.ndarray) -> np.ndarray:
        """vectors_ND, float32 of length 1 (0 for a text without content)."""

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """vectors_ND of passages."""
        return self.finish(self.pool(texts))

    def encode_queries(self, texts: Sequence[str]) -> np.ndarray:
        """vectors_ND of queries."""
        return self.encode(texts)

    def settings(self) -> dict[str, Any]:
        """JSON-able; two encoders with equal settings pool alike once they have counted the same texts."""
        return {"kind": self.kind, "model": self.model, "model_fingerprint": fingerprint(self.model)}

    def state(self) -> dict[str, np.ndarray]:
        """Arrays made by `count` and `fit`."""
        return {}

    def set_state(self, state: dict[str, np.ndarray]) -> None:  # noqa: B027
        """Restore what `state` gave."""

    def save(self, folder: str | Path) -> None:
        """Settings and state; not the model itself."""
        from safetensors.numpy import save_file
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        here = self.settings()
        if Path(self.model).is_dir():   # found again when index and model move together
            here["relative"] = os.path.relpath(Path(self.model).resolve(), folder.resolve())
        write_json(folder / "encoder.json", here)
        save_file({k: np.ascontiguousarray(v) for k, v in self.state().items()}, str(folder / "encoder.safetensors"))


class SentenceTransformerEncoder(Encoder):
    """Any model of the `sentence-transformers` library; its own prompts for queries and documents are used."""

    kind = "sentence-transformers"

    def __init__(self, model: str | Path, *, device: str = "cpu", batch: int = 64):
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError:
            raise MissingExtra("sentence-transformers", "encoders", f"the encoder {model}") from None
        self.model, self.batch = str(model), batch
        try:
            self._model = SentenceTransformer(self.model, device=device, trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise UserError(f"{model} does not open as an encoder ({str(error).splitlines()[0]}); give a folder or a "
                            "hub id of a sentence-transformers model, or decoder:FOLDER for a language model") from None

    def _vectors(self, encode: Any, texts: Sequence[str]) -> np.ndarray:
        return unit(np.asarray(encode(list(texts), batch_size=self.batch, show_progress_bar=False,
                                      convert_to_numpy=True), np.float32))

    def pool(self, texts: Sequence[str]) -> np.ndarray:
        return self._vectors(self._model.encode_document, texts)

    def finish(self, pooled_NE: np.ndarray) -> np.ndarray:
        return pooled_NE

    def encode_queries(self, texts: Sequence[str]) -> np.ndarray:
        return self._vectors(self._model.encode_query, texts)


class LatentEncoder(Encoder):
    """No model at all: latent semantic analysis of the passages (see `Latent`); `model` is the number of directions."""

    kind = "lsa"

    def __init__(self, model: str | Path = "256", *, device: str = "cpu"):
        self.model = str(model)
        if not self.model.isdecimal() or int(self.model) < 1:
            raise UserError(f"lsa:{model} does not say how many directions to keep; write for example lsa:256")
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


class DecoderEncoder(Encoder):
    """Hidden states of a decoder, averaged with frequency weights, whitened on the passages, beside their latent terms.

        v(s) = sum_t w(t) h_t / sum_t w(t)        w(t) = sif / (sif + p(t))        p from the passages
        u(s) = [sqrt(1 - share) * unit(W (v(s) - mean)),  sqrt(share) * unit(latent(s))]

    so that the inner product of two texts is a weighted mean of two cosines: of what the model makes of them, and
    of the words they use in the passages' own terms (see `Latent`). The weights are SIF's (Arora et al. 2017, ICLR), the
    removal of what all vectors share is Mu and Viswanath's (2018, arXiv:1702.01417), whitening and the mix of a low and a
    high layer are WhiteningBERT's (Huang et al. 2021, arXiv:2104.01767). Nothing is trained. Departs from them: every
    h_t is scaled to length 1 first, so that the few huge states a decoder makes do not drown the rest; a start
    token is put in front and left out of the average; the latent terms are added, which carry a small model.

    layers: 0 is the embeddings, i the output of layer i, -1 the state after the final norm. latent: number of latent
    directions, 0 for the hidden states alone. share: their weight. dims: most dimensions kept of the hidden states.
    Texts are cut to `max_tokens` for the model. A model of a few million parameters does as well with layers (0, 1), for a
    fraction of the time; a large one has more to say in its upper layers. `batch_tokens` bounds the padded tokens of one forward pass.
    """

    kind = "decoder"

    def __init__(self, model: str | Path, *, layers: Sequence[int] = (1, -1), sif: float = 1e-3, whiten: float = 1.0,
                 remove: int = 0, dims: int = 512, latent: int = 256, share: float = 0.6, max_tokens: int = 512, batch_tokens: int = 8192, device: str = "cpu"):
        import torch

        from modicum.data.tokenizer import Tokenizer
        from modicum.model.folder import load_model
        self.model = str(model)
        self.tokenizer = Tokenizer.load(self.model)
        self._decoder = load_model(self.model, dtype=torch.float32 if device == "cpu" else None, device=device).eval()
        config = self._decoder.config
        depth = config.layers
        for layer in layers:
            if not -1 <= layer <= depth:
                raise unknown("layer", layer, range(-1, depth + 1), f"{model} has {depth} layers; -1 is the last state")
        if not layers:
            raise UserError("layers=() takes no hidden state; write for example layers=(0, -1)")
        self.layers, self.sif, self.batch_tokens = tuple(layers), sif, batch_tokens
        self.max_tokens = min(max_tokens, config.context_length - 1)
        if not 0 <= share <= 1:
            raise UserError(f"share={share} is not between 0 (hidden states alone) and 1 (latent terms alone)")
        self.whitener, self.share = Whitener(power=whiten, remove=remove, dims=dims), share
        self.latent = Latent(latent if share else 0)
        self.counts_V = np.zeros(config.vocab_size, np.int64)

    def settings(self) -> dict[str, Any]:
        return super().settings() | {
            "layers": list(self.layers), "sif": self.sif, "whiten": self.whitener.power, "remove": self.whitener.remove,
            "dims": self.whitener.dims, "latent": self.latent.wanted, "share": self.share,
            "max_tokens": self.max_tokens, "batch_tokens": self.batch_tokens}

    def _tokens(self, texts: Sequence[str]) -> list[np.ndarray]:
        # Cut characters first: a text of megabytes would be tokenized for its first max_tokens only.
        heads = [t[: 16 * self.max_tokens] for t in texts]
        return [np.array(ids[: self.max_tokens], np.int64) for ids in self.tokenizer.encode_batch(heads, specials=False)]

    def count(self, texts: Iterable[str]) -> None:
        from modicum.retrieve.passages import grouped
        self.counts_V[:] = 0
        for group in grouped(self.latent.watch(texts) if self.latent.wanted else texts, 1024):
            ids = np.concatenate(self._tokens(group)) if group else np.empty(0, np.int64)
            self.counts_V += np.bincount(ids, minlength=len(self.counts_V))

    def weights(self) -> np.ndarray:
        """weights_V, float32; a token never counted weighs 1, the most."""
        p_V = self.counts_V / max(int(self.counts_V.sum()), 1)
        return (self.sif / (self.sif + p_V)).astype(np.float32)

    def pool(self, texts: Sequence[str]) -> np.ndarray:
        import torch
        rows = self._tokens(texts)
        weights_V = torch.from_numpy(self.weights())
        pooled_NE = np.zeros((len(rows), self._hidden), np.float32)
        with torch.inference_mode():
            for batch in self._batches([len(r) for r in rows]):
                lengths_B = torch.tensor([len(rows[i]) for i in batch])
                T = int(lengths_B.max())
                tokens_BT = torch.full((len(batch), T + 1), self.tokenizer.start_id)
                for b, i in enumerate(batch):   # padding stands on the right, where causal states do not see it
                    tokens_BT[b, 1:len(rows[i]) + 1] = torch.from_numpy(rows[i])
                w_BT = weights_V[tokens_BT[:, 1:]] * (torch.arange(T) < lengths_B[:, None])
                w_BT = (w_BT / w_BT.sum(1, keepdim=True)).to(self._decoder.device)
                parts = [torch.einsum("bt,btd->bd", w_BT, torch.nn.functional.normalize(h_BTD[:, 1:].float(), dim=-1))
                         for h_BTD in self._states(tokens_BT.to(self._decoder.device))]
                pooled_NE[batch] = torch.cat(parts, dim=-1).cpu().numpy()
        return np.hstack([pooled_NE, self.latent(texts)]) if self.latent.dim else pooled_NE

    @property
    def _hidden(self) -> int:
        """Columns of a pooled vector that come from hidden states; the rest are latent terms."""
        return len(self.layers) * int(self._decoder.config.width)

    def _batches(self, lengths: list[int]) -> Iterator[list[int]]:
        """Indices of texts that have tokens, alike in length, at most `batch_tokens` with padding."""
        batch: list[int] = []
        for i in sorted((i for i, n in enumerate(lengths) if n), key=lambda i: lengths[i]):
            if batch and (len(batch) + 1) * (lengths[i] + 1) > self.batch_tokens:
                yield batch
                batch = []
            batch.append(i)
        if batch:
            yield batch

    def _states(self, tokens_BT: Any) -> list[Any]:
        """h_BTD of each chosen layer; layers above the highest chosen one are not computed."""
        kept: dict[int, Any] = {}
        hooks = []
        highest = max(self.layers) if -1 not in self.layers else None

        def keep(layer: int, state: Any) -> None:
            kept[layer] = state
            if layer == highest:
                raise _Enough

        for layer in {i for i in self.layers if i >= 0}:
            module = self._decoder.embed if layer == 0 else self._decoder.layers[layer - 1]
            hooks.append(module.register_forward_hook(lambda _m, _i, out, layer=layer: keep(layer, out)))
        try:
            kept[-1] = self._decoder.hidden(tokens_BT)
        except _Enough:
            pass
        finally:
            for hook in hooks:
                hook.remove()
        return [kept[layer] for layer in self.layers]

    def fit(self, blocks: Iterable[np.ndarray]) -> None:
        self.whitener.fit(pooled_NE[:, :self._hidden] for pooled_NE in blocks)

    def finish(self, pooled_NE: np.ndarray) -> np.ndarray:
        hidden_NE, latent_NE = unit(self.whitener(pooled_NE[:, :self._hidden])), pooled_NE[:, self._hidden:]
        if not latent_NE.shape[1]:
            return hidden_NE
        return unit(np.hstack([(1 - self.share) ** 0.5 * hidden_NE, self.share ** 0.5 * unit(latent_NE)]))

    def state(self) -> dict[str, np.ndarray]:
        return {"counts": self.counts_V} | self.whitener.state() | self.latent.state()

    def set_state(self, state: dict[str, np.ndarray]) -> None:
        if state["counts"].shape != self.counts_V.shape:
            raise CorruptError(f"the encoder's statistics are for {state['counts'].shape[0]} tokens, {self.model} has "
                               f"{len(self.counts_V)}; build the index again")
        self.counts_V = state["counts"].copy()
        self.whitener.set_state(state)
        self.latent.set_state(state)


class _Enough(Exception):  # noqa: N818 - a signal, not an error
    """The last hidden state that is wanted has been computed."""


def unit(x_ND: np.ndarray) -> np.ndarray:
    """Rows divided by their length; rows of zeros stay."""
    length_N1 = np.linalg.norm(x_ND, axis=1, keepdims=True)
    return (x_ND / np.where(length_N1 > 0, length_N1, 1)).astype(np.float32)


KINDS: dict[str, Any] = {c.kind: c for c in (SentenceTransformerEncoder, LatentEncoder, DecoderEncoder)}


def make_encoder(spec: str, *, device: str = "cpu", **knobs: Any) -> Encoder:
    """From `decoder:FOLDER`, `sentence-transformers:MODEL`, `lsa` (`lsa:256`), or a bare folder or hub id, which is looked at.

    A folder with `modules.json`, or whose config names no causal language model, is taken for an encoder.
    """
    kind, _, rest = spec.partition(":")
    if kind in KINDS and (rest or kind == LatentEncoder.kind):
        return _construct(KINDS[kind], rest or "256", device, knobs)
    folder = Path(spec)
    if folder.is_dir() and not (folder / "config.json").is_file() and not (folder / "modules.json").is_file():
        raise UserError(f"{spec} holds neither modules.json nor config.json; give a model's folder")
    if not folder.exists() and (spec.startswith((".", "/", "~")) or spec.count("/") > 1):
        raise UserError(f"there is no folder {spec}; give a model's folder, or a hub id such as OWNER/NAME")
    if folder.is_dir() and not (folder / "modules.json").is_file():
        named = read_json(folder / "config.json").get("architectures") or []
        if any(str(a).endswith(("ForCausalLM", "LMHeadModel")) for a in named):
            return _construct(DecoderEncoder, folder, device, knobs)
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
    """The encoder saved in `folder`; `model` says where its model is now, if it moved."""
    from safetensors.numpy import load_file
    folder = Path(folder)
    saved = read_json(folder / "encoder.json")
    kind, was, relative = saved.pop("kind"), saved.pop("model"), saved.pop("relative", None)
    expected = saved.pop("model_fingerprint")
    if kind not in KINDS:
        raise unknown("encoder kind", kind, KINDS)
    place = model or was
    if model is None and expected is not None and not Path(was).is_dir() and relative:
        place = str((folder / relative).resolve())
    if expected is not None and not Path(place).is_dir():
        raise UserError(f"the encoder's model is not at {place} any more; say where it is with: --encoder FOLDER")
    if fingerprint(place) != expected:
        raise UserError(f"{place} is not the model this index was made with; point --encoder at that one, "
                        "or build the index again")
    encoder = _construct(KINDS[kind], place, device, saved)
    encoder.set_state(load_file(str(folder / "encoder.safetensors")))
    return encoder


def fingerprint(model: str) -> str | None:
    """16 hex digits of a model folder: its small files whole, its weights by length and both ends. None for a hub id."""
    folder = Path(model)
    if not folder.is_dir():
        return None
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.suffix in (".json", ".safetensors") and p.is_file()):
        digest.update(f"{path.relative_to(folder).as_posix()} {path.stat().st_size} ".encode())
        if path.stat().st_size <= 2 * SAMPLE_BYTES:
            digest.update(sha256(path).encode())
            continue
        with open(path, "rb") as file:
            digest.update(file.read(SAMPLE_BYTES))
            file.seek(-SAMPLE_BYTES, os.SEEK_END)
            digest.update(file.read())
    return digest.hexdigest()[:16]
