"""rephrase-multilingual: passages rephrased in their own language and put together again, beside the original.

    d' = join(r_1, ..., r_n)        r_i = the rephrasing of passage i, or passage i itself where that is refused

As `wrap`, with three differences: passages of at most 350 tokens end at line breaks first, then at sentences, and tiny
ones are left as they are; the prompt names the language, and the reply stands between marks; the rephrased passages
become one document again, in their order. A passage stays as it was where the reply is in another language.

Pieler et al. 2024, "Rephrasing natural text data with different languages and quality levels for LLM pre-training"
(arXiv:2410.20796). Departs from it: languages are told by py3langid; prompts are this file's own; replies without marks
are taken whole, and all are checked as in `wrap`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from modicum.data.document import Document, Drop
from modicum.data.replies import Request, ask
from modicum.data.rewrites import Rewriter, Rounds, sampling
from modicum.data.rewrites._text import count, passages, plain, refused, tagged
from modicum.data.steps.language import identifier

CLAIM = {
    "figure": "better models from rephrased text in four languages; the gain falls with the quality of the source",
    "where": "abstract",
    "scale": "Mistral-7B and Qwen2 as rephrasers",
}
NAMES = {
    "en": "English",
    "de": "German",
    "fr": "French",
    "es": "Spanish",
    "it": "Italian",
    "pt": "Portuguese",
    "nl": "Dutch",
    "pl": "Polish",
    "sv": "Swedish",
    "cs": "Czech",
    "ru": "Russian",
    "uk": "Ukrainian",
    "tr": "Turkish",
    "ar": "Arabic",
    "zh": "Chinese",
    "ja": "Japanese",
    "ko": "Korean",
}
INSTRUCTION = (
    "Rephrase the text in good {language}. Keep its meaning and write in {language} only. Put the result between "
    "<text> and </text>."
)


@dataclass(frozen=True, kw_only=True)
class Config:
    tokens: int = 350  # of a passage, at most
    least: int = 20  # shorter passages are left as they are
    temperature: float = 0.7
    top_p: float = 0.95
    shortest: float = 0.5
    longest: float = 1.6
    least_overlap: float = 0.3

    def __post_init__(self) -> None:
        if self.tokens < 1 or not 0 <= self.shortest < self.longest:
            raise ValueError("tokens must be at least 1, and shortest below longest")


def language_of(text: str) -> str:
    """ISO 639-1 code."""
    return str(identifier().classify(" ".join(text[:4000].split()))[0])


class Multilingual(Rewriter):
    config: Config

    def request(self, passage: str, code: str) -> Request:
        prompt = f"{self.instruction(code)}\n\n<text>\n{passage.strip()}\n</text>"
        most = int(2.5 * self.config.longest * count(passage)) + 24
        return ask(prompt, max_tokens=most, **sampling(self.config))

    @staticmethod
    def instruction(code: str) -> str:
        return INSTRUCTION.format(language=NAMES.get(code, f"the language {code}"))

    def rewrite(self, document: Document, rng: np.random.Generator) -> Rounds:
        if document.domain == "code" or not document.text.strip():
            return [document]
        config = self.config
        code = document.meta.get("language") or language_of(document.text)
        parts = passages(document.text, config.tokens, by_lines=True)
        chosen = [k for k, p in enumerate(parts) if count(p) >= config.least]
        replies = yield [self.request(parts[k], code) for k in chosen]
        out: list[Document | Drop] = [document]
        accepted = 0
        for k, reply in zip(chosen, replies, strict=True):
            text = tagged(reply.text, "text") or plain(reply.text.replace("<text>", "").replace("</text>", ""))
            why: tuple[str, str] | None = ("unfinished", "cut at max_tokens")
            if reply.ended == "stop":
                why = refused(
                    parts[k],
                    text,
                    self.instruction(code),
                    shortest=config.shortest,
                    longest=config.longest,
                    least_overlap=config.least_overlap,
                )
            if not why and (other := language_of(text)) != code:
                why = "language", f"{other}, the passage is {code}"
            if why:
                out.append(Drop(f"{document.id}#{self.key}{k}", *why))
            else:
                ending = parts[k][len(parts[k].rstrip()) :]
                parts[k] = text + ending
                accepted += 1
        if accepted:
            out.insert(1, self.made(document, "".join(parts)))
        return out
