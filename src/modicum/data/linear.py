"""A light text classifier: logistic regression on hashed words and word pairs, in place of fastText.

    x[h(g) mod 2^b] = (1 + ln tf(g)) / |x|       g over the words and pairs of neighbouring words of a text
    p(y = 1 | x)    = sigmoid(w . x + c)         min  mean over each class of ln(1 + exp(-y (w . x + c))) + l2/2 |w|^2

The features are those of fastText with `wordNgrams 2` (Joulin et al. 2017, arXiv:1607.01759); the hidden layer is left
out, since with two classes it only factorises w. Both classes weigh alike, whatever their sizes. Training is
accelerated gradient descent (Nesterov 1983) over the whole sample with a fixed number of steps: sparse products and
elementwise arithmetic alone, so the result is the same for any number of threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from modicum.core.errors import UserError
from modicum.data.words import ngrams, word_hashes


class Linear:
    """`fit`, then `logits` or `probabilities`. bits: log2 of the number of hashed features."""

    def __init__(self, bits: int = 18, *, l2: float = 1e-4, steps: int = 200, words: int = 20_000):
        """words: of each text's beginning that are read."""
        self.bits, self.l2, self.steps, self.words = bits, l2, steps, words
        self.weights_V = np.zeros(1 << bits)
        self.bias = 0.0

    def fit(self, positive: Sequence[str], negative: Sequence[str]) -> Linear:
        """Raises `UserError` where either class is empty."""
        if not positive or not negative:
            raise UserError(
                f"a classifier needs texts of both kinds; there are {len(positive)} positive and {len(negative)} "
                "negative ones: give more targets or a larger sample"
            )
        x_NV = self.features([*positive, *negative])
        used = np.unique(x_NV.indices)  # features that no text has keep the weight 0
        x_NV = x_NV[:, used]
        y_N = np.repeat([1.0, -1.0], [len(positive), len(negative)])
        mass_N = np.repeat([0.5 / len(positive), 0.5 / len(negative)], [len(positive), len(negative)])
        transposed_VN = x_NV.T.tocsr()
        rate = 1 / (0.25 * (_largest(x_NV, transposed_VN, mass_N) + 1) + self.l2)  # 1: the bias' own feature
        w_V, c = np.zeros(len(used)), 0.0
        ahead_V, ahead_c, momentum = w_V, c, 1.0
        for _ in range(self.steps):
            slope_N = -y_N * mass_N / (1 + np.exp(np.clip(y_N * (x_NV @ ahead_V + ahead_c), -500, 500)))
            new_V = ahead_V - rate * (transposed_VN @ slope_N + self.l2 * ahead_V)
            new_c = ahead_c - rate * float(slope_N.sum())
            following = (1 + (1 + 4 * momentum**2) ** 0.5) / 2
            pull = (momentum - 1) / following
            ahead_V, ahead_c = new_V + pull * (new_V - w_V), new_c + pull * (new_c - c)
            w_V, c, momentum = new_V, new_c, following
        self.weights_V = np.zeros(1 << self.bits)
        self.weights_V[used] = w_V.astype(np.float32)
        self.bias = float(np.float32(c))
        return self

    def logits(self, texts: Sequence[str]) -> np.ndarray:
        """float64 [N]: w . x + c."""
        logits_N: np.ndarray = self.features(texts) @ self.weights_V + self.bias
        return logits_N

    def probabilities(self, texts: Sequence[str]) -> np.ndarray:
        """float64 [N] of the positive class, as if both were equally common."""
        return 1 / (1 + np.exp(-np.clip(self.logits(texts), -500, 500)))

    def features(self, texts: Sequence[str]) -> Any:
        """Sparse x_NV, rows of unit length."""
        from scipy.sparse import csr_matrix

        columns, values, ends = [], [], [0]
        mask = np.uint64((1 << self.bits) - 1)
        for text in texts:
            words = word_hashes(text[: 16 * self.words])[0][: self.words]
            grams = [words] + ([ngrams(words, 2)] if len(words) > 1 else [])
            column, count = np.unique(np.concatenate(grams) & mask, return_counts=True)
            value = 1 + np.log(count)
            columns.append(column.astype(np.int64))
            values.append(value / max(float(np.sqrt(np.sum(value * value))), 1e-12))
            ends.append(ends[-1] + len(column))
        flat = [np.concatenate(part) if part else np.zeros(0) for part in (values, columns)]
        return csr_matrix((flat[0], flat[1].astype(np.int64), ends), shape=(len(texts), 1 << self.bits))

    def state(self) -> dict[str, np.ndarray]:
        return {"linear_weights": self.weights_V.astype(np.float32), "linear_bias": np.array([self.bias], np.float32)}

    def set_state(self, state: dict[str, np.ndarray]) -> Linear:
        self.weights_V = state["linear_weights"].astype(np.float64)
        self.bits, self.bias = len(self.weights_V).bit_length() - 1, float(state["linear_bias"][0])
        return self


def _largest(x_NV: Any, transposed_VN: Any, mass_N: np.ndarray) -> float:
    """About the largest eigenvalue of X^T diag(mass) X, from above by a tenth."""
    v_V = np.ones(x_NV.shape[1])
    value = 1.0
    for _ in range(12):
        v_V = v_V / max(float(np.sqrt(np.sum(v_V * v_V))), 1e-12)
        v_V = transposed_VN @ (mass_N * (x_NV @ v_V))
        value = float(np.sqrt(np.sum(v_V * v_V)))
    return 1.1 * value
