"""What a run gained, in a sentence and a few figures: the same for the report and the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from modicum.budget.units import bytes_text
from modicum.core.events import count_text, seconds_text
from modicum.pipeline.report.ledger import Row

Card = dict[str, Any]  # label, value, note, and good (whether the run's own aim was met)

ARMS = {"closed": "closed book", "retrieved": "grounded", "gold": "with the right passage"}


def names(model: Mapping[str, Any]) -> dict[str, str]:
    """{role: what a reader calls the model}, from the figures of the stage that left it."""
    given = model.get("model")
    base = Path(given).name if given else "the model pretrained here"
    adapted = f"{base}, adapted" if "pairs_train" in model else base
    return {"before": f"{base}, as published" if given else base, "answers": adapted}


def title(variant: Mapping[str, Any], known: Mapping[str, str]) -> str:
    role = variant.get("role", "answers")
    if role == "compressed":
        return f"{known['answers']}, {variant['name']}"
    return known[role] if role == "before" else f"{known[role]}, {variant['name']}"


def lead(figures: Mapping[str, Any], model: Mapping[str, Any], known: Mapping[str, str]) -> str:
    """The sentence that a reader takes away. figures: of the evaluation; model: of the stage that left the model."""
    if "pairs_train" not in model:
        return ""
    a, answered = model, figures.get("graded") or {}
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
    text = f"After {spent}, {subject} {' and '.join(parts)}." if parts else ""
    if smallest:  # the answers are those of the model before it was compressed
        text += f" Compressed to {smallest['name']}, which was not asked, it takes {bytes_text(smallest['bytes'])}."
    return text.strip()


def evaluated(figures: Mapping[str, Any]) -> list[Card]:
    """Cards of an evaluation."""
    return [card for card in (_answers(figures), _compressed(figures), _speed(figures)) if card]


def evaluated_lines(figures: Mapping[str, Any], known: Mapping[str, str]) -> list[str]:
    """An evaluation for the terminal."""
    questions = [
        f"{known[role]}, {ARMS[arm]}: exact match {f['exact']['value']:.0%} "
        f"[{f['exact']['low']:.0%}, {f['exact']['high']:.0%}], token F1 {f['f1']['value']:.2f} "
        f"[{f['f1']['low']:.2f}, {f['f1']['high']:.2f}] on {g['questions']} held-out questions"
        for role, g in (figures["graded"] or {}).items()
        for arm, f in g["figures"].items()
    ]
    scored = [
        f"{title(v, known)}: {bytes_text(v['bytes'])}, {v['bits_per_byte']:.3f} bits per byte, "
        f"{v['tokens_per_second']:.0f} tokens/s"
        for v in figures["variants"]
    ]
    others = ", ".join(f"{k} {v:.3f}" for k, v in figures["compressors"].items())
    return [*questions, *scored, f"general-purpose compressors on the same text: {others}"]


def _answers(figures: Mapping[str, Any]) -> Card | None:
    answered = figures["graded"]
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


def adapted(figures: Mapping[str, Any]) -> list[Card]:
    a = figures
    if a["before"] is None:
        return []
    return [
        {
            "label": "loss on held-out answers",
            "value": f"{a['before']:.2f} → {a['after']:.2f}",
            "good": a["after"] < a["before"],
            "note": f"{a['form']}, {seconds_text(a['training_seconds'])} of training",
        }
    ]


def _smallest(figures: Mapping[str, Any]) -> Card | None:
    variants = [v for v in figures.get("variants", []) if v.get("role") != "before"]
    return min(variants, key=lambda v: v["bytes"]) if len(variants) > 1 else None


def _compressed(figures: Mapping[str, Any]) -> Card | None:
    smallest = _smallest(figures)
    if not smallest:
        return None
    whole = next(v for v in figures["variants"] if v.get("role") == "answers")
    return {
        "label": "smallest model",
        "value": bytes_text(smallest["bytes"]),
        "note": f"{smallest['name']}, {whole['bytes'] / smallest['bytes']:.1f}× smaller; bits per byte "
        f"{whole['bits_per_byte']:.3f} → {smallest['bits_per_byte']:.3f}",
    }


def _speed(figures: Mapping[str, Any]) -> Card | None:
    variants = [v for v in figures.get("variants", []) if "tokens_per_second" in v]
    if not variants:
        return None
    best = max(variants, key=lambda v: v["tokens_per_second"])
    whole = next((v for v in variants if v.get("role") == "answers"), best)
    return {
        "label": "tokens per second",
        "value": f"{best['tokens_per_second']:.0f}",
        "note": f"{best['name']}, one request on this machine; {whole['name']}: {whole['tokens_per_second']:.0f}",
    }


def search(figures: Mapping[str, Any]) -> list[Card]:
    metrics = figures["metrics"]
    by_mode = metrics.get("without_query_text") or next(iter(metrics.values()))
    mode = max(by_mode, key=lambda m: by_mode[m]["mrr"])
    return [
        {
            "label": "search, MRR@10",
            "value": f"{by_mode[mode]['mrr']:.2f}",
            "note": f"best: {mode}; the query sentence is taken out of the text searched",
        }
    ]


def predicted(q: Mapping[str, Any], main: Mapping[str, Any] | None) -> list[Card]:
    """q: the prediction; main: figures of the run that it is about, None before it has finished."""
    if main is None:
        return []
    loss = main["heldout_loss"]
    return [
        {
            "label": "pretrained from scratch: loss",
            "value": f"{loss:.2f}",
            "good": q["low"] <= loss <= q["high"],
            "note": f"predicted {q['mean']:.2f}, between {q['low']:.2f} and {q['high']:.2f}; "
            f"{main['parameters'] / 1e6:.2f} M parameters",
        }
    ]


def predicted_line(q: Mapping[str, Any], main: Mapping[str, Any] | None) -> list[str]:
    if main is None:
        return []
    loss = main["heldout_loss"]
    inside = "inside" if q["low"] <= loss <= q["high"] else "OUTSIDE"
    return [
        f"predicted loss {q['mean']:.3f} [{q['low']:.3f}, {q['high']:.3f}], measured {loss:.3f}: "
        f"{inside} the {q['level']:.0%} interval"
    ]


def planned(table: Sequence[Row]) -> list[Card]:
    total = table[-1].entries
    if not total["seconds"].planned:
        return []
    return [
        {
            "label": "time and memory",
            "value": total["seconds"].measured_text,
            "note": f"planned {total['seconds'].planned_text}; peak {total['peak_bytes'].measured_text}, "
            f"planned {total['peak_bytes'].planned_text}",
        }
    ]
