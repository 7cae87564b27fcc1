"""Recipes: one YAML file that says what to make, from which text, under which limits.

Unknown keys are refused with the nearest valid one; `section.key=value` on the command line overrides a
key. Every section belongs to one stage of the road; a section set to null leaves its stage out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import pydantic
import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from modicum.budget import Budget, units
from modicum.core import registry
from modicum.core.choice import Choice
from modicum.core.errors import ModicumError, UserError, unknown
from modicum.pipeline.named import find

Bytes = Annotated[float, BeforeValidator(lambda value: units.parse(value, "bytes"))]
Seconds = Annotated[float, BeforeValidator(lambda value: units.parse(value, "seconds"))]
Tokens = Annotated[float, BeforeValidator(lambda value: units.parse(value, "tokens"))]


def method(port: str) -> Any:
    """A pydantic type that reads a method of `port` and checks that it and its knobs exist."""

    def check(value: Any) -> Any:
        Choice.parse(port, value).config()
        return value

    return Annotated[str | dict[str, Any], BeforeValidator(check)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Limits(Section):
    """What the whole road may use; null means no limit."""

    time: Seconds | None = 600.0
    memory: Bytes | None = 4.0 * 2**30
    disk: Bytes | None = 4.0 * 2**30


class Curate(Section):
    steps: list[method("step")] = ["normalise", "quality", "python-split", "exact-dedup", "minhash"]  # type: ignore[valid-type]
    vocab_size: int = Field(4096, ge=258)
    reserved: int = Field(0, ge=0)  # tokens of the vocabulary kept free for objectives that need marks
    heldout: float = Field(0.05, gt=0, lt=0.5)
    max_bytes: Bytes | None = None
    group_bytes: Bytes | None = None  # of text that one process works on at a time; null: by the size of the corpus
    processes: int = Field(2, ge=1)
    engine: str = "local"


class Predict(Section):
    law: method("law") = "chinchilla"  # type: ignore[valid-type]
    parameters: list[float] = [0.06, 0.12, 0.25]  # proxies' sizes as shares of the main model's
    tokens: list[float] = [0.08, 0.12, 0.18]  # and their tokens as shares of the main run's
    level: float = Field(0.95, gt=0.5, lt=1)


class Recall(Section):
    """Rows of the playground's recall tasks beside the corpus, growing longer (evaluate.recall)."""

    lengths: list[int] = [64, 256, 1024]  # tokens of a row, one after another over the run
    shares: list[float] = [0.5, 0.25, 0.25]  # of the run, for each length
    text: float = Field(0.15, ge=0, lt=1)  # share of the rows that hold the corpus
    copies: float = Field(0.25, ge=0, lt=1)  # share of the documents that are a list and its copy
    vocabulary: Bytes = 2.0 * 2**20  # such text among what the tokenizer is trained on


class Pretrain(Section):
    parameters: float | None = None  # None: the planner chooses
    shape: tuple[int, int] | None = None  # width and layers, for who wants to say them
    heads: int | None = Field(None, ge=1)  # None: of 64 dimensions, 32 in models narrower than 256
    time: Seconds | None = 210.0  # with tokens None: as many as fit in this time
    tokens: Tokens | None = None
    sequence_length: int = Field(256, ge=16)
    batch_tokens: int = Field(1024, ge=64)
    micro_batch: int | None = None  # sequences of one forward pass; None: the whole batch
    lr: float | None = None  # None: from the model's width
    optimizer: method("optimizer") = "adamw"  # type: ignore[valid-type]
    schedule: method("schedule") = "wsd"  # type: ignore[valid-type]
    objective: method("objective") = "next-token"  # type: ignore[valid-type]
    memory: list[method("memory")] = []  # type: ignore[valid-type]
    surgery: method("surgery") = "none"  # type: ignore[valid-type]
    form: method("linear") | None = None  # type: ignore[valid-type]
    targets: list[str] = ["layers.*"]  # the linear layers that get the form
    clip: float = Field(1.0, ge=0)  # limit of the gradient's norm, 0 for none
    masters: bool = True  # float32 weights behind bf16 ones
    mixture: method("mixture") = "natural"  # type: ignore[valid-type]
    packing: method("packing") = "concat"  # type: ignore[valid-type]
    dtype: str = "bf16"
    recall: Recall | None = None  # learn to recall from the context as well


class Adapt(Section):
    model: str | None = None  # a folder, a hub id or a name of `modicum get`; None: the model pretrained in this run
    form: method("linear") = "lora:rank=16"  # type: ignore[valid-type]
    targets: list[str] | None = None  # the linear layers that get it; None: where its paper puts it
    tokens: Tokens = 200_000.0
    sequence_length: int = Field(256, ge=16)
    batch_tokens: int = Field(4096, ge=64)
    micro_batch: int | None = Field(None, ge=1)  # sequences of one forward pass; None: the whole batch
    lr: float = Field(2e-3, gt=0)
    pairs: int = Field(20_000, ge=8)
    heldout_pairs: int = Field(1000, ge=1)  # at most so many give the loss before and after
    grounded: float = Field(0.0, ge=0, le=1)  # fraction of the pairs that are asked with retrieved passages


class Compress(Section):
    forms: list[method("linear")] = ["int8", "int4"]  # type: ignore[valid-type]


class Ground(Section):
    index: method("index") = "exact"  # type: ignore[valid-type]
    encoder: str | None = None  # an encoder's folder, hub id or name; None: the model pretrained in this run
    queries: int = Field(400, ge=1)
    passages: int | None = 20_000


class Serve(Section):
    questions: list[str] = []  # empty: three are taken from the corpus
    passages: int = Field(3, ge=1)
    max_tokens: int = Field(64, ge=1)
    prompt_tokens: int = Field(960, ge=64)  # instructions, passages and question at most
    mode: str = "fused"


class Evaluate(Section):
    tasks: list[method("task")] = []  # type: ignore[valid-type]
    bytes: Bytes = 400_000.0  # held-out text scored by each variant of the model
    questions: int = Field(0, ge=0)  # held-out questions with one documented answer, closed book against grounded
    speed_tokens: int = Field(32, ge=2)  # that each variant writes to say how fast it is


class Recipe(Section):
    """The whole road. `corpus`: a folder, a file, `hub:NAME`, or `python` for the Python installation itself.

    `model`: a Hugging Face folder or hub name to go on from; null trains from scratch.
    """

    name: str = "recipe"
    corpus: str = "python"
    model: str | None = None
    seed: int = 0
    threads: int | None = None
    budget: Limits = Limits()
    curate: Curate = Curate()
    predict: Predict | None = Predict()
    pretrain: Pretrain = Pretrain()
    adapt: Adapt | None = Adapt()
    compress: Compress | None = Compress()
    ground: Ground | None = Ground()
    serve: Serve | None = Serve()
    evaluate: Evaluate = Evaluate()
    fallback: dict[str, Any] | None = (
        None  # overrides that hold where a model of the recipe cannot be had (pipeline.models)
    )

    def limits(self) -> Budget:
        return Budget(seconds=self.budget.time, memory_bytes=self.budget.memory, disk_bytes=self.budget.disk)


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


def parse(data: dict[str, Any], overrides: Sequence[str] = (), where: str = "recipe") -> Recipe:
    for override in overrides:
        name, equals, text = override.partition("=")
        if not equals or not name:
            raise UserError(f"{override!r} is not an override; write KEY=VALUE, for example budget.time=5m")
        _set(data, name.split("."), yaml.safe_load(text) if text else None, override)
    try:
        recipe = Recipe.model_validate(data)
    except pydantic.ValidationError as error:
        raise _explain(error, where) from None
    _check_combinations(recipe, where)
    return recipe


def overridden(recipe: Recipe, values: dict[str, Any]) -> Recipe:
    """The recipe with `key.path: value` set, and nothing left to fall back to."""
    data = recipe.model_dump(mode="json") | {"fallback": None}
    for key, value in values.items():
        _set(data, key.split("."), value, f"fallback.{key}={value}")
    return parse(data, where="fallback")


def _check_combinations(recipe: Recipe, where: str) -> None:
    """Refuse what does not go together in a stage, before anything is planned."""
    from modicum.adapt.run import AdaptConfig
    from modicum.adapt.run import members as adapting
    from modicum.compress.run import members as compressing
    from modicum.core import compose
    from modicum.train.config import TrainConfig
    from modicum.train.config import members as training

    pretrain = recipe.pretrain
    names = (
        "sequence_length batch_tokens micro_batch optimizer schedule objective memory surgery form targets clip masters"
    )
    asked = pretrain.model_dump(include=set(names.split()))
    try:
        chosen = training(TrainConfig(steps=1, **asked, dtype=pretrain.dtype))
        chosen += [compose.member(port, getattr(pretrain, port)) for port in ("packing", "mixture")]
        marks = registry.build("objective", pretrain.objective).reserved()
        if recipe.model or recipe.curate.reserved >= marks:
            chosen.append(compose.setting("the vocabulary", provides={"reserved_tokens"}))
        compose.resolve(
            chosen,
            options={
                "linear": "pretrain.form",
                "document_mask": "set pretrain.packing=concat:mask=true",
                "reserved_tokens": f"set curate.reserved={marks}",
            },
            where=f"{where}: pretrain",
        )
        if recipe.adapt is not None:
            config = AdaptConfig(form=recipe.adapt.form)
            compose.resolve(adapting(config), options={"linear": "adapt.form"}, where=f"{where}: adapt")
        for form in recipe.compress.forms if recipe.compress is not None else ():
            compose.resolve(compressing(form), options={"linear": "compress.forms"}, where=f"{where}: compress")
    except UserError as error:
        raise error if str(error).startswith(where) else UserError(f"{where}: {error}") from None


def _set(data: dict[str, Any], keys: list[str], value: Any, override: str) -> None:
    for key in keys[:-1]:
        inner = data.setdefault(key, {})
        if inner is None:
            inner = data[key] = {}
        if not isinstance(inner, dict):
            raise UserError(f"{override!r}: {key!r} holds {inner!r} and has no keys inside")
        data = inner
    data[keys[-1]] = value


def _explain(error: pydantic.ValidationError, where: str) -> ModicumError:
    first = error.errors()[0]
    place = [p for p in first["loc"] if isinstance(p, str) and not p.startswith("function-")]
    dotted = ".".join(place)
    if first["type"] == "extra_forbidden":
        section = _section(place[:-1])
        return unknown(f"key in {where}:", dotted, [".".join([*place[:-1], k]) for k in section.model_fields])
    return UserError(f"{where}: {dotted}={first['input']!r} is not valid: {first['msg']}")


def _section(keys: Sequence[str]) -> type[BaseModel]:
    current: type[BaseModel] = Recipe
    for key in keys:
        kinds = current.model_fields[key].annotation
        options = [kinds, *getattr(kinds, "__args__", ())]
        current = next(k for k in options if isinstance(k, type) and issubclass(k, BaseModel))
    return current


def resolved(recipe: Recipe) -> str:
    """The recipe with every default spelled out, as YAML: what a run directory keeps."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def dotted(recipe: Recipe) -> Iterator[tuple[str, Any]]:
    """Every leaf of the recipe as (dotted key, value)."""
    stack: list[tuple[str, Any]] = [("", recipe.model_dump(mode="json"))]
    while stack:
        prefix, value = stack.pop()
        if isinstance(value, dict):
            stack += [(f"{prefix}.{k}".lstrip("."), v) for k, v in reversed(value.items())]
        else:
            yield prefix, value
