"""formatspread: how far a score moves with the format of the prompt alone, found by a bandit within a budget.

1. A grammar of formats: the casing of descriptors ("Question", "QUESTION"), what follows them (": ", " - ", ...), what
stands
   between fields, how choices are numbered (1, A, a, I, i) and wrapped. A line break after a descriptor asks for one
   between fields. One choice of each holds for all fields of a prompt.
2. `formats` of them are drawn; the usual one is among them and is graded on all items first: its accuracy is mu. 3.
Two Thompson samplings over the items in one order, first for the best format, then for the worst, each with half of
the
   budget, the second keeping the first one's counts. Prior Beta(max(1.1, 5 mu / (1 - mu)), 5); each step draws from
   every arm and grades the extreme one on its next `batch` items.
4. The two arms of most extreme posterior mean are graded on all items; spread = best - worst, by item paired.

The extremes of many noisy means lie apart even if nothing differs, so the spread that chance alone would give is
simulated, and the effect is there if the spread exceeds it.

Sclar et al. 2024, arXiv:2310.11324 (ICLR 2024). Departs: extremes by posterior instead of empirical means; the
interval and the noise level are this project's; choices are ranked by likelihood; their 500 drawn, 320 used and 40,000
gradings are knobs here, and the final two gradings count in the budget.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from modicum.core.errors import UserError
from modicum.evaluate.probes import Asked, Graded, Grader, Item, Probe, Report

CLAIM = {"figure": "up to 76 points between formats", "where": "abstract", "scale": "LLaMA-2-13B"}
CASINGS: dict[str, Callable[[str], str]] = {"as is": str, "title": str.title, "upper": str.upper, "lower": str.lower}
SEPARATORS = ("", " ", "\n", " -- ", "  ", ":", ": ", ":: ", " - ", "-", ":\n", " : ", "::: ", ":\n\t", "\n\t")
SPACES = ("", " ", "\n", " \n", " -- ", "  ", "; \n", " || ", " <sep> ", ", ", "\n\n", " ; ", "\n ", " , ", ". ")
NUMBERS: dict[str, Callable[[int], str]] = {
    "1": lambda i: str(i + 1),
    "A": lambda i: chr(ord("A") + i),
    "a": lambda i: chr(ord("a") + i),
    "I": lambda i: ("I", "II", "III", "IV", "V", "VI", "VII", "VIII", "IX", "X")[i],
    "i": lambda i: ("i", "ii", "iii", "iv", "v", "vi", "vii", "viii", "ix", "x")[i],
}
WRAPPERS = ("({})", "{}.", "{})", "{} )", "[{}]", "<{}>")
BETWEEN = (" ", "  ", "\t", "")  # a number and its choice


@dataclass(frozen=True)
class Format:
    casing: str
    separator: str
    space: str
    number: str
    wrapper: str
    between: str

    @property
    def valid(self) -> bool:
        return self.separator != "" and ("\n" not in self.separator or "\n" in self.space)

    def write(self, item: Item) -> Asked:
        """The question and its numbered choices; what is scored are the numbers, as they are written in this format."""
        case = CASINGS[self.casing]
        names = [self.wrapper.format(NUMBERS[self.number](i)) for i in range(len(item.choices))]
        options = self.space.join(f"{name}{self.between}{c}" for name, c in zip(names, item.choices, strict=True))
        parts = (
            f"{case('Question')}{self.separator}{item.question}",
            f"{case('Options')}{self.separator}{options}",
            f"{case('Answer')}{self.separator}",
        )
        text = self.space.join(parts)
        ended = text.rstrip(" ")
        return Asked(item, ended, tuple(text[len(ended) :] + name for name in names))


USUAL = Format("as is", ": ", "\n", "A", "{}.", " ")


@functools.cache
def every() -> tuple[Format, ...]:
    """All valid formats of the grammar."""
    lists = (CASINGS, SEPARATORS, SPACES, NUMBERS, WRAPPERS, BETWEEN)
    return tuple(f for f in itertools.starmap(Format, itertools.product(*lists)) if f.valid)


def some_formats(count: int, rng: np.random.Generator) -> list[Format]:
    """The usual format and others, drawn without repetition."""
    formats = every()
    picked = [formats[i] for i in rng.choice(len(formats), count, replace=False)]
    return [USUAL, *[f for f in picked if f != USUAL][: count - 1]]


@dataclass(frozen=True, kw_only=True)
class Config:
    formats: int = 40
    batch: int = 20
    prior: float = 5.0

    def __post_init__(self) -> None:
        if self.formats < 2 or self.batch < 1 or self.prior <= 0:
            raise ValueError("formats must be at least 2, batch at least 1, prior above 0")


TOY = Config(formats=12)


class FormatSpread(Probe):
    config: Config

    def run(self, items: Sequence[Item], grade: Grader, budget: int, seed: int = 0) -> Report:
        c, n = self.config, len(items)
        if not n or budget < 3 * n + 2 * c.batch:
            raise UserError(
                f"a budget of {budget} gradings does not cover three formats on {n} items and a search; give at least "
                f"{3 * n + 2 * c.batch}, or fewer items"
            )
        rng = np.random.default_rng(seed)
        arms = some_formats(c.formats, rng)
        order = [items[i] for i in rng.permutation(n)]
        right: list[list[bool]] = [[] for _ in arms]
        spent = 0

        def pull(arm: int, count: int) -> None:
            nonlocal spent
            todo = order[len(right[arm]) : len(right[arm]) + count]
            right[arm] += [g.right for g in grade([arms[arm].write(item) for item in todo])]
            spent += len(todo)

        pull(0, n)
        mu = float(np.clip(np.mean(right[0]), 0.02, 0.98))
        a, b = max(1.1, c.prior * mu / (1 - mu)), c.prior
        search = budget - 3 * n
        for sign, until in ((1, n + search // 2), (-1, n + search)):
            while spent + c.batch <= until:
                open_ = [i for i in range(len(arms)) if len(right[i]) < n]
                if not open_:
                    break
                won = np.array([sum(right[i]) for i in open_])
                lost = np.array([len(right[i]) for i in open_]) - won
                drawn = rng.beta(a + won, b + lost)
                pull(open_[int(np.argmax(sign * drawn))], c.batch)
        seen = [i for i in range(len(arms)) if right[i]]
        means = np.array([np.mean(right[i]) for i in seen])
        # an arm seen for one batch is extreme by luck: the extremes are those of the posterior means
        likely = np.array([(a + sum(right[i])) / (a + b + len(right[i])) for i in seen])
        best, worst = seen[int(likely.argmax())], seen[int(likely.argmin())]
        for arm in (best, worst):
            pull(arm, n)
        gaps = np.array(right[best], float) - np.array(right[worst], float)
        spread = float(gaps.mean())
        drawn_K = np.array([gaps[rng.integers(n, size=n)].mean() for _ in range(1000)])
        noise = self._noise(order, right, seen, rng)
        low, high = (float(np.quantile(drawn_K, q)) for q in (0.025, 0.975))
        figures = {
            "spread": {"value": spread, "low": min(low, spread), "high": max(high, spread)},
            "usual": _figure(right[0]),
            "best": _figure(right[best]),
            "worst": _figure(right[worst]),
            "median": {"value": float(np.median(means)), "low": float(means.min()), "high": float(means.max())},
            "noise": {"value": float(np.median(noise)), "low": 0.0, "high": float(np.quantile(noise, 0.95))},
        }
        detected, most = spread > figures["noise"]["high"], figures["noise"]["high"]
        verdict = (
            f"formats differ by {spread:.1%}, {'more' if detected else 'no more'} than the {most:.1%} of chance alone"
        )
        rows = []
        for i in seen:
            hits, count = int(sum(right[i])), len(right[i])
            rows.append({"format": repr(arms[i]), "items": count, "right": hits, "mean": hits / count})
        return Report(figures=figures, detected=detected, verdict=verdict, graded=spent, rows=rows)

    def _noise(
        self, order: Sequence[Item], right: list[list[bool]], seen: list[int], rng: np.random.Generator
    ) -> np.ndarray:
        """Spreads between the extremes if all formats were alike and answers flipped at the rate they are seen to.

        An item has one chance of being right under all formats: the share of formats that had it right, drawn towards
        the mean. Each simulated arm sees as many items as the real one; the extremes are then graded on all, as above.
        """
        n = len(order)
        count, won = np.zeros(n), np.zeros(n)
        for i in seen:
            count[: len(right[i])] += 1
            won[: len(right[i])] += right[i]
        mean = won.sum() / count.sum()
        chance = (won + mean) / (count + 1)
        sizes = [len(right[i]) for i in seen]
        rows = []
        for _ in range(200):
            drawn = rng.random((len(seen), n)) < chance
            means = np.array([drawn[k, :size].mean() for k, size in enumerate(sizes)])
            rows.append(drawn[means.argmax()].mean() - drawn[means.argmin()].mean())
        return np.array(rows)

    def simulate(self, rng: np.random.Generator, effect: bool) -> tuple[list[Item], Grader, int]:
        """A model that answers by content with some noise, or one that loses 40 points where choices are numbered 1."""
        items = [Item(str(i), f"question {i}", ("a", "b", "c", "d"), int(rng.integers(4))) for i in range(150)]
        skill = {i.id: float(rng.beta(2, 2)) for i in items}

        def grade(prompts: Sequence[Asked]) -> list[Graded]:
            rows: list[Graded] = []
            for a in prompts:
                penalty = 0.4 if effect and any(ch.isdigit() for ch in a.choices[0]) else 0.0
                rows.append(Graded(bool(rng.random() < skill[a.item.id] - penalty), (0.0,) * 4))
            return rows

        return items, grade, 1500


def _figure(right: Sequence[bool]) -> dict[str, float]:
    from modicum.evaluate.answers import wilson

    low, high = wilson(sum(right), len(right))
    return {"value": float(np.mean(right)), "low": low, "high": high}
