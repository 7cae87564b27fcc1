"""curate: read, clean, deduplicate, filter, tokenize and pack the corpus.

With `from: NAME` the text is tokenized as that stage's, so that a model may go on from one to the other. Models that
`from` names, the weakest first, are those whose losses the step preselect compares.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from pydantic import Field

from modicum.budget import Cost
from modicum.core import registry
from modicum.core.choice import Choice
from modicum.core.errors import ModicumError, UserError
from modicum.core.files import atomic_file, fingerprint, write_json, write_text
from modicum.data.curate import CurateConfig, Curation, beside, curate
from modicum.data.readers import ReadConfig, find
from modicum.data.stages import group_bytes
from modicum.pipeline.context import Context, Run
from modicum.pipeline.models import folder_of
from modicum.pipeline.plan import Planner
from modicum.pipeline.recipe import Recipe, parse, resolved
from modicum.pipeline.section import Bytes, Strict, method
from modicum.pipeline.signals import makers
from modicum.pipeline.stage import Finished, Inputs, Report, Stage, StagePlan
from modicum.pipeline.worker import environment

TEXT = 6  # bytes of memory that a process takes for each byte of text it has in hand
DAMAGED = 20  # files that could not be read and are named in the figures
PARTS = 32  # files of a sample, so that both sides of the held-out split get some
OF_STAGE = "from"  # a generator that another stage gives
SAMPLE = 4 << 20  # bytes that the planner curates, for this stage's own cost and for the stages that follow


class Section(Strict):
    corpus: str | None = None  # None: the recipe's
    tokenizer: str | None = None  # a model whose tokenizer is taken; None: that of the recipe's `model`, or trained
    steps: list[method("step")] = ["normalise", "quality", "python-split", "exact-dedup", "minhash"]  # type: ignore[valid-type]
    encoder: str | None = None  # for steps that embed text; None: they fit LSA on a sample
    models: list[str] = []  # whose losses the step preselect compares, the weakest first
    generator: str | None = None  # of the step rewrite: a model, MODEL@URL, or `from`: the model that `from` names
    vocab_size: int = Field(4096, ge=258)
    reserved: int = Field(0, ge=0)  # tokens of the vocabulary kept free for objectives that need marks
    recall: Bytes | None = None  # playground text among what the tokenizer is trained on; None: as `pretrain` needs
    heldout: float = Field(0.05, gt=0, lt=0.5)
    max_bytes: Bytes | None = None
    group_bytes: Bytes | None = None  # of text that one process works on at a time; None: by the corpus' size
    processes: int = Field(2, ge=1)
    engine: str = "local"


class Curate(Stage[Section]):
    order, default, alone = 10, True, True
    named, several, gives = ("corpus", "model"), ("model",), ("corpus",)

    def complete(self, section: Section, recipe: Recipe, name: str) -> Section:
        from modicum.pipeline.stages.pretrain import Section as Pretrain

        trains = next((s for e in recipe.entries if isinstance(s := e.section, Pretrain) and s.recall), None)
        wanted = trains.recall.vocabulary if trains and trains.recall else 0.0
        return section.model_copy(
            update={
                "corpus": section.corpus or recipe.corpus,
                "tokenizer": section.tokenizer or recipe.model,
                "recall": wanted if section.recall is None else section.recall,
            }
        )

    def check(self, section: Section, recipe: Recipe, name: str) -> None:
        if section.generator == OF_STAGE and not recipe.sources(name)["model"]:
            raise UserError(f"{name}.generator={OF_STAGE} and {name}.from names no stage that gives a model; add one")

    def uses(self, section: Section, recipe: Recipe, name: str) -> dict[str, Any]:
        return {
            "files": _corpus(_source(section), _limit(section))[0],
            "section": section.model_dump(exclude={"processes", "engine", "group_bytes"}),
            "beside": beside([Choice.parse("step", step) for step in section.steps], ReadConfig()),
        }

    def plan(self, section: Section, inputs: Inputs, planner: Planner) -> StagePlan:
        """The stage itself on a small sample, which the stages that follow are planned with.

        Every process has its group of documents in hand, in the sample a small one: memory grows with the group.
        """
        total = _corpus(_source(section), _limit(section))[1]
        processes, size = section.processes, min(total, SAMPLE)
        group = group_bytes(total, section.group_bytes)
        small = max(min(group, size // processes), 1)
        like = inputs["corpus"]["sample"] if "corpus" in inputs else section.tokenizer
        update = {"max_bytes": size, "group_bytes": small, "tokenizer": like, "generator": None}
        update["steps"] = [_without_models(step) for step in section.steps]
        run, alone = _alone(planner, section.model_copy(update=update))
        made = Curation.load(run.stage(self.key) / "data")
        fixed = planner.fixed.get(self.key, Cost())
        tokens = {split: made.count("tokens", split) for split in ("train", "heldout")}
        scale = total / size
        peak = TEXT * (min(group * processes, total) - small * processes)
        cost = Cost(
            tokens=(tokens["train"] + tokens["heldout"]) * scale,
            seconds=max(alone.seconds - fixed.seconds, 0.0) * scale,
            peak_bytes=max(alone.peak_bytes - fixed.peak_bytes, 0.0) + max(peak, 0),
            disk_bytes=_bytes(made) * scale,
        )
        return StagePlan(
            cost,
            {
                "train_tokens": tokens["train"] * scale,
                "vocab_size": made.tokenizer().vocab_size,
                "bytes_per_token": made.count("bytes") / made.count("tokens"),
                "sample": str(made.folder),
                "sample_share": size / total,
                "heldout": section.heldout,
            },
            f"{size / 2**20:.0f} of {total / 2**20:.1f} MiB curated",
        )

    def run(self, section: Section, inputs: Inputs, context: Context) -> dict[str, Any]:
        seed = context.recipe.seed
        like = inputs["corpus"]["folder"] if "corpus" in inputs else None
        models, generator = [model["folder"] for model in inputs.all("model")] or section.models, section.generator
        if generator == OF_STAGE:
            models, generator = [], models[-1]
        made = curate(
            _sources(section, context.folder, seed),
            context.folder / "data",
            _config(section.model_copy(update={"models": models, "generator": generator}), seed, like),
            events=context.events,
            engine=section.engine,
            processes=section.processes,
        )
        steps = [
            {
                "name": b["step"],
                "documents_in": b["documents_in"],
                "documents_out": b["documents_out"],
                "seconds": b["seconds"],
            }
            for b in made.stats["steps"]
        ]
        drops: dict[str, int] = {}
        for by_reason in made.drops.values():
            for reason, n in by_reason.items():
                drops[reason] = drops.get(reason, 0) + n
        return {
            "folder": str(made.folder),
            "documents_in": made.stats["steps"][0]["documents_in"],
            "documents_out": made.count("documents") + made.count("documents", "heldout"),
            "steps": steps,
            "drops": dict(sorted(drops.items(), key=lambda item: -item[1])),
            "domains": made.stats["splits"]["train"]["domains"],
            "tokens_train": made.count("tokens"),
            "tokens_heldout": made.count("tokens", "heldout"),
            "vocab_size": made.tokenizer().vocab_size,
            "bytes_per_token": made.count("bytes") / made.count("tokens"),
            "damaged": made.damaged[:DAMAGED],
            "cost": {"tokens": made.count("tokens") + made.count("tokens", "heldout")},
        }

    def report(self, done: Finished) -> Report:
        """Ten examples of each reason beside the counts."""
        folder = Path(done.figures["folder"])
        examples = Curation.load(folder).examples() if (folder / "drops.jsonl").is_file() else {}
        return Report(values={"examples": examples})

    def miniature(self, section: Section) -> tuple[Section, dict[str, Any]]:
        # Steps that are made for the corpus (a language, pages of the web) might leave nothing of the rehearsal's.
        plain = {Choice.parse("step", step).method for step in Section().steps}
        steps = [step for step in section.steps if Choice.parse("step", step).method in plain]
        return Section(steps=steps, vocab_size=512, heldout=0.2, processes=2), {}


def _without_models(step: Any) -> Any:
    """The step, or in place of one that needs models, which a plan has not: a random choice of as much text, or the
    text as it is where it would be rewritten."""
    choice = Choice.parse("step", step)
    if choice.method == "rewrite":
        return "rewrite"
    needs = registry.load("step", choice.method).cls.signals
    return {"method": "random", "keep": choice.config().keep} if needs else step


@functools.cache
def _corpus(source: str, limit: int | None) -> tuple[str, int]:
    """(fingerprint of the files' names, sizes and times, bytes)."""
    units = find(source, ReadConfig(limit_bytes=limit))
    return fingerprint([[u.id, u.kind, u.stamp] for u in units]), sum(u.nbytes for u in units)


def _source(section: Section) -> str:
    return section.corpus or "python"


def _limit(section: Section) -> int | None:
    return None if section.max_bytes is None else int(section.max_bytes)


def _sources(section: Section, folder: Path, seed: int) -> list[str]:
    """The corpus and, for a model that learns to recall, a sample of that text: its words belong in the vocabulary."""
    if not section.recall:
        return [_source(section)]
    from modicum.evaluate.recall import sample

    path = folder / "playground"
    for i in range(PARTS):
        file = path / f"{i:02}.txt"
        if not file.is_file():
            with atomic_file(file, "w") as handle:
                handle.write("\n\n".join(sample(f"{seed}/{i}", int(section.recall) // PARTS)))
    return [_source(section), str(path)]


def _config(section: Section, seed: int, like: str | None) -> CurateConfig:
    """like: a folder whose tokenizer is taken."""
    return CurateConfig(
        steps=section.steps,
        vocab_size=section.vocab_size,
        reserved=section.reserved,
        tokenizer=like or (str(folder_of(section.tokenizer)) if section.tokenizer else None),
        heldout=section.heldout,
        read=ReadConfig(limit_bytes=_limit(section)),
        signals=makers(section.encoder, section.models, section.generator),
        seed=seed,
        group_bytes=None if section.group_bytes is None else int(section.group_bytes),
    )


def _alone(planner: Planner, section: Section) -> tuple[Run, Cost]:
    """This stage run by itself as it will be, with what it cost."""
    run = Run(planner.scratch / f"{planner.name}-alone")
    data = {"seed": planner.recipe.seed, "threads": planner.recipe.threads}
    write_text(run.folder / "run.yaml", resolved(parse(data | {"stages": [{"curate": section.model_dump()}]})))
    write_json(run.folder / "plan.json", {"stages": {}})
    subprocess.run(
        [sys.executable, "-m", "modicum.pipeline.worker", str(run.folder), "curate", "600", str(os.getpid())],
        capture_output=True,
        check=False,
        env=environment(),
    )
    record = run.done("curate")
    if record is None:
        raise ModicumError("the curation of a sample failed; type: modicum curate CORPUS --out FOLDER to see why")
    return run, Cost(**record["measured"])


def _bytes(made: Curation) -> float:
    return sum(made.count("bytes", s) * 0.3 + made.count("tokens", s) * 2 for s in ("train", "heldout"))
