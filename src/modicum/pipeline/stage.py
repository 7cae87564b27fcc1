"""A stage: one step of a recipe, from the artefacts it needs to those it gives.

A stage is one file, `pipeline/stages/KEY.py`: a docstring `KEY: what it does.`, a model `Section(Strict)` of its part
of a recipe, and one public subclass of `Stage`. Its block of the report is the Jinja template `KEY.html` beside it.
Nothing lists stages. Another distribution adds some through the entry-point group `modicum.stages` (`KEY = module`).

Artefacts are named by kind: corpus, model, index, variants. A stage reads the latest one of each kind that it needs, or
that of the stage that `from` names. Each stage runs in a process of its own, so that its peak memory is its own
and a kill loses nothing that was finished.
"""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.metadata
import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from modicum.budget import Cost
from modicum.core.errors import UserError, unknown
from modicum.pipeline.section import Strict

if TYPE_CHECKING:
    from modicum.pipeline.context import Context, Run
    from modicum.pipeline.plan import Planner
    from modicum.pipeline.recipe import Recipe

HERE = Path(__file__).with_name("stages")
GROUP = "modicum.stages"
S = TypeVar("S", bound=Strict)


@dataclass(frozen=True)
class Input:
    """An artefact as its reader sees it: the stage that gives it, and that stage's figures (its decisions, in a
    plan)."""

    name: str
    section: Strict
    values: Mapping[str, Any] = field(default_factory=dict)

    def __getitem__(self, key: str) -> Any:
        return self.values[key]


class Inputs(Mapping[str, Input]):
    """A stage's artefacts by kind: `inputs["corpus"]` is the last one named, `inputs.all("corpus")` every one."""

    def __init__(self, inputs: Mapping[str, Sequence[Input]]):
        self._inputs = {kind: list(given) for kind, given in inputs.items() if given}

    def __getitem__(self, kind: str) -> Input:
        return self._inputs[kind][-1]

    def __iter__(self) -> Iterator[str]:
        return iter(self._inputs)

    def __len__(self) -> int:
        return len(self._inputs)

    def all(self, kind: str) -> list[Input]:
        return self._inputs.get(kind, [])


@dataclass(frozen=True)
class StagePlan:
    """cost: beyond the stage's fixed one. decisions: what the stage must keep to. basis: one line on where the
    figures come from."""

    cost: Cost
    decisions: dict[str, Any] = field(default_factory=dict)
    basis: str = ""


@dataclass(frozen=True)
class Finished:
    """A finished stage, for its part of the report."""

    run: Run
    name: str
    key: str
    block: Path | None  # the template of its block
    section: Strict
    figures: dict[str, Any]
    inputs: Inputs


@dataclass(frozen=True)
class Report:
    """What a stage shows beside its block.

    charts: Plotly figures by the name that the block's `data-chart` gives after "NAME-". cards: label, value, note, and
    good (whether the run's aim was met). lines: printed below the ledger; above: printed over it. lead: the sentence a
    reader takes away. values: more for the block's template. rank: blocks with a low rank come first; 100 and more
    stand below the ledger.
    """

    charts: dict[str, dict[str, Any] | None] = field(default_factory=dict)
    cards: list[dict[str, Any]] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    above: str = ""
    lead: str = ""
    values: dict[str, Any] = field(default_factory=dict)
    rank: int = 100


class Stage(Generic[S]):
    """Base of every stage. Only `run` must be written."""

    key: ClassVar[str] = ""  # set when it is found
    order: ClassVar[int] = 90  # its place in a recipe that has one section per stage and no list
    default: ClassVar[bool] = False  # part of such a recipe unless set to null
    needs: ClassVar[tuple[str, ...]] = ()  # kinds of artefacts that it reads
    optional: ClassVar[tuple[str, ...]] = ()  # kinds that it reads where there is one made from the same inputs
    named: ClassVar[tuple[str, ...]] = ()  # kinds that it reads only where `from` names a stage that gives one
    several: ClassVar[tuple[str, ...]] = ()  # kinds of which it reads all, or those that `from` names
    gives: ClassVar[tuple[str, ...]] = ()
    alone: ClassVar[bool] = False  # starts processes of its own: rehearsed in a fresh one, not in a fork
    block: ClassVar[Path | None] = None  # the template of its block in the report; set when it is found

    def needed(self, section: S) -> tuple[str, ...]:
        """`needs` under this section."""
        return self.needs

    def complete(self, section: S, recipe: Recipe, name: str) -> S:
        """Fill in what the section leaves open from the recipe's general keys and other stages."""
        return section

    def check(self, section: S, recipe: Recipe, name: str) -> None:
        """Raise `UserError` for choices that do not go together; called when a recipe is read."""

    def uses(self, section: S, recipe: Recipe, name: str) -> dict[str, Any]:
        """What decides the result beside the version, the seed and the inputs: the stage's fingerprint."""
        return section.model_dump()

    def models(self, section: S) -> dict[str, str]:
        """{key of the section: model} for published models that must be there before the run."""
        return {}

    def plan(self, section: S, inputs: Inputs, planner: Planner) -> StagePlan:
        """The cost of `run` beyond the stage's fixed one. `inputs` hold the decisions of the stages before it."""
        return StagePlan(Cost(), {}, "fixed cost alone")

    def run(self, section: S, inputs: Inputs, context: Context) -> dict[str, Any]:
        """Do the work in `context.folder`; returns figures for JSON, among them "cost" (tokens, flops, parameters)."""
        raise NotImplementedError

    def miniature(self, section: S) -> tuple[S, dict[str, Any]]:
        """The section with next to nothing to do, and the decisions that its run keeps to, for the rehearsal.

        Methods that read text stay; others become baselines, whose knobs fit a model of any size.
        """
        return section, {}

    def prepare(self) -> None:
        """Do what is done once per machine (compiling), before anything is timed."""

    def report(self, done: Finished) -> Report:
        return Report()


@dataclass(frozen=True)
class StageInfo:
    key: str
    summary: str
    module: str
    path: Path

    @property
    def card(self) -> str:
        """The whole module docstring, read without importing."""
        return ast.get_docstring(ast.parse(self.path.read_text(encoding="utf-8"))) or ""


@functools.cache
def stages() -> dict[str, StageInfo]:
    """Every stage by key, sorted; nothing is imported."""
    classes = {}
    for path in sorted(HERE.glob("*.py")):
        if not path.name.startswith("_"):
            key, summary = _head(path)
            classes[key] = StageInfo(key, summary, f"modicum.pipeline.stages.{path.stem}", path)
    for entry in importlib.metadata.entry_points(group=GROUP):
        try:
            spec = importlib.util.find_spec(entry.value)
        except ModuleNotFoundError:
            spec = None
        if spec is None or spec.origin is None:
            raise UserError(f"the stage {entry.name!r} of {entry.value} is not there; install its package again")
        if entry.name in classes:
            raise UserError(f"stage {entry.name!r} of {entry.value} is already taken by {classes[entry.name].module}")
        classes[entry.name] = StageInfo(entry.name, _head(Path(spec.origin))[1], entry.value, Path(spec.origin))
    return dict(sorted(classes.items()))


def _head(path: Path) -> tuple[str, str]:
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    key, colon, summary = text.split("\n\n")[0].replace("\n", " ").partition(": ")
    if not colon or " " in key:
        raise UserError(f'{path}: the first line must read """KEY: what it does; got {text[:40]!r}')
    return key, summary.rstrip(".")


@functools.cache
def load_stage(key: str) -> Stage[Any]:
    """The stage `key`, imported. Raises `UserError` with a near miss for an unknown one."""
    if key not in stages():
        raise unknown("stage", key, stages(), "Type: modicum ls stages")
    info = stages()[key]
    module = importlib.import_module(info.module)
    classes = [
        v
        for v in vars(module).values()
        if isinstance(v, type) and issubclass(v, Stage) and v.__module__ == module.__name__ and v.__name__[0] != "_"
    ]
    section = getattr(module, "Section", None)
    if len(classes) != 1 or not (isinstance(section, type) and issubclass(section, Strict)):
        raise UserError(
            f"{info.module}: a stage's file holds one model Section(Strict) and one public subclass of Stage; found "
            f"{[c.__name__ for c in classes]} and Section={section!r}"
        )
    made: Stage[Any] = classes[0]()
    block = info.path.with_suffix(".html")
    classes[0].key, classes[0].block = key, made.block or (block if block.is_file() else None)
    return made


def section_of(key: str) -> type[Strict]:
    """The model of a stage's part of a recipe."""
    load_stage(key)
    section: type[Strict] = importlib.import_module(stages()[key].module).Section
    return section


def in_order() -> list[str]:
    """Keys of all stages in the order of a recipe without a list."""
    return sorted(stages(), key=lambda key: (load_stage(key).order, key))
