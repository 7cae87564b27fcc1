"""What a run gained, in a sentence and a few figures: the same for the report and the terminal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from modicum.budget.units import bytes_text
from modicum.core.events import count_text, seconds_text

ARMS = {"closed": "closed book", "retrieved": "grounded", "gold": "with the right passage"}


def names(figures: dict[str, Any]) -> dict[str, str]:
    """{role: what a reader calls the model}."""
    model = figures.get("adapt", {}).get("model")
    base = Path(model).name if model else "the model pretrained here"
    adapted = f"{base}, adapted" if "adapt" in figures else base
    return {"before": f"{base}, as published" if model else base, "answers": adapted}


def title(variant: dict[str, Any], known: dict[str, str]) -> str:
    role = variant.get("role", "answers")
    if role == "compressed":
        return f"{known['answers']}, {variant['name']}"
    return known[role] if role == "before" else f"{known[role]}, {variant['name']}"


def graded(figures: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = figures.get("evaluate", {}).get("graded") or {}
    return found


def lead(figures: dict[str, Any]) -> str:
    """The sentence that a reader takes away."""
    if "adapt" not in figures:
        return ""
    a, known, answered = figures["adapt"], names(figures), graded(figures)
    spent = f"{seconds_text(a['training_seconds'])} of training on {count_text(a['pairs_train'])} pairs of this corpus"
    parts = []
    if answered:
        last = answered["answers"]["figures"]
        first = answered.get("before", answered["answers"])["figures"]
        parts.append(
            f"answers {last['retrieved']['exact']['value']:.0%} of held-out questions exactly when it is given passages"
        )
        if "before" in answered:
            parts[-1] += f" (before: {first['retrieved']['exact']['value']:.0%})"
        parts[-1] += f", {last['closed']['exact']['value']:.0%} without"
    elif a["before"] is not None:
        parts.append(f"has a loss of {a['after']:.2f} on held-out answers (before: {a['before']:.2f})")
    smallest = _smallest(figures)
    subject = known["answers"].removesuffix(", adapted")
    said = f"After {spent}, {subject} {' and '.join(parts)}." if parts else ""
    if smallest:  # the answers are those of the model before it was compressed
        said += f" Compressed to {smallest['name']}, which was not asked, it takes {bytes_text(smallest['bytes'])}."
    return said.strip()


def cards(figures: dict[str, Any], table: list[Any]) -> list[dict[str, Any]]:
    """label, value, note, and good (whether the run's own aim was met; None where it has none)."""
    found = [
        _answers(figures),
        _adapted(figures),
        _compressed(figures),
        _speed(figures),
        _search(figures),
        _predicted(figures),
        _planned(table),
    ]
    return [card for card in found if card]


def _answers(figures: dict[str, Any]) -> dict[str, Any] | None:
    answered = graded(figures)
    if not answered:
        return None
    last = answered["answers"]["figures"]
    exact, closed = last["retrieved"]["exact"], last["closed"]["exact"]
    before = ""
    if "before" in answered:
        before = f"; before adapting {answered['before']['figures']['retrieved']['exact']['value']:.0%}"
    return {
        "label": "exact answers, grounded",
        "value": f"{exact['value']:.0%}",
        "good": exact["low"] > closed["high"],
        "note": f"interval {exact['low']:.0%}–{exact['high']:.0%}; closed book {closed['value']:.0%}{before}",
    }


def _adapted(figures: dict[str, Any]) -> dict[str, Any] | None:
    a = figures.get("adapt")
    if not a or a["before"] is None:
        return None
    return {
        "label": "loss on held-out answers",
        "value": f"{a['before']:.2f} → {a['after']:.2f}",
        "good": a["after"] < a["before"],
        "note": f"{a['form']}, {seconds_text(a['training_seconds'])} of training",
    }


def _smallest(figures: dict[str, Any]) -> dict[str, Any] | None:
    variants = [v for v in figures.get("evaluate", {}).get("variants", []) if v.get("role") != "before"]
    return min(variants, key=lambda v: v["bytes"]) if len(variants) > 1 else None


def _compressed(figures: dict[str, Any]) -> dict[str, Any] | None:
    smallest = _smallest(figures)
    if not smallest:
        return None
    whole = next(v for v in figures["evaluate"]["variants"] if v.get("role") == "answers")
    return {
        "label": "smallest model",
        "value": bytes_text(smallest["bytes"]),
        "note": f"{smallest['name']}, {whole['bytes'] / smallest['bytes']:.1f}× smaller; bits per byte "
        f"{whole['bits_per_byte']:.3f} → {smallest['bits_per_byte']:.3f}",
    }


def _speed(figures: dict[str, Any]) -> dict[str, Any] | None:
    variants = [v for v in figures.get("evaluate", {}).get("variants", []) if "tokens_per_second" in v]
    if not variants:
        return None
    best = max(variants, key=lambda v: v["tokens_per_second"])
    whole = next((v for v in variants if v.get("role") == "answers"), best)
    return {
        "label": "tokens per second",
        "value": f"{best['tokens_per_second']:.0f}",
        "note": f"{best['name']}, one request on this machine; {whole['name']}: {whole['tokens_per_second']:.0f}",
    }


def _search(figures: dict[str, Any]) -> dict[str, Any] | None:
    if "ground" not in figures:
        return None
    metrics = figures["ground"]["metrics"]
    by_mode = metrics.get("withheld") or next(iter(metrics.values()))
    mode = max(by_mode, key=lambda m: by_mode[m]["mrr"])
    return {
        "label": "search, MRR@10",
        "value": f"{by_mode[mode]['mrr']:.2f}",
        "note": f"best: {mode}; the query sentence is taken out of the text searched",
    }


def _predicted(figures: dict[str, Any]) -> dict[str, Any] | None:
    if "predict" not in figures or "pretrain" not in figures:
        return None
    q, loss = figures["predict"]["prediction"], figures["pretrain"]["heldout_loss"]
    return {
        "label": "pretrained from scratch: loss",
        "value": f"{loss:.2f}",
        "good": q["low"] <= loss <= q["high"],
        "note": f"predicted {q['mean']:.2f}, between {q['low']:.2f} and {q['high']:.2f}; "
        f"{figures['pretrain']['parameters'] / 1e6:.2f} M parameters",
    }


def _planned(table: list[Any]) -> dict[str, Any] | None:
    total = table[-1].entries
    if not total["seconds"].planned:
        return None
    return {
        "label": "time and memory",
        "value": total["seconds"].measured_text,
        "note": f"planned {total['seconds'].planned_text}; peak {total['peak_bytes'].measured_text}, "
        f"planned {total['peak_bytes'].planned_text}",
    }
