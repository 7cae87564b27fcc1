"""shuffled: a random permutation of a domain's chunks, another one in each epoch.

The baseline. The permutation is a hash of seed, epoch and domain, so it is the same on every machine and costs no
state.

    order = argsort(hash(chunk, seed, epoch, domain))

No paper; every pretraining run's default. Departs from nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from modicum.data.orders import Epoch, Order


@dataclass(frozen=True, kw_only=True)
class Config:
    pass


class Shuffled(Order):
    def arrange(self, epoch: Epoch) -> np.ndarray:
        return epoch.shuffled()
