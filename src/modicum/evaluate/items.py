"""The item table: one row per item and model, which paired tests, probes, laws and the reader's page all read.

    model compute task id cluster asked prompt choices right nats bytes tokens reply score figures seconds

`choices`, `nats`, `bytes` and `tokens` are lists, one entry per choice (empty where the item was answered in words;
`reply` is then the text); nats are log-likelihoods, unrounded; `right` is the index of the right choice; `score` the
task's main figure and `figures` all of them; `compute` the model's training FLOPs, where known.
"""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from modicum.core.errors import UserError, unknown
from modicum.core.files import write_text
from modicum.evaluate.compare import mcnemar
from modicum.evaluate.rows import read_rows
from modicum.evaluate.tasks import Choose

Item = dict[str, Any]
SUFFIXES = (".parquet", ".jsonl")


def item(
    doc: dict[str, Any], requests: Sequence[Any], kept: dict[str, Any], about: dict[str, Any], metric: str
) -> Item:
    """A row of the table without its model and task: what was asked of one document and what came back."""
    replies = kept["replies"]
    chosen = next((i for i, r in enumerate(requests) if isinstance(r, Choose)), None)
    scored = replies[chosen] if chosen is not None and isinstance(replies[chosen], dict) else {}
    right = doc.get("answer")
    return about | {
        "prompt": requests[chosen or 0].prompt,
        "choices": [c.strip() for c in requests[chosen].choices] if chosen is not None else [],
        "right": right if chosen is not None and isinstance(right, int) else None,
        "nats": scored.get("nats", []),
        "bytes": scored.get("bytes", []),
        "tokens": scored.get("tokens", []),
        "reply": "\n".join(str(r) for r in replies if not isinstance(r, dict)),
        "score": kept["figures"][metric],
        "figures": kept["figures"],
        "seconds": kept["seconds"],
    }


def table(results: Iterable[Any], model: str, compute: float | None = None) -> list[Item]:
    """The items of `run_tasks`' results, with the model's name and training FLOPs."""
    return [
        {"model": model, "compute": compute, "task": result.task, "cluster": None} | row
        for result in results
        for row in result.items
    ]


def write(rows: Sequence[Item], path: str | Path) -> None:
    """To Parquet or JSON lines, by the suffix; an older file is replaced whole."""
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise UserError(f"{path}: items are written as {' or '.join(SUFFIXES)}; give the file one of these suffixes")
    if not rows:
        raise UserError("there are no items to write; texts and lm-eval tasks keep none")
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        return
    import pyarrow as pa
    import pyarrow.parquet as pq

    flat = [
        row
        | {"figures": json.dumps(row["figures"]), "cluster": None if row["cluster"] is None else str(row["cluster"])}
        for row in rows
    ]
    lists = {"choices": pa.string(), "nats": pa.float64(), "bytes": pa.int64(), "tokens": pa.int64()}
    plain = {"compute": pa.float64(), "right": pa.int64(), "score": pa.float64(), "seconds": pa.float64()}
    fields = [(n, pa.list_(lists[n]) if n in lists else plain.get(n, pa.string())) for n in flat[0]]
    half = path.with_name(path.name + ".part")
    pq.write_table(pa.Table.from_pylist(flat, schema=pa.schema(fields)), half, compression="zstd")
    half.replace(path)


def read(path: str | Path) -> list[Item]:
    """Rows of a file that `write` made. Raises UserError for a table of another kind."""
    rows = read_rows(path)
    for row in rows:
        if missing := [n for n in ("model", "task", "id", "score", "figures") if n not in row]:
            raise UserError(
                f"{path} is no item table: it lacks {', '.join(missing)}; write one with modicum eval --samples"
            )
        if isinstance(row["figures"], str):
            row["figures"] = json.loads(row["figures"])
    return rows


def pairs(rows: Sequence[Item], a: str, b: str) -> list[tuple[Item, Item]]:
    """Rows of models `a` and `b` on the same items. Raises UserError for an unknown model or unequal items."""
    names = list(dict.fromkeys(row["model"] for row in rows))
    for name in (a, b):
        if name not in names:
            raise unknown("model", name, names, "These are in the item table")
    of_a, of_b = ({(r["task"], r["id"]): r for r in rows if r["model"] == name} for name in (a, b))
    if missing := sorted(of_a.keys() ^ of_b.keys()):
        listing = ", ".join(f"{task} {id_}" for task, id_ in missing[:5])
        raise UserError(
            f"{len(missing)} items were asked of one model only ({listing}); evaluate both on the same items"
        )
    return [(of_a[key], of_b[key]) for key in of_a]


# The page -------------------------------------------------------------------------------------------

_STYLE = """body{font:15px/1.45 system-ui,sans-serif;margin:1.5rem auto;max-width:70rem;padding:0 1rem;color:#1c1e21}
h1{font-size:1.3rem}table{border-collapse:collapse}td,th{padding:.15rem .7rem;text-align:left;border-bottom:1px solid
#e3e5e8} .bar{position:sticky;top:0;background:#fff;padding:.6rem 0;border-bottom:1px solid
#ccc;display:flex;gap:.6rem;flex-wrap:wrap} details{border-bottom:1px solid #e3e5e8;padding:.35rem
0}summary{cursor:pointer}pre{white-space:pre-wrap;background:#f6f7f8;padding:.6rem}
.r{color:#17723a}.w{color:#b3261e}.n{color:#6a6f76}"""
_SCRIPT = """const rows=JSON.parse(document.getElementById('rows').textContent),list=document.getElementById('list');
const pick=n=>document.getElementById(n);function esc(s){const d=document.createElement('i');d.textContent=s;return
d.innerHTML} function show(){const t=pick('task').value,o=pick('outcome').value,q=pick('text').value.toLowerCase(); let
got=rows.filter(r=>(!t||r.task===t)&&(!o||r.outcome===o)&&(!q||(r.prompt+r.id).toLowerCase().includes(q))); const
by=pick('sort').value;if(by)got=got.slice().sort((x,y)=>y[by]-x[by]); pick('count').textContent=got.length+' of
'+rows.length+' items'; list.innerHTML=got.slice(0,300).map(r=>'<details><summary>'+r.models.map(m=>'<span
class="'+(m.score>=1?'r':'w')+'">'+esc(m.model)+' '+ m.score.toFixed(2)+'</span>').join(' &nbsp; ')+' &nbsp;
<b>'+esc(r.task)+'</b> '+esc(r.id)+' <span
class="n">'+esc(r.prompt.slice(-110))+'</span></summary><pre>'+esc(r.prompt)+
'</pre>'+r.models.map(m=>'<p><b>'+esc(m.model)+'</b> <span class="n">'+m.seconds.toFixed(2)+'
s</span></p>'+(m.nats.length?'<table>'+r.choices.map((c,i)=> '<tr
class="'+(i===r.right?'r':'')+'"><td>'+(i===m.best?'&#9654;':'')+'</td><td>'+esc(c)+'</td><td>'+m.nats[i].toFixed(3)+'
nats</td><td>'+(m.nats[i]/m.bytes[i]).toFixed(3)+ ' per
byte</td></tr>').join('')+'</table>':'<pre>'+esc(m.reply)+'</pre>')).join('')+'</details>').join('')+
(got.length>300?'<p class="n">the first 300 are shown; narrow the filter for others</p>':'')}
for(const n of ['task','outcome','sort'])pick(n).onchange=show;pick('text').oninput=show;show();"""


def page(rows: Sequence[Item], path: str | Path) -> None:
    """One HTML file without links: filter by task and by "right in A, wrong in B", read prompts and replies."""
    names = list(dict.fromkeys(row["model"] for row in rows))
    if not names:
        raise UserError("there are no items to show")
    grouped: dict[Any, list[Item]] = {}
    for row in rows:
        grouped.setdefault((row["task"], str(row["id"])), []).append(row)
    shown, outcomes = [], set()
    for (task, id_), group in grouped.items():
        outcome = ", ".join(f"{'right' if r['score'] >= 1 else 'wrong'} in {r['model']}" for r in group)
        outcomes.add(outcome)
        first = group[0]
        models = [
            {
                "model": r["model"],
                "score": r["score"],
                "nats": list(r["nats"]),
                "bytes": list(r["bytes"]),
                "best": _best(r),
                "reply": r["reply"],
                "seconds": r["seconds"],
            }
            for r in group
        ]
        seconds, gap = max(r["seconds"] for r in group), abs(group[0]["score"] - group[-1]["score"])
        shown.append(
            {
                "task": task,
                "id": id_,
                "prompt": first["prompt"],
                "choices": list(first["choices"]),
                "right": first["right"],
            }
            | {"models": models, "outcome": outcome, "seconds": seconds, "gap": gap}
        )
    summary = _summary(rows, names)
    data = json.dumps(shown, ensure_ascii=False).replace("</", "<\\/")

    def options(values: Iterable[str], every: str) -> str:
        return f"<option value=''>{every}</option>" + "".join(f"<option>{html.escape(v)}</option>" for v in values)

    tasks = options(dict.fromkeys(row["task"] for row in rows), "all tasks")
    write_text(
        path,
        f"<!doctype html><meta charset='utf-8'><title>Items</title><style>{_STYLE}</style>"
        f"<h1>Items of {html.escape(', '.join(names))}</h1>{summary}<div class='bar'><select id='task'>{tasks}</select>"
        f"<select id='outcome'>{options(sorted(outcomes), 'any outcome')}</select>"
        "<select id='sort'><option value=''>in order</option><option value='seconds'>slowest first</option>"
        "<option value='gap'>largest difference first</option></select>"
        "<input id='text' placeholder='words of the prompt'><span id='count' class='n'></span></div>"
        "<div id='list'></div>"
        f"<script type='application/json' id='rows'>{data}</script><script>{_SCRIPT}</script>",
    )


def _best(row: Item) -> int | None:
    """The likeliest choice per byte."""
    rates = [nats / size for nats, size in zip(row["nats"], row["bytes"], strict=True)]
    return rates.index(max(rates)) if rates else None


def _summary(rows: Sequence[Item], names: Sequence[str]) -> str:
    """Mean score by task and model; of two models also who is right alone, with the exact p."""
    lines = []
    for task in dict.fromkeys(row["task"] for row in rows):
        of = {n: {r["id"]: r["score"] for r in rows if r["task"] == task and r["model"] == n} for n in names}
        cells = [f"{sum(v.values()) / len(v):.3f}" if v else "" for v in of.values()]
        if len(names) == 2:
            ids = [i for i in of[names[0]] if i in of[names[1]]]
            scores = [[of[n][i] for i in ids] for n in names]
            if ids and set(scores[0]) | set(scores[1]) <= {0.0, 1.0}:
                test = mcnemar(*scores)
                cells += [str(test["only_a"]), str(test["only_b"]), f"{test['p']:.3g}"]
        lines.append(f"<tr><td>{html.escape(task)}</td>" + "".join(f"<td>{c}</td>" for c in cells) + "</tr>")
    more = ["right in the first alone", "in the second alone", "p, exact"] if len(names) == 2 else []
    head = "".join(f"<th>{html.escape(h)}</th>" for h in ["task", *names, *more])
    return f"<table><tr>{head}</tr>{''.join(lines)}</table>"
