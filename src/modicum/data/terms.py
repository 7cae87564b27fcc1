"""Terms of a text for lexical search and latent semantic analysis: lower case, subwords of identifiers, singulars."""

from __future__ import annotations

import re
import unicodedata

_WORD = re.compile(r"[^\W_]+(?:[._]+[^\W_]+)*")  # an identifier with its dots and underscores
_CAMEL = re.compile(r"[A-Z]+(?=[A-Z][a-z])|[A-Z]?[a-z]+|[A-Z]+|[^\W\d_A-Za-z]+|\d+")
_UNSPACED = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]+")


def tokenize(text: str) -> list[str]:
    """Lower-case terms. An identifier gives itself and its subwords; scripts without spaces give character bigrams.

    >>> tokenize("json.loads parses myFileName")
    ['json.load', 'json', 'load', 'parse', 'myfilename', 'my', 'file', 'name']
    """
    if not text.isascii():  # accents are folded, so that a query typed without them still matches
        text = "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
        text = _UNSPACED.sub(lambda run: " " + " ".join(_pairs(run[0])) + " ", unicodedata.normalize("NFC", text))
    terms = []
    for word in _WORD.findall(text):
        if word.islower() and word.isalpha():  # the common case
            terms.append(_singular(word.casefold()))
            continue
        parts = [p.casefold() for subword in re.split(r"[._]+", word) for p in _CAMEL.findall(subword)]
        folded = word.casefold()
        if len(parts) > 1:
            terms.append(_singular(folded))
        terms += [_singular(p) for p in parts] if parts else [folded]
    return terms


def _pairs(run: str) -> list[str]:
    return [run[i : i + 2] for i in range(len(run) - 1)] or [run]


def _singular(word: str) -> str:
    """Harman's S-stemmer (1991): it merges plural with singular and little else, so identifiers survive it."""
    if len(word) < 4 or word[-1] != "s":
        return word
    if word.endswith("ies"):
        return word if word[-4] in "ae" else word[:-3] + "y"
    if word.endswith("es"):
        return word if word[-3] in "aeo" else word[:-1]
    return word if word[-2] in "us" else word[:-1]
