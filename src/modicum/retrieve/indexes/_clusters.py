"""Hierarchical balanced clustering: groups of a few near vectors each, of nearly equal size.

k-means with `branch` centres splits every group again and again until it is small. While vectors are assigned, a
centre pays for its size, so that lists over the groups do not become long:

    assign x to argmin_c  |x - c|^2 + lambda (n_c - mean n)

with n_c the centre's size in the round before: the derivative of lambda/2 times the squared deviation of sizes.

Shape letters: N vectors, D dimensions, C centres.
"""

from __future__ import annotations

import numpy as np

ROUNDS = 8
SAMPLE = 64  # vectors per centre that a large group's rounds look at; all are assigned at the end


def leaves(vectors_ND: np.ndarray, size: int, branch: int, balance: float, seed: int) -> list[np.ndarray]:
    """Rows of every leaf of about `size` vectors. `vectors_ND` may be memory-mapped."""
    rng = np.random.default_rng(seed)
    result: list[np.ndarray] = []
    waiting = [np.arange(len(vectors_ND))]
    size = max(size, 1)
    while waiting:
        rows_N = waiting.pop()
        if len(rows_N) <= 1.5 * size or len(rows_N) < 2:
            result.append(rows_N)
            continue
        centres = min(branch, max(2, round(len(rows_N) / size)))
        parts = split(vectors_ND, rows_N, centres, balance, rng)
        if len(parts) == 1:  # equal vectors cannot be told apart: cut them by number
            result += np.array_split(rows_N, centres)
        else:
            waiting += parts
    return result


def split(
    vectors_ND: np.ndarray, rows_N: np.ndarray, centres: int, balance: float, rng: np.random.Generator
) -> list[np.ndarray]:
    """Balanced k-means of some rows: the rows of every centre that has any."""
    sample_S = rows_N
    if len(rows_N) > SAMPLE * centres:
        sample_S = np.sort(rng.choice(rows_N, SAMPLE * centres, replace=False))
    x_SD = np.asarray(vectors_ND[sample_S], np.float32)
    centre_CD = x_SD[rng.choice(len(x_SD), centres, replace=False)]
    size_C = np.full(centres, len(x_SD) / centres)
    for _ in range(ROUNDS):
        distance_SC = distances(x_SD, centre_CD)
        price = balance * float(distance_SC.min(1).mean()) / (len(x_SD) / centres)
        chosen_S = np.argmin(distance_SC + price * (size_C - size_C.mean()), axis=1)
        counts_C = np.bincount(chosen_S, minlength=centres)
        size_C = 0.5 * (size_C + counts_C)  # damped, or two centres swap their vectors for ever
        order = np.argsort(chosen_S, kind="stable")
        filled = counts_C > 0
        starts = (np.cumsum(counts_C) - counts_C)[filled]
        centre_CD[filled] = np.add.reduceat(x_SD[order], starts) / counts_C[filled, None]
    size_C *= len(rows_N) / len(x_SD)
    chosen_N = np.empty(len(rows_N), np.int64)
    for start in range(0, len(rows_N), 65536):
        part = slice(start, start + 65536)
        distance_NC = distances(np.asarray(vectors_ND[rows_N[part]], np.float32), centre_CD)
        price = balance * float(distance_NC.min(1).mean()) / (len(rows_N) / centres)
        chosen_N[part] = np.argmin(distance_NC + price * (size_C - size_C.mean()), axis=1)
    order = np.argsort(chosen_N, kind="stable")
    return [
        part for part in np.split(rows_N[order], np.cumsum(np.bincount(chosen_N, minlength=centres))[:-1]) if len(part)
    ]


def distances(x_ND: np.ndarray, centre_CD: np.ndarray) -> np.ndarray:
    """Squared Euclidean distances_NC."""
    square_N1 = np.einsum("nd,nd->n", x_ND, x_ND)[:, None]
    square_C = np.einsum("cd,cd->c", centre_CD, centre_CD)
    return np.maximum(square_N1 + square_C - 2 * (x_ND @ centre_CD.T), 0)


def nearest_to_mean(vectors_ND: np.ndarray, rows: np.ndarray) -> int:
    """The row whose vector is nearest to the mean of `rows`."""
    x_ND = np.asarray(vectors_ND[rows], np.float32)
    return int(rows[np.argmin(distances(x_ND, x_ND.mean(0, keepdims=True))[:, 0])])
