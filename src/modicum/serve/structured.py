"""Structured output: tokens that cannot follow a JSON schema, a regex, choices or a grammar are never sampled.

`llguidance` compiles what is asked for and gives, before each token, the set of tokens that may come next: a mask on
the logits of one sequence, under which sampling goes on as always (temperature, penalties, drafts and their
verification included). A sequence ends where the grammar is complete: its end-of-text token is possible only there.

Of the kept libraries llguidance was chosen because it needs no compilation of the vocabulary per grammar, supports most
of JSON Schema, and depends on neither torch nor transformers.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from modicum.core.errors import UserError
from modicum.serve.request import InvalidRequest, Sample, StructuredOutput

MOST_CHARACTERS = 256 * 1024  # of a grammar


@dataclass(frozen=True)
class Matcher:
    """Where one sequence stands in its grammar."""

    state: Any
    vocab: int  # of the logits

    def mask(self) -> np.ndarray[Any, np.dtype[np.int32]]:
        """Bits of the tokens that may follow, 32 to a word: (ceil(vocab / 32),)."""
        words = np.zeros((self.vocab + 31) // 32, np.int32)
        known = np.frombuffer(self.state.compute_bitmask(), np.int32)[: len(words)]
        words[: len(known)] = known
        return words

    def advance(self, token: int) -> None:
        """Raises `UserError` for a token that the grammar does not allow, which a mask never lets through."""
        if not self.state.consume_token(token):
            raise UserError(f"the output left its grammar: {self.state.get_error()}")

    @property
    def finished(self) -> bool:
        """Nothing but the end can follow."""
        return bool(self.state.is_stopped())

    def copy(self) -> Matcher:
        return Matcher(self.state.deep_copy(), self.vocab)


class Grammars:
    """Compiles what requests ask for, for one tokenizer; the last one of each text is kept."""

    def __init__(self, tokenizer: Any, vocab: int):
        """vocab: of the model's logits, which may be more than the tokenizer's. Raises `UserError` without
        llguidance."""
        try:
            import llguidance
        except ImportError:
            raise UserError(
                "structured output needs llguidance; install it: pip install 'modicum[structured]'"
            ) from None
        self._library, self._vocab = llguidance, vocab
        self._tokenizer = llguidance.LLTokenizer(
            tokenizer.backend.to_str(), n_vocab=max(vocab, tokenizer.vocab_size), eos_token=list(tokenizer.stop_ids)
        )
        self._compiled: dict[StructuredOutput, Matcher] = {}

    def matcher(self, wanted: StructuredOutput) -> Matcher:
        """A matcher at the start. Raises `InvalidRequest` for a grammar that does not compile."""
        if wanted not in self._compiled:
            if len(self._compiled) >= 64:
                self._compiled.pop(next(iter(self._compiled)))
            state = self._library.LLMatcher(self._tokenizer, self._grammar(wanted), log_level=0)
            if state.is_error():
                raise InvalidRequest(f"the {wanted.kind} does not compile: {_line(state.get_error())}", wanted.param)
            self._compiled[wanted] = Matcher(state, self._vocab)
        return self._compiled[wanted].copy()

    def _grammar(self, wanted: StructuredOutput) -> str:
        kinds = self._library.LLMatcher
        if len(wanted.value) > MOST_CHARACTERS:
            raise InvalidRequest(
                f"the {wanted.kind} has {len(wanted.value)} characters; at most {MOST_CHARACTERS} are allowed",
                wanted.param,
            )
        if wanted.kind == "json":
            try:
                return str(kinds.grammar_from_json_schema(wanted.value, {"whitespace_flexible": False}))
            except ValueError as error:
                raise InvalidRequest(f"the JSON schema does not compile: {_line(str(error))}", wanted.param) from None
        if wanted.kind == "regex":
            return str(kinds.grammar_from_regex(wanted.value))
        if wanted.kind == "choice":
            options = " | ".join(json.dumps(choice, ensure_ascii=False) for choice in json.loads(wanted.value))
            return str(kinds.grammar_from_lark(f"start: {options}"))
        return str(kinds.grammar_from_lark(wanted.value))


def _line(text: str) -> str:
    return " ".join(text.split())[:300]


def masked(logits_BV: Tensor, samples: Sequence[Sample]) -> Tensor:
    """`logits_BV` with what each sample's grammar forbids at -inf; the same tensor if no sample has one."""
    matchers = [(i, sample.matcher) for i, sample in enumerate(samples) if sample.matcher is not None]
    if not matchers:
        return logits_BV
    rows = [i for i, _ in matchers]
    words = np.stack([matcher.mask() for _, matcher in matchers])
    allowed = np.unpackbits(words.view(np.uint8), axis=1, bitorder="little")[:, : logits_BV.shape[1]].astype(bool)
    allowed_RV = torch.from_numpy(allowed).to(logits_BV.device)
    logits_BV = logits_BV.clone()
    logits_BV[rows] = logits_BV[rows].masked_fill(~allowed_RV, float("-inf"))
    return logits_BV
