"""What `modicum eval` says: tables of figures and of paired differences, and what a corpus holds of the items."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any

from modicum.core.errors import ModicumError, UserError


def same_again(first: Sequence[Any], again: Sequence[Any]) -> None:
    """Raises ModicumError where a row of the second run differs from the first: figures must not depend on batches."""
    for a, b in zip(first, again, strict=True):
        for x, y in zip(a.rows, b.rows, strict=True):
            if x != y:
                raise ModicumError(f"{a.task}, item {x['id']}: asked again, the model gave {y} after {x}")
    print(f"asked twice: {sum(len(a.rows) for a in first)} rows, all the same", file=sys.stderr)


def contaminated(result: Any, corpus: str) -> dict[str, Any]:
    from modicum.evaluate import contamination
    from modicum.evaluate.run import text_documents

    texts = {str(row["id"]): contamination.text_of(row) for row in result.items}
    scores = {str(row["id"]): row["score"] for row in result.items}
    hits = contamination.find(texts, text_documents(corpus, split="train"))
    return {"task": result.task, "figure": result.metric, **contamination.report(scores, texts, hits)}


def print_touched(overlap: dict[str, Any]) -> None:
    parts = ", ".join(
        f"{name} {part['value']:.4f} ({part['items']})"
        for name in ("all", "clean", "touched")
        if (part := overlap[name])["items"]
    )
    print(f"{overlap['task']}, {overlap['figure']}: {parts}; {len(overlap['too_short'])} items too short to look for")
    for hit in overlap["hits"][:20]:
        where = f"characters {hit['start']} to {hit['end']}"
        print(f"  item {hit['item']} in {hit['document']}, {where}: {hit['text'][:60]!r}")


def beside_harness(model: str, results: Sequence[Any], dtype: str | None) -> list[dict[str, Any]]:
    from modicum.evaluate.harness import compared
    from modicum.model.folder import find_folder

    return compared(find_folder(model), results, dtype or "float32")


def print_harness(rows: Sequence[dict[str, Any]]) -> None:
    from modicum.evaluate.run import short

    if not rows:
        return
    print("\nbeside lm-evaluation-harness (transformers), on the same items:")
    table(
        [
            (
                "task",
                "items",
                "acc",
                "its",
                "acc_norm",
                "its",
                "items apart",
                "nats apart, mean",
                "most",
                "items/s",
                "its",
            )
        ]
        + [
            (
                short(r["task"]),
                str(r["items"]),
                f"{r['acc']:.4f}",
                f"{r['acc_harness']:.4f}",
                f"{r['acc_norm']:.4f}",
                f"{r['acc_norm_harness']:.4f}",
                f"{r['acc_items_apart']}, {r['acc_norm_items_apart']}",
                f"{r['nats_apart_mean']:.2g}",
                f"{r['nats_apart_most']:.2g}",
                f"{r['items_per_second']:.1f}" if r["items_per_second"] else "kept",
                f"{r['items_per_second_harness']:.1f}",
            )
            for r in rows
        ]
    )


def claim(task: str) -> dict[str, str]:
    """What was published of a task, from its card."""
    from modicum.bench.card import read_card
    from modicum.core import registry

    key = task.partition(":")[0]
    return read_card(registry.methods("task")[key]).claim if key in registry.methods("task") else {}


def record(result: Any) -> dict[str, Any]:
    record: dict[str, Any] = result.as_dict()
    return record | ({"published": overlap} if (overlap := claim(result.task)) else {})


def print_figures(results: Sequence[Any]) -> None:
    from modicum.evaluate.run import short

    rows = [("task", "figure", "value", "standard error", "chance", "items", "items/s", "published")]
    for r in results:
        rate = r.items_per_second
        for name, f in r.figures.items():
            main = name == r.metric
            rows.append(
                (
                    short(r.task),
                    name + " *" * main,
                    f"{f['value']:.4f}",
                    f"{f['stderr']:.4f}" if f["stderr"] == f["stderr"] else "",
                    f"{f['chance']:.4f}" if "chance" in f else "",
                    str(f["documents"]),
                    f"{rate:.1f}" if main and rate else "",
                    claim(r.task).get("figure", "") if main else "",
                )
            )
    table(rows)


def curves(points: Sequence[dict[str, Any]]) -> str:
    """A line for each checkpoint, a column for the main figure of each task."""
    from modicum.evaluate.checkpoints import curves as of_tasks
    from modicum.evaluate.run import short

    columns = list(of_tasks(points))
    rows = [["step", "tokens", *(f"{short(task)} {figure}" for task, figure, _ in columns)]]
    for i, point in enumerate(points):
        cells = [
            f"{value:.4f}" + (f" ± {error:.4f}" if error == error else "")
            for value, error in ((values[i][1], values[i][2]) for _, _, values in columns)
        ]
        rows.append([str(point["step"]), f"{point['tokens']:,.0f}", *cells])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def print_pairs(labels: Sequence[str], rows: Sequence[dict[str, Any]]) -> None:
    from modicum.evaluate.run import short

    table(
        [("task", "figure", *labels, "difference", "95% interval", "p", "p (Holm)", "detectable", "items")]
        + [
            (
                short(r["task"]),
                r["figure"],
                f"{r['a']:.4f}",
                f"{r['b']:.4f}",
                f"{r['difference']:+.4f} ± {r['stderr']:.4f}",
                f"{r['low']:+.4f} to {r['high']:+.4f}",
                f"{r['p']:.3g}",
                f"{r['p_holm']:.3g}" if "p_holm" in r else "",
                f"{r['detectable']:.4f}",
                str(r["items"]),
            )
            for r in rows
        ]
    )


def table(rows: Sequence[tuple[str, ...]]) -> None:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def probed(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    probe: str,
    budget: int,
    limit: int,
    seed: int,
    kept: Any,
    config: Any,
) -> list[dict[str, Any]]:
    """What a probe says of a model on the first `limit` items of each task. Raises UserError for other tasks."""
    from modicum.core import registry
    from modicum.evaluate import probes
    from modicum.evaluate.answer import Answerer
    from modicum.evaluate.kept import model_fingerprint
    from modicum.evaluate.multiple_choice import MultipleChoice

    method, probe_reports = registry.build("probe", probe), []
    answerer = Answerer(model, tokenizer, config)
    grade = probes.grader_of(method, answerer, kept, [model_fingerprint(model, tokenizer), *answerer.settings])
    for name in tasks:
        task = registry.build("task", name)
        if not isinstance(task, MultipleChoice):
            raise UserError(f"--probe asks multiple-choice tasks with a file, {name} is none; for example arc-easy")
        report = method.run(probes.items_of(task.docs("test", limit, seed)), grade, budget, seed)
        probe_reports.append(
            {
                "task": name,
                "probe": probe,
                "verdict": report.verdict,
                "detected": report.detected,
                "graded": report.graded,
            }
            | {"figures": report.figures, "rows": report.rows}
        )
    return probe_reports


def probe_lines(probed: dict[str, list[dict[str, Any]]]) -> Iterator[str]:
    from modicum.evaluate.run import short

    for model, reports in probed.items():
        for entry in reports:
            yield f"{model}, {short(entry['task'])}: {entry['verdict']}; {entry['graded']} gradings"
            for name, figure in entry["figures"].items():
                more = f", p {figure['p']:.3g}" if "p" in figure else ""
                yield f"  {name:<16} {figure['value']:.4f}  ({figure['low']:.4f} to {figure['high']:.4f}){more}"
