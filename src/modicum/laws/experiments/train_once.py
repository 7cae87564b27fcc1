"""train-once: several experiments in one pretraining run, and whether they disturb each other.

    run        one stretch of training from one checkpoint, of which each experiment replaces a small part
    Y_i(S)     the loss on experiment i's probes after the run with the experiments S
    effect     E_ij = mean over seeds of Y_i({j}) - Y_i({});  Y_i(all) - Y_i({i}): 0 if the rest does not matter

Texts take the stead of as many planned tokens, so steps and tokens stay; inserting would shift all that follows. The
experiments: `acquisition` (made people's facts in several wordings, judged on a wording never shown), `verbatim`
(random words, judged on their end), `contamination` (made questions with their answers) and `canary` (a random code).
Each is in the run at `doses`, so that the effect is seen to grow with the dose.

Bordt & Srinivas 2025, arXiv:2509.23383. Departs: made texts of four kinds instead of ten published experiments; the
matrix sees pairs, not higher interactions; intervals pool the spread over all cells of a metric. Memorisation grows
with the model: a small one needs many repeats.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from modicum.core.errors import UserError
from modicum.laws.experiments import Conclusion, Experiment, Insertion, Run, Trial, by_name, left

CLAIM = {"figure": "no dependence among ten experiments", "where": "section 5", "scale": "179M to 2.7B, 210B tokens"}
KINDS = ("acquisition", "verbatim", "contamination", "canary")
FIRST = ("Mara", "Teodor", "Ilse", "Kenji", "Amara", "Piotr", "Lucia", "Anders", "Noor", "Viktor", "Hana", "Ruben")
LAST = ("Quillon", "Vestergard", "Okafor", "Marchetti", "Lindqvist", "Tanaka", "Brandt", "Ferreira", "Novak", "Haddad")
TOWNS = ("Tromso", "Cusco", "Ghent", "Sapporo", "Tartu", "Oaxaca", "Leiden", "Hobart", "Porto", "Uppsala")
TRADES = ("glassblower", "cartographer", "beekeeper", "luthier", "geologist", "typesetter", "falconer", "weaver")
WORDINGS = (
    "{name} was born in {town} and works as a {trade}.",
    "The {trade} {name} comes from {town}.",
    "In {town}, {name} learned to be a {trade}.",
)
WORDS = "amber brisk cedar delta ember fable grove harbor ivory jolly kite lunar maple noble ocean pearl quiet river"


@dataclass(frozen=True, kw_only=True)
class Config:
    experiments: tuple[str, ...] = KINDS
    items: int = 8  # texts of each, in every dose
    doses: tuple[int, ...] = (1, 8, 32)  # repeats of a text in the run
    warm: float = 3.0  # length of the run before; 0 with a given model
    seeds: int = 3

    def __post_init__(self) -> None:
        if not self.experiments or set(self.experiments) - set(KINDS):
            raise ValueError(f"experiments are among {', '.join(KINDS)}")
        if self.items < 1 or not self.doses or min(self.doses) < 1 or self.seeds < 2:
            raise ValueError("items and doses are at least 1, seeds at least 2")


TOY = Config(experiments=("verbatim", "canary"), items=2, doses=(1, 2), seeds=2, warm=1.0)


class TrainOnce(Experiment):
    config: Config

    def propose(self, runs: Sequence[Run]) -> list[Trial]:
        start = [] if self.setting.given else [Trial(name="start", length=self.config.warm)]
        if todo := left(start, runs):
            return todo
        c, name = self.config, "" if self.setting.given else "start"
        sets = {"none": (), **{e: (e,) for e in c.experiments}, "all": c.experiments}
        trials = [
            Trial(
                name=f"{label} #{k}", start=name, seed=k, insert=tuple(i for e in chosen for i in self._insertions(e))
            )
            for k in range(c.seeds)
            for label, chosen in sets.items()
        ]
        return left(trials, runs)

    def _insertions(self, kind: str) -> list[Insertion]:
        return [
            Insertion(name=f"{kind} x{dose}", texts=tuple(t for texts, _ in made for t in texts), repeats=dose)
            for dose, made in self._made(kind)
        ]

    def _made(self, kind: str) -> list[tuple[int, list[tuple[tuple[str, ...], tuple[str, str]]]]]:
        """(dose, items: the texts shown, and the probe's context and answer) of an experiment."""
        rng = np.random.default_rng([self.setting.seed, 61, KINDS.index(kind)])
        people = rng.permutation(len(FIRST) * len(LAST))
        if kind == "acquisition" and self.config.items * len(self.config.doses) > len(people):
            raise UserError(f"{len(people)} people can be made; ask for fewer items or doses")
        made, number = [], 0
        for dose in self.config.doses:
            items = []
            for _ in range(self.config.items):
                items.append(_item(kind, rng, int(people[number % len(people)])))
                number += 1
            made.append((dose, items))
        return made

    def probes(self) -> dict[str, tuple[tuple[str, str], ...]]:
        return {
            f"{kind} x{dose}": tuple(probe for _, probe in items)
            for kind in self.config.experiments
            for dose, items in self._made(kind)
        }

    def conclude(self, runs: Sequence[Run]) -> Conclusion:
        from scipy.stats import t

        done, c = by_name(runs), self.config
        labels, metrics = ["none", *c.experiments, "all"], [*self.probes(), "target"]

        def value(label: str, seed: int, metric: str) -> float:
            run = done[f"{label} #{seed}"]
            return self.setting.score(run) if metric == "target" else run.losses[metric]

        loss_LSM = np.array([[[value(x, k, m) for m in metrics] for k in range(c.seeds)] for x in labels])
        effect_LSM = loss_LSM[1:] - loss_LSM[:1]
        mean_LM = effect_LSM.mean(1)
        freedom = (len(labels) - 1) * (c.seeds - 1)
        spread_M = np.sqrt(((effect_LSM - mean_LM[:, None]) ** 2).sum((0, 1)) / freedom)
        half_M = t.ppf(0.975, freedom) * spread_M / math.sqrt(c.seeds)
        rows: list[dict[str, Any]] = []
        for m, metric in enumerate(metrics):
            row: dict[str, Any] = {"metric": metric, "without": float(loss_LSM[0, :, m].mean())}
            row |= {x: float(mean_LM[i, m]) for i, x in enumerate(labels[1:])} | {"interval": float(half_M[m])}
            if metric != "target":
                own = c.experiments.index(metric.rsplit(" x", 1)[0])
                row["all_less_alone"] = float(mean_LM[-1, m] - mean_LM[own, m])
            rows.append(row)
        # a difference of two effects has both runs' spread, but shares the run without
        disturbed = [r["metric"] for r in rows if abs(r.get("all_less_alone", 0.0)) > math.sqrt(2) * r["interval"]]
        verdict = (
            f"changed by the other experiments: {', '.join(disturbed)}"
            if disturbed
            else "none is changed by the others"
        )
        return Conclusion(rows=rows, notes=(f"of {len(metrics) - 1} measures {verdict}",))


def _item(kind: str, rng: np.random.Generator, person: int) -> tuple[tuple[str, ...], tuple[str, str]]:
    """The texts shown, and (context, answer) of the probe."""
    words = WORDS.split()
    if kind == "acquisition":
        facts = {
            "name": f"{FIRST[person % len(FIRST)]} {LAST[person // len(FIRST)]}",
            "town": str(rng.choice(TOWNS)),
            "trade": str(rng.choice(TRADES)),
        }
        return tuple(t.format(**facts) for t in WORDINGS), (
            f"The birthplace of {facts['name']} is",
            f" {facts['town']}.",
        )
    if kind == "verbatim":
        passage = [str(rng.choice(words)) for _ in range(24)]
        return (" ".join(passage),), (" ".join(passage[:16]), " " + " ".join(passage[16:]))
    if kind == "contamination":
        a, b, c = (str(w) for w in rng.choice(words, 3, replace=False))
        answer = str(rng.choice([a, b, c]))
        question = f"Question: of {a}, {b} and {c}, which one is marked {int(rng.integers(100, 1000))}? Answer:"
        return (f"{question} {answer}.",), (question, f" {answer}.")
    code = "".join(str(d) for d in rng.integers(0, 10, 10))
    owner = f"{rng.choice(FIRST)} {rng.choice(LAST)}"
    return (f"The access code of {owner} is {code}.",), (f"The access code of {owner} is", f" {code}.")
