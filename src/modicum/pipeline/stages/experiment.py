"""experiment: a study of small trainings on a corpus (port `experiment`): effects with intervals, or a mixture.

Every trial is a run of one proxy; finished ones are kept, so that a study that was stopped goes on. Trials go on from a
model where `from` names a stage that gives one. Of several corpora the first is trained on; the held-out text of the
others is the target.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field

from modicum.budget import Cost
from modicum.core import registry
from modicum.core.choice import Choice
from modicum.core.files import read_json
from modicum.data.curate import Curation
from modicum.evaluate.study import Corpus, StudySpec, table_text
from modicum.pipeline import costs
from modicum.pipeline.context import Context
from modicum.pipeline.plan import Planner
from modicum.pipeline.recipe import Recipe
from modicum.pipeline.section import Bytes, Parameters, Strict, Tokens, method
from modicum.pipeline.stage import Finished, Inputs, Report, Stage, StagePlan
from modicum.train.config import DTYPES


class Section(Strict):
    study: method("experiment") = "random"  # type: ignore[valid-type]
    parameters: Parameters = 500_000.0  # of the proxy; a given model has its own
    tokens: Tokens = 100_000.0  # of a trial of length 1
    sequence_length: int = Field(128, ge=16)
    batch_tokens: Tokens = 1024.0  # of a step
    lr: float | None = None
    dtype: str = "fp32"
    target: list[str] | None = None  # domains whose mean loss counts; None: all
    pool: list[str] | None = None  # domains that are trained on; None: all
    heldout_bytes: Bytes = 60_000.0  # held-out text of each domain that is scored


class ExperimentStage(Stage[Section]):
    order = 25
    needs, named, several, gives = ("corpus",), ("model",), ("corpus",), ("study",)

    def check(self, section: Section, recipe: Recipe, name: str) -> None:
        from modicum.pipeline.training import dtype_named

        dtype_named(section.dtype, name)
        Choice.parse("experiment", section.study).config()

    def plan(self, section: Section, inputs: Inputs, planner: Planner) -> StagePlan:
        """The trials counted on the curated sample, and a few steps timed."""
        folders = {corpus.name: corpus["sample"] for corpus in inputs.all("corpus")}
        model = costs.subject(planner, inputs["model"]) if "model" in inputs else None
        study = _study(section, folders, planner.scratch / planner.name, planner.recipe.seed, model, sample=True)
        made = study.estimate()
        small = study.trial_config(1.0, 0)
        peak = costs.training_cost(planner, study.fresh(0).config, small).peak_bytes
        return StagePlan(
            Cost(**made["cost"] | {"peak_bytes": peak}),
            {"trials": made["trials"]},
            f"{made['trials']} trainings of {small.total_steps} steps and more, timed; {made['merges']} merges",
        )

    def run(self, section: Section, inputs: Inputs, context: Context) -> dict[str, Any]:
        model = inputs["model"]["folder"] if "model" in inputs else None
        folders = {corpus.name: corpus["folder"] for corpus in inputs.all("corpus")}
        study = _study(section, folders, context.folder, context.recipe.seed, model)
        study.run(context.events, context.deadline)
        made: dict[str, Any] = read_json(context.folder / "study.json")
        return made | {"cost": {"tokens": made["tokens"], "parameters": study.fresh(0).config.parameters()}}

    def miniature(self, section: Section) -> tuple[Section, dict[str, Any]]:
        small = Section(
            study="random:runs=2", tokens=1024.0, sequence_length=64, batch_tokens=256.0, dtype=section.dtype
        )
        return small.model_copy(update={"parameters": 60_000.0, "heldout_bytes": 2000.0}), {}

    def report(self, done: Finished) -> Report:
        lines = table_text(done.figures).splitlines()
        return Report(lines=lines, values={"rows": done.figures["rows"], "notes": done.figures["notes"]}, rank=5)


def _study(
    section: Section, folders: dict[str, Any], out: Any, seed: int, model: str | None, sample: bool = False
) -> Any:
    """sample: the folders hold a part of their corpora, for a plan: domains that it lacks are left out."""
    from modicum.evaluate.experiments import Study

    choice = Choice.parse("experiment", section.study)
    cls = registry.load("experiment", choice.method).cls
    pool, *rest = (Curation.load(folder) for folder in folders.values())
    others = dict(zip([*folders][1:], rest, strict=True))
    wanted, trained = tuple(section.target or others), tuple(section.pool or ())
    if sample:
        scored = {d.domain for d in pool.documents("heldout")} | set(others)
        wanted, trained = tuple(d for d in wanted if d in scored), tuple(d for d in trained if d in pool.domains)
    spec = StudySpec(
        tokens=section.tokens,
        sequence_length=section.sequence_length,
        batch_tokens=section.batch_tokens,
        lr=section.lr,
        dtype=DTYPES[section.dtype],
        seed=seed,
        parameters=None if model else section.parameters,
        model=model,
        target=wanted or None,
        pool=trained or None,
        heldout_bytes=section.heldout_bytes,
    )
    corpus = Corpus.of(pool, cls.reads(choice.config()), cls.compares, others)
    return Study(choice, corpus, spec, out)
