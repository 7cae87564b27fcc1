"""precog: a score guessed before anything is run, from a description of the experiment and the scores of like ones.

1. records {description, configuration, score, source}; names of data sets and models and every result are redacted;
2. a query is compared with all records by its text (hashed tf-idf, or an `embedding` column) and its configuration,
   EXCEPT records of its own source: the same paper or task in another row is an answer, not a prediction;
3. in logit space: ridge regression on the configuration, plus the distance-weighted mean of the neighbours' residuals;
4. intervals are conformal: residuals of records whose source was left out; confidence is the width of the interval.

Columns: `description`, `source`, score, and numbers as far as known: parameters, tokens, shots, choices, chance.

Park et al. 2025, arXiv:2509.20645: there language models predict, and those that search the literature better predict
better; neither is here. What is kept: redaction, exclusion of the source, error by confidence. `baselines` gives what
a predictor must beat: the mean of all scores, and the nearest neighbour.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from modicum.core.errors import UserError, unknown
from modicum.laws.fit import Fit, Prediction
from modicum.laws.forms import Law
from modicum.laws.table import Runs, as_table, to_columns

CLAIM = {
    "figure": "8.7 (v1) or 9.9 (v2) points mean error at high confidence",
    "where": "abstracts",
    "scale": "2,290 records",
}
NUMBERS = ("parameters", "tokens", "shots", "choices", "chance")
BUCKETS = 2048
_WORD = re.compile(r"[a-z]{2,}")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Knobs of the neighbours and of the regression."""

    neighbours: int = 12
    ridge: float = 1.0
    text: float = 1.0  # weight of the text in the distance, against 1 of the configuration

    def __post_init__(self) -> None:
        if self.neighbours < 1 or self.ridge <= 0 or self.text < 0:
            raise ValueError("neighbours must be at least 1, ridge above 0, text not below 0")


class Precog(Law):
    config: Config
    target = "score"
    columns = ()

    def fit(self, runs: Runs, seed: int = 0) -> Fit:
        given = to_columns(runs)
        for name in ("description", "source"):
            if name not in given:
                raise unknown("column", name, given, "precog reads description, source and score")
        table = as_table(given, (), target="score")
        sources = [str(v) for v in given["source"]]
        if len(set(sources)) < 3:
            raise UserError(f"{len(set(sources))} sources are too few: a query's own is left out, others must remain")
        state = {
            "score": table["score"].tolist(),
            "sources": sources,
            "text": [np.flatnonzero(v).tolist() for v in _counts(given)] if "embedding" not in given else None,
            "embedding": [list(map(float, v)) for v in given["embedding"]] if "embedding" in given else None,
            "numbers": _numbers(given),
        }
        fit = Fit(
            law="precog",
            target="score",
            parameters={"records": float(len(sources)), "sources": float(len(set(sources)))},
            points=len(sources),
            runs=len(set(sources)),
            seed=seed,
            method="residuals",
            knobs=dataclasses.asdict(self.config),
            extra=state,
        )
        mean_N, spread_N = self._guess(fit, given)
        ratio = np.abs(_logit(table["score"]) - mean_N) / spread_N
        fit.extra["conformal"] = np.sort(ratio).tolist()
        error = float(np.abs(_sigmoid(mean_N) - table["score"]).mean())
        return dataclasses.replace(fit, residual=error, parameters=fit.parameters | {"left_out_error": error})

    def _guess(self, fit: Fit, given: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
        """Logit of the score of each query (N) and how much its neighbours disagree, its own source left out."""
        known, state = fit.extra, self.config
        y_M = _logit(np.array(known["score"]))
        own_MF, number_NF = np.array(known["numbers"]), np.array(_numbers(given))
        known_F = np.maximum(np.isfinite(own_MF).sum(0), 1)
        middle = np.nansum(own_MF, 0) / known_F
        spread = np.sqrt(np.nansum((own_MF - middle) ** 2, 0) / known_F)
        spread = np.where(spread > 0, spread, 1.0)
        z_MF, z_NF = (np.nan_to_num((v - middle) / spread) for v in (own_MF, number_NF))
        like_NM = _likeness(known, given)
        apart_NM = state.text * (1 - like_NM) + 0.1 * ((z_NF[:, None] - z_MF[None]) ** 2).mean(2)
        sources, queries = np.array(known["sources"]), [str(v) for v in given.get("source", [""] * len(z_NF))]
        solved: dict[str, tuple[float, np.ndarray, np.ndarray]] = {}
        mean_N, spread_N = np.zeros(len(z_NF)), np.zeros(len(z_NF))
        for i, source in enumerate(queries):
            if source not in solved:
                keep = sources != source
                if not keep.any():
                    raise UserError(f"all records come from the source {source!r} of the query; nothing is left to ask")
                x, y = z_MF[keep], y_M[keep]
                gram = x.T @ x + state.ridge * np.eye(x.shape[1])
                weight = np.linalg.solve(gram, x.T @ (y - y.mean()))
                solved[source] = float(y.mean()), weight, keep
            base, weight, keep = solved[source]
            residual_K = y_M[keep] - base - z_MF[keep] @ weight
            apart_K = apart_NM[i, keep]
            near = np.argsort(apart_K, kind="stable")[: state.neighbours]
            nearness = 1 / (apart_K[near] + 0.05)
            nearness /= nearness.sum()
            moved = float(nearness @ residual_K[near])
            mean_N[i] = base + z_NF[i] @ weight + moved
            spread_N[i] = 0.3 + np.sqrt(float(nearness @ (residual_K[near] - moved) ** 2))
        return mean_N, spread_N

    def predict(self, fit: Fit, points: Runs, level: float = 0.95) -> Prediction:
        given = to_columns(points)
        if "description" not in given:
            raise unknown("column", "description", given, "a query is a text, and perhaps numbers")
        mean_N, spread_N = self._guess(fit, given)
        ratios = fit.extra["conformal"]
        rank = min(int(np.ceil((len(ratios) + 1) * level)), len(ratios)) - 1
        wide_N = spread_N * ratios[rank]
        return Prediction(_sigmoid(mean_N), _sigmoid(mean_N - wide_N), _sigmoid(mean_N + wide_N), level)

    def simulate(self, rng: np.random.Generator, *, noise: float = 0.0) -> tuple[dict[str, Any], dict[str, Any]]:
        """Five kinds of task in 20 sources; a score depends on the kind's words and on the size."""
        kinds = [
            "grade school mathematics word problems",
            "everyday physical commonsense choice",
            "news topic labels",
            "open domain trivia short answers",
            "reading passages boolean questions",
        ]

        def rows(count: int, noise: float, prefix: str) -> dict[str, Any]:
            kind = rng.integers(5, size=count)
            size = 10 ** rng.uniform(7.5, 10.5, count)
            logit = np.array([-2.0, 0.5, 2.0, -1.0, 1.0])[kind] + 0.5 * (np.log10(size) - 9)
            return {
                "description": [f"We evaluate models on {kinds[k]}." for k in kind],
                "source": [f"{prefix} {i % 20}" for i in range(count)],
                "parameters": size.tolist(),
                "score": np.clip(_sigmoid(logit + 10 * noise * rng.normal(size=count)), 0, 1).tolist(),
            }

        return rows(160, noise, "paper"), rows(12, 0.0, "new paper")


def redact(text: str, names: Sequence[str] = ()) -> str:
    """The text without given names, capitalised names of models and data sets, links, and any number.

    A name is a word with a capital after its first letter or a digit in it (GPT-4, HellaSwag, LLaMA, SST-2), which no
    ordinary word has.
    """
    for name in sorted(names, key=len, reverse=True):
        text = re.sub(rf"(?<!\w){re.escape(name)}(?!\w)", "[NAME]", text, flags=re.IGNORECASE)
    text = re.sub(r"https?://\S+|arXiv:\S+", "[LINK]", text)
    text = re.sub(
        r"(?<![\w\[])(?=\w*[A-Za-z])[\w]*(?:[a-z]\w*[A-Z]|[A-Z]\w*[A-Z]|[A-Za-z]\d|\d[A-Za-z])[\w.-]*", "[NAME]", text
    )
    text = re.sub(r"(\[NAME\])-[\w.-]+", r"\1", text)
    return re.sub(r"(?<!\w)[±+-]?\d[\d.,]*\s*%?", "[NUMBER]", text)


def baselines(runs: Runs) -> dict[str, float]:
    """Mean absolute error of guessing the mean of all other sources' scores, and of the nearest record's score."""
    given = to_columns(runs)
    score, sources = as_table(given, (), target="score")["score"], np.array([str(v) for v in given["source"]])
    nearest = Precog(Config(neighbours=1, ridge=1e6)).fit(given)
    mean = [abs(score[i] - score[sources != sources[i]].mean()) for i in range(len(score))]
    return {"mean": float(np.mean(mean)), "nearest": nearest.residual}


def _numbers(given: dict[str, Any]) -> list[list[float]]:
    rows = len(next(iter(given.values())))
    columns = []
    for name in NUMBERS:
        column = [float("nan") if v is None else float(v) for v in given.get(name, [None] * rows)]
        columns.append([float(np.log10(v)) if name in ("parameters", "tokens") and v > 0 else v for v in column])
    return [[v if np.isfinite(v) else float("nan") for v in row] for row in zip(*columns, strict=True)]


def _counts(given: dict[str, Any]) -> np.ndarray:
    """Which hashed words and pairs of words each description has, N x BUCKETS."""
    has = np.zeros((len(given["description"]), BUCKETS))
    for i, text in enumerate(given["description"]):
        words = _WORD.findall(str(text).lower())
        for word in (*words, *(f"{a} {b}" for a, b in itertools.pairwise(words))):
            has[i, int.from_bytes(hashlib.blake2b(word.encode(), digest_size=4).digest(), "big") % BUCKETS] = 1
    return has


def _likeness(known: dict[str, Any], given: dict[str, Any]) -> np.ndarray:
    """Cosine of every query with every record, NM."""
    if known["embedding"] is not None:
        if "embedding" not in given:
            raise UserError("the records were fitted with an embedding column; queries need one of the same encoder")
        a, b = np.array(given["embedding"], float), np.array(known["embedding"], float)
    else:
        b = np.zeros((len(known["text"]), BUCKETS))
        for row, words in zip(b, known["text"], strict=True):
            row[words] = 1
        rare = np.log((1 + len(b)) / (1 + b.sum(0)))
        a, b = _counts(given) * rare, b * rare
    a, b = (v / np.maximum(np.linalg.norm(v, axis=1, keepdims=True), 1e-12) for v in (a, b))
    like_NM: np.ndarray = a @ b.T
    return like_NM


def _logit(p: np.ndarray) -> np.ndarray:
    p = np.clip(p, 0.005, 0.995)
    return np.log(p / (1 - p))


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))
