"""decoder: hidden states of a language model, with a head in closed form.

Shape letters: N texts, B batch, T tokens, D width of the model, E dimensions of pooled vectors, V vocabulary.

    v(s) = sum_t w(t) h_t / sum_t w(t)        w(t) = sif / (sif + p(t))        p from the passages
    u(s) = [sqrt(1 - a) * unit(W (v(s) - mean)),  sqrt(a) * unit(latent(s))]          a = latent_weight

so that the inner product of two texts is a weighted mean of two cosines: of their hidden states, and of
their words in latent semantic space (see `data.latent`). The weights are SIF's (Arora et al. 2017,
ICLR), the removal of common components is Mu and Viswanath's (2018, arXiv:1702.01417), whitening and
the mix of a low and a high layer are WhiteningBERT's (Huang et al. 2021, arXiv:2104.01767). Nothing is
trained. Departs from them: every h_t is scaled to length 1 first, so that the few states of huge norm do
not dominate; a start token is put in front and left out of the average; the latent terms are added, which
give most of the quality with a small model.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from modicum.core.errors import CorruptError, unknown
from modicum.data.latent import Latent
from modicum.retrieve.encoders import Encoder, unit
from modicum.retrieve.passages import grouped
from modicum.retrieve.whiten import Whitener

SMALL = 100_000_000  # parameters


@dataclass(frozen=True, kw_only=True)
class Config:
    model: str  # a folder or a known name such as smollm2
    # 0: the embeddings, i: the output of layer i, -1: the state after the final norm; layers above the highest one
    # named are not computed. None: (0, 1) below `SMALL` parameters, where upper layers add nothing, and (1, -1) above.
    layers: tuple[int, ...] | None = None
    sif: Annotated[float, Field(gt=0)] = 1e-3  # weight of frequent tokens: smaller, less
    whiten: float = 1.0  # 0: centre only, 1: whiten fully
    remove: Annotated[int, Field(ge=0)] = 0  # leading common components removed
    dims: Annotated[int, Field(ge=1)] = 512  # most dimensions kept of the hidden states
    latent: Annotated[int, Field(ge=0)] = 512  # latent directions; 0: the hidden states alone
    latent_weight: Annotated[float, Field(ge=0, le=1)] = 0.6  # 0: hidden states alone, 1: latent terms alone
    max_tokens: Annotated[int, Field(ge=1)] = 512  # texts are truncated to so many
    batch_tokens: Annotated[int, Field(ge=1)] = 8192  # padded tokens of one forward pass

    def __post_init__(self) -> None:
        if self.layers is not None and not self.layers:
            raise ValueError("layers=[] takes no hidden state; write for example layers=[1,-1]")


SWEEP = ("model=smollm2",)


class DecoderEncoder(Encoder):
    config: Config
    fitted = True

    def __init__(self, config: Any, device: str = "cpu"):
        import torch

        from modicum.data.tokenizer import Tokenizer
        from modicum.model.folder import find_folder, load_model

        super().__init__(config, device)
        model_folder = find_folder(config.model)
        self.tokenizer = Tokenizer.load(model_folder)
        self._decoder = load_model(model_folder, dtype=torch.float32 if device == "cpu" else None, device=device).eval()
        depth = self._decoder.config.layers
        layers = config.layers
        if layers is None:
            layers = (0, 1) if sum(p.numel() for p in self._decoder.parameters()) < SMALL else (1, -1)
        for layer in layers:
            if not -1 <= layer <= depth:
                allowed = range(-1, depth + 1)
                raise unknown("layer", layer, allowed, f"{config.model} has {depth} layers; -1 is the last state")
        self.layers = tuple(layers)
        self.max_tokens = min(config.max_tokens, self._decoder.config.context_length - 1)
        self.whitener = Whitener(power=config.whiten, remove=config.remove, dims=config.dims)
        self.latent = Latent(config.latent if config.latent_weight else 0)
        self.counts_V = np.zeros(self._decoder.config.vocab_size, np.int64)

    def _tokens(self, texts: Sequence[str]) -> list[np.ndarray]:
        # Cut characters first: a text of megabytes would be tokenized for its first max_tokens only.
        heads = [t[: 16 * self.max_tokens] for t in texts]
        encoded = self.tokenizer.encode_batch(heads, specials=False)
        return [np.array(ids[: self.max_tokens], np.int64) for ids in encoded]

    def count(self, texts: Iterable[str]) -> None:
        self.counts_V[:] = 0
        for group in grouped(self.latent.watch(texts) if self.latent.wanted else texts, 1024):
            ids = np.concatenate(self._tokens(group)) if group else np.empty(0, np.int64)
            self.counts_V += np.bincount(ids, minlength=len(self.counts_V))

    def weights(self) -> np.ndarray:
        """weights_V, float32; a token never counted has the largest weight, 1."""
        p_V = self.counts_V / max(int(self.counts_V.sum()), 1)
        return (self.config.sif / (self.config.sif + p_V)).astype(np.float32)

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
                for b, i in enumerate(batch):  # padding is on the right, where causal states do not attend to it
                    tokens_BT[b, 1 : len(rows[i]) + 1] = torch.from_numpy(rows[i])
                w_BT = weights_V[tokens_BT[:, 1:]] * (torch.arange(T) < lengths_B[:, None])
                w_BT = (w_BT / w_BT.sum(1, keepdim=True)).to(self._decoder.device)
                pooled_layers = [
                    torch.einsum("bt,btd->bd", w_BT, torch.nn.functional.normalize(h_BTD[:, 1:].float(), dim=-1))
                    for h_BTD in self._states(tokens_BT.to(self._decoder.device))
                ]
                pooled_NE[batch] = torch.cat(pooled_layers, dim=-1).cpu().numpy()
        return np.hstack([pooled_NE, self.latent(texts)]) if self.latent.dim else pooled_NE

    @property
    def _hidden(self) -> int:
        """Columns of a pooled vector that come from hidden states; the rest are latent terms."""
        return len(self.layers) * int(self._decoder.config.width)

    def _batches(self, lengths: list[int]) -> Iterator[list[int]]:
        """Indices of texts that have tokens, alike in length, at most `batch_tokens` with padding."""
        batch: list[int] = []
        for i in sorted((i for i, n in enumerate(lengths) if n), key=lambda i: lengths[i]):
            if batch and (len(batch) + 1) * (lengths[i] + 1) > self.config.batch_tokens:
                yield batch
                batch = []
            batch.append(i)
        if batch:
            yield batch

    def _states(self, tokens_BT: Any) -> list[Any]:
        """h_BTD of each chosen layer; layers above the highest chosen one are not computed."""
        states: dict[int, Any] = {}
        hooks = []
        highest = max(self.layers) if -1 not in self.layers else None

        def keep(layer: int, state: Any) -> None:
            states[layer] = state
            if layer == highest:
                raise _Enough

        for layer in {i for i in self.layers if i >= 0}:
            module = self._decoder.embed if layer == 0 else self._decoder.layers[layer - 1]
            hooks.append(module.register_forward_hook(lambda _m, _i, out, layer=layer: keep(layer, out)))
        try:
            states[-1] = self._decoder.hidden(tokens_BT)
        except _Enough:
            pass
        finally:
            for hook in hooks:
                hook.remove()
        return [states[layer] for layer in self.layers]

    def fit(self, blocks: Iterable[np.ndarray]) -> None:
        self.whitener.fit(pooled_NE[:, : self._hidden] for pooled_NE in blocks)

    def finish(self, pooled_NE: np.ndarray) -> np.ndarray:
        hidden_NE, latent_NE = unit(self.whitener(pooled_NE[:, : self._hidden])), pooled_NE[:, self._hidden :]
        if not latent_NE.shape[1]:
            return hidden_NE
        return unit(
            np.hstack(
                [(1 - self.config.latent_weight) ** 0.5 * hidden_NE, self.config.latent_weight**0.5 * unit(latent_NE)]
            )
        )

    def state(self) -> dict[str, np.ndarray]:
        return {"counts": self.counts_V} | self.whitener.state() | self.latent.state()

    def set_state(self, state: dict[str, np.ndarray]) -> None:
        if state["counts"].shape != self.counts_V.shape:
            raise CorruptError(
                f"the encoder's statistics are for {state['counts'].shape[0]} tokens, {self.config.model} has "
                f"{len(self.counts_V)}; build the index again"
            )
        self.counts_V = state["counts"].copy()
        self.whitener.set_state(state)
        self.latent.set_state(state)


class _Enough(Exception):
    """The last requested hidden state has been computed: stop the forward pass."""
