"""Recipes: one YAML file that says what to make, from which text, under which limits.

    corpus: python                        corpus: ~/notes
    curate: {vocab_size: 4096}            stages:
    pretrain: {time: 40s}                 - curate: {vocab_size: 4096}
    adapt: null                           - pretrain: {time: 40s}
                                            as: base
                                          - pretrain: {from: base, tokens: 2Mtok}
                                            as: more

On the left one section per stage: stages left out run with their defaults, those set to null do not run. On the right a
list, in which a stage may occur several times, under the names that `as` gives; only what is listed runs. `from` names
the stages whose results a stage reads; without it the latest of each kind that it needs.

Unknown keys are refused with the nearest valid one; `NAME.key=value` on the command line overrides a key.
"""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pydantic
import yaml
from pydantic import BaseModel, Field, InstanceOf

from modicum.budget import Budget
from modicum.core.errors import ModicumError, UserError, unknown
from modicum.pipeline.named import find
from modicum.pipeline.section import Bytes, Seconds, Strict
from modicum.pipeline.stage import Input, Inputs, Stage, in_order, load_stage, section_of, stages

S = TypeVar("S", bound=Strict)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")


class Limits(Strict):
    """What the whole run may use; null means no limit."""

    time: Seconds | None = 600.0
    memory: Bytes | None = 4.0 * 2**30
    disk: Bytes | None = 4.0 * 2**30


@dataclass(frozen=True)
class Entry:
    """One stage of a recipe. name: its `as`, or the stage's key. sources: the stages that `from` names."""

    name: str
    key: str
    section: Strict
    sources: tuple[str, ...] = ()

    @property
    def stage(self) -> Stage[Any]:
        return load_stage(self.key)


class Recipe(Strict):
    """A whole run. `corpus`: a folder, a file, `hub:NAME`, or `python` for the Python installation itself.

    `model`: a Hugging Face folder or hub name to go on from; null trains from scratch. `fallback`: overrides that
    hold where a model of the recipe cannot be had (pipeline.models).
    """

    name: str = "recipe"
    corpus: str = "python"
    model: str | None = None
    seed: int = 0
    threads: int | None = None
    budget: Limits = Limits()
    fallback: dict[str, Any] | None = None
    entries: tuple[InstanceOf[Entry], ...] = Field((), exclude=True)
    listed: bool = Field(False, exclude=True)

    def limits(self) -> Budget:
        return Budget(seconds=self.budget.time, memory_bytes=self.budget.memory, disk_bytes=self.budget.disk)

    def entry(self, name: str) -> Entry:
        for entry in self.entries:
            if entry.name == name:
                return entry
        raise unknown("stage of this recipe", name, [e.name for e in self.entries])

    def section(self, name: str) -> Any:
        """A stage's section with what it leaves open filled in from the rest of the recipe."""
        entry = self.entry(name)
        return entry.stage.complete(entry.section, self, name)

    def first(self, kind: type[S]) -> S | None:
        """The first section of this type, as written."""
        return next((e.section for e in self.entries if isinstance(e.section, kind)), None)

    def sources(self, name: str) -> dict[str, list[str]]:
        """{kind of artefact: stages that give it to this one}. Raises `UserError` for one that nothing gives."""
        entry = self.entry(name)
        before = self.entries[: self.entries.index(entry)]
        stage, needed = entry.stage, entry.stage.needed(self.section(name))
        by_kind: dict[str, list[str]] = {}
        for kind in dict.fromkeys((*needed, *stage.optional, *stage.named)):
            given = [e.name for e in before if kind in e.stage.gives]
            by_kind[kind] = [n for n in given if n in entry.sources]
            if len(by_kind[kind]) > 1 and kind not in stage.several:
                names = " and ".join(by_kind[kind])
                raise UserError(f"{name} reads one {kind}, and from names {names}; leave one of them out")
            if not by_kind[kind] and kind in needed:
                if not given:
                    raise _ungiven(name, kind)
                by_kind[kind] = given if kind in stage.several else given[-1:]
            elif not by_kind[kind] and kind in stage.optional:
                by_kind[kind] = [n for n in given if self._alike(n, by_kind)][-1:]
        unused = [s for s in entry.sources if not any(s in given for given in by_kind.values())]
        if unused:
            allowed = [e.name for e in before if set(by_kind) & set(e.stage.gives)]
            raise unknown(f"{name}.from:", unused[0], allowed, "It names stages above whose results this one reads")
        return by_kind

    def _alike(self, name: str, by_kind: Mapping[str, list[str]]) -> bool:
        """Whether a stage reads the same artefacts as `found`, of the kinds that both read."""
        return all(by_kind.get(kind, given) == given for kind, given in self.sources(name).items())

    def inputs(self, name: str, values: Mapping[str, Mapping[str, Any]]) -> Inputs:
        """The stage's artefacts; values: figures or decisions by stage."""
        return Inputs(
            {
                kind: [Input(n, self.section(n), values.get(n, {})) for n in given]
                for kind, given in self.sources(name).items()
            }
        )


def _ungiven(name: str, kind: str) -> UserError:
    givers = [key for key in in_order() if kind in load_stage(key).gives]
    if not givers:
        return UserError(f"{name} reads a {kind}, which no stage gives; type: modicum ls stages")
    return UserError(
        f"the recipe has {name} but not {givers[0]}, which {name} reads; remove '{givers[0]}: null' or add "
        f"'{name}: null' (in a list of stages: put {' or '.join(givers)} before {name})"
    )


def load(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe (a file, or a packaged one by name), apply `key.path=value`. Raises `UserError` on any fault."""
    path = find(path)
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not a YAML file: {str(error).splitlines()[0]}") from None
    if not isinstance(data, dict):
        raise UserError(f"{path} holds {type(data).__name__}, a recipe is a mapping of keys")
    return parse(data, overrides, str(path))


def parse(data: Mapping[str, Any], overrides: Sequence[str] = (), where: str = "recipe") -> Recipe:
    """The recipe that `data` says, with overrides `key.path=value`. Raises `UserError` on any fault."""
    given = copy.deepcopy(dict(data))
    for override in overrides:
        name, equals, text = override.partition("=")
        if not equals or not name:
            raise UserError(f"{override!r} is not an override; write KEY=VALUE, for example budget.time=5m")
        _override(given, name.split("."), yaml.safe_load(text) if text else None, override)
    return _read(given, where)


def overridden(recipe: Recipe, values: Mapping[str, Any]) -> Recipe:
    """The recipe with `key.path: value` set, and nothing left to fall back to."""
    data = as_data(recipe) | {"fallback": None}
    for key, value in values.items():
        _override(data, key.split("."), value, f"fallback.{key}={value}")
    return _read(data, "fallback")


def _read(data: dict[str, Any], where: str) -> Recipe:
    listed = "stages" in data
    general = {key: data.pop(key) for key in [*data] if key in Recipe.model_fields and key not in _INTERNAL}
    raw = _listed(data.pop("stages"), where) if listed else _short(data)
    if data:
        keys = [*_general(), "stages", *([] if listed else in_order())]
        raise unknown(f"key in {where}:", next(iter(data)), keys)
    entries = []
    for name, key, section in raw:
        sources = section.pop("from", None) or ()
        if not isinstance(sources, str | list | tuple) or not all(isinstance(s, str) for s in sources):
            raise UserError(f"{where}: {name}.from={sources!r} must name a stage, or several in a list")
        made = _validate(section_of(key), section, where, name)
        entries.append(Entry(name, key, made, (sources,) if isinstance(sources, str) else tuple(sources)))
    recipe = _validate(Recipe, general, where).model_copy(update={"entries": tuple(entries), "listed": listed})
    for entry in recipe.entries:
        try:
            recipe.sources(entry.name)
            entry.stage.check(recipe.section(entry.name), recipe, entry.name)
        except UserError as error:
            raise error if str(error).startswith(where) else UserError(f"{where}: {error}") from None
    return recipe


_INTERNAL = ("entries", "listed")


def _general() -> list[str]:
    return [key for key in Recipe.model_fields if key not in _INTERNAL]


def _short(data: dict[str, Any]) -> list[tuple[str, str, dict[str, Any]]]:
    """(name, key, section) of the stages of a recipe with one section each."""
    names = []
    for key in in_order():
        section = data.pop(key, {} if load_stage(key).default else None)
        if section is not None:
            names.append((key, key, _mapping(section, key)))
    return names


def _listed(given: Any, where: str) -> list[tuple[str, str, dict[str, Any]]]:
    """The same for a list: `- KEY`, `- KEY: {...}`, and `as: NAME` beside it."""
    if not isinstance(given, list) or not given:
        raise UserError(f"{where}: stages must be a list such as [{{curate: {{}}}}, {{pretrain: {{}}, as: base}}]")
    listed: list[tuple[str, str, dict[str, Any]]] = []
    for item in given:
        item = {item: None} if isinstance(item, str) else item
        keys = [k for k in item if k != "as"] if isinstance(item, dict) else []
        if len(keys) != 1:
            raise UserError(f"{where}: {item!r} in stages is not a stage; write - KEY: {{...}}, and as: NAME beside it")
        key = str(keys[0])
        if key not in stages():
            raise unknown(f"stage in {where}:", key, in_order(), "Type: modicum ls stages")
        name = str(item.get("as") or key)
        if not _NAME.fullmatch(name) or name in _general():
            raise UserError(f"{where}: as: {name!r} is no name for a stage; use letters, digits, - and _")
        if name in (n for n, _, _ in listed):
            raise UserError(f"{where}: two stages are called {name!r}; give one another name with as: NAME")
        listed.append((name, key, _mapping(item[keys[0]], name)))
    return listed


def _mapping(section: Any, name: str) -> dict[str, Any]:
    if section is not None and not isinstance(section, dict):
        raise UserError(f"{name}={section!r} has no keys inside; write {name}: {{KEY: VALUE}}, or null")
    return dict(section or {})


def _override(data: dict[str, Any], keys: list[str], value: Any, override: str) -> None:
    """Set a key; in a recipe with a list, that of the stage called `keys[0]`, where null takes the stage out."""
    if "stages" in data and keys[0] not in _general() and isinstance(data["stages"], list):
        for index, item in enumerate(data["stages"]):
            item = {item: None} if isinstance(item, str) else item
            key = next((k for k in item if k != "as"), "") if isinstance(item, dict) else ""
            if key and keys[0] == (item.get("as") or key):
                data["stages"][index] = item
                if len(keys) == 1 and value is None:
                    del data["stages"][index]
                else:
                    _set(item, [key, *keys[1:]], value, override)
                return
        names = [i if isinstance(i, str) else i.get("as") or next(iter(i), "") for i in data["stages"]]
        raise unknown("stage of this recipe", keys[0], [*names, *_general()])
    _set(data, keys, value, override)


def _set(data: dict[str, Any], keys: Sequence[str], value: Any, override: str) -> None:
    for key in keys[:-1]:
        inner = data.setdefault(key, {})
        if inner is None:
            inner = data[key] = {}
        if not isinstance(inner, dict):
            raise UserError(f"{override!r}: {key!r} holds {inner!r} and has no keys inside")
        data = inner
    data[keys[-1]] = value


def _validate(model: type[S], data: dict[str, Any], where: str, name: str = "") -> S:
    try:
        return model.model_validate(data)
    except pydantic.ValidationError as error:
        raise _explain(error, model, where, name) from None


def _explain(error: pydantic.ValidationError, model: type[BaseModel], where: str, name: str) -> ModicumError:
    first = error.errors()[0]
    path = [p for p in first["loc"] if isinstance(p, str) and not p.startswith("function-")]
    head = [name] if name else []
    dotted = ".".join([*head, *path])
    if first["type"] == "extra_forbidden":
        fields = functools.reduce(_inner, path[:-1], model).model_fields
        return unknown(f"key in {where}:", dotted, [".".join([*head, *path[:-1], k]) for k in fields])
    return UserError(f"{where}: {dotted}={first['input']!r} is not valid: {first['msg']}")


def _inner(model: type[BaseModel], key: str) -> type[BaseModel]:
    kinds = model.model_fields[key].annotation
    options = [kinds, *getattr(kinds, "__args__", ())]
    return next(k for k in options if isinstance(k, type) and issubclass(k, BaseModel))


def as_data(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain data with every default spelled out, in the form in which it was written."""
    data = recipe.model_dump(mode="json")
    sections = {
        e.name: ({"from": list(e.sources)} if e.sources else {}) | e.section.model_dump(mode="json")
        for e in recipe.entries
    }
    if recipe.listed:
        named = [{e.key: sections[e.name]} | ({"as": e.name} if e.name != e.key else {}) for e in recipe.entries]
        return data | {"stages": named}
    return data | {key: sections.get(key) for key in in_order() if key in sections or load_stage(key).default}


def resolved(recipe: Recipe) -> str:
    """The recipe with every default spelled out, as YAML: what a run directory keeps."""
    return yaml.safe_dump(as_data(recipe), sort_keys=False, allow_unicode=True)
