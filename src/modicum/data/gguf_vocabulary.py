"""A tokenizer as GGUF metadata, so that llama.cpp splits text into the same tokens.

llama.cpp has its own tokenizers, chosen by name: byte-level BPE ("gpt2") with one of a list of built-in regular
expressions (`tokenizer.ggml.pre`), and SentencePiece's merging by score ("llama"). A `tokenizer.json` whose rules
have no name there is refused: llama.cpp would produce other tokens than the model was trained on.
"""

from __future__ import annotations

import json
from typing import Any

from modicum.core.errors import UserError
from modicum.core.gguf.tokenizer import (
    BYTE,
    CONTRACTIONS,
    CONTROL,
    GPT2,
    NFC,
    NORMAL,
    SPLITS,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    WHOLE_WORDS,
)
from modicum.data.tokenizer import Tokenizer

# Regular expressions in order, whether a word that is a token skips the merges, whether text is brought to NFC first:
# the first of llama.cpp's names for that.
PRE: dict[tuple[tuple[str, ...], bool, bool], str] = {}
for _name, _splits in SPLITS.items():
    PRE.setdefault((_splits, _name in WHOLE_WORDS, _name in NFC), _name)


def vocabulary(tokenizer: Tokenizer, size: int) -> tuple[dict[str, Any], list[str]]:
    """(metadata, notes) of a tokenizer for a model of `size` embeddings; notes say where llama.cpp differs.

    Raises `UserError` for a tokenizer that llama.cpp has no rules for, and for one with more tokens than embeddings.
    """
    described = json.loads(tokenizer.backend.to_str())
    model = described["model"]
    if tokenizer.vocab_size > size:
        raise UserError(f"the tokenizer has {tokenizer.vocab_size} tokens, the model {size} embeddings")
    if model["type"] != "BPE":
        raise UserError(f"llama.cpp has no rules for a {model['type']} tokenizer.json; {_WITHOUT}")
    texts, types = _tokens(described, size)
    notes: list[str] = []
    if model.get("byte_fallback"):
        metadata = _sentencepiece(described, texts, types)
    else:
        metadata = _byte_level(described, notes)
    metadata |= {"tokenizer.ggml.tokens": texts, "tokenizer.ggml.token_type": types}
    for name, number in (("bos", tokenizer.bos_id), ("eos", tokenizer.eos_id), ("padding", tokenizer.pad_id)):
        if number is not None:
            metadata[f"tokenizer.ggml.{name}_token_id"] = number
    if unknown := model.get("unk_token"):
        metadata["tokenizer.ggml.unknown_token_id"] = texts.index(unknown)
    turn = [stop for stop in tokenizer.stop_ids if stop != tokenizer.eos_id]
    if turn:  # several tokens end an answer: the second is llama.cpp's end of a turn
        metadata["tokenizer.ggml.eot_token_id"] = turn[0]
    plain, added = tokenizer.encode("a"), tokenizer.encode("a", add_special=True)
    metadata["tokenizer.ggml.add_bos_token"] = added[0] != plain[0]
    metadata["tokenizer.ggml.add_eos_token"] = added[-1] != plain[-1]
    if tokenizer.template is not None:
        metadata["tokenizer.chat_template"] = tokenizer.template
    return metadata, notes


_WITHOUT = "write the file without one, for prompts of token ids: --no-tokenizer"


def _tokens(described: dict[str, Any], size: int) -> tuple[list[str], list[int]]:
    """(texts, types) by id; ids without a token are unused ones with a name of their own."""
    texts = [f"[unused{i}]" for i in range(size)]
    types = [UNUSED] * size
    for text, i in described["model"]["vocab"].items():
        texts[i], types[i] = text, NORMAL
    for token in described["added_tokens"]:
        texts[token["id"]] = token["content"]
        types[token["id"]] = CONTROL if token["special"] else USER_DEFINED
    return texts, types


def _byte_level(described: dict[str, Any], notes: list[str]) -> dict[str, Any]:
    normalizer = (described["normalizer"] or {}).get("type")
    if normalizer == "NFC":
        notes.append("llama.cpp does not bring text to NFC, as this tokenizer does")
    elif normalizer is not None:
        raise UserError(f"llama.cpp has no {normalizer} normaliser for byte-level BPE; {_WITHOUT}")
    splits = _regular_expressions(described["pre_tokenizer"])
    ignore_merges, nfc = bool(described["model"].get("ignore_merges")), normalizer == "NFC"
    matches = [
        (splits, w, n) for w in (ignore_merges, not ignore_merges) for n in (nfc, not nfc) if (splits, w, n) in PRE
    ]
    if not matches:
        raise UserError(f"llama.cpp has no name for this tokenizer's way to split text ({splits!r}); {_WITHOUT}")
    if matches[0][1] != ignore_merges:
        notes.append("llama.cpp decides otherwise whether a word that is a token skips the merges (ignore_merges)")
    name = PRE[matches[0]]
    merges = [m if isinstance(m, str) else " ".join(m) for m in described["model"]["merges"]]
    return {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": name, "tokenizer.ggml.merges": merges}


def _regular_expressions(pre: dict[str, Any] | None) -> tuple[str, ...]:
    """What a pre-tokenizer splits by, in order, in one spelling. Raises `UserError` for what is no byte-level split."""
    steps = [] if pre is None else pre["pretokenizers"] if pre["type"] == "Sequence" else [pre]
    patterns, byte_level = [], False
    for step in steps:
        if step["type"] == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
            patterns.append(_spelling(step["pattern"].get("Regex", "")))
        elif step["type"] == "Digits" and step["individual_digits"]:
            patterns.append(r"\p{N}")
        elif step["type"] == "ByteLevel" and not step["add_prefix_space"]:
            byte_level = True
            patterns += [GPT2] if step["use_regex"] else []
        else:
            raise UserError(f"llama.cpp has no pre-tokenizer like {json.dumps(step)}; {_WITHOUT}")
    if not byte_level:
        raise UserError(f"this BPE tokenizer is neither byte-level nor SentencePiece's; {_WITHOUT}")
    return tuple(patterns)


def _spelling(pattern: str) -> str:
    """A canonical spelling: of contractions, and of possessive quantifiers that change no match here."""
    for other in (r"'(?i:[sdmt]|ll|ve|re)", r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"):
        pattern = pattern.replace(other, CONTRACTIONS)
    return pattern.replace("?+", "?").replace("++", "+").replace("*+", "*")


def _sentencepiece(described: dict[str, Any], texts: list[str], types: list[int]) -> dict[str, Any]:
    """Scores that merge in the order of the merges: llama.cpp joins the neighbours whose token has the highest."""
    prefix = _space_prefix(described)
    rank: dict[str, int] = {}
    for i, merge in enumerate(described["model"]["merges"]):
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        rank.setdefault(left + right, i)
    scores = [-float(rank.get(text, len(rank))) for text in texts]
    for i, text in enumerate(texts):
        if text == described["model"].get("unk_token"):
            types[i] = UNKNOWN
        elif types[i] == NORMAL and len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
            types[i] = BYTE
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.add_space_prefix": prefix,
    }


def _space_prefix(described: dict[str, Any]) -> bool:
    """Whether a text gets a space in front; raises `UserError` for other normalisations than spaces to U+2581."""
    normalizer, pre = described["normalizer"], described["pre_tokenizer"]
    steps = [] if normalizer is None else normalizer.get("normalizers", [normalizer])
    prefix = False
    for step in steps:
        if step["type"] == "Prepend" and step["prepend"] == "▁":
            prefix = True
        elif not (step["type"] == "Replace" and step["pattern"] == {"String": " "} and step["content"] == "▁"):
            raise UserError(f"llama.cpp does not normalise like {json.dumps(step)}; {_WITHOUT}")
    if pre is None:
        return prefix
    if pre["type"] == "Metaspace" and not pre.get("split", True):
        return bool(pre.get("prepend_scheme") in ("first", "always"))
    if pre["type"] == "Split" and pre["pattern"] == {"String": " "}:  # Gemma: nothing is left to split by
        return prefix
    raise UserError(f"llama.cpp has no pre-tokenizer like {json.dumps(pre)}; {_WITHOUT}")
