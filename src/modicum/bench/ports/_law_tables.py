"""Published run tables as back-tests of a law: which rows are fitted, which are held out, in the laws' columns.

A protocol takes the folder of the tables and gives cases. `loss`: smaller runs predict larger ones; `batch`: also at
other batches. `ladder`, `pythia`: small models predict the benchmarks of larger ones. `curve`: a smaller model's curve
and the beginning of a larger one's predict the rest. `text`: records of other tasks predict a task. Each
table is read by the name under which it was kept. Runs made here: `_law_own`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from modicum.core.errors import UserError, unknown
from modicum.laws.table import read_runs

Columns = dict[str, list[Any]]
# Items of each task's public split, and what guessing scores: standard errors and the scores that say nothing.
TASKS = {
    "lambada_openai": (5153, 0.0),
    "arc_easy": (2376, 0.25),
    "arc_challenge": (1172, 0.25),
    "piqa": (1838, 0.5),
    "sciq": (1000, 0.25),
    "winogrande": (1267, 0.5),
    "logiqa": (651, 0.25),
    "wsc": (104, 0.5),
}
ABOUT = {
    "lambada_openai": "the last word of a passage from a novel must be guessed from the whole passage",
    "arc_easy": "grade school science questions that are easy for retrieval, with four choices",
    "arc_challenge": "grade school science questions that need reasoning, with four choices",
    "piqa": "everyday physical commonsense: which of two ways reaches a goal",
    "sciq": "crowdsourced science questions with four choices, often stated in a supporting sentence",
    "winogrande": "a pronoun must be resolved by commonsense between two names in a sentence",
    "logiqa": "logical reasoning from civil service examinations with four choices",
    "wsc": "Winograd schemas: does a pronoun refer to a named person, yes or no",
    "MMLU": "examination questions over 57 academic and professional subjects with four choices",
    "ARC-C": "grade school science questions that need reasoning, with four choices",
    "HellaSwag": "which of four endings continues an everyday scene",
    "Winograd": "a pronoun must be resolved by commonsense between two names in a sentence",
    "TruthfulQA": "questions that many people answer with a common misconception, choices",
    "GSM8K": "grade school mathematics word problems answered with a number after several steps",
    "HumanEval": "Python functions are written from a docstring and must pass unit tests",
    "XWinograd": "pronoun resolution by commonsense in several languages",
}


@dataclass(frozen=True)
class Case:
    """fit, held: columns; chance: what guessing scores; together: the benchmark whose tasks are averaged."""

    name: str
    fit: Columns
    heldout: Columns
    chance: float | None = None
    together: str = ""
    extra: dict[str, Any] = field(default_factory=dict)
    own: bool = False  # of runs made here: few, so that a seed sees a part of fewer than ten, too


Protocols = dict[str, tuple[Callable[[Path], Iterator[Case]], ...]]


def cases(protocols: Protocols, protocol: str, folder: Path) -> list[Case]:
    """All cases of a protocol whose tables lie in the folder. Raises UserError where there are none."""
    if protocol not in protocols:
        raise unknown("protocol", protocol, protocols)
    result = [case for make in protocols[protocol] for case in make(folder)]
    if not result:
        raise UserError(f"{folder} holds none of the run tables of protocol={protocol}; see bench/ports/_law_tables.py")
    return result


def _read(folder: Path, name: str) -> dict[str, np.ndarray] | None:
    path = folder / f"{name}.parquet"
    return {n: np.array(v, dtype=object) for n, v in read_runs(path).items()} if path.is_file() else None


def pick(columns: dict[str, Any], keep: np.ndarray) -> Columns:
    return {n: [v for v, k in zip(c, keep, strict=True) if k] for n, c in columns.items()}


# loss -----------------------------------------------------------------------------------------------


def chinchilla(folder: Path) -> Iterator[Case]:
    """Reconstruction of Figure 4 without its five highest losses, as its authors do; the smaller half by FLOPs."""
    t = _read(folder, "chinchilla_points")
    if t is None:
        return
    loss, flops = t["loss"].astype(float), t["flops"].astype(float)
    rows = {"parameters": t["params"], "tokens": t["tokens"], "flops": t["flops"], "loss": t["loss"]}
    usual = loss < np.sort(loss)[-5]
    small = flops <= np.median(flops[usual])
    yield Case("chinchilla", pick(rows, usual & small), pick(rows, usual & ~small))


def gemstones(folder: Path) -> Iterator[Case]:
    """Constant rate, checkpoints kept: the 16 smallest runs predict the last 30% of the others' curves."""
    t = _read(folder, "gemstones")
    if t is None:
        return
    main = t["series"] == "main"
    rows = {"run": t["run_name"], "parameters": t["params"], "tokens": t["tokens"], "loss": t["loss"]}
    t = {n: np.array(v, dtype=object) for n, v in pick(rows, main).items()}
    size, tokens = t["parameters"].astype(float), t["tokens"].astype(float)
    sizes = {run: float(size[t["run"] == run][0]) for run in dict.fromkeys(t["run"])}
    small = set(sorted(sizes, key=lambda run: (sizes[run], run))[:16])
    end = np.array([tokens[t["run"] == run].max() for run in t["run"]])
    is_small = np.array([run in small for run in t["run"]])
    yield Case("gemstones", pick(t, is_small), pick(t, ~is_small & (tokens >= 0.7 * end)))


LADDER = {"190M": 190354176, "370M": 371262464, "760M": 758220288, "1B": 1279395840, "3B": 3169537280}


def _ladder(folder: Path) -> dict[str, np.ndarray] | None:
    t = _read(folder, "olmo_ladder")
    if t is None:
        return None
    again = np.array([run.endswith("-1xC") for run in t["run"]])
    # the targets' rows give no tokens: steps times the batch
    counted = zip(t["throughput/total_tokens"], t["step"], t["batch_size_in_tokens"], strict=True)
    t["throughput/total_tokens"] = np.array(
        [n or (step or 0) * (batch or 0) for n, step, batch in counted], dtype=object
    )
    known = np.array([v > 0 for v in t["throughput/total_tokens"]])
    return {n: v[~again & known] for n, v in t.items()}


def ladder_loss(folder: Path) -> Iterator[Case]:
    """OLMo ladder, C4 loss, the rate decaying: 190M to 760M predict the finished 1B and 3B runs."""
    t = _ladder(folder)
    if t is None:
        return
    loss = np.array([v if v is not None else np.nan for v in t["c4_en-validation_ce"]], float)
    ladder = np.isin(t["size"], list(LADDER)) & np.isfinite(loss)
    rate, peak = (np.array([v or 0 for v in t[n]], float) for n in ("optim/learning_rate_group0", "learning_rate_peak"))
    tokens = t["throughput/total_tokens"].astype(float)
    end = np.array([tokens[(t["run"] == run) & ladder].max(initial=0) for run in t["run"]])
    # what is left of the decay, by the rate itself: the schedule ends at a tenth of its peak
    left = np.clip((rate / np.maximum(peak, 1e-12) - 0.1) / 0.9, 0, 1)
    rows = {
        "run": t["run"],
        "parameters": [LADDER.get(s, 1) for s in t["size"]],
        "tokens": tokens,
        "loss": loss,
        "decay_left": np.where(tokens >= 0.995 * end, 0.0, np.maximum(left, 0.01)),
    }
    small = np.isin(t["size"], ["190M", "370M", "760M"])
    warm = tokens > 0.02 * end
    yield Case("olmo ladder", pick(rows, ladder & small & warm), pick(rows, ladder & ~small & (tokens == end)))


def steplaw(folder: Path) -> Iterator[Case]:
    """Step Law: best rate of every size, tokens and batch, batches from the best one on; up to 537M predict 1.07B."""
    t = _read(folder, "steplaw_dense")
    if t is None:
        return
    best: dict[Any, float] = {}
    for n, d, b, loss in zip(t["params"], t["tokens"], t["batch_sequences"], t["smooth_loss"], strict=True):
        if loss is not None and np.isfinite(loss):
            best[n, d, b] = min(best.get((n, d, b), np.inf), float(loss))
    at = {cell: min((v, b) for (n, d, b), v in best.items() if (n, d) == cell)[1] for cell in {k[:2] for k in best}}
    rows = [(n, d, b, v) for (n, d, b), v in best.items() if b >= at[n, d]]
    columns: Columns = {
        "parameters": [float(r[0]) for r in rows],
        "tokens": [float(r[1]) for r in rows],
        "batch_tokens": [2048.0 * r[2] for r in rows],
        "steps": [r[1] / (2048.0 * r[2]) for r in rows],
        "loss": [r[3] for r in rows],
    }
    small = np.array(columns["parameters"]) < 6e8
    yield Case("step law", pick(columns, small), pick(columns, ~small))


# scores ---------------------------------------------------------------------------------------------

LADDER_TASKS = {
    "mmlu_stem_test": 0.25,
    "hellaswag_val": 0.25,
    "arc_easy_test": 0.25,
    "arc_challenge_test": 0.25,
    "boolq_val": 0.5,
    "csqa_val": 0.2,
    "openbookqa_test": 0.25,
    "piqa_val": 0.5,
    "socialiqa_val": 1 / 3,
    "winogrande_val": 0.5,
}


def ladder_scores(folder: Path) -> Iterator[Case]:
    """The 25 finished ladder runs (190M to 3B) predict ten tasks of the 7B and 13B targets."""
    t = _ladder(folder)
    if t is None:
        return
    flops = np.array([1e9 * float(v) if v else np.nan for v in t["throughput/total_training_Gflops"]])
    tokens = t["throughput/total_tokens"].astype(float)
    size = np.array([LADDER.get(s, {"7B": 6.9e9, "13B": 13.2e9}.get(s, 1)) for s in t["size"]], float)
    last = np.array([tokens[t["run"] == run].max() for run in t["run"]]) == tokens
    small = np.isin(t["size"], list(LADDER)) & last
    large = np.isin(t["run"], ["peteish7_eval_anneal", "peteish13_eval_full"]) & last
    flops = np.where(np.isfinite(flops), flops, 6 * size * tokens)
    for task, chance in LADDER_TASKS.items():
        suffix = "acc" if task == "boolq_val" else "len_norm"
        score, loss = t[f"downstream/{task}_rc_5shot_{suffix}"], t[f"downstream_bpb/{task}_rc_5shot_bpb"]
        known = np.array([a is not None and b is not None for a, b in zip(score, loss, strict=True)])
        rows = {
            "item": [task] * len(score),
            "run": t["run"],
            "parameters": size,
            "tokens": tokens,
            "flops": flops,
            "score": score,
            "task_loss": loss,
        }
        yield Case(task, pick(rows, small & known), pick(rows, large & known), chance, "ladder")


def _pythia(folder: Path) -> dict[str, np.ndarray] | None:
    t = _read(folder, "pythia_evals")
    if t is None:
        return None
    usual = (t["metric"] == "acc") & np.array([v is not None for v in t["tokens"]])
    plain = np.array([model.count("-") == 1 or model == "pythia-1b-bf16" for model in t["model"]])
    return {n: v[usual & plain] for n, v in t.items()}


def pythia_scores(folder: Path) -> Iterator[Case]:
    """Pythia, five-shot, finished: 70M to 2.8B predict 6.9B and 12B on every task (57 of them MMLU's subjects)."""
    t = _pythia(folder)
    if t is None:
        return
    t = {n: v[(t["shots"] == "five-shot") & (t["step"] == 143000)] for n, v in t.items()}
    for task in dict.fromkeys(t["task"]):
        at = t["task"] == task
        size = t["params"].astype(float)
        items, chance = TASKS.get(task, (200, 0.25))
        rows = {
            "item": t["task"],
            "parameters": size,
            "tokens": t["tokens"],
            "flops": 6 * size * t["tokens"].astype(float),
            "score": t["value"],
            "items": [items] * len(size),
        }
        yield Case(task, pick(rows, at & (size < 3e9)), pick(rows, at & (size > 5e9)), chance, "pythia")


# curves ---------------------------------------------------------------------------------------------


def pythia_curves(folder: Path) -> Iterator[Case]:
    """Pythia, zero-shot: the 2.8B run and the first third of the 12B one predict the rest of the 12B curve."""
    t = _pythia(folder)
    if t is None:
        return
    t = {n: v[(t["shots"] == "zero-shot") & (t["step"].astype(int) >= 1000)] for n, v in t.items()}
    size, tokens = t["params"].astype(float), t["tokens"].astype(float)
    small, large = (np.array([m == f"pythia-{s}" for m in t["model"]]) for s in ("2.8b", "12b"))
    for task, (items, chance) in TASKS.items():
        at = t["task"] == task
        rows = {
            "run": t["model"],
            "parameters": size,
            "tokens": tokens,
            "score": t["value"],
            "items": [items] * len(size),
        }
        early = tokens <= tokens.max() / 3
        last = pick(rows, at & large & early)["score"][-1:]
        fit, late = pick(rows, at & (small | (large & early))), pick(rows, at & large & ~early)
        yield Case(task, fit, late, chance, extra={"last": last})


# text -----------------------------------------------------------------------------------------------


def descriptions(folder: Path) -> Iterator[Case]:
    """Every task predicted from records of all others (finished Pythia runs and public base models)."""
    rows: list[dict[str, Any]] = []
    t = _pythia(folder)
    if t is not None:
        for i in np.flatnonzero(t["step"] == 143000):
            if (task := t["task"][i]) in TASKS:
                shots = {"zero-shot": 0, "five-shot": 5}[t["shots"][i]]
                rows.append(
                    _record(task, float(t["params"][i]), float(t["tokens"][i]), shots, TASKS[task][1], t["value"][i])
                )
    t = _read(folder, "observational_base_models")
    chances = {"MMLU": 0.25, "ARC-C": 0.25, "HellaSwag": 0.25, "Winograd": 0.5, "XWinograd": 0.5, "TruthfulQA": 0.25}
    usual_shots = {"MMLU": 5, "ARC-C": 25, "HellaSwag": 10, "Winograd": 5, "GSM8K": 5}
    if t is not None:
        for task in (n for n in t if n in ABOUT):
            for score, size, tokens in zip(t[task], t["params_b"], t["tokens_t"], strict=True):
                if score is not None and np.isfinite(score) and size and tokens and np.isfinite(size * tokens):
                    shots, chance = usual_shots.get(task, 0), chances.get(task, 0.0)
                    rows.append(_record(task, 1e9 * size, 1e12 * tokens, shots, chance, float(score)))
    for source in dict.fromkeys(row["source"] for row in rows):
        rest = [row for row in rows if row["source"] != source]
        yield Case(source, _columns(rest), _columns(row for row in rows if row["source"] == source))


def _record(task: str, size: float, tokens: float, shots: int, chance: float, score: float) -> dict[str, Any]:
    text = f"Language models are graded on {ABOUT[task]}, with {'no' if shots == 0 else 'some'} solved examples."
    return {
        "description": text,
        # one source for the two tables' forms of one benchmark: else one would give away the other
        "source": {"arc_challenge": "ARC-C", "winogrande": "Winograd"}.get(task, task),
        "parameters": size,
        "tokens": tokens,
        "shots": shots,
        "chance": chance,
        "score": float(score),
    }


def _columns(rows: Iterable[dict[str, Any]]) -> Columns:
    listed = list(rows)
    return {name: [row[name] for row in listed] for name in listed[0]}


PROTOCOLS: Protocols = {
    "loss": (chinchilla, gemstones, ladder_loss),
    "batch": (steplaw,),
    "ladder": (ladder_scores,),
    "pythia": (pythia_scores,),
    "curve": (pythia_curves,),
    "text": (descriptions,),
}
