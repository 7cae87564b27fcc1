"""A modular encoder: weights that all languages have in common, and adapters of each language in every layer.

Shape letters: N texts, T tokens, D width, E dimensions of token vectors.

    y <- y + U_lang s(D_lang y)        after the feed-forward network of every layer, chosen for each text

Pfeiffer et al. 2022 (X-MOD), arXiv:2205.06266. `pretrain` learns masked words with every text under its own language's
adapter; `learn_language` adds one later, with all else frozen. A new adapter changes nothing: U starts at 0.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modicum.core.errors import UserError, unknown
from modicum.core.events import Events
from modicum.core.files import read_json, write_json
from modicum.retrieve.connected import Bottleneck
from modicum.retrieve.student import Student
from modicum.retrieve.trainers._masking import MaskedHead, drawn_mask, predicted

FILE, WEIGHTS, BASE = "languages.json", "languages.safetensors", "base"
# Frequent short words, by which languages of one script are distinguished.
_WORDS = {
    "en": "the of and to is in that for with what which how",
    "de": "der die das und ist nicht ein eine zu mit wer wie",
    "fr": "le la les des et est une du dans que qui pour",
    "es": "el la los las de que y en es una por como",
    "it": "il la di che e un una per con sono del non",
    "pt": "o a os de que e do da em um uma não",
    "vi": "của và là các có được trong cho người không",
    "ro": "și de în la care este un o cu pentru din nu",
    "tr": "ve bir bu için ile da de olarak ne olan",
}
_COMMON = {lang: frozenset(words.split()) for lang, words in _WORDS.items()}
_SCRIPTS = {"GREEK": "el", "CYRILLIC": "ru", "ARABIC": "ar", "DEVANAGARI": "hi", "THAI": "th", "HIRAGANA": "ja",
            "KATAKANA": "ja", "HANGUL": "ko", "HEBREW": "he", "CJK": "zh"}  # fmt: skip


def detect(text: str, languages: Sequence[str]) -> str:
    """One of `languages` by script, then by frequent words; the first of them where nothing speaks for another."""
    counts = dict.fromkeys(languages, 0)
    letters = [c for c in text[:400] if c.isalpha()]
    for c in letters:
        lang = _SCRIPTS.get(unicodedata.name(c, "").split(" ")[0].split("-")[0])
        if lang in counts:
            counts[lang] += 1
    if not letters or max(counts.values()) * 2 < len(letters):  # no script of its own
        words = re.findall(r"\w+", text.lower()[:2000])
        counts = {lang: sum(w in _COMMON.get(lang, ()) for w in words) for lang in languages}
    return max(languages, key=lambda lang: counts[lang])  # the first of equals


class LanguageAdapters(nn.Module):
    """Adapters of an encoder of the BERT family. `speaking` sets whose are used, text by text."""

    def __init__(self, width: int, layers: int, rank: int, languages: Sequence[str]):
        super().__init__()
        self.shape = {"width": width, "layers": layers, "rank": rank}
        self.of = nn.ModuleDict()
        self._spoken: list[str] | None = None
        for language in languages:
            self.add(language)

    @property
    def languages(self) -> list[str]:
        return list(self.of)

    def add(self, language: str) -> None:
        """Fresh adapters of one more language, which change nothing yet."""
        if language in self.of:
            raise UserError(f"the encoder has adapters of {language!r} already; train those")
        c = self.shape
        self.of[language] = nn.ModuleList(Bottleneck(c["width"], c["rank"]) for _ in range(c["layers"]))

    def attach(self, model: Any) -> None:
        stack = getattr(getattr(model, "encoder", None), "layer", None)
        if stack is None or len(stack) != self.shape["layers"]:
            raise UserError(f"these adapters are for an encoder of the BERT family with {self.shape['layers']} layers")
        for n, layer in enumerate(stack):
            layer.output.register_forward_hook(lambda _m, _i, y_NTD, n=n: self._adapted(n, y_NTD))

    def _adapted(self, n: int, y_NTD: Tensor) -> Tensor:
        spoken = self._spoken or [self.languages[0]] * len(y_NTD)
        if len(spoken) != len(y_NTD):
            raise UserError(f"{len(spoken)} languages for {len(y_NTD)} texts; give the language of each")
        out_NTD = y_NTD
        for language in dict.fromkeys(spoken):
            layers: Any = self.of[language]
            own_N11 = torch.tensor([s == language for s in spoken], device=y_NTD.device)[:, None, None]
            out_NTD = torch.where(own_N11, y_NTD + layers[n](y_NTD), out_NTD)
        return out_NTD

    @contextmanager
    def speaking(self, languages: Sequence[str]) -> Iterator[None]:
        """The language of each text of the forward passes inside."""
        wrong = next((lang for lang in languages if lang not in self.of), None)
        if wrong is not None:
            raise unknown("language", wrong, self.languages, "Add it with learn_language")
        before, self._spoken = self._spoken, list(languages)
        try:
            yield
        finally:
            self._spoken = before

    def save(self, folder: Path) -> None:
        from safetensors.torch import save_file

        save_file({n: p.detach().contiguous() for n, p in self.state_dict().items()}, folder / WEIGHTS)
        write_json(folder / FILE, self.shape | {"languages": self.languages})


def adapters_of(folder: Path) -> LanguageAdapters:
    """Those saved in `folder`, not attached."""
    from safetensors.torch import load_file

    if not (folder / FILE).is_file():
        raise UserError(f"{folder} has no {FILE}; make one with languages.save or the trainer colbert-xm")
    shape = read_json(folder / FILE)
    made = LanguageAdapters(shape["width"], shape["layers"], shape["rank"], shape["languages"])
    made.load_state_dict(load_file(folder / WEIGHTS))
    return made


def save(folder: Path, student: Student, adapters: LanguageAdapters) -> None:
    """Both in one folder, which the caller makes atomic."""
    student.save(folder / BASE)
    adapters.save(folder)


def pretrain(
    student: Student,
    adapters: LanguageAdapters,
    texts: Mapping[str, Sequence[str]],
    *,
    steps: int,
    batch: int = 16,
    lr: float = 1e-3,
    mask: float = 0.15,
    seed: int = 0,
    only: str | None = None,
    events: Events | None = None,
) -> list[float]:
    """Masked words, each text under its language's adapters. only: train that language's adapters, all else frozen."""
    head = MaskedHead(student)
    if only is not None:
        head.requires_grad_(False)
        parameters = list(adapters.of[only].parameters())
    else:
        parameters = [*student.parameters(), *adapters.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.01)
    events, losses = events or Events(), list[float]()
    pool = [(lang, text) for lang, own in texts.items() for text in own]
    if not pool:
        raise UserError("there are no texts to learn from; give some for each language")
    with events.progress("masked words", steps, "steps") as progress:
        for step in range(steps):
            rng = np.random.default_rng([seed, step])
            rows = [pool[i] for i in rng.permutation(len(pool))[:batch]]
            with adapters.speaking([lang for lang, _ in rows]):
                loss = masked_loss(student, head, [text for _, text in rows], mask, rng)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
            progress.update(1, loss=losses[-1])
    return losses


def masked_loss(
    student: Student, head: MaskedHead, texts: Sequence[str], mask: float, rng: np.random.Generator
) -> Tensor:
    inputs = student.tokenizer(
        list(texts), padding=True, truncation=True, max_length=student.max_tokens, return_tensors="pt"
    )
    ids_NT, real_NT = inputs["input_ids"], inputs["attention_mask"].bool()
    special = torch.isin(ids_NT, torch.tensor(student.tokenizer.all_special_ids))
    hidden_NT = torch.from_numpy(drawn_mask((real_NT & ~special).numpy(), mask, rng))
    seen_NT = ids_NT.masked_fill(hidden_NT, student.tokenizer.mask_token_id)
    h_NTD = student.model(input_ids=seen_NT, attention_mask=real_NT.long()).last_hidden_state
    return predicted(head, student, h_NTD, ids_NT, hidden_NT)


def learn_language(
    student: Student, adapters: LanguageAdapters, language: str, texts: Sequence[str], *, steps: int, **knobs: Any
) -> list[float]:
    """Add a language after all else was trained: only its adapters learn, every other weight stays bit for bit."""
    adapters.add(language)
    return pretrain(student, adapters, {language: texts}, steps=steps, only=language, **knobs)


class LateHead(nn.Module):
    """Token vectors of length 1 for late interaction: queries are filled with mask tokens, punctuation is left out."""

    def __init__(self, width: int, dims: int, query_tokens: int):
        super().__init__()
        self.project = nn.Linear(width, dims, bias=False)
        self.query_tokens = query_tokens

    def forward(self, student: Student, texts: Sequence[str], *, query: bool) -> tuple[Tensor, Tensor]:
        """(vectors_NTE, mask_NT of those that are compared)."""
        t = student.tokenizer
        most = min(self.query_tokens, student.max_tokens) if query else student.max_tokens
        padding: Any = {"padding": "max_length"} if query else {"padding": True}
        inputs = t([x.strip() for x in texts], truncation=True, max_length=most, return_tensors="pt", **padding)
        device = next(student.parameters()).device
        ids_NT, real_NT = inputs["input_ids"].to(device), inputs["attention_mask"].bool().to(device)
        if query:  # mask tokens attend and are compared as words are
            ids_NT = ids_NT.masked_fill(~real_NT, t.mask_token_id)
            real_NT = torch.ones_like(real_NT)
        h_NTD = student.model(input_ids=ids_NT, attention_mask=real_NT.long()).last_hidden_state
        compared_NT = real_NT if query else real_NT & ~torch.isin(ids_NT, punctuation(t).to(device))
        return F.normalize(self.project(h_NTD), dim=-1), compared_NT


def punctuation(tokenizer: Any) -> Tensor:
    """Ids of tokens without a letter or digit, special ones aside."""
    if not hasattr(tokenizer, "_punctuation_ids"):
        special = set(tokenizer.all_special_ids)
        rows = [(i, tokenizer.decode([i])) for i in range(len(tokenizer)) if i not in special]
        ids = [i for i, text in rows if text.strip() and all(unicodedata.category(c)[0] in "PS" for c in text.strip())]
        tokenizer._punctuation_ids = torch.tensor(ids)
    ids_K: Tensor = tokenizer._punctuation_ids
    return ids_K


def max_sims(q_BTE: Tensor, q_mask_BT: Tensor, p_PSE: Tensor, p_mask_PS: Tensor) -> Tensor:
    """scores_BP: for every query token the best of the passage's, added up."""
    match_BPTS = torch.einsum("bte,pse->bpts", q_BTE, p_PSE).masked_fill(~p_mask_PS[None, :, None, :], -1e4)
    best_BPT = match_BPTS.amax(-1)
    return (best_BPT * q_mask_BT[:, None, :]).sum(-1)
