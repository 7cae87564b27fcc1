"""Bits per byte: how well a model predicts text, comparable across tokenizers and with compressors.

    bits per byte = sum over tokens of -log2 p(token | what came before) / UTF-8 bytes of the text

Every token of every document is scored exactly once; a document begins after the start token (bos, or
eos where there is none) and knows nothing of other documents. A document longer than the model's context is
read in windows; `overlap` tokens of each window only give context.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from modicum.core.errors import UserError
from modicum.evaluate.score import BATCH_TOKENS, Advance, Row, context_limit, safe_pad, score_rows

if TYPE_CHECKING:
    from modicum.data.tokenizer import Tokenizer

CHUNK_BYTES = 4 << 20  # text encoded and scored at a time


@dataclass(frozen=True)
class LMScore:
    """Over all documents; letters: N documents. `stderr` is of bits per byte, by bootstrap over documents.

    perplexity is per token, so it compares models of one tokenizer only.
    """

    bits_per_byte: float
    stderr: float
    perplexity: float
    nats: float
    tokens: int
    bytes: int
    documents: int
    nats_N: np.ndarray
    bytes_N: np.ndarray
    tokens_N: np.ndarray

    def as_dict(self) -> dict[str, Any]:
        names = ("bits_per_byte", "stderr", "perplexity", "nats", "tokens", "bytes", "documents")
        return {name: getattr(self, name) for name in names}


def windows(tokens: list[int], length: int, overlap: int) -> Iterator[Row]:
    """Rows that score tokens[1:] once each: at most `length` inputs per row, the last row filled to the left.

    With overlap 0 these are lm-evaluation-harness's rolling windows.
    """
    step, n_targets = length - overlap, len(tokens) - 1
    start = 0
    while start < n_targets:
        end = min(start + (length if start == 0 else step), n_targets)
        first = max(0, end - length)
        yield tokens[first : end + 1], end - start
        start = end


def document_nats(
    model: Any,
    tokenizer: Tokenizer,
    texts: Iterable[str],
    *,
    sequence_length: int | None = None,
    overlap: int | float = 0,
    batch_tokens: int = BATCH_TOKENS,
    advance: Advance | None = None,
) -> Iterator[tuple[float, int, int]]:
    """(nats, UTF-8 bytes, tokens) of each text, in order, in bounded memory; arguments as `bits_per_byte`."""
    limit = context_limit(model)
    length = sequence_length or limit
    if length > limit and model.config.position == "learned":
        raise UserError(f"sequence_length={length} exceeds the model's {limit} positions; give at most {limit}")
    shared = int(overlap * length) if isinstance(overlap, float) and overlap < 1 else int(overlap)
    if not 0 <= shared < length:
        raise UserError(
            f"overlap={overlap} must be at least 0 and below sequence_length={length}; write a count of "
            "tokens, or a share such as 0.5"
        )
    for chunk in _chunks(texts):
        rows: list[Row] = []
        owner: list[int] = []
        # What looks like a special token in a document is text there.
        for number, ids in enumerate(tokenizer.encode_batch(chunk, specials=False)):
            for row in windows([tokenizer.start_id, *ids], length, shared):
                rows.append(row)
                owner.append(number)
        scored = score_rows(
            model,
            rows,
            pad_id=safe_pad(model, tokenizer),
            batch_tokens=max(batch_tokens, length),
            advance=advance,
        )
        nats, counts = np.zeros(len(chunk)), np.zeros(len(chunk), dtype=np.int64)
        for number, (log_p, _) in zip(owner, scored, strict=True):
            nats[number] -= log_p.sum()
            counts[number] += len(log_p)
        for text, value, count in zip(chunk, nats, counts, strict=True):
            yield float(value), len(text.encode("utf-8", "surrogatepass")), int(count)


def bits_per_byte(
    model: Any,
    tokenizer: Tokenizer,
    texts: Iterable[str],
    *,
    sequence_length: int | None = None,
    overlap: int | float = 0,
    batch_tokens: int = BATCH_TOKENS,
    resamples: int = 1000,
    seed: int = 0,
    advance: Advance | None = None,
) -> LMScore:
    """Score `texts` (one string per document; empty ones are passed over).

    sequence_length: inputs per window (default: the model's context). overlap: tokens of a window that were
    scored before and only give context: a count, or a share of the window as a float below 1; 0 is
    fastest, half a window costs twice the time and is usually a few per cent better on long documents.
    advance: called with each number of tokens scored. Raises UserError if there is no text.
    """
    rows = list(
        document_nats(
            model,
            tokenizer,
            texts,
            sequence_length=sequence_length,
            overlap=overlap,
            batch_tokens=batch_tokens,
            advance=advance,
        )
    )
    return summarise(rows, resamples=resamples, seed=seed)


def summarise(rows: Iterable[tuple[float, int, int]], *, resamples: int = 1000, seed: int = 0) -> LMScore:
    """The score of documents given as (nats, bytes, tokens)."""
    table = np.array([row for row in rows if row[1]], dtype=np.float64).reshape(-1, 3)
    if not len(table):
        raise UserError("there is no text to score; give at least one document that is not empty")
    nats, nbytes, tokens = (float(v) for v in table.sum(0))
    return LMScore(
        bits_per_byte=nats / nbytes / math.log(2),
        stderr=ratio_stderr(table[:, 0], table[:, 1], resamples, seed) / math.log(2),
        perplexity=math.exp(min(nats / tokens, 700)) if tokens else math.inf,
        nats=nats,
        tokens=int(tokens),
        bytes=int(nbytes),
        documents=len(table),
        nats_N=table[:, 0],
        bytes_N=table[:, 1].astype(np.int64),
        tokens_N=table[:, 2].astype(np.int64),
    )


def ratio_stderr(top_N: np.ndarray, bottom_N: np.ndarray, resamples: int = 1000, seed: int = 0) -> float:
    """Standard error of sum(top) / sum(bottom) when documents are resampled; nan for a single one."""
    if len(top_N) < 2:
        return math.nan
    rng, ratios = np.random.default_rng(seed), []
    for _ in range(resamples):
        picked = rng.integers(len(top_N), size=len(top_N))
        ratios.append(top_N[picked].sum() / bottom_N[picked].sum())
    return float(np.std(ratios, ddof=1))


def _chunks(texts: Iterable[str]) -> Iterator[list[str]]:
    chunk: list[str] = []
    size = 0
    for text in texts:
        if chunk and size + len(text) > CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
        chunk.append(text)
        size += len(text)
    if chunk:
        yield chunk
