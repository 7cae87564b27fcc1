"""The tokens that a sequence has said, for the penalties of `SamplingParams`. V vocabulary."""

from __future__ import annotations

from collections.abc import Sequence

import torch


class Penalties:
    """What one sequence has said so far: only kept for those that ask for penalties."""

    def __init__(self, prompt: Sequence[int], output: Sequence[int], vocab_size: int, device: torch.device):
        self.seen_V = torch.zeros(vocab_size, dtype=torch.bool, device=device)
        self.count_V = torch.zeros(vocab_size, dtype=torch.float32, device=device)
        self.seen_V[torch.tensor(prompt, device=device)] = True
        for token in output:
            self.add(token)

    def add(self, token: int) -> None:
        self.seen_V[token] = True
        self.count_V[token] += 1
