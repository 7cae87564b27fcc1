"""The held-out split: which documents are held out from training, by a hash of their origin."""

from __future__ import annotations

import numpy as np


def heldout_rows(keys_N: np.ndarray, sizes_N: np.ndarray, fraction: float, most_bytes: int) -> np.ndarray:
    """bool [N]: which documents are held out.

    Documents with equal keys (parts of one original) go together. Keys in rising order are held out while
    their bytes stay within min(fraction of all, most_bytes), skipping those that would exceed it; the
    choice thus depends on the documents alone. At least one is held out if fraction > 0 and two or more keys
    exist: the smallest, where none fits.
    """
    out = np.zeros(len(keys_N), bool)
    if fraction <= 0 or len(keys_N) == 0:
        return out
    keys, inverse = np.unique(keys_N, return_inverse=True)
    if len(keys) < 2:
        return out
    sizes = np.bincount(inverse, weights=sizes_N.astype(np.float64)).astype(np.int64)
    budget = int(min(fraction * float(sizes.sum()), most_bytes))
    chosen = np.zeros(len(keys), bool)
    at = 0
    # Whole runs that fit are taken at once; only a key that does not fit ends a run.
    while at < len(keys) and budget > 0:
        run = np.cumsum(sizes[at:])
        fits = int(np.searchsorted(run, budget, side="right"))
        chosen[at : at + fits] = True
        budget -= int(run[fits - 1]) if fits else 0
        at += fits + 1
        smallest = int(sizes[at:].min()) if at < len(keys) else 0
        if smallest > budget:
            break
    if not chosen.any():
        chosen[int(np.argmin(sizes))] = True
    return chosen[inverse]
