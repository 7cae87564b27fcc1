"""Running tasks: batched, resumable by item, with progress."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modicum.core import registry
from modicum.core.choice import Choice
from modicum.core.errors import UserError
from modicum.core.events import Events
from modicum.core.files import fingerprint
from modicum.evaluate import items
from modicum.evaluate.answer import Answerer
from modicum.evaluate.compare import clustered_error
from modicum.evaluate.kept import Kept, model_fingerprint
from modicum.evaluate.lm import document_nats, summarise
from modicum.evaluate.score import BATCH_TOKENS, context_limit
from modicum.evaluate.solving import Engined, Solving
from modicum.evaluate.tasks import Doc, Task
from modicum.serve.config import EngineConfig

if TYPE_CHECKING:
    from modicum.data.tokenizer import Tokenizer

TEXT_CHUNK = 1 << 20  # bytes of text scored and kept at a time
LM_EVAL = "lm-eval:"


@dataclass(frozen=True)
class TaskResult:
    """figures: {name: {value, stderr, documents}}; rows: one per document, {id, asked, figure: value, ...}.

    asked: a hash of the requests, so that two models are only compared on items that were asked alike; cluster: where
    the document names one, what it shares with others. items: the same with prompts, choices and replies
    (`evaluate.items`).
    """

    task: str
    metric: str
    figures: dict[str, dict[str, float]]
    rows: list[dict[str, Any]] = field(default_factory=list, repr=False)
    items: list[dict[str, Any]] = field(default_factory=list, repr=False)
    resumed: int = 0  # of the rows, how many were kept from an earlier run
    seconds: float = 0.0  # that the others took

    @property
    def items_per_second(self) -> float | None:
        answered = len(self.rows) - self.resumed
        return answered / self.seconds if answered and self.seconds else None

    @property
    def value(self) -> float:
        return self.figures[self.metric]["value"]

    def as_dict(self, rows: bool = False) -> dict[str, Any]:
        record = asdict(self) | {"items_per_second": self.items_per_second}
        return record if rows else {k: v for k, v in record.items() if k not in ("rows", "items")}


def run_tasks(
    model: Any,
    tokenizer: Tokenizer,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    shots: int = 0,
    seed: int = 0,
    shot_seed: int | None = None,
    prefix: str = "auto",
    template: str = "none",
    engine: EngineConfig | None = None,
    batch_tokens: int = BATCH_TOKENS,
    keep: str | Path | Kept | None = None,
    include_path: str | Path | None = None,
    solver: str | None = None,
    solver_budget: int | None = None,
    events: Events | None = None,
) -> list[TaskResult]:
    """Evaluate `model` on tasks named as on the command line: "needle", "copy:length=512", "lm-eval:TASK".

    limit: documents per task. shots: solved examples before each question, from another split, drawn by `shot_seed`
    (left out: by `seed`, which also makes generated questions). prefix: what stands before a prompt, "auto" (bos where
    the model has one), "start" or "none". template: "auto" (prompts to be answered in words go through the chat
    template, where the tokenizer has one), "always" (choices too) or "none". engine: how the model is served meanwhile
    (KV policy, drafter, eight-bit activations). batch_tokens: of one forward pass of texts (`loglikelihood_rolling`).
    keep: a JSONL file (or an open `Kept`) of finished items. include_path: folder of lm-eval's own YAML tasks.
    solver: how written answers are made (`evaluate.solvers`: "vote:n=5"), with at most `solver_budget` generated tokens
    an item; the figures then hold `tokens` and `generations` of an item.
    """
    kept, events = keep if isinstance(keep, Kept) else Kept(keep), events or Events()
    ours = [(name, registry.build("task", name)) for name in tasks if not name.startswith(LM_EVAL)]
    name_of_model = model_fingerprint(model, tokenizer)
    answerer = Answerer(model, tokenizer, engine, prefix=prefix, template=template)
    common: list[Any] = ["item with replies", name_of_model, *answerer.settings]
    method = None
    if solver is not None:
        method = Solving(registry.build("solver", solver), Engined(answerer), solver_budget)
        common += ["solver", Choice.parse("solver", solver).resolved(), solver_budget]
    training = model.training
    results: dict[str, TaskResult] = {}
    try:
        for name, task in ours:
            own = getattr(task.config, "shots", None)
            drawn = seed if shot_seed is None else shot_seed
            drawing = (limit, shots if own is None else own, seed, drawn)
            results[name] = run_one(task, name, answerer, common, drawing, kept, events, method)
        theirs = [name.removeprefix(LM_EVAL) for name in tasks if name.startswith(LM_EVAL)]
        if theirs:
            from modicum.evaluate.lm_eval import run_lm_eval

            for result in run_lm_eval(
                answerer,
                theirs,
                limit=limit,
                shots=shots or None,
                batch_tokens=batch_tokens,
                kept=kept,
                include_path=include_path,
                fingerprint_of_model=name_of_model,
            ):
                results[result.task] = result
    finally:
        model.train(training)
    return [
        result
        for name in tasks
        for key, result in results.items()
        if key == name or (name.startswith(LM_EVAL) and key.startswith(f"{name}/"))
    ]


def run_one(
    task: Task,
    name: str,
    answerer: Any,
    common: list[Any],
    settings: tuple[int | None, int, int, int],
    kept: Kept,
    events: Events,
    solving: Solving | None = None,
) -> TaskResult:
    """One task. answerer: an `Answerer`, or what encodes as one does where `solving` answers without it.

    settings: limit, shots, seed of the questions and of the examples.
    """
    limit, shots, seed, shot_seed = settings
    docs = list(task.docs("test", limit, seed))
    if not docs:
        raise UserError(f"the task {name} gave no documents; look at its limit, split and file")
    examples = list(task.docs("train", shots + 1, shot_seed)) if shots else []
    common = [*common, task.version, Choice.parse("task", name).resolved(), shots, seed, shot_seed]
    planned = []
    for doc in docs:
        own = [e for e in examples if e["id"] != doc["id"]][:shots]
        if len(own) < shots:
            raise UserError(
                f"the task {name} has {len(own)} examples to show, {shots} were asked for; a file needs another split "
                "for them, such as train"
            )
        requests = task.requests(doc, own)
        planned.append((doc, requests, fingerprint([common, doc["id"], [asdict(r) for r in requests]])))
    todo = [item for item in planned if item[2] not in kept]
    start, total = time.perf_counter(), 0.0
    with events.progress(short(name), len(docs), "items") as progress:
        progress.resume_at(len(docs) - len(todo))
        encoded = [[answerer.encode(request) for request in requests] for _, requests, _ in todo]
        longest = max((e.longest for some in encoded for e in some), default=0)
        if solving is None:
            answers = answerer.replies(enumerate(encoded), longest)
        else:
            answers = solving.replies([(i, requests) for i, (_, requests, _) in enumerate(todo)], task.extract, seed)
        if task.whole and longest > context_limit(answerer.model):
            limit = context_limit(answerer.model)
            raise UserError(
                f"the task {name} asks with up to {longest} tokens, the model takes {limit}, and cut prompts would be "
                "other questions; ask for shorter ones"
            )
        last = time.perf_counter()
        for done, (i, replies) in enumerate(answers, 1):
            doc, _, key = todo[i]
            costs: dict[str, float] = {}
            if solving is not None:
                costs = solving.costs(replies)
                replies = [s.text for s in replies]
            figures = task.grade(doc, replies) | costs
            total += figures[task.metric]
            now = time.perf_counter()
            # Items are answered together: an item's seconds are those since the one before it was finished.
            kept.add(
                key, {"figures": figures, "replies": shown(replies), "seconds": now - last}, task=name, id=doc["id"]
            )
            last = now
            progress.update(1, **{task.metric: total / done})
    figures_of = [kept[key]["figures"] for _, _, key in planned]
    clusters = [doc.get("cluster") for doc, _, _ in planned]
    about = [
        {"id": doc["id"], "asked": fingerprint([task.version, [asdict(r) for r in requests]])[:12]}
        | ({} if cluster is None else {"cluster": cluster})
        for (doc, requests, _), cluster in zip(planned, clusters, strict=True)
    ]
    scores = clustered(task.aggregate(figures_of), figures_of, clusters)
    guesses = [guess for doc, _, _ in planned if (guess := task.chance(doc)) is not None]
    if len(guesses) == len(planned):
        scores[task.metric] = scores[task.metric] | {"chance": sum(guesses) / len(guesses)}
    result = TaskResult(
        name,
        task.metric,
        scores,
        [row | figures for row, figures in zip(about, figures_of, strict=True)],
        [
            items.item(doc, requests, kept[key], row, task.metric)
            for (doc, requests, key), row in zip(planned, about, strict=True)
        ],
        len(docs) - len(todo),
        time.perf_counter() - start if todo else 0.0,
    )
    events.emit("task", task=name, figures=result.figures)
    return result


def clustered(
    figures: dict[str, dict[str, float]], rows: Sequence[dict[str, float]], clusters: Sequence[Any]
) -> dict[str, dict[str, float]]:
    """Figures with errors over clusters instead of items, where the documents say what they share."""
    if any(cluster is None for cluster in clusters):
        return figures
    return {
        name: figure
        | {"stderr": clustered_error([row[name] for row in rows], clusters), "clusters": len(set(clusters))}
        for name, figure in figures.items()
    }


def short(task: str) -> str:
    """A task's name as it is shown: its file without the folder."""
    head, equals, tail = task.partition("file=")
    path, comma, rest = tail.partition(",")
    return f"{head}{equals}{Path(path).name}{comma}{rest}" if equals else task


def shown(replies: Iterable[Any]) -> list[Any]:
    """Replies as they are kept: texts, or of each choice its nats (unrounded), bytes and tokens."""
    return [
        {"nats": [s.nats for s in r], "bytes": [s.nbytes for s in r], "tokens": [s.tokens for s in r]}
        if isinstance(r, list)
        else r
        for r in replies
    ]


def run_text(
    model: Any,
    tokenizer: Tokenizer,
    documents: Iterable[tuple[str, str]],
    *,
    name: str = "text",
    sequence_length: int | None = None,
    overlap: int | float = 0,
    batch_tokens: int = BATCH_TOKENS,
    keep: str | Path | Kept | None = None,
    events: Events | None = None,
) -> TaskResult:
    """Bits per byte of (id, text) documents, resumable; figures bits_per_byte and perplexity."""
    kept, events = keep if isinstance(keep, Kept) else Kept(keep), events or Events()
    common = [model_fingerprint(model, tokenizer), "text", sequence_length, overlap]
    rows: list[dict[str, Any]] = []
    resumed = 0
    waiting: list[tuple[str, str, str]] = []
    with events.progress(name, None, "bytes") as progress:

        def flush() -> None:
            scored = document_nats(
                model,
                tokenizer,
                [text for _, text, _ in waiting],
                sequence_length=sequence_length,
                overlap=overlap,
                batch_tokens=batch_tokens,
            )
            for (id_, _, key), (nats, nbytes, tokens) in zip(waiting, scored, strict=True):
                kept.add(key, [nats, nbytes, tokens], task=name, id=id_)
                rows.append(_text_row(id_, kept[key]))
                progress.update(nbytes)
            waiting.clear()
            if rows:
                bits, size = sum(r["bits"] for r in rows), sum(r["bytes"] for r in rows)
                progress.update(0, bits_per_byte=bits / max(size, 1))

        for id_, text in documents:
            if not text:
                continue
            key = fingerprint([common, text])
            if key in kept:
                rows.append(_text_row(id_, kept[key]))
                resumed += 1
                continue
            waiting.append((id_, text, key))
            if sum(len(w[1]) for w in waiting) >= TEXT_CHUNK:
                flush()
        if waiting:
            flush()
    score = summarise([(r["nats"], r["bytes"], r["tokens"]) for r in rows])
    figures = {
        "bits_per_byte": {
            "value": score.bits_per_byte,
            "stderr": score.stderr,
            "documents": score.documents,
            "bytes": score.bytes,
            "tokens": score.tokens,
        },
        "perplexity": {"value": score.perplexity, "stderr": math.nan, "documents": score.documents},
    }
    events.emit("task", task=name, figures=figures)
    return TaskResult(name, "bits_per_byte", figures, rows, resumed=resumed)


def _text_row(id_: str, value: Sequence[float]) -> dict[str, Any]:
    nats, nbytes, tokens = value
    return {"id": id_, "nats": nats, "bytes": nbytes, "tokens": tokens, "bits": nats / math.log(2)}


def text_documents(source: str | Path, limit: int | None = None, split: str = "heldout") -> Iterable[tuple[str, str]]:
    """(id, text) of a curated folder's held-out documents, or of any source the reader knows."""
    import itertools

    from modicum.data.document import Document, read_documents
    from modicum.data.readers import ReadConfig, find, read

    def every() -> Iterable[Document]:
        if (Path(source) / "documents").is_dir():
            yield from read_documents(source, split)
            return
        config = ReadConfig()
        for unit in find(str(source), config):
            yield from (d for d in read(unit, config) if isinstance(d, Document))

    return ((d.id, d.text) for d in itertools.islice(every(), limit))


def solved_texts(task: Any, n: int, seed: int = 0, split: str = "train") -> Iterable[Doc]:
    """Training documents {id, text} of a task: what a small decoder learns the playground from."""
    method = registry.build("task", task)
    return ({"id": doc["id"], "text": method.text(doc)} for doc in method.docs(split, n, seed))
