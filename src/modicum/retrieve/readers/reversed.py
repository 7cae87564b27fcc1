"""reversed: the best passage last, next to the question.

    position i of k holds rank k + 1 - i

Small models attend most to what they read last (Liu et al. 2023, arXiv:2307.03172, section 2.3 for the U-shape).
"""

from __future__ import annotations

from dataclasses import dataclass

from modicum.retrieve.readers import Reader


@dataclass(frozen=True, kw_only=True)
class Config:
    pass


class Reversed(Reader):
    config: Config

    def order(self, count: int) -> list[int]:
        return list(range(count))[::-1]
