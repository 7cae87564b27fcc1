"""A language model that tags the tokens of a context which support a question, for reader `qwenlong-cprs`.

Shape letters: B windows, T tokens, D width, V vocabulary.

Lower layers stay causal; upper ones attend in both directions over what is no padding. Instruction and question come
first, so that causal layers know them at every token of the context. Two heads read the same states: four classes
(B begins a span, I is inside, E ends it, O is outside), and the model's own head as a critic, by the probability of
a tag word at the token itself: labels are not shifted.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modicum.core.errors import UserError
from modicum.core.events import Events
from modicum.core.files import read_json, write_json
from modicum.model.attend import attention, default_positions, pattern_of

B, I, E, O = range(4)  # noqa: E741
INSIDE_WORD, OUTSIDE_WORD = " fact", " other"
_SENTENCE = re.compile(r"(?<=[.!?])\s+|\n+")
Span = tuple[int, int]  # characters, half-open


@dataclass(frozen=True)
class Labelled:
    """A context with the spans of characters that support the question."""

    question: str
    context: str
    spans: Sequence[Span]


class MixedAttend:
    """Causal below layer `both_from`, both directions from there on; padding is never seen."""

    def __init__(self, both_from: int, mask_BT: Tensor):
        self.both_from = both_from
        T = mask_BT.shape[1]
        itself_TT = torch.eye(T, dtype=torch.bool, device=mask_BT.device)  # so that padding's own softmax is defined
        self.real_B1T, self.itself_TT = mask_BT.bool()[:, None, :], itself_TT

    def __call__(
        self,
        layer: int,
        q_BHTE: Tensor,
        k_BGSE: Tensor,
        v_BGSE: Tensor,
        *,
        window: int | None,
        scale: float,
        softcap: float | None,
        pattern: Any = None,
    ) -> Tensor:
        if pattern is not None:
            raise UserError("a tagger needs a model whose layers have no attention pattern of their own; give another")
        seen_BTS = self.real_B1T
        if layer < self.both_from:
            at_T = torch.arange(q_BHTE.shape[2], device=q_BHTE.device)
            seen_BTS = seen_BTS & pattern_of(window).allowed(at_T[:, None], at_T[None])
        seen_BTS = seen_BTS | self.itself_TT
        return attention(q_BHTE, k_BGSE, v_BGSE, scale=scale, softcap=softcap, mask=seen_BTS[:, None])


class Tagger(nn.Module):
    """A decoder with the classes' head. `Tagger.new(folder)` from a language model, `Tagger.open` from a tagger's."""

    def __init__(self, model: Any, tokenizer: Any, both_from: int | None = None, window: int = 1024):
        super().__init__()
        depth = len(model.layers)
        self.model, self.tokenizer, self.window = model, tokenizer, window
        self.both_from = depth * 3 // 4 if both_from is None else both_from
        if not 0 <= self.both_from <= depth:
            raise UserError(f"both_from={both_from} is no layer of a model of {depth}; give 0 to {depth}")
        self.classes = nn.Linear(model.config.width, 4)
        nn.init.normal_(self.classes.weight, std=0.02)
        nn.init.zeros_(self.classes.bias)
        words = [tokenizer.encode(w, specials=False) for w in (INSIDE_WORD, OUTSIDE_WORD)]
        self.words = (words[0][0], words[1][0])
        if self.words[0] == self.words[1]:
            raise UserError("the tokenizer begins both tag words with one token; give a model of a larger vocabulary")

    @classmethod
    def new(cls, path: str, *, both_from: int | None = None, window: int = 1024, device: str = "cpu") -> Tagger:
        from modicum.data.tokenizer import Tokenizer
        from modicum.model.folder import find_folder, load_model

        folder = find_folder(path)
        dtype = torch.float32 if device == "cpu" else None
        return cls(load_model(folder, dtype=dtype, device=device), Tokenizer.load(folder), both_from, window).to(device)

    @classmethod
    def open(cls, folder: str | Path, device: str = "cpu") -> Tagger:
        from safetensors.torch import load_file

        folder = Path(folder)
        if not (folder / "tagger.json").is_file():
            raise UserError(f"{folder} has no tagger.json; train one with retrieve.tagger.fit and save it")
        shape = read_json(folder / "tagger.json")
        made = cls.new(str(folder / "model"), both_from=shape["both_from"], window=shape["window"], device=device)
        made.classes.load_state_dict(load_file(folder / "classes.safetensors"))
        return made.eval()

    def save(self, folder: str | Path) -> None:
        """A folder for `open`; it appears whole or not at all."""
        from safetensors.torch import save_file

        from modicum.core.files import atomic_directory
        from modicum.model.folder import save_model

        with atomic_directory(folder) as target:
            save_model(self.model, target / "model")
            self.tokenizer.save(target / "model")
            save_file(
                {n: p.detach().contiguous() for n, p in self.classes.state_dict().items()},
                target / "classes.safetensors",
            )
            write_json(target / "tagger.json", {"both_from": self.both_from, "window": self.window})

    def forward(self, tokens_BT: Tensor, mask_BT: Tensor) -> tuple[Tensor, Tensor]:
        """(logits of the classes, (B, T, 4); log-probabilities of the two tag words, (B, T, 2))."""
        h_BTD = self.model.hidden(
            tokens_BT,
            positions_BT=default_positions(tokens_BT, mask_BT=mask_BT),
            attend=MixedAttend(self.both_from, mask_BT),
        )
        critic_BT2 = self.model.head(h_BTD)[..., list(self.words)].log_softmax(-1)
        return self.classes(h_BTD), critic_BT2

    def prefix(self, question: str) -> list[int]:
        text = f"Tag the supporting facts with 'fact'.\nQuestion: {question}\nContext:\n"
        return [self.tokenizer.start_id, *self.tokenizer.encode(text, specials=False)]

    def windows(self, context: str, taken: int) -> list[tuple[list[int], list[Span]]]:
        """(token ids, their characters in the context) of windows that end at sentences where they can."""
        encoding = self.tokenizer.backend.encode(context, add_special_tokens=False)
        ids, offsets = list(encoding.ids), list(encoding.offsets)
        ends = {m.start() for m in _SENTENCE.finditer(context)}
        size = max(self.window - taken, 8)
        parts, start = [], 0
        while start < len(ids):
            stop = min(start + size, len(ids))
            if stop < len(ids):
                at = [t for t in range(start + 1, stop + 1) if offsets[t - 1][1] in ends]
                stop = at[-1] if at else stop
            parts.append((ids[start:stop], offsets[start:stop]))
            start = stop
        return parts

    @torch.inference_mode()
    def tags(self, question: str, context: str) -> tuple[np.ndarray, np.ndarray, list[Span]]:
        """(class, critic's probability of the tag word, characters) of every token of the context."""
        prefix = self.prefix(question)
        classes, critic, offsets = [], [], list[Span]()
        for ids, part in self.windows(context, len(prefix)):
            tokens_BT = torch.tensor([[*prefix, *ids]], device=self.classes.weight.device)
            logits_BT4, critic_BT2 = self(tokens_BT, torch.ones_like(tokens_BT, dtype=torch.bool))
            classes.append(logits_BT4[0, len(prefix) :].argmax(-1).cpu().numpy())  # the prefix's own are cut off
            critic.append(critic_BT2[0, len(prefix) :, 0].exp().cpu().numpy())
            offsets += part
        empty = np.empty(0)
        return (np.concatenate(classes) if classes else empty, np.concatenate(critic) if critic else empty, offsets)


def labels(offsets: Sequence[Span], spans: Sequence[Span]) -> np.ndarray:
    """The class of every token, from spans of characters; a span of one token is B."""
    tags_T = np.full(len(offsets), O)
    for start, end in spans:
        inside = [t for t, (a, b) in enumerate(offsets) if a < end and b > start and a < b]
        if inside:
            tags_T[inside] = I
            tags_T[inside[-1]] = E
            tags_T[inside[0]] = B
    return tags_T


def joined(tags_T: Sequence[int], gap: int = 20, least: int = 5) -> list[Span]:
    """Spans of tokens, half-open: runs of B, I and E with gaps of fewer than `gap` O inside, `least` tokens or more.

    A gap is filled only within one span: where B follows, a new one begins.
    """
    spans: list[list[int]] = []
    ended = True  # whether the last span had its E
    for t, tag in enumerate(tags_T):
        if tag == O:
            continue
        distance = t - spans[-1][1] if spans else gap
        if tag == B or distance >= gap or (ended and distance):
            spans.append([t, t + 1])
        else:
            spans[-1][1] = t + 1
        ended = tag == E
    return [(a, b) for a, b in spans if b - a >= least]


def sentences(context: str) -> list[Span]:
    """Characters of every sentence, white space after it left out."""
    parts, start = [], 0
    for match in [*_SENTENCE.finditer(context), None]:
        end = len(context) if match is None else match.start()
        if context[start:end].strip():
            parts.append((start, end))
        start = end if match is None else match.end()
    return parts


def loss(
    tagger: Tagger, batch: Sequence[Labelled], *, weights: Sequence[float] = (1.0, 1.0, 1.0, 0.5), critic: float = 1.0
) -> Tensor:
    """CE of the classes, weighted by class, + `critic` CE of the tag word at each token; context tokens alone."""
    rows = []
    for item in batch:
        prefix = tagger.prefix(item.question)
        ids, offsets = tagger.windows(item.context, len(prefix))[0]
        rows.append(([*prefix, *ids], len(prefix), labels(offsets, item.spans)))
    width = max(len(ids) for ids, _, _ in rows)
    device = tagger.classes.weight.device
    tokens_BT = torch.full((len(rows), width), tagger.tokenizer.pad_id)
    mask_BT = torch.zeros((len(rows), width), dtype=torch.bool)
    target_BT = torch.full((len(rows), width), -100)
    for b, (ids, first, tags_T) in enumerate(rows):
        tokens_BT[b, : len(ids)] = torch.tensor(ids)
        mask_BT[b, : len(ids)] = True
        target_BT[b, first : len(ids)] = torch.from_numpy(tags_T)
    target_BT = target_BT.to(device)
    logits_BT4, critic_BT2 = tagger(tokens_BT.to(device), mask_BT.to(device))
    own = F.cross_entropy(logits_BT4.flatten(0, 1), target_BT.flatten(), weight=torch.tensor(weights, device=device))
    word_BT = torch.where(target_BT == -100, -100, (target_BT == O).long())
    return own + critic * F.nll_loss(critic_BT2.flatten(0, 1), word_BT.flatten())


def fit(
    tagger: Tagger,
    examples: Sequence[Labelled],
    *,
    steps: int = 200,
    batch: int = 4,
    lr: float = 2e-4,
    seed: int = 0,
    weights: Sequence[float] = (1.0, 1.0, 1.0, 0.5),
    events: Events | None = None,
) -> list[float]:
    """Train the layers that attend in both directions, the final norm and the classes; the others stay frozen."""
    tagger.model.requires_grad_(False)
    for layer in tagger.model.layers[tagger.both_from :]:
        layer.requires_grad_(True)
    tagger.model.norm.requires_grad_(True)
    parameters = [p for p in tagger.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.01)
    events, losses = events or Events(), list[float]()
    tagger.train()
    with events.progress("train tagger", steps, "steps") as progress:
        for step in range(steps):
            rows = np.random.default_rng([seed, step]).permutation(len(examples))[:batch]
            value = loss(tagger, [examples[i] for i in rows], weights=weights)
            optimizer.zero_grad()
            value.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.param_groups[0]["lr"] = lr * min(1.0, 10 * (step + 1) / steps, 2 * (1 - step / steps))
            optimizer.step()
            losses.append(float(value.detach()))
            progress.update(1, loss=losses[-1])
    tagger.eval()
    return losses
