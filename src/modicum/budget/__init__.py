"""Room budget: what work may cost (`Budget`), what it should cost (`Cost`), what it did cost (`Meter`)."""

from modicum.budget.budget import Budget, Deadline
from modicum.budget.cost import Cost
from modicum.budget.meter import Meter

__all__ = ["Budget", "Cost", "Deadline", "Meter"]
