"""Evaluate a model: tasks on the serving engine, bits per byte of text, lm-eval tasks; or two models, paired."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from modicum.core.errors import UserError, unknown


def eval(
    model: Annotated[str, typer.Argument(help="A model folder, a known name (modicum ls models) or a hub id.")],
    tasks: Annotated[
        str,
        typer.Option(
            help="Tasks with knobs, separated by commas: piqa,needle,copy:length=64,choice:file=F.jsonl,lm-eval:TASK; "
            "base: a suite of fifteen; @FILE: a list of your own, one a line."
        ),
    ] = "",
    data: Annotated[
        list[Path] | None,
        typer.Option(help="Folder of the tasks' files: piqa.parquet, arc_easy.jsonl and so on; repeat for more."),
    ] = None,
    text: Annotated[
        list[str] | None,
        typer.Option(help="Bits per byte of this folder, file or curated corpus (its held-out part); repeat for more."),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(
            help="Paired differences to a second model, MODEL or MODEL:form=int4,kv=...; or form=int4 of the same one."
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Items per task.")] = None,
    shots: Annotated[int, typer.Option(help="Solved examples before each question, from another split.")] = 0,
    seed: Annotated[int, typer.Option(help="Seed of generated tasks and of the examples.")] = 0,
    shot_seeds: Annotated[
        int, typer.Option(help="Draw the examples so many times: mean over the draws, with the error they add.")
    ] = 1,
    repeat: Annotated[int, typer.Option(help="2: ask everything twice and check that every row is the same.")] = 1,
    samples: Annotated[
        Path | None, typer.Option(help="Write prompts, choices, likelihoods and replies: a .parquet or .jsonl file.")
    ] = None,
    page: Annotated[
        Path | None, typer.Option(help="Write an HTML page of the items: right in one model, wrong in the other.")
    ] = None,
    contamination: Annotated[
        str | None,
        typer.Option(help="Look for the items in this corpus (13 words in a row): score on all, clean, touched items."),
    ] = None,
    probe: Annotated[
        str | None,
        typer.Option(help="Probe the multiple-choice tasks: cbod, formatspread:formats=40; modicum ls probe."),
    ] = None,
    checkpoints: Annotated[
        bool,
        typer.Option(help="MODEL is a training run: score every checkpoint it kept, as curves (--page FILE.html)."),
    ] = False,
    harness: Annotated[
        bool,
        typer.Option(help="Have lm-evaluation-harness answer the same items with transformers, and compare them."),
    ] = False,
    endpoint: Annotated[
        str | None,
        typer.Option(help="MODEL is served at this OpenAI-compatible URL (ending in /v1): tasks answered in words."),
    ] = None,
    solver: Annotated[
        str | None,
        typer.Option(
            help="How written answers are made: vote:n=5, best-of-n, scale-tts, greedy:think=true; modicum ls solver."
        ),
    ] = None,
    solver_budget: Annotated[
        int | None, typer.Option(help="Tokens that --solver may generate for an item (default: no limit).")
    ] = None,
    probe_budget: Annotated[int, typer.Option(help="Gradings that --probe may spend on each task.")] = 3000,
    template: Annotated[
        str,
        typer.Option(
            help="Chat template: auto (prompts answered in words, where the model has one), always (choices too), none."
        ),
    ] = "auto",
    form: Annotated[str | None, typer.Option(help="Hold the layers' weights in this form, e.g. int8 or int4.")] = None,
    adapter: Annotated[str | None, typer.Option(help="A LoRA adapter folder in PEFT format.")] = None,
    kv: Annotated[str, typer.Option(help="KV policy; KEY or KEY:knob=value, see modicum ls kv.")] = "full",
    cache_form: Annotated[
        str, typer.Option(help="How the KV cache is stored, e.g. int8; see modicum ls cacheform.")
    ] = "plain",
    drafter: Annotated[str, typer.Option(help="Guess tokens ahead; see modicum ls drafter.")] = "none",
    activation_bits: Annotated[int, typer.Option(help="16, or 8 on int8 or int4 matrices.")] = 16,
    cache: Annotated[str, typer.Option(help="Memory for keys and values: auto (a few steps' worth), 1GiB.")] = "auto",
    include_path: Annotated[Path | None, typer.Option(help="Folder of your own lm-eval YAML tasks.")] = None,
    sequence_length: Annotated[int | None, typer.Option(help="Window for --text (default: the model's).")] = None,
    overlap: Annotated[float, typer.Option(help="Share of each window that only gives context.")] = 0.0,
    prefix: Annotated[
        str,
        typer.Option(help="Before a prompt: auto (what the tokenizer puts there), start (bos or eos), none."),
    ] = "auto",
    size: Annotated[
        str | None,
        typer.Option(help="Of a model in blocks (compress --form bitstack): load so much, e.g. 24MiB."),
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; default: as stored.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps.")] = "cpu",
    batch_tokens: Annotated[int, typer.Option(help="Tokens of one forward pass; lower it if memory is short.")] = 2048,
    out: Annotated[
        Path, typer.Option(help="Folder where finished items are kept; the same command goes on from there.")
    ] = Path("evaluations"),
    evidence: Annotated[Path | None, typer.Option(help="Append the figures to eval.jsonl in this folder.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
) -> None:
    """Evaluate a model: tasks on the serving engine, bits per byte of text, lm-eval tasks; or two models, paired."""
    from modicum.core import registry
    from modicum.core.choice import Choice

    names = [with_file(name, data or []) for name in split_tasks(tasks)]
    if not names and not text:
        raise UserError(
            "nothing to evaluate; give --tasks (for example needle,copy:length=64) or --text FOLDER. "
            f"Tasks: {', '.join(registry.methods('task'))}, lm-eval:TASK"
        )
    for name in names:  # refuse a mistyped task before a model is loaded
        if not name.startswith("lm-eval:"):
            Choice.parse("task", name).config()
    for port, choice in (("probe", probe), ("solver", solver)):
        if choice:
            Choice.parse(port, choice).config()
    for source in text or []:
        if not Path(source).exists() and not source.startswith(("hub:", "python")):
            raise UserError(f"--text {source}: no such folder or file")
    if endpoint and (text or against or probe or form or adapter or size or harness or checkpoints):
        raise UserError("--endpoint asks a server for written answers; leave --text, --against, --form, ... out")
    if checkpoints and (against or probe or form or adapter or size or samples or harness):
        raise UserError("--checkpoints scores a run's steps as they are; leave --against, --probe, --form, ... out")
    if harness:
        from modicum.evaluate.harness import check

        check(names)
        if shots or text or against or form or adapter:
            raise UserError(
                "--harness compares zero-shot tasks of a plain model; leave --shots, --text, --against, ... out"
            )
    first_side = Side(model, form, adapter, kv, cache_form, drafter, activation_bits, size, dtype)
    sides = [first_side] if against is None else [first_side, first_side.other(against)]
    from modicum.cli import _eval as show
    from modicum.cli._local import served_decoder
    from modicum.data.tokenizer import Tokenizer
    from modicum.evaluate import items
    from modicum.evaluate.answer import serving
    from modicum.evaluate.compare import compare
    from modicum.evaluate.kept import Kept
    from modicum.evaluate.run import TaskResult, run_tasks, run_text, text_documents
    from modicum.evaluate.shots import over_seeds
    from modicum.model.folder import find_folder

    kept = Kept(out / "items.jsonl")

    def run(side: Side) -> list[TaskResult]:
        if endpoint:
            from modicum.evaluate.remote import run_endpoint

            return run_endpoint(
                endpoint,
                model,
                names,
                limit=limit,
                shots=shots,
                seed=seed,
                solver=solver,
                solver_budget=solver_budget,
            )
        folder = find_folder(side.model)
        decoder = served_decoder(folder, side.form, side.adapter, side.size, side.dtype, device)
        return answered(side, decoder, Tokenizer.load(folder))

    def answered(side: Side, decoder: Any, tokenizer: Tokenizer) -> list[TaskResult]:
        config = serving(
            kv=side.kv,
            cache_form=side.cache_form,
            drafter=side.drafter,
            activation_bits=side.activation_bits,
            cache=cache,
            max_batch_tokens=batch_tokens,
        )
        results = [
            run_text(
                decoder,
                tokenizer,
                text_documents(source, limit),
                name=source,
                overlap=overlap,
                sequence_length=sequence_length,
                batch_tokens=batch_tokens,
                keep=kept,
            )
            for source in text or []
        ]
        ask = functools.partial(
            run_tasks,
            decoder,
            tokenizer,
            names,
            limit=limit,
            shots=shots,
            seed=seed,
            prefix=prefix,
            template=template,
            engine=config,
            batch_tokens=batch_tokens,
            include_path=include_path,
            solver=solver,
            solver_budget=solver_budget,
        )
        if probe:
            probed[str(side)] = show.probed(
                decoder, tokenizer, names, probe, probe_budget, limit or 300, seed, kept, config
            )
            return results
        draws = [ask(shot_seed=seed + i, keep=kept) for i in range(max(shot_seeds, 1))]
        if repeat > 1:
            show.same_again(draws[0], ask(shot_seed=seed, keep=None))
        return results + [over_seeds(group) for group in zip(*draws, strict=True)]

    probed: dict[str, list[dict[str, Any]]] = {}
    if checkpoints:
        from modicum.evaluate import checkpoints as kept_steps

        points = [
            kept_steps.row(step, answered(first_side, step.load(dtype, device), Tokenizer.load(step.model)))
            for step in kept_steps.find(model)
        ]
        if page:
            kept_steps.page(points, page, f"{model}: scores of its checkpoints")
        print(json.dumps({"run": model, "checkpoints": points}, indent=2) if as_json else show.curves(points))
        return
    results_by_side = [run(side) for side in sides]
    if probe:
        print(json.dumps(probed, indent=2) if as_json else "\n".join(show.probe_lines(probed)))
        return
    labels = [str(side) for side in sides]
    rows = compare(*results_by_side) if len(results_by_side) == 2 else []
    if samples or page:
        table = [
            row for label, results in zip(labels, results_by_side, strict=True) for row in items.table(results, label)
        ]
        if samples:
            items.write(table, samples)
        if page:
            items.page(table, page)
    beside = show.beside_harness(model, results_by_side[0], dtype) if harness else []
    if evidence is not None:
        from modicum.bench import evaluated

        settings = {"limit": limit, "shots": shots, "seed": seed, "template": template, "dtype": dtype or "as stored"}
        evaluated.append(results_by_side[0], evidence, model=labels[0], settings=settings, harness=beside)
    touched = (
        [show.contaminated(result, contamination) for result in results_by_side[0] if result.items]
        if contamination
        else []
    )
    if as_json:
        record: dict[str, Any] = {"model": labels[0], "results": [show.record(r) for r in results_by_side[0]]}
        if beside:
            record["harness"] = beside
        if touched:
            record["contamination"] = touched
        if rows:
            record |= {
                "against": labels[1],
                "against_results": [show.record(r) for r in results_by_side[1]],
                "paired": rows,
            }
        print(json.dumps(record, indent=2))
    elif rows:
        show.print_pairs(labels, rows)
    else:
        show.print_figures(results_by_side[0])
    if not as_json:
        show.print_harness(beside)
        for description in touched:
            show.print_touched(description)
        for path in filter(None, (samples, page)):
            print(f"items: {path}")


@dataclass(frozen=True)
class Side:
    """A model and how it is held and served: what `--against` may change."""

    model: str
    form: str | None = None
    adapter: str | None = None
    kv: str = "full"
    cache_form: str = "plain"
    drafter: str = "none"
    activation_bits: int = 16
    size: str | None = None
    dtype: str | None = None

    def other(self, text: str) -> Side:
        """`MODEL`, `MODEL:form=int4,kv=full`, or `form=int4` of the same model; what is not named stays."""
        head, colon, tail = text.partition(":")
        if "=" in head:
            head, tail = self.model, text
        elif colon and "=" not in tail:
            head, tail = text, ""
        options = [f.name for f in dataclasses.fields(self)][1:]
        changed: dict[str, Any] = {}
        last = ""
        for part in filter(None, tail.split(",")):
            name, equals, value = part.partition("=")
            name = name.strip().replace("-", "_")
            if equals and name in options:
                changed[name] = int(value) if name == "activation_bits" and value.isdigit() else value
                last = name
            elif last and ":" in str(changed[last]):  # another knob of that method: kv=snapkv:budget=0.5,window=8
                changed[last] += f",{part}"
            else:
                raise unknown("option of --against", name, options, "Write MODEL:form=int4, or form=int4")
        return dataclasses.replace(self, model=head, **changed)

    def __str__(self) -> str:
        default = Side("")
        own = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)[1:]}
        description = ",".join(f"{k}={v}" for k, v in own.items() if v != getattr(default, k))
        return f"{self.model}:{description}" if description else self.model


def with_file(name: str, data: Sequence[Path]) -> str:
    """The task with its file in the first of the folders `data` that has one, if it reads one and none is named.

    The file is called as the task, or begins with its name where only one does: truthfulqa_mc1.parquet.
    """
    from modicum.core import registry

    key, _, knobs = name.partition(":")
    if not data or name.startswith("lm-eval:") or key not in registry.methods("task") or "file=" in knobs:
        return name
    if "file" not in {f.name for f in dataclasses.fields(registry.load("task", key).config)}:
        return name
    stems = list(dict.fromkeys((key, key.replace("-", "_"))))
    endings = (".parquet", ".jsonl", ".ndjson")
    for folder in data:
        if not folder.is_dir():
            raise UserError(f"--data {folder} is no folder; give the one that holds the tasks' files")
        exact = [file for s in stems for e in endings if (file := folder / f"{s}{e}").is_file()]
        longer = [file for s in stems for e in endings for file in sorted(folder.glob(f"{s}_*{e}"))]
        if exact or len(longer) == 1:
            file = (exact or longer)[0]
            break
    else:
        wanted = data[0] / stems[-1]
        raise UserError(
            f"{', '.join(map(str, data))} has no file for {key}; it would be {wanted}.parquet or {wanted}.jsonl, "
            "or name file="
        )
    return f"{name}{',' if knobs else ':'}file={file}"


def split_tasks(text: str) -> list[str]:
    """`base,needle,copy:length=64,digits=2,lm-eval:arc` into tasks, suites spelt out: "=" without ":" is a knob."""
    from modicum.evaluate import suites

    names: list[str] = []
    for part in filter(None, (p.strip() for p in text.split(","))):
        head, equals, _ = part.partition("=")
        if part.startswith("@") or part in suites.names():
            names += suites.tasks(part)
            continue
        if equals and ":" not in head and names and ":" in names[-1]:
            names[-1] += f",{part}"
        else:
            names.append(part)
    return list(dict.fromkeys(names))
