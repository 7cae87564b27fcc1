"""The cost of a computation, planned or measured."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Cost:
    """All fields are absolute; zero means none or not applicable.

    peak_bytes is the process's resident peak (CPU) or the allocator's peak (GPU).
    """

    tokens: float = 0
    flops: float = 0
    seconds: float = 0
    peak_bytes: float = 0
    disk_bytes: float = 0
    parameters: float = 0

    def then(self, other: Cost) -> Cost:
        """Both, one after the other: times and counts add, the peak is the larger."""
        return Cost(
            tokens=self.tokens + other.tokens,
            flops=self.flops + other.flops,
            seconds=self.seconds + other.seconds,
            peak_bytes=max(self.peak_bytes, other.peak_bytes),
            disk_bytes=self.disk_bytes + other.disk_bytes,
            parameters=max(self.parameters, other.parameters),
        )

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)
